"""Small pieces of HTML. Every text goes through `escape`: keys and names come from logs."""

from collections.abc import Collection, Iterable, Sequence
from html import escape as _escape


def escape(text: object) -> str:
    """A text as HTML."""
    return _escape(str(text), quote=True)


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element of children that are HTML already; `class_` is the attribute class, `_` in names becomes `-`."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{words}>{''.join(children)}</{name}>"


def table(
    heading: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] | None = None, name: str = ""
) -> str:
    """A table that scrolls sideways on a narrow screen.

    Args:
        heading: HTML of the cells.
        rows: HTML of the cells.
        numbers: columns with numbers, which are set to the right; None: all but the first.
        name: of what it shows, for screen readers.
    """

    def cells(kind: str, row: Sequence[str]) -> str:
        made = []
        for place, cell in enumerate(row):
            scope = "col" if kind == "th" else None
            is_number = place > 0 if numbers is None else place in numbers
            made.append(tag(kind, cell, class_="n" if is_number else None, scope=scope))
        return tag("tr", *made)

    body = tag("tbody", *(cells("td", row) for row in rows))
    content = tag("table", tag("thead", cells("th", heading)), body, aria_label=name or None)
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=name or "table")


def section(identity: str, title: str, lead: str, *children: str) -> str:
    """A section with its title and a line of text under it; `lead` is HTML."""
    head = [tag("h2", escape(title))] + ([tag("p", lead, class_="lead")] if lead else [])
    return tag("section", *head, *children, id=identity)


def chip(text: str, kind: str = "") -> str:
    """A short text in a frame; kinds: good, bad, warn, or plain."""
    return tag("span", escape(text), class_=f"chip {kind}".strip())


def details(summary: str, *children: str, is_open: bool = False) -> str:
    """A part that opens on a click; `summary` is HTML."""
    state = " open" if is_open else ""
    return f"<details{state}>{tag('summary', summary)}{''.join(children)}</details>"


def dot(color: str) -> str:
    """A dot in the colour of a class, beside a name."""
    return tag("i", class_=f"dot {color}", aria_hidden="true")
