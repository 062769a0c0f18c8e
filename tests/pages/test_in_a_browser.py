"""The pages in a real Chromium, opened from their file as a double click does; skipped where there is none."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, chromium

import jax_sae
from jax_sae.figures.colours import KINDS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="no Chromium: install one, or name it by CHROMIUM"),
]
TEXT = 'Tom said, "I <b>see</b> &amp; a <script>window.hacked = true</script> dog."'
A, B, RELU = "topk-F96-seed0", "topk-F96-seed1", "relu-F32"


@pytest.fixture(scope="module")
def pages(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All members, with a text and a label of one's own, in one file."""
    where = tmp_path_factory.mktemp("html")
    (where / "labels.json").write_text(json.dumps({A: {"2": "a <i>label</i>"}}))
    return jax_sae.feature_pages(run, out=where / "pages", tokens=6000, texts=[TEXT], labels=where / "labels.json")


@pytest.fixture(scope="module")
def in_browser() -> Iterator[Browser]:
    """One Chromium for all."""
    with browser() as found:
        yield found


@pytest.fixture
def page(in_browser: Browser, pages: Path) -> Iterator[Browser]:
    """The pages, opened; in the end nothing was complained of, and no network was asked."""
    in_browser.look(1280, 900)
    in_browser.open(pages)
    yield in_browser
    assert in_browser.complaints == []


def column(page: Browser, n: int) -> list[str]:
    """What stands in a column of the rows that are there."""
    return page.run(
        "[...document.querySelectorAll('#space .row')].sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)"
        f".map((row) => row.children[{n}].textContent)"
    )


def test_it_opens_and_sorts(page: Browser) -> None:
    """Each row is one of the 96 features; a click on a title sorts, a second one the other way, `s` by the next."""
    assert page.run("document.title") == "Features of run" and page.run("$('count').textContent") == "96 of 96"
    assert column(page, 0)[:3] == ["0", "1", "2"]
    page.run("[...document.querySelectorAll('#head button')].find((b) => b.textContent === 'Max').click()")
    page.wait("state.sort === 'maximum' && document.querySelector('[aria-sort=descending]')")
    values = page.run("Array.from(state.order, (f) => state.table.maximum[f])")
    assert values == sorted(values, reverse=True) and len(values) == 96
    page.run("[...document.querySelectorAll('#head button')].find((b) => b.textContent.startsWith('Max')).click()")
    page.wait("document.querySelector('[aria-sort=ascending]')")
    values = page.run("Array.from(state.order, (f) => state.table.maximum[f])")
    assert values == sorted(values)
    page.press("s")
    page.wait("state.sort === 'f1'")
    page.run("sortBy('label')")
    labels = page.run("Array.from(state.order, (f) => labelOf(f))")
    named = [label.lower() for label in labels if label]
    assert 1 < len(named) < 96 and labels[len(named) :] == [""] * (96 - len(named))
    assert named == sorted(named)


def test_it_filters_and_searches(page: Browser) -> None:
    """Dead ones, a range by dragging, and a word that stands in labels, tokens, logits or notes."""
    dead = page.run("facts.members[0].dead")
    assert dead > 0
    page.run("$('show').value = 'dead'; $('show').onchange()")
    page.wait(f"state.order.length === {dead}")
    assert set(column(page, 1)) == {"dead"}
    page.run("$('show').value = 'all'; $('show').onchange()")
    page.wait("state.order.length === 96")
    box = page.run("(({x, y, width, height}) => [x, y, width, height])($('scatter').getBoundingClientRect())")
    page.drag((box[0] + 50, box[1] + 10), (box[0] + box[2] / 2, box[1] + box[3] - 30))
    page.wait("range.density[1] < Infinity && state.order.length < 96")
    assert page.run("[...state.order].every((f) => state.table.density[f] <= range.density[1])")
    page.run("$('clear').click()")
    page.wait("state.order.length === 96")
    bar = "document.querySelector('#densities g:nth-of-type(2)')"
    said = int(page.run(f"{bar}.querySelector('title').textContent").split(": ")[1].split()[0])
    page.run(f"{bar}.onclick()")
    page.wait(f"state.order.length === {said}")
    page.run("$('clear').click()")
    page.wait("state.order.length === 96")
    page.press("/")
    for key in "label":
        page.press(key)
    page.wait("state.order.length === 1")
    assert column(page, 0) == ["2"] and column(page, 1) == ["a <i>label</i>"]
    word = page.run("load(facts.members[0].search[0][1]).then(({ ids }) => word(ids[0] - 1))")
    page.run(f"$('search').value = {json.dumps(word.upper())}; $('search').oninput()")
    page.wait("state.order.length > 0 && state.order[0] === 0")
    page.run("$('search').value = 'no such word'; $('search').oninput()")
    page.wait("state.order.length === 0")


