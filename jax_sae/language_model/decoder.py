"""The network: a decoder-only transformer of any known architecture, cut after the last block that is read.

Layer n is what Hugging Face calls `hidden_states[n]`: n = 0 the embeddings, n >= 1 the residual stream after n blocks,
and, as there, the last one, n = number of blocks, after the final norm.

On its way the network shows each *place* to a function `tap(place, x) -> x`, and goes on with what that gives back. So
reading activations, replacing them and adding to them are one thing. A block's places, here those of block 9:

    9.resid_pre    the residual stream that it gets            9.mlp_in       what its MLP reads, normalised
    9.z            what the output projection of its           9.mlp_hidden   the MLP's hidden layer, after the
                   attention reads: the heads' mixed values                   activation function
    9.attn_out     what its attention adds to the stream       9.mlp_out      what its MLP adds to the stream
    9.resid_mid    the stream between attention and MLP        9.resid_post   the stream that it gives on

`embed` is the stream before the first block, `final_norm` what the head reads. So resid_mid = resid_pre + attn_out and
resid_post = resid_mid + mlp_out always; with parallel blocks resid_post = resid_pre + attn_out + mlp_out, and there is
no resid_mid.

What is easy to get wrong stands beside the parts. All is float32, in whatever dtype parameters are kept.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_sae.config import Precision
from jax_sae.language_model.architectures import Architecture, Rotary
from jax_sae.language_model.devices import own_rows, put_together, zero_after
from jax_sae.precision import dot_general

Tap = Callable[[str, jax.Array], jax.Array]
"""(place, x[B, T, width]) -> what stands there instead, of the same shape."""

Cache = tuple[jax.Array, jax.Array]
"""Keys and values [B, K, S, width of a head] of one block, for the tokens so far and room for those to come."""

QUERIES_AT_A_TIME = 1024
"""Attention logits of a long text are large: they are made for so many of its tokens at a time."""

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "gelu": partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


def untouched(place: str, x: jax.Array) -> jax.Array:
    """The tap that changes nothing."""
    del place
    return x


class Linear(nn.Module):
    """x[..., I] -> x W + b, [..., features]; W is widened to float32 only where it is used."""

    features: int
    bias: bool
    precision: Precision
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x[..., I] float32 -> [..., features] float32."""
        W = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if self.mesh is not None:
            W = put_together(W, x, self.mesh)
        elif W.dtype != jnp.float32:
            W = W + zero_after(x).astype(W.dtype)
        y = dot_general(x, W.astype(jnp.float32), (((x.ndim - 1,), (0,)), ((), ())), self.precision)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(jnp.float32)
        return y


def norm(architecture: Architecture, name: str | None = None) -> nn.Module:
    """x[..., I] normalised over I."""
    if architecture.norm == "layer":
        return nn.LayerNorm(architecture.norm_epsilon, jnp.float32, use_fast_variance=False, name=name)
    return nn.RMSNorm(architecture.norm_epsilon, jnp.float32, name=name)


