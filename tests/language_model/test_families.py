"""Every family computes what PyTorch computes, at every place. `tests/data/families` holds its models and what it gave.

`write_families.py` there made them: blocks with windows shorter than the text, norms and biases that are random too.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import FUZZ, loaded_or_refused
from hypothesis import given
from hypothesis import strategies as st
from running import REPOSITORY
from safetensors.numpy import load_file, save_file

from jax_sae.errors import BadInput
from jax_sae.language_model import families
from jax_sae.language_model.decoder import Decoder
from jax_sae.language_model.families import FAMILIES, read_architecture
from jax_sae.language_model.harvest import harvest, read_places
from jax_sae.language_model.places import (
    hugging_face_name,
    place_of_layer,
    places_of,
    read_place,
    transformer_lens_name,
    width_of,
)
from jax_sae.language_model.pretrained import LanguageModel, load_language_model

DATA = Path(__file__).parents[1] / "data" / "families"
ADDED = DATA.parent / "added_family"
MODELS = sorted(path.parent.name for path in DATA.glob("*/config.json"))
LARGER = REPOSITORY.parent / "shared" / "golden" / "families"


def error(found: Any, expected: np.ndarray) -> float:
    """The largest one, relative to the largest number that is expected."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def everything(lm: LanguageModel) -> Callable[[np.ndarray], tuple[jax.Array, dict[str, jax.Array]]]:
    """Of token ids [B, T], logits and what stands at all places: `activations` and `logits` would be two programs."""
    model, params = lm.whole

    @jax.jit
    def read(ids: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        found: dict[str, jax.Array] = {}
        logits = model.apply({"params": params}, ids, lambda at, x: found.setdefault(at, x), method="logits")
        return logits, found

    return read


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    """Each model whole, loaded once."""
    return {name: load_language_model(str(DATA / name)) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_every_place_is_that_of_pytorch(name: Any, models: dict[Any, LanguageModel]) -> None:
    """To 2e-5 relative; the smallest of the mistakes that are easily made, another gelu, makes 2e-4.

    And they add up: the stream is what attention and MLP add to it.
    """
    lm, expected = models[name], np.load(DATA / name / "expected.npz")
    a = lm.model.architecture
    ends = np.cumsum([width_of(place, a) for place in places_of(a)])
    logits, found = jax.tree.map(lambda x: np.asarray(x)[0], everything(lm)(expected["ids"][None]))
    for place, wanted in zip(places_of(a), np.split(expected["places"], ends[:-1], axis=1), strict=True):
        assert error(found[place], wanted) < 2e-5, place
    for layer, wanted in enumerate(expected["hidden"]):
        assert error(found[place_of_layer(layer, a)], wanted) < 2e-5, layer
    assert error(logits, expected["logits"]) < 2e-5
    before, attention, mlp, after = (found[f"1.{x}"] for x in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    assert error(before + attention + mlp, after) < 1e-6


def test_the_family_that_the_page_adds_is_run_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of Python in docs/add_a_language_model.md is all that it takes."""
    page = (REPOSITORY / "docs" / "add_a_language_model.md").read_text()
    monkeypatch.setattr("jax_sae.language_model.families.FAMILIES", dict(FAMILIES))
    with pytest.raises(BadInput, match="'stablelm', which is not run here"):
        load_language_model(str(ADDED))
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    monkeypatch.setattr("jax_sae.language_model.places.FAMILIES", families.FAMILIES)
    lm = load_language_model(str(ADDED))
    test_every_place_is_that_of_pytorch(ADDED, {ADDED: lm})
    with pytest.raises(BadInput, match="here: parallel residuals and qk_layernorm of StableLM are not run"):
        read_architecture({"model_type": "stablelm", "use_parallel_residual": True}, "here")


@pytest.mark.long
@pytest.mark.skipif(not LARGER.exists(), reason="these models are not part of the repository")
@pytest.mark.parametrize("name", sorted(os.listdir(LARGER)) if LARGER.exists() else [])
def test_larger_models_too(name: str) -> None:
    """Sixty tokens of two texts; attention's and the MLP's outputs there are those before a second norm."""
    expected, lm = np.load(LARGER / name / "expected.npz"), load_language_model(str(LARGER / name))
    a = lm.model.architecture
    logits, found = everything(lm)(expected["input_ids"])
    for n in range(a.num_layers + 1):
        assert error(found[place_of_layer(n, a)], expected[f"hidden_state_{n}"]) < 2e-5, n
    wanted = {"1.z": "attn_z", "1.mlp_in": "mlp_in", "1.attn_out": "attn_out", "1.mlp_out": "mlp_out"}
    for place, key in wanted.items():
        if a.placement == "before" or place in ("1.z", "1.mlp_in"):
            assert error(found[place], expected[f"block1_{key}"]) < 2e-5, place
    assert error(logits, expected["logits"]) < 2e-5


# The tap


@pytest.mark.parametrize("name", ["gpt_neox", pytest.param("gemma2", marks=pytest.mark.long)])
def test_a_tap_reads_replaces_and_adds(name: str, models: dict[str, LanguageModel]) -> None:
    """And is pure: it can be jitted, and differentiated through."""
    lm, ids = models[name], np.load(DATA / name / "expected.npz")["ids"]
    plain, places = lm.logits_of(ids), []

    def look(place: str, x: jax.Array) -> jax.Array:
        places.append(place)
        return x

    assert error(jax.jit(lambda ids: lm.run(ids, look))(ids), np.asarray(plain)) < 5e-6
    assert sorted(places) == sorted(places_of(lm.model.architecture))

    place, others = "1.mlp_out", lm.activations([ids[::-1]], ["1.mlp_out"])["1.mlp_out"][0]

    def steered(strength: Any, ids: Any) -> jax.Array:
        return lm.run(ids, lambda at, x: x + strength * others if at == place else x)

    by_hand = jax.jit(lambda ids: lm.run(ids, lambda at, x: x + 0.5 * others if at == "1.resid_post" else x))(ids)
    steer = jax.jit(steered)
    np.testing.assert_allclose(steer(0.5, ids), by_hand, rtol=0, atol=2e-5 * float(np.abs(plain).max()))
    assert error(steer(0.5, ids), np.asarray(plain)) > 1e-2
    slope = jax.jit(jax.grad(lambda s: steered(s, ids)[-1, 0]))(0.5)
    difference = (steer(0.51, ids) - steer(0.49, ids))[-1, 0] / 0.02
    assert float(slope) == pytest.approx(float(difference), rel=0.02, abs=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma3", "gpt_neo"])
def test_a_document_is_read_by_itself_whatever_stands_beside_it(
    name: str, models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch with longer ones, and behind another one in the same row."""
    lm, ids = models[name], np.load(DATA / name / "expected.npz")["ids"]
    texts = [ids[:9], ids, ids[9:20]]
    alone = [lm.activations([text])[0] for text in texts]
    for text, own in zip(lm.activations(texts), alone, strict=True):
        assert error(text, own) < 5e-6
    together, segments = np.concatenate(texts), np.repeat([0, 1, 2], [len(text) for text in texts])
    [(_, packed)] = harvest(lm.model, lm.places, lm.params, [together], [segments])
    assert error(packed, np.concatenate(alone)) < 5e-6
    monkeypatch.setattr("jax_sae.language_model.decoder.QUERIES_AT_A_TIME", 10)
    read_places.clear_cache()  # or the program of before is run
    [(_, in_parts)] = harvest(lm.model, lm.places, lm.params, [together], [segments])
    read_places.clear_cache()
    assert error(in_parts, packed) < 5e-6


# Generation


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt_neo", "gemma3", "gpt_neox", "qwen2"])
def test_kept_keys_and_values_give_the_same_tokens(name: str, models: dict[str, LanguageModel]) -> None:
    """As when all is read again for each token; past the window, and with a tap."""
    lm, ids = models[name], [3, 4, 5]

    def tap(place: str, x: jax.Array) -> jax.Array:
        return x * 0.9 if place == "1.mlp_out" else x

    for change in (lambda place, x: x, tap) if name == "gpt_neo" else (tap,):
        expected = np.array(ids, np.int32)
        read = jax.jit(lambda rows, change=change: lm.run(rows, change))
        while len(expected) < 26:
            row = np.zeros(26, np.int32)
            row[: len(expected)] = expected
            expected = np.append(expected, np.int32(np.argmax(read(row)[len(expected) - 1])))
        np.testing.assert_array_equal(lm.generate(ids, 23, tap=change), expected)
    if name == "gpt_neo":  # how much room there is concerns no family
        np.testing.assert_array_equal(lm.generate(ids, 14, tap=tap), expected[:17])
    np.testing.assert_array_equal(lm.generate(ids, 23, until=int(expected[7]), tap=tap)[-1], expected[7])


@pytest.mark.long
def test_tokens_are_drawn_as_often_as_they_are_likely(models: dict[str, LanguageModel]) -> None:
    """At a temperature, among the likeliest only; and a seed gives the same again."""
    lm = models["gpt2"]
    p = np.asarray(jax.nn.softmax(lm.logits_of([5, 7])[-1] / 3), np.float64)
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.6)) + 1]
    drawn = np.array([lm.generate([5, 7], 1, temperature=3.0, top_p=0.6, seed=seed)[-1] for seed in range(200)])
    assert set(drawn) <= set(kept) and len(set(drawn)) > 1
    share = p[kept] / p[kept].sum()
    found = np.array([(drawn == token).mean() for token in kept])
    assert np.abs(found - share).max() < 5 * np.sqrt(0.25 / 200)
    again = [lm.generate([5, 7], 9, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])


