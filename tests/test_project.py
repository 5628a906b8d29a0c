"""The files around the package agree with it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import hub_mpq

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_has_one_home():
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "hub_mpq/_version.py"
    assert version("hub-mpq") == hub_mpq.__version__
    newest = next(line for line in (ROOT / ".github" / "CHANGELOG.md").read_text().splitlines() if line[:3] == "## ")
    assert newest.split()[1] == hub_mpq.__version__


def test_hooks_are_local_and_run_what_the_test_extra_installs():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    installed = {Requirement(line).name for line in PROJECT["project"]["optional-dependencies"]["test"]}
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].split()[0] in installed


def test_the_workflow_calls_the_script():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert "bash .ci/run" in steps
