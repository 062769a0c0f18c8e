"""Checkpoints on disk: the only file that imports orbax.

    checkpoints/<step>/state/    arrays, in Orbax's own format:
        members/<name>/params/W_enc, b_enc, W_dec, b_dec      at the member's own number of features
        members/<name>/optimizer/<path in the Optax state>
        members/<name>/memory/...                             what some kinds remember besides: threshold, ...
        members/<name>/metrics/loss_per_element, ...          of every step so far
        normalization/mean, scale
    checkpoints/<step>/run/      JSON: step, tokens, position in the data, config, digests of the inputs, versions
    checkpoints/<step>/digests/  JSON: sha256 of each array and of run/, verified whenever they are read

Arrays and JSON only, no class of this package: plain Orbax reads it where this package does not exist. A member's
arrays are apart from the others', so using one member reads that member alone.

Orbax writes a step under a temporary name and renames it, so a step that is there is whole; but it does not notice
when bits change afterwards. The digests do, and they are committed by the same renaming.
"""

import errno
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_sae.errors import BadInput, RunFailed
from jax_sae.language_model.hub import one_line

Tree = dict[str, Any]

SPACE_TO_SPARE = 1_000_000
"""Bytes that a checkpoint may need beyond its arrays: JSON, Orbax's index, block sizes of the file system."""


