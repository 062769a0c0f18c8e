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

Orbax writes a step under a temporary name and renames it, but it does not notice when a part of it is not there, or
when bits change afterwards. The digests do: each checkpoint is read back as soon as it is written, from what lies on
disk, and one that is not what was saved ends the run.
"""

import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_sae.errors import BadInput, RunFailed
from jax_sae.language_model.hub import one_line
from jax_sae.run.digests import array_digest, json_digest, named_leaves
from jax_sae.run.orbax_calls import orbax, plain_path, wait_for_echoes
from jax_sae.streams import say

Tree = dict[str, Any]

SPACE_TO_SPARE = 1_000_000
"""Bytes that a checkpoint may need beyond its arrays: JSON, Orbax's index, block sizes of the file system."""


PIECE_BYTES = 8 << 20
"""Larger arrays are written and read in pieces, so that not all of one is in memory a second time."""

FILE_BYTES = 32 << 20
"""About how much of a checkpoint is held back before it goes into a file; one of less has a single file."""


class Damaged(BadInput):
    """A checkpoint is not what was saved."""

    def __init__(self, message: str, what: str) -> None:
        """`what` is amiss with it, of which the message says more."""
        super().__init__(message)
        self.what = what


def _parts(names: Tree) -> list[Tree]:
    """A tree of names in parts that are read one after another: each array of more than FILE_BYTES, and the others."""
    flat = dict(named_leaves(names))
    sizes = {name: math.prod(its.shape) * np.dtype(its.dtype).itemsize for name, its in flat.items()}
    large = [name for name in flat if sizes[name] > FILE_BYTES]
    parts = [[name] for name in large] + [[name for name in flat if name not in large]]
    return [_nested({name: flat[name] for name in part}) for part in parts if part]


