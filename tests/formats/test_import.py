"""A dictionary of another tool becomes a run that computes the same, and that everything else works on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.layouts import LAYOUTS, X
from running import REPOSITORY
from safetensors.numpy import save_file

import jax_sae
from jax_sae.commands import main
from jax_sae.config import TextConfig
from jax_sae.errors import BadInput
from jax_sae.formats.asked import Asked
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.read import read_dictionary
from jax_sae.run.imported import config_of_import, content, member_of, without_norm_weights
from jax_sae.run.load import make_autoencoder
from jax_sae.trained import TrainedAutoencoder

MODEL = REPOSITORY / "jax_sae" / "demo" / "model"
TOKENS, D, F, K = 1500, 64, 128, 24


def as_trained(dictionary: Dictionary) -> TrainedAutoencoder:
    """The member that an import makes of it, without a directory."""
    made = member_of(dictionary)
    config = config_of_import(made[0], "m", TextConfig(path="t"), 1)
    return make_autoencoder(*content(dictionary, made, config, {}, "files"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_member_computes_what_the_tool_does(name: str, tmp_path: Path) -> None:
    """Whatever a kind here does with b_dec, and with activations normalised as they are there."""
    layout = LAYOUTS[name]
    sae = as_trained(read_dictionary(layout.write(tmp_path)))
    features, written = layout.computed()
    np.testing.assert_allclose(sae.encode(X), features, rtol=0, atol=1e-6 * np.abs(features).max())
    np.testing.assert_allclose(sae(X), written, rtol=0, atol=1e-6 * np.abs(written).max())
    assert (sae.reads, sae.writes) == ((layout.reads,), (layout.writes,))
    assert sae.per_token == {"saelens topk of layer norm": "layer_norm", "openai topk": "layer_norm"}.get(
        name, "norm" if "of one norm" in name else None
    )


def test_what_depends_on_the_token_is_refused_where_there_is_none(tmp_path: Path) -> None:
    """A decoder that gives each token its own scale back needs the token; 0 has no norm, and stays 0."""
    sae = as_trained(read_dictionary(LAYOUTS["openai topk"].write(tmp_path)))
    for use, message in [
        (lambda: sae.decode(sae.encode(X)), r"normalises each token by itself, .* decode\(features, inputs=x\)"),
        (lambda: sae.direction(3), "what a feature adds depends on the token"),
    ]:
        with pytest.raises(BadInput, match=message):
            use()
    of_norm = as_trained(read_dictionary(LAYOUTS["saelens jumprelu of tokens of one norm"].write(tmp_path)))
    assert np.isfinite(of_norm(np.zeros((2, 6), np.float32))).all()


def test_a_norms_weights_are_taken_into_an_encoder_that_reads_before_them(tmp_path: Path) -> None:
    """What the MLP reads is that times the weights; a weight of 0 leaves nothing to divide."""
    found = read_dictionary(LAYOUTS["gemma_scope transcoder"].write(tmp_path))
    weights = np.linspace(0.5, 2, 6)
    np.testing.assert_allclose(
        without_norm_weights(found, weights).encode((X * weights).astype(np.float32)), found.encode(X), atol=1e-5
    )
    with pytest.raises(BadInput, match=r"has \(6,\) weights, 1 of them 0; D is 6"):
        without_norm_weights(found, np.arange(6.0))


# On the embedded language model


@pytest.fixture(scope="module")
def activations() -> np.ndarray:
    """Some at 1.resid_post."""
    lm = jax_sae.load_language_model(str(MODEL), places=("1.resid_post",))
    from jax_sae.language_model.dataset import open_dataset

    rows = open_dataset("jax_sae/demo/stories", "")["train"]
    return np.concatenate(lm.activations([rows[i]["text"] for i in range(40)]))


Write = Callable[..., Path]


@pytest.fixture
def write(activations: np.ndarray, tmp_path: Path) -> Write:
    """Writes a folder of SAELens: features along both directions of each principal component."""
    mean = activations.mean(0)
    components = np.linalg.svd(activations - mean, full_matrices=False)[2]
    W_dec = np.concatenate([components, -components]).astype(np.float32)
    good = {"W_enc": W_dec.T.copy(), "b_enc": np.zeros(F, np.float32), "W_dec": W_dec, "b_dec": mean}
    its = {"hook_name": "blocks.1.hook_resid_post", "prepend_bos": False}

    def write(config: dict[str, Any], **tensors: np.ndarray) -> Path:
        arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in (good | tensors).items()}
        folder = tmp_path / f"sae{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_file(arrays, folder / "sae_weights.safetensors")
        cfg = {"architecture": "topk", "k": K, "d_in": D, "apply_b_dec_to_input": True, "metadata": its, **config}
        (folder / "cfg.json").write_text(json.dumps(cfg))
        return folder

    return write


@pytest.mark.long
def test_an_imported_run_is_as_one_that_was_trained(
    write: Write, tmp_path: Path, activations: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what it is worth, is evaluated, has pages, steers and is inspected; only training cannot go on."""
    source, out = write({}), tmp_path / "run"
    words = ["import", str(source), "--to", str(out), "--model", str(MODEL), "--tokens", str(TOKENS)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"imported      {source}: saelens: topk, F 128, D 64, k 24, b_dec is subtracted" in said
    assert "L0 24.0 of 128" in said and "warning" not in said and "recovered 0.9" in said
    run = jax_sae.open_run(out)
    assert run.is_finished and run.names == ["F128"] and run.summary is not None
    sae, x = run["F128"], activations[:100]
    np.testing.assert_allclose(sae.encode(x), read_dictionary(source).encode(x), atol=1e-4)
    measured = run.evaluate(tokens=TOKENS)["members"][0]
    assert measured["fvu"] == pytest.approx(run.summary["members"][0]["fvu"], rel=1e-6) and 0 < measured["fvu"] < 0.2
    assert f"FVU {run.summary['members'][0]['fvu']:.3g}" in repr(sae)
    assert jax_sae.feature_pages(out, tokens=TOKENS).is_file()
    steered = run.steer("F128", 3, "Once upon a time", [5.0], max_new_tokens=3, seeds=(0,))
    assert [len(each["texts"]) for each in steered["results"]] == [1, 1]
    assert len(run.table()) == 1 and run.plot_frontier() is not None
    capsys.readouterr()
    assert main(["inspect", str(out), "--verify"]) == 0
    said = capsys.readouterr().out
    assert f"imported from {source}" in said and "verified, " in said
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "holds a dictionary that was imported" in capsys.readouterr().err
    assert main(words) == 2 and f"{out} already holds a run" in capsys.readouterr().err


def test_an_import_that_makes_no_sense_says_what_is_probably_wrong(
    write: Write, tmp_path: Path, activations: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """On real activations: b_dec, a scale that is missing or applied twice, a matrix the wrong way round."""
    mean, scale = activations.mean(0), np.sqrt(D) / np.linalg.norm(activations, axis=1).mean()
    components = np.linalg.svd(activations - mean, full_matrices=False)[2]
    both = np.concatenate([components[: D // 2], -components[: D // 2]])
    turned = {"b_enc": np.zeros(D), "W_dec": both, "W_enc": both}  # not both.T
    cases: list[tuple[Path, str]] = [
        (write({"apply_b_dec_to_input": False}), "b_dec should be subtracted from what it encodes"),
        (write({}, b_dec=mean * scale), "its normaliser is missing: try --scale 0.07"),
        (write({}, b_dec=mean / scale), "its normaliser is applied twice: try --scale"),
        (write({}, **turned), "W_enc is the wrong way round"),
        (write({"architecture": "standard"}, b_enc=np.full(F, 5.0)), "a threshold or k is missing"),
    ]
    for source, message in cases:
        jax_sae.import_dictionary(source, tmp_path / f"{source.name}-run", model=MODEL, tokens=400)
        said = capsys.readouterr().out
        assert f"probably {message}" in said, (message, said)


def test_what_does_not_belong_to_the_language_model_is_refused(write: Write, tmp_path: Path) -> None:
    """Before anything is written: another width, no such place, none said; and what needs a model that is not there."""
    source, run = write({}), tmp_path / "run"
    transcoder = LAYOUTS["gemma_scope transcoder"].write(tmp_path)
    unnamed = replace(LAYOUTS["goodfire"], path="x.pth").write(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"source": source, "place": "1.mlp_hidden"}, "it reads 64 numbers, but 1.mlp_hidden of .* has 256: it is of"),
        ({"source": source, "place": "9.resid_post"}, "'9.resid_post' is no place of this language model"),
        ({"source": unnamed}, "does not say where its activations are from; give --place"),
        ({"source": tmp_path / "nothing"}, "there is no such file or folder"),
    ]
    for arguments, message in cases:
        with pytest.raises(BadInput, match=message):
            jax_sae.import_dictionary(**arguments, out=run, model=MODEL)
    with pytest.raises(BadInput, match=r"without the weights of the norm, .* google/gemma-2-2b is not on this machine"):
        jax_sae.import_dictionary(transcoder, run)
    assert not run.exists()
    found = jax_sae.import_dictionary(unnamed, run, place="3.resid_post")  # nothing to measure it on
    assert found.summary is None and found["F10"].place == "3.resid_post"
    assert Asked().k is None


@pytest.mark.parametrize(
    "name", ["openai topk", "saelens jumprelu", "saelens gated, x itself", "circuit_tracer jumprelu"]
)
def test_what_was_imported_is_exported_and_imported_again(name: str, tmp_path: Path) -> None:
    """A member of a run goes to SAELens and back with the same features, its normaliser too."""
    sae = as_trained(read_dictionary(LAYOUTS[name].write(tmp_path)))
    again = read_dictionary(sae.export("saelens", tmp_path / "exported"))
    assert again.normaliser == sae.per_token
    features, written = LAYOUTS[name].computed()
    np.testing.assert_allclose(again.encode(X), features, rtol=0, atol=2e-6 * np.abs(features).max())
    np.testing.assert_allclose(again.decode(again.encode(X), X), written, rtol=0, atol=2e-6 * np.abs(written).max())