def test_what_cannot_be_generated_is_refused(models: dict[str, LanguageModel]) -> None:
    """With the range that can."""
    lm = models["gpt2"]
    for settings, message in (
        ({"max_new_tokens": 63}, "max_new_tokens is 63; 1 to 62 was expected"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p 0"),
    ):
        with pytest.raises(BadInput, match=message):
            lm.generate([1, 2], **settings)
    with pytest.raises(BadInput, match="the prompt has no tokens"):
        lm.generate([])


# Names of places


def test_a_place_is_understood_by_all_its_names() -> None:
    """TransformerLens', the module's, and the module's without the part in front of it."""
    for name in MODELS:
        a = read_architecture(json.loads((DATA / name / "config.json").read_text()), name)
        kind = json.loads((DATA / name / "config.json").read_text())["model_type"]
        for place in places_of(a):
            module = hugging_face_name(place, a, kind)
            same = read_place(module, a, kind)  # one module may be the input of the next
            assert same == place or hugging_face_name(same, a, kind) == module
            if not place.endswith(("mlp_in", "embed", "final_norm")):
                assert read_place(transformer_lens_name(place), a, kind) == place
    assert read_place("blocks.1.attn.hook_z", a, kind) == "1.z"
    assert read_place("model.layers.2", a, kind) == read_place("layers.2", a, kind) == "2.resid_post"


@pytest.mark.parametrize("bad", ["3.resid_post", "1.resid_past", "resid_post", "", "1", 3, "1.attn_out.x", "-1.z"])
def test_a_place_that_is_not_there_is_refused(bad: Any) -> None:
    """With those that are."""
    with pytest.raises(BadInput, match=r"no place of this language model; .*blocks N from 0 to 2, N\.resid_pre, N\.z"):
        load_language_model(str(DATA / "llama"), places=[bad])


def test_parallel_blocks_have_no_middle(models: dict[str, LanguageModel]) -> None:
    """Attention and MLP are added at once."""
    with pytest.raises(BadInput, match="no place"):
        models["gpt_neox"].activations([[1]], ["1.resid_mid"])


# What is loaded


def test_several_places_are_read_in_one_pass_and_no_further_than_needed(models: dict[str, LanguageModel]) -> None:
    """Side by side, each of its own width; blocks beyond the last place are not loaded."""
    whole = models["qwen3"]
    lm = load_language_model(str(DATA / "qwen3"), places=["1.mlp_hidden", "0.z", "model.layers.1"])
    assert lm.layer == 2 and "h_2" not in lm.params and lm.places == ("1.mlp_hidden", "0.z", "1.resid_post")
    ids = np.arange(1, 12)
    found = np.asarray(lm(ids))
    assert found.shape == (11, 40 + 40 + 24) == (11, lm.width)
    each = whole.activations([ids], lm.places)
    np.testing.assert_allclose(found, np.concatenate([each[p][0] for p in lm.places], 1), rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match=r"does not follow from .* alone; replace what stands there with lm.run"):
        lm.logits_from(found)
    np.testing.assert_allclose(lm.logits_of(ids), whole.logits_of(ids), rtol=0, atol=1e-5)  # reads what is missing
    before = load_language_model(str(DATA / "qwen3"), places=["2.resid_pre"])  # block 2 need not be there
    assert before.layer == 2 and np.array_equal(
        before.activations([[1, 2, 3]])[0], lm.activations([[1, 2, 3]], ["1.resid_post"])["1.resid_post"][0]
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox"])
def test_weights_may_be_kept_in_bfloat16(name: str, models: dict[str, LanguageModel]) -> None:
    """Half of the memory; all but the weights is float32 still, so it equals weights that were rounded."""
    lm, ids = load_language_model(str(DATA / name), 3, dtype="bfloat16"), np.arange(1, 20)
    rounded = jax.tree.map(lambda x: jnp.float32(x), lm.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {"bfloat16", "float32"}
    kernels = [leaf for leaf in jax.tree.leaves(lm.params) if leaf.ndim == 2]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in kernels) and lm(ids).dtype == jnp.float32
    assert error(lm(ids), np.asarray(replace(lm, params=rounded)(ids))) < 5e-6
    assert error(lm(ids), np.asarray(models[name](ids))) < 0.05


def test_weights_in_bfloat16_are_widened_a_matrix_at_a_time() -> None:
    """Of 12 blocks no more is in float32 at once than a third of their matrices: else memory would be float32's."""
    sizes = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 256}
    a = read_architecture(sizes | {"num_hidden_layers": 12, "num_attention_heads": 4}, "a test")
    model, ids = Decoder(a, 11), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    coarse = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    needed = read_places.lower(model, ("10.resid_post",), coarse, ids).compile().memory_analysis().temp_size_in_bytes
    assert needed < sum(leaf.size * 4 for leaf in jax.tree.leaves(params["h_0"])) * 11 / 3


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_model_that_also_sees(prefix: str, tmp_path: Path, models: dict[str, LanguageModel]) -> None:
    """Gemma 3's larger ones: under another prefix, beside the tensors that see, its settings in a part of the file."""
    config = json.loads((DATA / "gemma3" / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 3}}
    tensors = load_file(DATA / "gemma3" / "model.safetensors")
    tensors = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
    seeing = np.zeros((2, 2), np.float16)
    tensors |= {"vision_tower.x.weight": seeing, "multi_modal_projector.y": seeing}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_language_model(str(tmp_path), 3)(np.arange(20))
    np.testing.assert_array_equal(found, load_language_model(str(DATA / "gemma3"), 3)(np.arange(20)))


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.bias", r"lack h\.1\.attn\.c_attn\.bias"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight", "lack layers.0.pre_feedforward"),
        ("gpt_neox", "gpt_neox.layers.2.attention.query_key_value.weight", "lack layers.2.attention.query_key_value"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(name: str, lost: str, message: str, tmp_path: Path) -> None:
    """Before any is read; also one that several modules share."""
    shutil.copy(DATA / name / "config.json", tmp_path)
    tensors = load_file(DATA / name / "model.safetensors")
    one = tensors.pop(lost)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=message):
        load_language_model(str(tmp_path), 3)
    save_file({**tensors, lost: one[:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=rf"{lost.split('.')[-2]}.* has the shape .* config.json asks for"):
        load_language_model(str(tmp_path), 3)
    save_file({**tensors, lost: one, f"{lost.replace('.1.', '.0.')}x.weight": one}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="does not have: they do not belong together"):
        load_language_model(str(tmp_path), 3)


# config.json in both spellings


OLD = {
    "gpt_neox": {"rotary_pct": 0.34, "rotary_emb_base": 10000},
    "gpt_neox_serial": {"rotary_pct": 1.0, "rotary_emb_base": 10000},
    "llama": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_linear": {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": None, "sliding_window_pattern": 3},
    "gemma2": {"rope_theta": 10000.0, "hidden_act": "gelu"},
    "smollm3": {"rope_theta": 2e6},
}


@pytest.mark.parametrize("name", OLD)
def test_files_from_before_transformers_5_say_the_same(name: str) -> None:
    """There positions stood in keys of their own, and types of blocks followed from a pattern."""
    new = json.loads((DATA / name / "config.json").read_text())
    gone = ("rope_parameters", "layer_types", "_sliding_window_pattern", "no_rope_layers")
    old = {key: value for key, value in new.items() if key not in gone} | OLD[name]
    assert read_architecture(old, "old") == read_architecture(new, "new")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama",
            {"model_type": "qwen3_moe"},
            r"'qwen3_moe', which is not run here; run are gpt2, .*export_torch",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "scaled by 'yarn', which is not run .*export_torch"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "scaled by 'longrope'"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("gemma3", {"use_bidirectional_attention": True}, "no language model"),
        ("gemma3", {"layer_types": ["full_attention"]}, r"layer_types is .*; a list of 4 entries"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "a list of 3 entries, 1 or 0"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "an even number was expected"),
        ("qwen2", {"sliding_window": -1}, "sliding_window is -1"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation is 'mish'; known are gelu_new"),
    ],
)
def test_what_is_not_run_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    """With what is, and the way round."""
    config = json.loads((DATA / name / "config.json").read_text()) | change
    with pytest.raises(BadInput, match=f"here.json: ?.*{message}"):
        read_architecture(config, "here.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([1, 2, 4, "full_attention"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=8,
)


@pytest.mark.long
@FUZZ
@given(data=st.data())
def test_whatever_a_config_says_it_is_read_or_refused(data: st.DataObject) -> None:
    """Any JSON value under any key that a family knows."""
    name = data.draw(st.sampled_from(MODELS))
    config = json.loads((DATA / name / "config.json").read_text())
    keys = st.sampled_from([*config, *FAMILIES[config["model_type"]].defaults, "rope_scaling", "head_dim"])
    change = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=3))
    architecture = loaded_or_refused(lambda: read_architecture(config | change, "here.json"), "here.json")
    if architecture is not None:
        assert len(architecture.windows) == len(architecture.rotary) == architecture.num_layers
        assert architecture.num_heads % architecture.num_kv_heads == 0
