"""Train a sweep from a program: what it gives -> settings and sources -> a `Run`."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from jax_sae.activations.array_sources import array_sources, sources_of
from jax_sae.activations.arrays import Rows, SideBySide, StoryArrays
from jax_sae.activations.interruptible import Stopped
from jax_sae.activations.sources import Sources, hold_out
from jax_sae.api.run import Run
from jax_sae.autoencoder.kinds import kind_name
from jax_sae.config import IN_MEMORY, Config, Member, places_of
from jax_sae.config_tables import flatten, full_name, settings_in
from jax_sae.errors import BadInput
from jax_sae.run.directory import choose_directory
from jax_sae.run.settings import CALL, Layer, base, merge, settings_to_resume
from jax_sae.run.train import OnStep
from jax_sae.run.train import train as train_run
from jax_sae.streams import quiet as in_quiet
from jax_sae.streams import say


def train(
    config: str | Path | Config | Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    activations: Any = None,
    mask: Any = None,
    on_step: OnStep | None = None,
    quiet: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
    **settings: Any,
) -> Run:
    """Train every autoencoder of a sweep at once, as `jax-sae train` does.

        run = jax_sae.train(activations=x, kinds=["topk", "batchtopk"], features=4096, k=[16, 32, 64], steps=5000)
        run = jax_sae.train("configs/demo_sparse.toml", out="runs/a")

    Ctrl-C ends it after the steps under way and gives back the run so far; a second one raises `KeyboardInterrupt`.

    Args:
        config: a TOML file or the name of one that comes with the package, its tables as dictionaries, or a `Config`.
            Without one, settings stand over the defaults where activations, a model or a text are given, else over
            `demo` or, where kinds are given, `demo_sparse`.
        out: the run's directory, which may not hold a run yet. None: the run lives in memory and leaves nothing behind;
            its members can be had at its last step only.
        resume: go on from the newest checkpoint in `out`, with the run's own settings; activations in memory have to
            be given again.
        activations: what is read in place of a language model. Rows [N, D]; stories [N, T, D]; a list of stories [T, D]
            or [n, T, D]: NumPy or JAX arrays or torch tensors of any float type. Or the path of a store, file or
            folder. Or a dictionary of arrays of the same tokens at several places, {"4.resid_post": x, "9.mlp_out": y},
            at each of which the sweep is trained; `places` may choose among them. Or a source
            (`jax_sae.activations.sources.Source`), whose end is held out; or a tuple of two, one to train on and one
            that is held out.
        mask: which of [N, T, D] are tokens, [N, T], bool or 0 and 1.
        on_step: is called with the number of steps done and a line of metrics, {member: {"loss_per_element", "l0",
            ...}}, every `log_every` steps and at the end. If it returns something true, the run is stopped and saved.
        quiet: print nothing and show no progress bar; warnings are issued by the module `warnings`.
        tensorboard: show losses, densities and the frontier in TensorBoard too, from files in `out` (docs/logs.md).
        wandb: the same in Weights & Biases, as one run.
        **settings: any setting of `jax-sae train --help` by its last name, such as steps, k, features or layer. Where
            several tables have a setting of that name, it is the sweep's; write the table's name before it for another
            one: model_path, text_path, train_seed. Where the sweep takes a list, one value will do. Kinds may be
            classes.

    Returns:
        The run, finished or stopped.

    Raises:
        BadInput: if something given cannot be used.
        RunFailed: if a checkpoint cannot be written, or every member has diverged.
        KeyboardInterrupt: if Ctrl-C came before the first step could begin.
    """
    given = _settings_given(settings)
    if isinstance(activations, str | Path):
        given, activations = given | {"activations.path": str(activations)}, None
    elif activations is not None:
        given["activations.path"] = IN_MEMORY
        given |= {} if resume and config is None else _places_of(activations, given)
    if isinstance(mask, str | Path) and activations is None:
        given, mask = given | {"activations.mask": str(mask)}, None
    if mask is not None and (isinstance(mask, str | Path) or activations is None):
        raise BadInput(
            "mask is a name, but activations are in memory, or the other way round: give an array with arrays, and the "
            "name of an array or a file with a path"
        )
    if config is None or isinstance(config, str | Path):
        _, lower = base(None if config is None else Path(config), given)
    else:
        said = flatten(config) if isinstance(config, Config) else settings_in(_with_names(config), "the config")
        lower = Layer("the config", said)
    directory = None if out is None else choose_directory(Path(os.path.expanduser(out)), resume, "")
    if resume and directory is None:
        raise BadInput("resume is true, but there is no out: give the directory of the run that is to go on")
    if resume and directory:
        merged = settings_to_resume(directory, None if config is None else lower, given, CALL)
    else:
        merged = merge(lower, given, CALL)
    if isinstance(activations, Mapping) and (wanted := places_of(merged.config.sweep)):
        if lacking := [name for name in wanted if name not in activations]:
            raise BadInput(
                f"sweep.places names {', '.join(lacking)}, but the activations given are of {', '.join(activations)}"
            )
        activations = {name: activations[name] for name in wanted}
    sources = None if activations is None else _sources(merged.config, activations, mask)
    with in_quiet(quiet), _first_interrupt() as stop_requested:
        try:
            ended = train_run(
                merged.config,
                directory,
                resume=resume,
                stop_requested=stop_requested,
                sources=sources,
                first_lines=merged.lines,
                on_step=on_step,
                loggers=["tensorboard"] * tensorboard + ["wandb"] * wandb,
            )
        except Stopped as error:
            raise KeyboardInterrupt("stopped before training began") from error
    return Run(directory, ended.setup.config, sources, ended)


def _places_of(activations: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The setting for all places of what is given, where it has several and the call does not choose among them."""
    if isinstance(activations, Mapping):
        names = [str(name) for name in activations]
    elif isinstance(activations, SideBySide):
        names = [place.name for place in activations.places]
    else:
        return {}
    chosen = not {"sweep.places", "sweep.layers", "sweep.members"}.isdisjoint(given)
    return {} if chosen or len(names) < 2 else {"sweep.places": tuple(names)}


