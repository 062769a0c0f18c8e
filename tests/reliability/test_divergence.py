"""One bad member does not spoil a sweep: it is frozen and named, and no bit of the others changes."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import outcome
from running import initial, never, stop_at

import jax_sae
from jax_sae.activations.places import Place
from jax_sae.config import Config, Member, TrainConfig
from jax_sae.errors import RunFailed
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.progress import Setup, restore
from jax_sae.run.train import train
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete, sweep_members
from jax_sae.sweep.update import update_member

HARMLESS, BAD = 2e-3, 1e20


def sweep(config: Config, learning_rate: float) -> Config:
    """Two groups; in one of them, between two others of its width, a member with this learning rate."""
    members = (
        Member(8),
        Member(63, 0, 1e-3),
        Member(64, 1, learning_rate),
        Member(64, 2, 3e-3),
        Member(64, 0, 1e-3),
    )
    return replace(
        config,
        sweep=replace(config.sweep, members=members),
        train=replace(config.train, steps=20, warmup=0.5, log_every=1),
    )


def names(config: Config, run: Path) -> list[str]:
    """The members in the order of the sweep."""
    return [member["name"] for member in json.loads((run / "summary.json").read_text())["members"]]


def state(run: Path, step: int) -> Any:
    """The arrays of a checkpoint by member."""
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.read_state(step)["members"]


@pytest.fixture(scope="module")
def runs(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The sweep with a harmless learning rate in its third member, and with one that diverges; what this one prints."""
    harmless, bad = (tmp_path_factory.mktemp(name) / "run" for name in ("harmless", "bad"))
    assert train(sweep(demo_config, HARMLESS), harmless, resume=False, stop_requested=never)
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        assert train(sweep(demo_config, BAD), bad, resume=False, stop_requested=never)
    return harmless, bad, printed.getvalue()


def test_the_others_are_bit_identical(runs: tuple[Path, Path, str], demo_config: Config) -> None:
    """Parameters, moments and losses of all members but the bad one, whatever its group."""
    harmless, bad = (state(run, 20) for run in runs[:2])
    before, after = (names(demo_config, run) for run in runs[:2])
    pairs = list(zip(before, after, strict=True))
    assert pairs[2][0] != pairs[2][1]
    for one, other in pairs[:2] + pairs[3:]:
        for part in ("params", "optimizer"):
            for name, array in harmless[one][part].items():
                assert array.tobytes() == bad[other][part][name].tobytes(), (one, part, name)
        assert all(
            harmless[one]["metrics"][name].tobytes() == array.tobytes() for name, array in bad[other]["metrics"].items()
        )


