"""How much memory a device needs as a mesh grows, from the compiled step's own account; no such devices are needed.

    python benchmarks/mesh_memory.py --features 1048576 --width 2304 --devices 64

XLA makes as many devices as are asked for of one CPU, compiles the step for shapes alone, and says what each device
holds: arguments (its part of parameters, Adam's moments and the batch) and temporaries.
"""

import argparse
import os


def main() -> None:
    """Print a line for each number of devices, 1, 8 and so on up to the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=1_048_576)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--kind", default="topk")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--devices", type=int, default=64)
    asked = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={asked.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jax_sae.config import Member, SweepConfig, TrainConfig
    from jax_sae.sweep.groups import make_groups
    from jax_sae.sweep.members import sweep_members
    from jax_sae.sweep.mesh import make_mesh, specs
    from jax_sae.sweep.update import _update_many, member_shapes

    train = TrainConfig(steps=1000, batch_tokens=asked.batch)
    own = {"k": asked.k} if "topk" in asked.kind or asked.kind == "matryoshka" else {"l1_coefficient": 1.0}
    member = Member(features=asked.features, kind=asked.kind, **own)
    groups = make_groups(sweep_members(SweepConfig(members=(member,))))
    shape = member_shapes(groups[0], asked.width, train)[0]
    n = asked.devices
    sizes = sorted({*(8**i for i in range(8) if 8**i < n), n})
    for parts in sizes:
        mesh = make_mesh(1, 1, parts)
        state = (jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), shape),)
        state = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),  # noqa: B023
            state,
            specs(state),
        )
        everywhere = NamedSharding(mesh, P())
        x = jax.ShapeDtypeStruct((1, asked.batch, asked.width), "float32", sharding=everywhere)
        weights = jax.ShapeDtypeStruct((1, asked.batch), "float32", sharding=everywhere)
        forms = tuple(group.form for group in groups)
        program = _update_many.lower(state, x, weights, 0, 1, 0, forms=forms, train=TrainConfig(), mesh=mesh)
        its = program.compile().memory_analysis()
        print(
            f"{parts:4} devices: arguments {its.argument_size_in_bytes / 1e9:7.2f} GB, temporaries "
            f"{its.temp_size_in_bytes / 1e9:7.2f} GB a device",
            flush=True,
        )


if __name__ == "__main__":
    main()
