"""All that changes while a run goes on, and its way into a checkpoint and back."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.activations.batches import Position
from jax_sae.activations.normalize import Normalization
from jax_sae.config import Config, config_to_dict
from jax_sae.errors import BadInput
from jax_sae.sweep.checkpoints import Checkpoints, Tree, from_flat, to_flat
from jax_sae.sweep.members import Group
from jax_sae.sweep.update import SweepState, member_shapes, padded_shape, stack, unstack

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def versions() -> dict[str, str]:
    """The versions of this package and of what decides its results."""
    return {"jax_sae": version("jax_sae"), **{name: version(name) for name in PACKAGES}}


@dataclass
class Clock:
    """Where the time of this process goes; a run that is resumed begins a new one."""

    harvest_seconds: float = 0.0
    harvest_tokens: int = 0
    train_seconds: float = 0.0
    train_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Progress:
    """A run after `step` steps. Random numbers have no state: their keys are made of seeds and of the position."""

    step: int
    tokens: int
    position: Position
    state: SweepState
    losses: np.ndarray
    """[steps of the run, members] float32: loss per element of every step so far, members in the groups' order."""
    normalization: Normalization


def save(checkpoints: Checkpoints, progress: Progress, config: Config, groups: tuple[Group, ...], width: int) -> None:
    """Begin to write a checkpoint: each member at its own number of features, under its name."""
    members: Tree = {}
    for group, stacked in zip(groups, progress.state, strict=True):
        shapes = member_shapes(group, width, config.sweep, config.train)
        for name, member in zip(group.names, unstack(stacked, shapes), strict=True):
            losses = progress.losses[: progress.step, len(members)].copy()
            members[name] = {"params": member.params, "optimizer": to_flat(member.opt_state), "losses": losses}
    normalization = {name: np.asarray(value) for name, value in progress.normalization._asdict().items()}
    run = {
        "step": progress.step,
        "tokens": progress.tokens,
        "position": asdict(progress.position),
        "config": config_to_dict(config),
        "members": {n: asdict(m) for group in groups for n, m in zip(group.names, group.members, strict=True)},
        "versions": versions(),
    }
    checkpoints.save(progress.step, {"members": members, "normalization": normalization}, run)


def restore(config: Config, groups: tuple[Group, ...], width: int, out: Path) -> Progress | None:
    """Read the newest checkpoint of the run in `out`; None if it did not come to its first one.

    Raises:
        BadInput: if the checkpoint is of activations of another width, or beyond the last step of `config`.
    """
    with Checkpoints(out / "checkpoints") as checkpoints:
        if not checkpoints.steps():
            return None
        step = checkpoints.step_or_newest(None)
        run, tree = checkpoints.read_run(step), checkpoints.read_state(step)
    found = tree["normalization"]["mean"].shape[-1]
    if found != width:
        raise BadInput(
            f"{out} has autoencoders of width {found}, but the activations now have width {width}; "
            "resume with the run's own"
        )
    if step > config.train.steps:
        raise BadInput(f"{out} is at step {step}, beyond train.steps {config.train.steps}; give more steps, or none")
    losses = np.zeros((config.train.steps, len(tree["members"])), np.float32)
    state, column = [], 0
    for group in groups:
        shapes = member_shapes(group, width, config.sweep, config.train)
        members = []
        for name, shape, member in zip(group.names, shapes, group.members, strict=True):
            saved = tree["members"][name]
            losses[:step, column] = saved["losses"]
            column += 1
            members.append(
                shape._replace(
                    params=saved["params"],
                    opt_state=from_flat(shape.opt_state, saved["optimizer"]),
                    learning_rate=jnp.float32(member.learning_rate),
                )
            )
        state.append(stack(members, padded_shape(shapes)))
    normalization = Normalization(**tree["normalization"])
    return Progress(
        step, run["tokens"], Position(**run["position"]), jax.device_put(tuple(state)), losses, normalization
    )
