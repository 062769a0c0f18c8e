"""A trained autoencoder is a pytree of floats with pure methods: what JAX does to functions can be done to it."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_sae.activations.normalize import Normalization, identity
from jax_sae.autoencoder.kinds import kind_named, kind_names
from jax_sae.autoencoder.model import init_params
from jax_sae.config import Config, Member
from jax_sae.errors import BadInput
from jax_sae.trained import Origin, TrainedAutoencoder

D, F, T = 8, 20, 6
X = (np.random.default_rng(0).normal(size=(T, D)) * 3 + 1).astype(np.float32)
EVERY = [*((kind, False) for kind in kind_names() if kind != "matryoshka"), ("relu", True)]
"""But for matryoshka, which encodes as batchtopk does, and differs in training."""
every = pytest.mark.parametrize(("kind", "per_story"), EVERY, ids=[f"{k}-story" if s else k for k, s in EVERY])


def made(kind: str, per_story: bool = False, seed: int = 0, k: int = 3, features: int = F) -> TrainedAutoencoder:
    """An autoencoder with random parameters, made by hand."""
    start = init_params(kind_named(kind)(D, features), seed)
    params = {name: value + 0.2 * jax.random.normal(jax.random.key(seed), value.shape) for name, value in start.items()}
    fitted = Normalization(jnp.linspace(-1.0, 2.0, D) + seed, jnp.float32(0.7))
    return TrainedAutoencoder(
        params=params,
        memory={"threshold": jnp.float32(0.3 + seed / 10)} if kind == "batchtopk" else {},
        settings={"k": jnp.float32(k)} if kind == "topk" else {},
        normalization=Normalization(*map(jnp.asarray, identity(D))) if per_story else fitted,
        kind=kind,
        per_story=per_story,
        exclude_first_tokens=1,
        origin=Origin(f"{kind}-{seed}", seed, Member(features, seed, kind=kind), Config()),
    )


def close(found: Any, expected: Any, atol: float = 2e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@every
def test_jit_vmap_and_shapes(kind: str, per_story: bool) -> None:
    """Of its methods, and of functions that it is an argument of: as without a transform."""
    sae = made(kind, per_story)
    features = sae.encode(X)
    assert 0 < np.mean(features > 0) < 1
    close(jax.jit(sae.encode)(X), features)
    close(jax.jit(lambda sae, x: sae.encode(x))(sae, X), features)
    close(jax.jit(lambda sae, x: sae(x))(sae, X), sae(X))
    close(jax.jit(lambda sae, x: sae.decode(features, story=x))(sae, X), sae(X))
    stories = np.stack([X, X[::-1] * 2])
    close(jax.vmap(sae.encode)(stories), np.stack([sae.encode(story) for story in stories]))
    if not per_story:
        close(jax.vmap(sae.encode)(X), features)
    assert jax.eval_shape(sae, jax.ShapeDtypeStruct((9, D), jnp.float16)).shape == (9, D)
    assert "dot_general" in str(jax.make_jaxpr(sae.encode)(X))


@every
def test_gradients(kind: str, per_story: bool) -> None:
    """With respect to x, by forward and reverse mode and by differences; with respect to all of its own numbers."""
    sae, direction = made(kind, per_story), np.float32(np.random.default_rng(1).normal(size=X.shape))

    def f(x: Any) -> jax.Array:
        return jnp.sum(jnp.sin(sae(x)))

    gradient, step = jax.grad(f)(X), 1e-3
    _, forward = jax.jvp(f, (X,), (direction,))
    assert forward == pytest.approx(float(jnp.sum(gradient * direction)), rel=1e-3, abs=1e-3)
    differences = (f(X + step * direction) - f(X - step * direction)) / (2 * step)
    assert forward == pytest.approx(float(differences), rel=0.05, abs=0.05)
    of_sae = jax.grad(lambda sae: jnp.sum(jnp.sin(sae(X))))(sae)
    assert jax.tree.structure(of_sae) == jax.tree.structure(sae)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_sae))
    assert np.any(of_sae.params["W_enc"] != 0) and np.any(of_sae.params["W_dec"] != 0)


@pytest.mark.long
@every
def test_stacked_ones_are_mapped_and_scanned(kind: str, per_story: bool) -> None:
    """Members that differ only in numbers: parameters, threshold, k, normalisation, name and step."""
    saes = [made(kind, per_story, seed, k) for seed, k in ((0, 3), (1, 17), (2, F))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *saes)
    assert (stacked.width, stacked.features) == (D, F)
    expected = np.stack([sae.encode(X) for sae in saes])
    close(jax.vmap(lambda sae: sae.encode(X))(stacked), expected)
    close(jax.lax.scan(lambda same, sae: (same, sae.encode(X)), saes[0], stacked)[1], expected)
    close(jax.tree.map(lambda leaf: leaf[1], stacked)(X), saes[1](X))
    with pytest.raises(BadInput, match="W_enc with 3 axes: several are stacked"):
        stacked.encode(X)


@every
def test_copies_and_other_precisions(kind: str, per_story: bool) -> None:
    """Copies are the same; in bfloat16 it computes in float32, with what bfloat16 has left of its numbers."""
    sae = made(kind, per_story)
    for same in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), replace(sae), jax.device_put(sae)):
        assert np.array_equal(same(X), sae(X)) and (same.name, same.step) == (sae.name, sae.step)
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sae)
    exactly = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), coarse)
    assert coarse.encode(X).dtype == jnp.float32 and np.array_equal(coarse(X), exactly(X))
    assert jax.tree.map(np.asarray, sae)(X).dtype == jnp.float32
    close(jax.jit(lambda sae, x: sae(x))(coarse, X), coarse(X))
    assert {leaf.dtype for leaf in jax.tree.leaves(sae)} == {jnp.dtype("float32")}


def test_any_k_gives_the_same_bits_known_or_traced() -> None:
    """Also where several features are equal, and where fewer than k are above 0."""
    F, x = 300, np.round(np.random.default_rng(0).normal(size=(5, D)).astype(np.float32))
    sae = made("topk", features=F)
    sae = replace(
        sae, normalization=identity(D), params=jax.tree.map(jnp.round, jax.tree.map(lambda p: 2 * p, sae.params))
    )
    traced = jax.jit(lambda sae, x: sae.encode(x))
    for k in (1, 16, 17, 64, 65, 256, 257, 300):
        of_k = replace(sae, settings={"k": jnp.float32(k)})
        assert np.array_equal(traced(of_k, x), of_k.encode(x)), k
        assert (np.asarray(of_k.encode(x)) > 0).sum(1).max() <= k
    assert traced._cache_size() == 1


def test_a_k_that_would_be_another_one_in_fewer_bits_is_refused() -> None:
    """bfloat16 has whole numbers up to 256."""

    def to_bfloat16(sae: TrainedAutoencoder) -> TrainedAutoencoder:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sae)

    assert to_bfloat16(made("topk", k=255, features=300)).settings["k"] == 255
    with pytest.raises(BadInput, match=r"k may not be the same in bfloat16, .* up to 256 only: convert sae.params"):
        to_bfloat16(made("topk", k=257, features=300))


def test_no_label_stands_on_what_is_another_one() -> None:
    """One program serves all members of a form; what it gives back is not called by the first one's name."""
    a, b = made("relu", seed=1), made("relu", seed=2)
    traces = []

    @jax.jit
    def half(sae: TrainedAutoencoder) -> TrainedAutoencoder:
        traces.append(sae)
        assert sae.name == "the relu autoencoder"
        return jax.tree.map(lambda leaf: leaf / 2, sae)

    half(a)
    of_b = half(b)
    assert len(traces) == 1 and of_b.name == "the relu autoencoder"
    close(of_b.params["W_enc"], b.params["W_enc"] / 2)
    for wanted in ("step", "member", "config"):
        with pytest.raises(BadInput, match=f"has no {wanted}: it is traced, stacked or made by hand"):
            getattr(of_b, wanted)
    assert (b.name, b.step, b.member.seed) == ("relu-2", 2, 2)
    assert jax.tree.structure(made("relu")) != jax.tree.structure(made("relu", per_story=True))


