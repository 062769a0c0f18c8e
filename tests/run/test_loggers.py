"""Runs in TensorBoard and in Weights & Biases: what a reader of theirs sees is what metrics.jsonl says."""

import importlib.util
import json
import shutil
import struct
import time
import zlib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_sae
from jax_sae.commands.train import main
from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.run.loggers import Histogram, Result, TensorBoard, WeightsAndBiases, density_histogram, silence

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is missing")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is missing")
X = np.random.default_rng(0).standard_normal((1500, 12)).astype(np.float32)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for a figure in tests is no picture, and no file is none."""
    monkeypatch.setattr("jax_sae.run.report.save_each", lambda figures: [])


def trained(out: Path, until: int = 12, **settings: Any) -> jax_sae.Run:
    """A run of 12 steps with a line every other one and checkpoints at 5, 10 and 12, stopped at one of its lines."""
    sweep = {"kinds": "topk", "features": [16, 24], "k": 4}
    train = {"steps": 12, "log_every": 2, "checkpoint_every": 5, "batch_tokens": 64}
    return jax_sae.train(
        activations=X,
        out=out,
        on_step=lambda step, line: step >= until,
        held_out_tokens=300,
        block_tokens=512,
        quiet=True,
        **sweep,
        **train,
        **settings,
    )


def seen(folder: Path) -> Any:
    """What TensorBoard's own reader makes of the event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


