"""Notebooks can be read without running them, and run: what they show is what their code gives."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from running import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Any) -> list[Any]:
    """Those of a notebook, as JSON or as nbformat reads it."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shape(cell: Any) -> list[tuple[str, ...]]:
    """What kinds of outputs a cell has; parts of one stream in a row are one."""
    found = [
        (each["output_type"], each["name"]) if "name" in each else (each["output_type"], *sorted(each["data"]))
        for each in cell["outputs"]
    ]
    return [each for each, _ in groupby(found)]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_can_be_read_as_it_stands(file: Path) -> None:
    """Every cell was run in order, without an error or a warning; it is small, and names no place of a machine."""
    notebook = json.loads(file.read_text())
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [each for cell in cells for each in cell["outputs"]]
    assert not any(each["output_type"] == "error" or each.get("name") == "stderr" for each in outputs)
    assert any("image/png" in each.get("data", {}) for each in outputs) and file.stat().st_size < 1_000_000
    words = [re.sub(r'"image/png": "[^"]*"', "", json.dumps(cell)) for cell in notebook["cells"]]
    assert not [
        found for text in words for found in re.findall(r"(?<![\w.])/\w+/\w[^\s\"\\]*", text) if "</" not in found
    ]
    for text in words:
        for link in re.findall(r"\]\((?!https?:)([^)#]*)", text):
            assert (file.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new kernel, in an empty folder; each cell gives the kinds of outputs that are saved, none to stderr.

    It compiles for itself: JAX warns of programs that are half written, as killed processes of other tests leave them.
    """
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    saved, notebook = (nbformat.read(file, 4) for _ in range(2))
    for cell in code_cells(notebook):
        cell["outputs"] = []
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    for cell, before in zip(code_cells(notebook), code_cells(saved), strict=True):
        assert shape(cell) == shape(before), "\n".join(
            [cell["source"], *(str(each.get("text")) for each in cell["outputs"])]
        )
