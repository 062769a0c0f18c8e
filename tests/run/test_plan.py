"""What is said before a run begins is what it then needs; what cannot work is refused."""

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import never, stop_at

from jax_sae.activations.places import Place
from jax_sae.config import Config, SweepConfig
from jax_sae.errors import BadInput
from jax_sae.run import plan as plan_module
from jax_sae.run.plan import _refuse_large_counts, size
from jax_sae.run.progress import Setup
from jax_sae.run.train import train
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members


def said(capsys: pytest.CaptureFixture[str], label: str) -> str:
    """The line with this label."""
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith(label))


@pytest.mark.usefixtures("learning_nothing")
def test_tokens_and_epochs_of_rows_are_exact(
    demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3000 rows, a tenth held out; 12 steps of 450 are two epochs, and the text says that they repeat."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3000, 20)).astype(np.float32))
    config = replace(
        demo_config,
        activations=replace(demo_config.activations, path=str(tmp_path / "x.npy"), block_tokens=900),
        sweep=replace(demo_config.sweep, features=(4,)),
        train=replace(demo_config.train, batch_tokens=450),
    )
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    line = said(capsys, "tokens")
    assert "5,400 needed, 2,700 there: 2 epochs in all; what is there is used again" in line


@pytest.mark.long
@pytest.mark.usefixtures("learning_nothing")
def test_a_resumed_run_needs_the_rest(demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens and checkpoints of the steps that are left; epochs of the whole run."""
    assert not train(demo_config, tmp_path / "run", resume=False, stop_requested=stop_at(6))
    printed = capsys.readouterr().out
    assert re.search(r"768 needed, about \d\d,\d{3} there", printed) and "disk          3 checkpoints" in printed
    assert train(demo_config, tmp_path / "run", resume=True, stop_requested=never)
    printed = capsys.readouterr().out
    assert "384 needed" in printed and "disk          2 checkpoints" in printed
    assert "used again" not in printed


@pytest.mark.usefixtures("learning_nothing")
def test_stories_are_counted_with_story_batching(
    demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is a story."""
    config = replace(demo_config, train=replace(demo_config.train, batching="story"))
    assert not train(config, tmp_path / "run", resume=False, stop_requested=stop_at(1))
    assert "12 needed, 400 there: 0.03 epochs in all" in said(capsys, "stories")


@pytest.mark.long
def test_the_disk_that_is_said_is_enough_and_not_ten_times_too_much(
    demo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a state that is large beside what each file costs."""
    config = replace(demo_config, sweep=replace(demo_config.sweep, features=(3000,)))
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    found = re.search(r"3 checkpoints of about ([\d.]+) MB, ([\d.]+) MB in all", capsys.readouterr().out)
    assert found is not None
    used = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()) / 1e6
    assert 0.7 * float(found[2]) < used <= float(found[2])


def test_what_no_memory_holds_is_refused(demo_config: Config, tmp_path: Path) -> None:
    """Before anything is allocated, with what it would take and what there is."""
    sweep = replace(demo_config, sweep=replace(demo_config.sweep, features=(10**9,)))
    activations = replace(demo_config.activations, block_tokens=10**12)
    block = replace(demo_config, activations=activations)
    losses = replace(demo_config, train=replace(demo_config.train, steps=2**31 - 1, checkpoint_every=2**31 - 1))
    losses = replace(losses, sweep=replace(demo_config.sweep, features=(1,), seeds=tuple(range(20))))
    for config, what in ((sweep, "the sweep"), (block, "a block"), (losses, "the metrics of all steps")):
        with pytest.raises(BadInput, match=rf"{what} would take [\d.]+ [TG]B of memory, but there are [\d.]+ GB; "):
            train(config, tmp_path / "run", resume=False, stop_requested=never)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("done", [0, 1, 4, 5, 7, 10, 11])
@pytest.mark.parametrize("steps", [11, 12, 15])
@pytest.mark.parametrize("every", [1, 5, 20])
def test_the_number_of_checkpoints_is_that_of_the_loop(
    done: int, steps: int, every: int, demo_config: Config, tmp_path: Path
) -> None:
    """In closed form, for runs of any length."""
    config = replace(demo_config, train=replace(demo_config.train, steps=steps, checkpoint_every=every))
    setup = Setup(config, make_groups(sweep_members(config.sweep)), (Place("", 64),), {})
    expected = [step for step in range(done + 1, steps + 1) if plan_module.is_checkpoint(step, every, steps)]
    assert f" {len(expected)} checkpoints" in plan_module._disk(setup, tmp_path, done)


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


def test_counts_beyond_32_bits_are_refused(demo_config: Config) -> None:
    """On one device as on many: more features of a batch than batchtopk can count."""
    sweep = SweepConfig(kinds=("batchtopk",), features=(2**20,), k=(4,))
    config = replace(demo_config, sweep=sweep, train=replace(demo_config.train, batch_tokens=2**11))
    setup = Setup(config, make_groups(sweep_members(config.sweep)), (Place("", 64),), {})
    with pytest.raises(BadInput, match=r"give train\.batch_tokens up to 2047"):
        _refuse_large_counts(setup)
    fits = replace(config, train=replace(config.train, batch_tokens=2**11 - 1))
    _refuse_large_counts(replace(setup, config=fits))


def test_a_device_of_a_mesh_needs_memory_for_its_part(demo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that one accelerator cannot hold is refused there, and not on a mesh that holds it."""
    sweep = SweepConfig(kinds=("relu",), features=(2**16,), seeds=(0, 1))
    config = replace(demo_config, sweep=sweep)
    setup = Setup(config, make_groups(sweep_members(sweep)), (Place("", 64),), {})
    monkeypatch.setattr(plan_module.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(plan_module, "memory_of_device", lambda: 200_000_000)
    with pytest.raises(BadInput, match="the sweep would take"):
        plan_module._memory(setup)
    mesh: Any = SimpleNamespace(shape={"data": 2, "member": 2, "feature": 4})
    assert "sweep" in plan_module._memory(replace(setup, mesh=mesh))