def _nested(flat: Mapping[str, Any]) -> Tree:
    """{path: leaf} as a tree."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def by_itself() -> ocp.options.MultiprocessingOptions:
    """Orbax reads and writes in this process alone, whatever others of the run do at that time."""
    own = jax.process_index()
    return (
        ocp.options.MultiprocessingOptions(own, {own}, f"process_{own}")
        if jax.process_count() > 1
        else (ocp.options.MultiprocessingOptions())
    )


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run; saving goes on in a thread until the `with` block ends."""

    def __init__(self, directory: Path, *, read_only: bool = False, compressed: bool = True) -> None:
        """Open `directory`; unless `read_only` it is created, and what a killed run left half-written is removed.

        What is saved is read alike, compressed or not; trained float32 becomes a few percent smaller for half the time.

        Raises:
            BadInput: if it is to be read and is not there, or if Orbax can neither use its path nor a link to it.
        """
        if read_only and not directory.is_dir():
            raise BadInput(f"there are no checkpoints: {directory} does not exist; give the directory of a run")
        self.directory = directory.absolute()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._plain = stack.enter_context(plain_path(self.directory))
            with orbax.called():
                alone = by_itself()
                self._manager = ocp.CheckpointManager(
                    self._plain,
                    item_handlers={
                        "state": ocp.PyTreeCheckpointHandler(use_compression=compressed, multiprocessing_options=alone),
                        "run": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
                        "digests": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
                    },
                    options=ocp.CheckpointManagerOptions(
                        create=False,
                        read_only=read_only,
                        max_to_keep=None,
                        cleanup_tmp_directories=not read_only,
                        enable_async_checkpointing=False,  # the thread below also computes the digests
                        multiprocessing_options=alone,
                    ),
                )
            self._opened = stack.pop_all()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._said: set[tuple[str, int]] = set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for a save under way, and raise what went wrong in it unless something else is being raised."""
        self._thread.shutdown(wait=True)
        with self._opened, orbax.called():
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
        before = self.steps()
        kept = f"the last one is at step {before[-1]}" if before else "there is none before it"
        digests = self._commit(step, *content(), kept)
        if problem := self._difference(step, digests):
            with suppress(OSError):  # where even that fails, those who read it are told
                problem += f"; it is now {self.set_aside(step).name}"
            raise RunFailed(
                f"the checkpoint at step {step} in {self.directory} was written, but what was read back is not what "
                f"was saved: {problem}; {kept}. Look at the disk and at the warnings above, and go on with --resume"
            )

    def _commit(self, step: int, state: Tree, run: Tree, kept: str) -> Tree:
        """Write a checkpoint, and return its digests; what of earlier ones is `kept` is said if that fails."""
        state = jax.tree.map(np.asarray, state)
        needed = sum(array.nbytes for array in jax.tree.leaves(state)) + SPACE_TO_SPARE
        problem = None
        with orbax.called() as heard:
            try:
                if needed > shutil.disk_usage(self.directory).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                arrays = dict(named_leaves(state))
                with ThreadPoolExecutor() as pool:
                    of_arrays = dict(zip(arrays, pool.map(array_digest, arrays.values()), strict=True))
                digests = {"arrays": of_arrays, "run": json_digest(run)}
                pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE_BYTES), state)
                arguments = ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state, save_args=pieces, ocdbt_target_data_file_size=FILE_BYTES),
                    run=ocp.args.JsonSave(run),
                    digests=ocp.args.JsonSave(digests),
                )
                if not self._manager.save(step, args=arguments, force=True):
                    problem = f"Orbax declined, and there are checkpoints at {self.steps()}"
            except Exception as error:  # Orbax's own message names many paths before it comes to the point
                full = os.strerror(errno.ENOSPC)
                problem = full if full in str(error) else self._one_line(error)
            if problem is not None:
                wait_for_echoes()
        self._say(step, heard if problem is None else [it for it in heard if it.levelno < logging.ERROR])
        if problem is None:
            return digests
        free = shutil.disk_usage(self.directory).free
        for half_written in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(half_written, ignore_errors=True)
        raise RunFailed(
            f"the checkpoint at step {step} could not be written: {self.directory} has {free / 1e6:,.1f} MB left, it "
            f"needs {needed / 1e6:,.1f} MB ({problem}); {kept}. Make room, and go on with --resume"
        )

    def _difference(self, step: int, digests: Tree) -> str | None:
        """What is amiss with a checkpoint that was written, read as others will read it; None if nothing is."""
        try:
            with Checkpoints(self.directory, read_only=True) as written:
                return None if written.verify(step) == digests else "its digests are not those of what was saved"
        except Damaged as error:
            return error.what
        except BadInput as error:
            return str(error)

    def _say(self, step: int, records: Iterable[logging.LogRecord]) -> None:
        """A line beside the progress bar for what was logged while a step was saved, once for a place in the code."""
        for record in records:
            place = record.pathname, record.lineno
            if place not in self._said:
                self._said.add(place)
                text = self._one_line(record.getMessage())
                say([f"warning       while step {step} was saved, Orbax ({record.filename}) said: {text}"])

    def _one_line(self, what: BaseException | str) -> str:
        """What Orbax says, on one line, with the directory's own name."""
        return one_line(what).replace(str(self._plain), str(self.directory))

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
        names, digests = self._read_names(step)
        return self._read_arrays(step, wanted(names), digests)

    def verify(self, step: int) -> Tree:
        """Read all of a checkpoint, one member's arrays at a time, large ones one by one, and return its digests.

        Raises:
            Damaged: if something is not what was saved.
        """
        names, digests = self._read_names(step)
        members = names.pop("members", {})
        for whole in [names, *({"members": {name: its}} for name, its in members.items())]:
            for part in _parts(whole):
                self._read_arrays(step, part, digests)
        return digests

    def _read_names(self, step: int) -> tuple[Tree, Tree]:
        """The names of the arrays, as a tree with something without meaning at its leaves, and the digests."""
        _, digests = self._read_json(step)
        names = self._try(step, "its arrays", lambda: self._manager.item_metadata(step)["state"].tree)
        found = {name for name, _ in named_leaves(names)}
        for name in sorted(found ^ set(digests["arrays"])):
            raise self._damaged(step, f"the array {name} {'has no digest' if name in found else 'is missing'}")
        return names, digests

    def _read_arrays(self, step: int, target: Tree, digests: Tree) -> Tree:
        """The arrays of that part of the tree of names, each verified."""
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
        with orbax.called():
            try:
                return read()
            except MemoryError:
                raise
            except Exception as error:
                problem = self._one_line(error)
            wait_for_echoes()
        raise self._damaged(step, f"{what} cannot be read ({problem})")

    def _damaged(self, step: int, what: str) -> Damaged:
        others = ", ".join(str(other) for other in self.steps() if other != step)
        return Damaged(
            f"the checkpoint at step {step} in {self.directory} is damaged: {what}; "
            + (f"the others are at {others}" if others else "there is no other"),
            what,
        )