def lines_of(out: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_each_line_is_seen_once(out: Path) -> None:
    """Each step and value of each member's metrics, and no other."""
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    for member in lines[0]["members"]:
        events = seen(out / "tensorboard" / member)
        for metric in lines[0]["members"][member]:
            told = [(scalar.step, scalar.value) for scalar in events.Scalars(metric)]
            assert told == [(line["step"], np.float32(line["members"][member][metric])) for line in lines]


@needs_tensorboard
def test_a_resumed_run_goes_on_with_its_curves(tmp_path: Path, learning_nothing: None) -> None:
    """As after a kill in the middle of an event, some lines after a checkpoint: none is lacking, none stands twice."""
    out = tmp_path / "run"
    trained(out, until=10, tensorboard=True)
    shutil.rmtree(out / "checkpoints" / "10")  # so it goes on from 5, but 6, 8 and 10 have been told
    for folder in (out / "tensorboard").iterdir():
        (file,) = folder.iterdir()
        with open(file, "ab") as events:
            events.write(struct.pack("<QI", 100, 0) + b"\x0a\x7f")  # the head of an event, and of what is in it
    trained(out, resume=True, tensorboard=True)
    assert_each_line_is_seen_once(out)
    summary = json.loads((out / "summary.json").read_text())["members"][0]
    events = seen(out / "tensorboard" / summary["name"])
    assert [dead.step for dead in events.Scalars("dead_features")] == [5, 10, 12]
    assert [each.step for each in events.Histograms("tokens_since_fired")] == [5, 10, 12]
    (density,) = events.Histograms("held_out_density")
    assert density.histogram_value.num + summary["dead_features"] == 16
    assert events.Scalars("held_out_fvu")[0].value == pytest.approx(summary["fvu"])
    assert (
        summary["name"].encode() in seen(out / "tensorboard" / "all").Tensors("members")[0].tensor_proto.string_val[0]
    )


@needs_tensorboard
def test_what_a_logger_lacks_is_told_when_the_run_is_resumed(
    tmp_path: Path, learning_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not asked for before, or failed on a full disk: that is said once, and ends nothing."""
    out = tmp_path / "run"
    trained(out, until=4)
    with monkeypatch.context() as patched:
        append, left = TensorBoard._append, iter(range(7))

        def full(self: TensorBoard, folder: str, events: Sequence[Any]) -> None:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            append(self, folder, events)

        patched.setattr(TensorBoard, "_append", full)
        with pytest.warns(UserWarning, match="tensorboard failed .*No space left on device") as said:
            trained(out, until=10, resume=True, tensorboard=True)
    assert len(said) == 1 and [line["step"] for line in lines_of(out)] == [2, 4, 6, 8, 10]
    trained(out, resume=True, tensorboard=True)
    assert_each_line_is_seen_once(out)


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the command; exit code 2; no directory. So is one whose files would go nowhere."""
    a_folder, a_package = ModuleSpec("wandb", None), ModuleSpec("wandb", None, origin="wandb/__init__.py")
    monkeypatch.setattr("jax_sae.run.loggers.find_spec", lambda name: {"wandb": a_folder}.get(name))
    monkeypatch.setattr("jax_sae.run.train.open_sources", None)
    for name in ("tensorboard", "wandb"):
        assert main([f"--{name}", "--out", str(tmp_path / "run")]) == 2
        assert f"{name} is asked for, but is not installed; pip install 'jax_sae[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("jax_sae.run.loggers.find_spec", lambda name: a_package)
    with pytest.raises(BadInput, match="wandb is asked for, but the run has no directory"):
        jax_sae.train(activations=X, wandb=True)


def test_histograms_of_features() -> None:
    """A quarter of a decade a bin; silent features are in no bin of densities, and are dead after so many tokens."""
    edges, counts = density_histogram(np.array([0, 1, 10, 10, 1000]), 1000)
    assert edges[0] == -3 and edges[-1] == 0 and len(counts) == 12
    assert counts[0] == 1 and counts[4] == 2 and counts[-1] == 1 and counts.sum() == 4
    its = silence(np.array([0, 9, 99, 500]), 99)
    assert its.dead_features == 2 and its.tokens_since_fired.counts.sum() == 4


def picture(file: Path) -> Path:
    """A PNG of one red pixel."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\xff\0\0")),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(its)) + tag + its + struct.pack(">I", zlib.crc32(tag + its)) for tag, its in parts]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return file


def line(step: int) -> dict[str, Any]:
    """A line of metrics with two members, of which one has diverged."""
    return {"step": step, "tokens": 8 * step, "members": {"a": {"loss": 1 / step}, "b": {"loss": None}}}


def result(folder: Path) -> Result:
    """What a run of the member a comes to."""
    a = {"name": "a", "fvu": 0.25, "l0": 3.0, "dead_features": 1, "k": None}
    density = Histogram(np.array([-1.0, -0.5, 0.0]), np.array([2, 3]))
    return Result([a], {"a": density}, "member  FVU\na  0.25", [picture(folder / "frontier.png")])


@needs_tensorboard
def test_tensorboard_shows_the_frontier(tmp_path: Path) -> None:
    """And the closing table, and densities, at the last step."""
    logger = TensorBoard(tmp_path, Config())
    logger.begin(0, [], ["a", "b"])
    logger.write([line(1), line(2)])
    logger.end(3, result(tmp_path))
    ends, of_a, of_b = (seen(tmp_path / "tensorboard" / name) for name in ("all", "a", "b"))
    (frontier,) = ends.Images("frontier")
    assert (frontier.step, frontier.width, frontier.height) == (3, 1, 1)
    assert frontier.encoded_image_string == (tmp_path / "frontier.png").read_bytes()
    assert list(of_a.Histograms("held_out_density")[0].histogram_value.bucket)[-2:] == [2, 3]
    assert of_b.Tags()["scalars"] == []  # no number stands for one that is not finite


def rows_of(offline: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows in the file of an offline run: records in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = offline.glob("*.wandb")
    content, at, parts, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                its = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                rows.append((record.history.step.num, its))
    return rows


@pytest.mark.long
@needs_wandb
@pytest.mark.filterwarnings("default")
def test_weights_and_biases_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run with an id that stays, members as series; a resumed one is whole in its newest folder, each step once."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = WeightsAndBiases(tmp_path, Config())
    before.begin(0, [], ["a", "b"])
    before.write([line(1), line(2), line(3)])
    before.close()
    logger = WeightsAndBiases(tmp_path, Config())
    logger.begin(2, [line(1), line(2)], ["a", "b"])
    logger.write([line(3), line(4)])
    logger.silences(4, {"a": silence(np.array([0, 5, 9]), 9)})
    logger.end(5, result(tmp_path))
    logger.close()
    (offline,) = tmp_path.glob("wandb/offline-run-*")
    assert offline.name.endswith(json.loads((tmp_path / "wandb.json").read_text())["id"])
    for _ in range(300):  # its own process writes the file, and may do so after `close`
        if rows := rows_of(offline):
            break
        time.sleep(0.1)
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]
    assert [row["loss/a"] for _, row in rows[:4]] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert "loss/b" not in rows[0][1] and rows[0][1]["tokens"] == 8
    assert rows[3][1]["dead_features/a"] == 1
    last = rows[4][1]
    assert last["held_out_density/a/values"] == [2, 3] and last["frontier/_type"] == "image-file"
    assert last["members/nrows"] == 1
