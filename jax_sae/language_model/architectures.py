"""What a language model is made of, as a record; and how numbers are read from a `config.json`.

`families.py` fills the record for each family, `decoder.py` runs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any, Literal

import numpy as np

from jax_sae.errors import BadInput

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "swish")
"""Names of the activation functions that `decoder.py` has; the first two are the same."""

MOST_BLOCKS = 1000
LARGEST_SIZE = 2**24  # of the others; JAX overflows at sizes of 2**31

FULL, SLIDING = "full_attention", "sliding_attention"  # types of blocks, in `layer_types`

WAY_ROUND = "write its activations with scripts/export_torch_activations.py and give --activations.path"


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: the two halves of a head's first `dims` numbers are turned by position times frequency.

    Source: Su et al. 2021, "RoFormer".
    """

    theta: float
    """Frequencies are theta^(-2j / dims), j = 0 to dims / 2 - 1."""
    dims: int
    """Even, at most the width of a head."""
    divisors: tuple[float, ...] = ()
    """What each frequency is divided by, so that longer texts turn no further; () for nothing."""

    def frequencies(self) -> np.ndarray:
        """Radians per position, [dims / 2] float32."""
        frequencies = self.theta ** -(np.arange(0, self.dims, 2) / self.dims)
        return (frequencies / (self.divisors or 1.0)).astype(np.float32)


def llama3_divisors(rotary: Rotary, factor: float, low: float, high: float, positions: int) -> tuple[float, ...]:
    """Those of Llama 3.1, by how often a frequency turns in the `positions` of the first training.

    Fewer times than `low`: `factor`; more often than `high`: 1; between the two the frequency is interpolated.
    """
    kept = np.clip((positions * rotary.frequencies() / (2 * np.pi) - low) / (high - low), 0, 1)
    return tuple((1 / (kept + (1 - kept) / factor)).tolist())


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: its sizes, and which of the known parts it has."""

    vocab_size: int
    hidden_size: int
    """D, the width of the residual stream."""
    num_layers: int
    """Blocks."""
    num_heads: int
    max_position_embeddings: int
    """The most tokens that it may read at once."""
    intermediate_size: int
    """Width of an MLP's hidden layer."""
    activation: str
    norm_epsilon: float
    head_dim: int
    """Width of a head; heads together may be wider or narrower than D."""
    num_kv_heads: int
    """Heads of keys and values; each serves num_heads / num_kv_heads heads of queries."""
    windows: tuple[int | None, ...]
    """For each block, how many tokens a token sees, itself included; None: all before it."""
    rotary: tuple[Rotary | None, ...]
    """For each block; None: queries and keys are not turned."""
    attention_scales: tuple[float, ...]
    """For each block, what attention logits are multiplied by."""
    norm: Literal["layer", "rms"]
    """LayerNorm with a bias, or x / sqrt(mean(x^2) + epsilon) * scale."""
    placement: Literal["before", "after", "both"] = "before"
    """Where attention and MLP are normalised: what they read, what they add to the residual stream, or both."""
    learned_positions: bool = False
    """Whether a learned vector of its position is added to each token's embedding."""
    parallel: bool = False
    """Whether attention and MLP both read the block's input, and are added to it together."""
    gated: bool = True
    """Whether the MLP's hidden layer is activation(gate(x)) * up(x), else activation(up(x))."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMS norms of queries and keys, before they are turned: of each head, or of all heads together."""
    qkv_bias: bool = False
    out_bias: bool = False
    """Of the attention's output projection."""
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    attention_cap: float | None = None
    """Attention logits become cap * tanh(logits / cap)."""
    logit_cap: float | None = None
    """The same of the logits of the next token."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding, transposed."""


