"""Stories of activations train to the same bits whatever holds them, are resumed in it, and evaluated."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Array2D, Dataset, Features, List, Value
from running import never, stop_at

from jax_sae.activations.array_sources import array_sources
from jax_sae.analysis.evaluation import evaluate
from jax_sae.config import IN_MEMORY, ActivationsConfig, Config, SweepConfig, TrainConfig, validate
from jax_sae.errors import BadInput
from jax_sae.run.load import load_autoencoder
from jax_sae.run.train import train

D = 8
LENGTHS = np.random.default_rng(0).integers(0, 31, 60)
STORIES = [
    (np.random.default_rng(i + 1).normal(size=(T, D)) * (1 + i % 5) + i % 3).astype(np.float32)
    for i, T in enumerate(LENGTHS)
]
"""Of 0 to 30 tokens, and of several scales."""
PADDED = np.full((60, 30, D), np.nan, np.float32)
MASK = np.zeros((60, 30), np.int64)
for number, story in enumerate(STORIES):
    place = slice(0, len(story)) if number % 2 else slice(30 - len(story), 30)
    PADDED[number, place], MASK[number, place] = story, 1

SETTINGS = ActivationsConfig(normalization="story", block_tokens=128, held_out_tokens=100, exclude_first_tokens=1)
CONFIG = Config(
    activations=SETTINGS,
    sweep=SweepConfig(features=(4,)),
    train=TrainConfig(steps=12, batch_tokens=32, checkpoint_every=100, log_every=1),
)


def saved_folder(folder: Path) -> dict[str, str]:
    """As SAELens caches activations, with a mask beside them."""
    features = Features({"hook": Array2D((30, D), "float32"), "attention_mask": List(Value("int64"))})
    rows = Dataset.from_dict({"hook": PADDED, "attention_mask": MASK.tolist()}, features)
    rows.save_to_disk(folder / "saved")
    return {"path": str(folder / "saved")}


def npz(folder: Path) -> dict[str, str]:
    """Among others, in float64."""
    np.savez(folder / "x.npz", acts=PADDED.astype(np.float64), more=PADDED, keep=MASK)
    return {"path": str(folder / "x.npz"), "array": "acts", "mask": "keep"}


FILES: list[Callable[[Path], dict[str, str]]] = [npz, saved_folder]
"""The others are read in activations/test_array_files.py."""
IN_MEMORY_FORMS: dict[str, tuple[Any, Any]] = {
    "padded": (PADDED, MASK),
    "jax": (jnp.asarray(PADDED), jnp.asarray(MASK)),
    "list": (STORIES, None),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a list of stories, without a break."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train(CONFIG, out, resume=False, stop_requested=never, sources=array_sources(CONFIG, STORIES))
    return out


def outcome(run: Path) -> tuple[str, bytes, dict[str, bytes]]:
    """Metrics, and the member's normalisation and parameters."""
    sae = load_autoencoder(run)
    params = {name: np.asarray(value).tobytes() for name, value in sae.params.items()}
    return (run / "metrics.jsonl").read_text(), np.asarray(sae.normalization.scale).tobytes(), params


@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__name__)
def test_files_train_resume_and_evaluate_as_stories_in_memory(
    write: Callable[[Path], dict[str, str]], tmp_path: Path, straight: Path
) -> None:
    """Stopped within a block and resumed; each story is normalised by itself and loses its first token."""
    config = replace(CONFIG, activations=replace(SETTINGS, **write(tmp_path)))
    validate(config)
    assert not train(config, tmp_path / "run", resume=False, stop_requested=stop_at(5))
    assert train(config, tmp_path / "run", resume=True, stop_requested=never)
    assert outcome(tmp_path / "run") == outcome(straight)
    record = evaluate(tmp_path / "run")
    assert record["members"] == evaluate(straight, sources=array_sources(CONFIG, STORIES))["members"]
    assert record["left_out"] and record["members"][0]["fvu"] < 1


