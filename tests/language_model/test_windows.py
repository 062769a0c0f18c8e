"""Documents become stories without a token lost, each token beside those of its own document alone."""

import json
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from running import REPOSITORY

import jax_sae
from jax_sae.activations.order import in_order, stories_in_order
from jax_sae.activations.position import Position
from jax_sae.activations.story_sources import StorySource
from jax_sae.commands import harvest
from jax_sae.commands.harvest import harvest_to_store
from jax_sae.commands.train import main
from jax_sae.errors import BadInput
from jax_sae.language_model.pretrained import load_language_model
from jax_sae.language_model.text import Stories, beginning, load_tokenizer, tokenizer_of
from jax_sae.language_model.text_digest import text_digest
from jax_sae.language_model.windows import Story, Windows
from jax_sae.run.directory import read_config

BOS, EOS = 256, 257
TEMPLATE = "{{ bos_token }}{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
TEMPLATE += "[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def tokenizer_with_bos(directory: Path, adds_bos: bool = True, template: str | None = TEMPLATE) -> Any:
    """Of bytes, with <s> and </s>, of which it puts the first before a text, as those of Llama and Gemma do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return load_tokenizer(str(directory))


def unpacked(story: Story) -> list[list[int]]:
    """The token ids of each document that a story is shared by."""
    segments = np.zeros(len(story.token_ids), int) if story.segments is None else story.segments
    return [story.token_ids[segments == n].tolist() for n in dict.fromkeys(segments.tolist())]


def joined(parts: Iterable[list[int]]) -> list[int]:
    """Side by side."""
    return list(chain.from_iterable(parts))


documents = st.lists(st.lists(st.integers(0, 255), max_size=30), max_size=8)
ways = st.builds(
    Windows,
    length=st.integers(4, 9),
    exclude_first_tokens=st.integers(0, 2),
    cut=st.just(True),
    pack=st.booleans(),
    bos=st.sampled_from([None, BOS]),
    eos=st.sampled_from([None, EOS]),
)


@given(documents, ways)
def test_windows_side_by_side_are_the_documents(given: list[list[int]], way: Windows) -> None:
    """Every token once and in order, BOS before each part and EOS behind each document, and no window too long.

    The parts of packed windows are the windows that are there without packing; two that follow each other would not fit
    into one. What is used is all but the first tokens of each part. One may begin at any of them.
    """
    begin = [] if way.bos is None else [way.bos]
    end = [] if way.eos is None else [way.eos]
    k = way.exclude_first_tokens
    alone = [story for document in given for story, _ in way.stories(document)]
    in_windows = [story.token_ids.tolist() for story in alone if len(story.token_ids)]
    assert joined(ids[len(begin) :] for ids in in_windows) == joined(d + end for d in given if d)
    assert all(ids[: len(begin)] == begin and len(begin) < len(ids) <= way.length for ids in in_windows)
    made = list(way.items(given))
    stories = [story for story, *_ in made]
    parts = [part for story in stories if len(story) for part in unpacked(story)]
    assert parts == [story.token_ids.tolist() for story in alone if len(story)]
    assert len(alone) == len(parts) + sum(len(story) == 0 for _, passed, *_ in made for story in passed) + sum(
        len(story) == 0 for story in stories
    )
    for story in stories:
        used = story.token_ids[story.used].tolist()
        assert used == joined(part[k:] for part in unpacked(story)) and len(used) == len(story)
    if way.pack:
        full = [s for s in stories if len(s)]
        assert all(len(a.token_ids) + len(unpacked(b)[0]) > way.length for a, b in pairwise(full))
    for i, (_, _, used_up, offset) in enumerate(made):
        again = list(way.items(given[used_up:], offset))
        assert [s.token_ids.tolist() for s, *_ in again] == [s.token_ids.tolist() for s in stories[i + 1 :]]


def stories_of(rows: Dataset, tokenizer: Any, **how: Any) -> Stories:
    """For a model of 20 positions."""
    return Stories(rows, rows.column_names[0], tokenizer, 20, 258, **how)


def test_positions_count_what_windows_leave_out_and_go_on_from_each(tmp_path: Path) -> None:
    """Rows in any order, packed or not: the same counts, and after each position what came after it."""
    texts = ["a" * 50, "", "bb", " ", "c" * 9, "d", "e" * 20, ""]
    rows = Dataset.from_dict({"text": texts})
    order = np.array([3, 0, 5, 1, 2, 4, 7, 6])
    for pack in (False, True):
        stories = stories_of(rows, tokenizer_with_bos(tmp_path), exclude_first_tokens=1, window=8, pack=pack, bos=BOS)
        found = list(stories_in_order(stories, order, Position()))
        assert sum(len(item) for item, _ in found) == sum(len(text.strip()) for text in texts)
        end = found[-1][1]
        windows = sum(-(-len(text.strip()) // 7) for text in texts)
        assert (end.item, end.empty_stories, end.tokens_excluded, end.tokens_cut) == (8, 3, windows, 0)
        for i, (_, position) in enumerate(found):
            rest = list(stories_in_order(stories, order, position))
            assert [after for _, after in rest] == [after for _, after in found[i + 1 :]]


def test_stories_begin_with_bos_where_the_tokenizer_begins_so(tmp_path: Path) -> None:
    """Or where it is said; not twice, and not where there is no text. Token ids begin as they are."""
    adds, has = tokenizer_with_bos(tmp_path / "adds"), tokenizer_with_bos(tmp_path / "has", adds_bos=False)
    assert [beginning(adds, "auto"), beginning(has, "auto"), beginning(None, "auto")] == [BOS, None, None]
    assert [beginning(has, "on"), beginning(adds, "off")] == [BOS, None]
    with pytest.raises(BadInput, match="prepend_bos is 'on', but the column holds token ids"):
        beginning(None, "on")
    has.bos_token = None
    with pytest.raises(BadInput, match="prepend_bos is 'on', but the tokenizer has no BOS token"):
        beginning(has, "on")
    rows = Dataset.from_dict({"text": ["ab", "<s>ab", "", "x" * 30]})
    read = stories_of(rows, adds, bos=BOS).read(range(4))
    assert [story.token_ids[:1].tolist() for story in read] == [[BOS], [BOS], [], [BOS]]
    assert [(len(story.token_ids), story.tokens_cut) for story in read] == [(3, 0), (3, 0), (0, 0), (20, 11)]


def test_chats_are_rendered_by_the_tokenizers_template(tmp_path: Path) -> None:
    """With the BOS token of the template, once; the rows' digest is of what was said."""
    tokenizer = tokenizer_with_bos(tmp_path / "chat")
    said = [[{"role": "user", "content": "hi"}, {"role": "model", "content": "ho"}], [], None]
    rows = Dataset.from_dict({"messages": said})
    assert tokenizer_of(rows, "messages", "", lambda: tokenizer) is tokenizer
    read = stories_of(rows, tokenizer, bos=BOS).read([0, 1, 2])
    assert tokenizer.decode(read[0].token_ids) == "<s>[user]hi[model]ho"
    assert [len(story) for story in read[1:]] == [0, 0]
    assert text_digest(rows, "messages") != text_digest(Dataset.from_dict({"messages": said[:1]}), "messages")
    with pytest.raises(BadInput, match="the tokenizer has no chat template; name the tokenizer of a chat model"):
        tokenizer_of(rows, "messages", "", lambda: tokenizer_with_bos(tmp_path / "plain", template=None))
    for message, expected in (
        ({"role": "nobody", "content": "hi"}, r"'messages', row 0: .* template does not take these .*who\?"),
        ({"from": "user", "value": "hi"}, r"'messages', row 0: a message with 'from', 'value'; 'role' and 'content'"),
    ):
        with pytest.raises(BadInput, match=expected):
            stories_of(Dataset.from_dict({"messages": [[message]]}), tokenizer).read([0])


