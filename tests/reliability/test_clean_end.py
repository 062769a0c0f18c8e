"""A run leaves nothing behind but its results; one process at a time; and what it reads must stay what it was."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from processes import finish, start
from running import REPOSITORY, never, stop_at

from jax_sae.activations.interruptible import Stopped
from jax_sae.activations.store import write_store
from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.run.lock import locked
from jax_sae.run.train import train

CACHE_SETTINGS = [
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
]

THREADS = """
import sys, threading
from jax_sae.commands.train import main
before = set(threading.enumerate())
code = main(sys.argv[1:])
left = [thread.name for thread in threading.enumerate() if thread not in before]
assert not left, left
sys.exit(code)
"""


@pytest.mark.long
def test_no_threads_and_no_temporary_files_are_left(beginnings: str, tmp_path: Path) -> None:
    """Of a whole run in a process of its own: nothing is running at its end, and nothing lies beside its results.

    Its compiled programs are kept below the cache directory, where nothing says where.
    """
    (tmp_path / "temporary").mkdir()
    flags = ["--train.steps", "6", "--train.batch-tokens", "32", "--activations.block-tokens", "256", "--out", "run"]
    flags += ["--activations.held-out-tokens", "500", "--train.checkpoint-every", "2", "--sweep.features", "4"]
    # Stories of few lengths, for each of which the language model is compiled.
    flags += ["--text.path", beginnings, "--model.path", str(REPOSITORY / "jax_sae" / "demo" / "model")]
    kept = {name: value for name, value in os.environ.items() if name not in CACHE_SETTINGS}
    process = subprocess.Popen(
        [sys.executable, "-c", THREADS, *flags],
        cwd=tmp_path,
        env={**kept, "TMPDIR": str(tmp_path / "temporary"), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    finish(process, 0)
    assert not any((tmp_path / "temporary").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "cache", "run"}
    expected = {"config.json", "metrics.jsonl", "summary.json", "figures", "checkpoints", ".lock"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"2", "4", "6"}
    programs = {path.name.split("-")[0] for path in (tmp_path / "cache" / "jax_sae" / "compiled").glob("*/*-cache")}
    assert {"jit__update_many", "jit_read_places"} <= programs


@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    """It changes nothing; once the first is killed, the directory is free."""
    flags = ["--train.steps", "100000", "--train.batch-tokens", "64", "--activations.block-tokens", "4096"]
    flags += ["--train.checkpoint-every", "50", "--activations.held-out-tokens", "500", "--sweep.features", "8"]
    flags += ["--out", "run"]
    first = start(flags, tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/50")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    second = finish(start([*flags, "--resume"], tmp_path), 2)
    assert "error: run is in use: another process is training there" in second
    assert first.poll() is None
    first.kill()
    first.communicate()
    with locked(tmp_path / "run"):
        pass


@pytest.mark.long
def test_two_that_begin_at_once_do_not_share_a_directory(demo_config: Config, tmp_path: Path) -> None:
    """The directory was free when the second began; when it wants to write there, it is not."""
    out = tmp_path / "run"
    with locked(out), pytest.raises(BadInput, match="is in use"):
        train(demo_config, out, resume=False, stop_requested=never)
    (out / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="already holds a run"):
        train(demo_config, out, resume=False, stop_requested=never)
    assert {path.name for path in out.iterdir()} == {".lock", "config.json"}


def test_a_stop_while_the_first_activations_are_made_ends_at_once(demo_config: Config, tmp_path: Path) -> None:
    """Nothing is trained, nothing is saved, no directory is made."""
    with pytest.raises(Stopped):
        train(demo_config, tmp_path / "run", resume=False, stop_requested=lambda done: True)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("learning_nothing")
def test_a_stop_while_the_held_out_stories_are_read_leaves_a_run_to_resume(demo_config: Config, tmp_path: Path) -> None:
    """They are read after the last step, whose checkpoint is there; resumed, only the summary is made."""
    out = tmp_path / "run"
    asked: list[int] = []

    def stop(done: int) -> bool:
        asked.append(done)
        return asked.count(12) > 3

    assert not train(demo_config, out, resume=False, stop_requested=stop)
    assert sorted(int(path.name) for path in (out / "checkpoints").iterdir()) == [5, 10, 12]
    assert not (out / "summary.json").exists()
    assert train(demo_config, out, resume=True, stop_requested=never)
    assert (out / "summary.json").exists()


@pytest.mark.usefixtures("learning_nothing")
def test_a_stop_while_a_block_is_made_saves_what_there_is(demo_config: Config, tmp_path: Path) -> None:
    """Half way through the harvest of the fifth block; resumed, it is as if nothing had been."""
    config = replace(demo_config, train=replace(demo_config.train, log_every=6))
    asked: list[int] = []

    def stop(done: int) -> bool:
        asked.append(done)
        return asked.count(6) > 2

    out = tmp_path / "run"
    assert not train(config, out, resume=False, stop_requested=stop)
    assert sorted(int(path.name) for path in (out / "checkpoints").iterdir()) == [5, 6]
    assert train(config, out, resume=True, stop_requested=never)


@pytest.fixture
def inputs(demo_config: Config, tmp_path: Path) -> Config:
    """The small demo on a copy of its model and its stories."""
    shutil.copytree(REPOSITORY / "jax_sae" / "demo" / "model", tmp_path / "model")
    shutil.copytree(demo_config.text.path, tmp_path / "stories")
    return replace(
        demo_config,
        model=replace(demo_config.model, path=str(tmp_path / "model")),
        text=replace(demo_config.text, path=str(tmp_path / "stories")),
    )


def flip(path: Path, byte: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("learning_nothing")
def test_a_bit_of_the_language_model_that_changed_is_noticed_on_resume(inputs: Config, tmp_path: Path) -> None:
    """A directory of weights has no digests of its own; the run keeps one. Moved unchanged, it is the same."""
    out = tmp_path / "run"
    assert not train(inputs, out, resume=False, stop_requested=stop_at(6))
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = replace(inputs, model=replace(inputs.model, path=str(tmp_path / "moved")))
    assert not train(moved, out, resume=True, stop_requested=stop_at(8))
    (weights,) = [path for path in (tmp_path / "moved").iterdir() if path.suffix == ".safetensors"]
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    flip(weights, 8 + header + 4 * 1000)
    with pytest.raises(BadInput, match="began with another language model: the sha256 of what is read now differs"):
        train(moved, out, resume=True, stop_requested=never)


@pytest.mark.usefixtures("learning_nothing")
def test_another_text_is_noticed_on_resume(inputs: Config, tmp_path: Path) -> None:
    """One character of one story, of the training text or of the held-out one."""
    from datasets import Dataset, load_dataset

    out = tmp_path / "run"
    assert not train(inputs, out, resume=False, stop_requested=stop_at(6))
    for split, name in (("train", "text"), ("validation", "held-out text")):
        stories = {each: load_dataset(inputs.text.path)[each].to_list() for each in ("train", "validation")}
        stories[split][40]["text"] = stories[split][40]["text"][:-1] + "?"
        other = tmp_path / f"other-{split}"
        other.mkdir()
        for each, rows in stories.items():
            Dataset.from_list(rows).to_parquet(other / f"{each}-00000-of-00001.parquet")
        changed = replace(inputs, text=replace(inputs.text, path=str(other)))
        with pytest.raises(BadInput, match=f"began with another {name}: the sha256"):
            train(changed, out, resume=True, stop_requested=never)


@pytest.mark.long
@pytest.mark.usefixtures("learning_nothing")
def test_a_damaged_store_is_refused_and_a_store_written_again_is_noticed(demo_config: Config, tmp_path: Path) -> None:
    """Its manifest's digests hold for its shards; the run's digest holds for the manifest."""
    chance = np.random.default_rng(0)
    for name in ("store", "other"):
        write_store(tmp_path / name, [chance.normal(size=(1000, 16)).astype(np.float32)], model="none", layer=0)
    config = replace(demo_config, activations=replace(demo_config.activations, path=str(tmp_path / "store")))
    out = tmp_path / "run"
    assert not train(config, out, resume=False, stop_requested=stop_at(6))
    other = replace(config, activations=replace(config.activations, path=str(tmp_path / "other")))
    with pytest.raises(BadInput, match="began with another activations"):
        train(other, out, resume=True, stop_requested=never)
    flip(tmp_path / "store" / "shard-00000.npy", 5000)
    with pytest.raises(BadInput, match=r"shard-00000.npy is damaged: its sha256"):
        train(config, out, resume=True, stop_requested=never)
