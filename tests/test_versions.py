"""Declared versions: what is newer than anything tested is said once, and the bounds agree with each other."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from hub_mpq import HubMPQ, versions
from hub_mpq.versions import NEWEST_TESTED, UntestedVersion, warn_if_untested

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


@pytest.fixture(autouse=True)
def forget():
    """The warning comes once in a process; each test here begins a new one."""
    warn_if_untested.cache_clear()
    yield
    warn_if_untested.cache_clear()


def install(monkeypatch, **installed):
    plain = versions.version
    monkeypatch.setattr(versions, "version", lambda name: installed.get(name) or plain(name))


def told(library):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            warn_if_untested(library)
    return [str(w.message) for w in seen if w.category is UntestedVersion]


@pytest.mark.parametrize("library", NEWEST_TESTED)
def test_a_newer_minor_warns_once_in_one_line(monkeypatch, library):
    major, minor = NEWEST_TESTED[library]
    install(monkeypatch, **{library: f"{major}.{minor + 1}.0.dev0+local"})
    (line,) = told(library)
    assert "\n" not in line
    assert f"{library} and was tested up to {major}.{minor}; {major}.{minor + 1}.0.dev0+local is installed" in line


@pytest.mark.parametrize("library", NEWEST_TESTED)
def test_newer_patches_and_older_minors_do_not(monkeypatch, library):
    major, minor = NEWEST_TESTED[library]
    for installed in (f"{major}.{minor}.99", f"{major - 1}.999"):
        install(monkeypatch, **{library: installed})
        assert told(library) == []
        warn_if_untested.cache_clear()


@pytest.mark.parametrize("library", ["torch", "timm"])
def test_it_comes_where_a_model_is_loaded(monkeypatch, library):
    install(monkeypatch, **{library: "999.0"})
    with pytest.warns(UntestedVersion, match=f"interfaces of {library} "):
        HubMPQ.from_pretrained("test_resnet", pretrained=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntestedVersion)
        HubMPQ.from_pretrained("test_resnet", pretrained=False)


def numbers(text):
    return tuple(map(int, text.split(".")))


def bounds():
    """{library: (floor, cap)} of the requirements, as tuples of numbers."""
    text = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.M | re.S)[1]
    rows = re.findall(r'"([\w-]+)>=([\d.]+),<(\d+)"', text)
    assert len(rows) == text.count('"') // 2, "a requirement without a floor and a cap"
    return {name.replace("-", "_"): (numbers(low), (int(cap),)) for name, low, cap in rows}


def test_every_extra_but_the_benchmarks_has_floors_and_caps():
    """The floors are what .ci/run installs; a major release that nobody has run must not be picked up."""
    extras = PROJECT[PROJECT.index("[project.optional-dependencies]") : PROJECT.index("[project.scripts]")]
    extras = re.sub(r"^bench = .*$", "", extras, flags=re.M)
    wanted = [text for text in re.findall(r'"([^"]+)"', extras) if not text.startswith("hub-mpq[")]
    assert len(wanted) > 10
    for text in wanted:
        floor, cap = re.fullmatch(r"[\w-]+>=([\d.]+),<([\d.]+)", text).groups()
        assert numbers(floor) < numbers(cap)


def test_what_was_tested_lies_within_the_declared_bounds():
    declared = bounds()
    for library, newest in NEWEST_TESTED.items():
        floor, cap = declared[library]
        assert floor[:2] <= newest < cap
        assert cap == (newest[0] + 1,), "the cap is the next major"


def test_readme_says_the_same():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \|", readme, re.M)
    declared = bounds()
    assert {name.replace("-", "_") for name, _, _ in rows} == set(declared)
    for name, floor, newest in rows:
        library = name.replace("-", "_")
        assert numbers(floor) == declared[library][0], name
        if library in NEWEST_TESTED:
            assert numbers(newest)[:2] == NEWEST_TESTED[library], name
