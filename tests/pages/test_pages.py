"""`jax-sae pages`: what is read is what the members make of the held-out text; what cannot be used is one line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from running import REPOSITORY

import jax_sae
from jax_sae.activations.sources import open_sources
from jax_sae.activations.stored_stories import stored_stories
from jax_sae.commands.harvest import main as harvest
from jax_sae.commands.pages import main
from jax_sae.pages.active import entries, joined
from jax_sae.pages.blocks import block
from jax_sae.pages.lens import lens_of
from jax_sae.pages.neighbours import fire_together, nearest, unit_rows
from jax_sae.pages.reading import read
from jax_sae.pages.rules import find_rules
from jax_sae.pages.tally import Tally, Together, Tokens, TokenTally

TOKENS = 6000
TEXT = 'Tom said, "I <b>see</b> &amp; a <script>window.hacked = true</script> dog."'


def test_one_pass_sees_what_each_member_makes_of_each_story(run: Path) -> None:
    """And a member by itself is seen as among others."""
    opened = jax_sae.open_run(run)
    members = {name: opened[name] for name in opened}
    _, source, _ = open_sources(opened.config)
    reading = read(source, members, TOKENS)
    stories = [story.token_ids for story in source.read(range(len(source)))][: reading.n_stories]
    x = source.lm.activations(stories)
    assert reading.n_tokens == sum(len(ids) - 1 for ids in stories) <= TOKENS
    for name, sae in members.items():
        features = [np.asarray(sae.encode(story)) for story in x]
        after_first = np.concatenate([its[1:] for its in features])
        seen = reading.members[name]
        np.testing.assert_array_equal(seen.tally.fired, (after_first > 0).sum(0))
        np.testing.assert_allclose(seen.examples.maximum, after_first.max(0), rtol=1e-5)
        for f in np.flatnonzero(seen.tally.fired)[:5]:
            story, at = seen.examples.largest.story[f, 0], seen.examples.largest.position[f, 0]
            assert features[story][at, f] == pytest.approx(after_first[:, f].max(), rel=1e-5)
        shown = seen.stories[1]
        np.testing.assert_array_equal(shown.token_ids, stories[1])
        np.testing.assert_allclose(shown.value[1:, 0], features[1][1:].max(1), rtol=1e-5)
    name = list(members)[-1]
    alone = read(source, {name: members[name]}, TOKENS).members[name]
    together = reading.members[name]
    np.testing.assert_array_equal(alone.examples.samples().story, together.examples.samples().story)
    np.testing.assert_array_equal(alone.tally.fired_on.toarray(), together.tally.fired_on.toarray())


def test_a_lens_is_the_final_norm_and_the_unembedding() -> None:
    """With the mean over the vocabulary taken away; a direction of norm 0 does nothing."""
    lm = jax_sae.load_language_model(str(REPOSITORY / "jax_sae" / "demo" / "model"), layer=2)
    rng = np.random.default_rng(0)
    d = rng.standard_normal((3, lm.width)).astype(np.float32)
    d[2] = 0
    lens = lens_of(lm, "1.resid_post", d)
    assert lens is not None and lens_of(lm, "1.mlp_hidden", d) is None
    params: Any = lm.whole[1]
    centred = d - d.mean(1, keepdims=True)
    unit = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + 1e-30)
    logits = (unit * np.asarray(params["ln_f"]["scale"])) @ np.asarray(params["wte"]["embedding"]).T
    logits -= logits.mean(1, keepdims=True)
    np.testing.assert_allclose(lens.sd, logits.std(1), rtol=1e-3, atol=1e-6)
    for f in range(2):
        np.testing.assert_array_equal(lens.raised[f], np.argsort(-logits[f])[:10])
        np.testing.assert_allclose(lens.lowered_by[f], np.sort(logits[f])[:10], rtol=1e-3)
    kurtosis = (logits[:2] ** 4).mean(1) / logits[:2].var(1) ** 2
    np.testing.assert_allclose(lens.kurtosis[:2], kurtosis, rtol=1e-3)
    read_there = lens_of(lm, "1.mlp_in", d, is_read=True)
    assert read_there is not None and lens_of(lm, "1.mlp_in", d) is None
    products = d[:2] @ np.asarray(params["wte"]["embedding"]).T
    products -= products.mean(1, keepdims=True)
    np.testing.assert_array_equal(read_there.raised[:2, 0], products.argmax(1))


def test_neighbours_are_those_with_the_largest_cosine_and_correlation() -> None:
    """Not oneself; those that fire never are like none."""
    rng = np.random.default_rng(0)
    d = rng.standard_normal((20, 5))
    unit = unit_rows(d)
    cosines = np.corrcoef(np.concatenate([d, -d], 1)) - 2 * np.eye(20)  # of d and -d the mean is 0
    near = nearest(unit, unit, 3, is_itself=True)
    np.testing.assert_array_equal(near.feature, np.argsort(-cosines, 1)[:, :3])
    np.testing.assert_allclose(near.likeness, -np.sort(-cosines, 1)[:, :3], rtol=1e-5)
    fires = (rng.random((300, 6)) < [0.5, 0.5, 0.1, 0.1, 0.1, 0]).astype(int)
    fires[:, 3] |= fires[:, 2]
    together = Together(6)
    together.add(np.nonzero(fires)[1], fires.sum(1))
    found = fire_together(together, fires.sum(0), 300, 5)
    assert found.feature[2, 0] == 3 and (found.feature[5] == -1).all()
    assert found.likeness[2, 0] == pytest.approx(np.corrcoef(fires[:, 2], fires[:, 3])[0, 1])


def test_rules_are_found_on_one_half_and_tried_on_the_other() -> None:
    """A token, the one before, what words have in common, and a place in the story."""
    words = [" ran", " sang", "ing", " Tim", " Ann", " Bob", " Eve", ".", "7"]
    rng = np.random.default_rng(1)
    n = 4000
    ids = rng.integers(0, len(words), n).astype(np.int32)
    before = np.concatenate([[-1], ids[:-1]]).astype(np.int32)
    place = (np.arange(n) % 12).astype(np.int32)
    tokens = Tokens(ids, before, place, (np.arange(n) // 2000).astype(np.int32))
    fires = np.stack(
        [ids == 0, before == 7, (ids >= 3) & (ids <= 6), place == 0, np.arange(n) < 6, rng.random(n) < 0.02], 1
    )
    fires[2000:, 0] &= rng.random(2000) < 0.5  # half as often on the other half
    tally, seen = Tally(6, len(words)), TokenTally(len(words))
    tally.add(tokens, joined([entries(fires.astype(np.float32))], 6))
    tally.finish()
    seen.add(tokens, np.ones(n, bool))
    rules = find_rules(tally, seen, words)
    assert [its[0].text if its else "" for its in rules] == [
        "“ ran”",
        "after “.”",
        "a capital at the beginning",
        "the first token of a story",
        "",
        "",
    ]
    assert set(rules[2][1].text.split(" “ ")) == {"“ Tim”", "Ann”", "Bob”", "Eve”"}
    assert rules[0][0].precision == pytest.approx(0.5, abs=0.1) and rules[0][0].recall == 1


def test_a_block_refuses_what_a_page_cannot_read() -> None:
    """And nothing that HTML would read as its own stands in one."""
    with pytest.raises(TypeError, match="x is float64"):
        block({}, x=np.zeros(3))
    assert re.fullmatch("[A-Za-z0-9+/=]+", block({"text": "</script><b>"}, x=np.arange(3, dtype=np.int32)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--member", "topk"], "has no member 'topk'; there are topk-F96-seed0, "),
        (["--tokens", "0"], "the number of tokens is 0; one above 0 was expected"),
        (["--text", ""], "the text '' has no token that the language model knows"),
        (["--text", "word " * 600], "tokens, but the model 512 positions: cut it"),
        (["--step", "7"], "has no checkpoint at step 7"),
        (["--labels", "missing.json"], "missing.json"),
        (["--labels", "other.json"], "other.json has labels of 'topk-F9'; the pages are of "),
        (["--labels", "beyond.json"], "a label of feature '96' of topk-F96-seed0; a number from 0 to 95 was expected"),
        (["--labels", "number.json"], "the label of feature 3 of topk-F96-seed0 is no text"),
        (["--labels", "list.json"], "list.json: the labels of topk-F96-seed0 are a list"),
        (["--out", "full"], "full holds something that is not feature pages; give a new directory by --out"),
        (["--members", "x"], "unknown flag --members; did you mean --member?"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    run: Path, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """With exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    of_member = {"beyond": {"96": "x"}, "number": {"3": 4}, "list": ["x"]}
    for name, content in {"other": {"topk-F9": {}}, **{k: {"topk-F96-seed0": v} for k, v in of_member.items()}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "index.html").write_text("<p>mine</p>")
    assert message in refused(capsys, main, [str(run), *flags])
    assert not (run / "pages").exists()


