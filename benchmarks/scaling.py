"""Time of a training step and memory, as members M, features F, batch B and the activations on disk grow.

Each point is a process of its own, so that its peak memory is its own. `x arithmetic` is the time of a step over that
of its 10 B D F M operations at the rate of `jnp.dot`, measured in turn with it; 1 would mean that nothing but five
matrix products a member takes time. `XLA MB` is what the compiled steps say they need: arguments, results, temporaries.

Stores of activations are written to a temporary directory, and the same number of blocks is read from each. `own MB`,
the memory that the process itself needs, should not grow with them. `peak MB` counts pages of mapped files too, which
belong to the system's cache and are given up when memory is short; a page may be as large as 2 MB, and is counted whole
where a row of it is read. The stores have just been written, so that the cache holds them and no disk is waited for.

    python benchmarks/scaling.py
"""

import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from stepping import initial_state, many
from timing import ratios, report, seconds

from jax_sae.activations.batches import batch_runs, first_activations
from jax_sae.activations.normalize import estimate_dataset
from jax_sae.activations.position import Position
from jax_sae.activations.sources import open_sources
from jax_sae.activations.store import write_store
from jax_sae.commands.process import run_script
from jax_sae.config import Config, SweepConfig, TrainConfig, validate
from jax_sae.errors import BadInput
from jax_sae.run.train import NORMALIZATION_TOKENS
from jax_sae.sweep.groups import Group, make_groups
from jax_sae.sweep.members import sweep_members
from jax_sae.sweep.update import update_many

D, F, B = 768, 768, 1024
MOST_STEPS = 10
"""Steps of a dispatch: those between two lines of a run's log, or fewer where they would take too long."""
OPERATIONS = 2e11
"""About as many a dispatch at most."""
STORE_WIDTH, BLOCKS, BLOCK_TOKENS = 64, 8, 16_384


def peak_megabytes() -> float:
    """The most memory that this process has had so far, the pages of mapped files that it has touched included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)


def own_megabytes() -> float:
    """The memory of this process now without pages of files, which are the system's cache; NaN but on Linux."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    return int(lines["RssAnon"].split()[0]) * 1.024e-3 if "RssAnon" in lines else math.nan


def step_point(M: int, F: int, B: int, rounds: int) -> dict[str, Any]:
    """Time and memory of the step of M members of F features on B tokens of width 768."""
    sweep, train = SweepConfig(features=(F,), seeds=tuple(range(M))), TrainConfig(batch_tokens=B)
    validate(Config(sweep=sweep, train=replace(train, batch_tokens=1)))
    operations = 10 * B * D * F * M
    steps = max(1, min(MOST_STEPS, round(OPERATIONS / operations)))
    groups = make_groups(sweep_members(sweep))
    state = [initial_state(groups, D, train)]
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    x, weights = jax.random.normal(jax.random.key(0), (steps, B, D)), jnp.ones((steps, B))
    left, right = jax.random.normal(jax.random.key(1), (4096, D)), jax.random.normal(jax.random.key(2), (D, D))
    dot = jax.jit(jnp.dot)

    def run() -> jax.Array:
        state[0], metrics = many(state[0], groups, x, weights, steps, train)
        return metrics

    times = seconds({"dot": lambda: dot(left, right), "steps": run}, rounds)
    peak = peak_megabytes()  # before the compiler is asked once more
    arithmetic = [operations * t / (2 * left.size * D) for t in times["dot"]]
    a_step = [t / steps for t in times["steps"]]
    return {
        "seconds a step": a_step,
        "x arithmetic": ratios(a_step, arithmetic),
        "state MB": state_bytes / 1e6,
        "XLA MB": xla_megabytes(state[0], groups, x, weights, steps, train),
        "peak MB": peak,
    }


