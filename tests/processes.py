"""Runs in processes of their own, and what two of them must have in common."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from running import REPOSITORY

from jax_sae.run.checkpoints import Checkpoints

TRAIN = REPOSITORY / "scripts" / "train_all.py"


def start(flags: list[str], directory: Path, script: Path = TRAIN, **environment: str) -> subprocess.Popen[str]:
    """Begin `train_all.py`, or a script like it, in a directory."""
    return subprocess.Popen(
        [sys.executable, str(script), *flags],
        cwd=directory,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    """Wait for its end, which must have this exit code; returns what it printed, errors last."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == code, out + error
    assert "Traceback" not in error
    return out + error


def outcome(run: Path) -> dict[str, Any]:
    """What bit-equal runs have in common: digests of every array, counters, position, lines of metrics.

    The newest checkpoint is read whole, so the digests are true of what lies on disk.
    """
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.step_or_newest(None)
        facts = checkpoints.read_run(step)
        checkpoints.read_state(step)
    digests = json.loads((run / "checkpoints" / str(step) / "digests" / "metadata").read_text())["arrays"]
    counters = {name: facts[name] for name in ("step", "tokens", "position", "diverged_at_step", "inputs")}
    return {"digests": digests, **counters, "metrics": (run / "metrics.jsonl").read_bytes()}
