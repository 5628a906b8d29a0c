"""Sphinx builds the API pages from the docstrings: `python -m sphinx -W .github/docs build/docs`."""

from typing import Any

import hub_mpq

project = "hub_mpq"
copyright = "2026, the hub_mpq authors"
version = release = hub_mpq.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
default_role = "code"  # single backticks are code, as in the docstrings
html_theme = "furo"
html_title = f"hub_mpq {version}"

autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def once(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Whether an object has its place on another page: the package's own first, errors together."""
    page = "errors" if getattr(obj, "__module__", "") == "hub_mpq.errors" else "hub_mpq"
    elsewhere = name in hub_mpq.__all__ and app.env.docname != page
    return skip or (what == "module" and elsewhere)


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", once)
