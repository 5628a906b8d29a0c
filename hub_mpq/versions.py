"""The newest releases of other libraries that the tests have passed with, and a warning for newer ones."""

from __future__ import annotations

import re
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

NEWEST_TESTED = {
    "torch": (2, 15),
    "transformers": (5, 24),
    "timm": (1, 0),
    "huggingface_hub": (2, 4),
    "accelerate": (1, 15),
}
"""{library: (major, minor)} of those whose private interfaces are used; .github/CONTRIBUTING.md lists these."""


class UntestedVersion(UserWarning):
    """A library is newer than any release that hub_mpq was tested with."""


@cache
def warn_if_untested(library: str) -> None:
    """Warn, the first time in a process, when a newer minor release of `library` is installed than was tested."""
    newest = NEWEST_TESTED[library]
    try:
        installed = version(library)
    except PackageNotFoundError:  # a source tree on the path
        return
    found = re.match(r"(\d+)\.(\d+)", installed)
    if found and (int(found[1]), int(found[2])) > newest:
        tested = ".".join(map(str, newest))
        warnings.warn(
            f"hub_mpq uses private interfaces of {library} and was tested up to {tested}; {installed} is installed",
            UntestedVersion,
            stacklevel=2,
        )
