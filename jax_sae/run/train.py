"""A run from its beginning, or from its newest checkpoint, to its end: the training loop."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_sae.activations.batches import batch_runs_in_pieces, first_activations
from jax_sae.activations.interruptible import Interruptible, Stopped
from jax_sae.activations.normalize import estimate_dataset, for_story, identity, normalize, of_each_place
from jax_sae.activations.norms import norm_lines, norm_statistics
from jax_sae.activations.places import columns, total_width
from jax_sae.activations.position import Position
from jax_sae.activations.sources import (
    Source,
    Sources,
    excluded_first_tokens,
    open_sources,
    refuse_large_batch,
    with_known_places,
)
from jax_sae.autoencoder.centres import geometric_median
from jax_sae.config import IN_MEMORY, Config, DecoderBias, TrainConfig, places_of
from jax_sae.config_tables import flatten
from jax_sae.errors import BadInput, SourceLost
from jax_sae.language_model.devices import LAUNCHING, mesh_of_rows
from jax_sae.language_model.harvest import stays_on_device
from jax_sae.language_model.hub import read_json
from jax_sae.processes import (
    EndedElsewhere,
    agree,
    any_of,
    first_says,
    is_first,
    others_are_there,
    refuse_separate_disks,
    several,
    together,
)
from jax_sae.run import report
from jax_sae.run.ahead import Ahead
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.held_out import harvest_held_out
from jax_sae.run.layout import choose_mesh, share_models
from jax_sae.run.live import Live
from jax_sae.run.lock import locked
from jax_sae.run.loggers import Loggers, refuse_missing
from jax_sae.run.plan import block_bytes, is_checkpoint, plan, sweep_bytes
from jax_sae.run.progress import Clock, Progress, Setup, members_begun_with, restore, save, versions
from jax_sae.streams import say
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members, with_features
from jax_sae.sweep.mesh import batches_on
from jax_sae.sweep.update import METRICS, Centres, init_sweep, snapshot, update_many

NORMALIZATION_TOKENS = 16_384
"""Tokens from which norms and the `dataset` normalisation are estimated: the first ones of the training order."""

SECONDS_A_DISPATCH = 0.5
"""About how long steps are computed before signals, metrics and the progress bar are handled; each time costs a copy of
the state (docs/performance.md)."""


OnStep = Callable[[int, dict[str, dict[str, float | None]]], object]
"""A function that is called with the number of steps done and a line of metrics: by each member's name, reconstruction
loss and penalty per element, L0 and learning rate. If it returns something true, the run stops."""


@dataclass(frozen=True, eq=False)
class Ended:
    """How training ended. As a bool it is True if the run is finished."""

    setup: Setup
    progress: Progress
    """After the last step that was taken."""
    summary: dict[str, Any] | None
    """The contents of `summary.json`; None where the run is not finished."""

    def __bool__(self) -> bool:
        """Whether the run is finished; if not, it was stopped, and goes on when it is resumed."""
        return self.summary is not None


def train(
    config: Config,
    out: Path | None,
    *,
    resume: bool,
    stop_requested: Callable[[int], bool],
    sources: Sources | None = None,
    first_lines: Sequence[str] = (),
    on_step: OnStep | None = None,
    loggers: Sequence[str] = (),
) -> Ended:
    """Train a sweep from its beginning, or from its newest good checkpoint, and leave everything in `out`.

    Args:
        config: the run's settings, validated.
        out: the run's directory; it is made once all inputs are known to be good. None: nothing is written.
        resume: go on from the newest checkpoint.
        stop_requested: is called with the number of steps done, between dispatches and while activations are computed;
            once it returns True, the run is saved and ended.
        sources: instead of what `config` names, such as those that `array_sources` makes of arrays in memory. To resume
            or evaluate the run, give them again: the run remembers their digests.
        first_lines: what is printed before all else, once the inputs are open.
        on_step: is called after every `log_every`-th step and after the last one, so dispatches end there. If it
            raises, the run is saved, and the exception goes on.
        loggers: where its metrics are shown too while it goes on, "tensorboard" or "wandb" (docs/logs.md).

    Raises:
        BadInput: if an input cannot be used.
        RunFailed: if a checkpoint cannot be written, or every member has diverged.
        Stopped: if a stop was requested before training began: there is nothing to save.
    """
    out = Path(os.path.expanduser(out)) if out else None
    refuse_missing(loggers, out)
    asked = {"--out": out, "--resume": resume, **versions(), **flatten(config)}
    agree({name: str(value) for name, value in asked.items()})
    if sources:
        config = replace(config, activations=replace(config.activations, path=IN_MEMORY))
        refuse_large_batch(config, sources[0])
    source, held_out_source, lines = sources or open_sources(config)
    config = replace(config, sweep=with_known_places(config.sweep, source))
    refuse_places(config, source)
    exclude = excluded_first_tokens(source, config.activations.exclude_first_tokens)
    config = replace(
        config,
        activations=replace(config.activations, exclude_first_tokens=exclude),
        sweep=with_features(config.sweep, source.places),
    )
    members, changed = sweep_members(config.sweep), list[str]()
    if resume and out:
        members, changed = members_begun_with(out, members)
    groups = make_groups(members, source.places)
    mesh, of_mesh = choose_mesh(config, groups, total_width(source.places))
    setup = Setup(config, groups, source.places, inputs(source, held_out_source), mesh)
    agree({name: digest[:12] for name, digest in setup.inputs.items()})
    if mesh is not None:
        beside = sweep_bytes(setup) + block_bytes(setup)
        devices = mesh.devices.flatten().tolist() if stays_on_device() else mesh.local_devices
        (source, held_out_source), of_models = share_models((source, held_out_source), devices, beside)
        of_mesh += of_models
    say([*first_lines, *lines, *changed, *report.describe(setup), *of_mesh])
    progress: Progress | None = None
    with ExitStack() as stack:
        if resume and out:
            with together():
                if is_first():
                    stack.enter_context(locked(out))
            refuse_separate_disks(out)
            progress, lines = restore(setup, out)
            say(lines + ([f"resuming      {out} at step {progress.step:,}"] if progress else []))
            if progress and progress.step == config.train.steps and (out / "summary.json").exists():
                say(["it is finished: that is its last step; there is nothing to do"])
                return Ended(setup, progress, read_json(out / "summary.json"))
        with together():
            say(plan(setup, source, out, progress.step if progress else 0))
            interruptible = partial(Interruptible, stop_requested=lambda: not several() and stop_requested(0))
            progress = progress or begin(setup, interruptible(source))
            first_activations(interruptible(held_out_source), 1, None)  # what is wrong with it is said now
            if out and not resume and is_first():
                stack.enter_context(locked(out))
                if (out / "config.json").exists():
                    raise BadInput(f"{out} already holds a run, which began a moment ago; give --out another name")
        if out and not resume:
            refuse_separate_disks(out)
        with together():
            if out and is_first():
                report.write_config(out, config)
        clock = Clock()
        told = stack.enter_context(Loggers(loggers if is_first() else (), out, config))
        progress = advance(progress, setup, source, out, clock, stop_requested, on_step, told)
        go_on = f"; go on with --out {out} --resume" if out else ""
        if progress.step < config.train.steps:
            at = f"{'and saved ' if out else ''}at step {progress.step}" if progress.step else "before the first step"
            say([f"stopped {at}{go_on}"])
            return Ended(setup, progress, None)
        try:
            reading = Interruptible(held_out_source, lambda: not several() and stop_requested(config.train.steps))
            with together():
                held_out = harvest_held_out(reading, progress.normalization, config.activations)
        except Stopped:
            say([f"stopped before the held-out stories were read{go_on}"])
            return Ended(setup, progress, None)
        summary = report.finish(out if is_first() else None, setup, progress, held_out, clock, told)
        return Ended(setup, progress, summary)


def advance(
    progress: Progress,
    setup: Setup,
    source: Source,
    out: Path | None,
    clock: Clock,
    stop_requested: Callable[[int], bool],
    on_step: OnStep | None = None,
    loggers: Loggers = report.NO_LOGGERS,
) -> Progress:
    """Train to the last step or until a stop is requested, with metrics and checkpoints; the progress is saved."""
    train = setup.config.train
    jax.block_until_ready(snapshot(progress.state))  # compiles it, so that the first checkpoint is quick
    with ExitStack() as stack:
        writes = out if is_first() else None
        checkpoints = stack.enter_context(Checkpoints(out / "checkpoints")) if out else None
        log = stack.enter_context(report.Log(writes / "metrics.jsonl" if writes else None, setup, progress, loggers))
        live = Live(setup, writes)
        saved = progress.step

        def save_now() -> None:
            nonlocal saved
            if checkpoints and progress.step > saved:
                save(checkpoints, progress, setup)
                saved = progress.step

        try:
            for progress, tokens in dispatches(progress, source, setup, clock, stop_requested, bool(on_step)):  # noqa: B020
                step = progress.step
                with together():
                    log.write(progress, tokens, clock.train_tokens / clock.train_seconds)
                    if checkpoints:
                        checkpoints.raise_failure()
                    report.refuse_if_all_diverged(progress, setup)
                live.show(progress)
                if is_checkpoint(step, train.checkpoint_every, train.steps):
                    save_now()
                    log.checkpoint(progress, setup)
                if on_step and is_line(step, train) and ask(on_step, log.metrics(progress, step), step, save_now):
                    raise Stopped
                if any_of(stop_requested(step)) and step < train.steps:
                    raise Stopped
        except Stopped:
            save_now()
        except EndedElsewhere as error:
            if error.of_reading:
                save_now()
            raise
        except (BadInput, SourceLost) as error:
            save_now()
            if out and saved:
                raise type(error)(f"{error}; saved at step {saved}: go on with --out {out} --resume") from error
            raise
        live.show(progress, is_last=True)
        if checkpoints:
            checkpoints.finish()
    return progress


def ask(on_step: OnStep, metrics: dict[str, dict[str, float | None]], step: int, save_now: Callable[[], None]) -> bool:
    """Whether `on_step` asks for a stop; the run is saved before what it raises is raised."""
    try:
        return bool(on_step(step, metrics))
    except BaseException:
        save_now()
        raise


def refuse_places(config: Config, source: Source) -> None:
    """Raise BadInput unless the sweep names places that the source has; all of them, where it has several."""
    wanted, there = places_of(config.sweep), [place.name for place in source.places]
    if wanted and there == [""]:
        raise BadInput(
            f"sweep.places names {', '.join(wanted)}, but {source.name} has activations of one place without a name; "
            "leave it out"
        )
    if lacking := [name for name in wanted if name not in there]:
        raise BadInput(f"sweep.places names {', '.join(lacking)}, which {source.name} lacks; it has {', '.join(there)}")
    if not wanted and len(there) > 1:
        raise BadInput(f"{source.name} has the places {', '.join(there)}; name those to train at by sweep.places")
    if wanted and config.activations.normalization == "story":
        for member in sweep_members(with_features(config.sweep, source.places)):
            if member.reads and member.writes:
                raise BadInput(
                    f"activations.normalization is 'story', but a member reads {' '.join(member.reads)} and writes "
                    f"{' '.join(member.writes)}, and a story has another mean and scale at each place; use 'dataset'"
                )
    if len(there) > 1 and config.activations.norm_limit:
        raise BadInput(
            f"activations.norm_limit is {config.activations.norm_limit:g}, but there are {len(there)} places, whose "
            "norms differ and which share their tokens; use activations.exclude_first_tokens, or train at one place"
        )


def is_line(step: int, train: TrainConfig) -> bool:
    """Whether a line of metrics belongs to a step."""
    return step % train.log_every == 0 or step == train.steps


def inputs(source: Source, held_out_source: Source) -> dict[str, str]:
    """Digests of what a run reads; it can be resumed only with the same ones."""
    training, held_out = source.digests(), held_out_source.digests()
    return training | {f"held-out {name}": value for name, value in held_out.items() if value != training[name]}


def begin(setup: Setup, source: Source) -> Progress:
    """The progress of a run at step 0: initial values, and the normalisation; says what norms the activations have."""
    config = setup.config
    shuffle_seed = config.train.seed if config.train.batching == "tokens" else None
    sample = first_activations(source, NORMALIZATION_TOKENS, shuffle_seed, config.activations.norm_limit)
    several = len(setup.places) > 1
    for name, its in columns(setup.places).items():
        at_place = [x[:, slice(*its)] for x in sample] if several else sample
        found = norm_statistics(at_place, config.activations, source.has_stories)
        say(norm_lines(found, name if several else ""))
    kind = config.activations.normalization
    normalization = identity(setup.width)
    if kind == "dataset":
        normalization = of_each_place(estimate_dataset, np.concatenate(sample), setup.places)
    metrics = np.zeros((config.train.steps, len(setup.names()), len(METRICS)), np.float32)
    normalized = [normalize(for_story(kind, normalization, x, setup.places), x) for x in sample]
    centres = find_centres(setup, normalized)
    state = init_sweep(setup.groups, setup.width, config.train, centres, setup.mesh)
    return Progress(0, 0, Position(), Position(), state, metrics, normalization)


def find_centres(setup: Setup, sample: Sequence[np.ndarray]) -> Centres:
    """The centres, by name, at which members of this run begin their b_dec; `sample`: normalised activations [T, D]."""
    wanted = {member.decoder_bias for member in setup.members()}
    centres: dict[DecoderBias, np.ndarray | float] = {"zero": 0.0}
    if "mean" in wanted:
        centres["mean"] = np.concatenate(sample).mean(0, dtype=np.float64).astype(np.float32)
    if "geometric_median" in wanted:
        x = np.concatenate(sample)
        of_each = [geometric_median(np.ascontiguousarray(x[:, slice(*its)])) for its in columns(setup.places).values()]
        centres["geometric_median"] = np.concatenate(of_each).astype(np.float32)
    return centres


def dispatches(
    progress: Progress,
    source: Source,
    setup: Setup,
    clock: Clock,
    stop_requested: Callable[[int], bool],
    at_each_line: bool = False,
) -> Iterator[tuple[Progress, np.ndarray]]:
    """Train to the last step; after each dispatch, yield the progress, and the tokens used after each of its steps.

    A dispatch ends after about SECONDS_A_DISPATCH, at a line of metrics (the next one, with `at_each_line`), or earlier
    at a checkpoint or with the batches of equal shape that are there. Where it ends changes no bit of the results.

    Raises:
        Stopped: if a stop is requested while activations are made.
    """
    seconds_a_step = math.inf  # not known yet: a short one first
    config, forms, mesh = setup.config, tuple(group.form for group in setup.groups), setup.mesh
    its_columns = setup.columns_of_metrics()
    source = Interruptible(source, lambda: not several() and stop_requested(progress.step))
    made = batch_runs_in_pieces(source, progress.normalization, progress.position, config.activations, config.train)
    with Ahead(made, clock) as runs:
        while progress.step < config.train.steps:
            run = runs.take()
            is_last = config.train.steps - progress.step <= len(run.after) - run.used
            if not is_last:
                runs.begin()
            with LAUNCHING:
                x, weights = put_on(mesh, run.x, run.weights)
            first = run.used
            while first < len(run.after) and progress.step < config.train.steps:
                start, waited = time.perf_counter(), clock.waited_seconds
                last = first + min(len(run.after) - first, steps_of_a_dispatch(progress.step, config, seconds_a_step))
                with others_are_there():
                    with LAUNCHING:
                        state, metrics = update_many(
                            progress.state,
                            x,
                            weights,
                            first,
                            last,
                            progress.step,
                            forms=forms,
                            train=config.train,
                            mesh=mesh,
                        )
                    if not is_last:
                        runs.go_on(last / len(run.after), metrics)
                    found = np.asarray(metrics)
                step = progress.step + last - first
                tokens = progress.tokens + np.cumsum(run.weights[first:last].sum(-1, dtype=np.int64))
                clock.train_tokens += int(tokens[-1]) - progress.tokens
                progress.metrics[progress.step : step] = found[first:last, its_columns]
                progress = replace(
                    progress,
                    step=step,
                    tokens=int(tokens[-1]),
                    position=run.after[last - 1],
                    read=run.end,
                    state=state,
                )
                seconds = time.perf_counter() - start - (clock.waited_seconds - waited)
                clock.train_seconds += seconds
                seconds_a_step = math.inf if at_each_line else first_says(seconds / (last - first))
                yield progress, tokens
                first = last
            del run, x  # the next block takes their memory


def put_on(mesh: Mesh | None, x: np.ndarray | jax.Array, weights: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """A block where it is trained on: on a mesh, or on one device, whatever devices made it."""
    if mesh is not None:
        return batches_on(mesh, x, weights)
    is_apart = isinstance(x, jax.Array) and mesh_of_rows(x) is not None
    there = jax.device_put((x, weights), jax.devices()[0] if is_apart else None)
    return there[0], there[1]


def steps_of_a_dispatch(step: int, config: Config, seconds_a_step: float) -> int:
    """Steps up to a line of metrics, as many lines as fit into SECONDS_A_DISPATCH, not past a checkpoint or the end."""
    train = config.train
    lines = max(1, int(SECONDS_A_DISPATCH / (seconds_a_step * train.log_every)))
    return min(
        lines * train.log_every - step % train.log_every,
        train.checkpoint_every - step % train.checkpoint_every,
        train.steps - step,
    )
