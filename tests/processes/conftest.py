"""What is launched once, however many workers of pytest-xdist ask for it."""

from __future__ import annotations

import os
import time

import pytest


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): the folder that make(folder) has filled, in the first worker that asked; others wait for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        folder, done = shared / name, shared / f"{name}.done"
        try:
            folder.mkdir()
        except FileExistsError:
            while not done.exists():  # pytest's own timeout ends what hangs
                time.sleep(0.1)
        else:
            try:
                make(folder)
            finally:
                done.touch()
        return folder

    return folder_of
