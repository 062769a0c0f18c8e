"""The network computes what PyTorch's GPT-Neo computes. `tests/data/gpt_neo_*` holds its models and what it gave.

gpt_neo_bin: a .bin with mask buffers and a tied head, as on the hub. gpt_neo_safetensors: the same in the newer format.
gpt_neo_untied: two shards, an untied head, the blocks local-global-local, its own intermediate size, ReLU.
"""

import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import FUZZ, loaded_or_refused
from hypothesis import given
from hypothesis import strategies as st

from jax_sae.errors import BadInput
from jax_sae.language_model.architectures import Architecture
from jax_sae.language_model.decoder import Decoder
from jax_sae.language_model.families import FAMILIES, read_architecture
from jax_sae.language_model.pretrained import load_language_model

DATA = Path(__file__).parents[1] / "data"
LAYERS = {"gpt_neo_bin": 4, "gpt_neo_safetensors": 4, "gpt_neo_untied": 3}


@pytest.mark.parametrize(("name", "layer"), [(name, n) for name, last in LAYERS.items() for n in range(last + 1)])
def test_every_layer_equals_the_hidden_state_of_pytorch(name: str, layer: int) -> None:
    """To 1e-4 absolute, at a scale of 5 to 9."""
    expected = np.load(DATA / name / "expected.npz")
    activations = load_language_model(str(DATA / name), layer).activations(list(expected["input_ids"]))
    assert all(story.dtype == np.float32 for story in activations)
    np.testing.assert_allclose(activations, expected[f"hidden_state_{layer}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_logits_equal_those_of_pytorch_whichever_layer_is_read(name: str) -> None:
    """Also where most of the network is loaded for them only."""
    expected = np.load(DATA / name / "expected.npz")
    for layer in (1, LAYERS[name]):
        logits = load_language_model(str(DATA / name), layer).logits(list(expected["input_ids"]))
        last = [story[-1] for story in logits]
        np.testing.assert_allclose(last, expected["logits_last"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    """The network is causal: what comes later has no influence."""
    model = load_language_model(str(DATA / name), 2)
    ids = np.load(DATA / name / "expected.npz")["input_ids"][0]
    whole = model.activations([ids])[0]
    for length in (1, 7, len(ids) - 1):
        np.testing.assert_allclose(model.activations([ids[:length]])[0], whole[:length], rtol=0, atol=1e-4)
    other_end = np.concatenate([ids[:9], ids[9:] // 2])
    np.testing.assert_allclose(model.activations([other_end])[0][:9], whole[:9], rtol=0, atol=1e-4)


def test_local_attention_sees_256_tokens_of_a_longer_story() -> None:
    """Against a reference that goes over the query positions one by one, in float64."""
    config = read_architecture(
        {
            "model_type": "gpt_neo",
            "vocab_size": 50,
            "hidden_size": 8,
            "num_layers": 4,
            "num_heads": 2,
            "max_position_embeddings": 320,
            "attention_layers": ["local", "global", "local", "global"],
        },
        "config.json",
    )
    assert config.windows == (256, None, 256, None)
    model = Decoder(config, layer=3)
    rng = np.random.default_rng(0)
    ids = rng.integers(50, size=300)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(scale=0.4, size=leaf.shape).astype(np.float32), shapes)
    activations = jax.jit(model.apply)({"params": params}, ids[None])[0]
    np.testing.assert_allclose(activations, slow_reference(params, ids, config, layer=3), rtol=0, atol=2e-4)


def slow_reference(params: Any, ids: np.ndarray, config: Architecture, layer: int) -> np.ndarray:
    """The residual stream after `layer` blocks, from the definition."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x: np.ndarray, p: Any) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        return centred / np.sqrt(x.var(1, keepdims=True) + config.norm_epsilon) * p["scale"] + p["bias"]

    T, d_head = len(ids), config.hidden_size // config.num_heads
    x = params["wte"]["embedding"][ids] + params["wpe"]["embedding"][:T]
    for block in range(layer):
        p = params[f"h_{block}"]
        y = norm(x, p["ln_1"])
        q, k, v = (y @ p["attn"][f"{name}_proj"]["kernel"] for name in "qkv")
        mixed = np.zeros_like(x)
        for t in range(T):
            first = max(0, t - 255) if config.windows[block] else 0
            for head in range(config.num_heads):
                at = slice(head * d_head, (head + 1) * d_head)
                weights = np.exp(k[first : t + 1, at] @ q[t, at])
                mixed[t, at] = weights @ v[first : t + 1, at] / weights.sum()
        x = x + mixed @ p["attn"]["out_proj"]["kernel"] + p["attn"]["out_proj"]["bias"]
        y = norm(x, p["ln_2"]) @ p["mlp"]["c_fc"]["kernel"] + p["mlp"]["c_fc"]["bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + y @ p["mlp"]["c_proj"]["kernel"] + p["mlp"]["c_proj"]["bias"]
    return x


@pytest.mark.parametrize("layer", [-1, 5, 7, True, 2.0, "2"])
def test_a_layer_that_is_not_there_is_refused(layer: Any) -> None:
    """The message says which there are, and what is special about the last."""
    with pytest.raises(BadInput, match="4 blocks; valid are 0 to 4, where 4 is after the final layer norm"):
        load_language_model(str(DATA / "gpt_neo_bin"), layer)


def test_more_tokens_than_positions_are_refused_not_clamped() -> None:
    """JAX would repeat the last position without a word."""
    model = load_language_model(str(DATA / "gpt_neo_bin"), 1)
    with pytest.raises(ValueError, match="97 tokens > 96 positions"):
        model.model.apply({"params": model.params}, jnp.zeros((1, 97), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_heads": 5}, "not a multiple of num_heads"),
        ({"activation_function": "selu"}, "activation_function is 'selu'"),
        ({"attention_layers": ["global"]}, "expected 4 entries"),
        ({"attention_layers": ["global", "local", "sparse", "local"]}, "'global' and 'local'"),
    ],
)
def test_configs_that_cannot_be_run_are_refused_by_name(change: dict[str, object], message: str) -> None:
    """Each message names the file and the key."""
    config = {"model_type": "gpt_neo", "hidden_size": 8, "num_layers": 4, "num_heads": 2} | change
    with pytest.raises(BadInput, match=f"some/config.json: .*{message}"):
        read_architecture(config, "some/config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_types", 5),
        ("attention_types", [[["global"], 10**12]]),
        ("attention_layers", 5),
        ("attention_layers", [["global"], ["local"], ["global"], ["local"]]),
        ("layer_norm_epsilon", "a"),
        ("layer_norm_epsilon", None),
        ("activation_function", ["gelu"]),
        ("activation_function", "tanh"),
        ("intermediate_size", "x"),
        ("intermediate_size", -3),
        ("attention_types", [[["global"], -(10**12)], [["global"], 10**12]]),
        ("attention_types", [[["global"] * 10, 10**12]]),
        ("attention_types", [[{"a": 1}, 4]]),
        ("attention_types", [[["global"], 4.0]]),
        ("hidden_size", 10**9 + 1),
        ("hidden_size", 10**12),
        ("hidden_size", -64),
        ("hidden_size", 64.0),
        ("hidden_size", "64"),
        ("hidden_size", [[[64]]]),
        ("hidden_size", True),
        ("num_layers", 10**9),
        ("num_layers", 1001),
        ("num_layers", None),
        ("vocab_size", 0),
        ("vocab_size", 2**31),
        ("window_size", 0),
        ("window_size", float("inf")),
        ("max_position_embeddings", 10**15),
        ("max_position_embeddings", 10**4000),
        ("intermediate_size", 10**12),
        ("layer_norm_epsilon", float("nan")),
        ("activation_function", "gelu\n\x1b[31m" * 10**6),
        ("num_heads", 0),
        ("tie_word_embeddings", "yes"),
        ("model_type", "mamba"),
    ],
)
def test_a_config_that_cannot_be_is_named(key: str, value: object) -> None:
    """By a line that says the key, what it is and what was expected; and no memory is taken for what it claims."""
    config = {"model_type": "gpt_neo", "num_layers": 4, "attention_types": [[["global", "local"], 2]], key: value}
    tracemalloc.start()
    with pytest.raises(
        BadInput, match=rf"here\.json: .*{key}.* is .*(expected|known are|not a multiple|not run here)"
    ) as error:
        read_architecture(config, "here.json")
    assert tracemalloc.get_traced_memory()[1] < 1e6 and len(str(error.value)) < 300 and str(error.value).isprintable()
    tracemalloc.stop()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([1, 2, 4, "global", "local"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=8,
)
MORE_KEYS = ("intermediate_size", "attention_layers", "attention_types", "model_type")
KEYS = st.sampled_from([*FAMILIES["gpt_neo"].defaults, *MORE_KEYS])


@FUZZ
@given(change=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_whatever_a_config_says_it_is_read_or_refused(change: dict[str, object]) -> None:
    """Any JSON value under any key; what is read has sizes that fit together."""
    small = {"model_type": "gpt_neo", "hidden_size": 8, "num_layers": 4, "num_heads": 2}
    config = loaded_or_refused(lambda: read_architecture(small | change, "here.json"), "here.json")
    if config is not None:
        assert config.hidden_size % config.num_heads == 0 and len(config.windows) == config.num_layers
        assert all(1 <= size <= 2**24 for size in asdict(config).values() if type(size) is int)
