"""What a language model takes of a device, whole and in parts, by the compiled program; no such devices are needed.

    python benchmarks/weights_memory.py --blocks 32 --devices 8

XLA makes as many devices as are asked for of one CPU and compiles the harvest for shapes alone, those of Llama-3-8B in
bfloat16. Arguments are the weights; temporaries hold what is computed and, in parts, the matrix that is put together.
"""

import argparse
import os


def main() -> None:
    """Print a line for one device, for several with all weights each, and for several with weights in parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--texts", type=int, default=4, help="of a device, at once")
    parser.add_argument("--tokens", type=int, default=1024, help="of a text")
    asked = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={asked.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    from flax import traverse_util
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jax_sae.language_model.architectures import Architecture, Rotary
    from jax_sae.language_model.checkpoint import kept_in, shapes_of
    from jax_sae.language_model.decoder import Decoder
    from jax_sae.language_model.devices import ROWS, mesh_of, spec_of
    from jax_sae.language_model.harvest import read_places

    L = 32
    llama = Architecture(
        vocab_size=128_256,
        hidden_size=4096,
        num_layers=L,
        num_heads=32,
        max_position_embeddings=8192,
        intermediate_size=14_336,
        activation="silu",
        norm_epsilon=1e-5,
        head_dim=128,
        num_kv_heads=8,
        windows=(None,) * L,
        rotary=(Rotary(500_000.0, 128),) * L,
        attention_scales=(128**-0.5,) * L,
        norm="rms",
        tie_word_embeddings=False,
    )
    for n, in_parts in ((1, False), (asked.devices, False), (asked.devices, True)):
        mesh = mesh_of(jax.devices()[:n])
        model = Decoder(llama, asked.blocks, "float32", mesh if in_parts else None)
        params = {
            path: jax.ShapeDtypeStruct(
                shape,
                kept_in(path, "bfloat16"),
                sharding=NamedSharding(mesh, spec_of(shape, n) if in_parts else P()),
            )
            for path, shape in shapes_of(model).items()
        }
        ids = jax.ShapeDtypeStruct((asked.texts * n, asked.tokens), jnp.int32, sharding=NamedSharding(mesh, P(ROWS)))
        place = (f"{asked.blocks - 1}.resid_post",)
        its = read_places.lower(model, place, traverse_util.unflatten_dict(params), ids).compile().memory_analysis()
        print(
            f"{n:4} devices, weights {'in parts' if in_parts else 'whole'}: {its.argument_size_in_bytes / 1e9:.2f} GB, "
            f"temporaries {its.temp_size_in_bytes / 1e9:.2f} GB, activations {its.output_size_in_bytes / 1e9:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
