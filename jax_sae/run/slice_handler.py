"""How Orbax writes slices of arrays, and reads them: each process those that it asks for."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jax_sae.run.slices import Index, Slices, place


@dataclass
class RestoreSlices(ocp.RestoreArgs):
    """Restores these slices of an array, as `Slices`."""

    slices: tuple[Index, ...] = ()


class SliceHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's own handler of NumPy arrays, and beside them of `Slices`.

    What lies on disk is the same: one array under its name. Each process writes its slices into a folder of its own,
    and Orbax joins the folders. No two slices lie in the same chunk of the array, since a chunk divides a slice.
    """

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[ocp.SaveArgs] | None = None
    ) -> Sequence[ocp.future.Future]:
        """Begin to write; the first process writes arrays that are whole."""
        each = list(zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True))
        arrays = [its for its in each if not isinstance(its[0], Slices)]
        sliced = [its for its in each if isinstance(its[0], Slices)]
        begun = list(await super().serialize(*zip(*arrays, strict=True))) if arrays else []
        return [*begun, ocp.future.CommitFutureAwaitingContractedSignals(_write(sliced), name="slices")]

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


async def _write(sliced: Sequence[tuple[Slices, Any, ocp.SaveArgs]]) -> None:
    await asyncio.gather(*(_write_one(*each) for each in sliced if each[0].here))


async def _write_one(array: Slices, info: Any, args: ocp.SaveArgs) -> None:
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


def registry() -> ocp.type_handlers.TypeHandlerRegistry:
    """Of that handler alone: checkpoints have no other leaves."""
    found = ocp.type_handlers.create_type_handler_registry()
    found.add(np.ndarray, SliceHandler(), lambda its: issubclass(its, (np.ndarray, Slices)))
    return found
