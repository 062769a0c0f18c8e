"""What a device holds and sends in a step as a mesh grows, read from the compiled program; no such devices are needed.

    python benchmarks/mesh_memory.py --features 1048576 --width 2304 --devices 64
    python benchmarks/mesh_memory.py --features 65536 --axis data --devices 8 --kind relu

XLA makes as many devices as are asked for of one CPU, compiles the step for shapes alone, and says what each device
holds: arguments (its part of parameters, Adam's moments and the batch) and temporaries. What it sends is counted from
the operations between devices: 2 (n - 1) / n of what is summed, (n - 1) / n of what is gathered, as in a ring. Beside
it stands what docs/scaling.md expects. What AuxK sends, when features are dead, is counted too.
"""

import argparse
import math
import os
import re

SENT = re.compile(r"= (.*?) (all-reduce|all-gather)(?:-start)?\(")


def main() -> None:
    """Print a line for each number of devices, 1, 8 and so on up to the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=1_048_576)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--kind", default="topk")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--axis", choices=("data", "feature"), default="feature")
    parser.add_argument("--moments", choices=("float32", "bfloat16"), default="float32")
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

    train = TrainConfig(steps=1000, batch_tokens=asked.batch, moments=asked.moments)
    own = {"k": asked.k} if "topk" in asked.kind or asked.kind == "matryoshka" else {"l1_coefficient": 1.0}
    member = Member(features=asked.features, kind=asked.kind, **own)
    groups = make_groups(sweep_members(SweepConfig(members=(member,))))
    shape = member_shapes(groups[0], asked.width, train)[0]
    n = asked.devices
    sizes = sorted({*(8**i for i in range(8) if 8**i < n), n})
    for parts in sizes:
        mesh = make_mesh(parts, 1, 1) if asked.axis == "data" else make_mesh(1, 1, parts)
        state = (jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), shape),)
        state = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),  # noqa: B023
            state,
            specs(state),
        )
        rows = NamedSharding(mesh, P(None, "data"))
        x = jax.ShapeDtypeStruct((1, asked.batch, asked.width), "float32", sharding=rows)
        weights = jax.ShapeDtypeStruct((1, asked.batch), "float32", sharding=rows)
        forms = tuple(group.form for group in groups)
        program = _update_many.lower(state, x, weights, 0, 1, 0, forms=forms, train=train, mesh=mesh).compile()
        its = program.memory_analysis()
        moments = 4 if asked.moments == "float32" else 2
        holds = 2 * asked.width * asked.features * (4 + 2 * moments) / (parts if asked.axis == "feature" else 1)
        summed = {"feature": 4 * asked.batch * asked.width, "data": 8 * asked.width * asked.features}[asked.axis]
        sends, expected = sent(program, parts) / 1e6, 2 * (parts - 1) / parts * summed / 1e6
        print(
            f"{parts:4} devices: arguments {its.argument_size_in_bytes / 1e9:7.2f} GB (parameters and moments "
            f"{holds / 1e9:.2f}), temporaries {its.temp_size_in_bytes / 1e9:7.2f} GB; sends {sends:,.1f} MB "
            f"(expected {expected:,.1f})",
            flush=True,
        )


def sent(program: object, n: int) -> float:
    """Bytes that a device sends in a step."""
    total = 0.0
    for shapes, kind in SENT.findall(program.as_text()):  # type: ignore[attr-defined]
        elements = sum(
            math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([0-9,]*)\]", shapes)
        )
        total += 4 * elements * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    return total


if __name__ == "__main__":
    main()