@pytest.mark.long
def test_another_language_model_and_activations_from_a_file_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sha256 of what is read; without token ids there is no text."""
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    model = Path(shutil.copytree(REPOSITORY / "jax_sae" / "demo" / "model", tmp_path / "model"))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-3] ^= 0x10
    (model / "model.safetensors").write_bytes(weights)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["path"] = str(model)
    (copy / "config.json").write_text(json.dumps(config))
    assert "began with another language model" in refused(capsys, main, [str(copy)])
    rows = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32)
    np.save("rows.npy", rows)
    small = {"features": 4, "steps": 2, "batch_tokens": 32, "block_tokens": 64, "held_out_tokens": 50}
    jax_sae.train(activations="rows.npy", out="rows", quiet=True, **small)
    assert "rows.npy, which hold no token ids, so there is no text to show" in refused(capsys, main, ["rows"])


@pytest.mark.long
def test_pages_of_a_store_show_the_text_that_it_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a run on the text do; the rows' digest stays as it was, and stores without ids are refused."""
    monkeypatch.chdir(tmp_path)
    demo = REPOSITORY / "jax_sae" / "demo"
    text = ["--text-path", str(demo / "stories"), "--tokens", "3000", "--exclude-first-tokens", "1"]
    assert harvest(["--model", str(demo / "model"), "--layer", "2", "--out", "store", *text]) == 0
    small = {"features": 16, "kinds": ["topk"], "k": 2, "steps": 4, "batch_tokens": 64, "block_tokens": 128}
    jax_sae.train(activations="store", out="run", quiet=True, held_out_tokens=200, **small)
    opened = jax_sae.open_run("run")
    [(name, sae)] = {name: opened[name] for name in opened}.items()
    training, _, _ = open_sources(opened.config)
    source = stored_stories(Path("store"), training)
    reading = read(source, {name: sae}, 1500)
    lm = jax_sae.load_language_model(str(demo / "model"), layer=2)
    items = source.read(range(reading.n_stories))
    x = lm.activations([story.token_ids for story in items])
    for i, stored in source.activations(items):
        np.testing.assert_allclose(stored, x[i][1:], atol=1e-3)
    fires = np.concatenate([np.asarray(sae.encode(story))[1:] > 0 for story in x])
    np.testing.assert_array_equal(reading.members[name].tally.fired, fires.sum(0))
    page = jax_sae.feature_pages("run", training_text=True, tokens=1500)
    [facts] = re.findall(r'id="facts">(.*?)</script>', page.read_text())
    assert json.loads(facts)["members"][0]["random"]["writes"] and json.loads(facts)["model"] == ""
    assert "a text of one's own is read by" in refused(capsys, main, ["run", "--training-text", "--text", "x"])
    digest = training.digests()
    manifest = json.loads(Path("store/manifest.json").read_text())
    for shard in manifest["shards"]:
        del shard["tokens"]  # as it was before stores kept them
    Path("store/manifest.json").write_text(json.dumps(manifest))
    assert open_sources(opened.config)[0].digests() == digest
    assert "store is a store without token ids" in refused(capsys, main, ["run"])


def test_pages_are_written_and_take_the_place_of_those_before(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one file, or where that would be too large with files beside it; the same run gives the same bytes."""
    out = tmp_path / "pages"
    argv = [str(run), "--out", str(out), "--tokens", "1500", "--member", "relu-F32", "--text", TEXT]
    monkeypatch.setattr("jax_sae.pages.files.MOST_IN_A_FILE", 300_000)
    assert main(argv) == 0
    told = capsys.readouterr().out
    beside = sorted(path.name for path in out.glob("data-*.js"))
    assert len(beside) == 4 and f"and {len(beside)} files beside it that it loads" in told
    monkeypatch.undo()
    assert main(argv) == 0
    assert [path.name for path in out.iterdir()] == ["index.html"]
    first = (out / "index.html").read_bytes()
    assert main(argv) == 0 and (out / "index.html").read_bytes() == first
    assert b"hacked" not in first and "which is all there is" in capsys.readouterr().out
