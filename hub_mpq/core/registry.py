"""Registries: built-in and user-defined objects by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Generic, TypeVar

from ..errors import InvalidArgument

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)

_PACKAGE = f"{__name__.partition('.')[0]}."


def _class_of(value: object) -> tuple[str, str]:
    """(module, qualified name) of a class, or of an object's class."""
    cls = value if isinstance(value, type) else type(value)
    return cls.__module__, cls.__qualname__


class Registry(Generic[T]):
    """Objects of one sort by name, in the order of their registration.

    Args:
        sort: What the objects are, for error messages ("limit", "layer kind").
        home: Module that registers the built-in objects; it is imported on the first lookup, so that importing
            `hub_mpq` stays light. None for a registry that starts empty.
    """

    def __init__(self, sort: str, home: str | None = None) -> None:
        self.sort, self.home = sort, home
        self._found: dict[str, T] = {}
        self._filled = False

    def register(self, name: str, value: T) -> T:
        """Register an object and return it.

        A user-defined class, or an object of one, that is defined again (in a notebook cell, or by a module loaded both
        as a script and by name) replaces the earlier one.

        Args:
            name: The name.
            value: The object.

        Returns:
            `value`.

        Raises:
            InvalidArgument: The name is not valid, or another object has it.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"the name of a {self.sort} must be a letter followed by letters, digits, '_', '.' or '-', got {name!r}"
            )
        if not (isinstance(value, type) and value.__module__.startswith(_PACKAGE)):
            self._fill()  # a name may be taken; the package's own classes are what it is filled with
        known = self._found.get(name)
        if known is not None and known is not value and known != value:
            (module, kind), (_, again) = _class_of(known), _class_of(value)
            if module.startswith(_PACKAGE) and kind != again:
                raise InvalidArgument(
                    f"{name!r} is a built-in {self.sort} of hub_mpq; register {again} under another name"
                )
            if kind != again or module.startswith(_PACKAGE):
                raise InvalidArgument(f"{self.sort} {name!r} is already registered ({module}.{kind})")
        self._found[name] = value
        return value

    def unregister(self, name: str) -> None:
        """Remove an object; an unknown name is ignored.

        Args:
            name: The name.
        """
        self._found.pop(name, None)

    def get(self, name: str) -> T:
        """Look up an object.

        Args:
            name: The name.

        Returns:
            The object.

        Raises:
            InvalidArgument: The name is unknown; the error lists the known ones.
        """
        self._fill()
        if name not in self._found:
            choices = f"choose from {', '.join(self._found)}" if self._found else "none is registered"
            raise InvalidArgument(f"unknown {self.sort} {name!r}; {choices}")
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._found

    def __iter__(self) -> Iterator[T]:
        self._fill()
        return iter(list(self._found.values()))

    def names(self) -> list[str]:
        """Return the names of all objects.

        Returns:
            The names, in the order of registration.
        """
        self._fill()
        return list(self._found)

    def _fill(self) -> None:
        if self._filled or self.home is None:
            return
        home = import_module(self.home)  # waits for another thread that is half way through it
        # this thread may be half way through it itself, registering what the home defines
        self._filled = not getattr(home.__spec__, "_initializing", False)
