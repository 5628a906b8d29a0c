"""The example of FORMAT.md: its code writes the bytes that its table lists."""

import re
from pathlib import Path

import hub_mpq.pack

TEXT = (Path(hub_mpq.pack.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


def test_the_example_has_the_bytes_of_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(code, {})  # noqa: S102 (our own document)
    content = Path("fc.mpq.safetensors").read_bytes()
    assert f"The file has {len(content)} bytes" in TEXT
    rows = re.findall(r"^\| (\d+)(?: … (\d+))? \| (?:`(.+?)`|spaces) \|", TEXT, re.M)
    assert len(rows) == 13
    for first, last, shown in rows:
        found = content[int(first) : int(last or first) + 1]
        if re.fullmatch(r"[0-9a-f]{2}( [0-9a-f]{2})+", shown):
            assert found.hex(" ") == shown
        elif shown.endswith("… "):
            assert found.decode().startswith(shown.removesuffix("… ").rstrip())
        else:
            assert found.decode() == (shown or " " * len(found))


def test_the_row_of_the_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(code, {})  # noqa: S102
    (row,) = re.findall(r'^    (\["fc",.*\])$', TEXT, re.M)
    header = Path("fc.mpq.safetensors").read_bytes().decode("utf-8", "ignore")
    assert row in header.replace('\\"', '"')
