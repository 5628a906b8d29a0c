"""Public names are documented argument by argument, and their examples run."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
import textwrap
from functools import cached_property
from importlib import import_module

import pytest
import torch

from hub_mpq.core import layer_kinds, libraries, limits, runtimes, targets, tasks
from hub_mpq.search.strategy import strategies

PARTS = [
    "adapters", "core", "cost", "data", "errors", "export", "pack", "plot", "quantizers", "report", "runtime", "solve",
    "tasks", "train",
]  # fmt: skip
REGISTRIES = (layer_kinds, libraries, limits, runtimes, strategies, targets, tasks)
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "References", "Example", "Note")


def named():
    """{where it is imported from: public object}, each object once."""
    found = {}
    for part in ["", *PARTS]:
        module = import_module(f"hub_mpq.{part}".rstrip("."))
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in names:
            value = getattr(module, name)
            home = getattr(value, "__module__", "")
            own = home.startswith("hub_mpq") if hasattr(module, "__all__") else home == module.__name__
            if own and (inspect.isclass(value) or inspect.isfunction(value)) and value not in found.values():
                found[f"{module.__name__}.{name}"] = value
    return found


def function_of(member):
    """The function behind a method, or None."""
    if isinstance(member, (classmethod, staticmethod)):
        member = member.__func__
    return inspect.unwrap(member) if inspect.isfunction(member) else None


def inherited(owner, name):
    """Whether a base class of this package documents the member."""
    return any(
        base.__module__.startswith("hub_mpq") and getattr(vars(base).get(name), "__doc__", None)
        for base in owner.__mro__[1:]
    )


def members():
    """{path: (owner, name, member)} of the public methods and properties of public classes."""
    found = {}
    for path, owner in named().items():
        if inspect.isclass(owner):
            for name, member in vars(owner).items():
                described = isinstance(member, (property, cached_property)) or function_of(member)
                if described and not name.startswith("_"):
                    found[f"{path}.{name}"] = (owner, name, member)
    return found


NAMES, MEMBERS = named(), members()


def sections(text):
    """{section: its text} of a docstring, the part before the first under ""."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.cleandoc(text), flags=re.M)
    return {"": parts[0].strip(), **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section):
    """The names that a section of arguments describes."""
    found: list[str] = re.findall(r"^    (\*{0,2}\w+)(?: \([^)]*\))?: \S", section, re.M)
    return found


def parameters(function):
    """Its arguments as a docstring spells them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    given = list(inspect.signature(function).parameters.values())
    return [stars.get(p.kind, "") + p.name for p in given if p.name not in ("self", "cls")]


def raises(function):
    """Whether its own body raises an error that callers should know of."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(
        isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" not in ast.unparse(node.exc)
        for node in ast.walk(tree)
    )


def faults_of_text(text):
    found = sections(text)
    summary = found[""].split("\n\n")[0]
    if "\n" in summary or not summary.endswith((".", "?")):
        yield f"the first paragraph is one line that ends in a period, not {summary!r}"
    for name in ("Args", "Attributes", "Raises", "Returns", "Yields"):
        if name in found and not found[name].strip():
            yield f"{name} is empty"


def faults_of_function(function, overrides=False):
    text = function.__doc__
    if not text:
        if not overrides:
            yield "there is no docstring"
        return
    yield from faults_of_text(text)
    if overrides:
        return
    found = sections(text)
    wanted, described = parameters(function), entries(found.get("Args", ""))
    if wanted != described:
        yield f"Args describe {described}, the arguments are {wanted}"
    hint = inspect.signature(function).return_annotation
    if hint not in (None, "None", "NoReturn", inspect.Signature.empty) and not {"Returns", "Yields"} & {*found}:
        yield "Returns is missing"
    if raises(function) and "Raises" not in found:
        yield "Raises is missing"


def faults_of_class(owner):
    if not owner.__doc__ or (dataclasses.is_dataclass(owner) and owner.__doc__.startswith(f"{owner.__name__}(")):
        yield "there is no docstring"
        return
    yield from faults_of_text(owner.__doc__)
    if issubclass(owner, Exception) or getattr(owner, "_is_protocol", False):
        return
    found = sections(owner.__doc__)
    described = {*entries(found.get("Args", "")), *entries(found.get("Attributes", ""))}
    own = "__init__" in vars(owner) or dataclasses.is_dataclass(owner) or hasattr(owner, "_fields")
    if own and (missing := [name for name in parameters(owner) if name not in described]):
        yield f"Args do not describe {missing}"


@pytest.mark.parametrize("path", [p for p, v in NAMES.items() if inspect.isfunction(v)])
def test_a_function(path):
    assert not list(faults_of_function(NAMES[path]))


@pytest.mark.parametrize("path", [p for p, v in NAMES.items() if inspect.isclass(v)])
def test_a_class(path):
    assert not list(faults_of_class(NAMES[path]))


@pytest.mark.parametrize("path", MEMBERS)
def test_a_member(path):
    owner, name, member = MEMBERS[path]
    overrides = inherited(owner, name)
    if isinstance(member, (property, cached_property)):
        text = member.__doc__
        assert text or overrides
        assert not list(faults_of_text(text or "Documented by its base class."))
    elif name == "forward":
        assert function_of(member).__doc__ or overrides
    else:
        assert not list(faults_of_function(function_of(member), overrides))


def with_example():
    """Paths of what has an example: public names, and what HubMPQ does."""
    for path, value in NAMES.items():
        if not (inspect.isclass(value) and (issubclass(value, Exception) or getattr(value, "_is_protocol", False))):
            yield path, value
    for path, (_, name, member) in MEMBERS.items():
        if path.startswith("hub_mpq.HubMPQ.") and function_of(member) and name != "forward":
            yield path, function_of(member)


@pytest.mark.parametrize(("path", "value"), [pytest.param(*row, id=row[0]) for row in with_example()])
def test_there_is_an_example(path, value):
    assert ">>>" in sections(value.__doc__ or "").get("Example", ""), path


def examples():
    for path, value in {**NAMES, **{p: function_of(m) or m for p, (_, _, m) in MEMBERS.items()}}.items():
        if ">>>" in (value.__doc__ or ""):
            yield pytest.param(path, value.__doc__, id=path)


@pytest.fixture
def registries():
    """What an example registers is forgotten."""
    before = [(registry, registry.names()) for registry in REGISTRIES]
    yield
    for registry, names in before:
        for name in {*registry.names()} - {*names}:
            registry.unregister(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(("path", "text"), [*examples()])
def test_an_example_runs(path, text, tmp_path, monkeypatch):
    """As in an interpreter of one's own, in an empty folder. Only the weights of a new model may be drawn globally."""
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(inspect.cleandoc(text), {"__name__": "__main__"}, path, None, 0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    report = []
    with torch.random.fork_rng():
        doctest.DocTestRunner(optionflags=flags).run(example, out=report.append)
    assert not report, "".join(report)
    assert "torch.manual_seed" not in text