def turned(x_BTHd: jax.Array, positions: jax.Array, rotary: Rotary) -> jax.Array:
    """Heads x[B, T, H, d], each turned by the angles of its position; positions [T] or [B, T].

    A pair that is turned is (j, j + dims / 2), not two neighbours.
    """
    angles = positions[..., :, None, None].astype(jnp.float32) * rotary.frequencies()  # [(B,) T, 1, dims / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second, rest = jnp.split(x_BTHd, [rotary.dims // 2, rotary.dims], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class Attention(nn.Module):
    """Causal self-attention of block `number`."""

    architecture: Architecture
    number: int
    precision: Precision
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        tap: Tap,
        positions: jax.Array,
        segments: jax.Array | None,
        cache: Cache | None,
        start: jax.Array | int,
    ) -> tuple[jax.Array, Cache]:
        """x[B, T, D], tokens `start` to `start` + T - 1 of a text -> what is added to the stream, and keys and values.

        With segments[B, T], a token sees only those with its own number.
        """
        a, (B, T, D) = self.architecture, x.shape
        H, K, d = a.num_heads, a.num_kv_heads, a.head_dim
        project = partial(Linear, precision=self.precision, mesh=self.mesh)
        q = project(H * d, a.qkv_bias, name="q_proj")(x)
        k = project(K * d, a.qkv_bias, name="k_proj")(x)
        v = project(K * d, a.qkv_bias, name="v_proj")(x)
        if a.qk_norm == "all":
            q, k = norm(a, "q_norm")(q), norm(a, "k_norm")(k)
        q, k, v = (y.reshape(B, T, -1, d) for y in (q, k, v))
        if a.qk_norm == "head":  # before they are turned
            q, k = norm(a, "q_norm")(q), norm(a, "k_norm")(k)
        if (rotary := a.rotary[self.number]) is not None:
            q, k = turned(q, positions, rotary), turned(k, positions, rotary)
        q_BKGTd = q.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4)  # G heads of queries share keys and values
        k_BKSd, v_BKSd = (y.transpose(0, 2, 1, 3) for y in (k, v))
        if cache is not None:
            at = (0, 0, start, 0)
            k_BKSd, v_BKSd = (
                jax.lax.dynamic_update_slice(*pair, at) for pair in zip(cache, (k_BKSd, v_BKSd), strict=True)
            )
        mixed = [
            self._mixed(q_BKGTd[:, :, :, first : first + QUERIES_AT_A_TIME], k_BKSd, v_BKSd, segments, first, start)
            for first in range(0, T, QUERIES_AT_A_TIME)
        ]
        z_BTHd = jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4)
        z = tap(f"{self.number}.z", z_BTHd.reshape(B, T, H * d))
        return project(D, a.out_bias, name="out_proj")(z), (k_BKSd, v_BKSd)

    def _mixed(
        self,
        q_BKGTd: jax.Array,
        k_BKSd: jax.Array,
        v_BKSd: jax.Array,
        segments: jax.Array | None,
        first: int,
        start: jax.Array | int,
    ) -> jax.Array:
        """The values of the tokens that queries `first` to `first` + T - 1 of x see, mixed, [B, K, G, T, d]."""
        a, T, each_head = self.architecture, q_BKGTd.shape[3], ((0, 1), (0, 1))
        window = a.windows[self.number]
        keys = slice(0, k_BKSd.shape[2])
        if isinstance(start, int):  # what is before the first window or behind the last query is not seen
            keys = slice(max(0, start + first - window + 1) if window else 0, start + first + T)
            k_BKSd, v_BKSd = k_BKSd[:, :, keys], v_BKSd[:, :, keys]
        logits = dot_general(q_BKGTd, k_BKSd, (((4,), (3,)), each_head), self.precision)  # [B, K, G, T, S]
        if (scale := a.attention_scales[self.number]) != 1:
            logits = logits * scale
        if a.attention_cap is not None:
            logits = a.attention_cap * jnp.tanh(logits / a.attention_cap)
        distance_TS = (start + first + jnp.arange(T))[:, None] - jnp.arange(keys.start, keys.stop)[None, :]
        visible = distance_TS >= 0
        if window is not None:  # it counts the token itself
            visible &= distance_TS < window
        if segments is not None:
            its = segments[:, first : first + T]
            visible = visible & (its[:, :, None] == segments[:, None, keys])[:, None, None]
        weights = nn.softmax(jnp.where(visible, logits, jnp.finfo(jnp.float32).min))
        return dot_general(weights, v_BKSd, (((4,), (2,)), each_head), self.precision)


class MLP(nn.Module):
    """Two linear layers with an activation function between them, and perhaps a gate."""

    architecture: Architecture
    number: int
    precision: Precision
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        """x[B, T, D] -> [B, T, D]."""
        a, function = self.architecture, FUNCTIONS[self.architecture.activation]
        dense = partial(Linear, bias=a.mlp_bias, precision=self.precision, mesh=self.mesh)
        hidden = dense(a.intermediate_size, name="c_fc")(x)
        hidden = function(dense(a.intermediate_size, name="c_gate")(x)) * hidden if a.gated else function(hidden)
        return dense(a.hidden_size, name="c_proj")(tap(f"{self.number}.mlp_hidden", hidden))


class Block(nn.Module):
    """Attention, then an MLP; or both at once."""

    architecture: Architecture
    number: int
    precision: Precision
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        tap: Tap,
        positions: jax.Array,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache]:
        """x[B, T, D] -> the residual stream after it [B, T, D], and its keys and values."""
        a, n = self.architecture, self.number
        before, after = a.placement in ("before", "both"), a.placement in ("after", "both")
        its = (a, n, self.precision, self.mesh)
        attention, mlp = Attention(*its, name="attn"), MLP(*its, name="mlp")
        x = tap(f"{n}.resid_pre", x)
        added, cache = attention(norm(a, "ln_1")(x) if before else x, tap, positions, segments, cache, start)
        added = tap(f"{n}.attn_out", norm(a, "ln_1_after")(added) if after else added)
        middle = x if a.parallel else tap(f"{n}.resid_mid", x + added)
        hidden = mlp(tap(f"{n}.mlp_in", norm(a, "ln_2")(middle) if before else middle), tap)
        hidden = tap(f"{n}.mlp_out", norm(a, "ln_2_after")(hidden) if after else hidden)
        x = x + added + hidden if a.parallel else middle + hidden
        return tap(f"{n}.resid_post", x), cache


