"""Rows become the token ids of exactly these rows, in this order; what cannot be used is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets

from jax_sae.errors import BadInput
from jax_sae.language_model import text_digest as digests
from jax_sae.language_model.dataset import open_split
from jax_sae.language_model.text import Stories, load_tokenizer, tokenizer_of
from jax_sae.language_model.text_digest import text_digest


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
    monkeypatch.setattr(digests, "ROWS_HASHED_AT_A_TIME", n)
    assert text_digest(rows_of(TEXTS), "text") == expected
    for kind in ("large_string", "string_view"):
        assert text_digest(rows_of(TEXTS, kind), "text") == expected
    categories = pa.array(TEXTS).dictionary_encode()
    assert text_digest(Dataset(pa.table({"text": categories})), "text") == expected
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
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.string_view())}), tmp_path / "view.parquet")  # as Polars writes
    pq.write_table(pa.table({"text": categories}), tmp_path / "categories.parquet")  # and pandas
    for name in ("x.parquet", "x.jsonl", "view.parquet", "categories.parquet"):
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


@pytest.mark.parametrize(
    "values", [[1, 2], [["a"]], [b"a"], [None, None], [[0.5]]], ids=["numbers", "lists", "bytes", "nulls", "vectors"]
)
def test_a_column_without_text_has_no_digest(values: list[Any]) -> None:
    """The message names its type."""
    with pytest.raises(BadInput, match=r"column 'text' is of the type .*; text was expected"):
        text_digest(Dataset.from_dict({"text": values}), "text")


# Token ids


def ids_of(ids: list[Any], mask: list[Any] | None = None, max_tokens: int = 5, exclude: int = 0) -> Stories:
    """Token ids as the rows of a dataset, for a model of 258 ids; without a tokenizer."""
    rows = Dataset.from_dict({"input_ids": ids} | ({"attention_mask": mask} if mask else {}))
    return Stories(rows, "input_ids", None, max_tokens, 258, exclude)


def test_token_ids_are_used_as_they_are() -> None:
    """Cut where they are too long, and excluded, as those of a text; an empty row or null is a story of no tokens."""
    read = ids_of([[3, 1], [], None, list(range(250, 258))], exclude=1).read([3, 0, 1, 2])
    assert [story.token_ids.tolist() for story in read] == [[250, 251, 252, 253, 254], [3, 1], [], []]
    assert [(story.tokens_cut, story.tokens_excluded) for story in read] == [(3, 1), (0, 1), (0, 0), (0, 0)]
    assert all(story.token_ids.dtype == np.int32 for story in read)


def test_padding_of_token_ids_is_left_out() -> None:
    """Left or right, where the attention mask is 0."""
    padded = ids_of([[0, 0, 3, 1], [7, 8, 0, 0]], mask=[[0, 0, 1, 1], [1, 1, 0, 0]])
    assert [story.token_ids.tolist() for story in padded.read([0, 1])] == [[3, 1], [7, 8]]
    assert text_digest(padded.rows, "input_ids") == text_digest(ids_of([[3, 1], [7, 8]]).rows, "input_ids")
    for mask in ([[0, 0, 1], [1, 1, 0, 0]], [[0, 0, 2, 1], [1, 1, 0, 0]]):
        with pytest.raises(BadInput, match="column 'attention_mask', row 0: 4 numbers, 0 or 1, were expected"):
            ids_of([[0, 0, 3, 1], [7, 8, 0, 0]], mask=mask).read([0])


@pytest.mark.parametrize("wrong", [-1, 258, None])
def test_a_token_id_beyond_the_vocabulary_is_refused(wrong: int | None) -> None:
    """Also where it would be cut."""
    with pytest.raises(BadInput, match=f"'input_ids', row 1: the token id {wrong}, but .* has the ids 0 to 257"):
        ids_of([[1], [1, 2, 3, 4, 5, 6, wrong]]).read([1])


@pytest.mark.parametrize("kind", ["int32", "int64", "uint16"])
@pytest.mark.parametrize("make", [List, LargeList], ids=["list", "large_list"])
def test_token_ids_have_a_digest_of_their_own(kind: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ids alone, whatever their type and wherever in a buffer they begin; it is not that of any text."""
    ids = [[3, 1], [], None, [7], list(range(20))]
    expected = text_digest(ids_of(ids).rows, "input_ids")
    monkeypatch.setattr(digests, "ROWS_HASHED_AT_A_TIME", 2)
    rows = ids_of([[9], *ids, [8]]).rows.cast(Features({"input_ids": make(Value(kind))})).select(range(1, 6))
    assert text_digest(rows, "input_ids") == expected
    others = [[[3], [1], None, [7], list(range(20))], [[3, 1], [], None, [7], list(range(1, 21))], [*ids, []], ids[:-1]]
    assert len({expected, *(text_digest(ids_of(other).rows, "input_ids") for other in others)}) == 5
    assert text_digest(ids_of([[], []]).rows.cast(Features({"input_ids": List(Value("int32"))})), "input_ids") != (
        text_digest(rows_of(["", ""]), "text")
    )


def test_token_ids_need_no_tokenizer_and_take_none(tokenizer_directory: Path) -> None:
    """A text takes the one that is given, else the model's own."""
    ids, texts = ids_of([[1]]).rows, rows_of(["a"])
    assert tokenizer_of(ids, "input_ids", "", lambda: pytest.fail("not needed")) is None
    with pytest.raises(BadInput, match="the column 'input_ids' holds token ids, which are used as they are; leave the"):
        tokenizer_of(ids, "input_ids", str(tokenizer_directory), lambda: None)
    assert tokenizer_of(texts, "text", "", lambda: "own") == "own"
    assert tokenizer_of(texts, "text", str(tokenizer_directory), lambda: "own")(["a"])


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
