"""From stories to trained members: where the time of a run goes, and what fraction of it the arithmetic would need.

configs/tinystories_33m.toml with random weights of TinyStories-33M's shapes, which do not change the time. Each round
is a process of its own, so that imports and the compiler count. `jax_sae.run.train.train` runs as it is, with timers
around some of the functions that it calls; a moment belongs to the innermost of them, so the parts add up to the whole,
and what is in none of them is `the rest`. Threads beside the main one are not timed: only waiting for them is.

The limit is 24 D^2 + 4 T D operations a block of the language model and token of a story of T tokens, and 10 B D F a
member and step, at the median rate of `jnp.dot`, which is measured twice a second all through the run (its time is
left out). The fraction is the limit of what is done from the first harvest to the end of the last step over that time.
Held-out tokens are harvested afterwards: they count in the parts only.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --text my_stories --tokenizer my_tokenizer --steps 128
"""

import contextlib
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tyro

from jax_sae.commands.process import run_script
from jax_sae.config import Config, TextConfig, validate
from jax_sae.config_tables import load_config
from jax_sae.errors import BadInput

BEGUN = time.perf_counter() - time.process_time()  # of this process: until here it did nothing but import
CONFIG = Path(__file__).parent.parent / "configs" / "tinystories_33m.toml"
TINYSTORIES_33M: dict[str, Any] = {
    "model_type": "gpt_neo",
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_layers": 4,
    "num_heads": 16,
    "max_position_embeddings": 2048,
    "window_size": 256,
    "attention_types": [[["global", "local"], 2]],
}
ROWS, SECONDS_BETWEEN = 4096, 0.5
"""Of the product [4096, D] x [D, D] that is the measure, and from one to the next."""
COMPILING, COMPARING, REST = "tracing and compiling", "jnp.dot, the measure", "the rest"


