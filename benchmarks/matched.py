"""The same autoencoder in SAELens, in dictionary_learning and here: from their defaults to our settings, step by step.

All are given the same rows, the same number of batches of B rows, each drawn without replacement within an epoch, and
are measured by NumPy on the same held-out rows. Each line changes one thing more of what the line above it has:

- as it comes: the library's defaults, on activations as they are (SAELens), or scaled so that the mean of |x|^2 is 1
  (dictionary_learning's `normalize_activations`); its warm-ups, which are longer than such short runs, a tenth of them.
- rate 1e-3: of SAELens alone, whose default is 3e-4.
- our rate: 0.1 / sqrt(F), warm-up over 1 % of the steps, a line to zero over the last 20 %, the penalty's warm-up 5 %.
- our rows: mean removed, mean of |x|^2 D. The penalty is scaled along, so that it asks for the same dictionary.
- our AuxK: of SAELens' topk: first directions of norm 1, weight 1/32, dead after a tenth of the run.

lambda is ours, in units of our rows. In units of raw activations the same penalty is lambda / scale.

dictionary_learning imports nnsight, of which its trainers need nothing: where it is absent, an empty module stands in.

    pip install -e '.[peers]'; pip install --no-deps dictionary_learning==0.1.0
    python benchmarks/matched.py                                                          # the embedded model
    python benchmarks/matched.py --activations activations/smollm2 --features 1152 --k 32 --steps 1000
"""

import io
import itertools
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from frontier import compare_with_peers, measure
from timing import report

import jax_sae
from jax_sae.activations.array_sources import open_activations
from jax_sae.activations.arrays import Rows
from jax_sae.errors import BadInput

WARMUP, DECAY, PENALTY_WARMUP = 0.01, 0.2, 0.05


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train one autoencoder in three libraries. Exit codes: 0 done, 2 bad input."""

    activations: str = ""
    """A store, or a file with one array [N, D]; empty: the embedded model's, after its 2nd block."""
    norm_limit: float = 0.0
    """Rows of a larger norm are left out; 0: none."""
    kinds: tuple[str, ...] = ("relu", "topk")
    """relu, topk or both."""
    features: int = 256
    """F."""
    k: int = 8
    """Of topk."""
    l1: float = 2.0
    """Lambda of relu, in units of our rows."""
    steps: int = 2000
    """Optimiser steps."""
    batch_tokens: int = 256
    """B."""
    held_out: int = 16_384
    """Rows to measure on."""
    only_matched: bool = False
    """Leave out the lines between a library's defaults and the last one."""
    seed: int = 0
    """Of initial values and of the order of rows."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def batches(x: np.ndarray, options: Options) -> Iterator[Any]:
    """Tensors [B, D], each row once an epoch."""
    import torch

    rows, B = torch.from_numpy(x), options.batch_tokens
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - B + 1, B):
            yield rows[order[start : start + B]]


def saelens(kind: str, x: np.ndarray, options: Options, rate: float, ours: bool, **settings: Any) -> Any:
    """SAELens' autoencoder, trained; `ours` is our schedule."""
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(options.seed)
    module, config = {
        "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    }[kind]
    window = settings.pop("dead_feature_window", 1000)
    if ours and kind == "relu":
        settings["l1_warm_up_steps"] = round(PENALTY_WARMUP * options.steps)
    sae = module(config(d_in=x.shape[1], d_sae=options.features, **settings))
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=options.steps * options.batch_tokens,
            train_batch_size_samples=options.batch_tokens,
            lr=rate,
            lr_end=rate / 10,  # its default; a constant schedule does not use it
            lr_warm_up_steps=round(WARMUP * options.steps) if ours else 0,
            lr_decay_steps=round(DECAY * options.steps) if ours else 0,
            dead_feature_window=window,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches(x, options),
    )
    with redirect_stderr(io.StringIO()):  # its progress bar
        trainer.fit()
    return sae


def dictionary_learning(kind: str, x: np.ndarray, options: Options, rate: float | None, ours: bool, l1: float) -> Any:
    """dictionary_learning's autoencoder, trained by its trainer; `ours` is our schedule."""
    if "nnsight" not in sys.modules and not find_spec("nnsight"):
        stands_in = types.ModuleType("nnsight")
        stands_in.__dict__["LanguageModel"] = object
        sys.modules["nnsight"] = stands_in
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    steps = options.steps
    common: dict[str, Any] = {
        "steps": steps,
        "activation_dim": x.shape[1],
        "dict_size": options.features,
        "layer": 0,
        "lm_name": "",
        "seed": options.seed,
        "device": "cpu",
        "warmup_steps": round((WARMUP if ours else 0.1) * steps),
        "decay_start": round((1 - DECAY) * steps) if ours else None,
    }
    if rate is not None:
        common["lr"] = rate
    if kind == "topk":
        trainer = TopKTrainer(k=options.k, **common)
    else:
        warmup = round((PENALTY_WARMUP if ours else 0.2) * steps)
        trainer = StandardTrainerAprilUpdate(l1_penalty=l1, sparsity_warmup_steps=warmup, **common)
    for step, batch in enumerate(itertools.islice(batches(x, options), steps)):
        trainer.update(step, batch)
    return trainer.ae


