"""The newest releases of other libraries that the tests have passed with, and a line for newer ones."""

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
"""{library: (major, minor)} of those whose private interfaces are used; .github/CONTRIBUTING.md lists these. timm makes
its minor releases by the third number."""

logger = logging.getLogger(__name__)


def newer_than_tested(library: str) -> str | None:
    """The installed version of `library` if it is a newer minor release than any that was tested, else None."""
    newest = NEWEST_TESTED[library]
    try:
        installed = version(library)
    except PackageNotFoundError:  # a source tree on the path
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", installed)[: len(newest)])
    return installed if numbers > newest else None


@cache
def warn_if_untested(library: str) -> None:
    """Log one line when a newer minor release of `library` is installed than was tested: once in a process, and in the
    first of several processes only."""
    installed = newer_than_tested(library)
    if installed and os.environ.get("RANK", "0") == "0":
        tested = ".".join(map(str, NEWEST_TESTED[library]))
        logger.warning(
            "hub_mpq uses private interfaces of %s and was tested up to %s; %s is installed", library, tested, installed
        )
