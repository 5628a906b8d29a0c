"""The notebooks run at toy size, and hold the outputs of a whole run."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
import transformers

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
SMALL = {
    "decoder": {"sentences": 800, "base_steps": 4},
    "lora_on_a_packed_base": {"texts": 32, "base_steps": 2, "indicator_steps": 1, "quantize_steps": 1, "epochs": 1},
}
SAYS = {
    "decoder": ["tokens: float", "packed/model.mpq.safetensors: ", "same text: True"],
    "lora_on_a_packed_base": ["same logits: True", "cannot be merged", "model.mpq.safetensors: "],
}


def code_cells(notebook):
    """[(source, tags, what was printed)] of its code cells."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    printed = ["".join(line for out in cell["outputs"] for line in out["text"]) for cell in cells]
    return [
        ("".join(cell["source"]), cell["metadata"].get("tags", ()), text)
        for cell, text in zip(cells, printed, strict=True)
    ]


@pytest.fixture
def quiet():
    """Notebooks may silence transformers."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch, capsys):
    script = []
    for source, tags, _ in code_cells(notebook):
        script.append(source)
        if "parameters" in tags:
            script += [f"assert {name}\n{name} = {value!r}" for name, value in SMALL[notebook.stem].items()]
    (tmp_path / "script.py").write_text("\n\n".join(script))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path("script.py", run_name="__main__")
    now, kept = capsys.readouterr().out, "".join(text for _, _, text in code_cells(notebook))
    for words in SAYS[notebook.stem]:
        assert words in now
        assert words in kept
