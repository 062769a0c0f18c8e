"""Commands outside a plain terminal: another thread, no home, no such device, a pipe that nobody reads, no figures."""

import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import MODEL, SMALL
from running import never

from jax_sae.analysis import evaluation
from jax_sae.commands import main
from jax_sae.commands.process import caches
from jax_sae.config import Config
from jax_sae.run import live, opened, run_figures
from jax_sae.run.train import train

CACHES = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "MPLCONFIGDIR")


@pytest.mark.long
def test_training_in_another_thread_of_a_figure_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Signals are not heard there, which is said; nothing is left running. The numbers are written all the same.

    The config begins with a byte order mark and has the line ends of Windows; ~ is expanded in it and in flags.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(MODEL)
    (tmp_path / "small.toml").write_bytes(b"\xef\xbb\xbf[model]\r\npath = '~/model'\r\nlayer = 1\r\n")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no\nfont")

    monkeypatch.setattr(run_figures, "loss_figure", fail)
    flags = [*SMALL, "--config=~/small.toml", "--out=~/run", "--text.path", "jax_sae/demo/stories"]
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["train", *flags])))
    before = threading.active_count()
    thread.start()
    thread.join()
    assert codes == [0] and threading.active_count() == before and (tmp_path / "run" / "summary.json").is_file()
    told = capsys.readouterr().out
    assert "\nnote          this is not the main thread: Ctrl-C and other signals are not heard here\n" in f"\n{told}"
    run = tmp_path / "run"
    assert f"\nfigures       {run}/figures/training.png\n" in told
    for figure in ("loss", "loss_zoomed"):
        failed = f"{run}/figures/{figure}.png could not be drawn (OSError: no font)"
        assert f"\nwarning       {failed}; all numbers are saved\n" in told
    assert told.splitlines()[-1].startswith("use it ") and not list(run.rglob("*.partial"))


@pytest.mark.long
def test_losses_are_drawn_while_a_run_goes_on(
    demo_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Now and then, in its directory; where that fails it is said once, and the run goes on."""
    monkeypatch.setattr(live, "FIRST_AFTER", 0.0)
    run, steps = tmp_path / "run", list[int]()
    figure = run / "figures" / "training.svg"

    def stop_at_six(step: int) -> bool:
        assert step == 0 or figure.read_text().endswith("</svg>\n")
        steps.append(step)
        return step >= 6

    assert not train(demo_config, run, resume=False, stop_requested=stop_at_six) and max(steps) >= 6
    figure.unlink()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no\nfont")

    capsys.readouterr()
    monkeypatch.setattr(run_figures, "training_figure", fail)
    assert train(demo_config, run, resume=True, stop_requested=never)
    told = capsys.readouterr().out
    assert told.count("warning       losses could not be drawn (OSError: no font); training goes on\n") == 1
    assert not figure.exists() and (run / "summary.json").exists()


@pytest.mark.long
def test_a_run_that_ends_while_its_figures_are_drawn_has_them_drawn_when_it_is_resumed(
    demo_run: Path, demo_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not finished before, so no figure is missing of a finished run, nor is half of one left."""
    run = tmp_path / "run"
    shutil.copytree(demo_run, run, ignore=shutil.ignore_patterns("summary.json", "figures"))

    class EndsInTheMiddle:
        def savefig(self, file: Path, **_: Any) -> None:
            file.write_bytes(b"half of it")
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_figures, "training_figure", lambda *_, **__: EndsInTheMiddle())
        with pytest.raises(KeyboardInterrupt):
            train(demo_config, run, resume=True, stop_requested=never)
    figures = run / "figures"
    assert not (run / "summary.json").exists() and not list(figures.glob("training*"))
    assert train(demo_config, run, resume=True, stop_requested=never)
    assert (run / "summary.json").exists() and not list(figures.glob("*.partial"))
    assert {path.name for path in figures.iterdir()} == {path.name for path in (demo_run / "figures").iterdir()}