class ConfigReader:
    """The contents of a `config.json`, read value by value; errors name the file and the key.

    A value may have several keys, since spellings changed: the first one that is not null counts.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        """`defaults` are what transformers takes for absent keys; `where` names the file in errors."""
        self.config, self.defaults, self.where = config, defaults, where

    def get(self, *keys: str) -> Any:
        """What stands under the first key that is there, or the default where none is, whatever it is; else None."""
        there = self.config if any(key in self.config for key in keys) else self.defaults
        return next((there[key] for key in keys if there.get(key) is not None), None)

    def is_null(self, key: str) -> bool:
        """Whether null stands there, said outright or by default."""
        return (self.config if key in self.config else self.defaults).get(key) is None

    def size(self, *keys: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
        """A whole number from 1 to `most`; `default` is for one that follows from others."""
        value = default if (found := self.get(*keys)) is None else found
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.bad(keys, value, f"a whole number from 1 to {most} was expected")
        return value

    def blocks(self, key: str) -> int:
        """The number of blocks."""
        return self.size(key, most=MOST_BLOCKS)

    def number(self, *keys: str, default: float | None = None, most: float = 1e12) -> float:
        """A finite number above 0."""
        value = default if (found := self.get(*keys)) is None else found
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            raise self.bad(keys, value, f"a number above 0 and up to {most:g} was expected")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A number above 0, or None for null."""
        return None if self.is_null(key) else self.number(key)

    def flag(self, key: str) -> bool:
        """True or false; false where nothing is said."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise self.bad((key,), value, "true or false was expected")
        return bool(value)

    def epsilon(self, key: str) -> float:
        """A number between 0 and 1."""
        value = self.get(key)
        if not isinstance(value, float) or not 0 < value < 1:
            raise self.bad((key,), value, "a number between 0 and 1 was expected")
        return value

    def activation(self, key: str) -> str:
        """The name of an activation function."""
        value = self.get(key)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.bad((key,), value, f"known are {', '.join(ACTIVATIONS)}")
        return value

    def windows(self, num_layers: int, sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
        """For each block its window, or None: by `layer_types`, or else where `sliding` says so of its number."""
        types = self.get("layer_types")
        if types is None:
            types = [SLIDING if sliding(i) else FULL for i in range(num_layers)]
        if (
            not isinstance(types, list)
            or len(types) != num_layers
            or any(each not in (SLIDING, FULL) for each in types)
        ):
            expected = f"a list of {num_layers} entries, '{FULL}' or '{SLIDING}', was expected"
            raise self.bad(("layer_types",), types, expected)
        if SLIDING not in types:
            return (None,) * num_layers
        window = self.size("sliding_window")
        return tuple(window if each == SLIDING else None for each in types)

    def rotary(self, head_dim: int, layer_type: str = "") -> Rotary:
        """Rotary positions, as transformers writes them since version 5, or as it wrote them before.

        Since 5 `rope_parameters` has rope_theta, rope_type, partial_rotary_factor and the numbers of a scaling; where
        blocks differ, one such object for each type of block. Before, rope_theta (or rotary_emb_base) and
        partial_rotary_factor (or rotary_pct) stood by themselves, and `rope_scaling` had the scaling, or was null.

        Args:
            head_dim: width of a head.
            layer_type: of the blocks, where they differ.

        Raises:
            BadInput: if a number is wrong, or the scaling is one that is not run.
        """
        key = "rope_parameters" if self.get("rope_parameters") is not None else "rope_scaling"
        said = self.get(key)
        scaling = {} if said is None else said
        if isinstance(scaling, dict) and isinstance(scaling.get(layer_type), dict):
            scaling = scaling[layer_type]
        if not isinstance(scaling, dict):
            raise self.bad((key,), scaling, "an object was expected")
        its = ConfigReader(scaling, {}, f"{self.where}: {key}")
        before = self.number("rope_theta", "rotary_emb_base")
        theta = its.number("rope_theta", default=before)
        before = self.number("partial_rotary_factor", "rotary_pct", default=1.0, most=1)
        dims = int(head_dim * its.number("partial_rotary_factor", default=before, most=1))
        if dims < 2 or dims % 2:
            raise BadInput(
                f"{self.where}: {dims} of {head_dim} numbers of a head are turned; an even number was expected"
            )
        kind = its.get("rope_type", "type")
        if kind in (None, "default"):
            return Rotary(theta, dims)
        if kind == "linear":
            return Rotary(theta, dims, (its.number("factor"),) * (dims // 2))
        if kind == "llama3":
            low, high = its.number("low_freq_factor"), its.number("high_freq_factor")
            if low >= high:
                raise BadInput(f"{its.where}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
            original = its.size("original_max_position_embeddings", default=self.get("max_position_embeddings"))
            factor, plain = its.number("factor"), Rotary(theta, dims)
            return Rotary(theta, dims, llama3_divisors(plain, factor, low, high, original))
        if kind == "divided" and isinstance(divisors := its.get("divisors"), list) and len(divisors) == dims // 2:
            return Rotary(theta, dims, tuple(divisors))  # as .gguf files have them
        raise BadInput(
            f"{its.where}: positions are scaled by {shortened(kind)}, which is not run here; known are 'default', "
            f"'linear' and 'llama3'; {WAY_ROUND}"
        )

    def refuse_remainder(self, of: str, value: int, by: str, divisor: int) -> None:
        """Raise BadInput unless `value` is a multiple of `divisor`; `of` and `by` are their keys."""
        if value % divisor:
            raise BadInput(f"{self.where}: {of} {value} is not a multiple of {by} {divisor}")

    def bad(self, keys: tuple[str, ...], value: Any, expected: str) -> BadInput:
        """The error for a value."""
        key = next((key for key in keys if self.config.get(key) is not None), keys[0])
        return BadInput(f"{self.where}: {key} is {shortened(value)}; {expected}")
