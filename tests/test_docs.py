"""Every code block of README.md, of the other pages of the repository's root and of docs/*.md is run, or at least read.

What is done with a block goes by its language; one of a language that nobody reads here is refused.

- `python`, `pycon`: run, in the order of the page, in one namespace, in a folder that holds what pages speak of:
  `runs/demo` and `runs/demo_sparse`, the embedded language model, `activations.npy`. Training is cut to a few steps of
  short texts in which nothing is learned, since its numbers do not matter here; a language model or a text that is not
  on this machine is replaced by the embedded one. `pycon` is compared with what it shows. The blocks of the pages in
  ELSEWHERE are run by the tests that are named there, which look at what comes of them; those of other libraries only
  where these are installed.
- `toml`: read as settings, whose members have to be possible.
- `sh`: bash reads it. Each command in it is known; of `jax-sae` and its scripts every flag and value is read by the
  command's own parser, settings are merged and checked, and a member of a run of `configs/` is one that it has. Then
  they are run, one after the other, with training cut short as in Python; but for those of NOT_HERE. The two commands
  of README that set it up are run by `.ci/run`. Of all other programs only the names are known.
- `json`: is JSON.

Code within a line that begins with `jax-sae` is read like that in `sh`, for its flags alone.
"""

import doctest
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from running import REPOSITORY, never, nothing_learned

from jax_sae.commands import COMMANDS, module_of
from jax_sae.commands.flags import Arguments, parse, read_options
from jax_sae.config import Config
from jax_sae.config_tables import config_from_dict, config_names, load_config, option_names
from jax_sae.run.settings import base, merge
from jax_sae.run.train import train
from jax_sae.sweep.members import member_names, sweep_members

sys.path.insert(0, str(REPOSITORY / "docs"))
import site_pages

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for path in sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
}
ELSEWHERE = {
    "README.md": "test_api.py",
    "docs/add_a_kind.md": "autoencoder/test_add_a_kind.py",
    "docs/add_a_language_model.md": "language_model/test_families.py",
    "docs/coming_from.md": "test_coming_from.py",
    "docs/own_loop.md": "sweep/test_own_loop.py",
}
"""Pages whose Python is run by another test, which takes all blocks out of the page."""
READ = {"python", "pycon", "toml", "sh", "json"}
OTHER_PROGRAMS = {
    *("pip", "pytest", "sphinx-build", "ruff", "mypy", "git", "cd", "export", "tail", "chromium"),
    *("tensorboard", "trackio", "wandb"),
}


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    line: int
    language: str
    code: str


