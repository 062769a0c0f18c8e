"""What the files of a tool hold: tensors by name, each taken once and put the way round; and their configs.

Whatever is in a file and is not taken is refused: it would be part of the dictionary, and be lost without a word.
"""

import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

import numpy as np

from jax_sae.activations.array_files import Stored, arrays_in
from jax_sae.activations.given import FLOATS
from jax_sae.errors import BadInput
from jax_sae.language_model.hub import read_json, refuse_damaged_download
from jax_sae.language_model.torch_file import is_plain_name

Stated = Literal["as it is", "transposed", "open"]
"""How a format says that it keeps a matrix, against [D, F] of the encoder and [F, D] of the decoder."""

MOST_TENSORS = 1000
COLUMNS_AT_A_TIME = 512
YAML_BYTES = 1 << 20
PLAIN_LINE = re.compile(
    r"""([A-Za-z_]\w*):[ \t]+(?:'([^']*)'|"([^"\\]*)"|([^\s'"#&*!|>{\[][^#]*?))\s*(?:\#.*)?"""  # key: value  # note
)


@dataclass
class Tensors:
    """The tensors of one file, not read yet."""

    path: Path
    stored: Mapping[str, Stored]
    taken: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        """Whether the file has it."""
        return name in self.stored

    def array(self, *names: str) -> np.ndarray:
        """The tensor under the first of these names that is there, where it lies on disk.

        Raises:
            BadInput: if there is none, or it is not one of floats.
        """
        name = next((name for name in names if name in self.stored), None)
        if name is None:
            has = ", ".join(name if is_plain_name(name) else ascii(name[:80]) for name in sorted(self.stored)[:12])
            raise BadInput(f"{self.path}: has no tensor {' or '.join(names)}; it has {has}")
        self.taken.add(name)
        parts = self.stored[name].open()
        if len(parts) != 1 or parts[0].dtype.name not in FLOATS:
            found = f"{len(parts)} arrays" if len(parts) != 1 else str(parts[0].dtype)
            raise BadInput(f"{self.path}: {name} is of {found}; one of {', '.join(FLOATS)} was expected")
        return parts[0]

    def vector(self, *names: str, length: int | None = None) -> np.ndarray:
        """A tensor with one axis, float32; of `length`, where that is known."""
        x = self.array(*names)
        if x.ndim != 1 or x.size == 0 or length not in (None, len(x)):
            wanted = "[n]" if length is None else f"[{length}]"
            raise BadInput(f"{self.path}: {names[0]} has shape {x.shape}; {wanted} was expected")
        with np.errstate(over="ignore"):
            return np.array(x, np.float32)  # a copy: a view would keep the whole file mapped

    def number(self, name: str) -> float:
        """A tensor of one number, whole or not."""
        parts = self.stored[name].open() if name in self.stored else [self.array(name)]
        self.taken.add(name)
        if len(parts) != 1 or parts[0].size != 1 or parts[0].dtype.kind not in "fiuV":
            raise BadInput(f"{self.path}: {name} has shape {parts[0].shape if parts else ()}; one number was expected")
        return float(np.asarray(parts[0]).astype(np.float64).reshape(()))

    def count(self, name: str) -> int:
        """A tensor of one whole number above 0."""
        number = self.number(name)
        if not 0 < number < 2**31 or number != int(number):
            raise BadInput(f"{self.path}: {name} is {number:g}; a whole number above 0 was expected")
        return int(number)

    def encoder(self, *names: str, features: int, width: int | None, stated: Stated) -> np.ndarray:
        """W_enc[D, F] float32, turned round where it is kept as [F, D].

        Shapes decide: one axis has F numbers. Where both have, what the format states.

        Raises:
            BadInput: if neither has F and the other D, or both have F and the format leaves it open.
        """
        x = self.array(*names)
        return self._turned(names[0], x, (width, features), stated, ("[D, F]", "[F, D]"))

    def decoder(self, *names: str, features: int, width: int | None, stated: Stated) -> np.ndarray:
        """W_dec[F, D_written] float32, turned round where it is kept as [D_written, F]; as of `encoder`."""
        x = self.array(*names)
        return self._turned(names[0], x, (features, width), stated, ("[F, D]", "[D, F]"))

    def _turned(
        self, name: str, x: np.ndarray, wanted: tuple[int | None, int | None], stated: Stated, both: tuple[str, str]
    ) -> np.ndarray:
        def fits(shape: tuple[int, ...]) -> bool:
            return all(size in (None, found) for size, found in zip(wanted, shape, strict=True))

        ways = [fits(x.shape), fits(x.shape[::-1])] if x.ndim == 2 and x.size else [False, False]
        if not any(ways):
            sizes = " and ".join(f"{letter} {size}" for letter, size in self._sizes(wanted, both[0]) if size)
            raise BadInput(
                f"{self.path}: {name} has shape {x.shape}, but by the biases {sizes}; {both[0]} or {both[1]} was "
                "expected: the file is damaged, or of another format"
            )
        if all(ways) and stated == "open":
            raise BadInput(
                f"{self.path}: {name} has shape {x.shape}: D = F, and files of this format are kept either way round; "
                "write them again with another F, or in another format"
            )
        is_turned = stated == "transposed" if all(ways) else ways[1]
        return as_float32(x.T if is_turned else x)

    @staticmethod
    def _sizes(wanted: tuple[int | None, int | None], layout: str) -> list[tuple[str, int | None]]:
        return list(zip(re.findall("[A-Z]", layout), wanted, strict=True))

    def refuse_others(self, without_meaning: Collection[str] = ()) -> None:
        """Raise BadInput if a tensor was not taken, but for those that do not matter once training is over."""
        if others := sorted(set(self.stored) - self.taken - set(without_meaning)):
            shown = ", ".join(name if is_plain_name(name) else ascii(name[:80]) for name in others[:6])
            raise BadInput(
                f"{self.path}: holds {shown}, which this format does not have, so that what it computes is not known"
            )


