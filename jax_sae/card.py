"""What an object looks like in a notebook."""

import html
from collections.abc import Mapping


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
