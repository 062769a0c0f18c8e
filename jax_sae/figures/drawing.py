"""What all figures share: light and dark, titles, axes, files."""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jax_sae.language_model.hub import one_line

DARK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "#14171b"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), "#e6e9ed"),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color", "legend.edgecolor"), "#9aa5b1"),
}
"""matplotlib's settings for dark paper, which is that of pages."""

Figures = dict[Path, Callable[[], Any]]
"""By its file, what makes a figure."""


def write_title(figure: Any, title: str) -> None:
    """Write the title of a figure, in which a run's name stands as it is: `$` begins no formula."""
    printable = title.encode(errors="replace").decode()  # a name may have bytes that are not UTF-8
    figure.suptitle(printable, fontsize="medium", parse_math=False)


def save_figure(figure: Any, file: Path) -> None:
    """Write a PNG, and an SVG beside it; their folder is made, and both are replaced as a whole or not at all.

    Equal figures give equal bytes. A sign that no font here has, as a run's name may have, is an empty box.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = {each: each.with_name(each.name + ".partial") for each in (file, file.with_suffix(".svg"))}
    try:
        with warnings.catch_warnings(), import_matplotlib().rc_context({"svg.hashsalt": "jax_sae"}):
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(partial[file], format="png", dpi=150)
            figure.set_layout_engine("none")  # what lies where is settled now, which took half of the time
            figure.savefig(partial[file.with_suffix(".svg")], format="svg", metadata={"Date": None})
        for each, temporary in partial.items():
            os.replace(temporary, each)
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def dark() -> Iterator[None]:
    """Within it, figures are made for dark paper; the colours of what they show are those on white."""
    with import_matplotlib().rc_context(DARK):
        yield


def save_light_and_dark(make: Callable[[], Any], file: Path) -> None:
    """Write NAME.png and NAME.svg, and the same on dark paper as NAME-dark.png and NAME-dark.svg."""
    save_figure(make(), file)
    with dark():
        save_figure(make(), file.with_name(f"{file.stem}-dark{file.suffix}"))


def ink() -> str:
    """The colour of text, which can be read on the paper there is."""
    return str(import_matplotlib().rcParams["text.color"])


def plain_logarithms(axis: Any) -> None:
    """Ticks of a logarithmic axis, written as plain numbers: 1, 2 and 5 of each power of ten, or of many powers 1."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    low, high = sorted(axis.get_view_interval())
    if not 0 < low < high:
        return
    if high / low < 3:  # too short for two of those
        axis.set_minor_formatter(formatter := ScalarFormatter())
        axis.set_major_formatter(formatter)
        return
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


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
