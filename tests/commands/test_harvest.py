"""`jax-sae harvest` writes what the language model computes, and a sweep can be trained on it."""

import json

import numpy as np
import pytest

from jax_sae.activations import store, text_to_store
from jax_sae.activations.array_sources import open_activations
from jax_sae.activations.store import read_manifest
from jax_sae.commands import harvest, train
from jax_sae.language_model.dataset import open_split
from jax_sae.language_model.pretrained import LanguageModel, load_language_model

MODEL = "jax_sae/demo/model"
STORIES = "jax_sae/demo/stories"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """The demo's, up to layer 2."""
    return load_language_model(MODEL, 2)


def arguments(out, *others):
    """A command line that reads the demo's validation stories."""
    model_and_text = ["--model", MODEL, "--text-path", STORIES, "--text-split", "validation"]
    return [*model_and_text, "--out", str(out), *map(str, others)]


@pytest.mark.parametrize("block_tokens", [1, 500, 65_536])
def test_rows_are_the_activations_of_the_stories_in_order(lm, block_tokens, tmp_path, monkeypatch, capsys):
    """Whatever is computed together, and in whichever shard it lies."""
    monkeypatch.setattr(text_to_store, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(text_to_store, "READ_AHEAD", 3)
    monkeypatch.setattr(store, "SHARD_BYTES", 100_000)
    assert harvest.main(arguments(tmp_path / "acts", "--tokens", 1500)) == 0
    stories, n_tokens = [], 0
    for text in open_split(STORIES, "validation", "text")["text"]:
        if n_tokens >= 1500:
            break
        stories += lm.activations([text])
        n_tokens += len(stories[-1])
    rows, manifest = open_activations(str(tmp_path / "acts"))[0], read_manifest(tmp_path / "acts")
    np.testing.assert_allclose(rows.read(0, len(rows)), np.concatenate(stories), rtol=1e-5, atol=1e-4)
    assert len(manifest["shards"]) > 1
    counts = {"stories": len(stories), "empty_stories": 0, "cut_stories": 0, "tokens_cut": 0, "tokens_excluded": 0}
    assert manifest["text_read"] == counts
    assert (manifest["model"], manifest["layer"], manifest["split"]) == (MODEL, 2, "validation")
    assert f"{n_tokens:,} rows of width 64 in float32" in capsys.readouterr().out


def test_memory_holds_a_few_stories_at_a_time(tmp_path, monkeypatch):
    """A block is computed and written before the next one is read."""
    monkeypatch.setattr(text_to_store, "BLOCK_TOKENS", 300)
    monkeypatch.setattr(text_to_store, "READ_AHEAD", 1)
    stories = LengthOnly([100] * 50)
    events = []

    def activations_of(token_ids):
        events.append(stories.n_read)
        return ((i, np.ones((len(ids), 2))) for i, ids in reversed(list(enumerate(token_ids))))

    text_to_store.write_text(tmp_path / "acts", stories, activations_of, None, model="a/b", layer=2)
    assert events == [*range(3, 50, 3), 50]


class LengthOnly:
    """Stands in for `Stories`; counts what is read."""

    max_tokens, exclude_first_tokens = 1000, 0

    def __init__(self, lengths):
        self.lengths, self.n_read = lengths, 0

    def __len__(self):
        return len(self.lengths)

    def count_tokens(self, first, last):
        return sum(self.lengths[first:last]), True

    def read(self, indices):
        self.n_read += len(indices)
        return [text_to_store.Story(np.zeros(self.lengths[i], np.int32), 0) for i in indices]


def test_stories_without_text_and_beyond_the_positions_are_counted(lm, tmp_path, capsys):
    texts = ["", "A fox.", "   ", "The sun was warm. " * 200, None]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in texts))
    text = ["--text-path", tmp_path / "texts.jsonl", "--text-split", "train", "--text-column", "story"]
    assert harvest.main(arguments(tmp_path / "acts", *text)) == 0
    n_tokens = [len(ids) for ids in lm.tokenizer(texts[1:4:2])["input_ids"]]
    assert n_tokens[1] > 512
    manifest = read_manifest(tmp_path / "acts")
    assert manifest["rows"] == n_tokens[0] + 512
    counts = {"stories": 5, "empty_stories": 3, "cut_stories": 1, "tokens_cut": n_tokens[1] - 512, "tokens_excluded": 0}
    assert manifest["text_read"] == counts and manifest["exclude_first_tokens"] == 0
    line = capsys.readouterr().out
    assert f"5 stories; 3 had no text, 1 were cut at 512 tokens ({n_tokens[1] - 512:,} tokens lost)" in line


