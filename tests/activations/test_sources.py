"""What a source says of itself: its activations without excluded tokens, how many there are, and what decides them."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from running import NO_CENTRES, REPOSITORY
from safetensors.numpy import load_file, save_file

from jax_sae.activations.batches import first_activations
from jax_sae.activations.normalize import estimate_dataset
from jax_sae.activations.sources import open_sources
from jax_sae.activations.store import write_store
from jax_sae.activations.story_sources import StorySource, model_digest
from jax_sae.config import ActivationsConfig, Config, Member, ModelConfig, TextConfig, TrainConfig
from jax_sae.errors import BadInput
from jax_sae.language_model.dataset import open_split
from jax_sae.language_model.pretrained import LanguageModel, load_language_model
from jax_sae.language_model.text import Stories
from jax_sae.language_model.torch_file import open_torch_file
from jax_sae.run.held_out import harvest_held_out, measure_held_out
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import complete
from jax_sae.sweep.update import init_sweep

MODEL = REPOSITORY / "jax_sae" / "demo" / "model"
BIN = REPOSITORY / "tests" / "data" / "gpt_neo_bin"
TEXTS = [f"{'Once upon a time there was a fox. ' * (i % 4)}It was {i} years old." for i in range(80)]
TEXTS[3] = ""
TEXTS[5] = "A"


@pytest.fixture(autouse=True)
def as_many_stories_are_counted_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests count fewer."""
    monkeypatch.setattr("jax_sae.language_model.text.STORIES_TO_COUNT", 256)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """The demo's language model, up to its embeddings: a token's activation does not depend on other tokens."""
    return load_language_model(str(MODEL), 0)


def source_of(
    lm: LanguageModel, texts: list[str], exclude: int = 0, params: Mapping[str, Any] | None = None
) -> StorySource:
    """All of these texts."""
    rows, config = Dataset.from_dict({"text": texts}), lm.model.architecture
    stories = Stories(rows, "text", lm.tokenizer, config.max_position_embeddings, config.vocab_size, exclude)
    return StorySource(stories, 0, len(texts), {"": lm if params is None else replace(lm, params=params)})


def n_tokens(lm: LanguageModel, texts: list[str]) -> list[int]:
    """The number of tokens of each text."""
    return [len(ids) for ids in lm.tokenizer(texts)["input_ids"]]


# Excluded tokens


@pytest.mark.parametrize("k", [0, 1, 3, 300])
def test_activations_are_those_of_whole_stories_without_the_first_tokens(k: int) -> None:
    """The language model still reads them: at layer 2, each token depends on those before it."""
    lm = load_language_model(str(MODEL), 2)
    stories = source_of(lm, TEXTS[:12], k).read(range(12))
    assert [len(story) for story in stories] == [max(0, n - k) for n in n_tokens(lm, TEXTS[:12])]
    found = dict(source_of(lm, TEXTS[:12], k).activations(stories))
    whole = lm.activations(TEXTS[:12])
    assert sorted(found) == [i for i in range(12) if len(whole[i]) > k]
    for i, x in found.items():
        np.testing.assert_allclose(x, whole[i][k:], rtol=0, atol=1e-4)


def test_first_tokens_of_giant_norm_change_nothing_once_they_are_excluded(lm: LanguageModel) -> None:
    """Neither the normalisation nor a held-out FVU, in any bit; both change by orders of magnitude while they count."""
    giant = np.array(lm.params["wpe"]["embedding"])
    giant[0] += 1e3 * np.random.default_rng(0).normal(size=giant.shape[1])
    params = {**lm.params, "wpe": {"embedding": jnp.asarray(giant)}}

    def estimate_and_fvu(exclude: int, params: Mapping[str, Any]) -> tuple[bytes, float, float]:
        source = source_of(lm, TEXTS, exclude, params)
        fitted = estimate_dataset(np.concatenate(first_activations(source, 500, shuffle_seed=0)))
        activations = ActivationsConfig(held_out_tokens=400, exclude_first_tokens=exclude)
        groups = make_groups((complete(Member(9)),))
        group = init_sweep(groups, source.width, TrainConfig(), NO_CENTRES)[0]
        held_out = harvest_held_out(source, fitted, activations)
        [(fvu, *_)] = measure_held_out(group, groups[0].form, held_out, held_out)
        return fitted.mean.tobytes(), float(fitted.scale), fvu

    assert estimate_and_fvu(1, params) == estimate_and_fvu(1, lm.params)
    (_, scale, fvu), (_, plain_scale, plain_fvu) = estimate_and_fvu(0, params), estimate_and_fvu(0, lm.params)
    assert scale < plain_scale / 20 and abs(fvu - plain_fvu) > 0.01 * plain_fvu


