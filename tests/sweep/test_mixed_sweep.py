"""Kinds, widths, penalties and schedules side by side in one sweep: each member is what it is alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import NO_CENTRES

from jax_sae.config import Member, TrainConfig
from jax_sae.sweep import update
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import METRICS, MemberState, init_sweep, member_shapes, unstack, update_many

D, B, STEPS, TOKENS = 24, 32, 16, 29
TRAIN = TrainConfig(steps=STEPS, batch_tokens=B, schedule="cosine", warmup=0.25, penalty_warmup=0.5)
DEAD_SOON = TOKENS
"""Dead are those that did not fire in the last batch."""
NEVER = 10**6
MEMBERS = tuple(
    complete(replace(member, dead_after_tokens=member.dead_after_tokens or NEVER))
    for member in (
        Member(23, 1, 3e-3, "relu", l1_coefficient=0.2),
        Member(24, 2, 1e-2, "relu", initialization="transposed", initial_norm=0.1, schedule="linear", decay=0.5),
        Member(23, 0, 3e-3, "topk", k=2, dead_after_tokens=DEAD_SOON),
        Member(24, 1, 1e-3, "topk", k=9, warmup=0.0),
        Member(128, 0, 3e-3, "topk", k=2, dead_after_tokens=DEAD_SOON),  # without dense work, on a CPU
        Member(131, 1, 1e-3, "topk", k=2),
        Member(23, 3, 1e-3, "batchtopk", k=3, schedule="constant", dead_after_tokens=DEAD_SOON),
        Member(24, 1, 3e-3, "batchtopk", k=2),
        Member(24, 1, 3e-3, "matryoshka", k=6, auxk_coefficient=0.0),
        Member(23, 1, 1e-2, "jumprelu", target_l0=4.0, initial_threshold=0.6, dead_after_tokens=DEAD_SOON, resamples=2),
        Member(24, 0, 3e-3, "jumprelu", l0_coefficient=0.01, initial_threshold=0.1, penalty_warmup=0.1, resamples=2),
        Member(23, 2, 3e-3, "gated", l1_coefficient=0.3, penalty_warmup=0.0),
        Member(24, 0, 1e-2, "gated", l1_coefficient=0.1),
    )
)
X = jax.random.normal(jax.random.key(0), (STEPS, B, D)) * jnp.geomspace(4, 0.05, D)
"""So uneven that some features never are among the largest."""
WEIGHTS = jnp.ones((STEPS, B)).at[:, TOKENS:].set(0)

Results = dict[Member, tuple[MemberState, np.ndarray]]
"""Each member's final state, trimmed to its own width, and its metrics [STEPS, 3]."""


def trained(members: Sequence[Member]) -> Results:
    """Every member after all steps on the same batches, in one program."""
    groups = make_groups(members)
    state, metrics = update_many(
        init_sweep(groups, D, TRAIN, NO_CENTRES),
        X, WEIGHTS, 0, STEPS, 0, forms=tuple(group.form for group in groups), train=TRAIN,
    )  # fmt: skip
    results: Results = {}
    for group, stacked in zip(groups, state, strict=True):
        for member, its in zip(group.members, unstack(stacked, member_shapes(group, D, TRAIN)), strict=True):
            results[member] = its, np.asarray(metrics[:, len(results)])
    return results


@pytest.fixture(scope="module")
def alone() -> Results:
    """The padded members, and one beside which another is padded, each in a sweep of its own."""
    groups = [group.members for group in make_groups(MEMBERS)]
    return {each: trained((each,))[each] for each in (*(members[0] for members in groups), groups[-1][-1])}


def test_the_members_need_what_they_are_here_for(alone: Results) -> None:
    """Six kinds; F = 23 stands beside 24, but in matryoshka; AuxK acted, and features were resampled."""
    groups = {(group.members[0].kind, *(member.features for member in group.members)) for group in make_groups(MEMBERS)}
    assert groups == {
        ("relu", 23, 24), ("topk", 23, 24), ("topk", 128, 131), ("batchtopk", 23, 24), ("matryoshka", 24),
        ("jumprelu", 23, 24), ("gated", 23, 24),
    }  # fmt: skip
    for member, (state, metrics) in alone.items():
        assert not state.diverged and np.all(np.isfinite(metrics))
        assert metrics[-1, METRICS.index("l0")] > 0
        if member.kind in ("topk", "batchtopk"):  # whose penalty is AuxK alone
            assert np.any(metrics[:, METRICS.index("penalty_per_element")] > 0)
    [resampled] = [member for member in alone if member.resamples]
    silent = alone[resampled][0].memory["tokens_since_fired"]
    assert np.max(silent) == 5 * TOKENS  # since the second of two times in 16 steps


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX says that it computes on this one; what is compiled for another one is not used for it."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    update._update_many.clear_cache()
    yield
    update._update_many.clear_cache()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=pytest.mark.long)], indirect=True)
@pytest.mark.usefixtures("backend")
def test_every_member_equals_its_solo_run(alone: Results) -> None:
    """Parameters, moments, what it remembers and metrics to 1e-5: members in turn, and by vmap, as accelerators do."""
    together = trained(MEMBERS)
    for member, (expected, metrics) in alone.items():
        state, its_metrics = together[member]
        np.testing.assert_allclose(its_metrics, metrics, rtol=1e-5, atol=1e-5, err_msg=str(member))
        for (path, a), b in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True):
            assert a.shape == b.shape
            largest = max(1.0, float(np.abs(b).max()))  # averages of gradients are sums of terms that cancel
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest, err_msg=f"{member} {path}")
