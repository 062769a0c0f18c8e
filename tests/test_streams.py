"""What a command tells when its output is closed, full, broken, in ASCII or a file."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

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