def test_tokens_over_the_norm_limit_are_left_out_of_the_held_out_set_and_counted(tmp_path: Path) -> None:
    """The same FVU as of rows that never had them."""
    x = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    few = np.arange(2725, 3000, 50)
    x[few] *= 1e4
    np.save(tmp_path / "x.npy", x)
    activations = ActivationsConfig(path=str(tmp_path / "x.npy"), norm_limit=100.0)
    _, held_out_source, _ = open_sources(Config(activations=activations, train=TrainConfig(batch_tokens=64)))
    fitted = estimate_dataset(x[:2700])
    [held_out] = harvest_held_out(held_out_source, fitted, activations)
    assert held_out.tokens_over_norm_limit == len(few) == 6
    assert np.array_equal(held_out.x, np.delete(x, few, axis=0)[2700:])
    [all_of_them] = harvest_held_out(held_out_source, fitted, replace(activations, norm_limit=0.0))
    assert all_of_them.tokens_over_norm_limit == 0 and np.array_equal(all_of_them.x, x[2700:])


@pytest.mark.parametrize("k", [-1, 512, 600])
def test_excluding_less_than_nothing_or_everything_is_refused(lm: LanguageModel, k: int) -> None:
    """The language model has 512 positions."""
    with pytest.raises(BadInput, match=f"the number of first tokens to exclude is {k}"):
        source_of(lm, TEXTS, k)
    assert len(source_of(lm, TEXTS, 511)) == 80


# How many tokens


@pytest.mark.parametrize("k", [0, 3])
def test_tokens_of_few_stories_are_counted(lm: LanguageModel, k: int) -> None:
    """Exactly, without those that are excluded; in part of a text, those of the part."""
    counts = [max(0, n - k) for n in n_tokens(lm, TEXTS)]
    assert source_of(lm, TEXTS, k).count_tokens() == (sum(counts), True)
    assert replace(source_of(lm, TEXTS, k), first=3, last=14).count_tokens() == (sum(counts[3:14]), True)
    assert source_of(lm, (TEXTS * 4)[:256], k).count_tokens() == (sum((counts * 4)[:256]), True)
    assert source_of(lm, []).count_tokens() == (0, True)


