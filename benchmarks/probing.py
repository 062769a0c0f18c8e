"""What sparse probes cost once activations are there: sets x numbers of columns x members, on random activations.

Rows of both labels differ a little in some entries. Beside the seconds by the clock stand those of the process on all
cores together, which other work on the machine changes less.

    python benchmarks/probing.py
    python benchmarks/probing.py --width 576 --features 1024 --sets 10
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from timing import report

from jax_sae.activations.normalize import Normalization, identity
from jax_sae.analysis.labelled_texts import TextSet
from jax_sae.analysis.probes import split
from jax_sae.analysis.probing import KS, MOST_TEXTS, probe_members
from jax_sae.autoencoder.kinds import kind_named
from jax_sae.autoencoder.model import init_params
from jax_sae.config import Config, Member
from jax_sae.trained import Origin, TrainedAutoencoder


def random_member(width: int, features: int, seed: int) -> TrainedAutoencoder:
    """A batchtopk autoencoder at its start, at a place."""
    name = f"member {seed}"
    return TrainedAutoencoder(
        params=init_params(kind_named("batchtopk")(width, features, initialization="transposed"), seed),
        memory={"threshold": jnp.float32(1.5)},
        settings={},
        normalization=Normalization(*map(jnp.asarray, identity(width))),
        kind="batchtopk",
        origin=Origin(name, 0, Member(features, kind="batchtopk", k=8), Config(), place="1.resid_post"),
    )


def main(sets: int = 113, texts: int = 1500, members: int = 18, width: int = 64, features: int = 256) -> None:
    """Print seconds.

    Args:
        sets: of labelled texts.
        texts: of each set.
        members: of batchtopk.
        width: D.
        features: F.
    """
    rng = np.random.default_rng(0)
    labelled: list[TextSet] = []
    rows: list[Any] = []
    x: list[np.ndarray] = []
    for i in range(sets):
        labels = rng.random(texts) < 0.5
        labelled.append(TextSet(f"set {i}", [""] * texts, labels, ("0", "1")))
        rows.append(split(labels, MOST_TEXTS))
        taken = np.concatenate(rows[-1])
        shift = rng.normal(size=width) * (rng.random(width) < 0.1)
        x.append((rng.normal(size=(len(taken), width)) + labels[taken, None] * shift).astype(np.float32))
    saes = {f"member {seed}": random_member(width, features, seed) for seed in range(members)}
    clock, process = time.perf_counter(), time.process_time()
    found = probe_members(saes, labelled, rows, {"1.resid_post": x}, KS)
    seconds = {"seconds": time.perf_counter() - clock, "of all cores": time.process_time() - process}
    mean_auc = np.mean([each["mean_auc"][str(KS[-1])] for each in found["members"]])
    shape = {"sets": sets, "texts": texts, "ks": len(KS), "members": members, "D": width, "F": features}
    row = {**shape, **seconds, "mean AUC": float(mean_auc)}
    report("probing", [row], backend=jax.default_backend(), compiled="within the time")


if __name__ == "__main__":
    tyro.cli(main)
