"""What a run will need, said before it begins: tokens, memory and disk."""

import shutil
from pathlib import Path

import jax

from jax_sae.activations.places import described, total_width
from jax_sae.activations.sources import Source
from jax_sae.activations.story_sources import StorySource, StreamSource
from jax_sae.autoencoder.kinds.batchtopk import BatchTopK
from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.run.checkpoints import SPACE_TO_SPARE
from jax_sae.run.memory import memory_of_device, memory_of_machine, n_bytes, size
from jax_sae.run.progress import Setup
from jax_sae.sweep.update import METRICS, padded_shape, rows_at_a_time

PROCESS_BYTES, TEXT_BYTES = 650_000_000, 200_000_000
"""What Python, JAX, its compiler and the other libraries take on a CPU; and those that read text and tokenise it."""


def plan(setup: Setup, source: Source, out: Path | None, done: int) -> list[str]:
    """Lines that say what steps `done` + 1 to the last will need; disk where a run has a directory.

    Raises:
        BadInput: if memory or disk cannot hold what is needed, the device has no such precision, or features are to be
            resampled more often than there are steps between the first and the last.
    """
    _refuse_missing_precision(setup.config)
    for member in setup.members():
        if (member.resamples or 0) >= setup.config.train.steps:
            raise BadInput(
                f"sweep.resamples is {member.resamples}, but train.steps is {setup.config.train.steps}; features are "
                "resampled between steps, so give a smaller number"
            )
    _refuse_large_counts(setup)
    return [_tokens(setup, source, done), *_places(setup), _memory(setup), *([_disk(setup, out, done)] if out else [])]


def _refuse_large_counts(setup: Setup) -> None:
    """Raise BadInput where the features of a batch are counted and are more than a count of 32 bits has room for."""
    train = setup.config.train
    for group in setup.groups:
        B = train.batch_tokens if train.batching == "tokens" else 2048
        if issubclass(group.form.kind, BatchTopK) and B * group.features >= 2**31:
            raise BadInput(
                f"kind {group.members[0].kind} counts the features of a batch, but {B} tokens with {group.features} "
                f"features are 2^31 or more; give train.batch_tokens up to {(2**31 - 1) // group.features}"
            )


def _refuse_missing_precision(config: Config) -> None:
    for name, precision in (("train.precision", config.train.precision), ("model.precision", config.model.precision)):
        if precision == "tensorfloat32" and jax.default_backend() == "cpu":
            raise BadInput(f"{name} is 'tensorfloat32', which a CPU does not have; use 'float32' or 'bfloat16'")


def _tokens(setup: Setup, source: Source, done: int) -> str:
    train = setup.config.train
    steps = train.steps - done
    if train.batching == "story":
        if isinstance(source, StorySource) and (isinstance(source, StreamSource) or source.stories.window):
            return f"stories       {steps:,} needed; how many there are is not known"
        epochs = train.steps / len(source)
        return f"stories       {steps:,} needed, {len(source):,} there: {_epochs(epochs)}"
    available, is_exact = source.count_tokens()
    if available is None:
        return f"tokens        {steps * train.batch_tokens:,} needed; how many there are is not known (streamed)"
    epochs = train.steps * train.batch_tokens / max(1, available)
    about = "" if is_exact else "about "
    return f"tokens        {steps * train.batch_tokens:,} needed, {about}{available:,} there: {_epochs(epochs)}"


def _epochs(epochs: float) -> str:
    repeated = "; what is there is used again" if epochs > 1 else ""
    return f"{epochs:.2g} epochs in all{repeated}" if epochs < 10 else f"{epochs:,.0f} epochs in all{repeated}"


def _places(setup: Setup) -> list[str]:
    """Where there are several: what members read and write, what they take of memory, their part of the steps' time.

    The time is that of the dense products, 3 B (D + D_written) F multiplications and additions a step of a member.
    """
    if len(setup.places) == 1:
        return []
    found: dict[str, list[int]] = {}
    for group, shapes in zip(setup.groups, setup.shapes(), strict=True):
        reads, writes = setup.reads(group), setup.writes(group)
        if reads == writes:
            where = f"{'place     ' if len(reads) == 1 else 'crosscoder'}    {described(reads)}"
        else:
            where = f"transcoder    from {described(reads)} to {described(writes)}"
        its = found.setdefault(where, [0, 0, 0])
        its[0] += len(group.names)
        its[1] += len(shapes) * (2 * n_bytes(padded_shape(shapes)) + n_bytes(padded_shape(shapes).params))
        its[2] += sum(member.features for member in group.members) * (total_width(reads) + total_width(writes))
    products = max(1, sum(its[2] for its in found.values()))
    return [
        f"{where}: {n} members, {size(bytes_of_it)} of memory, about {100 * its / products:.0f} % of the time of a step"
        for where, (n, bytes_of_it, its) in found.items()
    ]


