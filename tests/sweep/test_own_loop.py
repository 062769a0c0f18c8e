"""The loops of docs/own_loop.md, taken out of that page."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from running import REPOSITORY

from jax_sae.sweep.update import init_sweep, update_many

MANY, ONE = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "own_loop.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's names mean after both loops; x are sums of three of 24 directions, far from 0 and from norm 1."""
    rng = np.random.default_rng(1)
    directions, active = rng.normal(size=(24, 16)), rng.random((8192, 24)).argsort(1) < 3
    x = 50 + 7 * (active * rng.uniform(0.5, 1.5, active.shape)) @ directions
    names: dict[str, Any] = {"x": x.astype(np.float32)}
    exec(MANY, names)
    exec(ONE, names)
    return names


def test_it_ends_in_autoencoders_that_know_their_scale(page: dict[str, Any]) -> None:
    """All but 8 % of the variance is explained, by topk with three features a token."""
    x, saes = page["x"], page["saes"]
    assert list(saes) == ["topk-F64", "relu-F64"]
    for sae in saes.values():
        fvu = np.square(sae(x) - x).sum() / np.square(x - x.mean(0)).sum()
        assert fvu < 0.08, f"{sae} {fvu}"
    features = np.asarray(saes["topk-F64"].encode(x))
    assert (features > 0).sum(1).max() <= 3 and np.array_equal(page["x_hat"], saes["topk-F64"](x))


def test_one_step_at_a_time_gives_what_many_do(page: dict[str, Any]) -> None:
    """The state of the member after ten steps, and what is told of the last."""
    groups, train, rows, B = (page[name] for name in ("groups", "train", "rows", "B"))
    state, metrics = update_many(
        init_sweep(groups, page["D"], train, page["centres"]),
        rows.reshape(-1, B, page["D"]), page["weights"], 0, 10, 0, forms=page["forms"], train=train,
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(page["one"]), jax.tree.leaves(state[0]), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([page[name] for name in ("error", "penalty", "l0")], metrics[9, 0], rtol=1e-4)
