"""FVU at equal L0 and equal tokens: each kind with its defaults beside SAELens's, on the same activations.

SAELens 6.54 trains each kind with its own defaults (constant rate, no normalisation, gradients clipped to 1) at each of
`--rates`, and the rate with the lower FVU counts. Ours are trained in one run with the defaults of this package. Both
see the same number of batches of B rows, drawn without replacement within an epoch, of the same rows, and both are
measured by NumPy on the same held-out rows, in the scale of the activations: FVU, mean number of active features, and
features that are active on none of these rows. batchtopk and matryoshka are measured as they are used, with their
threshold.

Kinds with a number of active features are given the same one. Those with a penalty are trained at several strengths,
and log FVU is interpolated between the two nearest, linear in log L0, at the L0 that SAELens reached; where that is
outside of ours there is no number.

    pip install -e '.[peers]'
    python benchmarks/frontier.py                                                   # the embedded model
    python benchmarks/frontier.py --activations acts/smollm2 --features 1152        # a store, as exported from torch
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from timing import report

from jax_sae.activations.array_sources import open_activations
from jax_sae.activations.arrays import Rows
from jax_sae.commands.flags import read_options
from jax_sae.commands.process import run_script
from jax_sae.config import ActivationsConfig, Config, Member, SweepConfig, TrainConfig
from jax_sae.errors import BadInput

KINDS = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
PENALISED = ("relu", "gated")
MATRYOSHKA_PARTS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare FVU at equal L0 with SAELens. Exit codes: 0 done, 2 bad input."""

    activations: str = ""
    """A store, or a file with one array [N, D]; empty: the embedded model's, after its 2nd block."""
    kinds: tuple[str, ...] = KINDS
    """Which kinds."""
    features: int = 256
    """F."""
    steps: int = 2000
    """Optimiser steps."""
    batch_tokens: int = 1024
    """B."""
    k: int = 32
    """Active features a token, for the kinds that are told, and jumprelu's target."""
    peer_l1: tuple[float, ...] = (5.0,)
    """SAELens's l1_coefficient, for relu and gated, in the scale of the activations."""
    l1: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Ours, between which is interpolated."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """SAELens's learning rates, the better of which counts."""
    learning_rate: float | None = None
    """Ours; without it, the default."""
    seed: int = 0
    """Of initial values and of the order of rows."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


class Reached(NamedTuple):
    """What an autoencoder reached on the held-out rows."""

    l0: float
    fvu: float
    dead: int


def measure(x: np.ndarray, encode: Callable[[np.ndarray], Any], decode: Callable[[Any], Any], features: int) -> Reached:
    """FVU, L0 and dead features on held-out rows x[N, D]; sums in float64."""
    squared_error, fired = 0.0, np.zeros(features, np.int64)
    for start in range(0, len(x), ROWS_AT_A_TIME):
        rows = x[start : start + ROWS_AT_A_TIME]
        f = encode(rows)
        squared_error += float(np.square(rows.astype(np.float64) - np.asarray(decode(f), np.float64)).sum())
        fired += np.count_nonzero(np.asarray(f), axis=0)
    centred = x - x.mean(0, dtype=np.float64)
    fvu = squared_error / float(np.square(centred).sum())
    return Reached(float(fired.sum() / len(x)), fvu, int(np.sum(fired == 0)))


def saelens(kind: str, value: float, rate: float, x: np.ndarray, held_out: np.ndarray, options: Options) -> Reached:
    """Train SAELens's autoencoder of a kind with its defaults; `value` is its k, target L0 or l1_coefficient."""
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    B, F = options.batch_tokens, options.features
    widths = sorted({max(1, round(part * F)) for part in MATRYOSHKA_PARTS})
    classes: Mapping[str, tuple[Any, Any, dict[str, Any]]] = {
        "relu": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": value}),
        "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {"l1_coefficient": value}),
        "jumprelu": (
            JumpReLUTrainingSAE,
            JumpReLUTrainingSAEConfig,
            {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": value},
        ),
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": int(value)}),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": value}),
        "matryoshka": (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": value, "matryoshka_widths": widths},
        ),
    }
    torch.manual_seed(options.seed)
    module, settings, own = classes[kind]
    sae = module(settings(d_in=x.shape[1], d_sae=F, device="cpu", **own))
    rows = torch.from_numpy(x)

    def batches() -> Iterator[Any]:
        generator = torch.Generator().manual_seed(options.seed)
        while True:
            order = torch.randperm(len(rows), generator=generator)
            for start in range(0, len(rows) - B + 1, B):
                yield rows[order[start : start + B]]

    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=options.steps * B,
            train_batch_size_samples=B,
            lr=rate,
            lr_end=rate / 10,  # its default; a constant schedule does not use it
            device="cpu",
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches(),
    )
    with redirect_stderr(io.StringIO()):  # its progress bar
        trainer.fit()

    def encode(x: np.ndarray) -> Any:
        x_torch = torch.from_numpy(x)
        if hasattr(sae, "topk_threshold"):  # as it is saved for use
            pre = torch.relu(sae.process_sae_in(x_torch) @ sae.W_enc + sae.b_enc)
            if sae.cfg.rescale_acts_by_decoder_norm:
                pre = pre * sae.W_dec.norm(dim=-1)
            return torch.where(pre > sae.topk_threshold, pre, 0.0).to(pre.dtype)
        f = sae.encode(x_torch)
        return f.to_dense() if f.is_sparse else f

    with torch.no_grad():
        return measure(held_out, encode, sae.decode, F)


