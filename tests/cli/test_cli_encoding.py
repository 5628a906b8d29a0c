"""Files are UTF-8 whatever the locale, and what a terminal cannot show does not stop a command."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hub_mpq

PACKAGE = Path(hub_mpq.__file__).parent
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def run_in_ascii(*args):
    command = [sys.executable, "-m", "hub_mpq", *args]
    env = {**os.environ, **ASCII, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, env=env, check=False)


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_table_with_names_beyond_ascii(tmp_path, how):
    layers = {"é": {"W4A4": {"score": 1.0, "cost": {"bitops": 1}}}}
    table = {"sense": "min", "limits": {"bitops": 1}, "layers": layers}
    (tmp_path / "t.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    done = run_in_ascii("solve", str(tmp_path / "t.json"), *how)
    assert done.returncode == 0, done.stderr
    assert "é".encode() in done.stdout or b"\\u00e9" in done.stdout


def test_help():
    done = run_in_ascii("quantize", "--help")
    assert done.returncode == 0, done.stderr
    assert b"--bitops" in done.stdout


def test_every_text_file_is_opened_with_its_encoding():
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            named = any(word.arg == "encoding" for word in node.keywords)
            if not named and name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
                found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert not found
