"""The exceptions that hub_mpq raises for user errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LONGEST = 300
"""Maximum number of characters of untrusted text shown in a message, a table or a card."""
_HUB_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3")


def is_connection_error(error: BaseException) -> bool:
    """Return whether an error comes from the Hub client, the HTTP libraries below it, or the operating system.

    Args:
        error: The exception to classify.

    Returns:
        True for an `OSError` and for exceptions of `huggingface_hub`, `httpx`, `requests` and `urllib3`.

    Example:
        >>> from hub_mpq.errors import is_connection_error
        >>> is_connection_error(TimeoutError()), is_connection_error(KeyError())
        (True, False)
    """
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _HUB_CLIENTS


def shown(text: object, most: int = LONGEST) -> str:
    """Make text from a file or a repository safe to print: one truncated line, with control characters escaped.

    Terminal control codes, invisible characters and characters that change the text direction are escaped.

    Args:
        text: The text, or any object; it is converted with `str`.
        most: Maximum number of characters.

    Returns:
        The printable text, ending in "…" if it was truncated.

    Example:
        >>> from hub_mpq.errors import shown
        >>> print(shown("red \\x1b[31m alert", most=14))
        red \\x1b[31m …
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
    """Return the message of an error without the traceback that a data loader's worker process puts before it.

    Args:
        text: The error's text.

    Returns:
        The message on the last line if the text holds an original traceback, else `text`.

    Example:
        >>> from hub_mpq.errors import last_line
        >>> last_line("Caught in worker 0. Original Traceback (most recent call last):\\n  ...\\nValueError: bad image")
        'bad image'
    """
    return text.strip().splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text


class HubMPQError(Exception):
    """Base class of all errors of hub_mpq: the message is one line, free of terminal control characters."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(last_line(str(message)), 2000))


class InvalidArgument(HubMPQError, ValueError):
    """An argument has an invalid value."""


class UnsupportedLayer(HubMPQError):
    """A layer cannot be quantized.

    Attributes:
        name: Name of the layer.
        type_name: Name of its type.
    """

    def __init__(self, name: str, type_name: str, reason: str = "no quantized form is known") -> None:
        super().__init__(
            f"cannot quantize layer {name!r} of type {type_name}: {reason}; keep it float with exclude=[{name!r}]"
        )
        self.name, self.type_name = name, type_name


class InfeasibleBudget(HubMPQError):
    """No policy meets the budget.

    Attributes:
        limits: {limit: required amount}.
        least: {limit: minimum that any policy reaches}, each limit taken alone; for a lower bound such as
            `compression`, the maximum.
        binding: Names of the limits that cannot be met even alone; empty if each can be met, but not all together.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        least: Mapping[str, float],
        binding: Iterable[str],
        at_least: Iterable[str] = (),
        units: Mapping[str, str] | None = None,
    ) -> None:
        self.limits, self.least, self.binding = dict(limits), dict(least), sorted(binding)
        lower = set(at_least)
        words = {k: (">=", "maximum") if k in lower else ("<=", "minimum") for k in limits}
        unit = {k: f" {name}" for k, name in (units or {}).items() if name}
        rows = ", ".join(
            f"{k} {words[k][0]} {limits[k]:.10g}{unit.get(k, '')} ({words[k][1]} {least[k]:.10g}{unit.get(k, '')})"
            for k in sorted(limits)
        )
        if len(self.binding) == len(self.limits):
            which = ""
        elif self.binding:
            which = f"; cannot be met: {', '.join(self.binding)}"
        else:
            which = "; each limit can be met alone, but not all together"
        super().__init__(f"no policy meets the budget: {rows}{which}")


class PackedFormat(HubMPQError):
    """A packed file is incomplete, corrupt, or of an unsupported format version.

    Attributes:
        file: Path of the file.
    """

    def __init__(self, file: object, message: str) -> None:
        super().__init__(f"{shown(file)}: {shown(message)}")
        self.file = str(file)


class PolicyMismatch(HubMPQError):
    """A policy was made for a model with other layers.

    Attributes:
        missing: Layers of the model that the policy does not name.
        extra: Layers of the policy that the model does not have.
    """

    def __init__(self, missing: Iterable[str], extra: Iterable[str]) -> None:
        self.missing, self.extra = sorted(missing), sorted(extra)
        super().__init__(
            f"the policy is for another model: missing layers {_some(self.missing)}, unknown layers {_some(self.extra)}"
        )


def _some(names: list[str]) -> str:
    """The first four names, and the number of the rest."""
    first = ", ".join(f"'{shown(name, 40)}'" for name in names[:4])
    return f"[{first}]" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class TrainingDiverged(HubMPQError):
    """The training loss became NaN or infinite.

    Attributes:
        step: Optimizer step at which it did.
    """

    def __init__(self, step: int, loss: float, checkpoint: object | None) -> None:
        kept = f"last good checkpoint: {checkpoint}" if checkpoint else "no checkpoint was written"
        super().__init__(f"training stopped: the loss is {loss} at step {step} ({kept}); try a lower learning rate")
        self.step = step
