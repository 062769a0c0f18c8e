"""The families of language models that are run: what their `config.json` says, and what their tensors are called.

A family is one `Family`: a function from a `config.json` to an `Architecture`, and the names under which a checkpoint
keeps each module of `decoder.py`. docs/add_a_language_model.md adds one by an example.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from reprlib import repr as shortened
from typing import Any, Literal

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.language_model.architectures import FULL, SLIDING, WAY_ROUND, Architecture, ConfigReader

Part = Callable[[np.ndarray, Architecture], np.ndarray]
"""Of a tensor [out, ...] that holds several modules, the rows of one."""


@dataclass(frozen=True)
class Family:
    """How a family is read. Names of modules are those of `decoder.py`; a block's stand without `h_{i}/`."""

    architecture: Callable[[ConfigReader], Architecture]
    """From the contents of its `config.json`."""
    defaults: Mapping[str, Any]
    """What transformers' class takes for keys that are absent there."""
    prefixes: tuple[str, ...]
    """What stands before the names of tensors, but for the head; checkpoints of the bare network have none."""
    outside: Mapping[str, str]
    """Module -> tensor, without `.weight` and `.bias`, outside of the blocks; the head's name without the prefix."""
    block: str
    """What stands before the names of a block's tensors, with {i} for its number."""
    inside: Mapping[str, str]
    """Module -> tensor, of a block."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """For modules that share a tensor: which rows are theirs."""
    linear: Literal["out_in", "in_out"] = "out_in"
    """How matrices of linear layers are stored."""
    norm_scales_from_one: bool = False
    """Whether scales of norms are stored as their difference from 1."""
    constants: tuple[str, ...] = ()
    """Ends of the names of tensors that are no weights."""


def _third(number: int, value: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Of [3 D, ...]: queries, keys and values below each other."""
    return value[number * architecture.hidden_size : (number + 1) * architecture.hidden_size]