def ours(path: str, wanted: Mapping[str, Sequence[Member]], held_out: np.ndarray, options: Options) -> dict[str, Any]:
    """Train all members in one run; what each reached, by kind."""
    from jax_sae.run.load import load_autoencoder
    from jax_sae.run.train import train

    members = tuple(member for of_kind in wanted.values() for member in of_kind)
    config = Config(
        activations=ActivationsConfig(path=path, held_out_tokens=len(held_out)),
        sweep=SweepConfig(members=members),
        train=TrainConfig(
            steps=options.steps,
            batch_tokens=options.batch_tokens,
            checkpoint_every=options.steps,
            seed=options.seed,
        ),
    )
    found: dict[str, list[Reached]] = {}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        with redirect_stdout(sys.stderr):
            train(config, out, resume=False, stop_requested=lambda step: False)
        from jax_sae.sweep.members import member_names, sweep_members

        for name, member in zip(member_names(sweep_members(config.sweep)), members, strict=True):
            sae = load_autoencoder(out, name=name)
            found.setdefault(member.kind, []).append(measure(held_out, sae.encode, sae.decode, options.features))
    return found


def at_l0(points: Sequence[Reached], l0: float) -> tuple[float, float] | None:
    """FVU and dead features between the two nearest points; None outside of them. One point is taken as it is."""
    if len(points) == 1:
        return points[0].fvu, points[0].dead
    ordered = sorted(points)
    if not ordered[0].l0 <= l0 <= ordered[-1].l0:
        return None
    logs = np.log([point.l0 for point in ordered])
    fvu = float(np.exp(np.interp(np.log(l0), logs, np.log([point.fvu for point in ordered]))))
    return fvu, float(np.interp(np.log(l0), logs, [point.dead for point in ordered]))


def demo_rows(directory: Path) -> str:
    """Activations of the embedded model on its stories, as a file."""
    from jax_sae.language_model.dataset import open_split
    from jax_sae.language_model.harvest import harvest
    from jax_sae.language_model.pretrained import load_language_model
    from jax_sae.language_model.text import Stories

    lm = load_language_model("jax_sae/demo/model", 2)
    rows = open_split("jax_sae/demo/stories", "train", "text")
    stories = Stories(
        rows, "text", lm.tokenizer, lm.model.architecture.max_position_embeddings, lm.model.architecture.vocab_size
    )
    token_ids = [story.token_ids for story in stories.read(range(len(stories)))]
    found = [np.zeros((0, lm.width), np.float32) for _ in token_ids]
    for i, x in harvest(lm.model, lm.places, lm.params, token_ids):
        found[i] = np.array(x)
    np.save(directory / "demo.npy", np.concatenate(found))
    return str(directory / "demo.npy")


