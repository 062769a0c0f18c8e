"""Rows become the token ids of exactly these rows, in this order; what cannot be used is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Value, concatenate_datasets

from jax_sae.errors import BadInput
from jax_sae.language_model import text
from jax_sae.language_model.text import Stories, load_tokenizer, open_dataset, open_split, text_digest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE without merges: one token a byte, and <s>, </s> round a text if special tokens are added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 257), ("<s>", 256))
    tokenizer.enable_truncation(4)  # such settings in the file must not count
    tokenizer.enable_padding(length=4)
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def stories_of(
    texts: list[Any], tokenizer_directory: Path, max_tokens: int = 100, vocab_size: int = 258, exclude: int = 0
) -> Stories:
    """Texts as the rows of a dataset."""
    rows = Dataset.from_dict({"number": range(len(texts)), "text": texts})
    return Stories(rows, "text", load_tokenizer(str(tokenizer_directory)), max_tokens, vocab_size, exclude)


def test_stories_are_the_rows_asked_for_in_the_order_asked_for(tokenizer_directory: Path) -> None:
    """Whole, without special tokens, whatever the tokenizer's file says of cutting and padding."""
    texts = ["ab", "Once upon a time", "ä b\n", "x"]
    stories = stories_of(texts, tokenizer_directory)
    assert len(stories) == 4
    order = np.array([3, 1, 1, 0, 2])
    read = stories.read(order)
    decoded = [stories.tokenizer.decode(story.token_ids) for story in read]
    assert [text.encode() for text in decoded] == [texts[i].encode() for i in order]  # no special tokens, nothing cut
    assert [len(story.token_ids) for story in read] == [len(texts[i].encode()) for i in order]
    assert all(story.token_ids.dtype == np.int32 and story.tokens_cut == 0 for story in read)
    assert stories.read([]) == []


