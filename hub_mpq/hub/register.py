"""Register "mpq" with transformers without importing it: the only side effect of importing hub_mpq."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGET = "transformers.quantizers.auto"
"""The module with transformers' tables of quantizers; importing it takes seconds, so we wait until it is imported."""


def install() -> None:
    """Register now if transformers' quantizers are imported already, else as soon as they are."""
    if hasattr(sys.modules.get(TARGET), "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    try:
        import_module(".plugin", __package__)  # registers at its end
    except Exception as error:  # hub_mpq must never break an import of transformers
        warnings.warn(f"hub_mpq cannot register itself with this version of transformers: {error!r}", stacklevel=2)


class _AfterImport(MetaPathFinder):
    """Let the usual finders find TARGET, and run `_register` after its import."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
