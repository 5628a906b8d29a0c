"""Every error hub_mpq raises for a user's mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LONGEST = 300
"""Characters of foreign text that a message, a table or a card shows at most."""
_HUB_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3")


def is_connection_error(error: BaseException) -> bool:
    """Whether an error comes from the Hub's client, the libraries it talks through, or the operating system."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _HUB_CLIENTS


def shown(text: object, most: int = LONGEST) -> str:
    """Text of a file or a repository as it may be shown: one line, cut, with escapes for what a terminal would obey
    and for characters that are not seen or change the order of others.

    Args:
        text: The text, or anything that has one.
        most: Characters to show.
    """
    whole = str(text)
    if not whole.isprintable():
        whole = "".join(c if c.isprintable() else _escaped(c) for c in whole[: most + 1])
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def _escaped(character: str) -> str:
    if character.isspace():
        return " "
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def last_line(text: str) -> str:
    """What an error said that crossed from a worker of a data loader, which puts a traceback before it."""
    return text.strip().splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text


class HubMPQError(Exception):
    """Base class: one clear sentence for the person who made the call, with nothing in it that a terminal obeys."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(last_line(str(message)), 2000))


class InvalidArgument(HubMPQError, ValueError):
    """An argument has a value that means nothing here."""


class UnsupportedLayer(HubMPQError):
    """A layer was asked to be quantized that has no quantized form."""

    def __init__(self, name: str, type_name: str, reason: str = "no quantized form is known") -> None:
        super().__init__(f"layer {name!r} of type {type_name}: {reason}; leave it float with exclude=[{name!r}]")
        self.name, self.type_name = name, type_name


class InfeasibleBudget(HubMPQError):
    """No policy meets the budget.

    `least` maps every limit to the least value any policy reaches on it alone, or the greatest for limits `at_least`
    names (a compression); `binding` names the limits beyond that (empty: they only clash together).
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        least: Mapping[str, float],
        binding: Iterable[str],
        at_least: Iterable[str] = (),
    ) -> None:
        self.limits, self.least, self.binding = dict(limits), dict(least), sorted(binding)
        lower = set(at_least)
        words = {k: (">=", "greatest") if k in lower else ("<=", "least") for k in limits}
        rows = ", ".join(
            f"{k} {words[k][0]} {limits[k]:.10g} ({words[k][1]} reachable {least[k]:.10g})" for k in sorted(limits)
        )
        which = f"unreachable: {', '.join(self.binding)}" if self.binding else "each is reachable alone, not together"
        super().__init__(f"no policy meets the budget: {rows}; {which}")


class PackedFormat(HubMPQError):
    """A packed file is torn, tampered with, or of another format version."""

    def __init__(self, file: object, message: str) -> None:
        super().__init__(f"{shown(file)}: {shown(message)}")
        self.file = str(file)


class PolicyMismatch(HubMPQError):
    """A policy speaks of other layers than the model has."""

    def __init__(self, missing: Iterable[str], extra: Iterable[str]) -> None:
        self.missing, self.extra = sorted(missing), sorted(extra)
        super().__init__(
            f"policy is for another model: missing layers {_some(self.missing)}, unknown layers {_some(self.extra)}"
        )


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    first = ", ".join(f"'{shown(name, 40)}'" for name in names[:4])
    return f"[{first}]" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class TrainingDiverged(HubMPQError):
    """The loss became NaN or infinite."""

    def __init__(self, step: int, loss: float, checkpoint: object | None) -> None:
        kept = f"last good checkpoint: {checkpoint}" if checkpoint else "no checkpoint had been written"
        super().__init__(f"loss is {loss} at step {step}; stopped ({kept}). Try a lower learning rate")
        self.step = step
