"""All that changes while a run goes on, and its way into a checkpoint and back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

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
from jax_sae.processes import several, whole
from jax_sae.run.checkpoints import Checkpoints, Damaged, Tree
from jax_sae.run.digests import from_flat, to_flat
from jax_sae.sweep.groups import Group
from jax_sae.sweep.members import member_names, recorded_member, settings_of
from jax_sae.sweep.mesh import spread
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

    def put(self, state: SweepState) -> SweepState:
        """The state of a sweep, put where it is trained."""
        return jax.device_put(state) if self.mesh is None else spread(state, self.mesh)

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


def save(checkpoints: Checkpoints | None, progress: Progress, setup: Setup) -> None:
    """Begin to write a checkpoint; of several processes each sends its part, and the one with `checkpoints` writes.

    Raises:
        RunFailed: if the save before it has failed.
    """
    copied = replace(progress, state=whole(progress.state) if several() else snapshot(progress.state))
    if checkpoints:
        checkpoints.save(progress.step, lambda: content(copied, setup))


def content(progress: Progress, setup: Setup) -> tuple[Tree, Tree]:
    """What a checkpoint holds: arrays, each member at its own number of features under its name; and the JSON."""
    members: Tree = {}
    for group, stacked, like in zip(
        setup.groups, jax.tree.map(np.asarray, progress.state), setup.shapes(), strict=True
    ):
        for name, member in zip(group.names, unstack(stacked, like), strict=True):
            metrics = progress.metrics[: progress.step, len(members)]
            members[name] = {
                "params": member.params,
                "optimizer": to_flat(member.opt_state),
                "metrics": {metric: metrics[:, i] for i, metric in enumerate(METRICS)},
                **({"memory": member.memory} if member.memory else {}),
            }
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

    Returns:
        The progress, None if the run did not come to its first checkpoint; and lines that say what was found amiss.

    Raises:
        BadInput: if all checkpoints are damaged, the good one is beyond the last step of the run, or the inputs are not
            those that the run began with.
    """
    damaged: list[tuple[int, str]] = []
    with Checkpoints(out / "checkpoints") as checkpoints:
        for step in reversed(checkpoints.steps()):
            try:
                run, tree = checkpoints.read_run(step), checkpoints.read_state(step)
                break
            except Damaged as error:
                damaged.append((step, str(error)))
        else:
            if damaged:
                raise BadInput(f"{out} has no checkpoint that is whole: {damaged[0][1]}; start a new run")
            return None, []
        _check(setup, out, run, tree)
        lines = [
            f"warning       {what}; going on from step {step}; it is now {checkpoints.set_aside(bad).name}"
            for bad, what in damaged
        ]
    now = {"device": device(setup.mesh), **versions()}
    before = {"device": run["device"], **run["versions"]}
    changes = [f"{name} {before.get(name)} -> {now[name]}" for name in now if now[name] != before.get(name)]
    if changes:
        lines.append(f"note          not the same bits as an uninterrupted run are promised: {', '.join(changes)}")
    metrics = np.zeros((setup.config.train.steps, len(tree["members"]), len(METRICS)), np.float32)
    state, column = [], 0
    for group, shapes in zip(setup.groups, setup.shapes(), strict=True):
        members = []
        for name, shape, member in zip(group.names, shapes, group.members, strict=True):
            saved = tree["members"][name]
            metrics[:step, column] = np.stack([saved["metrics"][metric] for metric in METRICS], -1)
            members.append(
                shape._replace(
                    params=saved["params"],
                    opt_state=from_flat(shape.opt_state, saved["optimizer"]),
                    settings=traced_settings(member, setup.config.train),
                    memory=saved.get("memory", {}),
                    diverged=jnp.bool(not np.isfinite(metrics[:step, column]).all()),
                )
            )
            column += 1
        state.append(stack(members, padded_shape(shapes)))
    normalization = Normalization(**tree["normalization"])
    position, read = Position(**run["position"]), Position(**run["read"])
    return Progress(step, run["tokens"], position, read, setup.put(tuple(state)), metrics, normalization), lines


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
