"""Names, folders and files become the rows of their splits, whatever they are called, or are refused."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import open_dataset, open_split


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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


# Compressed files, and endings in any case

LINES = b'{"text": "a"}\n{"text": "b"}\n'
FILES = {
    "x.jsonl.gz": gzip.compress(LINES),
    "x.JSON.bz2": bz2.compress(LINES),
    "x.ndjson.xz": lzma.compress(LINES),
    "x.txt.gz": gzip.compress(b"a\nb\n"),
    "x.csv.gz": gzip.compress(b"n,text\n1,a\n2,b\n"),
    "x.tsv": b"text\tn\na\t1\nb\t2\n",
    "x.TSV.GZ": gzip.compress(b"text\tn\na\t1\nb\t2\n"),
    "stories.v2.jsonl": LINES,
}


@pytest.mark.parametrize("name", FILES)
def test_a_single_file_may_be_compressed_and_end_in_capitals(tmp_path: Path, name: str) -> None:
    """Commas are no separators in a .tsv."""
    (tmp_path / name).write_bytes(FILES[name])
    assert open_split(str(tmp_path / name), "train", "text")["text"][:] == ["a", "b"]


def test_a_parquet_file_may_end_in_capitals(tmp_path: Path) -> None:
    """As some systems write it."""
    write_split(tmp_path / "x.parquet", ["a", "b"])
    (tmp_path / "x.parquet").rename(tmp_path / "X.PARQUET")
    assert open_split(str(tmp_path / "X.PARQUET"), "train", "text")["text"][:] == ["a", "b"]


@pytest.mark.parametrize(("ending", "package"), [("zst", "zstandard"), ("lz4", "lz4")])
def test_a_compression_that_needs_a_package_is_read_or_names_it(tmp_path: Path, ending: str, package: str) -> None:
    """A file alone, and one in a folder."""
    codec = {"zst": "zstd"}.get(ending, ending)
    (tmp_path / f"x.jsonl.{ending}").write_bytes(pa.Codec(codec).compress(LINES, asbytes=True))
    for path in (tmp_path, tmp_path / f"x.jsonl.{ending}"):
        if codec in fsspec.available_compressions():
            assert open_split(str(path), "train", "text")["text"][:] == ["a", "b"]
            continue
        with pytest.raises(BadInput, match=f"pip install {package}`, or decompress the file"):
            open_dataset(str(path))


# Paths


@pytest.mark.parametrize(
    "name",
    ["proj[v2]", "a[1]", "[!x]", "a*b", "**", "q?x", "br{a,b}ace", "sp ace ", "ünï çö", "#x%20", "-x", "it's", "~"],
)
def test_paths_are_no_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Not of a folder, of a file, or of one in the working directory; no other folder is read that the pattern fits."""
    for other in ("projv", "a1", "x", "axb", "qqx", "deep/er"):
        (tmp_path / other).mkdir(parents=True)
        (tmp_path / other / "train.jsonl").write_text('{"text": "other"}\n')
        (tmp_path / f"{other}.jsonl").write_text('{"text": "other"}\n')
    folder = tmp_path / name
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(LINES)
    (folder / "validation.jsonl").write_text('{"text": "c"}\n')
    (tmp_path / f"{name}.jsonl").write_bytes(LINES)
    assert {s: rows["text"][:] for s, rows in open_dataset(str(folder)).items()} == {
        "train": ["a", "b"],
        "validation": ["c"],
    }
    for path in (folder / "train.jsonl", tmp_path / f"{name}.jsonl"):
        assert open_split(str(path), "train", "text")["text"][:] == ["a", "b"]
    monkeypatch.chdir(folder)
    assert open_split("train.jsonl", "train", "text")["text"][:] == ["a", "b"]


