"""GPT-Neo in Flax, stopped after the layer whose residual stream is read.

Layer n is what Hugging Face calls `hidden_states[n]`: n = 0 the embeddings, n >= 1 the residual stream after n blocks
(`blocks.{n-1}.hook_resid_post` in TransformerLens), and, as there, the last one, n = number of blocks, after the final
layer norm. Parameters carry the names of the checkpoint files: `h_0.attn.q_proj.kernel` is `h.0.attn.q_proj.weight`,
transposed.

What is easy to get wrong here: the attention logits are not divided by sqrt(d_head); q, k and v have no bias, but the
output projection has; a local block sees `window_size` keys, the token itself included; position ids past the table
would be clamped by JAX without a word, hence the check in `GPTNeo.__call__`.

Source: Black et al. 2021, "GPT-Neo" (https://doi.org/10.5281/zenodo.5297715), as run by `GPTNeoForCausalLM`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from reprlib import repr as shortened
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_sae.config import Precision
from jax_sae.errors import BadInput
from jax_sae.precision import dot_general

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "gelu": partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}

MOST_BLOCKS = 1000
LARGEST_SIZE = 2**24  # of the others; JAX overflows at sizes of 2**31


@dataclass(frozen=True)
class GPTNeoConfig:
    """The sizes of a GPT-Neo, as `config.json` names them."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    window_size: int
    intermediate_size: int
    activation_function: str
    layer_norm_epsilon: float
    attention_layers: tuple[str, ...]
    tie_word_embeddings: bool

    @classmethod
    def from_hugging_face(cls, config: dict[str, Any], where: str) -> "GPTNeoConfig":
        """Read the contents of a `config.json`; `where` names it in errors.

        Absent keys take the defaults of transformers' `GPTNeoConfig`.

        Raises:
            BadInput: if it is not a GPT-Neo's, or its numbers cannot be or contradict each other.
        """
        if config.get("model_type") != "gpt_neo":
            raise BadInput(
                f"{where}: model_type is {shortened(config.get('model_type'))}, but only 'gpt_neo' is run here; for "
                "another model, write its activations with scripts/export_torch_activations.py and give "
                "--activations.path"
            )
        sizes: dict[str, int] = {}
        for key, default in [
            ("vocab_size", 50257),
            ("hidden_size", 2048),
            ("num_layers", 24),
            ("num_heads", 16),
            ("max_position_embeddings", 2048),
            ("window_size", 256),
            ("intermediate_size", None),
        ]:
            size = config.get(key, default)
            if key == "intermediate_size" and size is None:
                size = 4 * sizes["hidden_size"]
            most = MOST_BLOCKS if key == "num_layers" else LARGEST_SIZE
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
                raise BadInput(f"{where}: {key} is {shortened(size)}; a whole number from 1 to {most} was expected")
            sizes[key] = size
        if sizes["hidden_size"] % sizes["num_heads"]:
            raise BadInput(
                f"{where}: hidden_size {sizes['hidden_size']} is not a multiple of num_heads {sizes['num_heads']}"
            )
        activation = config.get("activation_function", "gelu_new")
        if not isinstance(activation, str) or activation not in ACTIVATION_FUNCTIONS:
            raise BadInput(
                f"{where}: activation_function is {shortened(activation)}; known are {', '.join(ACTIVATION_FUNCTIONS)}"
            )
        epsilon = config.get("layer_norm_epsilon", 1e-5)
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise BadInput(
                f"{where}: layer_norm_epsilon is {shortened(epsilon)}; a number between 0 and 1 was expected"
            )
        tied = config.get("tie_word_embeddings", True)
        if not isinstance(tied, bool):
            raise BadInput(f"{where}: tie_word_embeddings is {shortened(tied)}; true or false was expected")
        kinds = _attention_kinds(config, sizes["num_layers"])
        if len(kinds) != sizes["num_layers"] or any(kind not in ("global", "local") for kind in kinds):
            raise BadInput(
                f"{where}: attention_layers, or attention_types written out, is not a list of 'global' and 'local'; "
                f"expected {sizes['num_layers']} entries (num_layers)"
            )
        return cls(
            **sizes,
            activation_function=activation,
            layer_norm_epsilon=epsilon,
            attention_layers=kinds,
            tie_word_embeddings=tied,
        )