class Parts:
    """The seconds of the main thread, each moment in one part: the innermost that is running."""

    def __init__(self) -> None:
        """Begin with the process, in `REST`."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._now, self._since = REST, BEGUN

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs within it belongs to this part, unless another thread runs it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        outer = self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)

    def switch(self, name: str) -> str:
        """Go over to another part; returns the one before."""
        now, before = time.perf_counter(), self._now
        self.seconds[before] += now - self._since
        self._now, self._since = name, now
        return before

    def compiled(self, event: str, seconds: float, **_: Any) -> None:
        """Move seconds to `COMPILING`: JAX tells of them when they are over."""
        if event.startswith("/jax/core/compile/") and threading.current_thread() is threading.main_thread():
            self.seconds[self._now] -= seconds
            self.seconds[COMPILING] += seconds

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, in a part; a generator, while it makes its next value."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                found = function(*args, **kwargs)
            return values(found) if isinstance(found, Iterator) else found

        def values(iterator: Iterator[Any]) -> Iterator[Any]:
            while True:
                with self.part(name):
                    try:
                        value = next(iterator)
                    except StopIteration:
                        return
                yield value

        return call


def run_once(config: Config, out: Path) -> dict[str, Any]:
    """Train in this process, and return where its time went."""
    parts = Parts()
    parts.switch("imports")
    import jax
    import jax.numpy as jnp

    from jax_sae.activations import story_sources
    from jax_sae.language_model.text import Stories
    from jax_sae.run import report, train
    from jax_sae.run.checkpoints import Checkpoints
    from jax_sae.sweep.members import sweep_members

    jax.monitoring.register_event_duration_secs_listener(parts.compiled)
    parts.switch(COMPARING)
    D = TINYSTORIES_33M["hidden_size"]
    x, W = jax.random.normal(jax.random.key(0), (ROWS, D)), jax.random.normal(jax.random.key(1), (D, D))
    dot = jax.jit(jnp.dot)
    dot(x, W).block_until_ready()
    rates, compared = [], 0.0

    def compare() -> None:
        nonlocal compared
        if time.perf_counter() - compared > SECONDS_BETWEEN:
            with parts.part(COMPARING):
                begun = time.perf_counter()
                dot(x, W).block_until_ready()
                compared = time.perf_counter()
                rates.append(2 * ROWS * D * D / (compared - begun))

    compare()
    parts.switch(REST)
    operations, until_last_step = {"harvest": 0, "training": 0}, {"harvest": 0, "training": 0}
    harvested: list[int] = []
    marks: dict[str, dict[str, float]] = {}  # seconds of all parts so far
    features = sum(member.features for member in sweep_members(config.sweep))

    def mark(name: str) -> None:
        parts.switch(parts.switch(REST))  # counts up to now
        marks[name] = dict(parts.seconds)

    def harvest(models: Any, stories: Any, segments: Any) -> Iterator[tuple[int, Any]]:
        if not harvested:
            mark("first harvest")
        lengths = [len(story) for story in stories]
        harvested.append(sum(lengths))
        layers = sum(lm.layer for lm in models.values())
        operations["harvest"] += sum(layers * T * (24 * D * D + 4 * T * D) for T in lengths)
        for value in timed_harvest(models, stories, segments):
            compare()
            yield value

    def update_many(
        state: Any, x: jax.Array, weights: jax.Array, first: int, last: int, step: int, **settings: Any
    ) -> Any:
        if not operations["training"]:
            mark("first step")
        compare()
        with parts.part("training"):
            found = jax.block_until_ready(update(state, x, weights, first, last, step, **settings))
        operations["training"] += (last - first) * 10 * x.shape[1] * D * features
        until_last_step.update(operations)
        mark("last step")
        return found

    update, timed_harvest = train.update_many, parts.timed(story_sources.harvest_each, "harvest")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(patch.object(story_sources, "harvest_each", harvest))
        stack.enter_context(patch.object(train, "update_many", update_many))
        for where, name, part in [
            (train, "open_sources", "opening model, text, tokenizer"),
            (train, "inputs", "digests of what is read"),
            (train, "begin", "first values, normalisation"),
            (train, "harvest_held_out", "eigenvalues of held-out tokens"),
            (train, "batch_runs_in_pieces", "making batches"),
            (Stories, "read", "waiting for text"),
            (train, "save", "saving"),
            (Checkpoints, "__exit__", "saving"),
            (report.Log, "write", "logging"),
            (report, "finish", "closing table and figures"),
        ]:
            stack.enter_context(patch.object(where, name, parts.timed(getattr(where, name), part)))
        train.train(config, out, resume=False, stop_requested=lambda step: False)
    compared = 0.0
    compare()
    mark("end")
    facts = {"operations": operations, "until last step": sum(until_last_step.values())}
    return {"marks": marks, **facts, "rates": rates, "tokens": sum(harvested)}


def write_model(directory: Path) -> None:
    """Write random weights of TinyStories-33M's shapes, under the names of a Hugging Face checkpoint."""
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    D = TINYSTORIES_33M["hidden_size"]

    def weight(*shape: int) -> np.ndarray:
        return 0.02 * random.standard_normal(shape, np.float32)

    def layer_norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.ones(D, np.float32), f"{name}.bias": weight(D)}

    weights = {
        "wte.weight": weight(TINYSTORIES_33M["vocab_size"], D),
        "wpe.weight": weight(TINYSTORIES_33M["max_position_embeddings"], D),
        **layer_norm("ln_f"),
    }
    for i in range(TINYSTORIES_33M["num_layers"]):
        attention, mlp = f"h.{i}.attn.attention", f"h.{i}.mlp"
        weights |= {f"{attention}.{name}_proj.weight": weight(D, D) for name in ("q", "k", "v", "out")}
        weights |= {f"{attention}.out_proj.bias": weight(D)}
        weights |= {f"{mlp}.c_fc.weight": weight(4 * D, D), f"{mlp}.c_fc.bias": weight(4 * D)}
        weights |= {f"{mlp}.c_proj.weight": weight(D, 4 * D), f"{mlp}.c_proj.bias": weight(D)}
        weights |= layer_norm(f"h.{i}.ln_1") | layer_norm(f"h.{i}.ln_2")
    save_file({f"transformer.{name}": value for name, value in weights.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(TINYSTORIES_33M))


def main(
    text: str = TextConfig.path, tokenizer: str = "EleutherAI/gpt-neo-125M", steps: int = 128, rounds: int = 3
) -> int:
    """Print the parts of a run, and the fraction that the arithmetic would need.

    Args:
        text: Hugging Face id, directory or file of a dataset with one story a row.
        tokenizer: Hugging Face id or directory of a tokenizer with GPT-Neo's vocabulary.
        steps: optimiser steps of 1024 tokens; 128 use one block of stories.
        rounds: how many processes are run, one after another.
    """
    if rounds < 1:
        raise BadInput(f"--rounds is {rounds}; a number above 0 was expected")
    config = load_config(CONFIG)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        write_model(model)
        config = replace(
            config,
            model=replace(config.model, path=str(model)),
            text=replace(config.text, path=text, tokenizer=tokenizer),
            train=replace(config.train, steps=steps),
        )
        validate(config)
        for i in range(rounds):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found.append(pool.submit(run_once, config, Path(temporary) / f"run{i}").result())
    print_parts(found, steps)
    return 0


def print_parts(found: list[dict[str, Any]], steps: int) -> None:
    """Print a line for each part, and for the sums of parts that matter, of what `run_once` found in each round."""
    from timing import ratios, report, spread

    def between(first: str, last: str, name: str | None = None) -> list[float]:
        """Seconds of each round, of one part or of all but the measure."""
        spans = []
        for marks in (of_round["marks"] for of_round in found):
            passed = {part: s - marks.get(first, {}).get(part, 0.0) for part, s in marks[last].items()}
            spans.append(passed.get(name, 0.0) if name else sum(passed.values()) - passed[COMPARING])
        return spans

    rates = [statistics.median(of_round["rates"]) for of_round in found]
    limits = {
        name: [of_round["operations"][name] / rate for of_round, rate in zip(found, rates, strict=True)]
        for name in ("harvest", "training")
    }
    both = [of_round["until last step"] / rate for of_round, rate in zip(found, rates, strict=True)]
    whole = between("", "end")
    rows: list[dict[str, Any]] = []
    names = dict.fromkeys(
        name for of_round in found for name in of_round["marks"]["end"] if name not in (REST, COMPARING)
    )
    for name in [*names, REST]:
        of_part = between("", "end", name)
        row = {"part": name, "seconds": of_part, "of the whole": ratios(of_part, whole)}
        if name in limits:
            row |= {"limit": limits[name], "limit / seconds": ratios(limits[name], of_part)}
        rows.append(row)
    window = between("first harvest", "last step")
    compiling = between("first harvest", "last step", COMPILING)
    warm = [a - b for a, b in zip(window, compiling, strict=True)]
    for name, span in [
        ("= the whole", whole),
        ("start to first harvest", between("", "first harvest")),
        ("start to first step", between("", "first step")),
    ]:
        rows.append({"part": name, "seconds": span, "of the whole": ratios(span, whole)})
    for name, span in [("first harvest to last step", window), ("the same without compiling", warm)]:
        end_to_end = {"limit": both, "limit / seconds": ratios(both, span)}
        rows.append({"part": name, "seconds": span, "of the whole": ratios(span, whole), **end_to_end})
    report(
        "end_to_end",
        rows,
        steps=steps,
        rounds=len(found),
        tokens_harvested=found[0]["tokens"],
        jnp_dot_gflops=spread([rate / 1e9 for of_round in found for rate in of_round["rates"]]),
    )


if __name__ == "__main__":
    sys.exit(run_script(sys.argv[1:], lambda: tyro.cli(main)))
