"""N steps at once, and n steps, a signal, a new process and N - n steps, end in the same bits."""

import json
import signal
import time
from pathlib import Path

import pytest
from processes import finish, outcome, start
from running import REPOSITORY

pytestmark = pytest.mark.slow

COMMON = [
    *("--sweep.features", "8", "63", "64", "--train.warmup", "0.1", "--train.schedule", "cosine", "--train.seed", "3"),
    *("--train.steps", "500", "--train.checkpoint-every", "200", "--train.log-every", "2", "--out", "run"),
    *("--activations.held-out-tokens", "1000"),
]
TOKENS = ["--train.batch-tokens", "96", "--activations.block-tokens", "4096"]
KINDS = {
    "tokens, without first tokens and giants": [
        *(*COMMON, *TOKENS, "--activations.exclude-first-tokens", "1", "--activations.norm-limit", "115"),
    ],
    "stories, harvested": [
        *(*COMMON, "--train.batching", "story", "--activations.normalization", "story"),
        *("--activations.block-tokens", "4096", "--train.steps", "100"),
    ],
}


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_a_resumed_run_is_bit_equal(flags: list[str], beginnings: str, tmp_path: Path) -> None:
    """Stopped inside a block, by SIGTERM and then by Ctrl-C, at steps that chance decides.

    The last process compiles for itself; those before it read what the first one compiled.
    """
    flags = ["--model.path", str(REPOSITORY / "jax_sae/demo/model"), "--text.path", beginnings, *flags]
    for directory in ("straight", "stopped"):
        (tmp_path / directory).mkdir()
    finish(start(flags, tmp_path / "straight"), 0)
    stopped, steps = tmp_path / "stopped", []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        metrics = stopped / "run" / "metrics.jsonl"
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        process = start([*flags, "--resume"] if steps else flags, stopped)
        deadline = time.monotonic() + 120
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > lines + 7):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        sent = time.monotonic()
        text = finish(process, code)
        assert time.monotonic() - sent < 30 and "stopped and saved at step" in text
        steps.append(max(int(path.name) for path in (stopped / "run" / "checkpoints").iterdir()))
    assert 0 < steps[0] < steps[1] and str(steps[1]) not in flags
    finish(start([*flags, "--resume"], stopped, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled")), 0)
    assert outcome(stopped / "run") == outcome(tmp_path / "straight" / "run")
    summaries = [json.loads((tmp_path / name / "run" / "summary.json").read_text()) for name in ("straight", "stopped")]
    assert summaries[0]["members"] == summaries[1]["members"]