def compare(options: Options, path: str) -> None:
    """Train everything and print it."""
    import torch

    source, _ = open_activations(path)
    if not isinstance(source, Rows):
        raise BadInput(f"{path} holds stories; a store, or one array [N, D], was expected")
    rows = source.read(0, len(source))
    if options.norm_limit:
        rows = rows[np.linalg.norm(rows, axis=1) <= options.norm_limit]
    x, held_out = rows[: -options.held_out], rows[-options.held_out :]
    D, F = x.shape[1], options.features
    our_rate = 0.1 / F**0.5
    lines: list[dict[str, Any]] = []

    def add(kind: str, library: str, what: str, rate: float, start: float, rows: np.ndarray, sae: Any) -> None:
        def encode(x: np.ndarray) -> Any:
            return sae.encode(torch.from_numpy(x))

        processor = time.process_time() - start
        with torch.no_grad():
            its = (
                measure(rows, sae.encode, sae.decode, F)
                if library == "jax_sae"
                else measure(rows, encode, sae.decode, F)
            )
        line = {"kind": kind, "library": library, "settings": what, "rate": rate, "L0": its.l0, "FVU": its.fvu}
        lines.append(line | {"dead": its.dead, "processor seconds": processor})
        print(lines[-1], file=sys.stderr, flush=True)

    for kind in options.kinds:
        start = time.process_time()
        own: dict[str, Any] = {"k": options.k} if kind == "topk" else {"l1_coefficient": options.l1}
        with redirect_stdout(sys.stderr):
            run = jax_sae.train(
                activations=rows,
                held_out_tokens=options.held_out,
                kinds=kind,
                features=F,
                steps=options.steps,
                batch_tokens=options.batch_tokens,
                seeds=options.seed,
                quiet=True,
                **own,
            )
        sae = run[run.names[0]]
        add(kind, "jax_sae", "as it comes", our_rate, start, held_out, sae)
        mean, scale = np.asarray(sae.normalization.mean), float(sae.normalization.scale)
        as_ours = {id(x): (x - mean) * scale, id(held_out): (held_out - mean) * scale}
        root_mean_square = float(np.sqrt(np.mean(np.square(x).sum(1))))

        raw = {"l1_coefficient": options.l1 / scale} if kind == "relu" else {"k": options.k}
        normal = {"l1_coefficient": options.l1} if kind == "relu" else {"k": options.k}
        steps_of_saelens: list[tuple[str, float, bool, bool, dict[str, Any]]] = [
            ("as it comes", 3e-4, False, False, raw),
            ("rate 1e-3", 1e-3, False, False, raw),
            ("our rate", our_rate, True, False, raw),
            ("our rows", our_rate, True, True, normal),
        ]
        if kind == "topk":
            auxk = {"decoder_init_norm": 1.0, "aux_loss_coefficient": 1 / 32}
            window = {"dead_feature_window": max(1, options.steps // 10)}
            steps_of_saelens.append(("our AuxK", our_rate, True, True, normal | auxk | window))
        if options.only_matched:
            steps_of_saelens = [steps_of_saelens[0], steps_of_saelens[-1]]
        for what, rate, ours, normalised, settings in steps_of_saelens:
            start = time.process_time()
            its, held = (as_ours[id(x)], as_ours[id(held_out)]) if normalised else (x, held_out)
            add(kind, "SAELens", what, rate, start, held, saelens(kind, its, options, rate, ours, **settings))

        if find_spec("dictionary_learning"):
            default = 2e-4 / (F / 2**14) ** 0.5 if kind == "topk" else 1e-3
            scaled = options.l1 / (scale * root_mean_square)  # the same penalty where the mean of |x|^2 is 1
            of_dictionary_learning = [
                ("as it comes", default, False, x / root_mean_square, held_out / root_mean_square, scaled),
                ("our rate", our_rate, True, x / root_mean_square, held_out / root_mean_square, scaled),
                ("our rows", our_rate, True, as_ours[id(x)], as_ours[id(held_out)], options.l1),
            ]
            if options.only_matched:
                del of_dictionary_learning[1]
            for what, rate, ours, its, held, l1 in of_dictionary_learning:
                start = time.process_time()
                sae = dictionary_learning(kind, its, options, rate, ours, l1)
                add(kind, "dictionary_learning", what, rate, start, held, sae)
    report(
        "matched",
        lines,
        activations=options.activations or "embedded model",
        tokens=len(x),
        D=D,
        F=F,
        B=options.batch_tokens,
        steps=options.steps,
        torch_threads=torch.get_num_threads(),
    )


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return compare_with_peers(argv, "matched.py", Options, ("relu", "topk"), compare)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
