"""Reads the tensors in a file that `torch.save` wrote, and writes such a file, without torch and without unpickling.

Such a file is an uncompressed zip archive: `NAME/data.pkl` describes the tensors, `NAME/data/KEY` holds the bytes of
one storage. The description is a pickle, and a pickle is a program that may do anything. So it is not run: a small
machine follows the few opcodes that a tensor or a dictionary of tensors needs, and refuses every other. Nothing is
imported or called on the file's word, and its sizes are held against the true ones before memory is taken.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import encode_long
from reprlib import repr as shortened
from typing import Any

import ml_dtypes
import numpy as np

from jax_sae.errors import BadInput
from jax_sae.language_model.hub import one_line

DESCRIPTION_BYTES = 2 << 20  # most for data.pkl; a tensor takes about 100, and a byte may cost 100 bytes of memory
CHUNK_BYTES = 4 << 20  # most that is read at once; also most for the table of contents, 70 to 100 bytes an entry
NAME_LENGTH = 255

_KINDS = [("Float", np.float32), ("Double", np.float64), ("Half", np.float16), ("BFloat16", ml_dtypes.bfloat16)]
_KINDS += [("Long", np.int64), ("Int", np.int32), ("Short", np.int16), ("Char", np.int8), ("Byte", np.uint8)]
DTYPES = {f"torch.{kind}Storage": np.dtype(dtype) for kind, dtype in [*_KINDS, ("Bool", np.bool_)]}

# What a damaged archive makes zipfile raise, besides the errors of the operating system
ZIP_ERRORS = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


@dataclass(frozen=True)
class TensorReference:
    """Where one tensor lies in a file: a view of a storage, which is an entry of the zip archive.

    `stride` and `offset` count elements of the storage, as in torch.
    """

    path: Path
    entry: str
    stored: int  # elements in the storage
    dtype: np.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor's values, with `dtype` and `shape`. The checksum of the whole storage is verified.

        Raises:
            BadInput: if the file is damaged, or is another one than when it was opened.
        """
        entry, itemsize = self.entry, self.dtype.itemsize
        try:
            with open_zip(self.path) as archive:
                content = _read_entry(archive, entry, self.stored * itemsize)
        except (KeyError, *ZIP_ERRORS) as error:
            raise BadInput(f"{self.path}: {entry} cannot be read ({one_line(error)}); get the file again") from error
        if len(content) != self.stored * itemsize:
            raise BadInput(f"{self.path}: the size of {entry} has changed since the file was opened")
        if self.dtype == np.bool_ and content.max(initial=0) > 1:
            raise BadInput(f"{self.path}: {entry} should hold booleans, but has bytes other than 0 and 1")
        return np.ascontiguousarray(self.view(content)).reshape(self.shape)  # the former makes a scalar one-dimensional

    def view(self, content: np.ndarray) -> np.ndarray:
        """The tensor, as a view of the bytes of its storage (uint8)."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        # The step along an axis of size 1 is never taken, and may be any number in the file
        itemsize = self.dtype.itemsize
        steps = [step * itemsize if size > 1 else 0 for size, step in zip(self.shape, self.stride, strict=True)]
        return np.lib.stride_tricks.as_strided(
            content.view(self.dtype)[self.offset :], self.shape, steps, writeable=content.flags.writeable
        )


def open_torch_file(path: str | Path) -> TensorReference | dict[str, TensorReference]:
    """What `torch.save(tensor, path)` or `torch.save({name: tensor, ...}, path)` wrote; reads no values yet.

    Entries of a dictionary that are not tensors (a step number, a note) are left out. Where a tensor lived when it was
    saved, on a GPU or not, makes no difference.

    Raises:
        BadInput: if it is no such file, is damaged, or holds anything but tensors and plain values.
    """
    root = _open_root(Path(path))
    if isinstance(root, TensorReference):
        return root
    if not isinstance(root, dict):
        raise BadInput(f"{path}: holds a {type(root).__name__}; a tensor or a dictionary of tensors was expected")
    return _tensors_in(Path(path), root, lists=False)


def open_torch_arrays(path: Path) -> dict[str, TensorReference | list[TensorReference]]:
    """The tensors and lists of tensors in such a file, by name; the name of one that is the whole file is ''.

    Raises:
        BadInput: as `open_torch_file`.
    """
    root = _open_root(path)
    return _tensors_in(path, root if isinstance(root, dict) else {"": root}, lists=True)


def open_torch_notes(path: Path) -> dict[str, Any]:
    """The plain values in a file that holds a dictionary, and those of dictionaries in it; no tensors.

    Raises:
        BadInput: as `open_torch_file`.
    """

    def plain(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entries.items() if type(value) in (str, int, float, bool)}

    root = _open_root(path)
    if not isinstance(root, dict):
        return {}
    return plain(root) | {name: plain(value) for name, value in root.items() if isinstance(value, dict)}


def write_torch_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """What `torch.save({name: tensor, ...}, path)` writes of tensors on a CPU; `torch.load(path, weights_only=True)`.

    The same tensors give the same bytes.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    rebuild, ordered = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R"
    program = [b"\x80\x02", b"}("]
    for key, (name, tensor) in enumerate(tensors.items()):
        strides = [step // tensor.itemsize for step in np.empty(tensor.shape, tensor.dtype).strides]
        kind = kinds[tensor.dtype].removeprefix("torch.").encode()
        storage = b"(" + _text("storage") + b"ctorch\n" + kind + b"\n" + _text(str(key)) + _text("cpu")
        storage += _whole(tensor.size) + b"tQ"
        shape, stride = (b"(" + b"".join(map(_whole, numbers)) + b"t" for numbers in (tensor.shape, strides))
        program += [_text(name), rebuild, b"(", storage, _whole(0), shape, stride, b"\x89", ordered, b"tR"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: Any) -> None:
            with archive.open(zipfile.ZipInfo(f"archive/{name}"), "w", force_zip64=True) as entry:
                entry.write(content)

        add("data.pkl", b"".join([*program, b"u."]))
        add("byteorder", b"little")
        for key, tensor in enumerate(tensors.values()):
            little = tensor.astype(tensor.dtype.newbyteorder("<"), order="C", copy=False)
            add(f"data/{key}", little.reshape(-1).view(np.uint8).data)
        add("version", b"3\n")


def _text(text: str) -> bytes:
    """What puts a text on a pickle's stack."""
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _whole(number: int) -> bytes:
    """What puts a whole number on a pickle's stack."""
    content = encode_long(number)
    return b"\x8a" + bytes([len(content)]) + content


def map_tensors(tensors: Sequence[TensorReference]) -> list[np.ndarray]:
    """Values of tensors of one file where they lie on disk, mapped into memory, read-only.

    The checksums of their storages are verified, for which these are read once, a little at a time.

    Raises:
        BadInput: if the file is damaged, or is another one than when it was opened.
    """
    path = tensors[0].path
    sizes = {tensor.entry: tensor.stored * tensor.dtype.itemsize for tensor in tensors}
    storages = map_entries(path, sizes)
    for entry, storage in storages.items():
        if len(storage) != sizes[entry]:
            raise BadInput(f"{path}: the size of {entry} has changed since the file was opened")
    return [tensor.view(storages[tensor.entry]) for tensor in tensors]


def map_entries(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The bytes (uint8) of uncompressed entries of a zip archive, mapped into memory, their checksums verified.

    Raises:
        BadInput: if there are no such entries, they are compressed or damaged.
    """
    found = {}
    try:
        whole = np.asarray(np.memmap(path, np.uint8, "r"))
        with open_zip(path) as archive:
            for name in names:
                info = archive.getinfo(name)
                if info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{name} is compressed, and cannot be read in parts")
                if info.file_size > len(whole):
                    raise zipfile.BadZipFile(f"{name} claims to have {info.file_size} bytes")
                with archive.open(info) as stream:
                    while stream.read(CHUNK_BYTES):
                        pass
                # What the zip format has before an entry's bytes: 30 bytes, the last of them the lengths of two texts
                lengths = whole[info.header_offset + 26 : info.header_offset + 30].view("<u2")
                start = info.header_offset + 30 + int(lengths.sum(dtype=np.int64))
                found[name] = whole[start : start + info.file_size]
                if len(found[name]) != info.file_size:
                    raise zipfile.BadZipFile(f"{name} is cut short")
    except (KeyError, *ZIP_ERRORS) as error:
        raise BadInput(f"{path}: cannot be read ({one_line(error)}); get the file again") from error
    return found


def _tensors_in(path: Path, root: Mapping[str, Any], lists: bool) -> dict[str, Any]:
    tensors = {
        name: list(value) if isinstance(value, list | tuple) else value
        for name, value in root.items()
        if isinstance(value, TensorReference)
        or (lists and isinstance(value, list | tuple) and value and all(isinstance(x, TensorReference) for x in value))
    }
    if not tensors:
        what = ", a dictionary or a list of tensors" if lists else " or a dictionary of tensors"
        holds = f"none of its {len(root)} entries is a tensor ({', '.join(map(_shown, list(root)[:5]))})"
        if "" in root:
            holds = f"holds a {type(root['']).__name__}"
        raise BadInput(f"{path}: {holds}; a tensor{what} was expected")
    return tensors


def _open_root(path: Path) -> Any:
    """What the file's pickle describes."""
    refuse_pointer(path)
    try:
        if not zipfile.is_zipfile(path):
            raise BadInput(
                f"{path}: not a whole zip archive, as torch.save writes; get it again, or, if a torch before 1.6 wrote "
                "it, convert it with torch.save(torch.load(path, weights_only=True), path)"
            )
        with open_zip(path) as archive:
            return _open_archive(path, archive)
    except BadInput:
        raise
    except ZIP_ERRORS as error:
        raise BadInput(
            f"{path}: cannot be read as a file that torch.save wrote ({one_line(error)}); get it again"
        ) from error


def refuse_pointer(path: Path) -> None:
    """Raise BadInput if the file cannot be opened, or is the note that Git LFS leaves in a file's place."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def is_plain_name(name: Any) -> bool:
    """Whether a name out of a file can stand in a message: text of one printable line, at most 255 characters."""
    return isinstance(name, str) and len(name) <= NAME_LENGTH and name.isprintable()


def _shown(name: Any) -> str:
    """Any other, as much of it as can stand in a message."""
    return ascii(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"


class _Bounded(io.BufferedReader):
    """A file of which no more than CHUNK_BYTES are read at once: `zipfile` reads a whole table of contents."""

    def read(self, size: int | None = -1) -> bytes:
        """As any file, up to that limit."""
        if size is not None and size > CHUNK_BYTES:
            raise zipfile.BadZipFile(f"a table of contents of {size} bytes")
        return super().read(size)


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose table of contents takes no more memory than CHUNK_BYTES; raises what is in ZIP_ERRORS."""
    with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _open_archive(path: Path, archive: zipfile.ZipFile) -> Any:
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    descriptions = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(descriptions) != 1 or len(sizes) != len(archive.namelist()):
        raise BadInput(f"{path}: torch.save did not write this archive (no data.pkl, or two entries of one name)")
    for name in sizes:
        if not is_plain_name(name) or name.startswith("/") or ".." in name.split("/"):
            raise BadInput(f"{path}: torch.save did not write this archive (it has an entry {_shown(name)})")
    prefix = descriptions[0].removesuffix("data.pkl")
    if prefix + "byteorder" in sizes and _read_entry(archive, prefix + "byteorder", 16).tobytes() != b"little":
        raise BadInput(f"{path}: its byte order is not 'little'; write it again on a machine where it is")
    pickle = _read_entry(archive, descriptions[0], DESCRIPTION_BYTES).tobytes()
    machine = _Machine(path, prefix, sizes)
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            machine.follow(opcode.name, argument)
        root = machine.stack.pop()
    except BadInput:
        raise
    # An opcode that finds the wrong things on the stack; and a text's bad escape, if the user made warnings errors
    except (IndexError, KeyError, TypeError, ValueError, DeprecationWarning) as error:
        raise BadInput(f"{path}: the description of its tensors is damaged ({type(error).__name__})") from error
    return root


def _read_entry(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """The bytes of an entry of at most `most` bytes, as uint8; memory is taken only for what the file can hold."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{name} is compressed, which torch.save never does")
    if info.file_size > min(most, Path(str(archive.filename)).stat().st_size):
        raise zipfile.BadZipFile(f"{name} claims to have {info.file_size} bytes")
    content = np.empty(info.file_size, np.uint8)
    with archive.open(info) as stream:
        for start in range(0, info.file_size, CHUNK_BYTES):
            part = stream.read(CHUNK_BYTES)
            if len(part) != min(CHUNK_BYTES, info.file_size - start):
                raise EOFError(f"{name} is cut short")
            content[start : start + len(part)] = np.frombuffer(part, np.uint8)
        stream.read()  # zipfile verifies the checksum where it finds the end, also that of an empty entry
    return content


class _Name(str):
    """A name that the pickle would have imported."""


_MARK = object()


class _Machine:
    """A pickle's stack and memo, over plain values, tuples, lists, dictionaries, names and tensors."""

    def __init__(self, path: Path, prefix: str, sizes: Mapping[str, int]):
        self.path, self.prefix, self.sizes = path, prefix, sizes
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def follow(self, opcode: str, argument: Any) -> None:
        """One opcode of those that `torch.save` writes (pickle protocol 2)."""
        stack = self.stack
        match opcode:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode]())
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(opcode[5:] or -1))))
            case "APPEND" | "APPENDS":
                items = self.pop(1 if opcode == "APPEND" else -1)
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop(2 if opcode == "SETITEM" else -1)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if not is_plain_name(key):
                        raise BadInput(
                            f"{self.path}: a key of a dictionary is {_shown(key)}; printable text of at most "
                            f"{NAME_LENGTH} characters was expected"
                        )
                    self.top(dict)[key] = value
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_Name(argument.replace(" ", ".")))
            case "BINPERSID":
                stack.append(self.whole_storage(*stack.pop()))
            case "REDUCE":
                name, arguments = self.pop(2)
                stack.append(self.call(name, arguments))
            case "BUILD":  # the attributes that torch hangs on a state dict (versions of modules): not needed
                stack.pop()
                self.top(dict)
            case _:
                raise BadInput(f"{self.path}: holds more than tensors (pickle opcode {opcode}); refused")

    def pop(self, count: int) -> list[Any]:
        """Take the top `count` off the stack, or, with -1, all above the topmost mark and the mark."""
        items: list[Any] = []
        while len(items) != count and (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def top(self, kind: type) -> Any:
        """What lies on top of the stack, which must be a `kind`."""
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"not a {kind.__name__}")
        return self.stack[-1]

    def call(self, name: Any, arguments: tuple[Any, ...]) -> Any:
        """What one of the few functions known here would give."""
        match name:
            case "collections.OrderedDict" if arguments == ():
                return {}
            # From the seventh on: bits such as "negate when read", which hardly ever occur
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" if not any(arguments[6:]):
                return self.view(*arguments[:4])
            case "torch._utils._rebuild_parameter" if isinstance(arguments[0], TensorReference):
                return arguments[0]
        raise BadInput(f"{self.path}: holds more than tensors ({_shown(name)}); refused")

    def whole_storage(self, kind: str, name: str, key: str, device: str, elements: int) -> TensorReference:
        """All elements of the storage that a persistent id names."""
        if kind != "storage" or type(name) is not _Name or type(key) is not str or type(elements) is not int:
            raise TypeError("not the id of a storage")
        if name not in DTYPES:
            raise BadInput(f"{self.path}: a tensor is a {_shown(name)}; known are {', '.join(DTYPES)}")
        entry, dtype = f"{self.prefix}data/{key}", DTYPES[name]
        if self.sizes.get(entry) != elements * dtype.itemsize:
            raise BadInput(f"{self.path}: {entry} has {self.sizes.get(entry)} bytes; expected {elements} x {dtype}")
        return TensorReference(self.path, entry, elements, dtype, (elements,), (1,), 0)

    def view(self, whole: TensorReference, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        """A tensor, once it is known to lie within its storage."""
        if not isinstance(whole, TensorReference) or len(shape) != len(stride) or len(shape) > 32:
            raise TypeError("not a tensor")
        if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
            raise BadInput(f"{self.path}: a tensor in {whole.entry} has an offset, size or stride that cannot be")
        end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        # An expanded tensor, which repeats elements, could be of any size: it may not have more than are stored
        if (0 not in shape and max(end, math.prod(shape)) > whole.stored) or math.prod(n or 1 for n in shape) >> 48:
            raise BadInput(
                f"{self.path}: a tensor of shape {shortened(shape)}, strides {shortened(stride)}, offset "
                f"{shortened(offset)} goes beyond the {whole.stored} elements of {whole.entry}; save it with "
                ".contiguous()"
            )
        return replace(whole, shape=tuple(shape), stride=tuple(stride), offset=offset)
