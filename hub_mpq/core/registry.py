"""Objects known by name: the package's own, and those that others register."""

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
    """Objects of one sort by name, in the order they were registered.

    Args:
        sort: What the objects are, for errors ("limit", "layer kind").
        home: Module that registers the package's own objects; imported the first time that anything is looked up, so
            that importing `hub_mpq` stays light. None for a registry that starts empty.
    """

    def __init__(self, sort: str, home: str | None = None) -> None:
        self.sort, self.home = sort, home
        self._found: dict[str, T] = {}
        self._filled = False

    def register(self, name: str, value: T) -> T:
        """Make `value` known as `name` and return it.

        A class of the user's, or an object of one, that is defined again (a cell of a notebook, a module that is loaded
        as a script and by name) takes the place of the first.

        Raises:
            InvalidArgument: The name is not a word, or another object has it.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidArgument(f"a {self.sort} is named by letters, digits, '_', '.' and '-', not {name!r}")
        if not (isinstance(value, type) and value.__module__.startswith(_PACKAGE)):
            self._fill()  # a name may be taken; the package's own classes are what it is filled with
        known = self._found.get(name)
        if known is not None and known is not value and known != value:
            (module, kind), (_, again) = _class_of(known), _class_of(value)
            if module.startswith(_PACKAGE) and kind != again:
                raise InvalidArgument(f"{name!r} is a {self.sort} of hub_mpq itself; register {again} as another")
            if kind != again or module.startswith(_PACKAGE):
                raise InvalidArgument(f"a {self.sort} {name!r} is registered already ({module}.{kind})")
        self._found[name] = value
        return value

    def unregister(self, name: str) -> None:
        """Forget an object that was registered; nothing happens when there is none."""
        self._found.pop(name, None)

    def get(self, name: str) -> T:
        """The object of a name.

        Raises:
            InvalidArgument: No such object; the error lists those that there are.
        """
        self._fill()
        if name not in self._found:
            known = ", ".join(self._found) or "none is registered"
            raise InvalidArgument(f"unknown {self.sort} {name!r}; known: {known}")
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._found

    def __iter__(self) -> Iterator[T]:
        self._fill()
        return iter(list(self._found.values()))

    def names(self) -> list[str]:
        """Names of all objects."""
        self._fill()
        return list(self._found)

    def _fill(self) -> None:
        if self._filled or self.home is None:
            return
        home = import_module(self.home)  # waits for another thread that is half way through it
        # this thread may be half way through it itself, registering what the home defines
        self._filled = not getattr(home.__spec__, "_initializing", False)
