"""The training loop."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jax_sae.activations.batches import Position, batch_runs, first_activations
from jax_sae.activations.normalize import estimate_dataset, identity
from jax_sae.activations.sources import Source, open_sources
from jax_sae.config import Config, sweep_members
from jax_sae.sweep import report
from jax_sae.sweep.checkpoints import Checkpoints
from jax_sae.sweep.held_out import harvest_held_out
from jax_sae.sweep.members import Group, make_groups
from jax_sae.sweep.progress import Clock, Progress, restore, save
from jax_sae.sweep.update import init_sweep, update_many

NORMALIZATION_TOKENS = 16_384
"""Tokens from which the `dataset` normalisation is estimated: the first ones of the training order."""


def train(config: Config, out: Path, *, resume: bool, stop_requested: Callable[[], bool]) -> bool:
    """Train a sweep from its beginning, or from its newest checkpoint, and leave everything in `out`.

    Args:
        config: the run's settings, validated.
        out: the run's directory; it is made once all inputs are known to be good.
        resume: go on from the newest checkpoint.
        stop_requested: is asked between dispatches; once it is true, the run is saved and ended.

    Returns:
        Whether the run is finished; False if it was stopped before its last step.

    Raises:
        BadInput: if an input cannot be used.
    """
    source, held_out_source, lines = open_sources(config)
    groups = make_groups(sweep_members(config.sweep))
    report.say(lines + report.describe(config, groups, source.width))
    progress = restore(config, groups, source.width, out) if resume else None
    if progress is not None:
        report.say([f"resuming      {out} at step {progress.step:,}"])
        if progress.step == config.train.steps and (out / "summary.json").exists():
            report.say(["it is finished: that is its last step; there is nothing to do"])
            return True
    progress = progress or begin(config, groups, source)
    held_out = harvest_held_out(held_out_source, progress.normalization, config.activations)
    report.write_config(out, config)
    clock = Clock()
    stopped = False
    with (
        Checkpoints(out / "checkpoints") as checkpoints,
        report.Log(out / "metrics.jsonl", config, groups, progress.step) as log,
    ):
        for progress in dispatches(progress, source, config, clock):  # noqa: B020 - it goes on from there
            log.write(progress, clock.train_tokens / clock.train_seconds)
            stopped = stop_requested() and progress.step < config.train.steps
            if stopped or progress.step == config.train.steps or progress.step % config.train.checkpoint_every == 0:
                save(checkpoints, progress, config, groups, source.width)
            if stopped:
                break
    if stopped:
        report.say([f"stopped and saved at step {progress.step}; go on with --out {out} --resume"])
        return False
    report.finish(out, config, groups, progress, held_out, clock)
    return True


def begin(config: Config, groups: tuple[Group, ...], source: Source) -> Progress:
    """The progress of a run at step 0: initial values, and the normalisation."""
    kind = config.activations.normalization
    normalization = identity(source.width)
    if kind == "dataset":
        shuffle_seed = config.train.seed if config.train.batching == "tokens" else None
        sample = first_activations(source, NORMALIZATION_TOKENS, shuffle_seed)
        normalization = estimate_dataset(np.concatenate(sample))
    losses = np.zeros((config.train.steps, sum(len(group.names) for group in groups)), np.float32)
    state = init_sweep(groups, source.width, config.sweep, config.train)
    return Progress(0, 0, Position(), state, losses, normalization)


def dispatches(progress: Progress, source: Source, config: Config, clock: Clock) -> Iterator[Progress]:
    """Train to the last step, and yield the progress after each dispatch.

    A dispatch ends at every log line, at every checkpoint, and with the batches of equal shape that are there.
    """
    runs = batch_runs(source, progress.normalization, progress.position, config.activations, config.train)
    while progress.step < config.train.steps:
        start = time.perf_counter()
        run = next(runs)
        x, weights = jax.device_put((run.x, run.weights))
        clock.harvest_seconds += time.perf_counter() - start
        clock.harvest_tokens += int(run.weights.sum())
        first = run.used
        while first < len(run.x) and progress.step < config.train.steps:
            start = time.perf_counter()
            last = first + min(len(run.x) - first, steps_to_next_event(progress.step, config))
            state, losses = update_many(progress.state, x, weights, first, last, train=config.train)
            step, tokens = progress.step + last - first, int(run.weights[first:last].sum())
            progress.losses[progress.step : step] = losses[first:last]
            progress = replace(
                progress, step=step, tokens=progress.tokens + tokens, position=run.after[last - 1], state=state
            )
            clock.train_seconds += time.perf_counter() - start
            clock.train_tokens += tokens
            yield progress
            first = last


def steps_to_next_event(step: int, config: Config) -> int:
    """Steps until there is something to write: a log line, a checkpoint, or the end."""
    train = config.train
    return min(
        train.log_every - step % train.log_every,
        train.checkpoint_every - step % train.checkpoint_every,
        train.steps - step,
    )
