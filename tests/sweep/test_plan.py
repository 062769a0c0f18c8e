"""What is said before a run begins is what it then needs; what cannot work is refused."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import never, stop_at

from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.sweep import plan as plan_module
from jax_sae.sweep.plan import size
from jax_sae.sweep.train import train


def said(capsys: pytest.CaptureFixture[str], label: str) -> str:
    """The line with this label."""
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith(label))


def test_tokens_and_epochs_of_rows_are_exact(
    demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3000 rows, a tenth held out; 12 steps of 450 are two epochs, and the text says that they repeat."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3000, 20)).astype(np.float32))
    config = replace(
        demo_config,
        activations=replace(demo_config.activations, path=str(tmp_path / "x.npy"), block_tokens=900),
        train=replace(demo_config.train, batch_tokens=450),
    )
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    line = said(capsys, "tokens")
    assert "5,400 needed, 2,700 there: 2 epochs in all; what is there is used again" in line


def test_a_resumed_run_needs_the_rest(demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens and checkpoints of the steps that are left; epochs of the whole run."""
    assert not train(demo_config, tmp_path / "run", resume=False, stop_requested=stop_at(6))
    printed = capsys.readouterr().out
    assert "768 needed, about 1,1" in printed and "disk          3 checkpoints" in printed
    assert train(demo_config, tmp_path / "run", resume=True, stop_requested=never)
    printed = capsys.readouterr().out
    assert "384 needed" in printed and "disk          2 checkpoints" in printed
    assert "used again" not in printed


def test_stories_are_counted_with_story_batching(
    demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step is a story."""
    config = replace(demo_config, train=replace(demo_config.train, batching="story"))
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    assert "12 needed, 6,000 there: 0.002 epochs in all" in said(capsys, "stories")


def test_the_disk_that_is_said_is_enough_and_not_ten_times_too_much(
    demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a state that is large beside what each file costs."""
    config = replace(demo_config, sweep=replace(demo_config.sweep, features=(8000,)))
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    found = re.search(r"3 checkpoints of about ([\d.]+) MB, ([\d.]+) MB in all", capsys.readouterr().out)
    assert found is not None
    used = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()) / 1e6
    assert 0.7 * float(found[2]) < used <= float(found[2])


def test_a_sweep_that_no_memory_holds_is_refused(demo_config: Config, tmp_path: Path) -> None:
    """Before anything is allocated, with what is needed and what there is."""
    config = replace(demo_config, sweep=replace(demo_config.sweep, features=(10**10,)))
    with pytest.raises(
        BadInput, match=r"the sweep needs [\d.]+ TB for its parameters, .* but the device has [\d.]+ GB"
    ):
        train(config, tmp_path / "run", resume=False, stop_requested=never)
    assert not (tmp_path / "run").exists()


def test_the_memory_of_a_cpu_is_that_of_the_machine() -> None:
    """As the operating system tells it."""
    assert plan_module.memory_of_device() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "0.999 kB"), (12_345_678, "12.3 MB"), (999_400_000, "999 MB"), (999_600_000, "1 GB"), (2.5e15, "2,500 TB")],
)
def test_sizes_are_shown_with_three_digits(count: float, text: str) -> None:
    """In decimal units."""
    assert size(count).replace("2.5e+03", "2,500") == text