def xla_megabytes(
    state: Any, groups: tuple[Group, ...], x: jax.Array, weights: jax.Array, steps: int, train: TrainConfig
) -> float | str:
    """What the compiled steps need, by XLA's own account; a text where it gives none."""
    forms = tuple(group.form for group in groups)
    jitted = jax.jit(update_many, static_argnames=("forms", "train"), donate_argnames="state")
    compiled = jitted.lower(state, x, weights, 0, steps, 0, forms=forms, train=train).compile()
    found = compiled.memory_analysis()
    if found is None:
        return "not told"
    needed = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return (needed - found.alias_size_in_bytes) / 1e6


def write_point(directory: Path, rows: int) -> None:
    """Write a store of random activations."""
    x = np.random.default_rng(0).standard_normal((16_384, STORE_WIDTH), np.float32)

    def stories() -> Iterator[np.ndarray]:
        for start in range(0, rows, len(x)):
            yield x[: rows - start]

    write_store(directory, stories(), model="random", layer=0)


def read_point(directory: Path) -> dict[str, Any]:
    """Time and memory of opening a store, digests included, and of making some blocks, shuffled and normalised."""
    begun = time.perf_counter()
    config = Config(train=TrainConfig(batch_tokens=512))
    config = replace(config, activations=replace(config.activations, path=str(directory), block_tokens=BLOCK_TOKENS))
    source, _, _ = open_sources(config)
    opened = time.perf_counter() - begun
    sample = first_activations(source, NORMALIZATION_TOKENS, config.train.seed)
    runs = batch_runs(source, estimate_dataset(np.concatenate(sample)), Position(), config.activations, config.train)
    speeds, own = [], []
    for _ in range(BLOCKS):
        begun = time.perf_counter()
        speeds.append(int(next(runs).weights.sum()) / (time.perf_counter() - begun))
        own.append(own_megabytes())
    return {"seconds to open": opened, "tokens/s": speeds, "own MB": max(own), "peak MB": peak_megabytes()}


def in_new_process(function: Callable[[], Any]) -> Any:
    """What it returns there.

    Raises:
        BadInput: if the process was killed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function).result()
        except BrokenProcessPool as error:
            raise BadInput("a process was killed, as happens where memory runs out; give smaller sizes") from error


def main(
    members: tuple[int, ...] = (1, 2, 4, 8, 16),
    features: tuple[int, ...] = (64, 256, 1024, 4096, 16_384),
    batch_tokens: tuple[int, ...] = (64, 256, 1024, 4096, 8192),
    rows: tuple[int, ...] = (2**18, 2**20, 2**22),
    rounds: int = 5,
) -> int:
    """Print a table of training steps, and one of stores.

    Args:
        members: numbers M of members of F = 768, at B = 1024.
        features: numbers F of one member, at B = 1024.
        batch_tokens: numbers B of tokens, for one member of F = 768.
        rows: of stores of width 64; 4 million are 1.1 GB of temporary files.
        rounds: how often each step is timed, in turn with `jnp.dot`.
    """
    if rounds < 1 or min((*members, *features, *batch_tokens, *rows), default=1) < 1:
        raise BadInput("one of the sizes is below 1; numbers above 0 were expected")
    points = [("M", M, (M, F, B)) for M in members] + [("F", n, (1, n, B)) for n in features]
    points += [("B", n, (1, F, n)) for n in batch_tokens]
    table = []
    for what, n, (M, of_each, tokens) in points:
        print(f"{what} = {n}", file=sys.stderr, flush=True)
        found = in_new_process(partial(step_point, M, of_each, tokens, rounds))
        table.append({"grows": what, "M": M, "F": of_each, "B": tokens, **found})
    report("scaling, training step", table, D=D, rounds=rounds)
    print()
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for n in rows:
            print(f"{n:,} rows", file=sys.stderr, flush=True)
            directory = Path(temporary) / str(n)
            in_new_process(partial(write_point, directory, n))
            found = in_new_process(partial(read_point, directory))
            table.append({"rows": n, "store MB": n * STORE_WIDTH * 4 / 1e6, **found})
    report("scaling, activations on disk", table, D=STORE_WIDTH, blocks=BLOCKS, block_tokens=BLOCK_TOKENS)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(sys.argv[1:], lambda: tyro.cli(main)))
