"""All that changes while a run goes on, and its way into a checkpoint and back."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_sae.activations.normalize import Normalization
from jax_sae.activations.places import Place, described, total_width
from jax_sae.activations.position import Position
from jax_sae.autoencoder.shards import MEMBER
from jax_sae.config import Config, Member
from jax_sae.config_tables import config_to_dict
from jax_sae.errors import BadInput
from jax_sae.processes import is_first, together, told
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.digests import from_flat, nested
from jax_sae.run.on_devices import Read, put_together, saved, slices_of
from jax_sae.run.saved_checkpoints import Damaged, Tree
from jax_sae.sweep.groups import Group
from jax_sae.sweep.members import member_names, recorded_member, settings_of, sweep_members
from jax_sae.sweep.optimizer import traced_settings
from jax_sae.sweep.update import (
    METRICS,
    MemberState,
    SweepState,
    member_shapes,
    padded_shape,
    snapshot,
    stack,
    unstack,
)

T = TypeVar("T")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def versions() -> dict[str, str]:
    """The versions of this package and of what decides its results."""
    return {"jax_sae": version("jax_sae"), **{name: version(name) for name in PACKAGES}}


def device(mesh: Mesh | None = None) -> str:
    """What the run is computed on, such as `1 x cpu`; the same bits are promised on the same devices only.

    On a mesh such as `8 x TPU v4, data 2 x member 4`.
    """
    there = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    parts = [] if mesh is None else [f"{name} {n}" for name, n in mesh.shape.items() if n > 1]
    return ", ".join([there, *([" x ".join(parts)] if parts else [])])


@dataclass
class Clock:
    """Where the time of this process goes; a run that is resumed begins a new one."""

    harvest_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Of these what training waited for; where blocks are made ahead, they are made while it goes on."""
    harvest_tokens: int = 0
    train_seconds: float = 0.0
    train_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Setup:
    """What stays the same while a run goes on, and when it is resumed."""

    config: Config
    groups: tuple[Group, ...]
    places: tuple[Place, ...]
    """Whose columns a batch has, side by side; a single one may be nameless."""
    inputs: dict[str, str]
    """Digests of what the batches are made of, as `Source.digests` gives them."""
    mesh: Mesh | None = None
    """On which the sweep lies; None: on one device."""

    @property
    def width(self) -> int:
        """The number of columns of a batch: D, or the sum over the places."""
        return total_width(self.places)

    def reads(self, group: Group) -> tuple[Place, ...]:
        """The places that the members of a group read."""
        return self._placed(group.members[0].reads, group)

    def writes(self, group: Group) -> tuple[Place, ...]:
        """The places that they write."""
        return self._placed(group.members[0].writes, group)

    def _placed(self, names: tuple[str, ...] | None, group: Group) -> tuple[Place, ...]:
        if not names and len(self.places) == 1:
            return self.places
        its = {place.name: place for place in self.places}
        return tuple(its[name] for name in names or (group.members[0].place or "",))

    def shapes(self) -> list[list[MemberState]]:
        """Of each group, shapes and dtypes of its members' states, at their own numbers of features."""
        return [member_shapes(group, self.width, self.config.train) for group in self.groups]

    def columns_of_metrics(self) -> np.ndarray:
        """[M] int: where the members' metrics stand in those that a step gives, in which a mesh may have others."""
        parts = 1 if self.mesh is None else self.mesh.shape[MEMBER]
        filled = [-(-len(group.names) // parts) * parts for group in self.groups]
        firsts = np.cumsum([0, *filled[:-1]])
        columns = [first + np.arange(len(its.names)) for first, its in zip(firsts, self.groups, strict=True)]
        return np.concatenate(columns)

    def names(self) -> list[str]:
        """The members' names, in the groups' order."""
        return [name for group in self.groups for name in group.names]

    def in_order(self) -> list[int]:
        """The members' numbers in `names()`, in the order in which the sweep names them."""
        names = self.names()
        return [names.index(name) for name in member_names(sweep_members(self.config.sweep))]

    def members(self) -> list[Member]:
        """The members, in the groups' order."""
        return [member for group in self.groups for member in group.members]


@dataclass(frozen=True, eq=False)
class Progress:
    """A run after `step` steps. Random numbers have no state: their keys are made of seeds and of the position."""

    step: int
    tokens: int
    position: Position
    read: Position
    """The end of the block in use, which counts all stories that were read so far."""
    state: SweepState
    metrics: np.ndarray
    """[steps of the run, members, METRICS] float32, of every step so far, members in the groups' order.

    Of a member that diverged, NaN from the step on that was not taken; that is the only record of it.
    """
    normalization: Normalization

    @property
    def losses(self) -> np.ndarray:
        """[steps of the run, members] float32: loss per element."""
        return self.metrics[..., METRICS.index("loss_per_element")]

    def diverged_at(self) -> list[int | None]:
        """Of each member, the step at which its loss or its gradient was not finite; None if it never was."""
        bad = ~np.isfinite(self.losses[: self.step])
        return [int(column.argmax()) + 1 if column.any() else None for column in bad.T]


def save(checkpoints: Checkpoints, progress: Progress, setup: Setup) -> None:
    """Begin to write a checkpoint; several processes do so together, and each writes what lies on its devices.

    Raises:
        RunFailed: if the save before it has failed.
    """
    copied = replace(progress, state=snapshot(progress.state))
    members = whole_members if setup.mesh is None else members_in_slices
    checkpoints.save(progress.step, lambda: content(copied, setup, members))


def whole_members(progress: Progress, setup: Setup) -> list[Tree]:
    """What a checkpoint holds of each member's state, in NumPy."""
    states = jax.tree.map(np.asarray, progress.state)
    each = zip(states, setup.shapes(), strict=True)
    return [saved(member) for stacked, like in each for member in unstack(stacked, like)]


def members_in_slices(progress: Progress, setup: Setup) -> list[Tree]:
    """The same on a mesh, in slices as they lie on its devices; here are those that this process writes."""
    each = zip(progress.state, setup.shapes(), strict=True)
    return [nested(member) for stacked, like in each for member in slices_of(stacked, like)]


def content(
    progress: Progress, setup: Setup, members_of: Callable[[Progress, Setup], list[Tree]] = whole_members
) -> tuple[Tree, Tree]:
    """What a checkpoint holds: arrays, each member at its own number of features under its name; and the JSON."""
    members: Tree = {}
    for i, (name, its) in enumerate(zip(setup.names(), members_of(progress, setup), strict=True)):
        metrics = progress.metrics[: progress.step, i]
        members[name] = {**its, "metrics": {metric: metrics[:, j] for j, metric in enumerate(METRICS)}}
    normalization = {name: np.asarray(value) for name, value in progress.normalization._asdict().items()}
    diverged = zip(setup.names(), progress.diverged_at(), strict=True)
    run = {
        "step": progress.step,
        "tokens": progress.tokens,
        "position": asdict(progress.position),
        "read": asdict(progress.read),
        "config": config_to_dict(setup.config),
        "members": {name: settings_of(m) for name, m in zip(setup.names(), setup.members(), strict=True)},
        "places": [asdict(place) for place in setup.places],
        "diverged_at_step": {name: step for name, step in diverged if step is not None},
        "inputs": setup.inputs,
        "device": device(setup.mesh),
        "versions": versions(),
    }
    return {"members": members, "normalization": normalization}, run


def members_begun_with(out: Path, members: Sequence[Member]) -> tuple[tuple[Member, ...], list[str]]:
    """The members of the run in `out` as they began, in the order of `members`: defaults may have changed since.

    Returns:
        They, `members` themselves if no checkpoint can be read; and a line that says which settings differ.

    Raises:
        BadInput: if the run has other members.
    """
    if not (out / "checkpoints").is_dir():
        return tuple(members), []
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        for step in reversed(checkpoints.steps()):
            try:
                run = checkpoints.read_run(step)
                break
            except Damaged:  # `restore` says so
                continue
        else:
            return tuple(members), []
    names = member_names(members)
    if set(names) != set(run["members"]):
        has, makes = ", ".join(run["members"]), ", ".join(names)
        raise BadInput(f"{out} has the members {has}, but its settings now make {makes}; resume with the run's own")
    begun = tuple(recorded_member(run["members"][name]) for name in names)
    changes = {
        f"{name} {after} -> {before}"
        for old, new in zip(begun, members, strict=True)
        for (name, before), after in zip(asdict(old).items(), asdict(new).values(), strict=True)
        if before != after
    }
    if not changes:
        return begun, []
    version = run["versions"]["jax_sae"]
    return begun, [f"note          it keeps the defaults of version {version}: {', '.join(sorted(changes))}"]


def restore(setup: Setup, out: Path) -> tuple[Progress | None, list[str]]:
    """Read the newest good checkpoint of the run in `out`; damaged ones after it are renamed.

    On a mesh each process reads what its devices need. A checkpoint is good if it is so for all of them.

    Returns:
        The progress, None if the run did not come to its first checkpoint; and lines that say what was found amiss.

    Raises:
        BadInput: if all checkpoints are damaged, the good one is beyond the last step of the run, or the inputs are not
            those that the run began with.
    """
    if not told((out / "checkpoints").is_dir())[0]:
        return None, []
    damaged: list[tuple[int, str]] = []
    with together():
        opened = Checkpoints(out / "checkpoints", read_only=True)
    with opened as checkpoints:
        for step in reversed(told(checkpoints.steps())[0]):
            try:
                run, tree = _for_all(lambda: _read(checkpoints, step, setup))  # noqa: B023
                with together():
                    if is_first():
                        _check(setup, out, run, tree)
                progress = _for_all(lambda: _made_of(run, tree, setup, partial(checkpoints.read_slices, step)))  # noqa: B023
                break
            except Damaged as error:
                damaged.append((step, str(error)))
        else:
            with together():
                if damaged and is_first():
                    raise BadInput(f"{out} has no checkpoint that is whole: {damaged[0][1]}; start a new run")
            return None, []
        lines = []
        with together():
            for bad, what in damaged if is_first() else ():
                put_aside = checkpoints.set_aside(bad).name
                lines.append(f"warning       {what}; going on from step {step}; it is now {put_aside}")
    now = {"device": device(setup.mesh), **versions()}
    before = {"device": run["device"], **run["versions"]}
    changes = [f"{name} {before.get(name)} -> {now[name]}" for name in now if now[name] != before.get(name)]
    if changes:
        lines.append(f"note          not the same bits as an uninterrupted run are promised: {', '.join(changes)}")
    return progress, lines


def _for_all(read: Callable[[], T]) -> T:
    """What `read` gives, in each process.

    Raises:
        Damaged: in all of them, if it is raised in one.
    """
    found: T | None = None
    problem = None
    with together():
        try:
            found = read()
        except Damaged as error:
            problem = str(error), error.what
    for of_process in told(problem):
        if of_process:
            raise Damaged(*of_process)
    return cast(T, found)


def _read(checkpoints: Checkpoints, step: int, setup: Setup) -> tuple[Tree, Tree]:
    """The JSON and the arrays of a checkpoint; on a mesh without those of which a process reads a part.

    Raises:
        Damaged: if something is not what was saved.
    """

    def small(tree: Tree) -> Tree:
        members = tree["members"].items()
        return {**tree, "members": {n: {"metrics": its["metrics"]} if "metrics" in its else its for n, its in members}}

    run = checkpoints.read_run(step)
    return run, checkpoints.read_state(step, small) if setup.mesh else checkpoints.read_state(step)


def _made_of(run: Tree, tree: Tree, setup: Setup, read: Read) -> Progress:
    """The progress in a checkpoint.

    Args:
        run: its JSON.
        tree: its arrays, as `_read` gives them.
        setup: where it is put, and of what members.
        read: reads slices of the other arrays.

    Raises:
        Damaged: if what is read is not what was saved.
    """
    step = run["step"]
    metrics = np.zeros((setup.config.train.steps, len(tree["members"]), len(METRICS)), np.float32)
    state: list[MemberState] = []
    column = 0
    for group, shapes in zip(setup.groups, setup.shapes(), strict=True):
        members = []
        for name, shape, member in zip(group.names, shapes, group.members, strict=True):
            its = tree["members"][name]
            metrics[:step, column] = np.stack([its["metrics"][metric] for metric in METRICS], -1)
            diverged = jnp.bool(not np.isfinite(metrics[:step, column]).all())
            known = shape._replace(settings=traced_settings(member, setup.config.train), diverged=diverged)
            if setup.mesh is None:
                optimizer = from_flat(shape.opt_state, its["optimizer"])
                known = known._replace(params=its["params"], opt_state=optimizer, memory=its.get("memory", {}))
            members.append(known)
            column += 1
        if setup.mesh is None:
            state.append(jax.device_put(stack(members, padded_shape(shapes))))
        else:
            state.append(put_together(read, group.names, members, shapes, setup.mesh))
    normalization = Normalization(**tree["normalization"])
    position, read_to = Position(**run["position"]), Position(**run["read"])
    return Progress(step, run["tokens"], position, read_to, tuple(state), metrics, normalization)


def _check(setup: Setup, out: Path, run: Tree, tree: Tree) -> None:
    """Raise BadInput if the run cannot go on with this setup."""
    if "imported" in run:
        raise BadInput(
            f"{out} holds a dictionary that was imported, without the state of an optimiser; it cannot be trained on"
        )
    if any("metrics" not in member for member in tree["members"].values()):
        raise BadInput(
            f"{out} is a run of jax_sae {run['versions']['jax_sae']}, whose checkpoints lack what a resume needs now; "
            "its members can be used and evaluated; go on with that version, or start a new run"
        )
    width, steps = tree["normalization"]["mean"].shape[-1], setup.config.train.steps
    before = tuple(Place(**place) for place in run.get("places", ()))
    is_named = all(place.name for place in (*before, *setup.places))
    if before and before != setup.places and (is_named or len(before) > 1 or len(setup.places) > 1):
        raise BadInput(
            f"{out} was trained at {described(before)}, but the activations now have {described(setup.places)}; "
            "resume with the run's own"
        )
    if width != setup.width:
        raise BadInput(
            f"{out} has autoencoders of width {width}, but the activations now have width {setup.width}; "
            "resume with the run's own"
        )
    if run["step"] > steps:
        raise BadInput(f"{out} is at step {run['step']}, beyond train.steps {steps}; give more steps, or none")
    changed = [name for name in setup.inputs if setup.inputs[name] != run["inputs"].get(name)]
    for which in ("", "held-out "):
        if f"{which}text" in changed and f"{which}tokenizer" in changed:
            changed.remove(f"{which}tokenizer")  # it is known by what it makes of the text
    if changed:
        raise BadInput(
            f"{out} began with another {' and '.join(changed)}: the sha256 of what is read now differs from the one in "
            "its checkpoint; a file was changed or damaged, or a path names something else. Resume with the run's own"
        )