def _settings_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments -> settings by their dotted names, checked."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, setting = full_name(name).partition(".")
        tables.setdefault(group, {})[setting] = value
    return settings_in(_with_names(tables), CALL)


def _with_names(value: Any) -> Any:
    """The same with the name of each kind that is given as a class."""
    if isinstance(value, Mapping):
        return {name: _with_names(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_names(part) for part in value]
    if isinstance(value, Member):
        return _with_names({name: part for name, part in asdict(value).items() if part is not None})
    return kind_name(value) if isinstance(value, type) else value


def _sources(config: Config, activations: Any, mask: Any) -> Sources:
    """What a program gave -> the source to train on, the held-out one, and lines that say what they are."""
    given = activations if isinstance(activations, tuple) else (activations,)
    if isinstance(activations, Rows | StoryArrays | SideBySide) and mask is None:
        return sources_of(config, activations, [])
    if not all(hasattr(each, "count_tokens") and hasattr(each, "digests") for each in given):
        return array_sources(config, activations, mask)
    if mask is not None:
        raise BadInput("mask is given with a source, which itself says what its tokens are; leave it out")
    if len(given) == 1:
        return hold_out(given[0], config)
    if len(given) == 2:
        return given[0], given[1], [f"activations   {given[0].name}", f"held out      {given[1].name}"]
    raise BadInput(
        f"activations are {len(given)} sources; one, or one to train on and one that is held out, is expected"
    )


@contextmanager
def _first_interrupt() -> Iterator[Callable[[int], bool]]:
    """Within it the first Ctrl-C is only remembered: what is yielded returns True from then on. The second one raises.

    Python lets only the main thread listen to signals; in another one nothing changes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)
        say(["stopping: the steps under way are finished first; once more to break off"])

    listens = callable(before)  # it may be ignored, or another program's
    if listens:
        signal.signal(signal.SIGINT, remember)
    try:
        yield lambda step: bool(received)
    finally:
        if listens:
            signal.signal(signal.SIGINT, before)
