"""What the site has beyond the pages as they stand: navigation, tables of settings, docstrings, dark pictures.

Pages are plain Markdown, to be read in a repository too. All that a site wants besides follows from them and from the
source when the site is built, so nothing of it can be out of date. Text in, text out; `conf.py` hands it to Sphinx.
"""

import dataclasses
import html
import inspect
import math
import pkgutil
import re
import sys
import typing
from pathlib import Path
from typing import Any

from jax_sae import config
from jax_sae.commands.flags import texts_of_sweep

TOCTREE = '```{{toctree}}\n:hidden:\n:caption: "{}"\n\n{}\n```\n'


def with_navigation(index: str) -> str:
    """docs/index.md with a hidden table of contents behind each heading `##`: the pages that are linked below it."""

    def contents(section: re.Match[str]) -> str:
        links = re.findall(r"^- \[([^\]]*)\]\(([^):#]+)\)", section[0], re.MULTILINE)
        pages = [f"{title} <{re.sub(r'[.](md|ipynb)$', '', page)}>" for title, page in links]
        return section[0] + TOCTREE.format(section[0].splitlines()[0].removeprefix("## "), "\n".join(pages)) + "\n"

    return re.sub(r"^## .*?(?=^## |\Z)", contents, index, flags=re.MULTILINE | re.DOTALL)


def limits(check: Any, most: float) -> str:
    """The range that a check of a setting leaves, as its own messages have it."""
    largest = {math.inf: "", sys.float_info.max: "", config.LARGEST_COUNT: ""}.get(most, f"{most:g}")
    if most in (2**31 - 1, 2**32 - 1):
        largest = f"2^{round(math.log2(most))} - 1"
    if check is config.plain_name:
        return f"letters, digits and . : _ -, up to {most:g}"
    below_1 = "below 1" if most == config.LARGEST_BELOW_1 else f"to {largest}"
    return {
        None: "",
        config.positive: "above 0" + (f", to {largest}" if largest else ""),
        config.not_negative: f"0 to {largest}" if largest else "0 or more",
        config.part_of_steps: "0 to 1",
        config.part_above_0: f"above 0, to {largest}",
        config.from_0: f"0 to {below_1}",
    }[check]


def kind_of_value(hint: Any) -> str:
    """A type in words; the values of a Literal."""
    hint = config.without_none(hint)
    if typing.get_origin(hint) is tuple:
        return f"list of {kind_of_value(typing.get_args(hint)[0])}s".replace("`s", "`").replace("texts", "names")
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    names = {int: "whole number", float: "number", str: "text", bool: "yes or no", config.Member: "`Member`"}
    return names[hint]


def shown_default(value: Any) -> str:
    """A default as TOML would say it; nothing where there is none."""
    if value in (None, (), "", dataclasses.MISSING):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return ", ".join(map(shown_default, value))
    return f"`{value}`"


