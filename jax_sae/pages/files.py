"""Blocks -> files: one HTML file that holds everything, or one beside scripts that it loads when they are looked at.

A page that is opened by a double click may load scripts beside it, but no other files; so a block of its own file is a
script that hands it over. The page's policy names what may run by its sha256, and lets nothing reach the network.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jax_sae.errors import BadInput
from jax_sae.pages.blocks import as_json

MOST_IN_A_FILE = 4_900_000
"""Characters of a page that holds everything."""


@dataclass(frozen=True)
class Template:
    """A page without what it shows."""

    name: str
    """Of its files, NAME.html and NAME.js."""
    what: str
    """It is called."""

    @property
    def mark(self) -> str:
        """By which a page is known to be one of these, which may be replaced."""
        return f"<!-- {self.what} of jax_sae -->"


FEATURES, COMPARISON = Template("page", "feature pages"), Template("compare", "comparison of members")


class Pages:
    """Blocks as they are made; those that would make one file too large go to files of their own."""

    def __init__(self, directory: Path, in_one_file: bool, template: Template = FEATURES) -> None:
        """In a directory, of which `prepared` said that pages may be written there."""
        self.directory, self.in_one_file, self.template = directory, in_one_file, template
        self._inside: dict[str, str] = {}
        self._room = MOST_IN_A_FILE - 200_000
        self._outside = 0

    def add(self, name: str, block: str) -> str:
        """Keep a block under a name; returns the name."""
        self._room -= len(block)
        if self.in_one_file and self._room < 0:
            self.in_one_file = False
            for inside, content in self._inside.items():
                self._write(inside, content)
            self._inside = {}
        if self.in_one_file:
            self._inside[name] = block
        else:
            self._write(name, block)
        return name

    def _write(self, name: str, block: str) -> None:
        (self.directory / f"data-{name}.js").write_text(f'page.take("{name}","{block}");\n')
        self._outside += 1

    def finish(self, facts: Mapping[str, Any], **blocks: str) -> tuple[Path, int]:
        """Write the page, with these blocks in any case: (its file, how many files are beside it)."""
        where, name = files("jax_sae.pages"), self.template.name
        html, style, common, own = (
            where.joinpath(file).read_text() for file in (f"{name}.html", "page.css", "common.js", f"{name}.js")
        )
        script, blocks = common + own, {**blocks, **self._inside}
        data = "\n".join(
            f'<script type="application/octet-stream" id="block-{name}">{block}</script>'
            for name, block in blocks.items()
        )
        parts = {
            "MARK": self.template.mark,
            "POLICY": policy(style, script, self._outside > 0),
            "STYLE": style,
            "FACTS": as_json({**facts, "files": self._outside > 0}),
            "DATA": data,
            "SCRIPT": script,
        }
        before, *rest = html.split("{{")
        made = before
        for part in rest:
            name, after = part.split("}}", 1)
            made += parts[name] + after
        file = self.directory / "index.html"
        temporary = file.with_name(file.name + ".partial")
        temporary.write_text(made, encoding="utf-8")
        os.replace(temporary, file)
        return file, self._outside


def policy(style: str, script: str, loads_files: bool) -> str:
    """The content security policy: this style, this script, and where there are some, scripts beside the page."""

    def sha256(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    beside = " 'self' file:" if loads_files else ""
    runs = f"script-src {sha256(script)}{beside}; style-src {sha256(style)}"
    return f"default-src 'none'; {runs}; img-src data:; base-uri 'none'"


def prepared(directory: Path, template: Template = FEATURES) -> Path:
    """Make a directory for pages; those that are there already are taken away.

    Raises:
        BadInput: if it holds something else, or cannot be made.
    """
    index = directory / "index.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        there = [path.name for path in directory.iterdir()]
        if there and not (index.is_file() and template.mark in index.read_text(errors="replace")[:400]):
            raise BadInput(f"{directory} holds something that is not {template.what}; give a new directory by --out")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise BadInput(f"{directory} is read-only, and pages are written there; give another directory by --out")
    except OSError as error:
        raise BadInput(f"{directory} cannot be made a directory ({error}); give another by --out") from error
    for path in directory.glob("data-*.js"):
        path.unlink()
    return directory