def test_tokens_of_many_stories_are_estimated_from_all_over_the_text(lm: LanguageModel) -> None:
    """Within 1 % where stories become longer and longer; the first 256 would give a quarter."""
    texts = ["a" + " fox" * (i // 10) for i in range(1000)]
    number, exact = source_of(lm, texts).count_tokens()
    assert not exact and number == pytest.approx(sum(n_tokens(lm, texts)), rel=0.01)
    assert source_of(lm, ["a fox"] * 257, 1).count_tokens() == (257 * (n_tokens(lm, ["a fox"])[0] - 1), False)


def config_of(texts: list[str], directory: Path, batch_tokens: int, **train: Any) -> Config:
    """A run on a text with a held-out split."""
    for split in ("train", "validation"):
        (directory / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Config(
        ModelConfig(str(MODEL), 0),
        TextConfig(str(directory)),
        ActivationsConfig(exclude_first_tokens=1),
        train=TrainConfig(batch_tokens=batch_tokens, **train),
    )


def test_a_batch_larger_than_the_text_is_refused(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one token; not where stories are the batches, and not on an estimate."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokens = sum(max(0, n - 1) for n in n_tokens(lm, TEXTS))
    assert tokens > 1000
    (tmp_path / "text").mkdir()
    with pytest.raises(BadInput, match=f"train.batch_tokens is {tokens + 1}, but the text has {tokens:,} tokens"):
        open_sources(config_of(TEXTS, tmp_path / "text", tokens + 1))
    source, held_out, _ = open_sources(config_of(TEXTS, tmp_path / "text", tokens))
    assert source.count_tokens() == held_out.count_tokens() == (tokens, True)
    open_sources(config_of(TEXTS, tmp_path / "text", tokens + 1, batching="story"))
    open_sources(config_of(TEXTS * 4, tmp_path / "text", 20 * tokens))
    empty, _, _ = open_sources(config_of([""] * 30, tmp_path / "text", 20))
    with pytest.raises(BadInput, match="is this the right text column"):  # which says more than a number of tokens
        first_activations(empty, 100, None)


def test_a_batch_larger_than_the_rows_is_refused(tmp_path: Path) -> None:
    """A tenth of the rows is held out and not counted."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32))
    config = Config(activations=ActivationsConfig(path=str(tmp_path / "x.npy")))
    with pytest.raises(BadInput, match=r"train.batch_tokens is 901, but the activations have 900 tokens to train on"):
        open_sources(replace(config, train=TrainConfig(batch_tokens=901)))
    training, held_out, _ = open_sources(replace(config, train=TrainConfig(batch_tokens=900)))
    assert (training.count_tokens(), held_out.count_tokens()) == ((900, True), (100, True))


# What decides the activations


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """The names of the digests that differ."""
    assert set(before) == set(after) and all(len(digest) == 64 for digest in [*before.values(), *after.values()])
    return {name for name in before if before[name] != after[name]}


def test_one_character_of_one_story_changes_the_digest_of_the_text(lm: LanguageModel) -> None:
    """And that of the tokenizer where its token ids are compared; nothing else does."""
    before = source_of(lm, TEXTS).digests()
    assert set(before) == {"language model", "text", "tokenizer"}
    for i, expected in [(70, {"text"}), (64, {"text"}), (63, {"text", "tokenizer"}), (0, {"text", "tokenizer"})]:
        texts = [text.replace("years", "yeers") if j == i else text for j, text in enumerate(TEXTS)]
        assert changed(before, source_of(lm, texts).digests()) == expected
    assert changed(before, source_of(lm, [*TEXTS, ""]).digests()) == {"text"}
    assert changed(before, source_of(lm, TEXTS, exclude=3).digests()) == set()  # that is a setting


def test_one_bit_of_one_parameter_changes_the_digest_of_the_language_model(lm: LanguageModel) -> None:
    """Its lowest; and so does another shape, or another name; their order does not."""
    before = source_of(lm, TEXTS).digests()
    wte, wpe = (np.array(lm.params[name]["embedding"]) for name in ("wte", "wpe"))
    wpe.view(np.uint32)[511, 63] ^= 1
    for params in (
        {"wte": {"embedding": wte}, "wpe": {"embedding": wpe}},
        {"wte": {"embedding": wte}, "wpe": {"embedding": np.array(lm.params["wpe"]["embedding"]).reshape(64, 512)}},
        {"wte": {"kernel": wte}, "wpe": lm.params["wpe"]},
    ):
        assert changed(before, source_of(lm, TEXTS, params=params).digests()) == {"language model"}
    for names in (["wpe", "wte"], ["wte", "wpe"]):
        params = {name: lm.params[name] for name in names}
        assert changed(before, source_of(lm, TEXTS, params=params).digests()) == set()


def test_the_same_parameters_run_otherwise_have_another_digest(tmp_path: Path, lm: LanguageModel) -> None:
    """The number of heads and the activation function stand in config.json alone."""
    before = source_of(lm, TEXTS).digests()["language model"]
    shutil.copytree(MODEL, tmp_path / "model")
    whole = json.loads((tmp_path / "model" / "config.json").read_text())
    for name, value in {"num_heads": 2, "activation_function": "relu", "window_size": 7}.items():
        (tmp_path / "model" / "config.json").write_text(json.dumps({**whole, name: value}))
        other = load_language_model(str(tmp_path / "model"), 0)
        assert source_of(other, TEXTS).digests()["language model"] != before


def test_another_tokenizer_changes_its_digest_alone(tmp_path: Path, lm: LanguageModel) -> None:
    """One that gives two tokens each other's ids."""
    shutil.copytree(MODEL, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["f"], vocabulary["o"] = vocabulary["o"], vocabulary["f"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(tokenizer))
    other = load_language_model(str(tmp_path / "model"), 0)
    assert changed(source_of(lm, TEXTS).digests(), source_of(other, TEXTS).digests()) == {"tokenizer"}


def test_paths_formats_and_chunks_change_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .bin as .safetensors elsewhere, a parquet file as JSON lines; with the same stories in each."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "model").mkdir()
    shutil.copy(BIN / "config.json", tmp_path / "model")
    tensors = open_torch_file(BIN / "pytorch_model.bin")
    assert isinstance(tensors, dict)
    weights = {name: np.ascontiguousarray(tensor.read()) for name, tensor in tensors.items() if "attn.bias" not in name}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert len(load_file(tmp_path / "model" / "model.safetensors")) > 50
    rows = Dataset.from_dict({"number": range(80), "text": TEXTS})
    rows.to_parquet(tmp_path / "x.parquet", batch_size=7)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def digests(model: Path, text: str) -> dict[str, str]:
        lm = load_language_model(str(model), 2)
        config = lm.model.architecture
        tokenizer = load_language_model(str(MODEL), 0).tokenizer
        stories = Stories(open_split(str(tmp_path / text), "train", "text"), "text", tokenizer, 96, 2048)
        assert config.max_position_embeddings == 96
        return StorySource(stories, 0, len(stories), {"": lm}).digests()

    assert digests(BIN, "x.parquet") == digests(tmp_path / "model", "x.jsonl")


def test_token_ids_give_the_activations_of_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every bit, with a model that has no tokenizer, padded or not; they are known by their ids."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(MODEL / name)
    tokenizer = load_language_model(str(MODEL), 0).tokenizer
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    T = max(map(len, ids))
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "text.parquet")
    Dataset.from_dict({"input_ids": ids}).save_to_disk(tmp_path / "ids")
    padded = {
        "input_ids": [[0] * (T - len(x)) + x for x in ids],
        "attention_mask": [[0] * (T - len(x)) + [1] * len(x) for x in ids],
    }
    Dataset.from_dict(padded).to_parquet(tmp_path / "padded.parquet")

    def opened(model: Path, text: str, column: str) -> tuple[list[bytes], dict[str, str]]:
        text_config = TextConfig(str(tmp_path / text), column=column)
        config = Config(ModelConfig(str(model), 2), text_config, train=TrainConfig(batch_tokens=64))
        training, held_out, _ = open_sources(config)
        return [
            x.tobytes() for source in (training, held_out) for x in first_activations(source, 10**6, 0)
        ], training.digests()

    expected, by_text = opened(MODEL, "text.parquet", "text")
    found, by_ids = opened(tmp_path / "model", "ids", "input_ids")
    assert found == expected and len(found) > 70
    assert changed(by_text, by_ids) == {"text"}
    assert opened(tmp_path / "model", "padded.parquet", "input_ids") == (found, by_ids)


def test_a_store_is_known_by_its_shards_and_a_file_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they lie and whatever else the manifest says; one bit of one row changes the digest."""
    monkeypatch.setattr("jax_sae.activations.store.SHARD_BYTES", 10 * 4 * 4)
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    other = x.copy()
    other.view(np.uint32)[33, 2] ^= 1
    for name, rows in [("a", x), ("b", x), ("other", other)]:
        write_store(tmp_path / f"store_{name}", np.split(rows, 4), model=name, layer=1)
        np.save(tmp_path / f"{name}.npy", rows)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store_b").rename(tmp_path / "elsewhere" / "store")
    (tmp_path / "b.npy").rename(tmp_path / "elsewhere" / "x.npy")

    def digests(path: str) -> dict[str, str]:
        activations = ActivationsConfig(path=str(tmp_path / path))
        training, held_out, _ = open_sources(Config(activations=activations, train=TrainConfig(batch_tokens=8)))
        assert training.digests() == held_out.digests()  # of all rows, whichever are held out
        return training.digests()

    assert set(digests("store_a")) == set(digests("a.npy")) == {"activations"}
    for same, changed_one in [
        (("store_a", "elsewhere/store"), "store_other"),
        (("a.npy", "elsewhere/x.npy"), "other.npy"),
    ]:
        assert digests(same[0]) == digests(same[1])
        assert changed(digests(same[0]), digests(changed_one)) == {"activations"}


def test_the_digest_of_a_gpt_neo_is_that_of_earlier_versions() -> None:
    """So that their runs go on; this is what version 0.4.0 said of the embedded model."""
    assert model_digest(load_language_model(str(MODEL), 2)) == (
        "8a5d6f574a1d1f935695f16a45f01af6d0fcc02a434cc67cff5ac652d533d013"
    )
