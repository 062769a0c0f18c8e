"""Names become files: local ones, the embedded demo's, cached ones and those of a hub.

The hub is a stand-in on this machine, asked by the real libraries in processes of their own, since these read HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE when they are imported.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from fuzzing import flip
from running import REPOSITORY

from jax_sae.errors import BadInput
from jax_sae.language_model.hub import find_local, find_model_files, find_weight_files, hub_switched_off
from jax_sae.language_model.pretrained import load_language_model

MODEL = REPOSITORY / "jax_sae" / "demo" / "model"
SHA = "0123456789abcdef" * 2 + "01234567"
FILES = {
    "/models/a/both": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": b'{"weight_map": {"x": "model-00001-of-00001.safetensors"}}',
        "model-00001-of-00001.safetensors": b"weights",
        "pytorch_model.bin": b"the same weights",
        "onnx/model.safetensors": b"others",
    },
    "/models/a/torch": {"config.json": b"{}", "pytorch_model.bin": b"weights", "flax_model.msgpack": b"the same"},
    "/models/a/empty": {"README.md": b""},
    "/models/a/saes": {
        "config.json": b"{}",
        **{f"layers.{n}/{file}": b"5" for n in (5, 6) for file in ("cfg.json", "sae.safetensors")},
    },
    "/models/a/gated": {},
    "/datasets/a/stories": {"train.txt": b"Once.\nTwice.\n", "test.txt": b"No.\n"},
}


def git_digest(content: bytes) -> str:
    """By which git, and the hub for a small file, names a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub as is needed to look up and download the repositories in FILES."""

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        """Send a status, headers with _ for -, and, but to HEAD, a body."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        """Describe a repository, list its files, or send one."""
        path = unquote(urlsplit(self.path).path)
        for repository, files in FILES.items():
            if path == "/api/models/a/gated":
                return self.answer(403, X_Error_Code="GatedRepo")
            if path.startswith(f"/api{repository}/tree/"):
                listing = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self.answer(200, json.dumps(listing).encode())
            if path in {f"/api{repository}{at}" for at in ("", "/revision/main", f"/revision/{SHA}")}:
                info = {"id": repository[-3:], "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(200, json.dumps(info).encode())
            if path.startswith(f"{repository.removeprefix('/models')}/resolve/"):
                content = files.get(path.partition("/resolve/")[2].partition("/")[2])
                if content is None:
                    return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
                return self.answer(200, content, X_Repo_Commit=SHA, ETag=f'"{git_digest(content)}"')
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


SCRIPT = """
import json, sys
from jax_sae.errors import BadInput
from jax_sae.language_model import dataset, hub, stream
def show(function, *arguments):
    try:
        result = function(*arguments)
        if function is dataset.open_split:
            return result["text"][:]
        if function is stream.open_shards:
            return [result["train"].names, stream.first_buffer(result["train"]).rows["text"][:]]
        return sorted(str(file.relative_to(result)) for file in result.rglob("*") if file.is_file())
    except BadInput as error:
        return str(error)
hub.ANSWER_SECONDS = float(sys.argv[1])
calls = json.loads(sys.argv[2])
functions = {"model": hub.find_model_files, "tokenizer": hub.find_tokenizer_files, "dataset": dataset.open_split}
functions |= {"stream": stream.open_shards, "dictionary": hub.find_dictionary}
print(json.dumps([show(functions[what], *arguments) for what, *arguments in calls]))
"""

STORIES = ["dataset", "a/stories", "train", "text"]


def in_a_process(
    tmp_path: Path, endpoint: str, calls: list[list[str]], answer_seconds: float = 5.0, **environment: str
) -> tuple[list[Any], float]:
    """What each call gives, the files of a directory or the text of a BadInput, and the seconds it took in all."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HTTP"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(answer_seconds), json.dumps(calls)]
    start = time.monotonic()
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), time.monotonic() - start