def _of_each_head(number: int, value: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Of [heads * 3 * head_dim, ...]: each head's query, key and value below each other."""
    heads, rest = (architecture.num_heads, 3, architecture.head_dim), value.shape[1:]
    if value.shape[0] != math.prod(heads):  # refused by its shape, where it is looked at
        return value
    return value.reshape(*heads, *rest)[:, number].reshape(-1, *rest)


# GPT-2, GPT-Neo and GPT-NeoX


def _gpt2(c: ConfigReader) -> Architecture:
    D, L, heads = c.size("n_embd"), c.blocks("n_layer"), c.size("n_head")
    c.refuse_remainder("n_embd", D, "n_head", heads)
    scale = (D // heads) ** -0.5 if c.flag("scale_attn_weights") else 1.0
    by_number = c.flag("scale_attn_by_inverse_layer_idx")
    return Architecture(
        vocab_size=c.size("vocab_size"),
        hidden_size=D,
        num_layers=L,
        num_heads=heads,
        max_position_embeddings=c.size("n_positions", "n_ctx"),
        intermediate_size=c.size("n_inner", default=4 * D),
        activation=c.activation("activation_function"),
        norm_epsilon=c.epsilon("layer_norm_epsilon"),
        head_dim=D // heads,
        num_kv_heads=heads,
        windows=(None,) * L,
        rotary=(None,) * L,
        attention_scales=tuple(scale / (i + 1) if by_number else scale for i in range(L)),
        norm="layer",
        learned_positions=True,
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=c.flag("tie_word_embeddings"),
    )


def _gpt_neo(c: ConfigReader) -> Architecture:
    """Its attention logits are not divided by the root of a head's width."""
    D, L, heads, window = c.size("hidden_size"), c.blocks("num_layers"), c.size("num_heads"), c.size("window_size")
    c.refuse_remainder("hidden_size", D, "num_heads", heads)
    kinds = _attention_kinds(c, L)
    if len(kinds) != L or any(kind not in ("global", "local") for kind in kinds):
        raise BadInput(
            f"{c.where}: attention_layers, or attention_types written out, is not a list of 'global' and 'local'; "
            f"expected {L} entries (num_layers)"
        )
    return Architecture(
        vocab_size=c.size("vocab_size"),
        hidden_size=D,
        num_layers=L,
        num_heads=heads,
        max_position_embeddings=c.size("max_position_embeddings"),
        intermediate_size=c.size("intermediate_size", default=4 * D),
        activation=c.activation("activation_function"),
        norm_epsilon=c.epsilon("layer_norm_epsilon"),
        head_dim=D // heads,
        num_kv_heads=heads,
        windows=tuple(window if kind == "local" else None for kind in kinds),
        rotary=(None,) * L,
        attention_scales=(1.0,) * L,
        norm="layer",
        learned_positions=True,
        gated=False,
        out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=c.flag("tie_word_embeddings"),
    )


def _attention_kinds(c: ConfigReader, num_layers: int) -> tuple[Any, ...]:
    """The kind of each block, where the config's lists have the right form; else something of another length."""
    kinds = c.get("attention_layers")
    if kinds is None:
        kinds = []
        types: Any = [[["global", "local"], num_layers // 2]]
        if (given := c.get("attention_types")) is not None:
            types = given
        try:
            for pattern, repeats in types:
                if len(kinds) + len(pattern) * repeats > num_layers:  # before it is written out, at any length
                    return ()
                kinds += pattern * repeats
        except (TypeError, ValueError):
            return ()
    return tuple(kinds) if isinstance(kinds, list) else ()


def _gpt_neox(c: ConfigReader) -> Architecture:
    D, L, heads = c.size("hidden_size"), c.blocks("num_hidden_layers"), c.size("num_attention_heads")
    c.refuse_remainder("hidden_size", D, "num_attention_heads", heads)
    return Architecture(
        vocab_size=c.size("vocab_size"),
        hidden_size=D,
        num_layers=L,
        num_heads=heads,
        max_position_embeddings=c.size("max_position_embeddings"),
        intermediate_size=c.size("intermediate_size"),
        activation=c.activation("hidden_act"),
        norm_epsilon=c.epsilon("layer_norm_eps"),
        head_dim=D // heads,
        num_kv_heads=heads,
        windows=(None,) * L,
        rotary=(c.rotary(D // heads),) * L,
        attention_scales=((D // heads) ** -0.5,) * L,
        norm="layer",
        parallel=c.flag("use_parallel_residual"),
        gated=False,
        qkv_bias=c.flag("attention_bias"),
        out_bias=c.flag("attention_bias"),
        mlp_bias=True,
        tie_word_embeddings=c.flag("tie_word_embeddings"),
    )


# Llama, and those that differ from it by a few fields


def _llama(c: ConfigReader) -> Architecture:
    D, L, heads = c.size("hidden_size"), c.blocks("num_hidden_layers"), c.size("num_attention_heads")
    if c.get("head_dim") is None:
        c.refuse_remainder("hidden_size", D, "num_attention_heads", heads)
    head_dim = c.size("head_dim", default=max(1, D // heads))
    kv_heads = c.size("num_key_value_heads", default=heads)
    c.refuse_remainder("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    if c.get("use_bidirectional_attention"):
        raise BadInput(f"{c.where}: its tokens see what comes after them, so it is no language model; {WAY_ROUND}")
    return Architecture(
        vocab_size=c.size("vocab_size"),
        hidden_size=D,
        num_layers=L,
        num_heads=heads,
        max_position_embeddings=c.size("max_position_embeddings"),
        intermediate_size=c.size("intermediate_size"),
        activation=c.activation("hidden_act"),
        norm_epsilon=c.epsilon("rms_norm_eps"),
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        windows=(None,) * L,
        rotary=(c.rotary(head_dim),) * L,
        attention_scales=(head_dim**-0.5,) * L,
        norm="rms",
        qkv_bias=c.flag("attention_bias"),
        out_bias=c.flag("attention_bias"),
        mlp_bias=c.flag("mlp_bias"),
        tie_word_embeddings=c.flag("tie_word_embeddings"),
    )


def _mistral(c: ConfigReader) -> Architecture:
    llama = _llama(c)
    window = None if c.is_null("sliding_window") else c.size("sliding_window")
    return replace(llama, windows=(window,) * llama.num_layers)


def _qwen2(c: ConfigReader) -> Architecture:
    return replace(_qwen3(c), qk_norm="none", qkv_bias=True, out_bias=False)


def _qwen3(c: ConfigReader) -> Architecture:
    llama, first = _llama(c), c.get("max_window_layers")
    if not isinstance(first, int):
        raise c.bad(("max_window_layers",), first, "the number of a block was expected")
    windows = llama.windows
    if c.flag("use_sliding_window"):
        windows = c.windows(llama.num_layers, lambda i: i >= first)
    return replace(llama, windows=windows, qk_norm="head")


def _smollm3(c: ConfigReader) -> Architecture:
    llama, every = _llama(c), c.size("no_rope_layer_interval")
    L = llama.num_layers
    if c.flag("use_sliding_window"):
        raise BadInput(f"{c.where}: use_sliding_window is true, which is not run here for smollm3; {WAY_ROUND}")
    turned = c.get("no_rope_layers")  # 1 where they are turned, whatever its name says
    if turned is None:
        turned = [int((i + 1) % every != 0) for i in range(L)]
    if not isinstance(turned, list) or len(turned) != L or any(each not in (0, 1) for each in turned):
        raise c.bad(("no_rope_layers",), turned, f"a list of {L} entries, 1 or 0, was expected")
    return replace(llama, rotary=tuple(llama.rotary[i] if turned[i] else None for i in range(L)))


def _olmo2(c: ConfigReader) -> Architecture:
    return replace(_llama(c), placement="after", qk_norm="all")


def _gemma(c: ConfigReader) -> Architecture:
    """Old files say hidden_act gelu and mean its approximation by tanh, as hidden_activation does."""
    llama = _llama(ConfigReader({**c.config, "hidden_act": c.activation("hidden_activation")}, c.defaults, c.where))
    return replace(llama, embedding_scale=float(np.float32(llama.hidden_size**0.5)))


def _gemma2(c: ConfigReader) -> Architecture:
    gemma = _gemma(c)
    return replace(
        gemma,
        windows=c.windows(gemma.num_layers, lambda i: i % 2 == 0),
        attention_scales=(c.number("query_pre_attn_scalar") ** -0.5,) * gemma.num_layers,
        placement="both",
        attention_cap=c.optional_number("attn_logit_softcapping"),
        logit_cap=c.optional_number("final_logit_softcapping"),
    )


def _gemma3(c: ConfigReader) -> Architecture:
    """Of a model that also sees, the text's part of its `config.json`."""
    if isinstance(text := c.get("text_config"), dict):
        c = ConfigReader(text, c.defaults, f"{c.where}: text_config")
    every = c.size("sliding_window_pattern", "_sliding_window_pattern")
    given = c.config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise c.bad(("rope_parameters",), given, "an object was expected")
    # before transformers 5 rope_theta and rope_scaling were those of the blocks without a window
    local = {"rope_parameters": given[SLIDING]} if SLIDING in given else {}
    theta = {"rope_theta": c.number("rope_local_base_freq")}
    gemma = _gemma2(ConfigReader({**c.config, "rope_parameters": given.get(FULL)}, c.defaults, c.where))
    narrow = ConfigReader(local, theta, c.where).rotary(gemma.head_dim)
    windows = c.windows(gemma.num_layers, lambda i: (i + 1) % every != 0)
    rotary = tuple(wide if window is None else narrow for wide, window in zip(gemma.rotary, windows, strict=True))
    return replace(gemma, windows=windows, rotary=rotary, qk_norm="head")


# The names of their tensors

_QKV = ("attn/q_proj", "attn/k_proj", "attn/v_proj")
_OF_GPT2 = {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f", "lm_head": "lm_head"}
_BLOCK_OF_GPT2 = {
    "ln_1": "ln_1",
    "ln_2": "ln_2",
    "attn/out_proj": "attn.c_proj",
    "mlp/c_fc": "mlp.c_fc",
    "mlp/c_proj": "mlp.c_proj",
}
_OF_LLAMA = {"wte": "embed_tokens", "ln_f": "norm", "lm_head": "lm_head"}
_BLOCK_OF_LLAMA = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    **{f"attn/{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")},
    "attn/out_proj": "self_attn.o_proj",
    "mlp/c_gate": "mlp.gate_proj",
    "mlp/c_fc": "mlp.up_proj",
    "mlp/c_proj": "mlp.down_proj",
}
_BLOCK_OF_GEMMA2 = _BLOCK_OF_LLAMA | {
    "ln_1_after": "post_attention_layernorm",
    "ln_2": "pre_feedforward_layernorm",
    "ln_2_after": "post_feedforward_layernorm",
}

_LLAMA = Family(
    _llama,
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    ("model.",),
    _OF_LLAMA,
    "layers.{i}.",
    _BLOCK_OF_LLAMA,
    constants=(".rotary_emb.inv_freq",),
)


def _like(family: Family, architecture: Callable[[ConfigReader], Architecture], **defaults: Any) -> Family:
    """A family whose `config.json` is read otherwise, or has other defaults."""
    return replace(family, architecture=architecture, defaults={**family.defaults, **defaults})


_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_GEMMA = replace(
    _like(
        _LLAMA,
        _gemma,
        vocab_size=256000,
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        intermediate_size=24576,
        max_position_embeddings=8192,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    norm_scales_from_one=True,
)
_GEMMA2 = replace(
    _like(
        _GEMMA,
        _gemma2,
        hidden_size=2304,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=9216,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    inside=_BLOCK_OF_GEMMA2,
)
_GEMMA3 = _like(
    _GEMMA2,
    _gemma3,
    vocab_size=262208,
    max_position_embeddings=131072,
    rope_theta=1e6,
    rope_local_base_freq=10000.0,
    sliding_window_pattern=6,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        _gpt2,
        {
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        },
        ("transformer.",),
        _OF_GPT2,
        "h.{i}.",
        _BLOCK_OF_GPT2 | dict.fromkeys(_QKV, "attn.c_attn"),
        parts={name: partial(_third, number) for number, name in enumerate(_QKV)},
        linear="in_out",
        constants=(".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neo": Family(
        _gpt_neo,
        {
            "vocab_size": 50257,
            "hidden_size": 2048,
            "num_layers": 24,
            "num_heads": 16,
            "max_position_embeddings": 2048,
            "window_size": 256,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        ("transformer.",),
        _OF_GPT2,
        "h.{i}.",
        _BLOCK_OF_GPT2
        | {f"attn/{name}": f"attn.attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        constants=(".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    "gpt_neox": Family(
        _gpt_neox,
        {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
            "max_position_embeddings": 2048,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10000.0,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        ("gpt_neox.",),
        {"wte": "embed_in", "ln_f": "final_layer_norm", "lm_head": "embed_out"},
        "layers.{i}.",
        {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            **dict.fromkeys(_QKV, "attention.query_key_value"),
            "attn/out_proj": "attention.dense",
            "mlp/c_fc": "mlp.dense_h_to_4h",
            "mlp/c_proj": "mlp.dense_4h_to_h",
        },
        parts={name: partial(_of_each_head, number) for number, name in enumerate(_QKV)},
        constants=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    "llama": _LLAMA,
    "mistral": _like(
        _LLAMA,
        _mistral,
        num_key_value_heads=8,
        intermediate_size=14336,
        max_position_embeddings=131072,
        sliding_window=4096,
    ),
    "qwen2": _like(_LLAMA, _qwen2, **_QWEN, max_window_layers=28, sliding_window=4096),
    "qwen3": _like(_LLAMA, _qwen3, **_QWEN, max_window_layers=28, sliding_window=4096, head_dim=128),
    "smollm3": _like(
        _LLAMA,
        _smollm3,
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=2e6,
        no_rope_layer_interval=4,
        tie_word_embeddings=True,
    ),
    "olmo2": replace(
        _like(_LLAMA, _olmo2, vocab_size=50304, rms_norm_eps=1e-5),
        inside={name: tensor for name, tensor in _BLOCK_OF_LLAMA.items() if not name.startswith("ln_")}
        | {"ln_1_after": "post_attention_layernorm", "ln_2_after": "post_feedforward_layernorm"},
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": replace(_GEMMA3, prefixes=("language_model.model.", "model.language_model.", "model.")),
}
"""By `model_type`, as `config.json` has it."""


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`.

    Raises:
        BadInput: if it is not run here.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise BadInput(
            f"{where}: model_type is {shortened(model_type)}, which is not run here; run are {', '.join(FAMILIES)}; "
            f"for another one, {WAY_ROUND}"
        )
    return FAMILIES[model_type]


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """What the contents of a `config.json` say; absent keys take the defaults of transformers' class for the family.

    Args:
        config: the contents, spelt as by transformers 5 or as before.
        where: names it in errors.

    Raises:
        BadInput: if the family is not run here, or its numbers cannot be or contradict each other.
    """
    family = family_of(config, where)
    return family.architecture(ConfigReader(config, family.defaults, where))