def test_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has a bracket."""
    home = tmp_path / "me[1]"
    home.mkdir()
    (home / "x.jsonl").write_bytes(LINES)
    monkeypatch.setenv("HOME", str(home))
    assert open_split("~/x.jsonl", "train", "text")["text"][:] == ["a", "b"]


def test_paths_that_mean_something_else_to_the_library_are_refused(tmp_path: Path) -> None:
    """Chains of file systems; and a folder with a list of configurations where that is looked up by a pattern."""
    (tmp_path / "a::b").mkdir()
    (tmp_path / "a::b" / "x.jsonl").write_bytes(LINES)
    for path in (tmp_path / "a::b", tmp_path / "a::b" / "x.jsonl"):
        with pytest.raises(BadInput, match=r"'::' and '://' in a path .*; rename it"):
            open_dataset(str(path))
    write_configurations(tmp_path / "a[1]")
    with pytest.raises(BadInput, match=r"README.md lists configurations, .*; rename the folder"):
        open_dataset(str(tmp_path / "a[1]"), "en")


# Configurations


def write_configurations(folder: Path) -> None:
    """A dataset of two languages."""
    folder.mkdir()
    for name, text in (("en", "a fox"), ("de", "ein Fuchs")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def test_a_configuration_is_chosen_by_its_name(tmp_path: Path) -> None:
    """Without one, or with an unknown one, those are listed that there are."""
    write_configurations(tmp_path / "x")
    path = str(tmp_path / "x")
    assert open_split(path, "train", "text", "en")["text"][:] == ["a fox"]
    assert open_split(path, "train", "text", "de")["text"][:] == ["ein Fuchs"]
    with pytest.raises(BadInput, match=r"has 2 configurations; there are 'en', 'de': name one of them by text.config"):
        open_dataset(path)
    with pytest.raises(BadInput, match=r"no configuration 'fr'; there are 'en', 'de': name one of them"):
        open_dataset(path, "fr")
    with pytest.raises(BadInput, match="a file has no configurations"):
        open_dataset(f"{path}/en.jsonl", "en")


# Columns


def test_an_entry_of_a_nested_column_is_named_by_a_dot(tmp_path: Path) -> None:
    """At any depth; a column that has a dot in its own name comes first; null rows have no text."""
    rows = [{"meta": {"text": "a", "more": {"text": "b"}}, "n.text": "c"}, {"meta": None, "n.text": "d"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "x.jsonl")
    for column, expected in {"meta.text": ["a", None], "meta.more.text": ["b", None], "n.text": ["c", "d"]}.items():
        assert open_split(path, "train", column)[column][:] == expected
    with pytest.raises(
        BadInput, match=r"no column 'meta.x' .*; there are 'meta.text', 'meta.more.text', 'n.text': name"
    ):
        open_split(path, "train", "meta.x")


# Folders that save_to_disk wrote


def test_what_save_to_disk_wrote_is_read_whatever_its_format(tmp_path: Path) -> None:
    """A dataset alone is the split 'train'; a format that needs a package which is missing does not matter."""
    train, test = Dataset.from_dict({"text": ["a", "b", "c"]}), Dataset.from_dict({"text": ["d"]})
    train.save_to_disk(tmp_path / "alone[1]", num_shards=2)
    state = tmp_path / "alone[1]" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_format_type": "torch"}))
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert open_split(str(tmp_path / "alone[1]"), "train", "text")["text"][:] == ["a", "b", "c"]
    assert {s: rows["text"][:] for s, rows in open_dataset(str(tmp_path / "both")).items()} == {
        "train": ["a", "b", "c"],
        "test": ["d"],
    }
    state.write_text(json.dumps({"_data_files": [{"filename": "../both/train/data-00000-of-00001.arrow"}]}))
    with pytest.raises(BadInput, match="should list the names of files beside it"):
        open_dataset(str(tmp_path / "alone[1]"))
    (tmp_path / "both" / "test" / "data-00000-of-00001.arrow").write_bytes(b"ARROW")
    with pytest.raises(BadInput, match="both/test: cannot be read as save_to_disk wrote it"):
        open_dataset(str(tmp_path / "both"))
