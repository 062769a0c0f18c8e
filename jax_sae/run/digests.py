"""Arrays and JSON -> their sha256; trees of arrays <-> names of their leaves, as they stand in a checkpoint."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


def array_digest(array: np.ndarray) -> str:
    """The sha256 of an array's dtype, shape and bytes in C order, in hexadecimal."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def json_digest(content: Any) -> str:
    """The sha256 of what JSON makes of `content`, its keys sorted, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of nested dictionaries with its path, such as `members/F64/params/W_enc`."""
    for name, value in tree.items():
        yield from named_leaves(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `named_leaves`: {path: leaf} as nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def flat_names(tree: Any) -> list[str]:
    """The path of each leaf of a pytree, such as `0.mu.W_enc` for an Optax state, in the order of its leaves."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def to_flat(tree: Any) -> dict[str, Any]:
    """A pytree as {path of leaf: leaf}: what an Optax state is on disk."""
    return dict(zip(flat_names(tree), jax.tree.leaves(tree), strict=True))


def from_flat(like: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `to_flat`, in the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in flat_names(like)])
