"""Checkpoints as they are read: whole arrays or slices of them, each verified by its digest.

What lies on disk is told in `checkpoints.py`, which writes it.
"""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_sae.errors import BadInput
from jax_sae.language_model.hub import one_line
from jax_sae.run.digests import array_digest, json_digest, named_leaves, nested
from jax_sae.run.orbax_calls import orbax, plain_path, wait_for_echoes
from jax_sae.run.slice_handler import RestoreSlices, registry
from jax_sae.run.slices import Index, common, place, saved_slices, size, to_text, whole

Tree = dict[str, Any]

FILE_BYTES = 32 << 20
"""About how much of a checkpoint is held back before it goes into a file, and is read at a time."""


class Damaged(BadInput):
    """A checkpoint is not what was saved."""

    def __init__(self, message: str, what: str) -> None:
        """`what` is amiss with it, of which the message says more."""
        super().__init__(message)
        self.what = what


_numbers = itertools.count()


def who_works(all_together: bool) -> ocp.options.MultiprocessingOptions:
    """Which processes Orbax waits for: all of the run, or none, whatever others do at that time.

    Of all, too, it waits by JAX's coordinator and not on devices, so it can do so in a thread while they compute.
    """
    own, count = jax.process_index(), jax.process_count()
    if count == 1:
        return ocp.options.MultiprocessingOptions()
    if all_together:
        return ocp.options.MultiprocessingOptions(0, set(range(count)), f"checkpoints_{next(_numbers)}")
    return ocp.options.MultiprocessingOptions(own, {own}, f"process_{own}")


def _batches(wanted: Iterable[tuple[str, Index]], flat: Mapping[str, Any]) -> Iterator[list[tuple[str, Index]]]:
    """Slices of arrays, in parts of at most FILE_BYTES, or of one slice."""
    batch: list[tuple[str, Index]] = []
    total = 0
    for name, index in wanted:
        more = size(index) * np.dtype(flat[name].dtype).itemsize
        if batch and total + more > FILE_BYTES:
            yield batch
            batch, total = [], 0
        batch.append((name, index))
        total += more
    if batch:
        yield batch


def _named(name: str, index: Index, shape: tuple[int, ...]) -> str:
    """What a slice of an array is called, an array that is whole without saying so."""
    return f"the array {name}" if index == whole(shape) else f"the slice {name}[{to_text(index)}]"