def sweep_bytes(setup: Setup) -> int:
    """About what a sweep takes of each device; of the process where that is a CPU, in whose memory all parts lie."""
    config, D = setup.config, setup.width
    on_devices = setup.mesh is not None and jax.default_backend() != "cpu"
    data, member, feature = tuple(setup.mesh.shape.values()) if setup.mesh is not None and on_devices else (1, 1, 1)
    padded = [
        (len(group.names), padded_shape(shapes)) for group, shapes in zip(setup.groups, setup.shapes(), strict=True)
    ]
    state = sum(-(-n // member) * n_bytes(shape) // feature for n, shape in padded)
    gradients = sum(-(-n // member) * n_bytes(shape.params) // feature for n, shape in padded)
    B = (config.train.batch_tokens if config.train.batching == "tokens" else 2048) // data
    step = 0
    for group in setup.groups:
        at_once = 1 if jax.default_backend() == "cpu" else -(-len(group.names) // member)
        couples_tokens = group.form.kind.couples_tokens
        of_features = 6 if couples_tokens else 3  # arrays of them that are there at once
        width = group.width(D) + (sum(group.form.written) if group.reads != group.writes else 0)
        step += at_once * rows_at_a_time(B, couples_tokens) * (of_features * group.features // feature + 3 * width) * 4
    return 2 * state + gradients + step  # twice: a copy is taken to be saved


def block_bytes(setup: Setup) -> int:
    """What blocks of activations take: one on the host and on the device, or two there."""
    return 2 * setup.config.activations.block_tokens * setup.width * 4


def _memory(setup: Setup) -> str:
    config, D = setup.config, setup.width
    block = block_bytes(setup)
    held_out = 2 * config.activations.held_out_tokens * D * 4
    metrics = 4 * len(METRICS) * config.train.steps * len(setup.names())
    needed = sweep_bytes(setup)
    for what, bytes_of_it, there, advice in (
        ("the sweep", needed, memory_of_device(), "give fewer or narrower members, or more devices (mesh.auto)"),
        ("a block", block, memory_of_device(), "lower activations.block_tokens"),
        ("the metrics of all steps", metrics, memory_of_machine(), "lower train.steps"),
    ):
        if bytes_of_it > there:
            raise BadInput(f"{what} would take {size(bytes_of_it)} of memory, but there are {size(there)}; {advice}")
    libraries, also = (PROCESS_BYTES, "") if config.activations.path else (PROCESS_BYTES + TEXT_BYTES, " and the model")
    return (
        f"memory        about {size(libraries + needed + block + held_out)}{also}: libraries {size(libraries)}, sweep "
        f"{size(needed)}, blocks of activations {size(block)}, held out {size(held_out)}"
    )


def _disk(setup: Setup, out: Path, done: int) -> str:
    train = setup.config.train
    member_bytes = sum(n_bytes(shape) for shapes in setup.shapes() for shape in shapes)
    n_members = len(setup.names())
    every, last = train.checkpoint_every, train.steps
    first_multiple, last_multiple = done // every + 1, last // every
    n = last_multiple - first_multiple + 1
    sum_of_steps = every * n * (first_multiple + last_multiple) // 2
    if last % every and done < last:
        n, sum_of_steps = n + 1, sum_of_steps + last
    metrics = 4 * len(METRICS) * n_members * sum_of_steps  # of every step so far
    needed = n * (member_bytes + SPACE_TO_SPARE) + metrics
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise BadInput(
            f"the run needs {size(needed)} of disk for {n} checkpoints, but {place} has {size(free)} left; "
            "make room, give --out another disk, or a larger train.checkpoint_every"
        )
    each = size(needed / max(1, n))
    return f"disk          {n} checkpoints of about {each}, {size(needed)} in all; {size(free)} free"


def is_checkpoint(step: int, every: int, last: int) -> bool:
    """Whether a checkpoint is taken after a step."""
    return step % every == 0 or step == last
