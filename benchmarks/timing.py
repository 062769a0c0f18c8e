"""Seconds of several functions, measured in turn, so that a machine whose speed drifts drifts for all; and tables."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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


def ratios(over: list[float], under: list[float]) -> list[float]:
    """over / under, round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: list[float]) -> str:
    """Median, with the smallest and largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def report(benchmark: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Print a table with a line for each row, then everything as one line of JSON.

    Args:
        benchmark: its name.
        rows: column -> a text, a number, or the values of all rounds, which become their median with its spread.
            Columns are those of all rows, in the order of their first appearance; a row may lack some.
        facts: what holds for all rows; device, cores and the version of JAX are added.
    """
    facts |= {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "jax": jax.__version__}
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print(f"{benchmark}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    for cells in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    numbers = [{name: _json(value) for name, value in row.items()} for row in rows]
    print(json.dumps({"benchmark": benchmark, **facts, "rows": numbers}))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return spread(value)
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return {"median": statistics.median(value), "min": min(value), "max": max(value)}
    return value