def settings_tables() -> str:
    """A table for each table of a `Config`: every setting, what it is and its unit, its type, range and default."""
    lines = []
    of_members = {facts.list or name: facts for name, facts in config.SETTINGS.items()}
    for table in dataclasses.fields(config.Config):
        cls = typing.get_type_hints(config.Config)[table.name]
        texts = texts_of_sweep() if cls is config.SweepConfig else texts_of(cls)
        summary = inspect.getdoc(cls).splitlines()[0]  # type: ignore[union-attr]
        lines += [
            f"## `[{table.name}]`",
            "",
            summary,
            "",
            "| setting | what it is | values | default |",
            "|---|---|---|---|",
        ]
        for field in dataclasses.fields(cls):
            facts = field.metadata.get("facts") or (of_members.get(field.name) if cls is config.SweepConfig else None)
            hint = typing.get_type_hints(cls)[field.name]
            values = ", ".join(filter(None, [kind_of_value(hint), limits(facts.check, facts.most) if facts else ""]))
            default = field.default if field.default is not dataclasses.MISSING else ()
            cells = [f"`{field.name}`", escaped(texts[field.name]), values, shown_default(default)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["## `[[sweep.members]]`", "", "| setting | what it is | values |", "|---|---|---|"]
    texts = texts_of(config.Member)
    for name, facts in config.SETTINGS.items():
        values = ", ".join(
            filter(None, [kind_of_value(typing.get_type_hints(config.Member)[name]), limits(facts.check, facts.most)])
        )
        lines.append(f"| `{name}` | {escaped(texts[name])} | {values} |")
    return "\n".join(lines) + "\n"


def texts_of(cls: type) -> dict[str, str]:
    """The string after each field of a dataclass."""
    from docstring_parser import parse_from_object

    return {each.arg_name: " ".join(str(each.description).split()) for each in parse_from_object(cls).params}


def escaped(text: str) -> str:
    """Plain text as Markdown in a table; a page that it names is linked."""
    parts = re.split(r"docs/(\w+\.md)", text)
    parts[::2] = [re.sub(r"([|*_\[\]<$^])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"[{page}]({page})" for page in parts[1::2]]
    return "".join(parts)


def docstrings(api: str) -> str:
    """Of docs/api.md, a section of directives for each heading: the docstrings of everything it lists, in its order."""
    lines: list[str] = []
    shown: list[Any] = []
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", api, re.MULTILINE | re.DOTALL):
        names = []
        for name in dict.fromkeys(re.findall(r"`(jax_sae(?:\.\w+)+)", f"{title} {body}")):
            if not any(pkgutil.resolve_name(name) is value for value in shown):
                shown.append(pkgutil.resolve_name(name))
                names.append(name)
        if names:
            lines += [f"## {title.replace('`jax_sae.', '`')}", "", "```{eval-rst}"]
            lines += [line for name in names for line in directive(name)]
            lines += ["```", ""]
    return "\n".join(lines)


def with_links_to_docstrings(api: str) -> str:
    """docs/api.md with a link from each name in its tables to its docstring; `.table()` is of its section's class."""
    lines, cls = [], ""
    for line in api.split("\n"):
        if heading := re.match(r"## `(jax_sae\.\w+)`|## ", line):
            cls = heading[1] or ""
        elif line.startswith("| "):
            line = re.sub(r"`(jax_sae(?:\.\w+)+)(\([^`]*\))?`", r"{py:obj}`\1\2 <\1>`", line)
            if cls:
                line = re.sub(r"`(\.\w+)(\([^`]*\))?`", rf"{{py:obj}}`\1\2 <{cls}\1>`", line)
        lines.append(line)
    return "\n".join(lines)


def directive(name: str) -> list[str]:
    """The directive of autodoc for a name."""
    value = pkgutil.resolve_name(name)
    if inspect.isclass(value):
        options = [
            "   :members:",
            "   :member-order: bysource",
            "   :exclude-members: name, parent, setup, tree_flatten",
        ]
        return [f".. autoclass:: {name}", *(options if not issubclass(value, Exception) else []), ""]
    if inspect.isroutine(inspect.unwrap(value)):
        return [f".. autofunction:: {name}", ""]
    return [f".. autodata:: {name}", "   :no-value:", ""]


def plain_rst(lines: list[str]) -> list[str]:
    """A docstring in plain words and `code` as reStructuredText that says just that; `name: ...` begins a paragraph."""
    text = re.sub(r"`([^`\n]+(?:\n[^`\n]+)?)`", lambda code: f"``{' '.join(code[1].split())}``", "\n".join(lines))
    parts = re.split(r"(``[^`]*``)", text)
    parts[::2] = [re.sub(r"([|*\\])|(?<=\w)(_)(?!\w)", r"\\\1\2", part) for part in parts[::2]]
    parts[2::2] = [re.sub(r"^(?=[\w\[])", r"\\ ", part) for part in parts[2::2]]  # what touches a literal
    text = re.sub(r"(?<=\S\n)(?=\w+: )", "\n", "".join(parts))
    text = re.sub(r"(?m)^(\S.*)\n\n(?= {4})", r"\1\n\n::\n\n", text)  # an example
    return text.split("\n")


def with_markdown_pictures(text: str) -> str:
    """Each `<picture>`, which a repository shows light or dark, as a picture in Markdown, of which Sphinx knows."""
    return re.sub(r'<picture>.*?<img alt="([^"]*)" src="([^"]*)">\s*</picture>', r"![\1](\2)", text, flags=re.DOTALL)


def drawn_formula(tex: str) -> str:
    """A formula as a drawing that stands in HTML: it needs no font, script or network, and has the colour of the text.

    Matplotlib draws it, which knows most of TeX's mathematics. Sizes are in em; what is below the line hangs below it.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextToPath

    size = 100
    points, codes = TextToPath().get_text_path(FontProperties(size=size, math_fontfamily="cm"), f"${tex}$", ismath=True)
    outline = Outline(points, codes)
    box = outline.get_extents()
    letters = {
        Outline.MOVETO: "M",
        Outline.LINETO: "L",
        Outline.CURVE3: "Q",
        Outline.CURVE4: "C",
        Outline.CLOSEPOLY: "Z",
    }
    drawn = "".join(
        letters[code] + ("" if code == Outline.CLOSEPOLY else " ".join(f"{number:.0f}" for number in 10 * points))
        for points, code in outline.iter_segments(simplify=False)
    )
    view = " ".join(f"{number:.0f}" for number in (10 * box.x0, -10 * box.y1, 10 * box.width, 10 * box.height))
    width, height, below = (f"{number / size:.3f}em" for number in (box.width, box.height, box.y0))
    return (
        f'<svg class="formula" role="img" aria-label="{html.escape(tex)}" viewBox="{view}" '
        f'style="width:{width};height:{height};vertical-align:{below}">'
        f'<path transform="scale(1,-1)" d="{drawn}"/></svg>'
    )


def dark_variant(picture: Path) -> Path | None:
    """The picture for a dark page, where there is one beside a light one: loss.svg and loss-dark.svg."""
    dark = picture.with_name(f"{picture.stem}-dark{picture.suffix}")
    return dark if dark.exists() else None