def test_what_is_too_long_is_cut_and_counted_without_a_word(
    tokenizer_directory: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing on the screen, nothing in the log."""
    with caplog.at_level(logging.WARNING, "transformers"):
        long, short = stories_of(["a" * 5000, "a" * 100], tokenizer_directory).read([0, 1])
    assert (len(long.token_ids), long.tokens_cut) == (100, 4900)
    assert (len(short.token_ids), short.tokens_cut) == (100, 0)
    assert not [record for record in caplog.records if "longer than" in record.getMessage()]
    assert capfd.readouterr() == ("", "")


def test_a_row_without_text_is_a_story_of_no_tokens(tokenizer_directory: Path) -> None:
    """Empty, white space only, or null."""
    read = stories_of(["", "a", " \n\t\u00a0", None], tokenizer_directory).read([0, 1, 2, 3])
    assert [len(story.token_ids) for story in read] == [0, 1, 0, 0]
    assert all(story.token_ids.dtype == np.int32 and story.tokens_cut == 0 for story in read)


def test_excluded_tokens_are_read_but_do_not_count(tokenizer_directory: Path) -> None:
    """Token ids stay whole, cut where they are too long; what is left is counted, and never less than nothing."""
    texts = ["abcdef", "abc", "ab", "", "a" * 120]
    read = stories_of(texts, tokenizer_directory, exclude=3).read(range(5))
    assert [len(story) for story in read] == [3, 0, 0, 0, 97]
    assert [story.tokens_excluded for story in read] == [3, 3, 2, 0, 3]
    for story, whole in zip(read, stories_of(texts, tokenizer_directory).read(range(5)), strict=True):
        assert np.array_equal(story.token_ids, whole.token_ids) and len(whole) == len(whole.token_ids)
        assert story.tokens_cut == whole.tokens_cut and whole.tokens_excluded == 0


@pytest.mark.parametrize(("k", "message"), [(-1, "is -1; 0 or more"), (100, "is 100, but a story has at most 100")])
def test_a_number_of_excluded_tokens_that_cannot_be_is_refused(tokenizer_directory: Path, k: int, message: str) -> None:
    """Less than none, or all of every story."""
    with pytest.raises(BadInput, match=message):
        stories_of(["a"], tokenizer_directory, exclude=k)


# The digest of a text

TEXTS = ["", "ab", "c", None, "ä\n", " ", "d" * 50, "", None]


def rows_of(texts: list[Any], kind: str = "string") -> Dataset:
    """Texts of an Arrow type."""
    return Dataset.from_dict({"number": range(len(texts)), "text": texts}).cast_column("text", Value(kind))


@pytest.mark.parametrize("n", [1, 2, 4, 100])
def test_a_texts_digest_is_of_the_texts_alone(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are divided, in memory and on disk, of both types for text, and wherever in a buffer they begin."""
    expected = text_digest(rows_of(TEXTS), "text")
    monkeypatch.setattr(text, "ROWS_HASHED_AT_A_TIME", n)
    assert text_digest(rows_of(TEXTS), "text") == expected
    assert text_digest(rows_of(TEXTS, "large_string"), "text") == expected
    assert text_digest(rows_of([t or "" for t in TEXTS]), "text") == expected  # as `Stories` reads null
    assert text_digest(rows_of(TEXTS).rename_column("text", "story"), "story") == expected
    pieces = concatenate_datasets([rows_of(TEXTS[:4]), rows_of(TEXTS[4:5]), rows_of(TEXTS[5:])])
    assert text_digest(pieces, "text") == expected
    longer = rows_of(["before", *TEXTS, "after"])
    assert text_digest(longer.select(range(1, 10)), "text") == expected  # part of a buffer
    shuffled = rows_of(TEXTS[::-1]).select(range(8, -1, -1))
    assert text_digest(shuffled, "text") == expected  # by way of indices
    rows_of(TEXTS).to_parquet(tmp_path / "x.parquet", batch_size=2)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    for name in ("x.parquet", "x.jsonl"):
        assert text_digest(open_split(str(tmp_path / name), "train", "text"), "text") == expected


def test_whatever_changes_a_text_changes_its_digest() -> None:
    """A character, its place, where a story ends, their order, and one story more or less, even an empty one."""
    others = [
        ["", "ab", "d", None, "ä\n", " ", "d" * 50, "", None],
        ["", "ba", "c", None, "ä\n", " ", "d" * 50, "", None],
        ["", "a", "bc", None, "ä\n", " ", "d" * 50, "", None],
        ["ab", "", "c", None, "ä\n", " ", "d" * 50, "", None],
        ["", "c", "ab", None, "ä\n", " ", "d" * 50, "", None],
        [*TEXTS, ""],
        TEXTS[1:],
        [],
    ]
    digests = {text_digest(rows_of(texts), "text") for texts in [TEXTS, *others]}
    assert len(digests) == 1 + len(others) and all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize("values", [[1, 2], [["a"]], [b"a"], [None, None]], ids=["numbers", "lists", "bytes", "nulls"])
def test_a_column_without_text_has_no_digest(values: list[Any]) -> None:
    """The message names its type."""
    with pytest.raises(BadInput, match=r"column 'text' is of the type .*; text was expected"):
        text_digest(Dataset.from_dict({"text": values}), "text")


def test_a_tokenizer_of_another_model_is_refused(tokenizer_directory: Path) -> None:
    """From the first id beyond the model's vocabulary."""
    largest = stories_of(["abc"], tokenizer_directory).read([0])[0].token_ids.max()
    with pytest.raises(BadInput, match=f"gives id {largest}, the model's vocabulary has {largest}: they do not belong"):
        stories_of(["abc"], tokenizer_directory, vocab_size=largest).read([0])
    stories_of(["abc"], tokenizer_directory, vocab_size=largest + 1).read([0])


def test_a_column_without_text_is_refused(tokenizer_directory: Path) -> None:
    """The message names column, row and what was found."""
    with pytest.raises(BadInput, match="column 'text', row 1: a int; text was expected"):
        stories_of([3, 4], tokenizer_directory).read([1])
    with pytest.raises(BadInput, match="column 'text', row 0: a list"):
        stories_of([["a"]], tokenizer_directory).read([0])


def write_split(path: Path, texts: list[str]) -> None:
    """A parquet file with two columns."""
    Dataset.from_dict({"text": texts, "number": range(len(texts))}).to_parquet(path)


def test_a_folder_of_parquet_files_has_its_splits_and_stays_on_disk(tmp_path: Path) -> None:
    """Missing splits and columns are refused with those that there are."""
    write_split(tmp_path / "train.parquet", ["a", "b", "c"])
    write_split(tmp_path / "validation.parquet", ["d"])
    assert list(open_dataset(str(tmp_path))) == ["train", "validation"]
    rows = open_split(str(tmp_path), "train", "text")
    assert rows["text"][:] == ["a", "b", "c"] and rows.cache_files  # mapped from a file, not held in memory
    with pytest.raises(BadInput, match="no split 'test'; there are 'train', 'validation'"):
        open_split(str(tmp_path), "test", "text")
    with pytest.raises(BadInput, match="no column 'story' in the split 'train'; there are 'text', 'number'"):
        open_split(str(tmp_path), "train", "story")


def test_single_files_are_the_split_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each format, by a relative or an absolute path."""
    write_split(tmp_path / "x.parquet", ["a", "b"])
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "x.csv").write_text("text\na\nb\n")
    (tmp_path / "x.txt").write_text("a\nb\n")
    monkeypatch.chdir(tmp_path)
    for name in ("x.parquet", "x.jsonl", "x.csv", str(tmp_path / "x.txt")):
        assert list(open_dataset(name)) == ["train"]
        assert open_split(name, "train", "text")["text"][:] == ["a", "b"], name


def test_what_is_no_dataset_is_refused_by_name(tmp_path: Path) -> None:
    """In one line, whatever the library says."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.parquet").write_bytes(b"PAR1, or so it says")
    for name in ("empty", "x.bin", "x.parquet"):
        message = "ends in .parquet" if name == "x.bin" else "cannot be loaded as a dataset"
        with pytest.raises(BadInput, match=f"{name}: .*{message}") as error:
            open_split(str(tmp_path / name), "train", "text")
        assert "\n" not in str(error.value)


def test_tokenizers_that_cannot_be_loaded_are_refused_by_name(tmp_path: Path) -> None:
    """Absent or damaged."""
    with pytest.raises(BadInput, match=f"{tmp_path}: no tokenizer; expected tokenizer.json, or vocab.json and"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=f"{tmp_path}: its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_code_in_a_tokenizers_folder_is_not_run(tmp_path: Path, tokenizer_directory: Path) -> None:
    """Else the library would ask on the terminal whether it may."""
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "evil.Tokenizer"]}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(BadInput, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))