def blocks_of(page: str) -> list[Block]:
    """Its fenced blocks, in order."""
    text = PAGES[page]
    return [
        Block(page, text.count("\n", 0, each.start()) + 1, each[2].strip(), re.sub(f"(?m)^{each[1]}", "", each[3]))
        for each in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(block: Block) -> str:
    """For pytest."""
    return f"{block.page}:{block.line}"


def test_every_block_is_of_a_language_that_is_read() -> None:
    """And no command hides in a block by indentation."""
    assert [named(block) for block in BLOCKS if block.language not in READ] == []
    for page, text in PAGES.items():
        prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
        hidden = re.findall(r"^    (?:\S*=\S* )*(?:jax-sae|python|pip) .*", prose, re.MULTILINE)
        assert not hidden, f"{page}: write it as a block of sh: {hidden}"
    for page, test in ELSEWHERE.items():
        assert page.split("/")[-1] in (REPOSITORY / "tests" / test).read_text(), f"{test} does not run {page}"


# Python


def small(config: Config, beginnings: str) -> Config:
    """The same, cut to what a test has time for."""
    short = replace(config.train, steps=min(config.train.steps, 4), batch_tokens=64, log_every=1, checkpoint_every=2)
    held_out = min(config.activations.held_out_tokens, 300)
    config = replace(
        config, train=short, activations=replace(config.activations, block_tokens=448, held_out_tokens=held_out)
    )
    if config.activations.path:
        return config
    there = Path(config.model.path).exists()
    model = config.model if there else replace(config.model, path="jax_sae/demo/model", layer=2)
    text = replace(config.text, path=beginnings, config="", column="text", streaming=False)
    return replace(config, model=model, text=replace(text, window=min(config.text.window, 128)))


@pytest.fixture(scope="module")
def sparse_run(beginnings: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of configs/demo_sparse.toml, with those of its kinds of which pages speak, that learned nothing."""
    out = tmp_path_factory.mktemp("runs") / "demo_sparse"
    with nothing_learned():
        config = small(load_config(Path("demo_sparse")), beginnings)
        sweep = replace(config.sweep, kinds=("topk", "batchtopk"), l1_coefficient=(), target_l0=())
        config = replace(config, sweep=sweep, model=replace(config.model, path=str(REPOSITORY / config.model.path)))
        assert train(config, out, resume=False, stop_requested=never)
    return out


@pytest.fixture
def at_hand(
    demo_run: Path, sparse_run: Path, beginnings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder in which all is there that pages speak of."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo_run)
    (tmp_path / "runs" / "demo_sparse").symlink_to(sparse_run)
    (tmp_path / "jax_sae").mkdir()
    for name in ("jax_sae/demo", "configs", "scripts", "docs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    np.save(tmp_path / "activations.npy", np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32))
    monkeypatch.chdir(tmp_path)

    def train_small(config: Config, *arguments: Any, **keywords: Any) -> Any:
        return train(small(config, beginnings), *arguments, **keywords)

    monkeypatch.setattr("jax_sae.api.train.train_run", train_small)
    monkeypatch.setattr("jax_sae.run.train.train", train_small)  # where a command imports it
    with nothing_learned():
        yield tmp_path


BEFORE = {
    "docs/many_devices.md": (
        "import numpy as np\n"
        "from jax_sae.config import SweepConfig, TrainConfig\n"
        "from jax_sae.sweep.groups import make_groups\n"
        "from jax_sae.sweep.members import sweep_members\n"
        "from jax_sae.sweep.update import init_sweep, update_many\n"
        "groups, D = make_groups(sweep_members(SweepConfig(features=(8,)))), 4\n"
        "train, centres = TrainConfig(steps=2), {'zero': 0.0, 'mean': 0.0, 'geometric_median': 0.0}\n"
        "forms = tuple(group.form for group in groups)\n"
        "x, weights = np.ones((2, 8, D), 'f4'), np.ones((2, 8), 'f4')\n"
    )
}
"""What a page takes over from another one."""
SMALLER = {"docs/many_devices.md": {"data=2, member=1, feature=4": "data=1, member=1, feature=1"}}
"""What is replaced, for lack of devices."""
AFTER = {
    "docs/api.md": "assert effects.shape == (len(token_ids), 64) and effects[:-1].any() and not effects[-1].any()",
    "docs/how_to.md": "assert len(run.names) == 1 and sae.features == 1024 and len(losses) == run.step",
    "docs/explanation.md": (
        "from jax_sae.activations.order import random_order\n"
        "assert fvu < 0.2 and (order(9, 1, 2) == random_order(9, 1, 2)).all()"
    ),
}
"""What holds once a page has run; of api.md, that the last token has no next one, on whose loss it could act."""
WITH_PYTHON = [
    page
    for page in PAGES
    if page not in ELSEWHERE and any(block.language in ("python", "pycon") for block in blocks_of(page))
]


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page: str, at_hand: Path) -> None:
    """Block after block, in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(BEFORE.get(page, ""), names)
    for large in SMALLER.get(page, {}):
        assert PAGES[page].count(large) == 1
    for block in blocks_of(page):
        if block.language == "python":
            code = block.code
            for large, less in SMALLER.get(page, {}).items():
                code = code.replace(large, less)
            exec(compile(code, named(block), "exec"), names)
        elif block.language == "pycon":
            example = doctest.DocTestParser().get_doctest(block.code, names, named(block), page, block.line)
            told = io.StringIO()
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert not runner.run(example, out=told.write, clear_globs=False).failed, told.getvalue()
            names.update(example.globs)
    exec(AFTER.get(page, ""), names)


# Commands


def commands_of(code: str) -> Iterator[list[str]]:
    """The words of each simple command, without settings of the environment before it and what it is piped into."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) - set(";&|()"):
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def read_command(command: str, argv: list[str]) -> None:
    """Raises, for a subcommand of jax-sae, at flags and values that are not its own."""
    assert command in COMMANDS, f"there is no jax-sae {command}"
    if command != "train":
        options: Any = read_options(importlib.import_module(module_of(command)).Options, argv, command)
        run, members = Path(getattr(options, "run", "")), getattr(options, "member", ())
        if str(run.parent) == "runs" and run.name in config_names():
            known = member_names(sweep_members(load_config(Path(run.name)).sweep))
            assert {members} - {()} <= set(known) if isinstance(members, str) else set(members) <= set(known), members
        return
    arguments = parse(argv)
    named_here = arguments.config is None or str(arguments.config) in config_names() or arguments.config.exists()
    own_kinds = any(":" in kind for kind in arguments.settings.get("sweep.kinds", ()))
    if not arguments.resume and named_here and not own_kinds:
        merge(base(arguments.config, arguments.settings)[1], arguments.settings)


def command_of(script: Path) -> str | None:
    """The subcommand that a file of scripts/ is; None for any other file."""
    imported = re.search(r"from (jax_sae.commands.\w+) import main", script.read_text())
    if script.parent.name != "scripts" or imported is None:
        return None
    return next(name for name in COMMANDS if module_of(name) == imported[1])


def read_words(words: list[str]) -> None:
    """Raises at a program that is not known, a file that is not there, or a flag that is none."""
    program, *rest = words
    if program in ("srun", "nohup", "nice"):
        return read_words(rest)
    if program == "jax-sae" or (program, *rest[:2]) == ("python", "-m", "jax_sae"):
        command, *argv = rest if program == "jax-sae" else rest[2:]
        return read_command(command, argv)
    if program == "python" and rest[0] == "-m":
        assert rest[1] in OTHER_PROGRAMS | {"build", "venv"}, words
        return None
    if program == "python" and rest[0].endswith(".py"):
        file = REPOSITORY / rest[0]
        assert file.exists(), f"there is no {rest[0]}"
        if command := command_of(file):
            read_command(command, rest[1:])
        return None
    if program == "pip":
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for found in re.findall(r"(?:^\.|jax[-_]sae)\[(.*)\]", " ".join(rest[1:]).replace("-e ", "")):
            assert set(found.split(",")) <= set(extras), f"no such extra: {found}"
        return None
    assert program in OTHER_PROGRAMS or program == "python", f"nobody reads {program!r} here"
    if program in ("pytest", "sphinx-build"):
        paths = [word for word in rest if word.startswith(("tests", "docs"))]
        assert all((REPOSITORY / path).exists() for path in paths), words
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "sh" for b in blocks_of(page))])
def test_the_commands_of_a_page_are_read(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bash, and by the parser of each command."""
    monkeypatch.chdir(REPOSITORY)
    blocks = [block for block in blocks_of(page) if block.language == "sh"]
    for block in blocks:
        for words in commands_of(block.code):
            try:
                read_words(words)
            except Exception as error:
                raise AssertionError(f"{named(block)}: {' '.join(words)}: {error}") from error
    together = "\n".join(block.code for block in blocks)
    read = subprocess.run(["bash", "-n"], input=together, capture_output=True, text=True, check=False)
    assert read.returncode == 0 and not read.stderr, f"{page}: {read.stderr}"


NOT_HERE = {
    "hf://": "the hub",
    "--push": "the hub",
    "layer_12/": "a folder from the hub",
    "runs/gemma": "what is imported from the hub",
    "google/": "two models with places of their own",
    "HuggingFaceTB/": "a model of more blocks",
    "smollm2": "a model of more blocks, or its activations, of 90 MB and more",
    "SmolLM2": "the same",
    "activations/gpt2": "activations that torch writes",
    "export-activations": "torch",
    "--mesh.data": "several devices",
    "my_kinds": "a file that the page makes, which another test runs",
    "my.toml": "a file of one's own",
    "my_sweep.toml": "a file of one's own",
    "runs/mine": "a run of one's own",
    "jax-sae probe": "texts of the package sae-probes",
    "training_curves.toml": "a run of 3,000 steps that is made for its figure",
}
"""What is in a command that is not run, and what for."""


def commands_to_run(page: str) -> list[list[str]]:
    """Those of jax-sae and its scripts, as the words after `jax-sae`."""
    found = []
    for block in blocks_of(page):
        for words in commands_of(block.code) if block.language == "sh" else ():
            if any(each in " ".join(words) for each in NOT_HERE):
                continue
            if words[0] == "jax-sae":
                found.append(words[1:])
            elif words[0] == "python" and words[1].endswith(".py") and (command := command_of(REPOSITORY / words[1])):
                found.append([command, *words[2:]])
    return found


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if commands_to_run(page)])
def test_the_commands_of_a_page_run(
    page: str, at_hand: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each to its end, in the order of the page."""
    monkeypatch.setattr("jax_sae.analysis.meta_structure.STEPS", 50)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for command, *argv in commands_to_run(page):
        for logger in ("tensorboard", "wandb"):
            if f"--{logger}" in argv:
                pytest.importorskip(logger)
        code = importlib.import_module(module_of(command)).main(argv)
        assert code == 0, (command, argv, capfd.readouterr())


def test_flags_within_lines_are_there() -> None:
    """`jax-sae train --no-such-flag` in a sentence."""
    for page, text in PAGES.items():
        for code in re.findall(r"(?<!`)`(jax-sae [^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            _, command, *argv = code.replace("\n", " ").split()
            if command.isupper() or "[" in code:
                continue
            assert command in COMMANDS, f"{page}: {code}"
            flags = [re.sub("=.*", "", word).lstrip("-") for word in argv if word.startswith("--")]
            names = {name.replace("_", "-") for name in flags_of(command)}
            assert set(flags) <= names | {"help"}, f"{page}: {code}"


def flags_of(command: str) -> set[str]:
    """The names of a command's flags."""
    if command == "train":
        own = {field for field in Arguments.__dataclass_fields__ if field not in ("settings", "loggers")}
        return own | {"debug", "tensorboard", "wandb"} | set(option_names())
    return set(importlib.import_module(module_of(command)).Options.__dataclass_fields__)


# Settings and the rest


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("toml", "json")], ids=named)
def test_files_of_a_page_can_be_read(block: Block) -> None:
    """TOML as settings, whose members are possible."""
    if block.language == "json":
        json.loads(block.code)
        return
    config = config_from_dict(tomllib.loads(block.code), named(block))
    if block.page not in ELSEWHERE:  # it has a kind of its own
        sweep_members(replace(config.sweep, features=config.sweep.features or (() if config.sweep.members else (64,))))


