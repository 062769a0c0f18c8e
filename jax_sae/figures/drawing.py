"""What all figures share: colours, titles, files."""

import importlib
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

Figures = list[tuple[list[Path], Callable[[], None]]]
"""Files, and what draws them."""


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
    """An empty matplotlib `Figure`, of which pyplot and its backend know nothing."""
    import_matplotlib()
    from matplotlib.figure import Figure

    return Figure(**settings)


def draw_each(figures: Figures) -> list[str]:
    """Draw them, and return lines that say where they are; one that fails is said too, and ends nothing."""
    drawn, problems = [], []
    for files, draw in figures:
        try:
            draw()
            drawn += files
        except Exception as error:  # of matplotlib and its settings, fonts and folders, or of a full disk
            names = ", ".join(map(str, files))
            problems.append(f"warning       {names} could not be drawn ({one_line(error)}); all numbers are saved")
    return ([f"figures       {', '.join(map(str, drawn))}"] if drawn else []) + problems
