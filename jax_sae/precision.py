"""Matrix products in a chosen precision: what is multiplied is rounded, what is summed and kept is float32."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_sae.config import Precision

DimensionNumbers = tuple[tuple[Any, Any], tuple[Any, Any]]


def dot_general(lhs: jax.Array, rhs: jax.Array, dimension_numbers: DimensionNumbers, precision: Precision) -> jax.Array:
    """`lax.dot_general` of float32 arrays, float32 again.

    float32: factors as they are. JAX's own default on a GPU is TF32, so this asks for the highest precision.
    tensorfloat32: factors rounded to 10 bits of mantissa where the device has such products, else as float32.
    bfloat16: factors rounded to 7 bits of mantissa. XLA has no such products for all shapes on a CPU: there the rounded
    factors are multiplied as float32, which gives the same values and saves no time.
    """
    if precision == "bfloat16" and jax.default_backend() == "cpu":
        lhs, rhs = (jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) for x in (lhs, rhs))
        precision = "float32"
    elif precision == "bfloat16":
        lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
    # Precision.HIGH stands for TF32 on a GPU
    asked = {
        "float32": jax.lax.Precision.HIGHEST,
        "tensorfloat32": jax.lax.Precision.HIGH,
        "bfloat16": jax.lax.Precision.DEFAULT,
    }[precision]
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, asked, preferred_element_type=jnp.float32)