def test_pictures_are_there() -> None:
    """Light and dark; the site shows the dark one that stands beside a light one."""
    for page, text in PAGES.items():
        for file in re.findall(r'\b(?:src|srcset)="([^"]*)"', text):
            assert (REPOSITORY / page).parent.joinpath(file).exists(), f"{page}: {file}"
        shown = site_pages.with_markdown_pictures(text)
        assert "<img" not in shown, f"{page}: an <img> outside of <picture>, which the site would not show"


def test_links_outwards_have_the_form_of_addresses() -> None:
    """Whether anybody is at home there cannot be asked without a network."""
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([a-z]+:[^)\s]*)\)", text):
            parts = urlsplit(link)
            assert parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), f"{page}: {link}"


# The site


def test_the_site_shows_every_setting_and_everything_public() -> None:
    """In what is made when it is built."""
    tables = site_pages.settings_tables()
    for name in option_names():
        group, _, setting = name.partition(".")
        section = tables.split(f"## `[{group}]`")[1].split("\n## ")[0]
        assert section.count(f"\n| `{setting}` | ") == 1, name
    api = PAGES["docs/api.md"]
    shown = re.findall(r"auto\w+:: (\S+)", site_pages.docstrings(api))
    assert len(shown) == len(set(shown)) and {"jax_sae.train", "jax_sae.Run", "jax_sae.steer"} <= set(shown)
    listed = set(re.findall(r"`(jax_sae(?:\.\w+)+)", api))
    assert set(shown) == listed - {"jax_sae.errors.BadInput"}  # jax_sae.BadInput


def test_the_site_has_every_page_of_the_index() -> None:
    """Each under the heading under which it stands there."""
    index = site_pages.with_navigation(PAGES["docs/index.md"])
    pages = re.findall(r"^\w.* <(\S+)>$", index, re.MULTILINE)
    assert "api" in pages and len(pages) == len(re.findall(r"^- \[", PAGES["docs/index.md"], re.MULTILINE))
    assert index.count("```{toctree}") == len(re.findall(r"^## ", index, re.MULTILINE))
