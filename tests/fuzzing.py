"""How files are damaged at random, and what may come of it. A failure comes again in the next run; nothing is kept."""

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from jax_sae.errors import BadInput

FUZZ = settings(max_examples=150, derandomize=True, database=None, deadline=None)


def flip(content: bytes, bit: int) -> bytes:
    """The same with one bit turned round."""
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def flips(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with any one bit turned round."""
    return st.integers(0, 8 * len(content) - 1).map(lambda bit: flip(content, bit))


def cuts(content: bytes) -> st.SearchStrategy[bytes]:
    """The beginning of the content."""
    return st.integers(0, len(content) - 1).map(lambda size: content[:size])


def splices(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with other bytes in the place of up to 16 of its own."""
    starts, lengths = st.integers(0, len(content)), st.integers(0, 16)
    return st.builds(lambda i, n, new: content[:i] + new + content[i + n :], starts, lengths, st.binary(max_size=16))


def loaded_or_refused(load: Callable[[], Any], where: str) -> Any:
    """What `load` gives, or None where it raises a BadInput of one short printable line that names `where`."""
    try:
        return load()
    except BadInput as error:
        message = str(error)
        assert where in message and message.isprintable() and len(message) < 1000, message
        return None