def open_tensors(path: Path) -> Tensors:
    """The tensors in a .npz, .safetensors, .pt, .pth or .bin file.

    Raises:
        BadInput: if it is not there, damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    refuse_damaged_download(path)
    stored = arrays_in(path)
    if len(stored) > MOST_TENSORS:
        raise BadInput(f"{path}: holds {len(stored)} tensors; a dictionary has less than {MOST_TENSORS}")
    return Tensors(path, stored)


def as_float32(x: np.ndarray) -> np.ndarray:
    """The same numbers in float32 and in C order, on disk where they are so there; what is beyond becomes infinite."""
    if x.dtype == np.float32 and x.flags.c_contiguous:
        return x
    out = np.empty(x.shape, np.float32)

    def copy(start: int) -> None:
        part = (..., slice(start, start + COLUMNS_AT_A_TIME))  # quick for x that is turned round too
        with np.errstate(over="ignore"):
            out[part] = x[part]

    with ThreadPoolExecutor() as pool:
        list(pool.map(copy, range(0, x.shape[-1] if x.ndim else 0, COLUMNS_AT_A_TIME)))
    return out


class Facts:
    """A config, read value by value; errors name the file and the key."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        """`where` names the file, and the part of it."""
        self.content, self.where = content, where

    def part(self, key: str) -> "Facts":
        """The object under a key; an empty one where there is none."""
        value = self.content.get(key)
        if not isinstance(value, dict | None):
            raise self.bad(key, "an object was expected")
        return Facts(value or {}, f"{self.where}: {key}")

    def text(self, *keys: str) -> str:
        """The text under the first key that has one; empty where none has."""
        key = next((key for key in keys if self.content.get(key) is not None), keys[0])
        value = self.content.get(key)
        if value is None:
            return ""
        if not is_plain_name(value):
            raise self.bad(key, "a printable text of one line was expected")
        return str(value)

    def size(self, key: str) -> int | None:
        """A whole number above 0; None where there is none."""
        value = self.content.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.bad(key, "a whole number above 0 was expected")
        return value

    def number(self, key: str) -> float | None:
        """A finite number above 0; None where there is none."""
        value = self.content.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.bad(key, "a number above 0 was expected")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.content.get(key)
        if not isinstance(value, bool | None):
            raise self.bad(key, "true or false was expected")
        return default if value is None else value

    def one_of(self, key: str, known: Collection[str], default: str) -> str:
        """One of the known words.

        Raises:
            BadInput: for another one, whose meaning is not known here.
        """
        value = self.text(key) or default
        if value not in known:
            raise self.bad(key, f"known are {', '.join(known)}")
        return value

    def bad(self, key: str, expected: str) -> BadInput:
        """The error for the value under a key."""
        return BadInput(f"{self.where}: {key} is {shortened(self.content.get(key))}; {expected}")


def read_facts(path: Path) -> Facts:
    """A .json file; one without content where there is no such file.

    Raises:
        BadInput: if it is damaged, or no object.
    """
    return Facts(read_json(path) if path.exists() else {}, str(path))


def read_plain_yaml(path: Path) -> Facts:
    """The lines `key: value` of a .yaml file that are not indented; one without content where there is no such file.

    That is all that configs of dictionaries need. Lists and what is nested are left to others.

    Raises:
        BadInput: if it cannot be read.
    """
    if not path.exists():
        return Facts({}, str(path))
    refuse_damaged_download(path)
    try:
        with path.open("rb") as file:
            text = file.read(YAML_BYTES + 1)
        lines = text.decode().splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as text ({type(error).__name__}); get the file again") from error
    if len(text) > YAML_BYTES:
        raise BadInput(f"{path}: is larger than {YAML_BYTES >> 20} MiB; no config of a dictionary is")
    found: dict[str, Any] = {}
    for line in lines:
        if match := PLAIN_LINE.fullmatch(line):
            key, *values = match.groups()
            value = next(value for value in values if value is not None)
            found[key] = int(value) if re.fullmatch(r"\d{1,9}", value) else value
    return Facts(found, str(path))
