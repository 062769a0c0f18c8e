"""Blocks made on the device: what NumPy makes of the same activations, and none of these come to the host."""

import weakref
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from running import REPOSITORY

from jax_sae.activations import blocks
from jax_sae.activations.batches import BatchRun, batch_runs
from jax_sae.activations.interruptible import Interruptible
from jax_sae.activations.normalize import Normalization
from jax_sae.activations.position import Position
from jax_sae.activations.sources import Source
from jax_sae.activations.story_sources import StorySource
from jax_sae.config import ActivationsConfig, Batching, TrainConfig
from jax_sae.config import Normalization as Kind
from jax_sae.errors import BadInput
from jax_sae.language_model import harvest
from jax_sae.language_model.pretrained import load_language_model
from jax_sae.language_model.text import Stories

TEXTS = [f"{'Once upon a time there was a fox. ' * (i % 5)}It was {i} years old." for i in range(30)]
TEXTS[3], TEXTS[5] = "", "A"
PLACES = ("0.mlp_hidden", "1.resid_post")
"""Of different widths."""


@pytest.fixture(scope="module")
def lm() -> Any:
    """The demo's language model, at two places."""
    return load_language_model(str(REPOSITORY / "jax_sae" / "demo" / "model"), places=PLACES)


def source_of(lm: Any, exclude: int = 0, **windows: Any) -> StorySource:
    """All of the texts: 30 stories, 608 tokens."""
    a = lm.model.architecture
    stories = Stories(
        Dataset.from_dict({"text": TEXTS}), "text", lm.tokenizer, a.max_position_embeddings, a.vocab_size, exclude,
        **windows,
    )  # fmt: skip
    return StorySource(stories, 0, len(TEXTS), {"": lm})


def stay_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is a GPU."""
    monkeypatch.setattr("jax_sae.activations.story_sources.stays_on_device", lambda: True)


def runs(
    source: Source,
    activations: ActivationsConfig,
    batching: Batching,
    start: Position = Position(),  # noqa: B008
) -> Iterator[BatchRun]:
    """Blocks of up to 12 batches of 16 tokens."""
    width = source.width
    fitted = Normalization(np.linspace(-1, 1, width, dtype="f4"), np.linspace(0.5, 3, width, dtype="f4"))
    return batch_runs(source, fitted, start, activations, TrainConfig(batching=batching, batch_tokens=16, seed=3))


@pytest.mark.parametrize(
    ("batching", "normalization", "norm_limit", "stories", "n_runs"),
    [
        pytest.param("tokens", "dataset", 0.0, {"exclude": 2}, 8, marks=pytest.mark.long),
        ("tokens", "dataset", 118.5, {"window": 40, "pack": True, "exclude": 1}, 8),
        pytest.param("tokens", "story", 0.0, {}, 8, marks=pytest.mark.long),
        ("story", "story", 0.0, {"exclude": 1}, 40),
    ],
    ids=["some excluded", "packed, with a norm limit", "each story by itself", "a story a batch"],
)
def test_blocks_made_on_the_device_are_those_of_numpy_and_go_on_from_any_position(
    lm: Any,
    batching: Batching,
    normalization: Kind,
    norm_limit: float,
    stories: dict[str, Any],
    n_runs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, but for the rounding of a story's own normalisation, into the second epoch and through small blocks.

    The text is used up inside a block, and blocks end inside stories. A block that is made again has the same bits.
    """
    activations = ActivationsConfig(block_tokens=192, normalization=normalization, norm_limit=norm_limit)
    source = source_of(lm, **stories)
    expected = list(islice(runs(source, activations, batching), n_runs))
    assert expected[-1].end.epoch == 1
    stay_on_device(monkeypatch)
    found = list(islice(runs(source, activations, batching), n_runs))
    again = runs(source, activations, batching, found[1].after[-1])
    for i, (host, device) in enumerate(zip(expected, found, strict=True)):
        assert (device.used, device.after, device.end) == (host.used, host.after, host.end)
        assert np.array_equal(device.weights, host.weights)
        assert isinstance(host.x, np.ndarray) and isinstance(device.x, jax.Array)
        if normalization == "story":
            np.testing.assert_allclose(device.x, host.x, rtol=2e-6, atol=1e-5)
        else:
            assert np.array_equal(device.x, host.x)
        if i > 1:
            assert np.asarray(next(again).x).tobytes() == np.asarray(device.x).tobytes()
    if norm_limit:
        at_limit = [(run.weights[: len(run.after)] == 0).mean() for run in expected]
        assert 0 < np.mean(at_limit) < 0.5


