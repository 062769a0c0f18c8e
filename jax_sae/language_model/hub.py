"""Names of models, tokenizers and datasets -> files on this machine.

A name is looked up in this order: as a path; below this package, for the embedded `jax_sae/demo/...`; as a Hugging Face
hub id in the local cache; on the hub itself. What is in the cache is used as it is, without asking the hub for news,
but is held against the digest by which it was downloaded.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

from jax_sae.errors import BadInput, RunFailed

Kind = Literal["model", "dataset"]

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 5.0  # with the look-up of the address, which has no limit of its own, and several addresses tried

JSON_BYTES = 16 << 20  # most for a JSON file or a safetensors header: as Python's objects it may take 30 times that

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights may be, the first that is there counts; an index lists the files among which they are divided."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class NoAnswer(Exception):
    """The hub could not be asked; the message is the reason, worded to follow "and"."""


def find_local(name: str) -> Path | None:
    """The file or directory of that name, if it exists: below the working directory, or in the embedded demo.

    `package:NAME/FILE` is a file that the installed Python package NAME brings.
    """
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        try:
            folders = getattr(importlib.util.find_spec(package), "submodule_search_locations", None) or []
        except (ImportError, ValueError):  # a name that cannot be one
            folders = []
        return next((Path(folder) / file for folder in folders if (Path(folder) / file).exists()), None)
    path = os.path.expanduser(name)  # which, unlike Path.expanduser, leaves the name of an unknown user as it is
    if name and os.path.exists(path):  # which, unlike Path.exists, takes a name that cannot be for one that is not
        return Path(path)
    beside_package = Path(__file__).parents[2] / name
    return beside_package if name.startswith("jax_sae/demo/") and beside_package.exists() else None


def find_model_files(name: str) -> Path:
    """A directory with config.json, the weights and, where it has one, the tokenizer of a language model; or a .gguf.

    Downloads them from the hub, unless it is a local directory or in the local cache.

    Raises:
        BadInput: if there is no such model, or it cannot be had.
    """
    return _find(name, "language model", ("config.json",), _has_weights)


def find_tokenizer_files(name: str) -> Path:
    """A directory with the files of a tokenizer; otherwise like `find_model_files`.

    Raises:
        BadInput: also if one of them is not what was downloaded.
    """
    directory = _find(name, "tokenizer", ("tokenizer.json", "vocab.json"), has_tokenizer)
    for file in ("config.json", *TOKENIZER_FILES):
        refuse_damaged_download(directory / file)
    return directory


HUB = "hf://"
"""What stands before the name of a repository on the hub where a path may stand too."""

BESIDE = ("config.json", "config.yaml", "wandb-config.yaml", "wanb-config.yaml")
"""Configs that stand in a folder above the dictionary that they belong to."""

MOST_FILES = 64


def find_dictionary(name: str) -> Path:
    """The folder or file of a dictionary: a path, or hf://owner/repository/folder, whose files are downloaded.

    Of a repository those in that folder are downloaded, or that file, and the configs in folders above it.

    Raises:
        BadInput: if there is no such file or folder, it holds too much to be one dictionary, or it cannot be had.
    """
    if not name.startswith(HUB):
        if (local := find_local(name)) is None:
            raise BadInput(
                f"{name}: there is no such file or folder; a repository on the hub is {HUB}owner/name/folder"
            )
        return local
    owner, _, rest = name.removeprefix(HUB).strip("/").partition("/")
    repository, _, inside = rest.partition("/")
    repository = f"{owner}/{repository}"
    _check_form(repository, "dictionary")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    above = [Path(inside).parents[i] for i in range(len(Path(inside).parents))] if inside else []
    configs = [(folder / file).as_posix() for folder in above for file in BESIDE]
    try:
        files = ask_hub(repository, "model")
        folder = f"{inside}/" if inside else ""
        wanted = [file for file in files if file == inside or file.startswith(folder)] if inside else files
        if not wanted or len(wanted) > MOST_FILES:
            shown = ", ".join(sorted({file.removeprefix(folder).partition("/")[0] for file in wanted or files})[:8])
            raise BadInput(
                f"{name}: {len(wanted)} files; one dictionary has a few: name its folder or file. There are {shown}"
            )
        found = Path(snapshot_download(repository, allow_patterns=[*wanted, *(set(configs) & set(files))]))
    except NoAnswer as error:
        snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"), "snapshots")
        there = [snapshot for snapshot in snapshots.glob("*") if inside and (snapshot / inside).exists()]
        if not there:
            raise cannot_load(repository, "dictionary", str(error)) from error
        return max(there, key=lambda snapshot: snapshot.stat().st_mtime) / inside
    except BadInput:
        raise
    except Exception as error:  # whatever the network and the disk can do to a download
        raise BadInput(f"{name} could not be downloaded ({one_line(error)}); try again") from error
    return found / inside


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer can be loaded from a directory."""
    there = {name for name in TOKENIZER_FILES if (directory / name).exists()}
    return "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there


