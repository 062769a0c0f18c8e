"""A text that is streamed is read shard by shard: all of it once an epoch, from any position on, over a bad network."""

import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from datasets import Dataset
from processes import outcome
from running import REPOSITORY

from jax_sae.activations.order import in_order
from jax_sae.activations.position import Position
from jax_sae.activations.sources import open_sources
from jax_sae.activations.story_sources import StreamSource
from jax_sae.commands.train import main
from jax_sae.config import Config, ModelConfig, TextConfig
from jax_sae.errors import BadInput, SourceLost
from jax_sae.language_model.dataset import addresses
from jax_sae.language_model.stream import Shards, open_shards

MODEL = REPOSITORY / "jax_sae" / "demo" / "model"
ROWS = (20, 7, 33, 1, 16, 25, 12, 4)
"""Of each shard; the first buffer is of the first one, and held out."""


@pytest.fixture(autouse=True)
def _small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIECE_ROWS": 4, "BUFFER_ROWS": 16, "SECONDS_TO_WAIT": (0.0,) * 4}.items():
        monkeypatch.setattr(f"jax_sae.language_model.stream.{name}", value)
    monkeypatch.setattr("jax_sae.run.train.NORMALIZATION_TOKENS", 200)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("NO_PROXY", "*")


def text(shard: int, row: int) -> str:
    """Of a row."""
    return f"The fox number {row} of house {shard} met {'a cat and ' * (row % 3)}a dog."


