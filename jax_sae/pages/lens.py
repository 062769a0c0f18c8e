"""Which tokens a direction makes likelier: through the final norm and the unembedding, as if nothing else followed.

A direction d is brought to root mean square 1, as what the final norm gives to the head (before a layer norm its mean
is taken away first, since that norm would), multiplied by the norm's weights and by the unembedding. From these logits
their mean over the vocabulary is taken away, which changes no probability. Their standard deviation says how much they
mean: random directions have one too, and most of what stands highest for a direction near that is chance. A high
kurtosis, E z^4 of the logits z in units of that deviation, says that a few tokens stand out.

For what an encoder reads the table of embeddings stands in place of the head, without a norm: which tokens, as they
enter the network, a direction has most of.

That is the direct path alone. What blocks between make of it is left out, so it tells most near the network's ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.language_model.decoder import Decoder, untouched
from jax_sae.language_model.pretrained import LOGITS_AT_A_TIME, LanguageModel

TOKENS = 10
"""Raised and lowered most, each."""

RANDOM_DIRECTIONS = 64
OF_STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Places of a block whose directions are directions of the residual stream."""

Path = Literal["norm and head", "head", "embeddings"]


@dataclass(frozen=True, eq=False)
class Lens:
    """What F directions do to the logits, directly."""

    raised: np.ndarray
    """[F, TOKENS] int32, token ids, the most raised first."""
    raised_by: np.ndarray
    """[F, TOKENS] float32, logits."""
    lowered: np.ndarray
    """[F, TOKENS] int32, the most lowered first."""
    lowered_by: np.ndarray
    """[F, TOKENS] float32, below 0 as a rule."""
    sd: np.ndarray
    """[F] float32, over the vocabulary; 0 for a direction of norm 0."""
    kurtosis: np.ndarray
    """[F] float32; 3 for a normal distribution."""
    random_sd: float
    """Mean of `RANDOM_DIRECTIONS` isotropic directions."""
    random_kurtosis: float
    random_top: float
    """Their most raised token, in units of their standard deviation, on average."""


def lens_of(lm: LanguageModel, place: str, directions: np.ndarray, *, is_read: bool = False) -> Lens | None:
    """Of directions [F, D] that are written at a place, or read; None where they are none of the residual stream."""
    kind = place.rpartition(".")[2]
    if kind not in ("embed", "final_norm", *OF_STREAM) and not (is_read and kind == "mlp_in"):
        return None
    path: Path = "embeddings" if is_read else "head" if place == "final_norm" else "norm and head"
    rng = np.random.default_rng(0)
    random = rng.standard_normal((RANDOM_DIRECTIONS, directions.shape[1])).astype(np.float32)
    _, tops, _, _, sds, kurtoses = _looked(lm, path, random)
    raised, up, lowered, down, sd, kurtosis = _looked(lm, path, directions)
    return Lens(raised, up, lowered, down, sd, kurtosis, *_means(sds, kurtoses, tops[:, 0] / sds))


def _means(*arrays: np.ndarray) -> list[float]:
    return [float(array.mean()) for array in arrays]


def _looked(lm: LanguageModel, path: Path, directions: np.ndarray) -> list[np.ndarray]:
    model, params = lm.whole
    at_a_time = int(max(1, min(1024, LOGITS_AT_A_TIME // model.architecture.vocab_size, len(directions))))
    found = []
    for first in range(0, len(directions), at_a_time):
        rows = np.zeros((at_a_time, directions.shape[1]), np.float32)
        some = directions[first : first + at_a_time]
        rows[: len(some)] = some
        found.append([np.asarray(each)[: len(some)] for each in _tokens(model, path, params, rows)])
    return [np.concatenate(each) for each in zip(*found, strict=True)]


@partial(jax.jit, static_argnums=(0, 1))
def _tokens(model: Decoder, path: Path, params: Mapping[str, Any], directions: jax.Array) -> tuple[jax.Array, ...]:
    """The fields of `Lens`, of directions [B, D]."""

    def logits(x: Any) -> Any:
        if path == "embeddings":
            return x @ params["wte"]["embedding"].astype(jnp.float32).T
        if path == "norm and head":
            x = model.apply({"params": params}, x, untouched, method="_normalised")
        return model.apply({"params": params}, x, method="head")

    if path == "norm and head" and model.architecture.norm == "layer":
        directions = directions - directions.mean(-1, keepdims=True)
    size = jnp.sqrt(jnp.mean(jnp.square(directions), -1, keepdims=True))
    found = logits(directions / jnp.where(size > 0, size, 1)) - logits(jnp.zeros_like(directions[:1]))
    found = found - found.mean(-1, keepdims=True)
    variance = jnp.mean(jnp.square(found), -1)
    kurtosis = jnp.mean(found**4, -1) / jnp.where(variance > 0, variance, 1) ** 2
    up, raised = jax.lax.top_k(found, TOKENS)
    down, lowered = jax.lax.top_k(-found, TOKENS)
    return raised, up, lowered, -down, jnp.sqrt(variance), kurtosis
