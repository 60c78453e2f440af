"""HTML put together so that nothing from a file is ever read as markup."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from mixadv.redaction import printable
from mixadv.report.files import Interval

NONE = "–"


class Markup(str):
    """Text that is HTML already. Everything else is escaped on its way into a `tag`."""


def text(value: Any) -> Markup:
    """`value` as HTML text: escaped, its unprintable characters replaced by spaces."""
    return value if isinstance(value, Markup) else Markup(escape(printable(value)))


def joined(parts: Iterable[Any], between: str = "") -> Markup:
    """All parts as HTML, `between` them escaped text."""
    return Markup(text(between).join(map(text, parts)))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element; `class_` loses its underscore, `aria_label` becomes aria-label, and None is left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(printable(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{said}>{joined(children)}</{name}>")


def alone(name: str, /, **attributes: Any) -> Markup:
    """A void element, such as img or meta."""
    return Markup(tag(name, **attributes).removesuffix(f"</{name}>"))


def section(title: str, *content: Any) -> Markup:
    """A part of the page under its heading."""
    return joined([Markup("\n"), tag("section", tag("h2", title), *content)])


def note(*content: Any) -> Markup:
    """A paragraph of small print."""
    return tag("p", *content, class_="note")


def lines(value: str) -> Markup:
    """Preformatted text that keeps its line ends."""
    return tag("pre", Markup("\n".join(text(line) for line in value.split("\n"))), tabindex="0")


def percent(value: float | None) -> Markup:
    """An accuracy in per cent with one decimal; the element's value is the fraction in full precision."""
    return text(NONE) if value is None else tag("data", f"{100 * value:.1f}", value=repr(value))


def plain(value: float | None, digits: str = ".4f") -> Markup:
    """A number that is not a percentage; the element's value has full precision."""
    return text(NONE) if value is None else tag("data", format(value, digits), value=repr(value))


def percent_interval(at: Interval) -> Markup:
    """A value and, where it is known, its interval in brackets."""
    if at.value is None or at.low is None or at.high is None:
        return percent(at.value)
    return joined([percent(at.value), " [", percent(at.low), ", ", percent(at.high), "]"])


def table(
    caption: str,
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    *,
    emphasis: Sequence[int] = (),
    words: Sequence[int] = (),
) -> Markup:
    """A table that scrolls where it is too wide; the first cell of a row is its heading.

    emphasis: rows that stand out. words: columns of running text.
    """

    def cell(i: int, content: Any) -> Markup:
        if not i:
            return tag("th", content, scope="row")
        return tag("td", content, class_="words" if i in words else None)

    body = [
        tag("tr", *[cell(i, content) for i, content in enumerate(row)], class_="emphasis" if r in emphasis else None)
        for r, row in enumerate(rows)
    ]
    titles = [tag("th", name, scope="col", class_="words" if i in words else None) for i, name in enumerate(head)]
    heading = tag("thead", tag("tr", *titles))
    whole = tag("table", tag("caption", caption), heading, tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def picture(png: bytes, alt: str, caption: str) -> Markup:
    """A png inside the page, with its size, so that nothing moves while it is decoded.

    Raises:
        ValueError: the bytes are no png.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError("not a png")
    width, height = struct.unpack(">II", png[16:24])
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    image = alone("img", src=source, alt=alt, width=width, height=height)
    framed = tag("div", image, class_="scroll", role="region", tabindex="0", aria_label=caption)
    return tag("figure", framed, tag("figcaption", caption))
