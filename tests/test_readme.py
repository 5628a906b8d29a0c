"""What the README and the guides say is so."""

from __future__ import annotations

import ast
import json
import re
from inspect import signature
from pathlib import Path

import pytest
import typer.main

import hub_mpq

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "examples" / "guides"
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted(ROOT.glob("hub_mpq/*/*.md")),
]
TEXT = README + "".join(page.read_text() for page in sorted(GUIDES.glob("*.md")))


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_the_first_screen_is_short_and_the_two_commands_stand_alone_in_it():
    assert len(README.split()) <= 1800
    first = README.splitlines()[:60]
    for extra, then in (("demo", "hub-mpq demo"), ("test", "pytest -n auto")):
        line = f'pip install -e ".[{extra}]" && {then}'
        where = first.index(line)
        assert first[where - 1] == "```bash"
        assert first[where + 1] == "```"


def test_the_tables_answer_is_the_solvers():
    table, answer = map(json.loads, blocks("json"))
    solved = hub_mpq.solve_table(table).to_dict()
    assert solved.pop("seconds") > 0
    assert solved.pop("choices") == answer.pop("choices")
    assert solved.pop("usage") == pytest.approx(answer.pop("usage"))
    assert solved.pop("status") == answer.pop("status")
    assert solved == pytest.approx(answer)


def calls(code, of):
    """[(method, its keywords)] called on `of` in some code."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner.split("(")[0].endswith(of):
                yield node.func.attr, [keyword.arg for keyword in node.keywords if keyword.arg]


def test_python_examples_use_names_and_arguments_that_exist():
    code = "\n".join(blocks("python"))
    found = [*calls(code, "mpq"), *calls(code, "HubMPQ"), *calls(code, "HubMPQ.from_pretrained")]
    assert {"from_pretrained", "quantize", "push_to_hub", "perplexity"} <= {name for name, _ in found}
    limits = set(signature(hub_mpq.Budget).parameters)
    for name, keywords in found:
        method = getattr(hub_mpq.HubMPQ if name != "to_runtime" else hub_mpq, name)
        taken = {*signature(method).parameters, *limits}
        assert {*keywords} <= taken, (name, keywords)
    for name in re.findall(r"from hub_mpq import (.*)", code):
        for part in name.split(", "):
            assert part in hub_mpq.__all__


def test_every_command_and_option_exists():
    from hub_mpq.cli import app

    commands = typer.main.get_command(app).commands
    rows = set(re.findall(r"^\| `hub-mpq (\w+)", TEXT, re.M))
    assert rows == set(commands)
    options = {
        option for command in commands.values() for p in command.params for option in (*p.opts, *p.secondary_opts)
    }
    ours = re.sub(r"accelerate launch .*-m hub_mpq|pip install .*|`--num_processes`", "", TEXT)
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", ours)) - {"--version", "--help"}
    assert said <= options, said - options


def test_commands_in_the_shell_are_parsed():
    """Every `hub-mpq` line of a code block, up to the files that it would read."""
    from hub_mpq.cli import app

    commands = typer.main.get_command(app).commands
    lines = [line.split("#")[0].split() for block in blocks("bash") for line in block.splitlines()]
    ours = [line[1:] for line in lines if line[:1] == ["hub-mpq"] and line[1] != "launch"]
    assert len(ours) >= 8
    for name, *arguments in ours:
        assert commands[name].make_context(name, arguments, resilient_parsing=False) is not None


def test_the_launch_command_is_the_one_that_works():
    from hub_mpq.cli.launch import arguments

    (options,) = re.findall(r"accelerate launch (.*) -m hub_mpq", TEXT)
    assert options.split() == arguments(2)


def test_the_tree_is_the_package():
    tree = next(block for block in blocks("text", README) if block.startswith("hub_mpq/"))
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:]}
    parts = {
        p.name for p in (ROOT / "hub_mpq").iterdir() if not p.name.startswith(("__", ".")) and p.name != "py.typed"
    }
    assert named == parts


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


def test_budgets_of_the_table_are_the_budgets():
    said = re.findall(r"^\| `(\w+)`", (GUIDES / "budgets.md").read_text().partition("## Latency")[0], re.M)
    assert said == [name for name in signature(hub_mpq.Budget).parameters if name != "others"]


def test_guides_are_listed():
    for index in (README, (GUIDES / "README.md").read_text()):
        for page in GUIDES.glob("*.md"):
            assert page.name == "README.md" or f"{page.name})" in index, page.name
