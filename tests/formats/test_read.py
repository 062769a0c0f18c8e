"""Files of every tool become the same record: what it computes is what the tool's own rule does; damage is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.layouts import LAYOUTS, Layout, X
from fuzzing import FUZZ, cuts, flips, loaded_or_refused, splices
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sae.errors import BadInput
from jax_sae.formats.asked import Asked
from jax_sae.formats.dictionary import Dictionary
from jax_sae.formats.read import read_dictionary, recognised


def assert_same(found: Dictionary, layout: Layout) -> None:
    """Features and what they write, to a millionth of the largest number."""
    features, written = layout.computed()
    its = found.encode(X)
    np.testing.assert_allclose(its, features, rtol=0, atol=1e-6 * np.abs(features).max())
    np.testing.assert_allclose(found.decode(its, X), written, rtol=0, atol=1e-6 * np.abs(written).max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_computes_what_its_tool_does(name: str, tmp_path: Path) -> None:
    """With its places and its model, as far as files and names say them."""
    layout = LAYOUTS[name]
    path = layout.write(tmp_path)
    assert recognised(path) == name.split()[0].rstrip(",")
    found = read_dictionary(path)
    assert (found.reads, found.writes, found.model) == ((layout.reads,), (layout.writes,), layout.model)
    assert found.before_norm_weights == (name == "gemma_scope transcoder")
    assert_same(found, layout)
    assert json.loads(json.dumps(dict(found.metadata)))["format"] == name.split()[0].rstrip(",")


def altered(layout: Layout, config: dict[str, Any] | None = None, **tensors: Any) -> Layout:
    """With other entries of its config, and other tensors; None takes one away."""
    changed = {name: x for name, x in (layout.tensors | tensors).items() if x is not None}
    name, content = layout.config
    return replace(layout, tensors=changed, config=(name, {**content, **config} if config else content))


SQUARE = np.eye(6, dtype=np.float32)
SAELENS, DL, OPENAI = (
    LAYOUTS["saelens standard"],
    LAYOUTS["dictionary_learning AutoEncoderTopK"],
    LAYOUTS["openai topk"],
)
TRACER, LLAMA = LAYOUTS["circuit_tracer relu"], LAYOUTS["llamascopium jumprelu"]
CLT = {name: SQUARE.reshape(1, 6, 6) for name in ("w_enc", "w_dec")}
REFUSED: dict[str, tuple[Layout, str]] = {
    "a normaliser that is not in the files": (
        altered(SAELENS, {"normalize_activations": "expected_average_only_in"}),
        "which is not in the files, or has been taken into the weights already; give it by --scale",
    ),
    "whitening": (altered(SAELENS, {"normalize_activations": "covariance_whitening"}), "known are none, "),
    "an architecture that is not held": (altered(SAELENS, {"architecture": "temporal"}), "'temporal'; known are "),
    "a tensor too much": (altered(SAELENS, extra=SQUARE), "holds extra, which this format does not have"),
    "a tensor too little": (altered(SAELENS, b_enc=None), "has no tensor b_enc; it has W_dec, W_enc, b_dec"),
    "whole numbers": (altered(SAELENS, b_dec=np.arange(6)), "b_dec is of int64; one of float16, "),
    "a number that is none": (altered(SAELENS, b_dec=np.full(6, np.nan, np.float32)), "b_dec has numbers that are not"),
    "sizes that do not fit": (
        altered(SAELENS, W_enc=SQUARE),
        r"W_enc has shape \(6, 6\), but by the biases D 6 and F 10; \[D, F\] or \[F, D\] was expected",
    ),
    "a transcoder of layer norm": (
        altered(LAYOUTS["saelens transcoder"], {"normalize_activations": "layer_norm"}),
        "writes at a scale of its own; it is not held",
    ),
    "a hook that means two places": (
        altered(SAELENS, {"metadata": {"hook_name": "blocks.3.hook_mlp_in"}}),
        "say which by --reads 3.resid_mid or --reads 3.mlp_in",
    ),
    "no k": (altered(LAYOUTS["saelens topk"], {"k": None}), "does not say k, .*; give it by --k"),
    "a k above F": (altered(LAYOUTS["saelens topk"], {"k": 11}), "k is 11; a number from 1 to F, 10, was expected"),
    "no class": (replace(DL, config=("", None)), "AutoEncoderTopK and BatchTopKSAE have the same tensors"),
    "another class": (altered(DL, {"trainer": {"dict_class": "IdentityDict"}}), "dict_class is 'IdentityDict'; known"),
    "the largest of each group": (
        altered(LAYOUTS["sparsify"], {"activation": "groupmax"}),
        "'groupmax', which no",
    ),
    "features below 0": (altered(LAYOUTS["sparsify"], {"signed": True}), "signed features, which no kind"),
    "a cross-layer transcoder": (altered(LAYOUTS["gemma_scope_2"], **CLT), "it is a cross-layer transcoder"),
    "circuit-tracer's too": (
        replace(TRACER, config=("config.yaml", "model_kind: cross_layer_transcoder")),
        "a cross-layer transcoder, whose features of each layer write all later ones",
    ),
    "D = F where files are either way round": (
        altered(TRACER, W_enc=SQUARE, W_dec=SQUARE, b_enc=SQUARE[0]),
        r"W_dec has shape \(6, 6\): D = F, and files of this format are kept either way round",
    ),
    "a dictionary of another type": (altered(LLAMA, {"sae_type": "crosscoder"}), "'crosscoder'; known are sae"),
    "what depends on the batch": (altered(LLAMA, {"act_fn": "batchtopk"}), "'batchtopk'; known are relu, jumprelu"),
    "a gate of the encoder": (altered(LLAMA, {"use_glu_encoder": True}), "encoder has a gate of its own"),
    "a norm of 0": (
        altered(LLAMA, **{"dataset_average_activation_norm.blocks.15.hook_resid_post": np.zeros((), np.float32)}),
        "has no mean norm of activations above 0",
    ),
    "a tied decoder": (
        altered(OPENAI, **{"decoder.weight": None, "decoder.linear.weight": SQUARE}),
        "its decoder is tied to its encoder",
    ),
    "features of any sign": (altered(OPENAI, activation="Identity"), "activation is 'Identity'; known are ReLU, TopK"),
    "a name that does not say k": (replace(LAYOUTS["qwen_scope"], path="my/layer4.sae.pt"), "does not say k, "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_held_is_refused_in_a_line_that_says_why(what: str, tmp_path: Path) -> None:
    """And names the file."""
    layout, message = REFUSED[what]
    with pytest.raises(BadInput, match=message) as refused:
        read_dictionary(layout.write(tmp_path))
    assert str(tmp_path) in str(refused.value) and str(refused.value).isprintable()


def test_what_is_asked_for_stands_in_for_what_is_not_said(tmp_path: Path) -> None:
    """k, places, model and scale; two different ones are refused, and so is what is no dictionary."""
    unnamed = replace(LAYOUTS["qwen_scope"], path="my/layer4.sae.pt").write(tmp_path)
    found = read_dictionary(unnamed, asked=Asked("my/model", ("4.resid_mid",), ("4.resid_post",), k=3))
    assert (found.model, found.reads, found.writes, found.k) == ("my/model", ("4.resid_mid",), ("4.resid_post",), 3)
    scaled = altered(SAELENS, {"normalize_activations": "expected_average_only_in"}).write(tmp_path)
    found = read_dictionary(scaled, asked=Asked(scale=0.25))
    features, written = SAELENS.computed(X / 4)
    np.testing.assert_allclose(found.encode(X), features, atol=1e-5)
    np.testing.assert_allclose(found.decode(found.encode(X)), written * 4, atol=1e-4)
    with pytest.raises(BadInput, match="k is 3, but --k is 4; leave that out"):
        read_dictionary(LAYOUTS["saelens topk"].write(tmp_path), asked=Asked(k=4))
    TRACER.write(tmp_path / "several")
    folder = replace(TRACER, path="set/layer_2.safetensors").write(tmp_path / "several").parent
    with pytest.raises(BadInput, match=r"has 2 transcoders \(layer_11.safetensors, layer_2.safetensors\); name the"):
        read_dictionary(folder)
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "empty", "no format of dictionaries has these"),
        (tmp_path / "no", "no such file"),
    ]:
        with pytest.raises(BadInput, match=message):
            read_dictionary(path)
    with pytest.raises(BadInput, match="--format is 'mine'; saelens, "):
        read_dictionary(unnamed, "mine")


def test_d_and_f_may_be_equal_where_the_format_says_which_is_which(tmp_path: Path) -> None:
    """Of the matrix that looks the same either way round, the format's own way is taken."""
    W = np.arange(36, dtype=np.float32).reshape(6, 6)
    for name, turned in (("gemma_scope", False), ("goodfire", True)):
        layout = LAYOUTS[name]
        square = {name: W if x.ndim == 2 else x[:6] for name, x in layout.tensors.items()}
        found = read_dictionary(replace(layout, tensors=square).write(tmp_path / name))
        np.testing.assert_array_equal(found.W_enc, W.T if turned else W)
        np.testing.assert_array_equal(found.W_dec, W.T if turned else W)


