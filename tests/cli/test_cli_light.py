"""The command line starts fast and loads nothing it does not need."""

from __future__ import annotations

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


def test_help_imports_nothing_heavy_and_names_the_commands():
    code = (
        "import atexit, runpy, sys; sys.argv = ['hub-mpq', '--help']\n"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules]))\n"
        "runpy.run_module('hub_mpq', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("inspect", "indicators", "search", "solve", "pareto", "quantize", "finetune", "evaluate", "demo"):
        assert command in done.stdout


def test_version(run):
    import hub_mpq

    assert run("--version").stdout.strip() == f"hub-mpq {hub_mpq.__version__}"


def test_every_command_has_help(run):
    for command in ("inspect", "indicators", "search", "solve", "pareto", "quantize", "finetune", "evaluate", "demo"):
        assert run(command, "--help").exit_code == 0


def test_help_shows_neither_the_type_of_a_flag_nor_huge_ends(run):
    for command in ([], ["indicators"], ["quantize"], ["bench"], ["launch"], ["push"]):
        text = run(*command, "--help").stdout
        assert not [word for word in ("<bool>", "BOOLEAN", "2147483647", "4294967295") if word in text]