@pytest.mark.long
def test_hub_names_are_downloaded_and_then_found_without_a_hub(tmp_path: Path) -> None:
    """Only the files needed are downloaded; what the hub refuses is refused."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    calls = [["model", "a/both"], ["model", "a/torch"], ["tokenizer", "a/both"], STORIES]
    streamed = ["stream", "a/stories", "text"]
    with_hub = [
        ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"],
        ["config.json", "pytorch_model.bin"],
        ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"],
        ["Once.", "Twice."],
    ]
    no_split, absent = ["dataset", "a/stories", "dev", "text"], ["dataset", "a/absent", "train", "text"]
    refused = [no_split, ["model", "a/absent"], absent, ["model", "a/gated"], ["model", "a/empty"]]
    endpoint = f"http://127.0.0.1:{server.server_port}"
    dictionaries = [["dictionary", f"hf://a/saes/{folder}"] for folder in ("layers.5", "layers.7")]
    results, _ = in_a_process(tmp_path, endpoint, [*calls, *refused, *dictionaries, streamed])
    server.shutdown()
    server.server_close()
    assert results[:4] == with_hub
    assert results[-1] == [["train.txt"], ["Once.", "Twice."]]
    assert results[4] == "a/stories: no split 'dev'; there are 'train', 'test': name one of them"
    for message in results[5:7]:
        assert "'a/absent': no such file or directory, and the hub gives none of that name (HTTP 404)" in message
    assert "ask for access" in results[7] and "has none of model.safetensors" in results[8]
    assert results[9] == ["cfg.json", "sae.safetensors"]
    assert results[10].endswith("name its folder or file. There are config.json, layers.5, layers.6")
    [there] = (tmp_path / "home" / "hub" / "models--a--saes").glob("snapshots/*")
    assert sorted(path.name for path in there.iterdir()) == ["config.json", "layers.5"]  # the config above it too

    # Now with a hub that takes calls and never answers, and with one weight file gone from the cache
    next((tmp_path / "home").glob("**/snapshots/*/pytorch_model.bin")).unlink()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        results, _ = in_a_process(tmp_path, endpoint, [*calls, *dictionaries], answer_seconds=0.5)
    assert [results[0], *results[2:4]] == [with_hub[0], *with_hub[2:]]
    assert results[4] == ["cfg.json", "sae.safetensors"] and "not complete in the local Hugging Face" in results[5]
    assert "not complete in the local Hugging Face cache, and the hub did not answer (TimeoutError" in results[1]


@pytest.mark.long
def test_without_a_hub_an_unknown_name_ends_soon_with_advice(tmp_path: Path) -> None:
    """And never waits for the libraries' own retries."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    calls = [["model", "a/both"], ["tokenizer", "a/both"], STORIES]
    results, seconds = in_a_process(tmp_path, endpoint, calls)
    for message in results:
        assert "and the hub did not answer (ConnectError" in message and "set HF_HUB_OFFLINE=1" in message
    assert "`hf download a/both`" in results[0] and "--repo-type dataset a/stories" in results[2]
    assert seconds < 15  # about 2 on a machine at rest; the libraries' own retries take 20 to 46
    results, _ = in_a_process(tmp_path, endpoint, calls, HF_HUB_OFFLINE="1")
    for message in results:
        assert "and HF_HUB_OFFLINE is set" in message and "HF_HUB_OFFLINE=1" not in message