def compare(options: Options, path: str) -> None:
    """Train everything and print it."""
    rows, _ = open_activations(path)
    if not isinstance(rows, Rows):
        raise BadInput(f"{path} holds stories; a store, or one array [N, D], was expected")
    n_held_out = min(65_536, len(rows) // 10)
    x, held_out = rows.read(0, len(rows) - n_held_out), rows.read(len(rows) - n_held_out, len(rows))
    theirs: dict[tuple[str, float], list[tuple[float, Reached]]] = {}
    for kind in options.kinds:
        for value in options.peer_l1 if kind in PENALISED else (float(options.k),):
            for rate in options.rates:
                start = time.perf_counter()
                reached = saelens(kind, value, rate, x, held_out, options)
                print(
                    f"SAELens {kind} {value:g}, rate {rate:g}: L0 {reached.l0:.1f}, FVU {reached.fvu:.4f}, dead "
                    f"{reached.dead}, {time.perf_counter() - start:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
                theirs.setdefault((kind, value), []).append((rate, reached))
    best = {which: min(of_rates, key=lambda pair: pair[1].fvu) for which, of_rates in theirs.items()}
    base = Member(options.features, seed=options.seed)
    if options.learning_rate is not None:
        base = replace(base, learning_rate=options.learning_rate)
    wanted: dict[str, list[Member]] = {}
    for kind in options.kinds:
        if kind in PENALISED:
            wanted[kind] = [replace(base, kind=kind, l1_coefficient=value) for value in options.l1]
        elif kind == "jumprelu":
            reached = best[kind, float(options.k)][1].l0
            target = reached if reached < options.features / 2 else options.k  # theirs may miss it: equal L0 counts
            wanted[kind] = [replace(base, kind=kind, target_l0=part * target) for part in (0.8, 1.0, 1.25)]
        else:
            wanted[kind] = [replace(base, kind=kind, k=options.k)]
    found = ours(path, wanted, held_out, options)
    lines = []
    for (kind, value), (rate, reached) in best.items():
        line: dict[str, Any] = {"kind": kind, "SAELens at": value, "rate": rate}
        line |= {"L0": reached.l0, "FVU": reached.fvu, "dead": reached.dead}
        if (mine := at_l0(found[kind], reached.l0)) is not None:
            line |= {"our FVU": mine[0], "our dead": mine[1], "ours / theirs": mine[0] / reached.fvu}
        line["our points (L0, FVU, dead)"] = "; ".join(f"{p.l0:.1f} {p.fvu:.4f} {p.dead}" for p in found[kind])
        lines.append(line)
    report(
        "frontier",
        lines,
        activations=options.activations or "embedded model",
        tokens=len(x),
        D=x.shape[1],
        F=options.features,
        B=options.batch_tokens,
        steps=options.steps,
    )


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return compare_with_peers(argv, "frontier.py", Options, KINDS, compare)


def compare_with_peers(
    argv: Sequence[str], script: str, options: type[Any], known: Sequence[str], compare: Callable[[Any, Any], None]
) -> int:
    """A command line whose options have `kinds` and `activations`, where the peers are there; returns the exit code."""

    def work() -> int:
        read = read_options(options, argv, script)
        if missing := [name for name in ("torch", "sae_lens") if find_spec(name) is None]:
            raise BadInput(f"{' and '.join(missing)} cannot be imported; run pip install -e '.[peers]'")
        if unknown := sorted(set(read.kinds) - set(known)):
            raise BadInput(f"--kinds has {', '.join(unknown)}; known are {', '.join(known)}")
        with tempfile.TemporaryDirectory() as directory:
            compare(read, read.activations or demo_rows(Path(directory)))
        return 0

    return run_script(argv, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
