"""Text of files and repositories is shown in one line, cut, with nothing that a terminal, Markdown or HTML obeys."""

import pytest

from hub_mpq.core import FloatOp, LayerBits, LayerGraph, LayerSpec, Policy, Usage
from hub_mpq.errors import HubMPQError, InvalidArgument, PackedFormat, PolicyMismatch, shown
from hub_mpq.hub.card import CardFacts, code, prose, render_card
from hub_mpq.pack import Manifest
from hub_mpq.report import figures_line, latency_line, report, table

EVIL = "\x1b]0;title\x07\x1b[2J\nline \u202e \u2028 \x9b31m \u200b <script>alert(1)</script> [a](http://b) | `c`"
OBEYED = {chr(i) for i in range(32)} | {chr(i) for i in range(127, 160)} | set("\u202a\u202e\u2066\u200b\u2028\u2029")


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("layer1.0.conv", "layer1.0.conv"),
        ("größer 3 × 4 …", "größer 3 × 4 …"),
        ("a\nb\tc\r\u2028d\x1ce", "a b c  d e"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b", r"\x9b"),
        ("\u202e\u200b\ufeff", r"\u202e\u200b\ufeff"),
        ("\U000e0001", r"\U000e0001"),
        ("\ud800", r"\ud800"),
        ("x" * 400, "x" * 299 + "…"),
        (5, "5"),
    ],
)
def test_what_is_shown(text, out):
    assert shown(text) == out


def test_text_is_cut_before_it_is_escaped():
    assert len(shown("\x1b" * 10**6, 100)) == 100


@pytest.mark.parametrize(
    "error",
    [
        HubMPQError(EVIL),
        InvalidArgument(EVIL),
        PackedFormat(EVIL, EVIL * 100),
        PolicyMismatch([EVIL * 9] * 50, [EVIL * 9] * 50),
        HubMPQError(EVIL * 10**4),
    ],
)
def test_errors_are_one_short_line(error):
    assert not set(str(error)) & OBEYED
    assert len(str(error)) <= 2000
    if isinstance(error, (PackedFormat, PolicyMismatch)):
        assert len(str(error)) < 700


def test_a_mismatch_names_some_layers_and_counts_the_rest():
    error = PolicyMismatch([], [f"layer{i}" for i in range(9)])
    assert "unknown layers ['layer0', 'layer1', 'layer2', 'layer3'] and 5 more" in str(error)
    assert error.extra == [f"layer{i}" for i in range(9)]


def _manifest():
    layer = LayerSpec(EVIL, "linear", (4, 4), 16, 16, 4)
    graph = LayerGraph(EVIL, EVIL, "transformers", (4,), (layer,), (FloatOp(EVIL, EVIL, 5, 5, EVIL),))
    metrics = {name: {EVIL: 1.0, "top1": 50.0, "task": EVIL, "samples": 10} for name in ("quantized", "float", EVIL)}
    provenance = {"metrics": metrics, "search": {EVIL: EVIL}, "hub_mpq": EVIL, "target": EVIL}
    provenance["runtimes"] = {
        EVIL: {
            "exact": True,
            "integer layers": 1,
            "float layers": 0,
            "largest error": 0.0,
            "codes one step off": 0.0,
            "values wrong": 0,
            "machine": EVIL,
            "metrics": {"runtime": {EVIL: EVIL}, "reference": {EVIL: 2.0}},
        }
    }
    return Manifest(EVIL, EVIL, "transformers", graph, Policy({EVIL: LayerBits(4, 8)}, graph.digest), provenance)


def test_a_report_has_nothing_that_a_terminal_obeys():
    manifest = _manifest()
    text = report(manifest.graph, manifest.policy, None, manifest.provenance["metrics"], {})
    facts = dict.fromkeys(("measured", "spread", "limit", "predicted"), 1e-3)
    text += latency_line({**facts, "threads": 1, "batch_size": 1, "runtime": EVIL, "machine": EVIL})
    text += table(["a"], [[EVIL]]) + figures_line({EVIL: EVIL})
    assert not set(text) & (OBEYED - {"\n"})
    lines = report(manifest.graph, manifest.policy, None, {}, {}).splitlines()
    assert len(lines) == 1 + 4 + 2  # title, table of two layers, a blank line, one reason
    assert max(map(len, lines)) < 700
    printed = f"{manifest.policy}\n{Usage({EVIL: 1.0})}"
    assert not set(printed) & (OBEYED - {"\n"})
    assert len(printed.splitlines()) == len(manifest.policy.bits) + 1


def test_a_card_has_no_markup_of_others():
    facts = CardFacts(
        {"model.mpq.safetensors": 1000, "model.safetensors": 4000},
        base_model=f'{EVIL}\n---\n# INJECTED"',
        trained_on=EVIL,
        dataset=EVIL,
        indicators={EVIL: EVIL},
        pipeline_tag="image-classification",
        seconds={EVIL: 1.0},
    )
    card = render_card("me/x", _manifest(), facts)
    assert not set(card) & (OBEYED - {"\n"})
    body = card.split("\n---\n", 1)[1]
    assert "\n# INJECTED" not in body
    outside = "".join(part for i, part in enumerate(body.replace("```", "\0").split("\0")) if i % 2 == 0)
    for part in outside.split("`")[::2]:  # not between backticks
        assert "<script" not in part
        assert "[a](http" not in part.replace("\\[", "")
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3, 6}  # a fact; figures of two metrics


def test_prose_shows_as_it_is():
    assert prose("a_b `c` <d> [e](f)") == r"a_b \`c\` &lt;d> \[e\](f)"
    assert code("a`b|c<d\ne") == "a'b/c‹d e"