class SavedCheckpoints:
    """The checkpoints of a run, to read them; `Checkpoints` also writes."""

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
                who = who_works(all_together=not read_only)
                self._manager = ocp.CheckpointManager(
                    self._plain,
                    item_handlers={
                        "state": ocp.PyTreeCheckpointHandler(
                            use_compression=compressed,
                            multiprocessing_options=who,
                            type_handler_registry=registry(who),
                        ),
                        "run": ocp.JsonCheckpointHandler(multiprocessing_options=who),
                        "digests": ocp.JsonCheckpointHandler(multiprocessing_options=who),
                    },
                    options=ocp.CheckpointManagerOptions(
                        create=False,
                        read_only=read_only,
                        max_to_keep=None,
                        cleanup_tmp_directories=not read_only,
                        enable_async_checkpointing=False,  # the thread below also computes the digests
                        multiprocessing_options=who,
                    ),
                )
            self._opened = stack.pop_all()

    def steps(self) -> list[int]:
        """Steps at which there is a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

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
        target = wanted(names)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        try:
            state = self._restore(step, target, how)
        except Damaged:  # which of them it is
            flat = dict(named_leaves(target))
            each = [(name, index) for name in flat for index in self._saved(step, name, flat[name].shape, digests)]
            for _ in self._verified(step, each, flat, digests):
                pass
            raise
        for name, array in named_leaves(state):
            for index, digest in self._saved(step, name, array.shape, digests).items():
                self._compare(step, name, array[place(index)], index, array.shape, digest)
        return state

    def read_slices(self, step: int, wanted: Mapping[str, Collection[Index]]) -> dict[str, dict[Index, np.ndarray]]:
        """Slices of arrays of a checkpoint, whatever the slices in which they were saved.

        Of what was saved the slices that these meet are read, each whole, and verified.

        Args:
            step: which checkpoint.
            wanted: of each array, by its name, what is read.

        Raises:
            Damaged: if something is missing, or is not what was saved; it is named.
        """
        names, digests = self._read_names(step)
        flat = dict(named_leaves(names))
        for name, indexes in wanted.items():
            if name not in flat:
                raise self._damaged(step, f"the array {name} is missing")
            if any(common(index, whole(flat[name].shape)) != index for index in indexes):
                raise self._damaged(step, f"the array {name} has the shape {flat[name].shape}, which was not expected")
        saved = {name: self._saved(step, name, flat[name].shape, digests) for name in wanted}
        read = [
            (name, index)
            for name in wanted
            for index in saved[name]
            if any(common(index, its) is not None for its in wanted[name])
        ]
        found: dict[str, dict[Index, np.ndarray]] = {name: {} for name in wanted}
        for name, index, value in self._verified(step, read, flat, digests):
            for its in wanted[name]:
                there = common(index, its)
                if its == index:
                    found[name][its] = value
                elif there is not None:
                    into = found[name].setdefault(its, np.zeros([last - first for first, last in its], value.dtype))
                    into[place(there, its)] = value[place(there, index)]
        return found

    def verify(self, step: int, own: Mapping[str, Any] | None = None) -> Tree:
        """Read all of a checkpoint, a little at a time, and return its digests.

        Args:
            step: which checkpoint.
            own: read only these arrays, of those that were saved in slices only the slices that it has.

        Raises:
            Damaged: if something is not what was saved.
        """
        names, digests = self._read_names(step)
        flat = dict(named_leaves(names))
        saved = {name: self._saved(step, name, its.shape, digests) for name, its in flat.items()}
        if own is not None:
            saved = {
                name: {
                    index: digest
                    for index, digest in saved[name].items()
                    if isinstance(its, str) or to_text(index) in its
                }
                for name, its in own.items()
                if name in saved
            }
        for _ in self._verified(step, [(name, index) for name in saved for index in saved[name]], flat, digests):
            pass
        return digests

    def _read_names(self, step: int) -> tuple[Tree, Tree]:
        """The names of the arrays, as a tree with something without meaning at its leaves, and the digests."""
        _, digests = self._read_json(step)
        names = self._try(step, "its arrays", lambda: self._manager.item_metadata(step)["state"].tree)
        found = {name for name, _ in named_leaves(names)}
        for name in sorted(found ^ set(digests["arrays"])):
            raise self._damaged(step, f"the array {name} {'has no digest' if name in found else 'is missing'}")
        return names, digests

    def _saved(self, step: int, name: str, shape: tuple[int, ...], digests: Tree) -> dict[Index, str]:
        """The slices in which an array was saved, and their digests."""
        try:
            return saved_slices(digests["arrays"][name], tuple(shape))
        except (ValueError, TypeError) as error:
            raise self._damaged(step, f"of the array {name} there are no good digests ({error})") from error

    def _verified(
        self, step: int, wanted: Iterable[tuple[str, Index]], flat: Mapping[str, Any], digests: Tree
    ) -> Iterator[tuple[str, Index, np.ndarray]]:
        """Slices as they were saved, of arrays by their names, read about FILE_BYTES at a time and verified."""
        for batch in _batches(wanted, flat):
            asked: dict[str, list[Index]] = {}
            for name, index in batch:
                asked.setdefault(name, []).append(index)
            target = {name: flat[name] for name in asked}
            how = {name: RestoreSlices(np.ndarray, slices=tuple(its)) for name, its in asked.items()}
            name, index = batch[0]
            what = _named(name, index, flat[name].shape) if len(batch) == 1 else "its arrays"
            try:
                found = dict(named_leaves(self._restore(step, nested(target), nested(how), what)))
            except Damaged:
                for one in batch if len(batch) > 1 else ():  # which of them it is
                    for _ in self._verified(step, [one], flat, digests):
                        pass
                raise
            for name, index in batch:
                value, shape = found[name].here[index], flat[name].shape
                self._compare(step, name, value, index, shape, self._saved(step, name, shape, digests)[index])
                yield name, index, value

    def _compare(
        self, step: int, name: str, value: np.ndarray, index: Index, shape: tuple[int, ...], digest: str
    ) -> None:
        if array_digest(value) != digest:
            what = _named(name, index, shape)
            raise self._damaged(step, f"{what} does not have the digest that was saved with it")

    def _restore(self, step: int, target: Tree, how: Tree, what: str = "its arrays") -> Tree:
        arguments = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
        return self._try(
            step, what, lambda: self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        )

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
