"""Imports go downwards only, and spec, cost and solve never import torch."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hub_mpq"
FLOOR = {
    "errors": -1,
    "versions": -1,
    "spec": 0,
    **dict.fromkeys(["cost", "kernels"], 1),
    **dict.fromkeys(["quantizers", "solve", "pack"], 2),
    "nn": 3,
    **dict.fromkeys(["adapters", "train"], 4),
    **dict.fromkeys(["search", "report", "plot"], 5),
    **dict.fromkeys(["hub", "data"], 6),
    "model": 7,
    "demo": 8,
    **dict.fromkeys(["cli", "__init__"], 9),
    "__main__": 10,
}


def imports(path):
    """Absolute dotted names that a file imports, wherever the import stands."""
    package = ("hub_mpq", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*base, node.module)) if node.module else ".".join(base)
            if node.level and not node.module:
                yield from (".".join((*base, alias.name)) for alias in node.names)


def test_imports_go_downwards():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if here in ("spec", "cost", "solve") and parts[0] == "torch":
                wrong.append(f"{path.name} imports torch")
            inside = parts[0] == "hub_mpq" and len(parts) > 1 and parts[1] != here
            if inside and FLOOR.get(parts[1], -1) >= FLOOR[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong
