"""A TopK autoencoder's value and gradient: the dense form beside the one that leaves out features that are 0.

Dense: keep the k largest of each token, products with all of W_dec, gradients as JAX derives them. Sparse:
`jax_sae.autoencoder.sparse.topk_reconstruct`. Both give the squared error of the same batch and its gradient with
respect to all parameters. Where dense / sparse is above 1, the sparse form is faster. The product that both need,
x W_enc, is timed alone: product / sparse is the part of the sparse form's time that cannot be saved.

    python benchmarks/topk.py
    python benchmarks/topk.py --features 4096 --k 32 --rounds 2
"""

from typing import Any

import jax
import jax.numpy as jnp
import tyro
from timing import ratios, report, seconds

from jax_sae.autoencoder.model import Params, product
from jax_sae.autoencoder.selection import keep_largest_of_rows
from jax_sae.autoencoder.sparse import topk_reconstruct
from jax_sae.config import Precision


def main(
    features: tuple[int, ...] = (4096, 16384, 32768),
    k: tuple[int, ...] = (16, 32, 64),
    batch_tokens: int = 1024,
    width: int = 768,
    rounds: int = 3,
    precision: Precision = "float32",
) -> None:
    """Print the ratios for every F and k.

    Args:
        features: values of F.
        k: values of k.
        batch_tokens: B.
        width: D.
        rounds: how often each is timed, in turn.
        precision: of the products.
    """
    rows: list[dict[str, Any]] = []
    for F in features:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (batch_tokens, width))
        W_enc, W_dec = (width**-0.5 * jax.random.normal(key, (width, F)) for key in keys[1:])
        params = {"W_enc": W_enc, "b_enc": jnp.zeros(F), "W_dec": W_dec.T.copy(), "b_dec": jnp.zeros(width)}
        for most_k in k:
            times = seconds(functions(params, x, most_k, precision), rounds)
            rows.append(
                {
                    "F": F,
                    "k": most_k,
                    "dense ms": [1e3 * t for t in times["dense"]],
                    "sparse ms": [1e3 * t for t in times["sparse"]],
                    "dense / sparse": ratios(times["dense"], times["sparse"]),
                    "product / sparse": ratios(times["product"], times["sparse"]),
                }
            )
    report("topk", rows, backend=jax.default_backend(), D=width, B=batch_tokens, precision=precision)


def functions(params: Params, x: jax.Array, most_k: int, precision: Precision) -> dict[str, Any]:
    """Functions that compute value and gradient in either form, and the product alone."""
    k = jnp.int32(most_k)

    def dense(p: Params, x: jax.Array, k: jax.Array) -> jax.Array:
        candidates = jax.nn.relu(product(x - p["b_dec"], p["W_enc"], precision) + p["b_enc"])
        x_hat = product(keep_largest_of_rows(candidates, k, most_k), p["W_dec"], precision) + p["b_dec"]
        return jnp.sum(jnp.square(x_hat - x))

    def sparse(p: Params, x: jax.Array, k: jax.Array) -> jax.Array:
        x_hat, _, _ = topk_reconstruct(x, p["W_enc"], p["b_enc"], p["W_dec"], p["b_dec"], k, most_k, precision)
        return jnp.sum(jnp.square(x_hat - x))

    of_dense, of_sparse = jax.jit(jax.value_and_grad(dense)), jax.jit(jax.value_and_grad(sparse))
    alone = jax.jit(lambda x, W: product(x, W, precision))
    return {
        "dense": lambda: of_dense(params, x, k),
        "sparse": lambda: of_sparse(params, x, k),
        "product": lambda: alone(x, params["W_enc"]),
    }


if __name__ == "__main__":
    tyro.cli(main)
