"""Imports go downwards only, and core, cost and solve never import torch."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hub_mpq"
FLOOR = {
    **dict.fromkeys(["errors", "versions", "_version"], -1),
    "core": 0,
    "cost": 1,
    **dict.fromkeys(["quantizers", "solve", "pack"], 2),
    "nn": 3,
    **dict.fromkeys(["adapters", "tasks"], 4),
    "train": 5,
    **dict.fromkeys(["search", "export"], 6),
    **dict.fromkeys(["runtime", "report", "plot"], 7),
    **dict.fromkeys(["hub", "data"], 8),
    "model": 9,
    "demo": 10,
    "cli": 11,
    **dict.fromkeys(["__init__", "__main__"], 12),
}


def imports(path):
    """Names of the files and folders of the package that a file imports, wherever and in whatever form."""
    package = ("hub_mpq", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            # `from .. import report` and `from hub_mpq import report` import a file by a name of its folder
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "hub_mpq" else (module,)


def upward(path, name):
    """Whether an import from a file is one of its own floor or above."""
    parts = name.split(".")
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if parts[0] != "hub_mpq":
        return here in ("core", "cost", "solve") and parts[0] == "torch"
    return len(parts) == 1 or (
        parts[1] != here and FLOOR.get(parts[1], 99) >= FLOOR[here]
    )  # 99: a name of the package itself


def test_imports_go_downwards():
    found = [(path, name) for path in PACKAGE.rglob("*.py") for name in imports(path)]
    assert not [f"{path.relative_to(PACKAGE)} imports {name}" for path, name in found if upward(path, name)]


def test_every_file_and_folder_has_a_floor():
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__pycache__", "py.typed"}
    assert there == set(FLOOR)


@pytest.mark.parametrize(
    "line",
    [
        "from .. import model",
        "from ..model import HubMPQ",
        "from ..hub.publish import publish",
        "import hub_mpq.model",
        "import hub_mpq",
        "from hub_mpq import model",
        "from hub_mpq.model import HubMPQ",
        "def f():\n    from .. import report, model",
        "from .. import _LAZY",
    ],
)
def test_every_form_of_an_import_is_seen(line, monkeypatch):
    path = PACKAGE / "solve" / "solve.py"
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert any(upward(path, name) for name in imports(path))
