"""What RESULTS.md and README.md of the benchmarks say about commands, sources of tables and links."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from functools import lru_cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "benchmarks"
FILES = ["RESULTS.md", "README.md"]


def lines_of(name):
    return (FOLDER / name).read_text(encoding="utf-8").splitlines()


def blocks_of(name):
    """Paragraphs, tables and code blocks in order."""
    return [block.strip("\n") for block in re.split(r"\n\s*\n", "\n".join(lines_of(name))) if block.strip()]


def commands_of(name):
    """Every `python examples/….py …` in code blocks and between backticks, without shell comments."""
    found = []
    for block in blocks_of(name):
        if block.startswith("    "):
            texts = re.sub(r"\\\n\s*", " ", block).splitlines()
        else:
            texts = re.findall(r"`([^`]+)`", block)
        found += [m[1] for text in texts if (m := re.search(r"\bpython (examples/[^#]*)", text))]
    return found


@lru_cache
def arguments_of(script):
    """({option: its number of values, None for many}, whether there are positional arguments, all strings)."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    options, positional = {}, False
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
            continue
        name = node.args[0].value
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        positional |= not name.startswith("--")
        if name.startswith("--"):
            options[name] = 0 if "store_true" in given.get("action", "") else None if "nargs" in given else 1
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return options, positional, strings


def check(command):
    script, *words = shlex.split(command)
    assert (ROOT / script).is_file(), command
    options, positional, strings = arguments_of(script)
    left = 0  # values that the last option may still take
    for word in words:
        if word.startswith("--"):
            assert word in options, f"{command}: no option {word}"
            left = options[word]
        elif left is None:
            continue
        elif left:
            left -= 1
        else:
            assert positional, f"{command}: takes no argument {word}"
            assert word in strings, f"{command}: unknown argument {word}"


@pytest.mark.parametrize("name", FILES)
def test_every_command_exists(name):
    commands = commands_of(name)
    assert len(commands) > 20
    for command in commands:
        check(command)


def test_a_wrong_command_is_found():
    for command in (
        "examples/benchmarks/nothing.py",
        "examples/benchmarks/solve.py --seed 5",
        "examples/benchmarks/solve.py golden",
        "examples/benchmarks/train.py everything",
        "examples/benchmarks/study.py --report summary",
    ):
        with pytest.raises(AssertionError):
            check(command)


@pytest.mark.parametrize("name", FILES)
def test_every_option_that_is_named_exists(name):
    known = {option for file in FOLDER.glob("*.py") for option in arguments_of(file.relative_to(ROOT).as_posix())[0]}
    known |= set(arguments_of("examples/imagenet.py")[0])
    named = re.findall(r"(?<![\w-])--[a-z][a-z-]*", "\n".join(lines_of(name)))
    assert set(named) - known - {"--no-deps", "--help"} == set()


def test_every_table_has_its_source():
    """The paragraph above, but for **Older**, names the command, the machine, the date and the commit."""
    blocks = blocks_of("RESULTS.md")
    tables = [i for i, block in enumerate(blocks) if block.startswith("|")]
    assert len(tables) > 40
    for i in tables:
        above = next(block for block in reversed(blocks[:i]) if not block.startswith("**Older:**"))
        where = blocks[i].splitlines()[0]
        assert above.startswith("**Run:** "), where
        assert re.search(r"`(?:[^`]*python examples/|hub-mpq )[^`]+`", above), where
        assert "machine" in above, where
        assert re.search(r"\b20\d\d-\d\d-\d\d\b", above), where
        assert re.search(r"(commits?|recorded in) `[0-9a-f]{7}`", above.replace("\n", " ")), where


def test_no_script_hides_a_package():
    """The folder of a script comes first in sys.path; Numba, for one, imports `coverage` where it finds it."""
    names = {file.stem for file in FOLDER.glob("*.py")}
    assert names & {"coverage", *sys.stdlib_module_names, *packages_distributions()} == set()


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", FILES)
def test_links_resolve(name):
    text = "\n".join(lines_of(name))
    anchors = [slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)]
    assert len(anchors) == len(set(anchors))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file:
            assert target.startswith("https://") or (FOLDER / file).exists(), target
        else:
            assert anchor in anchors, target


@pytest.mark.parametrize("name", FILES)
def test_lines_are_short(name):
    long = [line for line in lines_of(name) if len(line) > 120 and not line.startswith("|")]
    assert long == []


def test_every_script_is_listed():
    text = "\n".join(lines_of("README.md"))
    for file in FOLDER.glob("*.py"):
        assert f"`{file.name}`" in text or f"/{file.name}" in text, file.name