def find_weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights: one, or those that the index lists.

    Raises:
        BadInput: if there are none, or the index is damaged.
    """
    for name in WEIGHT_FILES:
        path = directory / name
        if not path.exists():
            continue
        if not name.endswith(".index.json"):
            return [path]
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInput(f"{path}: weight_map should name, for each tensor, a file in the same directory")
        suffix = name.removesuffix(".index.json").partition(".")[2]
        for file in weight_map.values():
            if not isinstance(file, str) or not re.fullmatch(rf"[\w-][\w.-]*\.{suffix}", file):
                raise BadInput(
                    f"{path}: weight_map names {shortened(file)}; the plain name of a .{suffix} file in the same "
                    "directory was expected"
                )
        return [directory / file for file in sorted(set(weight_map.values()))]
    raise BadInput(f"{directory}: no weights; expected one of {', '.join(WEIGHT_FILES)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; BadInput if it cannot be read, is something else or not what was downloaded."""
    refuse_damaged_download(path)
    try:
        with path.open("rb") as file:
            text = file.read(JSON_BYTES + 1)
        if len(text) > JSON_BYTES:
            raise BadInput(f"{path}: is larger than {JSON_BYTES >> 20} MiB; no file of its kind is")
        content = json.loads(text.decode())
    except BadInput:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}; an object was expected")
    return content