@pytest.mark.parametrize("form", IN_MEMORY_FORMS)
def test_arrays_in_memory_are_given_again_to_go_on(form: str, tmp_path: Path, straight: Path) -> None:
    """To resume and to evaluate; others are noticed, and without them one line says so."""
    x, mask = IN_MEMORY_FORMS[form]
    out = tmp_path / "run"
    given = array_sources(CONFIG, x, mask)
    assert not train(CONFIG, out, resume=False, stop_requested=stop_at(5), sources=given)
    if form == "list":
        config = replace(CONFIG, activations=replace(SETTINGS, path=IN_MEMORY))
        message = "the activations were in memory, given by a program, and no file holds them; have it give them again"
        for act in (lambda: train(config, out, resume=True, stop_requested=never), lambda: evaluate(out)):
            with pytest.raises(BadInput, match=message) as error:
                act()
            assert "\n" not in str(error.value)
        other = array_sources(CONFIG, [*STORIES[:-1], STORIES[-1] + np.float32(1e-3)])
        with pytest.raises(BadInput, match="began with another activations"):
            train(CONFIG, out, resume=True, stop_requested=never, sources=other)
        with pytest.raises(BadInput, match="began with another activations"):
            evaluate(out, sources=other)
    assert train(CONFIG, out, resume=True, stop_requested=never, sources=array_sources(CONFIG, x, mask))
    assert outcome(out) == outcome(straight)


def test_held_out_stories_are_whole_and_no_more_than_needed() -> None:
    """A tenth at most; without their first tokens where these are excluded; none of them is trained on."""
    for held_out_tokens, exclude in ((10, 1), (100, 1), (100, 0), (10**6, 0)):
        settings = replace(SETTINGS, held_out_tokens=held_out_tokens, exclude_first_tokens=exclude)
        training, held_out, lines = array_sources(replace(CONFIG, activations=settings), STORIES)
        assert held_out.has_stories and len(training) + len(held_out) == 60 and 1 <= len(held_out) <= 6
        used = np.maximum(0, LENGTHS - exclude)
        assert held_out.count_tokens() == (used[len(training) :].sum(), True)
        assert training.count_tokens() == (used[: len(training)].sum(), True)
        assert len(held_out) == 6 or used[len(training) :].sum() >= held_out_tokens > used[len(training) + 1 :].sum()
        assert lines[0].endswith(": 60 stories of 0 to 30 tokens, width 8")
        [item] = held_out.read([0])
        [(_, x)] = held_out.activations([item])
        assert np.array_equal(x, STORIES[len(training)][exclude:]) and x.dtype == np.float32
    with pytest.raises(BadInput, match="the activations given has 9 stories; at least 10 are needed"):
        array_sources(CONFIG, STORIES[:9])


def test_rows_do_not_know_their_stories() -> None:
    """Settings that need them are refused; stories may be trained on one a step."""
    rows = np.concatenate(STORIES)
    for settings, train_settings, message in [
        ({"exclude_first_tokens": 1}, {}, "exclude_first_tokens is 1, but activations.path holds rows without their"),
        ({"normalization": "story"}, {}, "holds rows without their stories, .*; use 'tokens' and 'dataset', or give"),
        ({}, {"batching": "story"}, "holds rows without their stories"),
    ]:
        activations = replace(ActivationsConfig(), **settings)
        config = replace(CONFIG, activations=activations, train=replace(CONFIG.train, **train_settings))
        with pytest.raises(BadInput, match=message):
            array_sources(config, rows)
        training, _, _ = array_sources(config, STORIES)
        assert training.count_tokens()[0]
    training, held_out, lines = array_sources(replace(CONFIG, activations=ActivationsConfig()), rows, name="my rows")
    assert not training.has_stories and held_out.count_tokens() == (len(rows) // 10, True)
    assert lines[0] == f"activations   my rows: {len(rows):,} rows of width 8"
