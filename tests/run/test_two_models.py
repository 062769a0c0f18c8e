"""Two language models that read the same token ids: their places side by side, each as if it were alone."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from refusals import write_tokenizer
from running import REPOSITORY, never, nothing_learned, stop_at
from safetensors.numpy import load_file, save_file

import jax_sae
from jax_sae.activations.sources import open_sources
from jax_sae.activations.store import open_store, read_manifest
from jax_sae.analysis.evaluation import evaluate
from jax_sae.analysis.loss_recovered import loss_recovered
from jax_sae.analysis.tables import tables
from jax_sae.commands.harvest import Options, harvest_to_store
from jax_sae.config import Config, ModelConfig, SweepConfig
from jax_sae.config_tables import config_with
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import open_split
from jax_sae.run.train import train

pytestmark = pytest.mark.long

BASE = REPOSITORY / "jax_sae" / "demo" / "model"
PLACES = ("base:1.resid_post", "tuned:blocks.2.hook_mlp_out", "tuned:1.resid_post")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, as if it had been trained further."""
    directory = tmp_path_factory.mktemp("models") / "tuned"
    shutil.copytree(BASE, directory)
    rng, tensors = np.random.default_rng(0), load_file(BASE / "model.safetensors")
    changed = {name: x * rng.uniform(0.8, 1.2, x.shape).astype(x.dtype) for name, x in tensors.items()}
    save_file(changed, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def config(demo_config: Config, tuned: Path) -> Config:
    """A small sweep at places of both."""
    small = replace(demo_config, activations=replace(demo_config.activations, held_out_tokens=300))
    dictionaries = ("autoencoder", "crosscoder")
    sweep = SweepConfig(dictionaries=dictionaries, places=PLACES, kinds=("topk",), features=(32,), k=(4,))
    return replace(small, sweep=sweep, model=ModelConfig(models=(f"base={BASE}", f"tuned={tuned}")))


@pytest.fixture(scope="module")
def run_of_both(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of that sweep, stopped and resumed."""
    out = tmp_path_factory.mktemp("runs") / "both"
    with nothing_learned():
        assert not train(config, out, resume=False, stop_requested=stop_at(7))
        assert train(config, out, resume=True, stop_requested=never)
    return out


@pytest.mark.usefixtures("learning_nothing")
def test_members_are_those_of_a_run_with_one_model(
    config: Config, tuned: Path, run_of_both: Path, tmp_path: Path
) -> None:
    """Bit for bit: at each place of a model, the other one beside it, and what is lost there.

    That they learn the same from the same columns, run/test_places.py holds.
    """
    both = jax_sae.open_run(run_of_both)
    names = ("base:1.resid_post", "tuned:2.mlp_out", "tuned:1.resid_post", "crosscoder")
    assert both.names == [f"{name}-F32" for name in names]
    record = both.evaluate()
    assert {"language model base", "language model tuned", "text"} <= record["inputs"].keys()
    places = ("2.mlp_out", "1.resid_post")
    alone = replace(
        config, model=ModelConfig(str(tuned)), sweep=replace(config.sweep, dictionaries=("autoencoder",), places=places)
    )
    assert train(alone, tmp_path / "tuned", resume=False, stop_requested=never)
    run = jax_sae.open_run(tmp_path / "tuned")
    for member in run.evaluate()["members"]:
        named = {key: f"tuned:{member[key]}" for key in ("name", "place")}
        ours, theirs = both[named["name"]], run[member["name"]]
        assert ours.place == named["place"]
        for key, value in theirs.params.items():
            assert np.asarray(ours.params[key]).tobytes() == np.asarray(value).tobytes()
        [found] = [each for each in record["members"] if each["name"] == named["name"]]
        assert found == member | named


def test_a_crosscoder_of_both_is_put_into_each(config: Config, tuned: Path, run_of_both: Path) -> None:
    """Each model by itself, of what is read of both; and which features both share."""
    file = run_of_both / "evaluation.json"
    record = json.loads(file.read_text()) if file.exists() else evaluate(run_of_both)
    [found] = [member for member in record["members"] if member["name"] == "crosscoder-F32"]
    sae = jax_sae.load_autoencoder(run_of_both, name="crosscoder-F32")
    assert list(found["at"]) == list(sae.writes) and found["relative_norms"]["sides"] == ["base", "tuned"]
    assert "ce_loss_with_sae" not in found and list(found["models"]) == ["base", "tuned"]
    models = {"base": jax_sae.load_language_model(str(BASE)), "tuned": jax_sae.load_language_model(str(tuned))}
    texts = open_split(config.text.path, "validation", "text")["text"][: record["stories"]]
    for name, lm in models.items():
        its = [place for place in sae.writes if place.startswith(name)]
        first, last = {"base": (0, 64), "tuned": (64, 192)}[name]
        of_place = lm.activations(texts, [place.split(":")[1] for place in its])
        mean = np.concatenate([np.concatenate(x).mean(0, dtype=np.float64) for x in of_place.values()])
        written = {"it": lambda x, lengths, first=first, last=last: np.asarray(sae(x))[..., first:last]}
        expected = loss_recovered(models, texts, written, mean, reads=sae.reads, writes=its)["it"]
        for key, value in asdict(expected).items():
            assert found["models"][name][key] == pytest.approx(value, rel=1e-3, abs=1e-3), (name, key)
        assert found["baselines"]["pca_features"]["models"][name]["predictions"] == expected.predictions
    assert any(line.startswith("crosscoder-F32 in tuned ") for line in tables(record))


def test_a_path_may_change_and_a_model_may_not(tuned: Path, run_of_both: Path, tmp_path: Path) -> None:
    """By the digest of each model, whatever its path; another one under a known name is refused."""
    run = tmp_path / "run"
    shutil.copytree(run_of_both, run)
    saved = json.loads((run / "config.json").read_text())
    for other in (shutil.copytree(tuned, tmp_path / "elsewhere"), BASE):
        saved["model"]["models"][1] = f"tuned={other}"
        (run / "config.json").write_text(json.dumps(saved))
        if other != BASE:
            assert len(evaluate(run)["members"]) == 4
            continue
        with pytest.raises(BadInput, match="another language model tuned"):
            evaluate(run)


@pytest.mark.usefixtures("learning_nothing")
def test_a_store_holds_places_of_both(config: Config, tuned: Path, tmp_path: Path) -> None:
    """Under their names, as each model gives them, and a run reads them."""
    out = tmp_path / "store"
    options = Options(out=out, models=config.model.models, places=PLACES, text_path=config.text.path, tokens=3000)
    harvest_to_store(options)
    assert read_manifest(out)["model"] == f"base={BASE} tuned={tuned}"
    for place, path in (("base:1.resid_post", BASE), ("tuned:2.mlp_out", tuned), ("tuned:1.resid_post", tuned)):
        harvest_to_store(
            replace(options, out=tmp_path / place, models=(), model=str(path), places=(place.split(":")[1],))
        )
        alone = open_store(tmp_path / place)
        assert np.array_equal(open_store(out, [place]).read(0, 3000), alone.read(0, 3000))
    sweep = replace(config.sweep, places=("tuned:1.resid_post", "base:1.resid_post"))
    of_store = {"activations.path": str(out), "train.steps": 1, "model.models": ()}
    assert train(config_with(of_store, replace(config, sweep=sweep)), None, resume=False, stop_requested=never)


def test_models_that_do_not_go_together_are_refused_in_a_line(config: Config, tuned: Path, tmp_path: Path) -> None:
    """Another vocabulary, other positions, another tokenizer, names that collide, places of no model or of none."""
    sizes = json.loads((BASE / "config.json").read_text())
    for what in ("positions", "tokenizer", "no_tokenizer"):
        shutil.copytree(tuned, tmp_path / what)
    tensors = load_file(BASE / "model.safetensors")
    save_file(
        {name: x[:256] if "wpe" in name else x for name, x in tensors.items()},
        tmp_path / "positions" / "model.safetensors",
    )
    sizes |= {"max_position_embeddings": 256}
    (tmp_path / "positions" / "config.json").write_text(json.dumps(sizes))
    write_tokenizer(tmp_path / "bytes", 0)
    for file in (tmp_path / "bytes").iterdir():
        shutil.copy(file, tmp_path / "tokenizer" / file.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "no_tokenizer" / name).unlink()
    vocabulary = REPOSITORY / "tests" / "data" / "gpt_neo_bin"

    def opened(other: Path | str, **settings: object) -> list[str]:
        models = (f"base={BASE}", f"tuned={other}") if isinstance(other, Path) else tuple(other.split())
        return open_sources(config_with({"model.models": models, **settings}, config))[2]

    assert opened(tmp_path / "no_tokenizer")[1].startswith("model         tuned: ")
    named = {"text.tokenizer": str(BASE)}
    assert opened(tmp_path / "tokenizer", **named)
    one_place, unknown = {"sweep.places": ("base:0.z",)}, {"sweep.places": ("base:0.z", "tuned:0.z", "1.z")}
    for act, message in [
        (lambda: opened(vocabulary), "base has a vocabulary of 2,048 tokens and tuned a vocabulary of"),
        (lambda: opened(tmp_path / "positions"), "base has 512 positions and tuned 256 positions; language models"),
        (lambda: opened(tmp_path / "tokenizer"), "the tokenizers of base and tuned are not the same"),
        (lambda: opened(tmp_path / "nowhere"), "tuned: .*nowhere"),
        (lambda: opened(f"base={BASE} base={tuned}"), "model.models has two with the name 'base'"),
        (lambda: opened(f"{BASE} tuned={tuned}"), "NAME=PATH was expected"),
        (lambda: opened(tuned, **one_place), "nothing is read of tuned; name places"),
        (lambda: opened(tuned, **unknown), "'1.z' is of none of the language models base, tuned; write the name"),
        (lambda: opened(tuned, **{"sweep.places": ()}), "model.models are given, but no places in them; name some"),
        (lambda: opened(tuned, **{"model.path": str(BASE)}), "model.path is .*, but model.models are given"),
        (lambda: harvest_to_store(Options(out=tmp_path / "x", models=config.model.models)), "give --places, such as"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=message) as error:
            act()
        assert "\n" not in str(error.value)