def refuse_damaged_download(path: Path) -> None:
    """Raise BadInput if a file in the Hugging Face cache is not what was downloaded.

    There `snapshots/COMMIT/NAME` is a link to `blobs/ETAG`, and the etag is the file's digest: sha256 (64 digits) for a
    file in LFS; for another, git's for a blob (40 digits), sha1 of "blob", its size and itself. A file that is no such
    link, in a local directory or a cache on a system without links, has no digest that it could be held against.

    Source: https://huggingface.co/docs/hub/local-cache
    """
    if not path.is_symlink():
        return
    blob = path.parent / path.readlink()  # not resolve(): a blob may be a link too, to a name that is another digest
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return
    try:
        with path.open("rb") as file:
            start = b"" if len(blob.name) == 64 else b"blob %d\0" % os.fstat(file.fileno()).st_size
            kind = hashlib.sha256 if len(blob.name) == 64 else hashlib.sha1
            found = hashlib.file_digest(file, lambda: kind(start, usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    if found != blob.name:
        raise BadInput(
            f"{path}: damaged, its digest is {found}, but {blob.name} was downloaded; delete {path.resolve()} and "
            "download it again"
        )


def ask_hub(name: str, kind: Kind) -> list[str]:
    """The names of a repository's files, as the hub lists them now. Takes seconds at most.

    Raises:
        NoAnswer: if the hub is switched off (HF_HUB_OFFLINE) or does not answer.
        BadInput: if the hub has no such repository, or does not give it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    _check_form(name, kind)
    if constants.HF_HUB_OFFLINE:
        raise NoAnswer("HF_HUB_OFFLINE is set")
    outcome: list[Any] = []

    def ask() -> None:
        try:
            outcome.append(HfApi().repo_info(name, repo_type=kind, timeout=CONNECT_SECONDS))
        except Exception as error:  # of many libraries, and raised again or reported below
            outcome.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    answer = outcome[0] if outcome else TimeoutError(f"{constants.ENDPOINT}, {ANSWER_SECONDS:g} s")
    if isinstance(answer, HfHubHTTPError) and answer.response.status_code < 500:
        raise _refused(name, kind, answer) from answer
    if isinstance(answer, Exception):
        raise NoAnswer(f"the hub did not answer ({one_line(answer)})") from answer
    return [file.rfilename for file in answer.siblings or []]


def check_repository(name: str) -> None:
    """Raise BadInput unless a folder may be uploaded to a repository of that name, as far as it is known here."""
    from huggingface_hub import constants

    if name.count("/") != 1:
        raise BadInput(f"cannot upload to {name!r}; user/repo was expected")
    _check_form(name, "repository")
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"cannot upload to {name!r}: HF_HUB_OFFLINE is set; unset it, or leave --push out")


def push_folder(folder: Path, name: str) -> None:
    """Upload the files of a folder to a repository `user/repo` of models, which is made if it is not there.

    Raises:
        BadInput: if the hub refuses it.
        RunFailed: if the hub does not answer; the folder is there all the same.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A dictionary, exported by jax_sae")
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise BadInput(
            f"the hub refuses {folder} for {name!r} ({one_line(error)}); run `hf auth login` with a token that may "
            "write there"
        ) from error
    except Exception as error:  # whatever the network can do
        raise RunFailed(
            f"{folder} could not be uploaded to {name!r} ({one_line(error)}); the folder is there"
        ) from error


def cannot_load(name: str, what: str, reason: str) -> BadInput:
    """The error for a name that is nowhere on this machine, where the hub could not be asked for the given reason."""
    if what == "dataset":
        advice = f"a local folder (`hf download --repo-type dataset {name} --local-dir FOLDER` makes one)"
    else:
        advice = f"a local directory, run `hf download {name}` first"
    skip = "" if "HF_HUB_OFFLINE" in reason else ", or set HF_HUB_OFFLINE=1 to skip the hub"
    return BadInput(
        f"cannot load {what} {name!r}: no such file or directory, not complete in the local Hugging Face cache, and "
        f"{reason}. Give {advice}{skip}"
    )


@contextmanager
def hub_switched_off() -> Iterator[None]:
    """Within it, the Hugging Face libraries use files on this machine only, and at once, as with HF_HUB_OFFLINE=1."""
    importlib.import_module("huggingface_hub.constants")
    modules: list[Any] = [
        sys.modules[name] for name in ("huggingface_hub.constants", "datasets.config") if name in sys.modules
    ]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def one_line(said: BaseException | str) -> str:
    """An error or a message of another library on one line, shortened, printable whatever it quotes from a file."""
    text = " ".join(str(said).split())[:300]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if isinstance(said, str):
        return text
    return f"{type(said).__name__}: {text}" if text else type(said).__name__


def _find(name: str, what: str, marks: tuple[str, ...], is_complete: Callable[[Path], bool]) -> Path:
    """The directory that a name means; `marks` are files by which the cache finds it."""
    if (local := find_local(name)) is not None:
        if what == "language model" and local.suffix == ".gguf":
            return local
        if not local.is_dir():
            raise BadInput(f"{local}: a file; give the directory that holds the {what}")
        return local
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        raise BadInput(f"cannot load {what} {name!r}: no Python package {package!r} with {file!r} in it is installed")
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    _check_form(name, what)
    for cached in (try_to_load_from_cache(name, mark) for mark in marks):
        if isinstance(cached, str) and is_complete(Path(cached).parent):
            return Path(cached).parent
    try:
        files = ask_hub(name, "model")
    except NoAnswer as error:
        raise cannot_load(name, what, str(error)) from error
    wanted = _weights_in_one_format(files) if what == "language model" else set(TOKENIZER_FILES) & set(files)
    if not wanted:
        expected = WEIGHT_FILES if what == "language model" else TOKENIZER_FILES
        raise BadInput(f"cannot load {what} {name!r}: its repository on the hub has none of {', '.join(expected)}")
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", *TOKENIZER_FILES, *sorted(wanted)]))
    except HfHubHTTPError as error:
        raise _refused(name, "model", error) from error
    except Exception as error:  # whatever the network and the disk can do to a download
        raise BadInput(f"{what} {name!r} could not be downloaded ({one_line(error)}); try again") from error


def _check_form(name: str, what: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(
            f"cannot load {what} {name!r}: no such file or directory, and not a name on the hub, which has the form "
            "owner/name"
        ) from error


def _weights_in_one_format(files: list[str]) -> set[str]:
    """Those of a repository's files that hold the weights; many repositories hold them in several formats."""
    name = next((name for name in WEIGHT_FILES if name in files), None)
    if name is None:
        return set()
    stem, suffix = name.removesuffix(".index.json").split(".")
    return {file for file in files if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.{suffix}(\.index\.json)?", file)}


def _has_weights(directory: Path) -> bool:
    if not any((directory / name).exists() for name in WEIGHT_FILES):
        return False
    return all(file.exists() for file in find_weight_files(directory))


def _refused(name: str, kind: Kind, error: Any) -> BadInput:
    """What an HTTP status of the hub means to the user."""
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return BadInput(f"cannot load {kind} {name!r}: ask for access on its page on the hub, then run `hf auth login`")
    return BadInput(
        f"cannot load {kind} {name!r}: no such file or directory, and the hub gives none of that name (HTTP "
        f"{error.response.status_code}); check the spelling or, if it is private, run `hf auth login`"
    )
