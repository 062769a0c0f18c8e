"""Checkpoints on disk, through Orbax.

    checkpoints/<step>/state/    arrays, in Orbax's own format:
        members/<name>/params/W_enc, b_enc, W_dec, b_dec      at the member's own number of features
        members/<name>/optimizer/<path in the Optax state>
        members/<name>/memory/...                             what some kinds remember besides: threshold, ...
        members/<name>/metrics/loss_per_element, ...          of every step so far
        normalization/mean, scale
    checkpoints/<step>/run/      JSON: step, tokens, position in the data, config, digests of the inputs, versions
    checkpoints/<step>/digests/  JSON: sha256 of each array and of run/, verified whenever they are read; of each
                                 slice, where an array was saved in slices: {"0:64, 0:32": ..., "0:64, 32:64": ...}

Arrays and JSON only, no class of this package: plain Orbax reads it where this package does not exist. A member's
arrays are apart from the others', so using one member reads that member alone.

Orbax writes a step under a temporary name and renames it, but it does not notice when a part of it is not there, or
when bits change afterwards. The digests do: each checkpoint is read back as soon as it is written, from what lies on
disk, and one that is not what was saved ends the run.

Several processes write a checkpoint together, each its slices of the arrays (`slices.py`), and each reads back its own.
The first one writes what is not in slices, and makes it a checkpoint once all have written.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_sae.errors import BadInput, RunFailed
from jax_sae.processes import SECONDS_UNSEEN, is_first, is_there, several, together, told
from jax_sae.run.digests import array_digest, json_digest, named_leaves
from jax_sae.run.orbax_calls import orbax, wait_for_echoes
from jax_sae.run.saved_checkpoints import FILE_BYTES, Damaged, SavedCheckpoints, Tree
from jax_sae.run.slices import Slices, of_all, to_text, whole
from jax_sae.streams import say

SPACE_TO_SPARE = 1_000_000
"""Bytes that a checkpoint may need beyond its arrays: JSON, Orbax's index, block sizes of the file system."""

PIECE_BYTES = 8 << 20
"""Larger arrays are written in pieces, so that not all of one is in memory a second time."""


def _digests(state: Tree, run: Tree) -> Tree:
    """Of each array, or of each of its slices that are here, and of the JSON."""
    arrays = dict(named_leaves(state))
    with ThreadPoolExecutor() as pool:
        begun = {
            name: {to_text(index): pool.submit(array_digest, value) for index, value in its.here.items()}
            if isinstance(its, Slices)
            else pool.submit(array_digest, np.asarray(its))
            for name, its in arrays.items()
        }
        found: Tree = {}
        for name, its in begun.items():
            found[name] = its.result() if isinstance(its, Future) else {text: d.result() for text, d in its.items()}
            if isinstance(found[name], dict) and set(found[name]) == {to_text(whole(arrays[name].shape))}:
                found[name] = found[name].popitem()[1]
    return {"arrays": found, "run": json_digest(run)}


def _bytes_needed(state: Tree) -> int:
    """On the disk."""
    return sum(its.nbytes for its in jax.tree.leaves(state)) + SPACE_TO_SPARE


class Checkpoints(SavedCheckpoints, AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run; saving goes on in a thread until the `with` block ends.

    Of several processes all open them to write, and call `save` and `finish` at the same time.
    """

    def __init__(self, directory: Path, *, read_only: bool = False, compressed: bool = True) -> None:
        """Open `directory`, as `SavedCheckpoints` does."""
        super().__init__(directory, read_only=read_only, compressed=compressed)
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

    def save(self, step: int, content: Callable[[], tuple[Tree, Tree]]) -> None:
        """Begin to write a checkpoint, once the one before it is written.

        Args:
            step: after which it is taken.
            content: makes the arrays and the JSON; it is called in the thread, so it must not need what the caller goes
                on to change or to donate. By several processes before, since they tell each other their digests.

        Raises:
            RunFailed: if the save before it has failed.
        """
        if not several():
            self._wait()
            self._saving = self._thread.submit(self._write, step, content)
            return
        with together():
            self._wait()
            state, run = content()
            own = _digests(state, run)
            if is_first():
                self._refuse_full_disk(step, _bytes_needed(state))
        each = told(own)
        digests = {"arrays": of_all(its["arrays"] for its in each), "run": each[0]["run"]}
        self._saving = self._thread.submit(self._write, step, lambda: (state, run), digests, own["arrays"])

    def finish(self) -> None:
        """Wait for a save under way.

        Raises:
            RunFailed: if it has failed.
        """
        with together():
            self._wait()

    def _wait(self) -> None:
        if self._saving is not None:
            self._saving.exception()  # waits
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise the RunFailed of a save that has ended badly; does not wait for one that is under way."""
        if self._saving is not None and self._saving.done():
            saving, self._saving = self._saving, None
            saving.result()

    def _write(
        self,
        step: int,
        content: Callable[[], tuple[Tree, Tree]],
        digests: Tree | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint and read it back.

        Of several processes each reads its `own` part of the `digests`; of one, all.
        """
        kept = self._kept()
        digests = self._commit(step, *content(), digests, kept)
        if problem := self._difference(step, digests, own):
            with suppress(OSError):  # where even that fails, those who read it are told
                problem += f"; it is now {self.set_aside(step).name}"
            raise RunFailed(
                f"the checkpoint at step {step} in {self.directory} was written, but what was read back is not what "
                f"was saved: {problem}; {kept}. Look at the disk and at the warnings above, and go on with --resume"
            )

    def _kept(self) -> str:
        before = self.steps()
        return f"the last one is at step {before[-1]}" if before else "there is none before it"

    def _commit(self, step: int, state: Tree, run: Tree, digests: Tree | None, kept: str) -> Tree:
        """Write a checkpoint, and return its digests; what of earlier ones is `kept` is said if that fails."""
        state = jax.tree.map(lambda its: its if isinstance(its, Slices) else np.asarray(its), state)
        needed = _bytes_needed(state)
        problem = None
        with orbax.called() as heard:
            try:
                if needed > shutil.disk_usage(self.directory).free and not several():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                digests = digests or _digests(state, run)
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
        if problem is None and digests is not None:
            return digests
        free = shutil.disk_usage(self.directory).free
        for half_written in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(half_written, ignore_errors=True)
        raise self._not_written(step, free, needed, str(problem), kept)

    def _refuse_full_disk(self, step: int, needed: int) -> None:
        if needed > (free := shutil.disk_usage(self.directory).free):
            raise self._not_written(step, free, needed, os.strerror(errno.ENOSPC), self._kept())

    def _not_written(self, step: int, free: int, needed: int, problem: str, kept: str) -> RunFailed:
        return RunFailed(
            f"the checkpoint at step {step} could not be written: {self.directory} has {free / 1e6:,.1f} MB left, it "
            f"needs {needed / 1e6:,.1f} MB ({problem}); {kept}. Make room, and go on with --resume"
        )

    def _difference(self, step: int, digests: Tree, own: Mapping[str, Any] | None) -> str | None:
        """What is amiss with a checkpoint that was written, read as others will read it; None if nothing is."""
        try:
            if several() and not is_there(self.directory / str(step)):
                return f"it is not seen within {SECONDS_UNSEEN} s by each process"
            with Checkpoints(self.directory, read_only=True) as written:
                return None if written.verify(step, own) == digests else "its digests are not those of what was saved"
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
