"""The table of docs/scaling.md: what a step takes on many devices, by arithmetic; nothing is run.

python benchmarks/scaling_on_paper.py
python benchmarks/scaling_on_paper.py --width 768 --batch 4096 --rate 60e12
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What devices and links reach in practice, not what their makers say."""

    rate: float
    """Operations a second of matrix products."""
    memory_rate: float
    """Bytes a second of a device's memory."""
    memory: float
    """Bytes of it."""
    inside: float
    """Bytes a second that a device sends inside a node."""
    between: float
    """Bytes a second that it sends to another node."""
    node: int = 8
    """Devices of a node."""


def main() -> None:
    """Print a line for each number of devices and features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument(
        "--rate", type=float, default=400e12, help="of products, a device; an H100 in bfloat16 at 40 %%"
    )
    parser.add_argument("--read", type=float, default=1.3e9, help="parameters of the language model up to the place")
    asked = parser.parse_args()
    machine = Machine(asked.rate, 2.3e12, 80e9, 300e9, 35e9)
    print("| F | devices | feature x data | state a device | products | Adam | links | harvest | step | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for features in (65_536, 1_048_576, 16_777_216):
        for devices in (1, 8, 64, 256, 1024):
            print(line(features, devices, asked.width, asked.batch, asked.read, machine))


def line(F: int, devices: int, D: int, B: int, read: float, machine: Machine) -> str:
    """A row of the table: the fastest layout whose state fits into half of a device's memory."""
    state = 2 * D * F * 12
    harvest = 2 * read * B / devices / machine.rate
    found = []
    for feature in (1 << i for i in range(devices.bit_length())):
        data = devices // feature
        if state / feature > machine.memory / 2:
            continue
        products = 10 * (B / data) * D * (F / feature) / machine.rate
        adam = 2 * D * (F / feature) * 32 / machine.memory_rate
        # Parts of the features are beside each other, so that they are inside a node as long as they fit there.
        of_features = machine.inside if feature <= machine.node else machine.between
        of_data = machine.inside if devices <= machine.node else machine.between
        links = 2 * (feature - 1) / feature * 4 * (B / data) * D / of_features
        links += 2 * (data - 1) / data * 8 * D * (F / feature) / of_data
        found.append((products + adam + links + harvest, feature, data, products, adam, links))
    if not found:
        return f"| {F:,} | {devices} | does not fit: {state / devices / 1e9:,.0f} GB a device | | | | | | | |"
    step, feature, data, *parts = min(found)
    times = " | ".join(f"{1e3 * each:,.2f} ms" for each in (*parts, harvest, step))
    return f"| {F:,} | {devices} | {feature} x {data} | {state / feature / 1e9:,.1f} GB | {times} | {B / step:,.0f} |"


if __name__ == "__main__":
    main()