def test_a_run_in_windows_with_bos_leaves_their_first_tokens_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By itself, and says so; the run and what is loaded of it remember that. Its command resumes it."""
    tokenizer_with_bos(tmp_path / "tokenizer")
    Dataset.from_dict({"text": [f"{'A long story of a fox. ' * (i % 9)}{i}" for i in range(40)]}).to_parquet(
        tmp_path / "text.parquet"
    )
    (tmp_path / "run.toml").write_text(
        f"""
        model = {{path = "{REPOSITORY / "jax_sae/demo/model"}", layer = 0}}
        text = {{path = "{tmp_path / "text.parquet"}", tokenizer = "{tmp_path / "tokenizer"}", window = 32}}
        activations = {{block_tokens = 128, held_out_tokens = 100}}
        sweep = {{features = 8}}
        train = {{batch_tokens = 32, checkpoint_every = 2}}
        """
    )
    words = ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")]
    assert main([*words, "--train.steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "windows       rows are cut into windows of 32 tokens, each then a story" in said
    assert "beginnings    each story begins with <s>, which is not trained on" in said
    assert read_config(tmp_path / "run").activations.exclude_first_tokens == 1
    assert main([*words, "--train.steps", "4", "--resume"]) == 0
    assert jax_sae.load_autoencoder(tmp_path / "run").exclude_first_tokens == 1
    capsys.readouterr()
    assert main([*words, "--train.steps", "6", "--resume", "--text.window", "16"]) == 2
    assert "text.window 32 -> 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"window": 21}, "text.window is 21, but the language model has 20 positions"),
        ({"window": 1, "bos": BOS}, "text.window is 1, which the BOS token alone would fill"),
        ({"window": 5, "exclude_first_tokens": 5}, "first tokens to exclude is 5, but a story has at most 5 tokens"),
    ],
)
def test_windows_that_cannot_be_are_refused(how: dict[str, Any], message: str) -> None:
    """Longer than the positions, or with room for nothing."""
    with pytest.raises(BadInput, match=message):
        stories_of(Dataset.from_dict({"text": ["a"]}), None, **how)


def test_packed_windows_have_the_activations_of_windows(tmp_path: Path) -> None:
    """Of whole blocks, those of the attention's window too, in another order; fewer stories are read for them."""
    texts = [f"{'A long story of a fox. ' * (i % 5)}{i}" for i in range(40)]
    rows = Dataset.from_dict({"text": texts})
    lm = load_language_model(str(REPOSITORY / "jax_sae/demo/model"), 2)
    found, lengths = [], []
    for pack in (False, True):
        stories = Stories(rows, "text", tokenizer_with_bos(tmp_path), 512, 258, 1, window=64, pack=pack, bos=BOS)
        source = StorySource(stories, 0, len(rows), {"": lm})
        items = [item for item, _ in in_order(source, Position(), 3)]
        each = dict(source.activations(cast(Any, items)))
        found.append(np.concatenate([each[i] for i in range(len(items))]))
        lengths.append(len(items))
    assert lengths[1] < 0.8 * lengths[0] and len(found[0]) == sum(map(len, texts))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-5 * np.abs(found[0]).max())


def test_a_store_is_written_of_the_same_stories(tmp_path: Path) -> None:
    """In windows that begin with BOS, whose activation is left out."""
    tokenizer_with_bos(tmp_path / "tokenizer")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "x" * 70}) + "\n")
    said = harvest_to_store(
        harvest.Options(
            out=tmp_path / "store",
            model=str(REPOSITORY / "jax_sae/demo/model"),
            layer=0,
            text_path=str(tmp_path / "text.jsonl"),
            tokenizer=str(tmp_path / "tokenizer"),
            window=32,
        )
    )
    assert "70 rows of width 64" in said and "of 3 stories" in said and "(3 tokens)" in said
