"""A language model is a pytree with pure methods: jitted, differentiated and vmapped, it gives what its lists give."""

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.errors import BadInput
from jax_sae.language_model.pretrained import LanguageModel, load_language_model

DATA = Path(__file__).parents[1] / "data"
IDS = np.random.default_rng(0).integers(0, 50, (3, 11))


@pytest.fixture(
    scope="module", params=[("gpt_neo_bin", 2), pytest.param(("gpt_neo_untied", 3), marks=pytest.mark.long)]
)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """With a tied head, and with one of its own, read at its end."""
    directory, layer = request.param
    return load_language_model(str(DATA / directory), layer)


def close(found: Any, expected: Any, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_pure_methods_give_what_lists_give(lm: LanguageModel) -> None:
    """Of one text and of several, in every transform."""
    x, logits = np.stack(lm.activations(list(IDS))), np.stack(lm.logits(list(IDS)))
    whole = lm.with_rest()
    for each in (lm, whole):
        for transform in (lambda f: f, lambda f: jax.jit(jax.vmap(f))):
            close(transform(each)(IDS), x)
            close(transform(each.logits_of)(IDS), logits)
            close(transform(each.logits_from)(x), logits)
        close(each(IDS[0].tolist()), x[0])
        close(each.logits_from(jnp.asarray(x[0])), logits[0])
        assert each(IDS).dtype == each.logits_of(IDS).dtype == jnp.float32
    close(jax.jit(lm)(IDS), x)
    close(jax.jit(lambda lm, ids: lm(ids))(lm, IDS), x)
    close(jax.jit(lambda lm, ids: lm.logits_of(ids))(whole, IDS), logits)
    assert lm(np.zeros((2, 0), int)).shape == (2, 0, lm.width) and lm([]).shape == (0, lm.width)


@pytest.mark.long
def test_a_loss_is_differentiated_through_the_rest_of_the_network(lm: LanguageModel) -> None:
    """With respect to activations, by differences, and to the parameters of all blocks."""

    @jax.jit
    def loss(lm: LanguageModel, x: jax.Array) -> jax.Array:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(lm.logits_from(x)[:-1]), IDS[0, 1:, None], -1))

    lm = lm.with_rest()
    x = lm(IDS[0])
    direction = jax.random.normal(jax.random.key(0), x.shape)
    slope = float(jnp.sum(jax.grad(loss, argnums=1)(lm, x) * direction))
    step = 1e-2 / float(jnp.linalg.norm(direction))
    differences = (loss(lm, x + step * direction) - loss(lm, x - step * direction)) / (2 * step)
    assert slope == pytest.approx(float(differences), rel=0.05, abs=1e-3)
    gradient = jax.jit(jax.grad(lambda lm: loss(lm, lm(IDS[0]))))(lm)
    assert isinstance(gradient, LanguageModel)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient.params["wpe"]["embedding"] != 0)


def test_blocks_that_were_not_loaded_cannot_be_traced() -> None:
    """It is said what to do; once loaded inside a transform, they are kept as values."""
    lm = load_language_model(str(DATA / "gpt_neo_bin"), 2)
    with pytest.raises(BadInput, match=r"blocks below layer 2 only; take `lm = lm.with_rest\(\)`"):
        jax.jit(lambda lm, ids: lm.logits_of(ids))(lm, IDS)
    found = jax.jit(lm.logits_of)(IDS)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(lm.whole[1]))
    close(lm.logits_of(IDS), found)


def test_many_lengths_need_few_programs() -> None:
    """Programs of every sort counted, also of slices and padding."""
    lm, compiled = load_language_model(str(DATA / "gpt_neo_bin"), 2), []

    def count(event: str, seconds: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for n in range(1, 31):
            assert lm.logits_from(lm(np.arange(n))).shape[0] == n
            assert lm.logits_of(np.arange(n)[None]).shape[1] == n
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) <= 40  # six of the network, and what it takes to load its rest


def test_copies_and_other_precisions(lm: LanguageModel) -> None:
    """Copies are the same; in bfloat16 it computes in float32 with what bfloat16 has left of its numbers."""
    for same in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm)), jax.device_put(lm)):
        assert np.array_equal(same(IDS), lm(IDS))
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lm.with_rest())
    exactly = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), coarse)
    assert coarse(IDS).dtype == jnp.float32 and np.array_equal(coarse(IDS), exactly(IDS))
    assert np.array_equal(coarse.activations(list(IDS)), exactly.activations(list(IDS)))
    assert np.array_equal(coarse.logits_of(IDS), exactly.logits_of(IDS))


def test_what_is_known_is_checked(lm: LanguageModel) -> None:
    """Shapes and dtypes always, ids where they are not traced."""
    config = lm.model.architecture
    for bad in (IDS.astype(float), IDS[None], np.int32(3), "words"):
        with pytest.raises(BadInput, match=r"^token_ids "):
            lm(bad)
    for bad in ([config.vocab_size], [-1]):
        with pytest.raises(BadInput, match=f"go from 0 to {config.vocab_size - 1}"):
            lm.logits_of(bad)
    too_long = np.zeros(config.max_position_embeddings + 1, int)
    with pytest.raises(BadInput, match="positions: cut it"):
        jax.jit(lm)(too_long)
    with pytest.raises(BadInput, match="positions: cut it"):
        jax.jit(lm.logits_from)(np.zeros((len(too_long), lm.width)))
    with pytest.raises(BadInput, match=rf"x has shape \(3, 11\); .* expects \[T, {lm.width}\]"):
        jax.jit(lm.logits_from)(IDS)
    assert np.isnan(jax.jit(lm)(jnp.array([1, config.vocab_size]))[1]).all()


def test_texts_may_come_from_a_generator(lm: LanguageModel) -> None:
    """Which can be gone through once."""
    for method in (lm.activations, lm.logits, lm.token_ids):
        expected = method(list(IDS))
        found = method(ids for ids in IDS)
        assert len(found) == 3 and all(map(np.array_equal, found, expected))


def test_it_is_shown_on_one_line_and_found_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on a card, escaped."""
    shutil.copytree(DATA / "gpt_neo_untied", tmp_path / "a&b")
    monkeypatch.setenv("HOME", str(tmp_path))
    lm = load_language_model("~/a&b", 2)
    assert repr(lm) == "LanguageModel('~/a&b', layer 2 of 3, D 16, vocabulary 53, positions 32)"
    assert "~/a&amp;b" in lm._repr_html_() and len(lm._repr_html_()) < 2000
    assert len(repr(jax.tree.map(lambda leaf: None, lm))) < 200
