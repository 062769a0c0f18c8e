"""A run with sparse members, and what is read of its held-out stories."""

from pathlib import Path

import pytest

import jax_sae


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one kind, of another one member; each story is normalised by itself, without its first token."""
    out = tmp_path_factory.mktemp("runs") / "run"
    jax_sae.train(
        "demo_sparse",
        out=out,
        quiet=True,
        members=[
            jax_sae.Member(96, kind="topk", k=2),
            jax_sae.Member(96, kind="topk", k=2, seed=1),
            jax_sae.Member(32, kind="relu", l1_coefficient=1.0),
        ],
        kinds=(),
        features=(),
        l1_coefficient=(),
        target_l0=(),
        k=(),
        normalization="story",
        exclude_first_tokens=1,
        block_tokens=2048,
        held_out_tokens=2000,
        steps=24,
        batch_tokens=256,
        log_every=24,
    )
    return out
