"""A .gguf file, as llama.cpp has them -> what a language model is made of, its tensors, its tokenizer.

Quantised weights are turned into float32 when they are read. Needs the package gguf (`pip install 'jax-sae[gguf]'`).

What is easy to get wrong: llama.cpp turns neighbours of a head in Llama's files, so queries and keys are in another
order there; scales of Gemma's norms are stored with 1 added.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.language_model.checkpoint import Tensor
from jax_sae.language_model.families import FAMILIES
from jax_sae.language_model.hub import one_line
from jax_sae.language_model.text import quiet_transformers

FAMILY_OF = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""`general.architecture` -> `model_type`; Mistral's files say llama."""

NEIGHBOURS_TURNED = ("llama", "smollm3")

OUTSIDE = {"token_embd": "wte", "output_norm": "ln_f", "output": "lm_head"}
INSIDE = {
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "post_attention_norm": "ln_1_after",
    "post_ffw_norm": "ln_2_after",
    "attn_q": "attn/q_proj",
    "attn_k": "attn/k_proj",
    "attn_v": "attn/v_proj",
    "attn_q_norm": "attn/q_norm",
    "attn_k_norm": "attn/k_norm",
    "attn_output": "attn/out_proj",
    "ffn_gate": "mlp/c_gate",
    "ffn_up": "mlp/c_fc",
    "ffn_down": "mlp/c_proj",
}

KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""What a .gguf file says, behind the name of its architecture -> the same in a `config.json`."""

CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": CUT.replace("DIGITS", "{1,3}"),
    "qwen2": CUT.replace("DIGITS", ""),
}
"""By `tokenizer.ggml.pre`, how text is cut before pairs are merged; None: as GPT-2 does."""


def open_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a `config.json` would say, and the tensors by the names of the family, not read yet.

    Raises:
        BadInput: if the package gguf is missing, the file is damaged, or of a family or quantisation that is not known.
    """
    reader, fields = _read(file), {}
    for key, value in reader.fields.items():
        if not key.startswith("tokenizer."):
            fields[key] = value.contents()
    name = fields.get("general.architecture")
    if name not in FAMILY_OF:
        raise BadInput(
            f"{file}: its architecture is {shortened(name)}; .gguf files are read of {', '.join(FAMILY_OF)}; give the "
            "model as safetensors"
        )
    family = FAMILIES[FAMILY_OF[name]]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise BadInput(f"{file}: holds no token_embd.weight; is it a part of a file that was divided?")
    config = {ours: fields[f"{name}.{key}"] for key, ours in KEYS.items() if f"{name}.{key}" in fields}
    config |= {"model_type": FAMILY_OF[name], "vocab_size": int(tensors["token_embd.weight"].shape[1])}
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if name in ("gemma2", "gemma3"):
        # not in the file: heads of the two models with 27 billion parameters are scaled by D / heads
        is_27b = config.get("num_hidden_layers") == (46 if name == "gemma2" else 62)
        of_head = config["hidden_size"] / config["num_attention_heads"] if is_27b else config.get("head_dim", 256)
        config["query_pre_attn_scalar"] = of_head
    scaling = fields.get(f"{name}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise BadInput(f"{file}: positions are scaled by {shortened(scaling)}, which is not run here")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": fields[f"{name}.rope.scaling.factor"]}
    if "rope_freqs.weight" in tensors:
        divisors = _values(file, tensors["rope_freqs.weight"])
        config["rope_scaling"] = {"rope_type": "divided", "divisors": [float(each) for each in divisors]}
    of_queries = config.get("num_attention_heads", 1)
    heads = {"attn_q": of_queries, "attn_k": config.get("num_key_value_heads", of_queries)}
    found = {}
    for stored, tensor in tensors.items():
        if stored == "rope_freqs.weight":
            continue
        module, _, leaf = stored.rpartition(".")
        part = module.rpartition(".")[2]
        if module.startswith("blk.") and part in INSIDE and INSIDE[part] in family.inside:
            known = family.block.format(i=module.split(".")[1]) + family.inside[INSIDE[part]]
        else:
            known = family.outside.get(OUTSIDE.get(module, ""), module)
        change: Callable[[np.ndarray], np.ndarray] | None = None
        if name in NEIGHBOURS_TURNED and part in heads:
            change = partial(_halves, heads[part])
        elif family.norm_scales_from_one and part.endswith("norm"):
            change = _less_one
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[f"{known}.{leaf}"] = Tensor(file, stored, shape, partial(_values, file, tensor, change))
    return config, found


