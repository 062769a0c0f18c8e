"""Checkpoints on disk: the only file that imports orbax.

    checkpoints/<step>/state/    arrays, in Orbax's own format:
        members/<name>/params/W_enc, b_enc, W_dec, b_dec      at the member's own number of features
        members/<name>/optimizer/<path in the Optax state>
        members/<name>/losses                                 loss per element of every step so far
        normalization/mean, scale
    checkpoints/<step>/run/      JSON: step, tokens, position in the data, config, versions

Arrays and JSON only, no class of this package: plain Orbax reads it where this package does not exist. A member's
arrays are apart from the others', so using one member reads that member alone.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_sae.errors import BadInput

Tree = dict[str, Any]


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run; saving goes on in the background until the `with` block ends."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Open `directory`; it is created unless `read_only`."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
        if read_only and not directory.is_dir():
            raise BadInput(f"there are no checkpoints: {directory} does not exist; give the directory of a run")
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                create=not read_only, read_only=read_only, max_to_keep=None, cleanup_tmp_directories=not read_only
            ),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for saves under way, and raise what went wrong in them."""
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps at which there is a whole checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree, run: Tree) -> None:
        """Begin to write a checkpoint; the arrays of `state` are copied before this returns.

        Raises:
            OSError: if Orbax declines because there already is one at this step or a later one.
        """
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), run=ocp.args.JsonSave(run))
        if not self._manager.save(step, args=arguments, force=True):
            raise OSError(f"{self.directory}: no checkpoint could be written at step {step}; there are {self.steps()}")

    def step_or_newest(self, step: int | None) -> int:
        """`step`, or the newest one if it is None.

        Raises:
            BadInput: if there is no such checkpoint; the message lists those there are.
        """
        steps = self.steps()
        if not steps:
            raise BadInput(f"{self.directory} holds no whole checkpoint yet")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise BadInput(f"{self.directory} has no checkpoint at step {step}; there are {', '.join(map(str, steps))}")
        return step

    def read_run(self, step: int) -> Tree:
        """The JSON of a checkpoint."""
        restored = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        return restored["run"]

    def read_state(self, step: int, wanted: Callable[[Tree], Tree] = lambda tree: tree) -> Tree:
        """Arrays of a checkpoint, as NumPy arrays.

        Args:
            step: which checkpoint.
            wanted: from the tree of names, with something without meaning at its leaves, takes the part that is read;
                nothing else is read from disk.
        """
        names = self._manager.item_metadata(step)["state"].tree
        target = wanted(names)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        arguments = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]


def flat_names(tree: Any) -> list[str]:
    """The path of each leaf of a pytree, such as `0.mu.W_enc` for an Optax state, in the order of its leaves."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def to_flat(tree: Any) -> dict[str, Any]:
    """A pytree as {path of leaf: leaf}: what an Optax state is on disk."""
    return dict(zip(flat_names(tree), jax.tree.leaves(tree), strict=True))


def from_flat(like: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `to_flat`, in the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in flat_names(like)])