@pytest.mark.long
def test_evaluation_is_written_before_it_is_drawn(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A figure that fails is a line."""
    (tmp_path / "checkpoints").symlink_to(demo_run / "checkpoints")
    (tmp_path / "config.json").symlink_to(demo_run / "config.json")
    was_there = []

    def fail(*_: Any) -> None:
        was_there.append((tmp_path / "evaluation-step5.json").is_file())
        raise ValueError("no backend")

    monkeypatch.setattr(evaluation, "frontier_figure", fail)
    assert main(["evaluate", str(tmp_path), "--step", "5", "--tokens", "100"]) == 0 and was_there == [True]
    assert "frontier-step5.png could not be drawn (ValueError: no backend); all numbers" in capsys.readouterr().out
    assert (tmp_path / "figures" / "feature_density-step5.png").is_file()


def test_a_read_only_run_is_refused_before_it_is_evaluated(
    demo_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line; nothing was opened."""
    monkeypatch.setattr(opened, "open_sources", None)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != demo_run)
    assert main(["evaluate", str(demo_run)]) == 2
    error = capsys.readouterr().err
    assert (
        error == f"error: {demo_run} is read-only, and results are written there; copy the run, and evaluate the copy\n"
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "harvest"])
def test_a_device_that_is_not_there_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JAX says so by one exception or another, of which one has no words."""
    for error, why in (
        (RuntimeError("Unable to\ninitialize"), " (Unable to initialize)"),
        (AssertionError(), ""),
    ):

        def devices(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("jax.devices", devices)
        monkeypatch.setenv("JAX_PLATFORMS", "tpu")
        flags = {"evaluate": [str(tmp_path)]}.get(command, ["--out", str(tmp_path / "new")])
        assert main([command, *flags]) == 2
        found = f"error: JAX finds no device for JAX_PLATFORMS=tpu{why}; unset it to use what is there, or install JAX"
        assert capsys.readouterr().err.startswith(found) and not (tmp_path / "new").exists()


def test_nothing_is_trained_for_a_reader_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `| head -1`: no traceback, no directory, no advice to go on with what never began."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody, open(tmp_path / "err", "w") as error:
        monkeypatch.setattr(sys, "stdout", nobody)
        monkeypatch.setattr(sys, "stderr", error)
        assert main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 141
    assert not (tmp_path / "run").exists() and (tmp_path / "err").read_text() == ""


def test_what_was_trained_is_saved_when_the_reader_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next step boundary."""
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    is_gone = lambda: metrics.exists() and metrics.stat().st_size > 0  # noqa: E731
    monkeypatch.setattr("jax_sae.commands.train.reader_is_gone", is_gone)
    flags = ["--train.steps", "100000", "--train.checkpoint-every", "100000"]
    assert main(["train", *SMALL, *flags, "--out", str(run)]) == 141
    (step,) = [int(path.name) for path in (run / "checkpoints").iterdir()]
    assert 0 < step < 100000


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an entry in the list of users, as in a container."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def read_only_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is there, but not ours."""
    home = os.path.expanduser("~")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(home))


@pytest.mark.parametrize(("spoil", "home"), [(no_home, "~"), (read_only_home, os.path.expanduser("~"))])
def test_without_a_home_that_can_be_written_the_rest_goes_on(
    spoil: Callable[[pytest.MonkeyPatch], None], home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each cache, with what to set; data sets and fonts have a temporary folder as long as it lasts."""
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    spoil(monkeypatch)
    with caches() as lines:
        assert lines[0].startswith(f"note          {home}/.cache/jax_sae/compiled/")
        assert lines[1].startswith(f"note          {home}/.cache/huggingface cannot be written to: ")
        assert "set JAX_COMPILATION_CACHE_DIR" in lines[0] and "set HF_HOME" in lines[1] and len(lines) == 2
        assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
        assert ("HF_HOME" in os.environ) == (home == "~")
        kept = Path(os.environ["HF_DATASETS_CACHE"]).parent
        assert kept.is_dir() and Path(os.environ["MPLCONFIGDIR"]).parent == kept
    assert not kept.exists() and not set(CACHES) & set(os.environ)


def test_what_is_set_is_used_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HOME and JAX_COMPILATION_CACHE_DIR, also where there is no home."""
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    no_home(monkeypatch)
    with caches() as lines:
        assert lines == [] and "HF_DATASETS_CACHE" not in os.environ
