"""Labelled texts for probes: .csv and .jsonl files, a folder of them, or those of the package sae-probes."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np

from jax_sae.errors import BadInput

TEXT, LABEL = ("text", "prompt"), ("label", "target")
"""Names of columns, the first that is there."""

ENDINGS = (".csv", ".jsonl", ".csv.zst", ".jsonl.zst", ".csv.gz", ".jsonl.gz")

PACKAGE = "sae_probes"
FEWEST = 20
"""Texts of each label."""


@dataclass(frozen=True, eq=False)
class TextSet:
    """Texts with one of two labels."""

    name: str
    texts: list[str]
    labels: np.ndarray
    """[n] bool: whether it is the second label."""
    names: tuple[str, str]
    """Of the labels, in alphabetical order."""


def text_sets(path: Path | None) -> tuple[list[TextSet], list[str]]:
    """The sets in a file or a folder; None: in the package sae-probes, which is not imported. And lines that say so.

    A file has the columns `text` (or `prompt`) and `label` (or `target`), and its name is the set's. Where it is one
    of several, it is left out if it has other columns, other than two labels, or fewer than 20 texts of one of them.

    Raises:
        BadInput: if there is no such file, it cannot be read, or not one set can be used.
    """
    where = _package() if path is None else path
    if not where.exists():
        raise BadInput(f"{where} is not there; a file of {', '.join(ENDINGS)} or a folder of them was expected")
    files = sorted(file for file in where.iterdir() if _is_named(file)) if where.is_dir() else [where]
    if not files:
        raise BadInput(f"{where} holds no file of {', '.join(ENDINGS)}")
    sets, problems = [], []
    for file in files:
        found = _read(file)
        if isinstance(found, TextSet):
            sets.append(found)
        else:
            problems.append(f"{file} {found}")
    if not sets:
        more = f" ({len(problems)} files like it)" if len(problems) > 1 else ""
        raise BadInput(f"{problems[0]}{more}")
    lines = [f"texts         {where}: {len(sets)} sets, {sum(len(each.texts) for each in sets):,} texts"]
    if problems:
        lines.append(f"left out      {len(problems)} of {len(files)} files, such as {problems[0]}")
    return sets, lines


def _package() -> Path:
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    folders = [folder for each in places if (folder := Path(each) / "data" / "cleaned_data").is_dir()]
    if not folders:
        raise BadInput(
            "no texts are given, and the package sae-probes, which has 113 sets, is not installed; give --texts "
            "FOLDER, or install it without what it depends on: pip install --no-deps sae-probes==0.4.2"
        )
    return folders[0]


def _is_named(file: Path) -> bool:
    return file.name.endswith(ENDINGS) and not file.name.startswith(".")


def _read(file: Path) -> TextSet | str:
    """A set, or what is wrong with it, worded to follow its name."""
    if not _is_named(file):
        raise BadInput(f"{file} is no file of {', '.join(ENDINGS)}")
    rows = iter(_rows(file))
    first = next(rows, None)
    if first is None:
        return "has no rows"
    text, label = (next((name for name in names if name in first), None) for names in (TEXT, LABEL))
    if text is None or label is None:
        lacking = TEXT if text is None else LABEL
        return f"has no column {' or '.join(lacking)}; it has {shortened(', '.join(map(str, first)))}"
    texts, labels = [], []
    for number, row in enumerate((first, *rows), 1):
        if not isinstance(row.get(text), str) or not row[text]:
            return f"has {shortened(row.get(text))} for {text} in row {number}; a text was expected"
        if any("\ud800" <= character <= "\udfff" for character in row[text]):
            return f"has half a surrogate pair, which is no character, in row {number}"
        if row.get(label) in (None, ""):
            return f"has no {label} in row {number}"
        texts.append(row[text])
        labels.append(str(row[label]))
    names, counts = np.unique(labels, return_counts=True)
    if len(names) != 2:
        return f"has {len(names)} labels; two were expected"
    if counts.min() < FEWEST:
        return f"has {counts.min()} texts of the label {str(names[counts.argmin()])!r}; {FEWEST} were expected"
    name = file.name
    for ending in sorted(ENDINGS, key=len, reverse=True):
        name = name.removesuffix(ending)
    return TextSet(name, texts, np.array(labels) == names[1], (str(names[0]), str(names[1])))


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    compression = {".zst": "zstd", ".gz": "gzip"}.get(file.suffix)
    try:
        content = file.read_bytes()
        if compression:
            import pyarrow

            content = pyarrow.CompressedInputStream(io.BytesIO(content), compression).read()
        lines = content.decode("utf-8-sig")
        if ".csv" in file.suffixes[-2:]:
            csv.field_size_limit(2**30)
            yield from csv.DictReader(io.StringIO(lines, newline=""), strict=True)
            return
        for line in lines.split("\n"):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{shortened(line)} is no object")
                yield row
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"{file} cannot be read ({' '.join(str(error).split())})") from error
