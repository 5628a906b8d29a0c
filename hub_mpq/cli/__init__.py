"""The command line. Importing it loads typer alone; a command loads what it needs."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
