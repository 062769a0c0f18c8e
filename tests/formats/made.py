"""Trained autoencoders made by hand, of every kind and placement, and activations that are far from 0."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_sae.activations.normalize import Normalization
from jax_sae.config import ActivationsConfig, Config, Member, ModelConfig
from jax_sae.sweep.members import complete
from jax_sae.trained import Origin, TrainedAutoencoder

KINDS = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
F, N = 40, 64
WIDTHS = {"1.resid_post": 12, "3.resid_post": 9}
WIDTHS |= dict.fromkeys(("0.mlp_in", "0.mlp_out", "1.mlp_in", "1.mlp_out"), 12)
PLACEMENTS: dict[str, dict[str, Any]] = {
    "autoencoder": {"place": "1.resid_post"},
    "transcoder": {"reads": ("0.mlp_in",), "writes": ("0.mlp_out",)},
    "skip transcoder": {"reads": ("0.mlp_in",), "writes": ("0.mlp_out",), "skip": True},
    "crosscoder": {"reads": ("1.resid_post", "3.resid_post"), "writes": ("1.resid_post", "3.resid_post")},
    "to another width": {"reads": ("0.mlp_in",), "writes": ("3.resid_post",)},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gated": {"l1_coefficient": 1.0},
    "jumprelu": {"target_l0": 4.0},
    **{kind: {"k": 4} for kind in ("topk", "batchtopk", "matryoshka")},
}


def normalization(places: tuple[str, ...], seed: int) -> tuple[Normalization, np.ndarray]:
    """Of these places, means far from 0 and scales of their own; and activations [N, D] that it is of, float32."""
    rng = np.random.default_rng(seed)
    means, scales, x = [], [], []
    for i, place in enumerate(places):
        D = WIDTHS[place]
        scale = 10.0 ** -(i + 1)
        means.append(rng.normal(size=D) * 20 / scale)
        scales.append(np.full(D, scale))
        x.append(means[-1] + rng.normal(size=(N, D)) / scale)
    mean, scale = np.concatenate(means), np.concatenate(scales)
    one = len(places) == 1
    return Normalization(mean.astype("f4"), np.float32(scale[0]) if one else scale.astype("f4")), np.hstack(x).astype(
        "f4"
    )


def made(kind: str, placement: str, seed: int = 0, **changes: Any) -> tuple[TrainedAutoencoder, np.ndarray]:
    """A member of a kind, and raw activations that it reads, [N, D] float32."""
    its = PLACEMENTS[placement] | changes
    reads = its.get("reads") or (its["place"],)
    writes = its.get("writes")
    read, x = normalization(reads, seed)
    written = None if writes is None else normalization(writes, seed if reads == writes else seed + 100)[0]
    rng = np.random.default_rng(seed + 200)
    D, D_written = x.shape[1], len(written.mean) if written else x.shape[1]

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"W_enc": normal(D, F) / 2, "W_dec": normal(F, D_written), "b_dec": normal(D_written)}
    names = ("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",)
    params |= {name: normal(F) / 2 for name in names}
    if kind == "jumprelu":
        params["log_threshold"] = normal(F) / 4
    if its.get("skip"):
        params["W_skip"] = normal(D, D_written)
    has_threshold = kind in ("batchtopk", "matryoshka")
    threshold = 1.0 if written is None or len(writes or ()) < 2 else 6.0
    member = complete(Member(F, kind=kind, **SETTINGS.get(kind, {}), **its))
    config = Config(model=ModelConfig(path="a/model"), activations=ActivationsConfig(exclude_first_tokens=1))
    sae = TrainedAutoencoder(
        params,
        {"threshold": jnp.float32(threshold), "threshold_weight": jnp.float32(1)} if has_threshold else {},
        {"k": jnp.float32(4)} if kind == "topk" else {},
        Normalization(*map(jnp.asarray, read)),
        kind=kind,
        of_written=None if written is None else Normalization(*map(jnp.asarray, written)),
        written=() if writes is None else tuple(WIDTHS[place] for place in writes),
        origin=Origin(f"{kind} {placement}", 7, member, config, 4.0, 0.2, its.get("place", "")),
    )
    return sae, x


def far(a: Any, b: Any) -> float:
    """The largest difference, as a part of the largest number."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())
