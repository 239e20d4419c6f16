"""Elements of the report's pictures: every name and text that comes from a trace is escaped here."""

from __future__ import annotations

from markupsafe import Markup, escape


def element(tag: str, *inner: str, **attributes: object) -> Markup:
    """`<tag …>inner</tag>`; `class_` is `class`, underscores in names are dashes, None is left out.

    Strings are text; what is Markup already is taken as it is.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    words = "".join(f' {name}="{escape(_short(value))}"' for name, value in given.items())
    return Markup(f"<{tag}{words}>{''.join(map(escape, inner))}</{tag}>")  # all parts are escaped above


def percent(part: float) -> str:
    """A part of the picture's width, by which it keeps its proportions on every screen while text keeps its size."""
    return f"{100 * part:.4g}%"


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