def _halves(heads: int, rows: np.ndarray) -> np.ndarray:
    """Rows of heads in which neighbours are a pair -> rows in which numbers of the two halves are."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _less_one(scale: np.ndarray) -> np.ndarray:
    return scale - np.float32(1)


def _values(file: Path, tensor: Any, change: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except (NotImplementedError, ValueError, KeyError) as error:
        kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
        raise BadInput(
            f"{file}: {tensor.name} is quantised as {kind}, which cannot be read ({one_line(error)})"
        ) from error
    value = value.reshape(tuple(int(size) for size in reversed(tensor.shape)))
    return value if change is None else change(value)


def _read(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise BadInput(f"{file}: to read it, the package gguf is needed: pip install 'jax-sae[gguf]'") from error
    try:
        return GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise BadInput(f"{file}: not a whole .gguf file ({one_line(error)}); get it again") from error


def read_gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a .gguf file, as one of transformers, with its special tokens and its chat template.

    Raises:
        BadInput: if it is of a kind that is not known, or damaged.
    """
    quiet_transformers()
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fields = _read(file).fields
    key = "tokenizer.ggml."

    def get(name: str) -> Any:
        return fields[key + name].contents() if key + name in fields else None

    tokens, kind, pre = get("tokens"), get("model"), get("pre") or "default"
    if not tokens or kind not in ("gpt2", "llama") or (kind == "gpt2" and pre not in SPLITS):
        raise BadInput(
            f"{file}: its tokenizer is {shortened(kind)}, {shortened(pre)}; known are gpt2 with {', '.join(SPLITS)}, "
            "and llama; name another tokenizer with --text.tokenizer, or give token ids"
        )
    ids = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":
        merges = [tuple(merge.split(" ", 1)) for merge in get("merges") or []]
        tokenizer = Tokenizer(models.BPE(ids, merges))
        if (split := SPLITS[pre]) is None:
            digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
            cut = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        else:
            from tokenizers import Regex

            bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            cut = [pre_tokenizers.Split(Regex(split), "isolated"), bytes_only]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(ids, _merges(tokens, get("scores")), byte_fallback=True, fuse_unk=True))
        before = [normalizers.Prepend("▁")] if get("add_space_prefix") in (None, True) else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(content=" ", left=1)] if before else [])
        )
    types = get("token_type") or []
    special = [AddedToken(tokens[i], normalized=False, special=True) for i, each in enumerate(types) if each in (3, 4)]
    tokenizer.add_special_tokens(special)
    named = {name: get(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    words = {name: tokens[i] for name, i in named.items() if i is not None and 0 <= i < len(tokens)}
    adds_bos = get("add_bos_token")
    if "bos" in words and (adds_bos if adds_bos is not None else kind == "llama"):
        bos = words["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids[bos])])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words.get("bos"),
        eos_token=words.get("eos"),
        unk_token=words.get("unknown"),
        pad_token=words.get("padding"),
    )
    wrapped.chat_template = (
        fields["tokenizer.chat_template"].contents() if "tokenizer.chat_template" in fields else None
    )
    return wrapped


def _merges(tokens: list[str], scores: list[float] | None) -> list[tuple[str, str]]:
    """Pairs that are merged, in the order of what they become: that of the scores, highest first."""
    order: Mapping[str, float] = dict(zip(tokens, scores or [], strict=False))
    pairs = []
    for token, score in order.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs += [(-score, order.get(a, 0), a, b) for a, b in cuts if a in order and b in order]
    return [(a, b) for *_, a, b in sorted(pairs, key=lambda pair: (pair[0], -len(pair[2])))]