def write(folder: Path, shard: int, texts: list[str]) -> None:
    """A shard."""
    with gzip.open(folder / f"part-{shard}.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"doc": {"text": each}}) + "\n" for each in texts)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards."""
    folder = tmp_path_factory.mktemp("corpus")
    for shard, rows in enumerate(ROWS):
        write(folder, shard, [text(shard, row) for row in range(rows)])
    return folder


def opened(path: str, seen: list[int] | None = None, **settings: Any) -> StreamSource:
    """The stream to train on; `seen` is told which shards are opened."""
    config = Config(ModelConfig(str(MODEL), 0), TextConfig(path, column="doc.text", streaming=True, **settings))
    source = cast(StreamSource, open_sources(config)[0])
    open_shard = source.shards.open_shard

    def telling(shard: int) -> Any:
        if seen is not None:
            seen.append(shard)
        return open_shard(shard)

    return replace(source, shards=replace(source.shards, open_shard=telling), _reading=[])


def texts_of(source: StreamSource, epoch: int, seed: int | None) -> list[str]:
    """Of an epoch, in its order."""
    items = [item for item, _ in in_order(source, Position(epoch=epoch), seed)]
    return [source.stories.tokenizer.decode(cast(Any, item).token_ids) for item in items]


def test_an_epoch_is_every_row_that_is_not_held_out_once_in_an_order_of_its_own(corpus: Path) -> None:
    """Without a seed in the order of the text."""
    source = opened(str(corpus))
    wanted = [text(shard, row) for shard, rows in enumerate(ROWS) for row in range(rows)][16:]
    assert texts_of(source, 0, None) == wanted
    epochs = [texts_of(source, 0, 1), texts_of(source, 1, 1), texts_of(source, 0, 2)]
    assert all(sorted(each) == sorted(wanted) for each in epochs)
    assert len({tuple(each) for each in [wanted, *epochs]}) == 4
    assert texts_of(source, 0, 1) == epochs[0]


def test_reading_goes_on_from_any_position_without_the_shards_before(corpus: Path) -> None:
    """In windows and whole; the same stories and positions follow, and only the shards that they are of are opened."""
    for settings in ({}, {"window": 8}):
        seen: list[int] = []
        source = opened(str(corpus), seen, **settings)
        order = source.shards.order(np.random.Generator(np.random.Philox(key=[5, 0])).permutation(len(ROWS)).tolist())
        found = list(in_order(source, Position(), 5))
        assert seen == order
        assert set(found[-1][1].shards) == set(source.shards.names)
        for i in range(5, len(found), 31):
            here = found[i][1]
            again = replace(source, _reading=[])
            seen.clear()
            rest = list(in_order(again, here, 5))
            assert [position for _, position in rest] == [position for _, position in found[i + 1 :]]
            assert [cast(Any, x).token_ids.tolist() for x, _ in rest] == [
                cast(Any, x).token_ids.tolist() for x, _ in found[i + 1 :]
            ]
            assert seen == order[here.shard :]
        seen.clear()
        reread = list(in_order(source, found[7][1], 5))
        for position in (found[9][1], found[12][1]):  # as blocks do, which begin where the one before ended
            next(in_order(source, position, 5))
        assert len(reread) == len(found) - 8


def test_a_shard_that_was_changed_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Whether it is being read or was read through; and one that has become shorter. Others are not looked at."""
    for shard, rows in enumerate(ROWS):
        write(tmp_path, shard, [text(shard, row) for row in range(rows)])
    found = list(in_order(opened(str(tmp_path)), Position(), None))
    within, end = found[30][1], found[-1][1]
    assert within.shard == 2 and within.row and within.item and end.item == 0
    write(tmp_path, 7, [text(7, row).replace("fox", "ox") for row in range(4)])
    assert len(list(in_order(opened(str(tmp_path)), within, None))) == len(found) - 31
    write(tmp_path, 2, [text(2, row).replace("fox", "ox") for row in range(33)])
    with pytest.raises(BadInput, match=r"part-2.jsonl.gz of .*: changed since it was read before, by its sha256"):
        list(in_order(opened(str(tmp_path)), within, None))
    with pytest.raises(BadInput, match=r"part-2.jsonl.gz of .*: changed since it was read before, by its sha256"):
        list(in_order(opened(str(tmp_path)), end.next_epoch(), None))
    write(tmp_path, 2, [text(2, 0)])
    with pytest.raises(BadInput, match=r"part-2.jsonl.gz of .* has 1 rows, but \d+ were read of it before"):
        list(in_order(opened(str(tmp_path)), within, None))


class Server(ThreadingHTTPServer):
    """Sends the shards of a folder; which it refuses, or breaks off in their middle, a test says."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        """Of a folder."""
        super().__init__(("127.0.0.1", 0), Shard)
        self.folder, self.asked = folder, list[str]()
        self.refused, self.broken = dict[str, int](), dict[str, int]()

    @property
    def address(self) -> str:
        """Of all shards."""
        return f"http://127.0.0.1:{self.server_port}/data/part-{{0..7}}.jsonl.gz?signature={self.server_port}"


class Shard(BaseHTTPRequestHandler):
    """One request to a `Server`."""

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        """Send a shard, or fail."""
        server = cast(Server, self.server)
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self.command == "GET":
            server.asked.append(name)
        content = (server.folder / name).read_bytes()
        refused, broken = server.refused.get(name, 0), server.broken.get(name, 0)
        if refused:
            server.refused[name] -= 1
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            if broken:
                server.broken[name] -= 1
            self.wfile.write(content[: len(content) // 2] if broken else content)

    do_HEAD = do_GET


@pytest.fixture
def server(corpus: Path) -> Iterator[Server]:
    """Of the corpus."""
    with Server(corpus) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


@pytest.mark.long
def test_what_a_network_loses_is_asked_for_again(server: Server, corpus: Path) -> None:
    """A refusal and a broken connection change nothing; a shard that stays away is named. Others are not opened."""
    expected = texts_of(opened(str(corpus)), 0, None)
    server.broken, server.refused = {"part-2.jsonl.gz": 2}, {"part-4.jsonl.gz": 2}
    assert texts_of(opened(server.address), 0, None) == expected
    assert not server.broken["part-2.jsonl.gz"] and not server.refused["part-4.jsonl.gz"]
    server.refused = {"part-1.jsonl.gz": 10**6}
    server.asked.clear()
    source = opened(server.address)
    assert set(server.asked) == {"part-0.jsonl.gz"}  # nothing else is needed to begin
    with pytest.raises(SourceLost, match=r"part-1.jsonl.gz of http://.* could not be read, tried 5 times \("):
        list(in_order(source, Position(), None))


def flags(path: str, out: Path, **more: str) -> list[str]:
    """The command line of a small run on a stream."""
    settings = {
        "model.path": str(MODEL),
        "model.layer": "0",
        "text.path": path,
        "text.column": "doc.text",
        "sweep.features": "8",
        "train.steps": "40",
        "train.checkpoint-every": "100",
        "train.log-every": "1",
        "train.batch-tokens": "64",
        "activations.block-tokens": "256",
        "activations.held-out-tokens": "200",
        **more,
    }
    return [
        "--text.streaming",
        "--out",
        str(out),
        *(word for name in settings for word in (f"--{name}", settings[name])),
    ]


@pytest.mark.long
def test_a_run_that_loses_its_text_is_saved_and_goes_on_bit_for_bit(
    server: Server, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shards are a server's, which goes away and comes back; a run from a folder ends in the same bits."""
    straight, lost = tmp_path / "straight", tmp_path / "lost"
    assert main(flags(str(corpus), straight)) == 0
    said = capsys.readouterr().out
    assert "8 shards, streamed" in said and "held out      the first 16 stories of the split 'train'" in said
    assert "tokens        2,560 needed; how many there are is not known" in said
    end = outcome(straight)
    assert end["position"]["epoch"] == 1
    order = [f"part-{i}.jsonl.gz" for i in np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(ROWS))]
    server.refused = {order[-2]: 10**6}
    assert main(flags(server.address, lost)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {order[-2]} of http://" in error and "tried 5 times" in error
    step = outcome(lost)["step"]
    assert 0 < step < 40 and f"saved at step {step}: go on with --out {lost} --resume" in error
    server.refused = {}
    server.asked.clear()
    assert main([*flags(server.address, lost), "--resume"]) == 0
    assert outcome(lost) == end
    at_first = server.asked[: server.asked.index(order[-2])]
    assert not set(order[:3]) & set(at_first) - {"part-0.jsonl.gz"}  # which is read for what is held out


def test_a_streamed_run_refuses_other_shards_and_too_few_stories(corpus: Path, tmp_path: Path) -> None:
    """Names in another order, or no story left to train on; a held-out split is used where there is one."""
    few = tmp_path / "few"
    few.mkdir()
    write(few, 0, [text(0, row) for row in range(16)])
    with pytest.raises(BadInput, match=r"has 16 stories in all, which a stream holds out; leave text.streaming out"):
        opened(str(few))
    with pytest.raises(BadInput, match=r"no column 'text' in part-0.jsonl.gz; there are 'doc.text': name one of them"):
        open_sources(Config(ModelConfig(str(MODEL), 0), TextConfig(str(corpus), streaming=True)))
    both = tmp_path / "both"
    both.mkdir()
    for split, rows in {"train": 3, "validation": 2}.items():
        Dataset.from_dict({"doc": [{"text": text(0, row)} for row in range(rows)]}).to_parquet(
            both / f"{split}.parquet"
        )
    config = Config(ModelConfig(str(MODEL), 0), TextConfig(str(both), column="doc.text", streaming=True))
    training, held_out, _ = open_sources(config)
    assert len(texts_of(cast(StreamSource, training), 0, None)) == 3 and len(held_out) == 2
    one, other = opened(str(corpus)).digests(), opened(str(corpus)).digests()
    assert one == other
    fewer = replace(opened(str(corpus)), shards=open_shards(str(few), "doc.text")["train"]).digests()
    assert {name for name in one if one[name] != fewer[name]} == {"text"}


def test_an_address_may_stand_for_several() -> None:
    """By numbers, with zeros before them, or by names."""
    assert addresses("https://a/{00..02}.gz") == [f"https://a/0{i}.gz" for i in range(3)]
    assert addresses("s3://{a,b}/{8..10}") == [f"s3://{name}/{i}" for name in "ab" for i in (8, 9, 10)]
    assert addresses("https://a/x.gz?y={z}") == ["https://a/x.gz?y={z}"]
    assert Shards("p", "train", ("a", "b", "c"), "text", False, cast(Any, None), (1, 5)).order([2, 0, 1]) == [2, 1]