FUZZED = ("saelens gated", "dictionary_learning BatchTopKSAE", "gemma_scope", "circuit_tracer topk", "openai topk")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[tuple[Path, bytes]]]]:
    """Of some layouts, what is given to the importer, and each file with its content."""
    found = {}
    for name in (
        "saelens gated",
        "dictionary_learning BatchTopKSAE",
        "gemma_scope",
        "circuit_tracer topk",
        "openai topk",
    ):
        folder = tmp_path_factory.mktemp("fuzz")
        path = LAYOUTS[name].write(folder)
        found[name] = path, [(file, file.read_bytes()) for file in sorted(folder.rglob("*")) if file.is_file()]
    return found


FEWER = settings(FUZZ, max_examples=80)


@FEWER
@given(data=st.data())
def test_damaged_files_are_read_or_refused(
    written: dict[str, tuple[Path, list[tuple[Path, bytes]]]], data: st.DataObject
) -> None:
    """In one line that names them, whatever is damaged in whichever file."""
    path, files = written[data.draw(st.sampled_from(sorted(written)))]
    file, content = data.draw(st.sampled_from(files))
    damaged = data.draw(st.one_of(flips(content), cuts(content), splices(content)))
    file.write_bytes(damaged)
    try:
        loaded_or_refused(lambda: read_dictionary(path), str(path.parent))
    finally:
        file.write_bytes(content)


ANYTHING = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), st.lists)


@pytest.mark.long
@FEWER
@given(data=st.data())
def test_configs_may_hold_anything(
    written: dict[str, tuple[Path, list[tuple[Path, bytes]]]], data: st.DataObject
) -> None:
    """A value of another type than its tool writes is refused in one line."""
    path, files = written[data.draw(st.sampled_from(("saelens gated", "dictionary_learning BatchTopKSAE")))]
    config, content = next((file, content) for file, content in files if file.suffix == ".json")
    entries = json.loads(content)
    entries[data.draw(st.sampled_from(sorted(entries)))] = data.draw(ANYTHING)
    config.write_text(json.dumps(entries))
    try:
        loaded_or_refused(lambda: read_dictionary(path), str(path.parent))
    finally:
        config.write_bytes(content)
