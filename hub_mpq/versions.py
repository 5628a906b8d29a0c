"""The newest tested releases of the libraries whose private interfaces are used, and a warning for newer ones."""

from __future__ import annotations

import logging
import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

NEWEST_TESTED = {
    "torch": (2, 15),
    "transformers": (5, 24),
    "timm": (1, 0, 31),
    "huggingface_hub": (2, 4),
    "accelerate": (1, 15),
}
"""{library: (major, minor)}; .github/CONTRIBUTING.md lists the private interfaces. timm numbers its minor releases in
the third place."""

logger = logging.getLogger(__name__)


def newer_than_tested(library: str) -> str | None:
    """The installed version of `library` if its minor release is newer than the newest tested one, else None."""
    newest = NEWEST_TESTED[library]
    try:
        installed = version(library)
    except PackageNotFoundError:  # a source tree on the path
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", installed)[: len(newest)])
    return installed if numbers > newest else None


@cache
def warn_if_untested(library: str) -> None:
    """Log a warning if the installed minor release of `library` is newer than the newest tested one.

    It is logged once per process, and only by the first of several processes.
    """
    installed = newer_than_tested(library)
    if installed and os.environ.get("RANK", "0") == "0":
        tested = ".".join(map(str, NEWEST_TESTED[library]))
        logger.warning(
            "hub_mpq uses private interfaces of %s and was tested up to %s, but %s is installed",
            library,
            tested,
            installed,
        )