def test_a_link_shows_a_feature(in_browser: Browser, pages: Path) -> None:
    """Of any member, with examples, the token on which it is largest marked, and the command that steers it."""
    in_browser.open(pages, f"#m={RELU}&f=3")
    text = in_browser.run("$('feature').textContent")
    assert (
        in_browser.run("document.querySelector('h2').textContent") == "Feature 3"
        and in_browser.run("document.title") == f"Feature 3 of {RELU}"
    )
    for part in (
        "Where it is largest",
        "A sample of values from",
        "Nearest by direction",
        "raised",
        "Fires together with",
    ):
        assert part in text
    assert f"--member {RELU} --feature 3 --strength" in text
    assert in_browser.run("document.querySelectorAll('.example mark').length") >= 20
    shown = in_browser.run("document.querySelector('.example .text').textContent.length")
    in_browser.run("document.querySelector('.example button').click()")
    assert in_browser.run("document.querySelector('.example .text').textContent.length") > shown
    in_browser.press("j")
    in_browser.wait("document.querySelector('h2').textContent === 'Feature 4'")
    in_browser.press("Escape")
    in_browser.wait("!$('overview').hidden")
    in_browser.go(f"#m={A}&f=0")
    assert f"{B} " in in_browser.run("$('feature').textContent") and "(another seed)" in in_browser.run(
        "$('feature').textContent"
    )
    dead = in_browser.run("state.table.maximum.indexOf(0)")
    in_browser.go(f"#m={A}&f={dead}")
    assert "It never fired on the " in in_browser.run("$('feature').textContent")
    in_browser.run("location.hash = '#f=96'")
    in_browser.wait("$('message').textContent.startsWith('There is no feature 96; topk-F96-seed0 has 0 to 95')")
    assert in_browser.complaints == []


