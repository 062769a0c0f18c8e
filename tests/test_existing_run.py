"""A run that is there, by the command line: what it told, and what becomes of it when it is asked to go on.

What cannot be done ends with exit code 2 and one line, and the run stays as it is, bytes and times of all its files.
The numbers are those of test_bad_input.py.
"""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import (
    DEMO,
    GIANTS,
    MODEL,
    ON_ROWS,
    ROWS,
    SMALL,
    WORD,
    refused,
    train_all,
    usual_signals,
    working_among,
    write_tokenizer,
)
from safetensors.numpy import load_file, save_file

import jax_sae
from jax_sae.errors import BadInput


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the cases name."""
    there = tmp_path_factory.mktemp("inputs")
    for name, x in {"rows": ROWS, "other_rows": ROWS + 1, "narrower": ROWS[:, :5], "giants": GIANTS}.items():
        np.save(there / f"{name}.npy", x)
    return there


@pytest.fixture(autouse=True)
def elsewhere(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a directory that holds nothing but the inputs."""
    with working_among(inputs, tmp_path / "here", monkeypatch):
        yield


@dataclass(frozen=True)
class Run:
    """A finished run, and what it printed."""

    directory: Path
    printed: str


TEXTS = [f"Once upon a time there was a fox with {i} red balls." for i in range(30)]
TEXTS[3:6] = ["", " \n\t", "A fox."]
TEXTS[11] = "The sun was warm. " * 200
TEXTS[13] = "The end.<|endoftext|>One day, Lily went to the river.<|endoftext|>"
OF_STORIES = [
    *("--model.path", str(MODEL), "--text.path", "text"),
    *("--activations.exclude-first-tokens", "1", "--activations.norm-limit", "114"),
    *("--sweep.learning-rates", "1e-3", "1e30", "--train.steps", "40", "--out", "run"),
]


def run_in(directory: Path, argv: list[str]) -> Run:
    """Train there."""
    printed = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(printed), usual_signals():
        assert train_all([*SMALL, *argv]) == 0
    return Run(directory / "run", printed.getvalue())


