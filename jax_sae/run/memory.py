"""How much memory there is, and how much arrays take."""

import os
from typing import Any

import jax


def memory_of_device() -> int:
    """Bytes of memory of the first device of this process; of the machine, where the device has none of its own."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or memory_of_machine()


def memory_of_machine() -> int:
    """Bytes of memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def n_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of the shapes of such arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def size(count: float) -> str:
    """Bytes in decimal units: 12.3 MB."""
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:,.3g} TB"
