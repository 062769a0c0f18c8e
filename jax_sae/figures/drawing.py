"""What all figures share: colours, titles, files."""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jax_sae.language_model.hub import one_line

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart; the markers differ too."""
MARKERS = "osD^vPX"

Figures = dict[Path, Callable[[], Any]]
"""By its file, what makes a figure."""


def write_title(figure: Any, title: str) -> None:
    """Write the title of a figure, in which a run's name stands as it is: `$` begins no formula."""
    printable = title.encode(errors="replace").decode()  # a name may have bytes that are not UTF-8
    figure.suptitle(printable, fontsize="medium", parse_math=False)


def save_figure(figure: Any, file: Path) -> None:
    """Write a PNG; its folder is made, and the file is replaced as a whole or not at all.

    A sign that no font here has, as a run's name may have, is an empty box.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".partial")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, file)


def import_matplotlib() -> Any:
    """The module matplotlib, whose import fails by itself where MPLBACKEND names what is not there.

    Such as the backend of a notebook that started this process. One that is there stays pyplot's.
    """
    if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
        return importlib.import_module("matplotlib")
    backend = os.environ.pop("MPLBACKEND")
    try:
        matplotlib = importlib.import_module("matplotlib")
    finally:
        os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
    return matplotlib


def new_figure(**settings: Any) -> Any:
    """An empty matplotlib `Figure`, of which pyplot and its backend know nothing; a notebook shows it all the same."""
    import_matplotlib()
    from matplotlib.figure import Figure

    figure: Any = Figure(**settings)
    figure._repr_png_ = lambda: _png(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_each(figures: Figures) -> list[str]:
    """Make and write them, and return lines that say where they are; one that fails is said too, and ends nothing."""
    drawn, problems = [], []
    for file, make in figures.items():
        try:
            save_figure(make(), file)
            drawn.append(file)
        except Exception as error:  # of matplotlib and its settings, fonts and folders, or of a full disk
            problems.append(f"warning       {file} could not be drawn ({one_line(error)}); all numbers are saved")
    return ([f"figures       {', '.join(map(str, drawn))}"] if drawn else []) + problems
