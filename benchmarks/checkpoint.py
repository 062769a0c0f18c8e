"""What a checkpoint costs: how long a save keeps training waiting, and what the digests take.

Training waits for a copy of the state; writing and digests go on in a thread. The wait is timed from the call until the
copy is there, with training going on in between as in a run.

    python benchmarks/checkpoint.py --seeds 0 1
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from stepping import initial_state, many
from timing import spread

from jax_sae.activations.normalize import identity
from jax_sae.activations.places import Place
from jax_sae.activations.position import Position
from jax_sae.config import Config, SweepConfig, TrainConfig
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.digests import array_digest, named_leaves
from jax_sae.run.progress import Progress, Setup, save
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members
from jax_sae.sweep.update import METRICS, snapshot

FEATURES, D, B = (100, 767, 768, 1000), 768, 1024


def main(seeds: tuple[int, ...] = (0, 1), saves: int = 8, steps_between: int = 3) -> None:
    """Print milliseconds and megabytes.

    Args:
        seeds: members of each of the four widths; two make a state of 97 MB.
        saves: how many checkpoints are written.
        steps_between: training steps between two of them.
    """
    train = TrainConfig(batch_tokens=B, steps=saves * steps_between)
    sweep = SweepConfig(features=FEATURES, seeds=seeds)
    setup = Setup(Config(sweep=sweep, train=train), make_groups(sweep_members(sweep)), (Place("", D),), {})
    x = jax.random.normal(jax.random.key(0), (steps_between, B, D))
    weights = jnp.ones((steps_between, B))
    metrics = np.zeros((train.steps, len(setup.names()), len(METRICS)), np.float32)
    state = initial_state(setup.groups, D, train)
    progress = Progress(0, 0, Position(), Position(), state, metrics, identity(D))
    jax.block_until_ready(snapshot(state))  # as a run does before its first step
    waits, writes, steps = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        for i in range(1, saves + 1):
            begun = time.perf_counter()
            state, _ = many(progress.state, setup.groups, x, weights, steps_between, train)
            jax.block_until_ready(state)
            steps.append((time.perf_counter() - begun) / steps_between)
            progress = replace(progress, step=i, state=state)
            with Checkpoints(Path(directory)) as checkpoints:
                begun = time.perf_counter()
                save(checkpoints, progress, setup)
                waits.append(1e3 * (time.perf_counter() - begun))
                state, _ = many(progress.state, setup.groups, x, weights, 1, train)  # donates what is being saved
                jax.block_until_ready(state)
                progress = replace(progress, state=state)
            writes.append(time.perf_counter() - begun)
        with Checkpoints(Path(directory)) as checkpoints:
            begun = time.perf_counter()
            arrays = dict(named_leaves(checkpoints.read_state(saves)))
            read = time.perf_counter() - begun
    begun = time.perf_counter()
    for array in arrays.values():
        array_digest(array)
    digests = time.perf_counter() - begun
    megabytes, step = sum(array.nbytes for array in arrays.values()) / 1e6, statistics.median(steps[1:])
    between = step * TrainConfig().checkpoint_every
    print(f"state {megabytes:.0f} MB in {len(arrays)} arrays; a step of B = {B} takes {step * 1e3:.0f} ms")
    print(f"a save keeps training waiting {spread(waits)} ms, the first one {waits[0]:.3g} ms")
    print(f"it is written after {spread(writes)} s, and is read and verified in {read:.2g} s")
    print(f"digests take {digests * 1e3:.0f} ms, {100 * digests / between:.3g} % of the {between:.0f} s of 5000 steps")
    results = {"wait_ms": waits, "write_s": writes, "read_s": read, "digest_s": digests, "step_s": step}
    device = jax.devices()[0].device_kind
    print(json.dumps({"benchmark": "checkpoint", "megabytes": megabytes, "device": device, "results": results}))


if __name__ == "__main__":
    tyro.cli(main)
