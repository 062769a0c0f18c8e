"""Transcoders find a sparse function from one space to another; crosscoders what two places share, and what not.

All are members of one sweep, beside an autoencoder, in one program. test_synthetic.py explains what short runs need.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from running import NO_CENTRES

from jax_sae.activations.places import Place
from jax_sae.autoencoder.model import row_norms
from jax_sae.config import Member, TrainConfig
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import METRICS, init_sweep, member_shapes, unstack, update_many

pytestmark = pytest.mark.long

D_IN, D_OUT, D_BOTH, TRUE_F, ACTIVE, F = 24, 20, 16, 32, 2, 64
B, BATCHES, STEPS = 128, 250, 1000
PLACES = [Place("0.mlp_in", D_IN), Place("0.mlp_out", D_OUT), Place("a", D_BOTH), Place("b", D_BOTH)]
MLP, BOTH = (("0.mlp_in",), ("0.mlp_out",)), (("a", "b"), ("a", "b"))
TRAIN = TrainConfig(steps=STEPS, batch_tokens=B, schedule="linear", decay=0.3)
KINDS = {
    "relu": {"kind": "relu", "l1_coefficient": 1.0},
    "topk": {"kind": "topk", "k": ACTIVE, "dead_after_tokens": 10 * B},
    "batchtopk": {"kind": "batchtopk", "k": ACTIVE, "dead_after_tokens": 10 * B},
}
MEMBERS = {
    **{f"transcoder {name}": {**its, "reads": MLP[0], "writes": MLP[1]} for name, its in KINDS.items()},
    "skip topk": {**KINDS["topk"], "reads": MLP[0], "writes": MLP[1], "skip": True},
    **{f"crosscoder {name}": {**its, "reads": BOTH[0], "writes": BOTH[1]} for name, its in KINDS.items()},
    "autoencoder": {**KINDS["topk"], "place": "0.mlp_in"},
}
SHARED, ONLY_A = 12, 22
"""True features of the crosscoder: the first 12 at both places, up to 22 at a alone, the others at b alone."""

Found = dict[str, tuple[dict[str, np.ndarray], np.ndarray]]
"""Of each member its parameters, and the metrics at the end."""


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of norm 1."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def drawn(rng: np.random.Generator) -> np.ndarray:
    """Sparse features [BATCHES * B, TRUE_F]: 2 of each token, uniform from 0.5 to 1.5."""
    which = np.argsort(rng.gumbel(size=(BATCHES * B, TRUE_F)), axis=1)[:, :ACTIVE]
    f = np.zeros((BATCHES * B, TRUE_F))
    np.put_along_axis(f, which, rng.uniform(0.5, 1.5, which.shape), 1)
    return f


def normalised(x: np.ndarray) -> np.ndarray:
    """Mean 0, and |x|^2 is D on average."""
    x = x - x.mean(0)
    return np.asarray(x * np.sqrt(x.shape[1] / np.square(x).sum(1).mean()), np.float32)


@pytest.fixture(scope="module")
def truth() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """True directions of what is written, and batches [BATCHES, B, sum of D]."""
    rng = np.random.default_rng(0)
    read, written = (unit(rng.normal(size=(TRUE_F, D))) for D in (D_IN, D_OUT))
    a, b = (unit(rng.normal(size=(TRUE_F, D_BOTH))) for _ in range(2))
    a[ONLY_A:], b[SHARED:ONLY_A] = 0, 0
    f, g = drawn(rng), drawn(rng)
    x = np.concatenate([normalised(part) for part in (f @ read, f @ written, g @ a, g @ b)], axis=1)
    return {"transcoder": written, "crosscoder": np.concatenate([a, b], axis=1)}, x.reshape(BATCHES, B, -1)


@pytest.fixture(scope="module")
def found(truth: tuple[dict[str, np.ndarray], np.ndarray]) -> Found:
    """All of them, trained side by side."""
    names = {complete(Member(F, learning_rate=3e-3, **its)): name for name, its in MEMBERS.items()}  # type: ignore[arg-type]
    groups = make_groups(tuple(names), PLACES)
    forms, x = tuple(group.form for group in groups), jnp.asarray(truth[1])
    width, weights = x.shape[-1], jnp.ones(x.shape[:2])
    state = init_sweep(groups, width, TRAIN, NO_CENTRES)
    for step in range(0, STEPS, BATCHES):
        state, metrics = update_many(state, x, weights, 0, BATCHES, step, forms=forms, train=TRAIN)
    members = [member for group in groups for member in group.members]
    states = [
        each
        for group, stacked in zip(groups, state, strict=True)
        for each in unstack(stacked, member_shapes(group, width, TRAIN))
    ]
    return {
        names[member]: (dict(each.params), np.asarray(metrics[:, i].mean(0)))  # type: ignore[arg-type]
        for i, (member, each) in enumerate(zip(members, states, strict=True))
    }


@pytest.mark.parametrize("name", [name for name in MEMBERS if "coder " in name])
def test_the_true_directions_are_recovered(
    name: str, truth: tuple[dict[str, np.ndarray], np.ndarray], found: Found
) -> None:
    """At least 90 % of 32 in 20 dimensions, or in twice 16, at a cosine above 0.9."""
    params, metrics = found[name]
    true = unit(truth[0][name.split()[0]])
    cosines = np.max(true @ unit(params["W_dec"] + 1e-9).T, axis=1)
    assert np.mean(cosines > 0.9) >= 0.9
    assert metrics[METRICS.index("loss_per_element")] < 0.1
    assert ACTIVE * 0.9 < metrics[METRICS.index("l0")] < ACTIVE * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_crosscoder_tells_shared_from_private(
    kind: str, truth: tuple[dict[str, np.ndarray], np.ndarray], found: Found
) -> None:
    """The part of a direction's norm that is at a: about a half of shared ones, near 1 and 0 of private ones."""
    W_dec = np.asarray(found[f"crosscoder {kind}"][0]["W_dec"])
    best = np.argmax(unit(truth[0]["crosscoder"]) @ unit(W_dec + 1e-9).T, axis=1)
    at_a, at_b = (np.asarray(row_norms(jnp.asarray(part)))[best] for part in np.split(W_dec, 2, axis=1))
    part_of_a = at_a / (at_a + at_b)
    for its, low, high in (
        (slice(0, SHARED), 0.3, 0.7),
        (slice(SHARED, ONLY_A), 0.8, 1),
        (slice(ONLY_A, None), 0, 0.2),
    ):
        assert np.mean((part_of_a[its] >= low) & (part_of_a[its] <= high)) >= 0.8


def test_a_skip_loses_no_more(found: Found) -> None:
    """Beside the same transcoder without it; W_skip begins at 0 and is learnt."""
    with_skip, without = (
        found[name][1][METRICS.index("loss_per_element")] for name in ("skip topk", "transcoder topk")
    )
    assert with_skip < 1.1 * without and np.any(found["skip topk"][0]["W_skip"])