def _attention_kinds(config: dict[str, Any], num_layers: int) -> tuple[Any, ...]:
    """The kind of each block, where the config's lists have the right form; else something of another length."""
    kinds = config.get("attention_layers")
    if kinds is None:
        kinds = []
        try:
            for pattern, repeats in config.get("attention_types", [[["global", "local"], num_layers // 2]]):
                if len(kinds) + len(pattern) * repeats > num_layers:  # before it is written out, at any length
                    return ()
                kinds += pattern * repeats
        except (TypeError, ValueError):
            return ()
    return tuple(kinds) if isinstance(kinds, list) else ()


class Attention(nn.Module):
    """Causal self-attention; with `window`, a token sees only the last `window` tokens, itself included."""

    num_heads: int
    window: int | None
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x[B, T, D] -> [B, T, D]."""
        B, T, D = x.shape
        project = partial(nn.Dense, D, dot_general=dot_general, precision=self.precision)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(B, T, self.num_heads, D // self.num_heads).transpose(0, 2, 1, 3)

        q_BHTd = heads(project(use_bias=False, name="q_proj")(x))
        k_BHTd = heads(project(use_bias=False, name="k_proj")(x))
        v_BHTd = heads(project(use_bias=False, name="v_proj")(x))
        each_head = ((0, 1), (0, 1))
        # not scaled: see the module's docstring
        logits_BHTT = dot_general(q_BHTd, k_BHTd, (((3,), (3,)), each_head), self.precision)
        distance_TT = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
        visible_TT = distance_TT >= 0
        if self.window is not None:
            visible_TT &= distance_TT < self.window
        weights_BHTT = nn.softmax(jnp.where(visible_TT, logits_BHTT, jnp.finfo(logits_BHTT.dtype).min))
        mixed_BHTd = dot_general(weights_BHTT, v_BHTd, (((3,), (2,)), each_head), self.precision)
        return project(name="out_proj")(mixed_BHTd.transpose(0, 2, 1, 3).reshape(B, T, D))


class MLP(nn.Module):
    """Two linear layers with an activation function between them."""

    config: GPTNeoConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x[B, T, D] -> [B, T, D]."""
        dense = partial(nn.Dense, dot_general=dot_general, precision=self.precision)
        hidden = dense(self.config.intermediate_size, name="c_fc")(x)
        return dense(self.config.hidden_size, name="c_proj")(
            ACTIVATION_FUNCTIONS[self.config.activation_function](hidden)
        )


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    config: GPTNeoConfig
    attention: str  # 'global' or 'local'
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x[B, T, D] -> [B, T, D]."""
        norm = partial(nn.LayerNorm, epsilon=self.config.layer_norm_epsilon, use_fast_variance=False)
        window = self.config.window_size if self.attention == "local" else None
        x = x + Attention(self.config.num_heads, window, self.precision, name="attn")(norm(name="ln_1")(x))
        return x + MLP(self.config, self.precision, name="mlp")(norm(name="ln_2")(x))


class GPTNeo(nn.Module):
    """The residual stream after `layer` blocks; later blocks have no parameters and are not run."""

    config: GPTNeoConfig
    layer: int
    precision: Precision = "float32"
    """Of the matrix products of the blocks; logits are always float32's."""

    def setup(self) -> None:
        """Name the parts as the checkpoint files do."""
        c = self.config
        self.wte = nn.Embed(c.vocab_size, c.hidden_size)
        self.wpe = nn.Embed(c.max_position_embeddings, c.hidden_size)
        self.h = [Block(c, kind, self.precision) for kind in c.attention_layers[: self.layer]]
        if self.layer == c.num_layers:
            self.ln_f = nn.LayerNorm(epsilon=c.layer_norm_epsilon, use_fast_variance=False)
            if not c.tie_word_embeddings:
                self.lm_head = nn.Dense(c.vocab_size, use_bias=False, dot_general=dot_general, precision="float32")

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """token_ids[B, T] int32 -> residual stream [B, T, D] float32, D = hidden_size.

        Rows are causal, so what stands right of a story's end changes nothing left of it: pad on the right with any id.

        Raises:
            ValueError: if T is beyond the position table.
        """
        T = token_ids.shape[1]
        if T > self.config.max_position_embeddings:
            raise ValueError(f"{T} tokens > {self.config.max_position_embeddings} positions of the model")
        x = self.wte(token_ids) + self.wpe(jnp.arange(T))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) if self.layer == self.config.num_layers else x

    def logits(self, token_ids: jax.Array) -> jax.Array:
        """token_ids[B, T] -> logits [B, T, vocab_size]; only where `layer` is the number of blocks."""
        return self.logits_from(self(token_ids), self.layer)

    def logits_from(self, x: jax.Array, layer: int) -> jax.Array:
        """The rest of the network: x[B, T, D] at the place of layer `layer` -> logits [B, T, vocab_size].

        Runs the blocks from `layer` on, the final layer norm and the head; where `layer` is the number of blocks, only
        the head, because x is then after the final layer norm. Only where `self.layer` is the number of blocks.
        """
        for block in self.h[layer:]:
            x = block(x)
        if layer < self.config.num_layers:
            x = self.ln_f(x)
        if not self.config.tie_word_embeddings:
            return self.lm_head(x)
        return dot_general(x, self.wte.embedding, (((2,), (1,)), ((), ())), "float32")
