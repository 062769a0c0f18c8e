"""What a command tells when its output is closed, full, broken, in ASCII or a file."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import jax_sae
from jax_sae.commands.process import run_script
from jax_sae.streams import Lasting, lasting_streams, lost_output, progress_bar, reader_is_gone

Open = Callable[[str, int], None]


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Let sys.stdout or sys.stderr be an open file, strict and in ASCII as Python opens it in some places."""
    with ExitStack() as opened:

        def lead(name: str, descriptor: int) -> None:
            stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w")), encoding="ascii")
            monkeypatch.setattr(sys, name, opened.enter_context(stream))

        yield lead


def new_file(path: Path) -> int:
    """A file that is open for writing."""
    return os.open(path, os.O_WRONLY | os.O_CREAT)


def test_what_the_encoding_does_not_have_is_escaped(tmp_path: Path, lead: Open) -> None:
    """Letters, and bytes of a path that are not UTF-8; nothing is an error."""
    lead("stdout", new_file(tmp_path / "out"))
    assert run_script([], lambda: print("runs/ä", os.fsdecode(b"\xff")) or 0) == 0
    assert (tmp_path / "out").read_bytes() == b"runs/\\xe4 \\udcff\n"


def test_a_reader_that_is_gone_is_noticed_and_ends_nothing(lead: Open) -> None:
    """As in `| head -1`: the work goes on to its end, or to where it looks; the exit code is that of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    lead("stdout", writer)
    seen = []

    def work() -> int:
        for _ in range(3):
            print("told to nobody")
        seen.append(reader_is_gone())
        return 0

    assert run_script([], work) == 141 and seen == [True]
    assert run_script([], lambda: print("again") or 2) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_output_to_a_full_disk_is_an_error_at_the_end(lead: Open, capsys: pytest.CaptureFixture[str]) -> None:
    """The work is done all the same."""
    done = []
    lead("stdout", new_file(Path("/dev/full")))
    assert run_script([], lambda: done.append(print("told")) or 0) == 1 and done
    assert capsys.readouterr().err == "error: what was to be told could not be written (No space left on device)\n"
    with lasting_streams():
        print("told")
        assert lost_output() == {errno.ENOSPC} and not reader_is_gone()


def test_streams_that_are_not_there_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under pythonw, or after `>&-`: printing, a bar and flushing do nothing; afterwards all is as before."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def work() -> int:
        print("told", os.fsdecode(b"\xff"))
        with progress_bar(total=1) as bar:
            bar.update()
        return 0

    assert run_script([], work) == 0
    assert sys.stdout is None and sys.stderr is None
    with progress_bar(total=1) as bar:  # in a program of one's own
        bar.update()


def test_progress_in_a_log_file_is_lines(tmp_path: Path, lead: Open) -> None:
    """At the start, now and then, and at the end; no carriage returns."""
    lead("stderr", new_file(tmp_path / "log"))
    with lasting_streams(), progress_bar(total=1000, desc="steps", mininterval=0) as bar:
        assert isinstance(sys.stderr.buffer.raw, Lasting)
        for _ in range(1000):
            bar.update()
    first, last = (tmp_path / "log").read_text().splitlines()
    assert first.startswith("steps:   0%") and last.startswith("steps: 100%") and "\r" not in first + last


class Notebook:
    """What IPython is in a notebook, as far as it is used: outputs, and what each of them has shown."""

    def __init__(self) -> None:
        self.outputs: list[list[Any]] = []
        self.display = SimpleNamespace(display=self)
        self.version_info = (9, 0)  # which matplotlib asks for

    def get_ipython(self) -> Any:
        return SimpleNamespace(kernel=None)

    def __call__(self, content: Any, display_id: bool) -> Any:
        assert display_id
        self.outputs.append([content])
        return SimpleNamespace(update=self.outputs[-1].append)


def test_in_a_notebook_progress_and_losses_are_two_outputs_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes; the bar ends full, the figure at the last step; quiet there is nothing."""
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setattr("jax_sae.run.live.time.perf_counter", iter(range(0, 10**6, 100)).__next__)
    x = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    settings = {"activations": x, "features": [3, 8], "batch_tokens": 16, "log_every": 2, "held_out_tokens": 50}
    jax_sae.train(**settings, steps=8, quiet=True)
    assert not notebook.outputs
    jax_sae.train(**settings, steps=8)
    bar, figures = notebook.outputs
    assert repr(bar[-1]).startswith("100%|") and " 8/8 " in repr(bar[-1])
    assert [figure.get_suptitle() for figure in figures] == ["step 2 of 8", "step 8 of 8"]  # 100 s each: not at 4 and 6
    labels = [text.get_text() for text in figures[-1].axes[0].get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == ["F3", "F8"]

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr("jax_sae.run.live.loss_figure", fail)
    assert jax_sae.train(**settings, steps=8, on_step=lambda step, _: step == 4).step == 4
    assert len(notebook.outputs) == 3
    monkeypatch.setattr(notebook, "get_ipython", lambda: None)  # a shell without a kernel is a terminal
    with progress_bar(total=1) as last:
        last.update()
    assert len(notebook.outputs) == 3
