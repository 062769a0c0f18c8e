"""Names of datasets -> the rows of their splits, mapped into memory.

A dataset is a folder or a file of rows, what `save_to_disk` of the `datasets` library wrote, or a name on the Hugging
Face hub. `datasets` takes every path for a pattern, so that `a*b` may read `axb`: what it is given here is escaped.
"""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jax_sae.errors import BadInput
from jax_sae.language_model.hub import (
    NoAnswer,
    ask_hub,
    cannot_load,
    find_local,
    hub_switched_off,
    one_line,
    read_json,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

FILE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".txt": ("text", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".ndjson": ("json", {}),
    ".arrow": ("arrow", {}),
}
"""What a file's name ends in, in any case -> the module of `datasets` that reads it, and its settings."""

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
"""What may follow that -> what fsspec calls it."""

PACKAGES = {"zstd": "zstandard", "lz4": "lz4"}
"""Compressions that need a package."""


CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
"""How long a server on the network may take to answer, and to send something more."""


def open_split(path: str, split: str, column: str, config: str = "") -> "Dataset":
    """The rows of one split, mapped into memory.

    Args:
        path: a folder of parquet, JSON, CSV, text or Arrow files, one such file (which is the split 'train'),
            compressed or not, a folder that `save_to_disk` wrote (a dataset alone is the split 'train'), or
            the name of a dataset on the Hugging Face hub. In a text file each line is a story.
        split: such as 'train'.
        column: the one that holds the text or token ids; a text file's is 'text', and 'meta.text' is the entry 'text'
            of the column 'meta'.
        config: which configuration (subset), of a dataset that has several.

    Raises:
        BadInput: if there is no such dataset, configuration, split or column.
    """
    return choose_split(open_dataset(path, config), path, split, column)


def choose_split(splits: "DatasetDict", path: str, split: str, column: str) -> "Dataset":
    """The rows of one split of a dataset that is open already; `path` names it in errors, which are `open_split`'s."""
    if split not in splits:
        raise BadInput(f"{path}: no split {split!r}; there are {', '.join(map(repr, splits))}: name one of them")
    return with_column(splits[split], column, f"{path}: no column {column!r} in the split {split!r}")


def with_column(rows: "Dataset", column: str, missing: str) -> "Dataset":
    """Rows that have the column, and others; of a nested column, those beside it, with dotted names.

    Raises:
        BadInput: if there is no such column; `missing` says so.
    """
    if column in rows.column_names:
        return rows
    for outer in rows.column_names:
        if column.startswith(f"{outer}."):
            nested = rows.select_columns([outer]).flatten()
            if column in nested.column_names:
                return nested
    there = ", ".join(map(repr, rows.flatten().column_names))
    raise BadInput(f"{missing}; there are {there}: name one of them")


def open_dataset(path: str, config: str = "") -> "DatasetDict":
    """All splits of a dataset, by name; `path`, `config` and errors as for `open_split`."""
    if is_address(path):
        raise BadInput(f"{path}: an address; it is read while training, with text.streaming, or download the file")
    return _load(path, config, streaming=False)


def open_streams(path: str, config: str = "") -> "IterableDatasetDict":
    """The same without reading or downloading more than names and the beginning of a file.

    Raises:
        BadInput: also for a folder that `save_to_disk` wrote.
    """
    if (local := find_local(path)) is not None and is_saved_to_disk(local):
        raise BadInput(f"{path}: save_to_disk wrote it, which needs no streaming; leave text.streaming out")
    return _load(path, config, streaming=True)


def is_address(path: str) -> bool:
    """Whether it is the address of a file on the network."""
    return re.match(r"\w+://", path) is not None


def addresses(path: str) -> list[str]:
    """An address with `{00..15}` or `{a,b}` in it as all that it stands for, in order; another one alone."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", path)
    if found is None:
        return [path]
    first, last, names = found.groups()
    parts = names.split(",") if names else [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [whole for part in parts for whole in addresses(path[: found.start()] + part + path[found.end() :])]


def open_address(address: str) -> "IterableDataset":
    """The rows of a file on the network, which are read as they are asked for; errors of many kinds, of the network."""
    import datasets
    from aiohttp import ClientTimeout

    module, settings = _kind_of_file(Path(urlsplit(address).path), address)
    timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    try:
        return datasets.load_dataset(
            module,
            data_files=[address],
            split="train",
            streaming=True,
            storage_options={"client_kwargs": {"timeout": timeout}},
            **settings,
        )
    except StopIteration as error:  # it takes a file that it cannot reach for an empty folder
        raise ConnectionError("nothing came") from error


def _load(path: str, config: str, streaming: bool) -> Any:
    import datasets

    hub_is_silent = ""
    if (local := find_local(path)) is None:
        try:
            ask_hub(path, "dataset")
        except NoAnswer as reason:
            hub_is_silent = str(reason)
    elif not streaming and is_saved_to_disk(local):
        if config:
            raise BadInput(
                f"{path}: text.config is {config!r}, but a folder that save_to_disk wrote has one; leave it out"
            )
        return open_saved(local)
    try:
        with _files_on_this_machine() if local or hub_is_silent else nullcontext():
            if local is None:
                return datasets.load_dataset(path, config or None, streaming=streaming)
            return datasets.load_dataset(**_local_arguments(local, config), streaming=streaming)
    except BadInput:
        raise
    except Exception as error:  # there are many, for each file format and each trouble
        if re.match("Config name is missing|BuilderConfig .* not found", str(error)):
            raise _configurations(path, config, local) from error
        if hub_is_silent:
            raise cannot_load(path, "dataset", hub_is_silent) from error
        raise BadInput(f"{path}: cannot be loaded as a dataset ({_reason(error)})") from error


def _local_arguments(local: Path, config: str) -> dict[str, Any]:
    """What `datasets.load_dataset` is given for a folder or file: its path where it is no pattern, or escaped.

    Raises:
        BadInput: if it is of another kind, empty, or cannot be handed to `datasets`.
    """
    from datasets.data_files import get_data_patterns

    where = local.resolve()
    if "::" in str(where) or "://" in str(where):
        raise BadInput(f"{local}: '::' and '://' in a path mean archives and addresses to `datasets`; rename it")
    escaped = glob.escape(str(where))
    if local.is_dir():
        if escaped == str(where):
            return {"path": str(where), "name": config or None}
        for card in (where / "README.md", where / ".huggingface.yaml"):
            if card.is_file() and re.search(r"^configs:", card.read_text(errors="replace"), re.MULTILINE):
                raise BadInput(
                    f"{local}: {card.name} lists configurations, which are not found where *, ? or [ is in "
                    "the path; rename the folder"
                )
        patterns = get_data_patterns(escaped)
        return {
            "path": str(where),
            "name": config or None,
            "data_files": {split: [f"{escaped}/{pattern}" for pattern in some] for split, some in patterns.items()},
        }
    module, settings = _kind_of_file(local, str(local))
    if config:
        raise BadInput(f"{local}: text.config is {config!r}, but a file has no configurations; leave it out")
    if not local.stat().st_size:
        raise BadInput(f"{local} is empty; stories were expected, one a row")
    return {"path": module, "data_files": [escaped], **settings}


def _kind_of_file(path: Path, name: str) -> tuple[str, dict[str, Any]]:
    """The module of `datasets` for a single file, and its settings; BadInput, with `name`, if it is of another kind."""
    import fsspec

    endings = [ending.lower() for ending in path.suffixes]
    compression = COMPRESSIONS.get(endings.pop()) if endings and endings[-1] in COMPRESSIONS else None
    if not endings or endings[-1] not in FILE_KINDS:
        raise BadInput(
            f"{name}: neither a folder nor a file that ends in {', '.join(FILE_KINDS)}, or in one of these and "
            f"{', '.join(COMPRESSIONS)}"
        )
    if compression and compression not in fsspec.available_compressions():
        package = PACKAGES.get(compression, compression)
        raise BadInput(f"{name}: needs the package {package}; run `pip install {package}`, or decompress the file")
    return FILE_KINDS[endings[-1]]


def _reason(error: Exception) -> str:
    """Why a dataset cannot be loaded; with what to do where a package is missing."""
    found = re.search(r"Compression type (\w+) not supported", str(error))
    package = PACKAGES.get(found[1]) if found else None
    advice = f"; run `pip install {package}`, or decompress the files" if package else ""
    return one_line(error.__cause__ or error) + advice


def _configurations(path: str, config: str, local: Path | None) -> BadInput:
    """The error for a configuration that is missing or unknown."""
    import datasets

    with _files_on_this_machine() if local else nullcontext():
        names = datasets.get_dataset_config_names(str(local.resolve()) if local else path)
    there = ", ".join(map(repr, names))
    found = f"no configuration {config!r}" if config else f"has {len(names)} configurations"
    return BadInput(f"{path}: {found}; there are {there}: name one of them by text.config")


def is_saved_to_disk(local: Path) -> bool:
    """Whether a folder is one that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    return any((local / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_saved(local: Path) -> "DatasetDict":
    """The splits of such a folder, its Arrow files mapped into memory; a dataset alone is the split 'train'.

    Formats that it was saved with (`set_format("torch")`) are left out: they need packages, and change no content.

    Raises:
        BadInput: if files are missing or damaged.
    """
    import datasets

    folders = {"train": local}
    if (local / "dataset_dict.json").is_file():
        names = read_json(local / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(_is_plain_file_name(name) for name in names) or not names:
            raise BadInput(f"{local / 'dataset_dict.json'}: 'splits' should list the names of folders beside it")
        folders = {name: local / name for name in names}
    splits = {}
    for name, folder in folders.items():
        files = read_json(folder / "state.json").get("_data_files")
        if (
            not isinstance(files, list)
            or not files
            or not all(isinstance(file, dict) and _is_plain_file_name(file.get("filename")) for file in files)
        ):
            raise BadInput(f"{folder / 'state.json'}: '_data_files' should list the names of files beside it")
        try:
            parts = [datasets.Dataset.from_file(str(folder / file["filename"])) for file in files]
            splits[name] = datasets.concatenate_datasets(parts)
        except Exception as error:  # of several libraries
            raise BadInput(f"{folder}: cannot be read as save_to_disk wrote it ({one_line(error)})") from error
    return datasets.DatasetDict(splits)


def _is_plain_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.isprintable() and name not in (".", "..")


@contextmanager
def _files_on_this_machine() -> Iterator[None]:
    """Within it, `datasets` asks no hub, logs no error that it then raises, and shows no progress.

    Only a download is slow enough for that.
    """
    import datasets

    were_off, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with hub_switched_off():
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not were_off:
            datasets.enable_progress_bars()
