"""The command line in a directory with the files that the words name, and what a refusal is."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from running import REPOSITORY

from jax_sae.activations.array_sources import open_activations
from jax_sae.commands.train import main
from jax_sae.errors import BadInput

DEMO = REPOSITORY / "configs" / "demo.toml"
MODEL = REPOSITORY / "jax_sae" / "demo" / "model"
D = 8
ON_ROWS = ["--activations.path", "rows.npy"]
SMALL = [
    *("--sweep.features", "4", "--train.steps", "6", "--train.checkpoint-every", "2", "--train.log-every", "2"),
    *("--train.batch-tokens", "32", "--activations.block-tokens", "256", "--activations.held-out-tokens", "200"),
]
WORD = "a whole number was expected"
ROWS = np.random.default_rng(0).normal(size=(1000, D)).astype(np.float32)
GIANTS = ROWS * np.where(np.arange(1000) % 50 == 7, 1e4, 1)[:, None].astype(np.float32)
"""Rows of which one in fifty is far larger than the others."""


def write_tokenizer(directory: Path, first_id: int) -> None:
    """A tokenizer of bytes, with 256 ids from the first on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: first_id + i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@contextlib.contextmanager
def working_among(inputs: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a new directory that holds nothing but the inputs; signals have their usual effect again afterwards."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", inputs.parent / "cache")
    directory.mkdir()
    monkeypatch.chdir(directory)
    for path in inputs.iterdir():
        Path(path.name).symlink_to(path)
    with usual_signals():
        yield


@contextlib.contextmanager
def usual_signals() -> Iterator[None]:
    """Put back what a run does with signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def files(directory: Path = Path()) -> dict[Path, tuple[int, bytes]]:
    """Every file below a directory with the time of its last change and its bytes, and every directory; no locks."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"")
        for path in directory.rglob("*")
        if path.name != ".lock"
    }


def refused(capsys: pytest.CaptureFixture[str], script: Callable[[list[str]], int], argv: list[str]) -> str:
    """The one line with which it ends, with exit code 2 and without a change on disk."""
    before = files()
    capsys.readouterr()
    assert script(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert "Traceback" not in error and len(error) < 1000
    assert files() == before
    return error


def train_all(argv: list[str]) -> int:
    """The command."""
    return main(argv)


def refused_file(path: Path, *parts: object) -> None:
    """Opening it raises BadInput on one line that has all `parts` in it."""
    with pytest.raises(BadInput) as error:
        open_activations(str(path))[0]
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert str(part) in message, message
