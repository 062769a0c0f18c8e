"""Seconds of several functions, measured in turn, so that a machine whose speed drifts drifts for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Call each function once to compile, then `rounds` times in turn; the wall-clock seconds of each call."""
    for function in functions.values():
        jax.block_until_ready(function())
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            found[name].append(time.perf_counter() - start)
    return found


def spread(values: list[float]) -> str:
    """Median, with the smallest and largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
