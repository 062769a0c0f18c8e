"""What a run's directory holds, and whether it is still what was saved."""

import json
from pathlib import Path
from typing import Any

from jax_sae.activations.places import Place, described
from jax_sae.language_model.hub import read_json
from jax_sae.run.checkpoints import Checkpoints
from jax_sae.run.directory import refuse_no_run
from jax_sae.run.report import table
from jax_sae.run.saved_checkpoints import Damaged, Tree


def inspect_run(run: Path, *, verify: bool) -> tuple[list[str], bool]:
    """Describe a run: its members with their last losses, and its checkpoints. Changes nothing.

    Args:
        run: the run's directory; training may be going on in it.
        verify: read every array of every checkpoint and compare it with its digest. Without it, only the JSON of each
            checkpoint is read and verified.

    Returns:
        Lines, and whether all that was read is what was saved.

    Raises:
        BadInput: if there is no run in that directory.
    """
    refuse_no_run(run)
    config = read_json(run / "config.json")
    found: list[tuple[int, Tree | None, str]] = []
    if (run / "checkpoints").is_dir():
        with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
            found = [(step, *_look(checkpoints, step, verify)) for step in checkpoints.steps()]
    good = [(step, facts) for step, facts, _ in found if facts is not None]
    steps = config.get("train", {}).get("steps")
    at = f"newest checkpoint at step {good[-1][0]:,}" if good else "no checkpoint yet"
    state = "finished" if (run / "summary.json").exists() else f"not finished, {at}"
    lines = [f"run           {run}: {steps:,} steps, {state}"]
    if good:
        facts = good[-1][1]
        if "imported" in facts:
            lines = [f"run           {run}: imported from {facts['imported']['source']}"]
        versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("jax_sae", "jax", "orbax-checkpoint"))
        lines.append(f"made with     {versions} on {facts['device']}")
        if any(place["name"] for place in facts.get("places", ())):
            lines.append(f"places        {described([Place(**place) for place in facts['places']])}")
        lines += ["", *_members(run, facts)]
    lines += ["", *table(["checkpoint", "MB", "state"], [[f"{s:,}", _megabytes(run, s), what] for s, _, what in found])]
    lines += [
        f"{path.name:10}  set aside when the run was resumed" for path in sorted(run.glob("checkpoints/*.damaged*"))
    ]
    if found and not verify:
        lines += ["", "the arrays were not read; --verify compares each with its digest"]
    return lines, len(good) == len(found)


def _look(checkpoints: Checkpoints, step: int, verify: bool) -> tuple[Tree | None, str]:
    """The JSON of a checkpoint, None if it is damaged, and what can be said of it."""
    try:
        facts = checkpoints.read_run(step)
        if not verify:
            return facts, "there"
        return facts, f"verified, {len(checkpoints.verify(step)['arrays'])} arrays"
    except Damaged as error:
        return None, f"damaged: {error.what}"


def _members(run: Path, facts: Tree) -> list[str]:
    """A table of the members; losses are those of the last line of metrics that is whole."""
    losses: dict[str, Any] = {}
    at = 0
    metrics = run / "metrics.jsonl"
    for line in reversed(metrics.read_text(errors="replace").splitlines() if metrics.exists() else []):
        try:
            content = json.loads(line)
            losses, at = content["members"], content["step"]
            break
        except (ValueError, TypeError, KeyError):  # being written just now, or cut off by the end of its process
            continue
    rows = []
    for name, member in facts["members"].items():
        loss = losses.get(name, {}).get("loss_per_element")
        diverged = facts["diverged_at_step"].get(name)
        shown = f"diverged at step {diverged}" if diverged else "-" if loss is None else f"{loss:.4g}"
        kind = member.get("kind", "relu")
        rows.append([name, kind, str(member["features"]), str(member["seed"]), f"{member['learning_rate']:g}", shown])
    return table(["member", "kind", "features", "seed", "learning rate", f"loss/element at step {at:,}"], rows)


def _megabytes(run: Path, step: int) -> str:
    return f"{sum(p.stat().st_size for p in (run / 'checkpoints' / str(step)).rglob('*') if p.is_file()) / 1e6:,.1f}"
