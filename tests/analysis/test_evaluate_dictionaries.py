"""Transcoders and crosscoders are evaluated as their definitions say, beside autoencoders of the same run."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import never, nothing_learned

import jax_sae
from jax_sae.analysis.evaluation import evaluate
from jax_sae.analysis.loss_recovered import loss_recovered
from jax_sae.autoencoder.baselines import covariance_eigenvalues, pca_fvu
from jax_sae.config import Config, SweepConfig
from jax_sae.run.train import train
from jax_sae.trained import TrainedAutoencoder

pytestmark = pytest.mark.long

NAMES = ["1.resid_post", "1.transcoder", "1.skip_transcoder", "crosscoder"]


@pytest.fixture(scope="module")
def run(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each, and an autoencoder at the other place of the crosscoder, evaluated."""
    kinds = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder")
    sweep = SweepConfig(dictionaries=kinds, layers=(1, 2), kinds=("topk",), features=(16,), k=(4,))
    config = replace(demo_config, sweep=sweep, activations=replace(demo_config.activations, held_out_tokens=400))
    out = tmp_path_factory.mktemp("dictionaries") / "run"
    with nothing_learned():
        assert train(config, out, resume=False, stop_requested=never)
    evaluate(out)
    return out


@pytest.fixture(scope="module")
def record(run: Path) -> Any:
    """What was written."""
    return json.loads((run / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def lm() -> jax_sae.LanguageModel:
    """The demo's."""
    return jax_sae.load_language_model("jax_sae/demo/model")


@pytest.fixture(scope="module")
def texts(demo_config: Config, record: Any) -> list[str]:
    """The held-out stories."""
    from jax_sae.language_model.dataset import open_split

    return open_split(demo_config.text.path, "validation", "text")["text"][: record["stories"]]


def of(record: Any, label: str) -> Any:
    """A member's numbers."""
    return next(member for member in record["members"] if member["name"] == f"{label}-F16")


def at(lm: jax_sae.LanguageModel, texts: list[str], places: tuple[str, ...]) -> np.ndarray:
    """All held-out activations at these places, side by side."""
    return np.concatenate([np.concatenate(its) for its in lm.activations(texts, places).values()], axis=1)


def units_of(sae: TrainedAutoencoder) -> Any:
    """What each written number is multiplied by, as the run normalised its place."""
    return np.asarray(sae.of_written.scale, np.float64) if sae.of_written and len(sae.writes) > 1 else 1.0


@pytest.mark.parametrize("label", NAMES)
def test_fvu_is_of_what_is_written(
    label: str, run: Path, record: Any, lm: jax_sae.LanguageModel, texts: list[str]
) -> None:
    """By the public sae(x), over all places in units of each one's normalisation, and at each place; L0 as well."""
    found, sae = of(record, label), jax_sae.load_autoencoder(run, name=f"{label}-F16")
    x, y = at(lm, texts, sae.reads), at(lm, texts, sae.writes)
    assert len(x) == record["tokens"]
    errors = np.square(np.asarray(sae(x), np.float64) - y).sum(0)
    deviations = np.square(y - y.mean(0, dtype=np.float64)).sum(0)
    squared_units = np.broadcast_to(np.square(units_of(sae)), errors.shape)
    assert found["fvu"] == pytest.approx(errors @ squared_units / (deviations @ squared_units), rel=1e-4)
    assert found["l0"] == pytest.approx(float((np.asarray(sae.encode(x)) > 0).sum(1).mean()), rel=1e-3)
    summary = next(m for m in jax_sae.open_run(run).summary["members"] if m["name"] == found["name"])
    assert found["fvu"] == pytest.approx(summary["fvu"], rel=1e-4)
    if label != "crosscoder":
        assert "at" not in found and "relative_norms" not in found
        return
    assert list(found["at"]) == list(sae.writes) == ["1.resid_post", "2.resid_post"]
    for i, numbers in enumerate(found["at"].values()):
        its = slice(64 * i, 64 * (i + 1))
        assert numbers["fvu"] == pytest.approx(errors[its].sum() / deviations[its].sum(), rel=1e-4)
        assert numbers["mse"] == pytest.approx(errors[its].mean() / len(x), rel=1e-4)
    norms = np.linalg.norm(np.asarray(sae.params["W_dec"]).reshape(16, 2, 64), axis=2)
    fired = (np.asarray(sae.encode(x)) > 0).any(0)
    mean = (norms / norms.sum(1, keepdims=True))[fired].mean(0)
    np.testing.assert_allclose(found["relative_norms"]["mean"], mean, rtol=1e-4)
    assert found["relative_norms"]["left_out"] == np.sum(~fired)


@pytest.mark.parametrize("label", NAMES)
def test_floors_are_of_the_targets_and_of_linear_maps(
    label: str, run: Path, record: Any, lm: jax_sae.LanguageModel, texts: list[str]
) -> None:
    """PCA of what is written, but none of it with a skip; NumPy's least squares; each with what it loses."""
    found, sae = of(record, label), jax_sae.load_autoencoder(run, name=f"{label}-F16")
    x, y = (at(lm, texts, places).astype(np.float64) for places in (sae.reads, sae.writes))
    scaled = y * units_of(sae)
    floor = pca_fvu(covariance_eigenvalues(scaled), 16)
    baselines = found["baselines"]
    if sae.skip:
        assert baselines["pca_features"] is None and baselines["pca_l0"] is None
    else:
        assert baselines["pca_features"]["fvu"] == pytest.approx(floor, rel=1e-6)
        assert found["fvu"] >= floor
    assert ("linear" in baselines) == (sae.reads != sae.writes) == ("linear_features" in baselines)
    if sae.reads == sae.writes:
        assert baselines["pca_features"]["ce_loss_without_sae"] == found["ce_loss_without_sae"]
        return
    centred = x - x.mean(0)
    B = np.linalg.lstsq(centred, y - y.mean(0), rcond=1e-7)[0]
    left = np.square(y - y.mean(0) - centred @ B).sum() / np.square(y - y.mean(0)).sum()
    assert baselines["linear"]["fvu"] == pytest.approx(left, rel=1e-4)
    assert floor <= baselines["linear_features"]["fvu"] and left <= baselines["linear_features"]["fvu"]
    assert baselines["linear_features"]["directions"] == 16
    mean_x, mean_y = x.mean(0), y.mean(0)
    linear = {"it": lambda x, lengths: (x - mean_x) @ B + mean_y}
    loss = loss_recovered(lm, texts, linear, mean_y, reads=sae.reads, writes=sae.writes)
    for name, value in asdict(loss["it"]).items():
        assert baselines["linear"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_losses_are_those_of_all_written_places_at_once(
    run: Path, record: Any, lm: jax_sae.LanguageModel, texts: list[str]
) -> None:
    """As `loss_recovered` gives them for the public sae(x)."""
    for label in NAMES:
        sae = jax_sae.load_autoencoder(run, name=f"{label}-F16")
        mean = at(lm, texts, sae.writes).mean(0, dtype=np.float64)
        loss = loss_recovered(
            lm, texts, {"it": lambda x, lengths, sae=sae: sae(x)}, mean, 0, 0.0, sae.reads, sae.writes
        )
        for name, value in asdict(loss["it"]).items():
            assert of(record, label)[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (label, name)
    of_pair = [of(record, f"1.{which}")["ce_loss_with_mean_ablation"] for which in ("transcoder", "skip_transcoder")]
    assert of_pair[0] == of_pair[1]


def test_tables_and_figures_say_it(run: Path, record: Any) -> None:
    """Which places, what linear maps reach, each written place, relative norms; a figure for each placement."""
    from jax_sae.analysis.tables import tables

    lines = "\n".join(tables(record))
    for words in (
        "linear, F",
        "1.mlp_in  1.mlp_out",
        "FVU of          all places  1.resid_post  2.resid_post",
        "only 1.resid_post  shared  only 2.resid_post",
        "CE at 1.resid_post 2.resid_post: ",
        "CE at 1.mlp_out: ",
    ):
        assert words in lines, words
    figures = {path.name for path in (run / "figures").iterdir()}
    assert {f"frontier-{label}.png" for label in NAMES} <= figures and "relative_norms-crosscoder.png" in figures