class Decoder(nn.Module):
    """The first `layer` blocks; with all of them also the final norm and the head. Others have no parameters here."""

    architecture: Architecture
    layer: int
    precision: Precision = "float32"
    """Of the matrix products of the blocks; logits are always float32's."""
    mesh: Mesh | None = None
    """Of the devices among which matrices lie in parts (`devices.py`); None: they are whole."""

    def setup(self) -> None:
        """Name the parts; the names are those of `families.py`."""
        a = self.architecture
        self.wte = nn.Embed(a.vocab_size, a.hidden_size)
        if a.learned_positions:
            self.wpe = nn.Embed(a.max_position_embeddings, a.hidden_size)
        self.h = [Block(a, i, self.precision, self.mesh) for i in range(self.layer)]
        if self.layer == a.num_layers:
            self.ln_f = norm(a)
            if not a.tie_word_embeddings:
                self.lm_head = Linear(a.vocab_size, False, "float32", self.mesh)

    def __call__(self, token_ids: jax.Array, tap: Tap = untouched, segments: jax.Array | None = None) -> jax.Array:
        """token_ids[B, T] int32 -> the residual stream at `layer`, [B, T, D] float32.

        Rows are causal, so what stands right of a text's end changes nothing left of it: pad on the right with any id.

        Args:
            token_ids: of B texts.
            tap: sees and may replace each place.
            segments: [B, T] int32, the number of its document for each token of rows that hold several, one after the
                other. A token sees only its own document, and its position is counted from where that begins.

        Raises:
            ValueError: if T is beyond the model's positions, which JAX would clamp without a word.
        """
        positions = self._positions(token_ids, segments)
        x = self._embed(token_ids, positions, tap)
        for block in self.h:
            x, _ = block(x, tap, positions, segments)
        return self._normalised(x, tap) if self.layer == self.architecture.num_layers else x

    def logits(self, token_ids: jax.Array, tap: Tap = untouched, segments: jax.Array | None = None) -> jax.Array:
        """token_ids[B, T] -> logits [B, T, vocab_size]; only where `layer` is the number of blocks."""
        return self.head(self(token_ids, tap, segments))

    def rest(self, x: jax.Array, first: int, tap: Tap = untouched) -> jax.Array:
        """The rest of the network: x[B, T, D] before block `first` -> what the head reads [B, T, D].

        With `first` the number of blocks, x is after the final norm already, as layer n says. Only where `layer` is
        the number of blocks.
        """
        positions = jnp.arange(x.shape[1])
        for block in self.h[first:]:
            x, _ = block(x, tap, positions)
        return self._normalised(x, tap) if first < self.layer else x

    def logits_from(self, x: jax.Array, first: int, tap: Tap = untouched) -> jax.Array:
        """`rest`, and the head: logits [B, T, vocab_size]."""
        return self.head(self.rest(x, first, tap))

    def step(
        self, token_ids: jax.Array, start: jax.Array, caches: tuple[Cache, ...], tap: Tap = untouched
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Read T tokens more: token_ids[B, T] from position `start` -> what the head reads [B, T, D], and the caches.

        `caches` hold keys and values of the tokens before, one for each block, with room for these.
        """
        positions = start + jnp.arange(token_ids.shape[1])
        x, grown = self._embed(token_ids, positions, tap), []
        for block, cache in zip(self.h, caches, strict=True):
            x, cache = block(x, tap, positions, None, cache, start)
            grown.append(cache)
        return self._normalised(x, tap), tuple(grown)

    def head(self, x: jax.Array) -> jax.Array:
        """What the head reads [..., D] -> logits [..., vocab_size]; only where `layer` is the number of blocks."""
        a = self.architecture
        if a.tie_word_embeddings:
            table = self.wte.embedding
            table = table if self.mesh is None else put_together(table, x, self.mesh)
            logits = dot_general(x, table.astype(jnp.float32), (((x.ndim - 1,), (1,)), ((), ())), "float32")
        else:
            logits = self.lm_head(x)
        return logits if a.logit_cap is None else a.logit_cap * jnp.tanh(logits / a.logit_cap)

    def _positions(self, token_ids: jax.Array, segments: jax.Array | None) -> jax.Array:
        """[T], or [B, T] with segments."""
        T, most = token_ids.shape[1], self.architecture.max_position_embeddings
        if T > most:
            raise ValueError(f"{T} tokens > {most} positions of the model")
        if segments is None:
            return jnp.arange(T)
        begins = jnp.concatenate([jnp.ones_like(segments[:, :1]), jnp.diff(segments) != 0], axis=1)
        return jnp.arange(T) - jax.lax.cummax(jnp.where(begins, jnp.arange(T), 0), axis=1)

    def _embed(self, token_ids: jax.Array, positions: jax.Array, tap: Tap) -> jax.Array:
        x = self.wte(token_ids).astype(jnp.float32)
        if self.architecture.embedding_scale != 1:
            x = x * self.architecture.embedding_scale
        if self.architecture.learned_positions:
            x = x + self.wpe(positions).astype(jnp.float32)
        return tap("embed", x if self.mesh is None else own_rows(x, self.mesh))

    def _normalised(self, x: jax.Array, tap: Tap) -> jax.Array:
        return tap("final_norm", self.ln_f(x))


def empty_caches(architecture: Architecture, rows: int, tokens: int) -> tuple[Cache, ...]:
    """For each block, room for the keys and values of so many texts of so many tokens."""
    shape = (rows, architecture.num_kv_heads, tokens, architecture.head_dim)
    return ((jnp.zeros(shape), jnp.zeros(shape)),) * architecture.num_layers
