"""What a user can get wrong: the twenty kinds of the reliability report, section 6, and the command line itself.

Each ends with exit code 2 and one line that says what was found, what was expected and what to do; without a traceback,
and with nothing made or changed on disk. What is refused where a run is there already stands in test_existing_run.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from refusals import (
    GIANTS,
    MODEL,
    ON_ROWS,
    ROWS,
    SMALL,
    WORD,
    D,
    files,
    refused,
    train_all,
    working_among,
    write_tokenizer,
)
from running import REPOSITORY
from safetensors.numpy import load_file, save_file

import jax_sae
from jax_sae.activations.array_sources import open_activations
from jax_sae.commands import export_activations, harvest, inspect, train
from jax_sae.errors import BadInput
from jax_sae.language_model.hub import NoAnswer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the cases name."""
    there = tmp_path_factory.mktemp("inputs")
    np.save(there / "rows.npy", ROWS)
    np.save(there / "flat.npy", ROWS[0])
    np.save(there / "whole_numbers.npy", np.ones((100, D), int))
    np.save(there / "few.npy", ROWS[:19])
    np.save(there / "too_large.npy", np.where(np.arange(1000)[:, None] == 999, 1e39, ROWS.astype(float)))
    np.save(there / "giants.npy", GIANTS)
    x = ROWS.copy()
    x[[17, 400, 999], [0, 3, 7]] = np.nan, np.inf, -np.inf
    np.save(there / "not_finite.npy", x)
    for name, row in {
        "stories": {"story": "A fox."},
        "token_ids": {"text": [1, 2048, 3]},
        "numbers": {"text": 3},
        "empty": {"text": " \n"},
        "text": {"text": "A fox."},
    }.items():
        (there / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    (there / "three.jsonl").write_text('{"text": "A fox."}\n' * 3)
    (there / "none.jsonl").write_text("")
    (there / "mixed.jsonl").write_text('{"text": "A fox."}\n' * 40 + '{"text": 3}\n')
    (there / "two_types").mkdir()
    for split, value in {"train": 3, "validation": "A fox."}.items():
        parquet.write_table(pyarrow.table({"text": [value] * 40}), there / "two_types" / f"{split}.parquet")
    (there / "broken.parquet").write_bytes(b"PAR1, or so it says")
    (there / "used").mkdir()
    (there / "used" / "config.json").write_text("{}")
    (there / "part" / "checkpoints").mkdir(parents=True)
    for name, file in {"no_tokenizer": "config.json", "broken": "config.json"}.items():
        (there / name).mkdir()
        (there / name / file).write_bytes((MODEL / file).read_bytes())
    (there / "no_tokenizer" / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    (there / "broken" / "pytorch_model.bin").write_bytes(b"no weights")
    write_tokenizer(there / "other_vocabulary", first_id=5000)
    for name, toml in {
        "wrong_type": b"[train]\nsteps = '5'",
        "unknown_key": b"[train]\nstep = 5",
        "two\nlines": b'[train]\n"ste\\nps" = 5',
        "no_toml": b"steps 5",
        "latin": "# é".encode("latin-1"),
        "nested": b"a = " + b"[" * 5000,
        "digits": b"[train]\nsteps = " + b"9" * 5000,
        "large": b"[sweep]\nlearning_rates = [1" + b"0" * 400 + b"]",
    }.items():
        (there / f"{name}.toml").write_bytes(toml)
    return there


@pytest.fixture(autouse=True)
def elsewhere(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a directory that holds nothing but the inputs."""
    with working_among(inputs, tmp_path / "here", monkeypatch):
        yield


OF_DEMO = ["--model.path", str(MODEL)]
"""The demo's language model, for texts of one's own."""
ABSENT = "no such file or directory, not complete in the local Hugging Face cache, and HF_HUB_OFFLINE is set"
FORM = "not a name on the hub, which has the form owner/name"
FLOAT32 = "1.1754944e-38 to 3.4028235e+38 was expected"

# point: (arguments, what is found, what is expected, what to do)
BAD: dict[str, tuple[list[str], str, str, str]] = {
    "1 hub id absent: model": (
        ["--model.path", "nobody/nothing"],
        "cannot load language model 'nobody/nothing'",
        ABSENT,
        "Give a local directory, run `hf download nobody/nothing` first",
    ),
    "1 hub id absent: text": (
        [*OF_DEMO, "--text.path", "nobody/nothing"],
        "cannot load dataset 'nobody/nothing'",
        ABSENT,
        "`hf download --repo-type dataset nobody/nothing --local-dir FOLDER` makes one",
    ),
    "1 hub id absent: tokenizer": (
        ["--text.tokenizer", "nobody/nothing"],
        "cannot load tokenizer 'nobody/nothing'",
        ABSENT,
        "run `hf download nobody/nothing` first",
    ),
    "1 neither a path nor a hub id": (["--model.path", "no name"], "'no name': no such file or directory", FORM, ""),
    "1 an empty name": ([*OF_DEMO, "--text.path", ""], "cannot load dataset ''", FORM, ""),
    "1 a file in place of a model": (
        ["--model.path", "text.jsonl"],
        "text.jsonl: a file",
        "give the directory that holds the language model",
        "",
    ),
    "1 a model without its weights": (
        ["--model.path", "other_vocabulary"],
        "config.json: cannot be read",
        "No such file",
        "",
    ),
    "1 damaged weights": (["--model.path", "broken"], "broken/pytorch_model.bin", "", ""),
    "1 a file of another kind in place of a text": (
        [*OF_DEMO, "--text.path", "rows.npy"],
        "rows.npy: neither a folder nor a file that ends in",
        ".parquet, .json, .jsonl, .csv, .txt",
        "",
    ),
    "2 column missing": (
        [*OF_DEMO, "--text.path", "stories.jsonl"],
        "stories.jsonl: no column 'text' in the split 'train'",
        "there are 'story'",
        "name one of them",
    ),
    "3 split missing": (
        ["--text.split", "dev"],
        "jax_sae/demo/stories: no split 'dev'",
        "there are 'train', 'validation'",
        "name one of them",
    ),
    "3 held-out split missing": (
        ["--text.validation-split", "dev"],
        "jax_sae/demo/stories: no split 'dev'",
        "there are 'train', 'validation'",
        "name one of them",
    ),
    "3 too few stories to hold some out": (
        [*OF_DEMO, "--text.path", "three.jsonl"],
        "three.jsonl has 3 stories and no held-out split",
        "at least 20 are needed, a tenth held out",
        "",
    ),
    "4 all positions excluded": (
        ["--activations.exclude-first-tokens", "512"],
        "the number of first tokens to exclude is 512",
        "a story has at most 512 tokens",
        "exclude fewer",
    ),
    "5 token ids beyond the vocabulary": (
        [*OF_DEMO, "--text.path", "token_ids.jsonl"],
        "column 'text', row 0: the token id 2048",
        "the model's vocabulary has the ids 0 to 2047",
        "give ids of the model's own tokenizer",
    ),
    "5 token ids and a tokenizer": (
        [*OF_DEMO, "--text.path", "token_ids.jsonl", "--text.tokenizer", "other_vocabulary"],
        "the tokenizer 'other_vocabulary' is given",
        "the column 'text' holds token ids",
        "leave the tokenizer out",
    ),
    "5 a configuration of a file": (
        [*OF_DEMO, "--text.path", "text.jsonl", "--text.config", "en"],
        "text.config is 'en'",
        "a file has no configurations",
        "leave it out",
    ),
    "5 numbers in place of text": (
        [*OF_DEMO, "--text.path", "numbers.jsonl"],
        "column 'text', row 0: a int",
        "text was expected",
        "name a column with stories as text",
    ),
    "4 a window longer than the positions": (
        [*OF_DEMO, "--text.path", "text.jsonl", "--text.window", "600"],
        "text.window is 600",
        "the language model has 512 positions",
        "give at most that",
    ),
    "4 a shared window of no length": (
        ["--text.pack"],
        "text.pack is true, but text.window is 0",
        "",
        "give its tokens",
    ),
    "6 a batch larger than the text": (
        [*OF_DEMO, "--text.path", "text.jsonl", "--train.batch-tokens", "4000"],
        "train.batch_tokens is 4000",
        "but the text has 108 tokens to train on",
        "lower it",
    ),
    "6 a batch larger than the rows": (
        [*ON_ROWS, "--train.batch-tokens", "901"],
        "train.batch_tokens is 901",
        "but the activations have 900 tokens to train on",
        "lower it",
    ),
    "6 a batch larger than a block": (
        [*ON_ROWS, "--train.batch-tokens", "300", "--activations.block-tokens", "256"],
        "train.batch_tokens is 300",
        "activations.block_tokens is 256",
        "a block must hold at least one batch",
    ),
    "7 too few rows to hold some out": (
        ["--activations.path", "few.npy"],
        "few.npy has 19 rows",
        "at least 20 are needed, a tenth of them held out",
        "",
    ),
    "8 an empty file": (
        [*OF_DEMO, "--text.path", "none.jsonl"],
        "none.jsonl is empty",
        "stories were expected, one a row",
        "",
    ),
    "8 a file that is no dataset": (
        [*OF_DEMO, "--text.path", "broken.parquet"],
        "broken.parquet: cannot be loaded as a dataset (ArrowInvalid: Parquet magic bytes not found",
        "",
        "",
    ),
    "8 a column of two types": (
        [*OF_DEMO, "--text.path", "mixed.jsonl", "--train.batch-tokens", "32"],
        "column 'text' is of the type ",
        "text was expected",
        "",
    ),
    "8 splits of two types": (
        [*OF_DEMO, "--text.path", "two_types"],
        "two_types: cannot be loaded as a dataset (ArrowInvalid: Failed to parse string",
        "",
        "",
    ),
    "8 nothing but empty stories": (
        [*OF_DEMO, "--text.path", "empty.jsonl"],
        "not one has any tokens",
        "",
        "is this the right text column?",
    ),
    "8 nothing but excluded tokens": (
        [*OF_DEMO, "--text.path", "text.jsonl", "--activations.exclude-first-tokens", "3"],
        "not one has any tokens but the first ones, which are excluded",
        "",
        "lower activations.exclude_first_tokens",
    ),
    "9 no tokenizer beside the model": (
        ["--model.path", "no_tokenizer", "--text.path", "jax_sae/demo/stories"],
        "no_tokenizer: no tokenizer",
        "expected tokenizer.json, or vocab.json and merges.txt",
        "Copy one there, name another tokenizer",
    ),
    "9 no tokenizer where it is said to be": (
        ["--text.tokenizer", "broken"],
        "broken: no tokenizer",
        "expected tokenizer.json, or vocab.json and merges.txt",
        "name another tokenizer",
    ),
    "9 no BOS token": (
        [*OF_DEMO, "--text.path", "text.jsonl", "--text.tokenizer", "other_vocabulary", "--text.prepend-bos", "on"],
        "text.prepend_bos is 'on', but the tokenizer has no BOS token",
        "",
        "leave it out",
    ),
    "8 a stream of few stories": (
        [*OF_DEMO, "--text.path", "three.jsonl", "--text.streaming"],
        "three.jsonl has 3 stories in all",
        "which a stream holds out",
        "leave text.streaming out, or name a held-out split",
    ),
    "8 a stream of a file that is no dataset": (
        [*OF_DEMO, "--text.path", "broken.parquet", "--text.streaming"],
        "broken.parquet: cannot be loaded as a dataset (ArrowInvalid: Parquet magic bytes not found",
        "",
        "",
    ),
    "8 a stream without the column": (
        [*OF_DEMO, "--text.path", "stories.jsonl", "--text.streaming"],
        "no column 'text' in stories.jsonl",
        "there are 'story'",
        "name one of them",
    ),
    "8 an address that is not streamed": (
        [*OF_DEMO, "--text.path", "http://127.0.0.1:9/x.jsonl.gz"],
        "http://127.0.0.1:9/x.jsonl.gz: an address",
        "it is read while training, with text.streaming",
        "or download the file",
    ),
    "8 an address of no data": (
        [*OF_DEMO, "--text.path", "http://127.0.0.1:9/x.html", "--text.streaming"],
        "http://127.0.0.1:9/x.html: neither a folder nor a file that ends in",
        "",
        "",
    ),
    "11 a limit below most norms": (
        ["--activations.path", "giants.npy", "--activations.norm-limit", "1e-9", "--train.batch-tokens", "32"],
        "tokens have a larger norm than activations.norm_limit, 1e-09",
        "their norms are ",
        "raise the limit",
    ),
    "11 first tokens of rows": (
        [*ON_ROWS, "--activations.exclude-first-tokens", "1"],
        "activations.exclude_first_tokens is 1",
        "activations.path holds rows without their stories",
        "export them again with --exclude-first-tokens, give an array [N, T, D], or use activations.norm_limit",
    ),
    "12 rows that are not finite": (
        ["--activations.path", "not_finite.npy"],
        "not_finite.npy: 3 of 1,000 rows",
        "not finite in float32, the first of them row 17",
        "export them again in float32",
    ),
    "12 a row beyond float32": (
        ["--activations.path", "too_large.npy"],
        "too_large.npy: 1 of 1,000 rows",
        "not finite in float32, the first of them row 999",
        "export them again",
    ),
    "14 layer beyond the last": (
        ["--model.layer", "7"],
        "layer 7",
        "the model has 4 blocks; valid are 0 to 4, where 4 is after the final layer norm",
        "",
    ),
    "14 layer below the first": (["--model.layer", "-1"], "model.layer is -1", "0 or more was expected", ""),
    "15 a vector in place of rows": (
        ["--activations.path", "flat.npy"],
        "flat.npy: the array has shape [8]",
        "[N, D], N tokens of D numbers, or [N, T, D], N stories of T tokens, was expected",
        "",
    ),
    "15 whole numbers in place of rows": (
        ["--activations.path", "whole_numbers.npy"],
        "whole_numbers.npy: the array is of int64",
        "floating-point activations were expected",
        "",
    ),
    "15 no rows": (
        ["--activations.path", "gone.npy"],
        "activations.path is 'gone.npy'",
        "there is no such file or directory",
        "give a store's directory, a folder by save_to_disk, or a file with one array [N, D] or [N, T, D]",
    ),
    "15 a directory that is no store": (
        ["--activations.path", "used"],
        "used is not a whole store of activations",
        "it has no manifest.json",
        "write it again",
    ),
    "17 a run is there": (
        ["--out", "used"],
        "used already holds a run",
        "",
        "go on with it by --resume, or give --out another name",
    ),
    "17 part of a run is there": (
        ["--out", "part"],
        "part holds part of a run (checkpoints)",
        "but no config.json",
        "give --out another name, or move that away",
    ),
    "17 a file is there": (
        ["--out", "rows.npy"],
        "--out rows.npy cannot be a run's directory",
        "rows.npy is a file",
        "give it another name",
    ),
    "17 below a file": (
        ["--out", "rows.npy/run"],
        "--out rows.npy/run cannot be a run's directory",
        "rows.npy is a file",
        "give it another name",
    ),
    "17 a name that is too long": (["--out", "x" * 300], "xxx cannot be a run's directory", "File name too long", ""),
    "17 no run to resume": (
        ["--resume"],
        "runs/demo holds no run to resume",
        "",
        "start one without --resume",
    ),
    "19 a tokenizer with other ids": (
        ["--text.tokenizer", "other_vocabulary"],
        "the tokenizer gives id ",
        "the model's vocabulary has 2048: they do not belong together",
        "name the model's own tokenizer",
    ),
    "20 features beyond memory": (
        [*SMALL, *ON_ROWS, "--sweep.features", str(10**9)],
        "the sweep would take ",
        "of memory, but there are ",
        "give fewer or narrower members",
    ),
    "20 features beyond 32 bits": (
        [*ON_ROWS, "--sweep.features", "1" + "0" * 400],
        "sweep.features is 100000000000000000...",
        f"a number above 0 and up to {2**31 - 1} was expected",
        "",
    ),
    "20 no features": (["--sweep.features", "0"], "sweep.features is 0", "a number above 0 was expected", ""),
    "20 an empty list": (
        ["--sweep.seeds"],
        "the sweep has no members",
        "",
        "sweep.features and sweep.seeds each need a value",
    ),
    "20 no tokens": (["--train.batch-tokens", "0"], "train.batch_tokens is 0", "a number above 0 was expected", ""),
    "20 a negative batch": (["--train.batch-tokens", "-4"], "train.batch_tokens is -4", "a number above 0", ""),
    "20 no block": (["--activations.block-tokens", "0"], "activations.block_tokens is 0", "a number above 0", ""),
    "20 nothing held out": (["--activations.held-out-tokens", "0"], "held_out_tokens is 0", "a number above 0", ""),
    "20 no steps": (["--train.steps", "0"], "train.steps is 0", "a number above 0 was expected", ""),
    "20 steps beyond 32 bits": (
        ["--train.steps", str(2**31)],
        f"train.steps is {2**31}",
        f"a number above 0 and up to {2**31 - 1} was expected",
        "",
    ),
    "20 a seed beyond 32 bits": (
        ["--sweep.seeds", str(2**32)],
        f"sweep.seeds is {2**32}",
        f"0 or more, up to {2**32 - 1}, was expected",
        "",
    ),
    "20 a rate beyond float32": (
        ["--sweep.learning-rates", "3.5e38"],
        "sweep.learning_rates is 3.5e+38, which float32 would make infinite",
        FLOAT32,
        "",
    ),
    "20 a rate below float32": (
        ["--sweep.learning-rates", "1e-39"],
        "sweep.learning_rates is 1e-39, which float32 would make zero",
        FLOAT32,
        "",
    ),
    "20 a bias beyond float32": (
        ["--sweep.encoder-bias", "1e39"],
        "sweep.encoder_bias is 1e+39, which float32 would make infinite",
        FLOAT32,
        "",
    ),
    "20 a decay rate of 1 in float32": (
        ["--train.beta2", "0.999999999"],
        "train.beta2 is 0.999999999",
        "a number from 0 to 0.99999994 was expected",
        "",
    ),
    "kind: unknown": (
        ["--sweep.kinds", "topk", "relo"],
        "there is no kind 'relo'",
        "the kinds are batchtopk, gated, jumprelu, matryoshka, relu, topk",
        "",
    ),
    "kind: k of relu": (
        ["--sweep.k", "4"],
        "sweep.k is 4, but kind 'relu' does not have it",
        "batchtopk, matryoshka, topk have",
        "",
    ),
    "kind: k of relu and gated": (
        ["--sweep.kinds", "relu", "gated", "--sweep.l1-coefficient", "1", "--sweep.k", "4", "8"],
        "sweep.k is 4, but kind 'relu' or 'gated' does not have it",
        "batchtopk, matryoshka, topk have",
        "",
    ),
    "kind: k of an explicit relu": (
        ["--sweep.members", "features=8,k=4"],
        "sweep.k is 4, but kind 'relu' does not have it",
        "batchtopk, matryoshka, topk have",
        "",
    ),
    "kind: lambda of topk": (
        ["--sweep.kinds", "topk", "--sweep.l1-coefficient", "0.5"],
        "sweep.l1_coefficient is 0.5, but kind 'topk' does not have it",
        "gated, relu have",
        "",
    ),
    "kind: a target of topk": (
        ["--sweep.members", "features=8,kind=topk,target_l0=4"],
        "sweep.target_l0 is 4.0, but kind 'topk' does not have it",
        "jumprelu have",
        "",
    ),
    "kind: k above F": (
        ["--sweep.kinds", "topk", "--sweep.features", "64", "8", "--sweep.k", "9"],
        "sweep.k is 9, but the member has 8 features",
        "",
        "give at most that",
    ),
    "kind: k of 0": (["--sweep.kinds", "topk", "--sweep.k", "0"], "sweep.k is 0", "a number above 0", ""),
    "kind: the default k above F": (
        ["--config", "demo", "--sweep.kinds", "topk"],
        "sweep.k is 32, but the member has 8 features",
        "",
        "at most",
    ),
    "kind: a target above F": (
        ["--sweep.kinds", "jumprelu", "--sweep.features", "8", "--sweep.target-l0", "8.5"],
        "sweep.target_l0 is 8.5, but the member has 8 features",
        "",
        "give at most that",
    ),
    "kind: a negative lambda": (
        ["--sweep.l1-coefficient", "1", "-0.5"],
        "sweep.l1_coefficient is -0.5",
        "0 or more was expected",
        "",
    ),
    "kind: a negative lambda of L0": (
        ["--sweep.kinds", "jumprelu", "--sweep.l0-coefficient", "-1"],
        "sweep.l0_coefficient is -1.0",
        "0 or more was expected",
        "",
    ),
    "kind: gated without lambda": (
        ["--config", "demo", "--sweep.kinds", "gated"],
        "kind 'gated' needs sweep.l1_coefficient",
        "",
        "",
    ),
    "kind: jumprelu without lambda or target": (
        ["--config", "demo", "--sweep.kinds", "jumprelu"],
        "kind 'jumprelu' needs sweep.l0_coefficient or sweep.target_l0",
        "one of them, not neither",
        "",
    ),
    "kind: jumprelu with lambda and target": (
        ["--sweep.kinds", "jumprelu", "--sweep.l0-coefficient", "1", "--sweep.target-l0", "4"],
        "kind 'jumprelu' needs sweep.l0_coefficient or sweep.target_l0",
        "one of them, not sweep.l0_coefficient 1 and sweep.target_l0 4",
        "",
    ),
    "kind: a window of 0": (
        ["--sweep.kinds", "jumprelu", "--sweep.target-l0", "4", "--sweep.bandwidth", "0"],
        "sweep.bandwidth is 0.0",
        "a number above 0 was expected",
        "",
    ),
    "kind: more resampling than steps": (
        [*SMALL, *ON_ROWS, "--sweep.resamples", "6"],
        "sweep.resamples is 6, but train.steps is 6",
        "",
        "give a smaller number",
    ),
    "kind: a warm-up beyond the run": (
        ["--sweep.penalty-warmup", "1.5"],
        "sweep.penalty_warmup is 1.5",
        "a part of the steps, from 0 to 1, was expected",
        "",
    ),
    "kind: a norm of directions that are kept at 1": (
        ["--sweep.decoder-norm", "unit", "--sweep.initialization", "transposed", "--sweep.initial-norm", "0.1"],
        "sweep.initial_norm is 0.1, but sweep.decoder_norm = 'unit' makes it 1",
        "",
        "drop one",
    ),
    "kind: lists beside explicit members": (
        ["--sweep.members", "features=8,kind=topk", "--sweep.k", "2", "4"],
        "sweep.k has 2 values, but explicit members are not combined with lists",
        "",
        "give one value",
    ),
    "flag: unknown": (["--train.step", "3"], "unknown flag --train.step", "", "did you mean --train.steps?"),
    "flag: unknown, and like no other": (["-x"], "unknown flag -x", "", "see --help"),
    "flag: no whole number": (["--train.steps", "abc"], "--train.steps is 'abc'", WORD, ""),
    "flag: a float for a whole number": (["--train.steps=1e5"], "--train.steps is '1e5'", WORD, ""),
    "flag: one of a list": (["--sweep.features", "3", "x"], "--sweep.features is 'x'", WORD, ""),
    "flag: no number": (["--train.warmup", "x"], "--train.warmup is 'x'", "a number was expected", ""),
    "flag: no choice": (
        ["--train.batching", "foo"],
        "--train.batching is 'foo'",
        "'tokens' or 'story' was expected",
        "",
    ),
    "flag: no member": (
        ["--sweep.members", "features=3,seed=x"],
        "--sweep.members is 'features=3,seed=x'",
        "features=F,kind=KIND,seed=S,learning_rate=LR,... was expected",
        "",
    ),
    "flag: a member's part twice": (
        ["--sweep.members", "features=3,features=4"],
        "--sweep.members is 'features=3,features=4'",
        "features=F,kind=KIND,seed=S,learning_rate=LR,... was expected",
        "",
    ),
    "flag: a member without features": (
        ["--sweep.members", "seed=1"],
        "--sweep.members is 'seed=1'",
        "features=F,kind=KIND,seed=S,learning_rate=LR,... was expected",
        "",
    ),
    "flag: without its value": (["--train.steps"], "--train.steps has no value", WORD, ""),
    "flag: an empty value": (["--train.steps="], "--train.steps is ''", WORD, ""),
    "flag: a value where there is none": (
        ["--resume=yes"],
        "--resume is 'yes', but it takes no value",
        "",
        "write --resume, or leave it out",
    ),
    "flag: a value too many": (
        ["--train.steps", "3", "4"],
        "no flag takes '4'",
        "",
        "write --NAME 4, with a name from --help",
    ),
    "flag: a word alone": (["demo.toml"], "no flag takes 'demo.toml'", "", "with a name from --help"),
    "--config without a value": (["--config"], "--config has no value", "a path was expected", ""),
    "--config followed by a flag": (["--config", "--resume"], "--config has no value", "a path was expected", ""),
    "--config empty": (["--config", ""], "--config is ''", "a path was expected", ""),
    "--out without a value": (["--resume", "--out"], "--out has no value", "a path was expected", ""),
    "--out empty": (["--out="], "--out is ''", "a path was expected", ""),
    "config: missing": (
        ["--config", "no.toml"],
        "cannot read the config no.toml",
        "No such file or directory",
        "give a TOML file, or the name of one that comes with the package: demo, demo_dictionaries, demo_sparse, ",
    ),
    "config: a directory": (
        ["--config", "used"],
        "cannot read the config used",
        "Is a directory",
        "give a TOML file, or the name of one that comes with the package: demo, demo_dictionaries, demo_sparse, ",
    ),
    "config: wrong type": (["--config", "wrong_type.toml"], "wrong_type.toml: train.steps is '5'", WORD, ""),
    "config: unknown key": (
        ["--config", "unknown_key.toml"],
        "unknown_key.toml: unknown key 'train.step'",
        "",
        "did you mean 'train.steps'?",
    ),
    "config: a name and a key of two lines": (
        ["--config", "two\nlines.toml"],
        r"two lines.toml: unknown key 'train.ste\nps'",
        "",
        "did you mean 'train.steps'?",
    ),
    "config: no TOML": (
        ["--config", "no_toml.toml"],
        "no_toml.toml is not valid TOML in UTF-8",
        "Expected '=' after a key",
        "line 1, column 7",
    ),
    "config: no UTF-8": (["--config", "latin.toml"], "latin.toml is not valid TOML in UTF-8", "can't decode byte", ""),
    "config: nested without end": (["--config", "nested.toml"], "nested.toml is not valid TOML", "recursion", ""),
    "config: thousands of digits": (["--config", "digits.toml"], "digits.toml is not valid TOML", "4300 digits", ""),
    "config: a number beyond floats": (
        ["--config", "large.toml"],
        "large.toml: sweep.learning_rates is 1000",
        "a number was expected",
        "",
    ),
}


@pytest.mark.parametrize(("argv", "found", "expected", "advice"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_told_before_anything_is_made(
    argv: list[str], found: str, expected: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line of the training, in a directory that holds no run."""
    error = refused(capsys, train_all, argv)
    for part in (found, expected, advice):
        assert part in error


def test_1_a_hub_that_does_not_answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, and how to skip the hub."""

    def no_answer(name: str, kind: str) -> None:
        raise NoAnswer("the hub did not answer (TimeoutError: https://huggingface.co, 5 s)")

    monkeypatch.setattr("jax_sae.language_model.hub.ask_hub", no_answer)
    error = refused(capsys, train_all, ["--model.path", "nobody/nothing"])
    assert "cannot load language model 'nobody/nothing'" in error and "the hub did not answer (TimeoutError" in error
    assert "run `hf download nobody/nothing` first, or set HF_HUB_OFFLINE=1 to skip the hub" in error


def test_4_more_token_ids_than_positions() -> None:
    """Where a user gives them; a text that is trained on is cut and counted."""
    lm = jax_sae.load_language_model(str(MODEL), layer=0)
    with pytest.raises(BadInput, match="text 1 has 513 tokens, but the model 512 positions: cut it"):
        lm.activations([[0], [0] * 513])
    assert lm.activations([[0] * 512])[0].shape == (512, 64)


def test_10_a_story_with_an_end_of_text_inside_keeps_every_other_token(tmp_path: Path) -> None:
    """Nothing is masked by its position, and no token is added at either end."""
    text = "The end.<|endoftext|>One day, Lily went to the river.<|endoftext|>"
    Path("texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    out = ["--out", "acts", "--layer", "2", "--model", str(MODEL), "--text-path", "texts.jsonl"]
    assert harvest.main(out) == 0
    lm = jax_sae.load_language_model(str(MODEL), layer=2)
    ids = [lm.tokenizer(part)["input_ids"] for part in text.split("<|endoftext|>")]
    end = lm.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    expected = [*ids[0], end, *ids[1], end]
    rows = open_activations("acts")[0]
    np.testing.assert_allclose(rows.read(0, len(rows)), lm.activations([expected])[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("at_a_time", [1, 300, 1000])
def test_12_rows_that_are_not_finite_are_counted_wherever_they_are(
    at_a_time: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are read at a time."""
    monkeypatch.setattr("jax_sae.activations.arrays.ROWS_AT_A_TIME", at_a_time)
    error = refused(capsys, train_all, ["--activations.path", "not_finite.npy"])
    assert "3 of 1,000 rows are not finite in float32, the first of them row 17;" in error


def test_12_a_type_on_disk_that_is_too_small_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """With the type that is large enough; the store is removed again."""
    shutil.copytree(MODEL, "large")
    weights = load_file(MODEL / "model.safetensors")
    weights["transformer.wte.weight"] *= 1e6
    save_file(weights, "large/model.safetensors")
    argv = ["--model", "large", "--layer", "0", "--text-path", "text.jsonl", "--out", "acts", "--dtype"]
    before = files()
    assert harvest.main([*argv, "float16"]) == 2 and files() == before
    error = capsys.readouterr().err.splitlines()[-1]
    message = "error: acts: a story's activations are not finite in float16; float16 ends at 65504, and one is [0-9,]+"
    assert re.fullmatch(f"{message}: use float32, bfloat16 or int8", error)
    assert harvest.main([*argv, "float32"]) == 0


def test_13_when_every_member_diverges_the_run_ends_with_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """And one line, below the progress."""
    assert train_all([*SMALL, *ON_ROWS, "--sweep.learning-rates", "1e30"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("error: ") == 1
    assert re.fullmatch(
        r"error: every member has diverged: F4 at step \d \(features 4, seed 0, learning rate 1e\+30\)\. Start a run "
        "with lower learning rates",
        error.splitlines()[-1],
    )


# Impossible sizes of a disk


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 10 kB left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))


def test_20_a_disk_too_small_for_the_checkpoints(full_disk: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first step, with what is needed and what is left."""
    error = refused(capsys, train_all, [*SMALL, *ON_ROWS])
    assert re.search(r"the run needs [\d.]+ MB of disk for 3 checkpoints, but .* has 10 kB left", error)
    assert "make room, give --out another disk, or a larger train.checkpoint_every" in error


@pytest.mark.parametrize("tokens", [[], ["--tokens", "100"], ["--tokens", str(10**15)]])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_20_a_disk_too_small_for_a_store(
    dtype: str, tokens: list[str], full_disk: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the first of several blocks; no more tokens are counted than the text has."""
    argv = ["--model", str(MODEL), "--text-path", "text.jsonl", "--out", "acts", "--dtype", dtype, *tokens]
    before = files()
    assert harvest.main(argv) == 2
    rows = 100 if "100" in tokens else 40 * 3
    half = " or half as many bytes by float16, a quarter by int8" if dtype == "float32" else ""
    needed = f"{rows * 64 * int(dtype[-2:]) // 8 / 1e6:,.1f}"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: acts: about {rows} rows of width 64 in {dtype} need {needed} MB, but the disk has 0.0 MB left; make "
        f"room, choose another disk, or write fewer tokens{half}"
    )
    assert files() == before


# The scripts as such, and --debug


@pytest.mark.long
def test_a_process_of_its_own_prints_the_same_line(tmp_path: Path) -> None:
    """And nothing else: what libraries log about it is not shown."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "train_all.py"), *OF_DEMO, "--text.path", "two_types"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: two_types: cannot be loaded as a dataset (") and done.stderr.count("\n") == 1


OF_COMMANDS: dict[str, tuple[ModuleType, list[str], str]] = {
    "a type": (
        harvest,
        ["--out", "a", "--dtype", "int4"],
        "'float32' or 'bfloat16' or 'float16' or 'int8'",
    ),
    "no number": (harvest, ["--out", "a", "--tokens", "1e6"], f"--tokens is '1e6'; {WORD}"),
    "no directory": (harvest, ["--layer", "2"], "--out is missing; it has to be given"),
    "unknown": (harvest, ["--outs", "a"], "unknown flag --outs; did you mean --out?"),
    "no tokens": (
        harvest,
        ["--out", "a", "--model", str(MODEL), "--text-path", "text.jsonl", "--tokens=0"],
        "the number of tokens to write is 0; a number above 0 was expected",
    ),
    "a file is there": (harvest, ["--out", "rows.npy"], "rows.npy cannot be made a directory"),
    "a store is there": (harvest, ["--out", "used"], "used is not empty; give the store a new directory"),
    "no layer": (export_activations, ["--model", "a", "--out", "b"], "--layer is missing"),
    "no number of a layer": (export_activations, ["--layer", "two"], f"--layer is 'two'; {WORD}"),
    "no run": (inspect, ["nowhere"], "nowhere holds no run: there is no config.json; give the directory of one"),
}


@pytest.mark.parametrize(("command", "argv", "message"), OF_COMMANDS.values(), ids=OF_COMMANDS)
def test_the_other_commands_end_in_the_same_way(
    command: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, nothing made."""
    assert message in refused(capsys, command.main, argv)


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (train, ["--model.layer", "7"]),
        (train, ["--train.steps", "abc"]),
        (harvest, ["--out", "used"]),
        (harvest, ["--out", "a", "--dtype", "int4"]),
        (export_activations, ["--layer", "two"]),
        (inspect, ["nowhere"]),
    ],
)
def test_debug_shows_the_traceback_above_the_line(
    command: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same line and the same exit code as without it."""
    line = refused(capsys, command.main, argv)
    assert command.main([*argv, "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):\n") and error.endswith(f"\n{line}")
    assert error.count("error: ") == 1


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            PermissionError(13, "Permission denied", "x"),
            "a file could not be read or written ([Errno 13] Permission de",
        ),
        (MemoryError("Unable to allocate 7 TiB"), "there is too little memory (Unable to allocate 7 TiB)"),
    ],
    ids=["file", "memory"],
)
def test_a_file_system_that_fails_ends_with_code_1(
    problem: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As does a machine without memory: neither is bad input, nor a defect of the package."""

    def fail(*arguments: Any) -> None:
        raise problem

    monkeypatch.setattr("jax_sae.run.report.write_config", fail)
    assert train_all([*SMALL, *ON_ROWS, "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