def test_a_note_is_there_again(page: Browser, pages: Path) -> None:
    """After the page was closed; it can be found, and is exported as labels are given."""
    page.go(f"#m={A}&f=5")
    page.run("$('note').value = 'Looks like <b>dogs</b>'; $('note').oninput()")
    page.open(pages, f"#m={A}&f=5")
    assert page.run("$('note').value") == "Looks like <b>dogs</b>"
    page.go(f"#m={A}&v=overview")
    page.run("$('show').value = 'noted'; $('show').onchange()")
    page.wait("state.order.length === 1")
    page.do("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(pages.parent))
    page.run("$('export').click()")
    exported = pages.parent / "notes.json"
    end = time.monotonic() + 20
    while not exported.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert json.loads(exported.read_text()) == {A: {"5": "Looks like <b>dogs</b>"}}
    exported.unlink()


def test_texts_with_html_in_them_stay_texts(page: Browser) -> None:
    """Of stories, labels and notes; nothing of them runs, and no element comes of them."""
    page.go(f"#m={RELU}&v=stories&s=0")
    assert page.run("document.querySelector('#stories .text').textContent") == TEXT
    assert page.run("document.querySelectorAll('#stories b, #stories .text script').length") == 0
    page.press("Tab")
    page.run("document.querySelector('#stories .text [role=button]').focus()")
    page.press("ArrowRight")
    assert "Active on" in page.run("document.querySelector('#stories aside').textContent")
    page.go(f"#m={A}&f=2")
    assert page.run("document.querySelectorAll('#feature i').length") == 0
    assert "a <i>label</i>" in page.run("$('feature').textContent") and page.run("window.hacked") is None


def test_a_screen_reader_is_told_what_each_thing_is(page: Browser) -> None:
    """Everything that can be used has a name, and so has every table and picture."""
    page.do("Accessibility.enable")
    named = {"button", "link", "textbox", "combobox", "searchbox", "table", "columnheader", "image", "figure", "region"}
    for view in (f"#m={A}&v=overview", f"#m={A}&f=1", f"#m={A}&v=stories&s=1"):
        page.go(view)
        nodes = [node for node in page.do("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        found = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in nodes]
        assert [role for role, name in found if role in named and not name] == []
        assert {"heading", "table", "button", "combobox"} <= {role for role, _ in found}
    page.do("Accessibility.disable")


def test_a_command_is_copied(page: Browser) -> None:
    """By a click, where a page may write to the clipboard; else it is selected, and it says what to press."""
    page.go(f"#m={A}&f=1")
    page.run("document.querySelector('.command button').click()")
    page.wait("$('message').textContent === 'Copied.' || getSelection().toString().startsWith('jax-sae steer')")
    assert page.run("$('message').textContent") in ("Copied.", "Press Ctrl+C to copy what is selected.")


def test_it_can_be_printed(page: Browser) -> None:
    """A feature's page with its examples, without what cannot be used on paper."""
    page.go(f"#m={A}&f=1")
    page.do("Emulation.setEmulatedMedia", media="print")
    shown = "(id) => getComputedStyle(document.querySelector(id)).display !== 'none'"
    there = "['#top .grow', 'nav', '#feature button', '.example .text', '#feature h2', '#title']"
    assert page.run(f"{there}.map({shown})") == [0, 0, 0, 1, 1, 1]
    assert len(page.do("Page.printToPDF")["data"]) > 10_000
    page.do("Emulation.setEmulatedMedia", media="")


@pytest.mark.long
def test_dictionaries_show_what_they_read_and_write(in_browser: Browser, tmp_path: Path) -> None:
    """A transcoder, with the tokens that its encoder looks for, and a crosscoder, with the tokens of each place."""
    kinds = {"dictionaries": ["transcoder", "crosscoder"], "layers": [1, 2], "kinds": ["topk"], "features": 16, "k": 4}
    small = {"steps": 8, "batch_tokens": 128, "block_tokens": 512, "held_out_tokens": 400, "log_every": 8}
    run = jax_sae.train("demo", out=tmp_path / "run", quiet=True, **kinds, l1_coefficient=(), **small)
    page = jax_sae.feature_pages(tmp_path / "run", tokens=800)
    before = list(in_browser.complaints)
    for name in run:
        in_browser.open(page, f"#m={name}&f=0")
        text = in_browser.run("$('feature').textContent")
        assert "Tokens that it raises and lowers" in text
        assert ("Tokens that its encoder looks for" in text) is (run[name].reads != run[name].writes)
        for place in run[name].writes if len(run[name].writes) > 1 else ():
            assert f"Tokens that it raises and lowers, from {place}" in text
        about = in_browser.run("$('about').textContent")
        assert all(place in about for place in run[name].writes)
        in_browser.go(f"#m={name}&v=overview")
        assert in_browser.run("state.order.length") == 16
    assert in_browser.complaints == before


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (1280, 900, True), (390, 844, False)])
def test_nothing_is_wider_than_the_screen(page: Browser, width: int, height: int, dark: bool) -> None:
    """On a desk and on a phone; dark where that is liked."""
    page.look(width, height, dark)
    for view in ("v=overview", "f=1", "v=stories&s=1"):
        page.go(f"#m={A}&{view}")
        assert page.run("document.documentElement.scrollWidth") <= width
    look = page.run("getComputedStyle(document.documentElement).getPropertyValue('--bar')")
    assert look == KINDS["topk"].colour
    paper = page.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark


def test_files_beside_the_page_are_loaded_when_they_are_looked_at(
    run: Path, in_browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder that is opened from the disk."""
    monkeypatch.setattr("jax_sae.pages.make.MOST_IN_ONE_FILE", 10)
    page = jax_sae.feature_pages(run, [A, RELU], out=tmp_path / "pages", tokens=1500)
    assert len(list(page.parent.glob("data-*.js"))) == 8
    in_browser.open(page, f"#m={RELU}&f=3")
    assert "Where it is largest" in in_browser.run("$('feature').textContent")
    assert in_browser.run("blocks.size") < 5
    (page.parent / "data-0-0.js").unlink()
    before = list(in_browser.complaints)
    in_browser.run(f"location.hash = '#m={A}&f=3'")
    in_browser.wait("$('message').textContent.includes('data-0-0.js is not beside this page')")
    in_browser.complaints[:] = before  # Chromium itself tells of the missing file
    assert before == []


def test_a_hundred_thousand_rows_are_sorted_and_shown_without_a_pause(page: Browser) -> None:
    """In a few tenths of a second on a busy machine; docs/performance.md has what it takes on an idle one."""
    page.run(
        """(() => {
          const F = 100000, random = () => Float32Array.from({ length: F }, Math.random);
          const member = { ...facts.members[0], name: "many", features: F, seeds: [] };
          const empty = Array.from({ length: F }, () => []);
          state.member = member;
          state.table = { density: random(), maximum: random(), mean: random(), norm: random(), match: random(),
            f1: random(),
            labels: Array.from({ length: F }, (_, f) => `label ${f % 977}`), outputs: empty, given: {},
            rank: Float32Array.from({ length: F }, (_, f) => f % 977) };
        })()"""
    )
    page.run("refresh()")
    started = time.monotonic()
    page.run("sortBy('density')")
    assert page.run("state.order.length") == 100_000 and time.monotonic() - started < 2
    assert page.run("state.order.every((f, i, all) => !i || state.table.density[all[i - 1]] >= state.table.density[f])")
    assert page.run("document.querySelectorAll('#space .row').length") < 60
    page.run("$('rows').scrollTop = 1e9; $('rows').onscroll()")
    assert page.run("state.order[99999]") == int(column(page, 0)[-1])