def test_no_activations_come_to_the_host_and_a_block_and_a_batch_are_all_there_is(
    lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the language model gives is itself put into the block, and what comes of that, in place, is the batches.

    A CPU's arrays are seen by NumPy without a transfer, so that a transfer guard would guard nothing here.
    """
    stay_on_device(monkeypatch)
    there: list[weakref.ref[jax.Array]] = []
    blocks_so_far: list[Any] = []
    fetched: list[int] = []
    read_places, with_rows, get = harvest.read_places, blocks._with_rows, jax.device_get

    def reading(*args: Any) -> jax.Array:
        assert not [ref for ref in there if ref() is not None]
        x = read_places(*args)
        there.append(weakref.ref(x))
        return x

    def putting(block: jax.Array, x: jax.Array, *args: Any) -> jax.Array:
        assert x is there[-1]() and (not blocks_so_far or block is blocks_so_far[-1])
        blocks_so_far.append(with_rows(block, x, *args))
        assert block.is_deleted()
        return blocks_so_far[-1]

    def getting(tree: Any) -> Any:
        fetched.extend(leaf.ndim for leaf in jax.tree.leaves(tree))
        return get(tree)

    monkeypatch.setattr(harvest, "read_places", reading)
    monkeypatch.setattr(blocks, "_with_rows", putting)
    monkeypatch.setattr(jax, "device_get", getting)
    monkeypatch.setattr(harvest, "tokens_at_a_time", lambda: 128)
    monkeypatch.setattr(StorySource, "activations", None)
    source = Interruptible(source_of(lm), lambda: False)
    found = runs(source, ActivationsConfig(block_tokens=192, norm_limit=118.5), "tokens")
    for _ in range(4):
        run = next(found)
        assert run.x is blocks_so_far[-1]
        there.append(weakref.ref(run.x))
        del run
        blocks_so_far.clear()
    assert len(there) > 8 and set(fetched) == {1, 2}


@pytest.mark.parametrize("on_device", [False, True], ids=["by NumPy", "on the device"])
def test_activations_that_cannot_be_used_are_refused(lm: Any, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one story a token that is not finite, all of them equal at one place, most norms over the limit."""
    if on_device:
        stay_on_device(monkeypatch)

    def refused(story: np.ndarray, match: str, activations: ActivationsConfig) -> None:
        """Every story's activations are these; but of the text "A"."""

        def given(model: Any, places: Any, params: Any, token_ids: np.ndarray, segments: Any) -> jax.Array:
            del model, places, params, segments
            R, T = token_ids.shape
            x = np.random.default_rng(0).normal(size=(R, T, source.width)).astype("f4")
            x[0, : len(story)] = story
            return jnp.asarray(x)

        monkeypatch.setattr(harvest, "read_places", given)
        with pytest.raises(BadInput, match=match):
            next(runs(source, activations, "tokens", Position(block=4)))

    source = source_of(lm)
    widths = [place.width for place in source.places]
    story = np.random.default_rng(1).normal(size=(16, source.width)).astype("f4")
    broken = story.copy()
    broken[[2, 5], 7] = np.inf, np.nan
    refused(broken, r"stories 0 to 29: 2 of \d+ adjacent activations are not finite", ActivationsConfig())
    flat = np.repeat(story, 3, axis=0)
    flat[:, widths[0] :] = 0.1
    by_itself = ActivationsConfig(normalization="story")
    refused(flat, "at 1.resid_post: a story of .* tokens has activations that are all equal", by_itself)
    refused(1e30 * story, "192 of 192 tokens have a larger norm", ActivationsConfig(block_tokens=192, norm_limit=9.0))