def test_a_local_path_comes_before_the_embedded_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory named like a hub id is a directory."""
    monkeypatch.chdir(tmp_path)
    in_package = find_local("jax_sae/demo/")
    assert in_package is not None and in_package.is_absolute() and in_package.parent.name == "jax_sae"
    assert find_local("jax_sae/demo/absent") is None and find_local("jax_sae/errors.py") is None
    (tmp_path / "jax_sae" / "demo" / "model").mkdir(parents=True)
    (tmp_path / "roneneldan" / "TinyStories-33M").mkdir(parents=True)
    for name in ("jax_sae/demo/model", "roneneldan/TinyStories-33M", str(tmp_path)):
        found = find_local(name)
        assert found is not None and found.samefile(tmp_path / name)
        assert find_model_files(name) == found


NO_NAMES = [
    "a/b/c",
    "/a/b",
    "../a",
    "../../x/y",
    "..\\x",
    "",
    "a b",
    "a/b.git",
    "a" * 300,
    "a" * 9000,
    "a\0b",
    "\ud800",
]
NO_NAMES += ["~no-such-user/x", "jax_sae/demo/absent", "jax_sae/demo/../../../absent", "jax_sae/demo/\0"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_neither_a_path_nor_a_hub_name_is_refused(name: str) -> None:
    """Without asking a hub."""
    with pytest.raises(BadInput, match="no such file or directory, and not a name on the hub"):
        find_model_files(name)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and its tokenizer in a cache, as `a/model`: the directory of its snapshot, all links to `blobs`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--a--model"
    snapshot = repository / "snapshots" / SHA
    for directory in (repository / "blobs", repository / "refs", snapshot):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    for source in MODEL.iterdir():
        content = source.read_bytes()
        in_lfs = source.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if in_lfs else git_digest(content)
        (repository / "blobs" / name).write_bytes(content)
        (snapshot / source.name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot


def flip_a_bit(path: Path) -> None:
    """Turn a bit round in the middle of a file, which is often of no consequence to who reads it."""
    content = path.read_bytes()
    path.write_bytes(flip(content, 4 * len(content)))


@pytest.mark.parametrize("name", sorted(path.name for path in MODEL.iterdir()))
def test_a_flipped_bit_in_a_cached_file_is_refused_by_its_name(cached: Path, name: str) -> None:
    """Whichever file of model and tokenizer; what is to be deleted is the file itself, not the link to it."""
    assert len(load_language_model("a/model", 1).activations(["Once upon a time."])) == 1
    flip_a_bit(cached / name)
    blob = (cached / name).resolve()
    with pytest.raises(BadInput, match=f"{name}: damaged, its digest is .*, but {blob.name} was.* delete {blob} and"):
        load_language_model("a/model", 1).activations(["Once upon a time."])
    with pytest.raises(BadInput, match=f"{name}: damaged"):  # the same where the directory is given
        load_language_model(str(cached), 1).activations(["Once upon a time."])


def test_a_damaged_index_in_the_cache_is_refused_by_its_name(cached: Path) -> None:
    """And is not taken for a model that is not there."""
    (cached / "model.safetensors").rename(cached / "model-00001-of-00001.safetensors")
    index = json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}).encode()
    blob = cached.parents[1] / "blobs" / git_digest(index)
    (cached / "model.safetensors.index.json").symlink_to(blob)
    blob.write_bytes(index)
    assert load_language_model("a/model", 1).width == 64
    for damaged in (index[:-1], index[:-1] + b" "):
        blob.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"model.safetensors.index.json: damaged"):
            load_language_model("a/model", 1)


def test_only_a_link_to_a_blob_with_a_digest_for_its_name_says_what_was_downloaded(cached: Path) -> None:
    """Not a copy, a link elsewhere, a blob of another kind of name, or a blob's own link into a store of all blobs."""
    weights = cached / "model.safetensors"
    blob, store = weights.resolve(), cached.parents[2] / "blobs" / "ab"
    store.mkdir(parents=True)
    blob.rename(store / ("ab" * 32))  # the newer libraries' store, where files have names by yet another digest
    blob.symlink_to(store / ("ab" * 32))
    assert load_language_model("a/model", 1).width == 64
    flip_a_bit(weights)
    with pytest.raises(BadInput, match=f"delete {store / ('ab' * 32)} and"):
        load_language_model("a/model", 1)
    for target in (store / ("ab" * 32), blob.with_name("5f2a-7")):
        if not target.exists():
            (store / ("ab" * 32)).rename(target)
        weights.unlink()
        weights.symlink_to(target)
        assert load_language_model("a/model", 1).width == 64
    weights.unlink()
    target.rename(weights)
    assert load_language_model("a/model", 1).width == 64


def test_weights_are_taken_in_one_format_only(tmp_path: Path) -> None:
    """Safetensors first."""
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        assert find_weight_files(tmp_path) == [tmp_path / name]


def test_the_hub_is_switched_on_again_after_an_error() -> None:
    """In both libraries."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE
    with pytest.raises(RuntimeError), hub_switched_off():
        assert constants.HF_HUB_OFFLINE and config.HF_HUB_OFFLINE
        raise RuntimeError
    assert before is constants.HF_HUB_OFFLINE is config.HF_HUB_OFFLINE