@pytest.fixture(scope="module")
def of_stories(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On stories of which some are empty, too long or hold <|endoftext|>, with a member that diverges."""
    directory = tmp_path_factory.mktemp("of_stories")
    (directory / "text").mkdir()
    for split, texts in {"train": TEXTS, "validation": TEXTS[::-1]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / "text" / f"{split}.jsonl").write_text(lines)
    return run_in(directory, OF_STORIES)


@pytest.fixture(scope="module")
def of_rows(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On rows with a few giants among them; checkpoints at 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("of_rows")
    np.save(directory / "rows.npy", ROWS)
    np.save(directory / "giants.npy", GIANTS)
    return run_in(directory, ["--config", "demo", "--activations.path", "giants.npy", "--out", "run"])


@pytest.fixture(scope="module")
def n_tokens() -> list[int]:
    """Of each text, by the model's own tokenizer."""
    return [len(ids) for ids in jax_sae.load_language_model(str(MODEL), layer=0).tokenizer(TEXTS)["input_ids"]]


# What it told of what is no error


def test_4_and_8_stories_that_are_cut_or_empty_are_counted(of_stories: Run, n_tokens: list[int]) -> None:
    """In the lines that close a run."""
    assert n_tokens[11] > 512
    assert (
        "stories       2 without tokens were skipped; 1 longer than the language model's positions were cut, "
        f"{n_tokens[11] - 512} tokens in all" in of_stories.printed
    )


def test_7_tokens_and_epochs_are_said_before_the_start(of_stories: Run, of_rows: Run, n_tokens: list[int]) -> None:
    """How many are needed and there, and that they are used again; a run that needs more than there are goes on."""
    there = sum(min(512, n) - 1 for i, n in enumerate(n_tokens) if i not in (3, 4))
    assert 480 < there < 40 * 32  # steps of 32 tokens, five blocks in all
    line = f"tokens        1,280 needed, {there:,} there: {1280 / there:.2g} epochs in all; what is there is used again"
    assert line in of_stories.printed.partition("member  ")[0]
    assert "tokens        192 needed, 900 there: 0.21 epochs in all\n" in of_rows.printed.partition("member  ")[0]


def test_11_norms_are_told_before_the_start_and_what_is_left_out_at_the_end(
    of_stories: Run, of_rows: Run, n_tokens: list[int]
) -> None:
    """Giants are warned of, with the flag that leaves them out."""
    for run in (of_stories, of_rows):
        assert re.search(r"\nnorms +1 %: .*, 50 %: .*, 99 %: .*, largest .*\n", run.printed)
    assert re.search(
        r"\nwarning +1\d of 900 tokens have more than 10 times the median norm and hold 100 % of the summed squared "
        r"norms; --activations.norm-limit \d+ leaves them out\n",
        of_rows.printed,
    )
    assert "the median norm" not in of_stories.printed
    assert f"excluded      {len(TEXTS) - 2} tokens at the start of stories, in the first epoch" in of_stories.printed
    assert re.search(
        r"norm limit +[1-9]\d* tokens above it were not trained on, [1-9]\d* not held out", of_stories.printed
    )


def test_13_a_member_that_diverges_ends_no_run(of_stories: Run) -> None:
    """It is named in the closing table; the other one has a result."""
    table = dict(re.findall(r"\n(F4-\S+) +(.*)", of_stories.printed))
    assert "diverged" not in table["F4-lr0.001"] and "diverged at step " in table["F4-lr1e+30"]


# What becomes of it


def flip_a_bit(run: Path, step: int) -> None:
    """Of the file with the arrays of a checkpoint."""
    path = max((run / "checkpoints" / str(step)).rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_digest(run: Path, step: int) -> None:
    """Of one array, as if the array had changed."""
    path = run / "checkpoints" / str(step) / "digests" / "metadata"
    digests = json.loads(path.read_text())
    digests["arrays"]["members/F4/params/W_enc"] = "0" * 64
    path.write_text(json.dumps(digests))


def damage_all(run: Path) -> None:
    """Every checkpoint."""
    for step in (2, 4, 6):
        flip_a_bit(run, step)


def nothing(run: Path) -> None:
    """Leave it as it is."""


RESUMED: dict[str, tuple[Callable[[Path], Any], list[str], str, str, str]] = {
    "15 rows of another width": (
        nothing,
        ["--activations.path", "narrower.npy"],
        "run has autoencoders of width 8",
        "but the activations now have width 5",
        "resume with the run's own",
    ),
    "16 other rows": (
        nothing,
        ["--activations.path", "other_rows.npy"],
        "run began with another activations",
        "the sha256 of what is read now differs from the one in its checkpoint",
        "Resume with the run's own",
    ),
    "16 other settings": (
        nothing,
        ["--train.batch-tokens", "64", "--sweep.features", "4", "5", "--train.log-every", "3"],
        "run was started with other settings (sweep.features (4,) -> (4, 5); train.batch_tokens 32 -> 64)",
        "",
        "resume with its own, or start a new run",
    ),
    "16 another config": (
        nothing,
        ["--config", str(DEMO), *SMALL, "--train.seed", "1"],
        "run was started with other settings (train.seed 0 -> 1)",
        "",
        "resume with its own, or start a new run",
    ),
    "16 fewer steps than are done": (
        nothing,
        ["--train.steps", "5"],
        "run is at step 6",
        "beyond train.steps 5",
        "give more steps, or none",
    ),
    "16 a config.json that is none": (
        lambda run: (run / "config.json").write_text("{"),
        [],
        "run/config.json: cannot be read as JSON",
        "",
        "",
    ),
    "16 a config.json that holds a list": (
        lambda run: (run / "config.json").write_text("[]"),
        [],
        "run/config.json: holds a list",
        "an object was expected",
        "",
    ),
    "16 a config.json with a setting of another type": (
        lambda run: (run / "config.json").write_text('{"train": {"steps": NaN}}'),
        [],
        "run/config.json: train.steps is nan",
        WORD,
        "",
    ),
    "17 no config.json": (
        lambda run: (run / "config.json").unlink(),
        [],
        "run holds no run to resume",
        "",
        "start one",
    ),
    "18 every checkpoint damaged": (
        damage_all,
        [],
        "run has no checkpoint that is whole: the checkpoint at step 6",
        "is damaged",
        "start a new run",
    ),
    "18 every checkpoint gone but for its name": (
        lambda run: [shutil.rmtree(path) or path.mkdir() for path in (run / "checkpoints").iterdir()],
        [],
        "run has no checkpoint that is whole: the checkpoint at step 6",
        "is damaged: its JSON cannot be read",
        "start a new run",
    ),
}


@pytest.fixture
def run(of_rows: Run) -> Path:
    """A copy of the run on rows, in the working directory."""
    return Path(shutil.copytree(of_rows.directory, "run"))


@pytest.mark.long
@pytest.mark.parametrize(("damage", "argv", "found", "expected", "advice"), RESUMED.values(), ids=RESUMED)
def test_a_run_that_cannot_be_resumed_as_asked_stays_as_it_is(
    damage: Callable[[Path], Any],
    argv: list[str],
    found: str,
    expected: str,
    advice: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bytes and times of all its files."""
    damage(run)
    error = refused(capsys, train_all, ["--resume", "--out", "run", *argv])
    for part in (found, expected, advice):
        assert part in error


def change_the_text(directory: Path) -> None:
    """One character, under the same name."""
    path = directory / "text" / "train.jsonl"
    path.write_text(path.read_text().replace("19 red", "19 bed"))


def change_the_model(directory: Path) -> None:
    """The last bit of one weight."""
    shutil.copytree(MODEL, directory / "model")
    weights = load_file(directory / "model" / "model.safetensors")
    name = next(name for name in weights if name.endswith("wte.weight"))
    weights[name].view(np.uint32)[0, 0] ^= 1
    save_file(weights, directory / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "argv", "what"),
    [
        (change_the_text, [], "text"),
        (change_the_model, ["--model.path", "model"], "language model"),
        (nothing, ["--text.tokenizer", "bytes"], "tokenizer and held-out tokenizer"),
    ],
    ids=["16 the text has changed", "16 the language model has changed", "16 the tokenizer has changed"],
)
def test_a_run_whose_inputs_have_changed_is_not_resumed(
    change: Callable[[Path], None], argv: list[str], what: str, of_stories: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told which of them; the run stays as it is."""
    for name in ("run", "text"):
        shutil.copytree(of_stories.directory.parent / name, name)
    write_tokenizer(Path("bytes"), first_id=0)
    change(Path())
    error = refused(capsys, train_all, ["--resume", "--out", "run", *argv])
    assert f"run began with another {what}: the sha256 of what is read now differs" in error
    assert "Resume with the run's own" in error


def test_15_activations_of_another_width_are_told_when_a_run_is_used(of_rows: Run) -> None:
    """With the width that was expected."""
    sae = jax_sae.load_autoencoder(of_rows.directory)
    with pytest.raises(BadInput, match=r"x has shape \(3, 5\); F4 expects \[..., 8\]: is this the model and layer"):
        sae.encode(np.zeros((3, 5)))


HOLD = """
import sys
from pathlib import Path
from jax_sae.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("argv", [["--resume"], [*SMALL, *ON_ROWS]], ids=["a run to resume", "a run that begins"])
def test_17_a_directory_in_which_another_process_trains_is_left_alone(
    argv: list[str], of_rows: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until that process has ended."""
    if "--resume" in argv:
        shutil.copytree(of_rows.directory, "run")
        argv = [*argv, "--activations.path", "giants.npy"]
    else:
        Path("run").mkdir()
    command = [sys.executable, "-c", HOLD, "run"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        error = refused(capsys, train_all, [*argv, "--out", "run"])
        assert "run is in use: another process is training there" in error
        assert "wait until it has ended, or give --out another name" in error
        other.communicate("")
    assert train_all([*argv, "--out", "run"]) == 0


def test_18_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And kept, under another name."""
    flip_a_bit(run, 6)
    assert train_all(["--resume", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"\nwarning +the checkpoint at step 6 in .*run/checkpoints is damaged: .*; the others are at 2, 4; going on "
        r"from step 4; it is now 6.damaged\n",
        printed,
    )
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "4", "6", "6.damaged"}


@pytest.mark.parametrize("step", [None, 6, 4])
def test_18_a_damaged_array_is_named_by_whoever_wants_that_checkpoint(step: int | None, run: Path) -> None:
    """An older one never takes its place."""
    change_a_digest(run, step or 6)
    with pytest.raises(
        BadInput,
        match=f"step {step or 6} in .* is damaged: the array members/F4/params/W_enc does not have the digest that was "
        "saved with it; the others are at ",
    ):
        jax_sae.load_autoencoder(run, step=step)
    assert jax_sae.load_autoencoder(run, step=2).step == 2
