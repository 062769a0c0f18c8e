"""`jax-sae compare`: matches are those of all directions and all tokens; the page works in a browser."""

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser, chromium
from refusals import refused

import jax_sae
from jax_sae.activations.sources import open_sources
from jax_sae.analysis.meta_structure import meta_structure
from jax_sae.commands.compare import main
from jax_sae.figures.colours import KINDS, OWN
from jax_sae.figures.drawing import DARK

A, B, RELU = "topk-F96-seed0", "topk-F96-seed1", "relu-F32"
TOKENS = 3000


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all members, of a run that was evaluated; small dictionaries on directions are trained briefly."""
    run = Path(shutil.copytree(run, tmp_path_factory.mktemp("evaluated") / "run"))
    jax_sae.open_run(run).evaluate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_sae.analysis.meta_structure.STEPS", 50)
        return jax_sae.compare_members(run, out=tmp_path_factory.mktemp("html") / "compare", tokens=TOKENS)


def facts_and_blocks(page: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What stands in a page, read as it says that it is to be read."""
    html = page.read_text()
    [facts] = re.findall(r'id="facts">(.*?)</script>', html)
    blocks = {}
    for name, text in re.findall(r'id="block-([^"]*)">([^<]*)</script>', html):
        whole = gzip.decompress(base64.b64decode(text))
        size = int.from_bytes(whole[:4], "little")
        content = json.loads(whole[4 : 4 + size])
        base = -(-(4 + size) // 8) * 8
        arrays = {key: np.frombuffer(whole, kind, n, base + at) for key, (kind, at, n) in content["arrays"].items()}
        blocks[name] = {**content, **arrays}
    return json.loads(facts), blocks


@pytest.mark.long
def test_matches_are_those_of_all_directions_and_all_tokens(run: Path, page: Path) -> None:
    """Of the run's three members, of which two differ in their seed; against brute force."""
    facts, blocks = facts_and_blocks(page)
    opened = jax_sae.open_run(run)
    _, source, _ = open_sources(opened.config)
    stories, total = [], 0
    for story in source.read(range(len(source))):
        if total + len(story) > TOKENS:
            break
        total += len(story)
        stories.append(story.token_ids)
    x = source.lm.activations(stories)
    fires = {
        name: np.concatenate([np.asarray(opened[name].encode(story))[1:] for story in x]) > 0 for name in (A, B, RELU)
    }
    assert facts["tokens"] == len(fires[A]) and facts["counted"] == [A, B, RELU]
    unit = {name: np.asarray(opened[name].params["W_dec"], np.float64) for name in fires}
    unit = {name: d / np.linalg.norm(d, axis=1, keepdims=True) for name, d in unit.items()}
    for number, name in enumerate((A, B, RELU)):
        described, found, F = facts["members"][number], blocks[f"{number}-0"], len(unit[name])
        assert described["others"] == [other for other in fires if other != name]
        for i, other in enumerate(described["others"]):
            its = slice(i * F, (i + 1) * F)
            cosines = unit[name] @ unit[other].T
            np.testing.assert_array_equal(found["feature"][its], cosines.argmax(1))
            np.testing.assert_allclose(found["cosine"][its], cosines.max(1), atol=1e-3)
            there = fires[name].any(0)
            assert described["alike"][i] == pytest.approx(cosines.max(1)[there].mean(), rel=1e-3)
            centred = [fires[each] - fires[each].mean(0) for each in (name, other)]
            spread = np.linalg.norm(centred[0], axis=0)[:, None] * np.linalg.norm(centred[1], axis=0)
            phi = np.where(spread > 0, centred[0].T @ centred[1] / np.where(spread > 0, spread, 1), 0)
            best = found["fires"][its].astype(int) - 1
            np.testing.assert_array_equal(best < 0, phi.max(1) <= 1e-12)
            np.testing.assert_allclose(found["phi"][its][best >= 0], phi.max(1)[best >= 0], atol=1e-3)
            np.testing.assert_allclose(phi[best >= 0, best[best >= 0]], phi.max(1)[best >= 0], rtol=1e-6)
    [seeds] = facts["stability"]
    assert seeds["members"] == [A, B] and 0 < seeds["null_matched_cosine"] < 1
    parts = blocks["0-meta"]
    assert parts["used"].tolist() == sorted(parts["used"], reverse=True) and len(parts["used"]) == 96 // 4


@pytest.mark.long
def test_parts_that_directions_share_are_found() -> None:
    """Of sums of three of a few directions nearly all is explained, of random ones of their covariance far less."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(24, 48))
    taken = np.array([rng.choice(24, 3, replace=False) for _ in range(128)])
    found = meta_structure(base[taken].sum(1))
    assert found is not None and found.explained > 0.95 > 0.9 > found.random_explained
    assert meta_structure(base) is None  # too few


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--member", A], f"{A} alone is nothing to compare; name two members or more"),
        (["--member", A, "topk"], "has no member 'topk'; there are topk-F96-seed0, "),
        (["--tokens", "0"], "the number of tokens is 0; one above 0 was expected"),
        (["--out", "full"], "full holds something that is not comparison of members; give a new directory by --out"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    run: Path, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """With exit code 2; pages on features are not taken for a comparison."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "index.html").write_text("<!-- feature pages of jax_sae -->")
    assert message in refused(capsys, main, [str(run), *flags])
    assert not (run / "compare").exists()


def test_a_run_on_arrays_is_compared_by_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a text nothing is read; too few directions have no parts."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32))
    small = {"steps": 2, "batch_tokens": 32, "block_tokens": 64, "held_out_tokens": 50}
    jax_sae.train(activations="rows.npy", out="rows", quiet=True, features=[4, 6], **small)
    assert main(["rows"]) == 0
    facts, blocks = facts_and_blocks(tmp_path / "rows" / "compare" / "index.html")
    assert facts["tokens"] is None and facts["members"][0]["meta"] is None and "fires" not in blocks["0-0"]
    assert len(blocks["0-0"]["feature"]) == 4 and blocks["0-0"]["feature"].max() < 6


@pytest.fixture(scope="module")
def in_browser() -> Iterator[Browser]:
    """One Chromium for all."""
    with browser() as found:
        yield found


@pytest.mark.long
def test_colours_are_those_of_figures(page: Path) -> None:
    """Of kinds and of paper; the page can draw each marker; no other file of pages has a kind's colour of its own."""
    facts, _ = facts_and_blocks(page)
    looks = [KINDS["topk"], KINDS["topk"], KINDS["relu"]]
    assert [(each["colour"], each["marker"]) for each in facts["members"]] == [
        (its.colour, its.marker) for its in looks
    ]
    sources = {file.name: file.read_text() for file in resources.files("jax_sae.pages").iterdir() if file.is_file()}
    markers = sources["compare.js"].split("const MARKS = {")[1].split("};")[0]
    assert set(re.findall(r'"?([\w^<>]+)"?: "M', markers)) == {look.marker for look in (*KINDS.values(), *OWN)}
    assert f"--paper: {DARK['figure.facecolor']}; --ink: {DARK['text.color']}" in sources["page.css"]
    own = {look.colour.lower() for look in (*KINDS.values(), *OWN)}
    assert not any(colour in text.lower() for text in sources.values() for colour in own)


@pytest.mark.long
@pytest.mark.browser
@pytest.mark.skipif(chromium() is None, reason="no Chromium: install one, or name it by CHROMIUM")
def test_it_works_in_a_browser(page: Path, in_browser: Browser) -> None:
    """From its file: a number of the table of likeness leads to matches, which are sorted, filtered and searched."""
    look = in_browser
    look.look(1280, 900)
    look.open(page)
    assert look.run("document.title") == "Members of run" and look.run("document.querySelectorAll('.mark').length") >= 3
    assert look.run("ticks(Math.log10(30.2), Math.log10(31.9)).map((each) => number(each))") == ["30.5", "31", "31.5"]
    assert look.run("ticks(-2, 0)") == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    strokes = look.run("[...document.querySelectorAll('path.line')].map((line) => line.getAttribute('stroke'))")
    assert strokes == [KINDS["topk"].colour, KINDS["relu"].colour]
    floors = look.run(
        "[...document.querySelectorAll('.frontier path.floor')].map((line) => line.getAttribute('d').split('L').length)"
    )
    assert floors == [3]  # the FVU of PCA at the L0 of each member
    rows = look.run("[...document.querySelectorAll('#list tbody tr')].map((row) => row.children[0].textContent)")
    assert rows == [A, B, RELU]
    assert f"{A} and {B}" in look.run("$('seeds').textContent")
    look.run(f"[...document.querySelectorAll('#alike a')].find((a) => a.ariaLabel.endsWith('{RELU} in {B}')).click()")
    look.wait(f"state.a?.name === '{RELU}' && state.b.name === '{B}' && state.order.length === 32")
    cosines = look.run("Array.from(state.order, (f) => state.columns.cosine[f])")
    assert cosines == sorted(cosines, reverse=True)
    look.press("s")  # by the column after cosine, labels of the others
    look.wait("document.querySelector('[data-key=other]').ariaSort === 'ascending'")
    look.press("x")
    look.wait(f"state.a.name === '{B}' && state.b.name === '{RELU}' && state.order.length === 96")
    look.press("j")
    assert look.run("document.querySelectorAll('#space .chosen').length") == 1
    same = look.run("Array.from({ length: 96 }, (_, f) => state.same(f)).filter(Boolean).length")
    look.run("$('show').value = 'same'; $('show').onchange()")
    look.wait(f"state.order.length === {same}")
    look.run("$('show').value = 'all'; $('show').onchange()")
    look.press("/")
    for key in "first":
        look.press(key)
    found = look.run("Array.from(state.order, (f) => state.of.labels[f] + state.in.labels[state.columns.feature[f]])")
    assert 0 < len(found) < 96 and all("first" in labels.lower() for labels in found)
    look.run("$('search').value = ''; $('search').oninput()")
    look.go(f"#v=parts&m={RELU}")
    assert "of random directions of the same mean and covariance" in look.run("$('parts-mean').textContent")
    for width, height, dark in ((1280, 900, True), (390, 844, False)):
        look.look(width, height, dark)
        for view in ("v=members", f"v=matches&a={A}&b={B}", f"v=parts&m={A}"):
            look.go(f"#{view}")
            assert look.run("document.documentElement.scrollWidth") <= width
    look.do("Emulation.setEmulatedMedia", media="print")  # where nothing scrolls
    assert (
        look.run("[...document.querySelectorAll('.wide')].map((each) => getComputedStyle(each).overflowX)[0]")
        == "visible"
    )
    look.do("Emulation.setEmulatedMedia", media="")
    assert look.complaints == []
