"""How Orbax writes slices of arrays, and reads them: each process those that it asks for."""

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jax_sae.run.slices import Index, Slices, place, whole

SECONDS_TO_WRITE = 1200
"""How much longer than the first of several processes the last one may take to write its part of a checkpoint."""

FAILED = "failed"
"""A file in a checkpoint that is being written: a process could not write its part, and there will be none."""


@dataclass
class RestoreSlices(ocp.RestoreArgs):
    """Restores these slices of an array, as `Slices`."""

    slices: tuple[Index, ...] = ()


class SliceHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's own handler of NumPy arrays, and beside them of `Slices`.

    What lies on disk is the same: one array under its name. Each process writes its slices into a folder of its own,
    and Orbax joins the folders. No two slices lie in the same chunk of the array, since a chunk divides a slice.
    """

    def __init__(self, who: ocp.options.MultiprocessingOptions) -> None:
        """`who` writes together."""
        super().__init__()
        self._who = who
        self._barriers = itertools.count()

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[ocp.SaveArgs] | None = None
    ) -> Sequence[ocp.future.Future]:
        """Begin to write; of several processes the first writes arrays that are whole."""
        if not any(isinstance(value, Slices) for value in values):
            return list(await super().serialize(values, infos, args))
        each = zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True)
        writing = [_write(_as_slices(value), info, its) for value, info, its in each]
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._all_write(writing, infos[0]), name="slices")]

    async def _all_write(self, writing: Sequence[Coroutine[Any, Any, None]], info: Any) -> None:
        """Write, and wait for the others; where one fails, all do, so that none waits for it afterwards."""
        failed = None
        try:
            await asyncio.gather(*writing)
        except Exception as error:
            failed = error
        processes = self._who.active_processes
        if processes and len(processes) > 1:
            told = info.parent_dir / FAILED
            if failed:
                told.touch()
            name = f"{self._who.barrier_sync_key_prefix}_written_{next(self._barriers)}"
            ocp.multihost.sync_global_processes(name, timeout=SECONDS_TO_WRITE, processes=processes)
            if not failed and told.exists():
                raise OSError("another process could not write its part")
        if failed:
            raise failed

    async def deserialize(self, infos: Sequence[Any], args: Sequence[ocp.RestoreArgs] | None = None) -> Sequence[Any]:
        """Of each array what is asked for."""
        asked = args or [ocp.RestoreArgs()] * len(infos)
        arrays = [i for i, its in enumerate(asked) if not isinstance(its, RestoreSlices)]
        found: list[Any] = [None] * len(infos)
        if arrays:
            read = await super().deserialize([infos[i] for i in arrays], [asked[i] for i in arrays])
            for i, array in zip(arrays, read, strict=True):
                found[i] = array
        for i, its in enumerate(asked):
            if isinstance(its, RestoreSlices):
                found[i] = await _read(infos[i], its)
        return found


def _as_slices(value: np.ndarray | Slices) -> Slices:
    """A whole array as one slice, which the first process writes."""
    if isinstance(value, Slices):
        return value
    here = {whole(value.shape): value} if jax.process_index() == 0 else {}
    return Slices(value.shape, value.dtype, value.shape, here)


async def _write(array: Slices, info: Any, args: ocp.SaveArgs) -> None:
    if not array.here:
        return
    await info.await_path_creation()
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=True,
        global_shape=array.shape,
        local_shape=array.slice_shape,
        dtype=array.dtype,
        process_index=jax.process_index(),
        arg=args,
    )
    there = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
    for index, value in array.here.items():
        await there[place(index)].write(value, can_reference_source_data_indefinitely=True)


async def _read(info: Any, args: RestoreSlices) -> Slices:
    await info.await_path_creation()
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=bool(info.is_ocdbt_checkpoint))
    there = await ts.open(ts.Spec(spec), open=True, context=info.ts_context)
    reading = {index: there[place(index)].read() for index in args.slices}
    here = {index: np.asarray(await each) for index, each in reading.items()}
    return Slices(tuple(there.shape), there.dtype.numpy_dtype, tuple(there.shape), here)


def registry(who: ocp.options.MultiprocessingOptions) -> ocp.type_handlers.TypeHandlerRegistry:
    """Of that handler alone: checkpoints have no other leaves."""
    found = ocp.type_handlers.create_type_handler_registry()
    found.add(np.ndarray, SliceHandler(who), lambda its: issubclass(its, (np.ndarray, Slices)))
    return found
