"""A trained autoencoder takes and gives activations in the language model's own scale."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from running import never

import jax_sae
from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.run.train import train


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Activations of a sentence, from the demo's language model."""
    lm = jax_sae.load_language_model("jax_sae/demo/model", layer=2)
    return lm.activations(["Once upon a time there was a fox who liked to run."])[0]


def test_normalisation_is_applied_inside(demo_run: Path, x: np.ndarray) -> None:
    """Encode and decode against the formula on the parameters and the normalisation."""
    sae = jax_sae.load_autoencoder(demo_run, features=63)
    mean, scale = (np.asarray(value) for value in sae.normalization)
    p = {name: np.asarray(value) for name, value in sae.params.items()}
    features = np.maximum((x - mean) * scale @ p["W_enc"] + p["b_enc"], 0)
    np.testing.assert_allclose(sae.encode(x), features, atol=1e-4)
    np.testing.assert_allclose(sae.decode(features), (features @ p["W_dec"] + p["b_dec"]) / scale + mean, atol=1e-4)
    np.testing.assert_allclose(sae(x), sae.decode(sae.encode(x)), atol=1e-5)
    assert sae(x[None]).shape == (1, *x.shape) and sae.encode(x[0]).shape == (63,)
    assert (sae.width, sae.features, sae.name, sae.step) == (64, 63, "F63", 12)


def test_newest_step_is_the_default_and_steps_differ(demo_run: Path) -> None:
    """Step 5 is not step 12."""
    newest, early = (jax_sae.load_autoencoder(demo_run, features=64, step=step) for step in (None, 5))
    assert (newest.step, early.step) == (12, 5)
    assert not jnp.array_equal(newest.params["W_enc"], early.params["W_enc"])


def test_per_story_normalisation_comes_from_the_story(demo_config: Config, tmp_path: Path, x: np.ndarray) -> None:
    """Scaling and shifting a story changes no feature; decode asks for the story."""
    config = replace(
        demo_config,
        activations=replace(demo_config.activations, normalization="story"),
        sweep=replace(demo_config.sweep, features=(63,)),
        train=replace(demo_config.train, batching="story", steps=2),
    )
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    sae = jax_sae.load_autoencoder(tmp_path / "run", features=63)
    features = sae.encode(x)
    np.testing.assert_allclose(sae.encode(3 * x + 7), features, atol=2e-3)
    np.testing.assert_allclose(sae(3 * x + 7), 3 * sae(x) + 7, atol=2e-2)
    with pytest.raises(BadInput, match="story=x"):
        sae.decode(features)
    with pytest.raises(BadInput, match="one whole story"):
        sae.encode(x[None])


def test_excluded_first_tokens_count_for_no_storys_mean_and_scale(
    demo_config: Config, tmp_path: Path, x: np.ndarray
) -> None:
    """Whatever they are, the features and reconstructions of the other tokens stay, by the formula; as in training."""
    config = replace(
        demo_config,
        activations=replace(demo_config.activations, normalization="story", exclude_first_tokens=2),
        sweep=replace(demo_config.sweep, features=(63,)),
        train=replace(demo_config.train, batching="story", steps=2),
    )
    assert train(config, tmp_path / "run", resume=False, stop_requested=never)
    sae = jax_sae.load_autoencoder(tmp_path / "run", features=63)
    p = {name: np.asarray(value) for name, value in sae.params.items()}
    x_n = (x - x[2:].mean()) / x[2:].std(ddof=1) * np.sqrt(64)
    features = np.maximum(x_n @ p["W_enc"] + p["b_enc"], 0)
    np.testing.assert_allclose(sae.encode(x), features, atol=2e-3)
    giant = np.concatenate([1e4 * x[:2], x[2:]])
    assert np.array_equal(sae.encode(giant)[2:], sae.encode(x)[2:])
    assert np.array_equal(sae(giant)[2:], sae(x)[2:])
    assert np.array_equal(sae.decode(features, story=giant), sae.decode(features, story=x))
    for short in (x[:2], x[:1]):
        with pytest.raises(BadInput, match=r"x has [12] tokens; .* without its first 2: give a story with more"):
            sae.encode(short)
    assert sae.encode(x[:3]).shape == (3, 63)


def test_wrong_widths_are_named(demo_run: Path, x: np.ndarray) -> None:
    """Activations of another model, features of another member."""
    sae = jax_sae.load_autoencoder(demo_run, features=63)
    with pytest.raises(BadInput, match=r"expects \[\.\.\., 64\]"):
        sae.encode(x[:, :5])
    with pytest.raises(BadInput, match=r"expects \[\.\.\., 63\]"):
        sae.decode(np.zeros((2, 64)))


def test_what_the_run_measured_is_shown_where_it_is_of_that_step(
    demo_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the summary says; the run is found below ~."""
    monkeypatch.setenv("HOME", str(demo_run.parent))
    newest, early = (jax_sae.load_autoencoder(f"~/{demo_run.name}", features=64, step=step) for step in (None, 5))
    [its] = [each for each in json.loads((demo_run / "summary.json").read_text())["members"] if each["name"] == "F64"]
    assert repr(newest) == (
        f"TrainedAutoencoder('F64', kind relu, F 64, D 64, step 12, L0 {its['l0']:.3g}, FVU {its['fvu']:.3g})"
    )
    assert repr(early) == "TrainedAutoencoder('F64', kind relu, F 64, D 64, step 5)"


def test_members_are_found_by_features_or_name(demo_run: Path) -> None:
    """And what there is, is listed where nothing or too much fits."""
    assert jax_sae.load_autoencoder(demo_run, name="F83").features == 83
    with pytest.raises(BadInput, match="0 members with 65 features; say name= one of F8, F63, F64, F83"):
        jax_sae.load_autoencoder(demo_run, features=65)
    with pytest.raises(BadInput, match="4 members; say name="):
        jax_sae.load_autoencoder(demo_run)
