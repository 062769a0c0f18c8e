"""Data in a page: named arrays and JSON, compressed, as text that may stand in HTML or in a script.

A block is gzip of: the length of its JSON, uint32; the JSON; zeros up to a multiple of 8; its arrays, each from a
multiple of 8 on. The JSON says under `arrays` where: name -> [type, offset after the JSON, numbers]. All is little
endian, as in every browser. In base64 there is no character that HTML or JavaScript could read as its own.
"""

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

TYPES = {"uint8", "uint16", "uint32", "int32", "float32"}


def block(content: Mapping[str, Any], **arrays: np.ndarray) -> str:
    """A block in base64; the same content gives the same characters."""
    where, parts, at = {}, [], 0
    for name, array in arrays.items():
        if array.dtype.name not in TYPES:
            raise TypeError(f"{name} is {array.dtype}; a page reads {', '.join(sorted(TYPES))}")
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        where[name] = [array.dtype.name, at, array.size]
        parts += [data, bytes(-len(data) % 8)]
        at += len(data) + -len(data) % 8
    head = as_json({**content, "arrays": where}).encode()
    whole = len(head).to_bytes(4, "little") + head
    return base64.b64encode(gzip.compress(whole + bytes(-len(whole) % 8) + b"".join(parts), 7, mtime=0)).decode()


def as_json(content: Any) -> str:
    """JSON without white space; numbers that are not finite are null, and no `<` stands in it."""
    return json.dumps(_plain(content), ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if isinstance(content, np.ndarray):
        return _plain(content.tolist())
    if isinstance(content, (float, np.floating)):
        return float(f"{float(content):.5g}") if np.isfinite(content) else None
    return int(content) if isinstance(content, np.integer) else content


def whole_numbers(array: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 on in the smallest type that holds them."""
    return array.astype(np.uint16 if array.max(initial=0) < 2**16 else np.uint32)
