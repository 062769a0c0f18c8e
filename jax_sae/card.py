"""What an object looks like in a notebook."""

import html
from collections.abc import Iterable, Mapping, Sequence


def card(title: str, facts: Mapping[str, str]) -> str:
    """HTML: a title, and facts by name below it; in the notebook's own colours, dark or light."""
    cells = "".join(
        f'<span style="white-space:nowrap"><span style="opacity:.65">{html.escape(name)}</span> '
        f"{html.escape(value)}</span>"
        for name, value in facts.items()
    )
    return (
        '<div style="display:inline-block;border:1px solid rgba(128,128,128,.5);border-radius:6px;padding:.4em .8em">'
        f"<b>{html.escape(title)}</b>"
        f'<div style="display:flex;flex-wrap:wrap;gap:0 1.2em">{cells}</div></div>'
    )


def shaded(tokens: Sequence[str], parts: Iterable[float]) -> str:
    """HTML: a text whose tokens are shaded the more, the larger their parts from 0 to 1 are."""
    spans = (
        f'<span style="background:rgba(236,118,20,{0.08 + 0.6 * part:.2f});border-radius:2px" '
        f'title="{100 * part:.0f} % of its largest">{html.escape(token)}</span>'
        if part > 0
        else html.escape(token)
        for token, part in zip(tokens, parts, strict=True)
    )
    return f'<span style="white-space:pre-wrap">{"".join(spans)}</span>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML: the first column to the left, the others to the right."""

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = ("left", *("right" for _ in cells[1:]))
        each = (f'<{tag} style="text-align:{s}">{html.escape(c)}</{tag}>' for c, s in zip(cells, sides, strict=True))
        return f"<tr>{''.join(each)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f'<table style="color:inherit"><thead>{row("th", header)}</thead><tbody>{body}</tbody></table>'