def test_shapes_are_checked_inside_transforms() -> None:
    """Values cannot be."""
    sae, of_stories = made("relu"), made("relu", per_story=True)
    with pytest.raises(BadInput, match=r"expects \[\.\.\., 8\]"):
        jax.jit(sae.encode)(X[:, :5])
    with pytest.raises(BadInput, match="one whole story"):
        jax.jit(of_stories.encode)(X[None])
    with pytest.raises(BadInput, match="x has 1 tokens"):
        jax.jit(of_stories.encode)(X[:1])
    assert np.isnan(jax.jit(of_stories.encode)(jnp.ones((4, D)))).all()
    with pytest.raises(BadInput, match="all equal"):
        of_stories.encode(np.ones((4, D)))


def test_many_lengths_need_few_programs() -> None:
    """Of 150 numbers of tokens, programs of every sort counted, also of slices and padding; each row as alone."""
    sae, compiled = made("gated"), []
    x = np.random.default_rng(0).normal(size=(1300, D)).astype(np.float32)
    all_features, all_x_hat = np.asarray(sae.encode(x)), np.asarray(sae(x))

    def count(event: str, seconds: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for n in [*range(0, 149), 1299]:
            given: Any = jax.device_put(x[:n]) if n % 2 else x[:n]  # jnp.asarray would compile something
            close(sae.encode(given), all_features[:n])
            close(sae(given), all_x_hat[:n])
            assert isinstance(sae.encode(given), jax.Array)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert 1 <= len(compiled) <= 20
    close(sae.encode(x[:12].reshape(2, 3, 2, D)), all_features[:12].reshape(2, 3, 2, F))
    close(sae.encode(x[0]), all_features[0])


class Tensor:
    """What this package knows of a torch tensor, which NumPy cannot convert as long as it requires a gradient."""

    def __init__(self, value: np.ndarray, attached: bool = True) -> None:
        self.value, self.attached = value, attached

    def __array__(self, *more: Any, **named: Any) -> np.ndarray:
        if self.attached or self.value.dtype == ml_dtypes.bfloat16:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.value

    def detach(self) -> "Tensor":
        return Tensor(self.value, attached=False)

    def cpu(self) -> "Tensor":
        return self

    def is_floating_point(self) -> bool:
        return self.value.dtype.kind in "fV"

    def float(self) -> "Tensor":
        return Tensor(self.value.astype(np.float32), self.attached)


def test_numbers_come_in_every_form() -> None:
    """And give what the same numbers in float32 give."""
    sae = made("relu")
    whole = np.round(X)
    for dtype in (np.float16, np.float64, np.int8, np.int64, ml_dtypes.bfloat16):
        forms = [whole.astype(dtype), Tensor(whole.astype(dtype))]
        if dtype != ml_dtypes.bfloat16:
            forms.append(whole.astype(dtype).tolist())
        if dtype not in (np.float64, np.int64):
            forms.append(jnp.asarray(whole.astype(dtype)))
        for given in forms:
            assert np.array_equal(sae.encode(given), sae.encode(whole)), (dtype, type(given))
            assert sae.encode(given).dtype == jnp.float32
    assert sae.encode(np.zeros((0, D))).shape == (0, F) and sae.decode(np.zeros((2, 0, F))).shape == (2, 0, D)
    assert np.isnan(sae(np.full((2, D), np.nan))).all()
    assert not np.isfinite(sae.encode(np.full((1, D), 1e300))).any()
    for bad in (
        X + 1j,
        X.astype(object),
        [[1.0] * D, [1.0]],
        "words",
        None,
        X.view("V4"),
        jax.random.split(jax.random.key(0), D),
    ):
        with pytest.raises(BadInput, match=r"^x (is a|has the dtype) "):
            sae.encode(bad)
        with pytest.raises(BadInput, match=r"^features (is a|has the dtype) "):
            sae.decode(bad)


def test_it_is_shown_on_one_line_and_on_a_card() -> None:
    """With what tells it apart, escaped; whatever JAX has put in place of its arrays."""
    sae = made("topk")
    measured = replace(sae, origin=replace(sae.origin, name="<b>&", step=12000, l0=2.96, fvu=0.01234567))
    assert repr(measured) == "TrainedAutoencoder('<b>&', kind topk, F 20, D 8, k 3, step 12,000, L0 2.96, FVU 0.0123)"
    html = measured._repr_html_()
    assert "&lt;b&gt;&amp;" in html and "<b>&" not in html and "0.0123" in html and len(html) < 2000
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), sae, sae)
    assert repr(stacked) == "TrainedAutoencoder(kind topk, F 20, D 8, stacked 2)"
    assert repr(jax.tree.map(lambda leaf: None, sae)) == "TrainedAutoencoder('topk-0', kind topk, F ?, D ?, step 0)"
    jax.jit(lambda sae: repr(sae) and sae(X))(sae)