@pytest.mark.long
def test_it_keeps_its_last_finite_state_and_says_so(
    runs: tuple[Path, Path, str], demo_config: Config, tmp_path: Path
) -> None:
    """Frozen at a step, in every array finite, and the state is that of a run that ended before that step."""
    _, bad, printed = runs
    summary = json.loads((bad / "summary.json").read_text())["members"]
    step = summary[2]["diverged_at_step"]
    assert step is not None and summary[2]["steps"] == step - 1 and summary[2]["loss_per_element"] is None
    assert [member["diverged_at_step"] for member in summary] == [None, None, step, None, None]
    name = summary[2]["name"]
    frozen = state(bad, 20)[name]
    assert np.isfinite(frozen["metrics"]["loss_per_element"][: step - 1]).all()
    assert np.isnan(frozen["metrics"]["loss_per_element"][step - 1 :]).all()
    config = sweep(demo_config, BAD)
    config = replace(config, train=replace(config.train, checkpoint_every=1))
    assert not train(config, tmp_path / "run", resume=False, stop_requested=stop_at(step + 1))
    before, at = (state(tmp_path / "run", each)[name] for each in (step - 1, step))
    for part in ("params", "optimizer"):
        for each, array in frozen[part].items():
            assert np.isfinite(array).all()
            assert array.tobytes() == before[part][each].tobytes() == at[part][each].tobytes()
    assert f"{name} diverged at step {step} (features 64, seed 1, learning rate 1e+20)" in printed
    lines = [json.loads(line)["members"][name] for line in (bad / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss_per_element"] is None for line in lines] == [n >= step for n in range(1, 21)]


@pytest.mark.long
def test_a_resumed_run_keeps_it_frozen(runs: tuple[Path, Path, str], demo_config: Config, tmp_path: Path) -> None:
    """Also when it is resumed after the step at which the member diverged; bit for bit."""
    config = sweep(demo_config, BAD)
    assert not train(config, tmp_path / "run", resume=False, stop_requested=stop_at(13))
    setup = Setup(config, make_groups(sweep_members(config.sweep)), (Place("", 64),), {})
    progress, _ = restore(setup, tmp_path / "run")
    assert progress is not None
    frozen = [bool(flag) for group in progress.state for flag in group.diverged]
    assert frozen == [at is not None for at in progress.diverged_at()] and sum(frozen) == 1
    assert train(config, tmp_path / "run", resume=True, stop_requested=never)
    assert outcome(tmp_path / "run") == outcome(runs[1])


def test_the_table_and_the_use_of_it_say_so(runs: tuple[Path, Path, str], demo_config: Config) -> None:
    """The closing table; loading it warns; loading another one does not; the hint names one that is good."""
    _, run, printed = runs
    bad = names(demo_config, run)[2]
    (row,) = [line for line in printed.splitlines() if line.startswith(bad) and "features 64, seed" not in line]
    assert "diverged at step " in row
    assert bad not in next(line for line in printed.splitlines() if line.startswith("use it"))
    with pytest.warns(UserWarning, match="diverged at step"):
        jax_sae.load_autoencoder(run, name=bad)
    jax_sae.load_autoencoder(run, features=63)


@pytest.mark.long
def test_the_largest_learning_rates_leave_finite_states(demo_config: Config, tmp_path: Path) -> None:
    """However large the step that was taken last, what is saved is finite."""
    config = sweep(demo_config, 3.4e38)
    members = tuple(
        replace(member, learning_rate=rate)
        for member, rate in zip(config.sweep.members[1:4], (1e-3, 3.4e38, 1e30), strict=True)
    )
    config = replace(config, sweep=replace(config.sweep, members=members), train=replace(config.train, warmup=0.0))
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    for member in state(tmp_path / "run", 20).values():
        for part in ("params", "optimizer"):
            assert all(np.isfinite(array).all() for array in member[part].values())


def test_when_every_member_has_diverged_the_run_ends(demo_config: Config, tmp_path: Path) -> None:
    """There is nothing left to train; each is named, with its step and its settings."""
    config = replace(
        demo_config,
        sweep=replace(demo_config.sweep, features=(8, 64), learning_rates=(1e25,)),
        train=replace(demo_config.train, steps=200, log_every=1, warmup=0.0),
    )
    with pytest.raises(RunFailed, match=r"every member has diverged: F8 at step \d \(features 8, seed 0, learn.*; F64"):
        train(config, tmp_path / "run", resume=False, stop_requested=never)


@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk"])
def test_a_member_stays_frozen_when_later_batches_are_harmless(kind: str) -> None:
    """One batch too large, then ordinary ones: nothing moves any more, and every loss from there on is NaN.

    Where the loss overflows, and where the squared gradient does. Neither
    parameters and moments nor thresholds and counters of dead features.
    """
    train_config = TrainConfig(batch_tokens=16)
    member = complete(Member(64, 0, 1e-3, kind, k=None if kind == "relu" else 1))
    before = initial(member, 4, train_config)
    step = jax.jit(partial(update_member, form=make_groups((member,))[0].form, train=train_config))
    x, weights = jax.random.normal(jax.random.key(0), (16, 4)), jnp.ones(16)
    state, metrics = step(before, x, weights, 0, False)
    assert np.isfinite(metrics).all() and not state.diverged
    kept_state = jax.tree.map(np.array, state)
    for size in (1e25, 1e12):
        frozen, metrics = step(state, size * x, weights, 1, False)
        assert np.isnan(metrics).all() and frozen.diverged
        for _ in range(3):
            frozen, metrics = step(frozen, x, weights, 2, False)
            assert np.isnan(metrics).all() and frozen.diverged
        for kept, now in zip(jax.tree.leaves(kept_state[:4]), jax.tree.leaves(frozen[:4]), strict=True):
            assert np.asarray(kept).tobytes() == np.asarray(now).tobytes()
