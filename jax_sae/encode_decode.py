"""What a trained autoencoder computes: its normalisation, its encoder or decoder, on one device or on a mesh."""

import math
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_sae.activations.normalize import Normalization, PerToken, denormalize, normalize, normalize_tokens
from jax_sae.autoencoder.model import Autoencoder, Params, Values, decode, encode
from jax_sae.autoencoder.shards import FEATURE, Shards
from jax_sae.rows import widened
from jax_sae.sweep.mesh import spec_of_parameter


def encode_activations(
    model: Autoencoder,
    params: Params,
    values: Values,
    normalization: Normalization,
    x: Any,
    per_token: PerToken | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """x[..., D] in the language model's own scale -> features [..., F] float32.

    On a `mesh` the model is that of a part of the features, and rows lie in parts along all other axes.
    """
    params, values, normalization = widened((params, values, normalization))
    values = {**values, "k": values["k"].astype(jnp.int32)} if "k" in values else values
    x = x if per_token is None else normalize_tokens(per_token, x)[0]
    inputs = normalize(normalization, x)
    if mesh is None:
        return encode(model, params, values, inputs)
    rows, features = _along(model, mesh, inputs)
    on_each = jax.shard_map(
        partial(encode, model),
        mesh=mesh,
        in_specs=(specs_of(model, params), P(), rows),
        out_specs=features,
        check_vma=False,
    )
    return on_each(params, values, inputs)


def decode_features(
    model: Autoencoder,
    params: Params,
    of_reads: Normalization,
    of_writes: Normalization,
    features: Any,
    x: Any = None,
    *,
    per_token: PerToken | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """features [..., F] -> what they write, [..., D_written] float32, in the language model's own scale.

    x[..., D] is what was encoded, where the model has a skip or each token was normalised by itself.
    """
    params, of_reads, of_writes = widened((params, of_reads, of_writes))
    of_token = None if per_token is None else normalize_tokens(per_token, x)
    x = x if of_token is None else of_token[0]
    inputs = None if x is None else normalize(of_reads, x)
    if mesh is None:
        written = decode(model, params, features, inputs)
    else:
        rows, of_features = _along(model, mesh, features)
        on_each = jax.shard_map(
            partial(decode, model),
            mesh=mesh,
            in_specs=(specs_of(model, params), of_features, rows),
            out_specs=rows,
            check_vma=False,
        )
        written = on_each(params, features, inputs)
    y = denormalize(of_writes, written)
    return y if of_token is None else y * of_token[2] + of_token[1]


encode_activations_compiled = jax.jit(encode_activations, static_argnames=("model", "per_token", "mesh"))
decode_features_compiled = jax.jit(decode_features, static_argnames=("model", "per_token", "mesh"))


def specs_of(model: Autoencoder, params: Params) -> dict[str, P]:
    """Of each parameter of a member on a mesh, along which axis it lies in parts; the model is that of a part."""
    is_whole = model.shards.feature == 1
    return {name: P() if is_whole else spec_of_parameter(name, jnp.ndim(each)) for name, each in params.items()}


def _along(model: Autoencoder, mesh: Mesh, x: jax.Array) -> tuple[P, P]:
    """Along which axes x[..., D] lies in parts, and features [..., F] of it: rows [N, D] along all that F is not.

    Rows that do not divide, and other shapes, are computed as often as there are parts.
    """
    of_features = (FEATURE,) if model.shards.feature > 1 else ()
    axes = tuple(name for name in mesh.axis_names if name not in of_features)
    parts = math.prod(mesh.shape[name] for name in axes)
    leading = [axes] if x.ndim == 2 and len(x) % parts == 0 else [None] * (x.ndim - 1)
    return P(*leading, None), P(*leading, *of_features)


@lru_cache(maxsize=256)
def model_of(
    kind: type[Autoencoder], width: int, features: int, most_k: int, written: tuple[int, ...], skip: bool, parts: int
) -> Autoencoder:
    """The Flax module of a trained autoencoder, or of one of the parts in which its features lie."""
    # parent: inside a tap, Flax would make it a part of the language model, of no use afterwards
    shards = Shards(feature=parts)
    return kind(width, features // parts, written, skip, most_k=most_k, is_trained=False, shards=shards, parent=None)