class Damaged(BadInput):
    """A checkpoint is not what was saved."""


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run; saving goes on in a thread until the `with` block ends."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Open `directory`; unless `read_only` it is created, and what a killed run left half-written is removed."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax narrates; what goes wrong is raised
        if read_only and not directory.is_dir():
            raise BadInput(f"there are no checkpoints: {directory} does not exist; give the directory of a run")
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
                "digests": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                max_to_keep=None,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=False,  # the thread below also computes the digests
            ),
        )
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for a save under way, and raise what went wrong in it unless something else is being raised."""
        self._thread.shutdown(wait=True)
        self._manager.close()
        if error is None:
            self.raise_failure()

    def steps(self) -> list[int]:
        """Steps at which there is a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, content: Callable[[], tuple[Tree, Tree]]) -> None:
        """Begin to write a checkpoint, once the one before it is written.

        Args:
            step: after which it is taken.
            content: makes the arrays and the JSON; it is called in the thread, so it must not need what the caller goes
                on to change or to donate.

        Raises:
            RunFailed: if the save before it has failed.
        """
        if self._saving is not None:
            self._saving.exception()  # waits
        self.raise_failure()
        self._saving = self._thread.submit(self._write, step, content)

    def raise_failure(self) -> None:
        """Raise the RunFailed of a save that has ended badly; does not wait for one that is under way."""
        if self._saving is not None and self._saving.done():
            saving, self._saving = self._saving, None
            saving.result()

    def _write(self, step: int, content: Callable[[], tuple[Tree, Tree]]) -> None:
        state, run = content()
        state = jax.tree.map(np.asarray, state)
        needed = sum(array.nbytes for array in jax.tree.leaves(state)) + SPACE_TO_SPARE
        before = self.steps()
        with _without_echoes():
            try:
                if needed > shutil.disk_usage(self.directory).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                digests = {"arrays": {name: array_digest(array) for name, array in named_leaves(state)}}
                arguments = ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    run=ocp.args.JsonSave(run),
                    digests=ocp.args.JsonSave({**digests, "run": json_digest(run)}),
                )
                if self._manager.save(step, args=arguments, force=True):
                    return
                problem = f"Orbax declined, and there are checkpoints at {before}"
            except Exception as error:  # Orbax's own message names many paths before it comes to the point
                full = os.strerror(errno.ENOSPC)
                problem = full if full in str(error) else one_line(error)
            _wait_for_echoes()
        free = shutil.disk_usage(self.directory).free
        for half_written in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(half_written, ignore_errors=True)
        kept = f"the last one is at step {before[-1]}" if before else "there is none before it"
        raise RunFailed(
            f"the checkpoint at step {step} could not be written: {self.directory} has {free / 1e6:,.1f} MB left, it "
            f"needs {needed / 1e6:,.1f} MB ({problem}); {kept}. Make room, and go on with --resume"
        )

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

    def set_aside(self, step: int) -> Path:
        """Rename a step to `<step>.damaged`, so that it no longer counts as one; returns the new name."""
        path = self.directory / f"{step}.damaged"
        while path.exists():
            path = path.with_name(path.name + "-again")
        os.rename(self.directory / str(step), path)
        return path

    def read_run(self, step: int) -> Tree:
        """The JSON of a checkpoint.

        Raises:
            Damaged: if it is not what was saved.
        """
        return self._read_json(step)[0]

    def read_state(self, step: int, wanted: Callable[[Tree], Tree] = lambda tree: tree) -> Tree:
        """Arrays of a checkpoint, as NumPy arrays, each verified by its digest.

        Args:
            step: which checkpoint.
            wanted: from the tree of names, with something without meaning at its leaves, takes the part that is read;
                nothing else is read from disk.

        Raises:
            Damaged: if an array is missing, or one of those that are read is not what was saved; it is named.
        """
        _, digests = self._read_json(step)
        names = self._try(step, "its arrays", lambda: self._manager.item_metadata(step)["state"].tree)
        found = {name for name, _ in named_leaves(names)}
        for name in sorted(found ^ set(digests["arrays"])):
            raise self._damaged(step, f"the array {name} {'has no digest' if name in found else 'is missing'}")
        target = wanted(names)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        arguments = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
        state = self._try(
            step, "its arrays", lambda: self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        )
        for name, array in named_leaves(state):
            if array_digest(array) != digests["arrays"][name]:
                raise self._damaged(step, f"the array {name} does not have the digest that was saved with it")
        return state

    def _read_json(self, step: int) -> tuple[Tree, Tree]:
        """The run and the digests of a checkpoint, the former verified."""
        arguments = ocp.args.Composite(run=ocp.args.JsonRestore(), digests=ocp.args.JsonRestore())
        restored = self._try(step, "its JSON", lambda: self._manager.restore(step, args=arguments))
        run, digests = restored["run"], restored["digests"]
        is_table = isinstance(digests, dict) and isinstance(digests.get("arrays"), dict)
        if not is_table or digests.get("run") != json_digest(run):
            raise self._damaged(step, "its JSON does not have the digest that was saved with it")
        return run, digests

    def _try(self, step: int, what: str, read: Callable[[], Any]) -> Any:
        """What `read` returns; damage makes Orbax raise an error of any kind, which becomes Damaged."""
        with _without_echoes():
            try:
                return read()
            except MemoryError:
                raise
            except Exception as error:
                problem = one_line(error)
            _wait_for_echoes()
        raise self._damaged(step, f"{what} cannot be read ({problem})")

    def _damaged(self, step: int, what: str) -> Damaged:
        others = ", ".join(str(other) for other in self.steps() if other != step)
        return Damaged(
            f"the checkpoint at step {step} in {self.directory} is damaged: {what}; "
            + (f"the others are at {others}" if others else "there is no other")
        )


@contextmanager
def _without_echoes() -> Iterator[None]:
    """Orbax reads and writes arrays side by side; when one fails, the others print that their event loop is gone."""
    hook, asyncio_logger = sys.unraisablehook, logging.getLogger("asyncio")

    def quieter(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = quieter
    asyncio_logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited")
            yield
    finally:
        sys.unraisablehook = hook
        asyncio_logger.disabled = False


def _wait_for_echoes() -> None:
    """Let the others fail, and drop the exceptions that nobody asked for."""
    time.sleep(0.1)
    gc.collect()


def array_digest(array: np.ndarray) -> str:
    """The sha256 of an array's dtype, shape and bytes in C order, in hexadecimal."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def json_digest(content: Any) -> str:
    """The sha256 of what JSON makes of `content`, its keys sorted, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of nested dictionaries with its path, such as `members/F64/params/W_enc`."""
    for name, value in tree.items():
        yield from named_leaves(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]


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
