"""What the README says is so."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import typer.main

import hub_mpq

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


def test_the_two_commands_stand_alone_in_the_first_screen():
    first = TEXT.splitlines()[:40]
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


def test_the_python_example_uses_names_that_exist():
    code = "\n".join(blocks("python"))
    called = {n.attr for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Attribute)}
    assert called <= set(dir(hub_mpq.HubMPQ))
    for name in re.findall(r"^\| `\.(\w+)\(", TEXT, re.M):
        assert hasattr(hub_mpq.HubMPQ, name), name


def test_every_command_and_option_exists():
    from hub_mpq.cli import app

    commands = typer.main.get_command(app).commands
    rows = set(re.findall(r"^\| `hub-mpq (\w+)", TEXT, re.M))
    assert rows == set(commands)
    options = {
        option for command in commands.values() for p in command.params for option in (*p.opts, *p.secondary_opts)
    }
    ours = re.sub(r"accelerate launch .*-m hub_mpq", "", TEXT)
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", ours)) - {"--version"}
    assert said <= options, said - options


def test_the_launch_command_is_the_one_that_works():
    from hub_mpq.cli.launch import arguments

    (options,) = re.findall(r"accelerate launch (.*) -m hub_mpq", TEXT)
    assert options.split() == arguments(2)


def test_the_tree_is_the_package():
    tree = next(block for block in blocks("text") if block.startswith("hub_mpq/"))
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:]}
    parts = {
        p.name for p in (ROOT / "hub_mpq").iterdir() if not p.name.startswith(("__", ".")) and p.name != "py.typed"
    }
    assert named == parts


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_budgets_of_the_table_are_the_budgets():
    from inspect import signature

    said = re.findall(r"^\| `(\w+)`", TEXT[TEXT.index("## Budgets") : TEXT.index("## Python")], re.M)
    assert said == [name for name in signature(hub_mpq.Budget).parameters if name != "others"]
