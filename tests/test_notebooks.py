"""The notebooks run at toy size, and hold the outputs of a whole run."""

from __future__ import annotations

import base64
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
SMALL = {
    "decoder": {"sentences": 800, "base_steps": 4, "rounds": 3},
    "encoder": {"train_size": 64, "test_size": 64, "float_epochs": 1, "validate_seconds": 60, "rounds": 3},
    "lora_on_a_packed_base": {"texts": 32, "base_steps": 2, "indicator_steps": 1, "quantize_steps": 1, "epochs": 1},
    "quickstart_timm": {
        "copies": 1,
        "float_epochs": 1,
        "indicator_steps": 1,
        "finetune_epochs": 0.1,
        "validate_seconds": 1,
        "rounds": 3,
    },
}
SAYS = {
    "decoder": ["mixed, same bytes", "same text: True", "the same model", "as fast as float"],
    "encoder": ["uniform W2A8", "model.mpq.safetensors", "the same model", "as fast as float"],
    "lora_on_a_packed_base": ["same logits: True", "cannot be merged", "model.mpq.safetensors: "],
    "quickstart_timm": ["uniform W3A3", "bit-identical logits: True", "the same model", "as fast as float"],
}
PLOTS = {"decoder": 2, "encoder": 2, "lora_on_a_packed_base": 0, "quickstart_timm": 3}
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 400_000
"""Bytes of a notebook."""


def code_cells(notebook):
    """[(source, tags, what was printed, pictures)] of its code cells."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    found = []
    for cell in cells:
        printed, pictures = "", []
        for out in cell["outputs"]:
            if out["output_type"] == "stream":
                assert out["name"] == "stdout", f"warnings or progress bars: {out['text']}"
                printed += "".join(out["text"])
            else:
                assert out["output_type"] in ("display_data", "execute_result"), out
                pictures.append(base64.b64decode("".join(out["data"]["image/png"])))
        found.append(("".join(cell["source"]), cell["metadata"].get("tags", ()), printed, pictures))
    return found


@pytest.fixture
def quiet():
    """Notebooks may silence transformers."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture
def shown(monkeypatch):
    """The pictures that a script shows as a notebook does; neither Jupyter nor a screen is needed."""
    pictures = []

    def image(filename, width):
        pictures.append(Path(filename).read_bytes())

    display = ModuleType("IPython.display")
    display.Image = image
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")

    def show():
        for number in pyplot.get_fignums():
            pyplot.figure(number).savefig("shown.png")
            pictures.append(Path("shown.png").read_bytes())
        pyplot.close("all")

    monkeypatch.setattr(pyplot, "show", show)
    return pictures


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch, capsys, shown):
    script = []
    for source, tags, _, _ in code_cells(notebook):
        script.append(source)
        if "parameters" in tags:
            script += [f"assert {name}\n{name} = {value!r}" for name, value in SMALL[notebook.stem].items()]
    (tmp_path / "script.py").write_text("\n\n".join(script))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            runpy.run_path("script.py", run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    now, kept = capsys.readouterr().out, "".join(text for _, _, text, _ in code_cells(notebook))
    for words in SAYS[notebook.stem]:
        assert words in now
        assert words in kept
    assert [picture[:8] for picture in shown] == [PNG] * PLOTS[notebook.stem]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_pictures_and_nothing_of_a_machine(notebook):
    pictures = [picture for _, _, _, found in code_cells(notebook) for picture in found]
    assert [picture[:8] for picture in pictures] == [PNG] * PLOTS[notebook.stem]
    assert notebook.stat().st_size < LARGEST
    printed = "".join(text for _, _, text, _ in code_cells(notebook))
    for line in printed.splitlines():
        assert not re.search(r"(^|[\s'\"(])/\w|\\Users\\|Warning|\r|%\||it/s", line), line


def test_the_readme_lists_all_notebooks():
    readme = (NOTEBOOKS[0].parent / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\.ipynb\]\(\1\.ipynb\)", readme, re.M) == [
        "quickstart_timm",
        "encoder",
        "decoder",
        "lora_on_a_packed_base",
    ]
    assert {path.stem for path in NOTEBOOKS} == {*SMALL} == {*SAYS} == {*PLOTS}