def test_excluded_first_tokens_are_read_but_not_written(lm, tmp_path, monkeypatch, capsys):
    """In each story; those of no more tokens have none left, and --tokens counts what is written."""
    monkeypatch.setattr(text_to_store, "READ_AHEAD", 2)
    texts = [
        "Once upon a time there was a fox.",
        "A",
        "",
        "The sun was warm. " * 200,
        "Tom had a red ball.",
        "The end.",
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    n_tokens = [len(ids) for ids in lm.tokenizer(texts)["input_ids"]]
    assert n_tokens[1] <= 3 < min(n_tokens[i] for i in (0, 3, 4))
    out, text = tmp_path / "acts", ["--text-path", tmp_path / "texts.jsonl", "--text-split", "train"]
    tokens = n_tokens[0] - 3 + 512 - 3 + 1  # the fifth story's first token that is written
    assert harvest.main(arguments(out, *text, "--exclude-first-tokens", 3, "--tokens", tokens)) == 0
    whole = [lm.activations([lm.tokenizer(texts[i])["input_ids"][:512]])[0] for i in (0, 3, 4)]
    rows, manifest = open_activations(str(out))[0], read_manifest(out)
    expected = np.concatenate([x[3:] for x in whole])
    np.testing.assert_allclose(rows.read(0, len(rows)), expected, rtol=1e-5, atol=1e-4)
    assert manifest["exclude_first_tokens"] == 3
    excluded = 3 * 3 + n_tokens[1]
    assert manifest["text_read"] == {
        "stories": 5,
        "empty_stories": 2,
        "cut_stories": 1,
        "tokens_cut": n_tokens[3] - 512,
        "tokens_excluded": excluded,
    }
    line = capsys.readouterr().out
    assert "5 stories; 2 had no text beyond their first 3 tokens, 1 were cut at 512 tokens" in line
    assert line.endswith(f"; the first 3 tokens of each left out ({excluded} tokens)\n")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sweep_is_trained_on_what_was_written(tmp_path, dtype, monkeypatch, capsys):
    """In another process the language model would not be needed; here it must not be loaded."""
    assert harvest.main(arguments(tmp_path / "acts", "--tokens", 3000, "--dtype", dtype)) == 0
    assert read_manifest(tmp_path / "acts")["dtype"] == dtype
    monkeypatch.setattr("jax_sae.activations.sources.load_language_model", None)
    flags = ["--activations.path", str(tmp_path / "acts"), "--activations.block-tokens", "1024"]
    flags += ["--activations.held-out-tokens", "300", "--sweep.features", "8", "64", "--sweep.seeds", "0"]
    flags += ["--train.steps", "20", "--train.batch-tokens", "128", "--train.warmup", "0.1"]
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) >= 2
    assert "rows of width 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("others", "part"),
    [
        (["--layer", 5], "layer 5"),
        (["--tokens", 0], "the number of tokens to write is 0"),
        (["--tokens", -3], "the number of tokens to write is -3"),
        (["--exclude-first-tokens", -1], "the number of first tokens to exclude is -1"),
        (["--exclude-first-tokens", 512], "the number of first tokens to exclude is 512"),
        (["--model", "absent/absent"], "absent/absent"),
        (["--text-split", "test"], "no split 'test'"),
        (["--text-column", "story"], "no column 'story'"),
        (["--tokenizer", "absent/absent"], "absent/absent"),
    ],
)
def test_bad_input_is_told_in_one_line(others, part, tmp_path, capsys):
    assert harvest.main(arguments(tmp_path / "acts", *others)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_second_harvest_does_not_overwrite_the_first(tmp_path, capsys):
    assert harvest.main(arguments(tmp_path / "acts", "--tokens", 100)) == 0
    before = (tmp_path / "acts" / "manifest.json").read_bytes()
    assert harvest.main(arguments(tmp_path / "acts", "--tokens", 200)) == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "acts" / "manifest.json").read_bytes() == before
