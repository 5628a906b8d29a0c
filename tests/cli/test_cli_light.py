"""The command line starts fast and loads nothing it does not need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ["torch", "timm", "transformers", "accelerate", "pyscipopt", "matplotlib", "sklearn", "numpy"]


@pytest.mark.parametrize(
    "code",
    ["import hub_mpq", "import hub_mpq.cli", "import typer.main, hub_mpq.cli as c; typer.main.get_command(c.app)"],
)
def test_nothing_heavy_is_imported(code):
    code += f"; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def worked() -> float:
    """Seconds that this process's children have worked."""
    of = os.times()
    return of.children_user + of.children_system


def test_help_takes_less_than_a_second_of_work():
    seconds = []
    for _ in range(3):  # the processor's seconds, the best of three: other processes share the machine
        began = worked()
        done = subprocess.run([sys.executable, "-m", "hub_mpq", "--help"], capture_output=True, text=True)
        seconds.append(worked() - began)
        assert done.returncode == 0
    assert min(seconds) < 1.0
    for command in ("inspect", "indicators", "search", "solve", "pareto", "quantize", "finetune", "evaluate", "demo"):
        assert command in done.stdout


def test_version(run):
    import hub_mpq

    assert run("--version").stdout.strip() == f"hub-mpq {hub_mpq.__version__}"


def test_every_command_has_help(run):
    for command in ("inspect", "indicators", "search", "solve", "pareto", "quantize", "finetune", "evaluate", "demo"):
        assert run(command, "--help").exit_code == 0
