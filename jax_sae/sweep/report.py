"""What a run tells: progress on the screen, metrics and summary on disk, the closing table."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_sae.config import Config, config_to_dict, sweep_members
from jax_sae.sweep.figures import draw_losses, member_colours
from jax_sae.sweep.held_out import HeldOut, held_out_fvu
from jax_sae.sweep.members import Group
from jax_sae.sweep.optimizer import relative_schedule
from jax_sae.sweep.progress import Clock, Progress, versions


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; the file is replaced as a whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def write_config(out: Path, config: Config) -> None:
    """Make the run's directory and write `config.json`: every setting, resolved, and the versions."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", {**config_to_dict(config), "versions": versions()})


class Log:
    """The progress bar, and `metrics.jsonl` with a line every `log_every` steps."""

    def __init__(self, path: Path, config: Config, groups: tuple[Group, ...], step: int) -> None:
        """Go on after `step`; lines of later steps, from before a resume, are removed."""
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
            temporary = path.with_name(path.name + ".partial")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
        self._every = config.train.log_every
        self._names = [name for group in groups for name in group.names]
        self._peaks = [member.learning_rate for group in groups for member in group.members]
        self._relative = relative_schedule(config.train)
        self._bar = tqdm(
            total=config.train.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0.05
        )
        self._file = open(path, "a")  # noqa: SIM115 - as long as the run

    def __enter__(self) -> "Log":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file and the bar."""
        self._file.close()
        self._bar.close()

    def write(self, progress: Progress, tokens_per_second: float) -> None:
        """Advance the bar; at every `log_every`-th step write a line, with losses averaged since the line before."""
        step = progress.step
        losses = progress.losses[max(0, step - self._every) : step].mean(0, dtype=np.float64)
        shown = " ".join(f"{name} {loss:.2g}" for name, loss in list(zip(self._names, losses, strict=True))[:6])
        more = f" and {len(losses) - 6} more" if len(losses) > 6 else ""
        self._bar.set_postfix_str(f"{tokens_per_second:,.0f} tokens/s, losses {shown}{more}", refresh=False)
        self._bar.update(step - self._bar.n)
        if step % self._every == 0:
            relative = float(self._relative(step - 1))
            members = {
                name: {"loss_per_element": finite_or_none(loss), "learning_rate": peak * relative}
                for name, loss, peak in zip(self._names, losses, self._peaks, strict=True)
            }
            self._file.write(json.dumps({"step": step, "tokens": progress.tokens, "members": members}) + "\n")
            self._file.flush()


def say(lines: Sequence[str]) -> None:
    """Print lines."""
    print("\n".join(lines), flush=True)


def describe(config: Config, groups: tuple[Group, ...], width: int) -> list[str]:
    """What is about to be trained."""
    train = config.train
    tokens = f"{train.batch_tokens} shuffled tokens" if train.batching == "tokens" else "one whole story"
    inside = " | ".join(" ".join(group.names) for group in groups)
    return [
        f"members       {sum(len(group.names) for group in groups)} of width {width}, groups {inside}",
        f"training      {train.steps:,} steps of {tokens}, Adam, on {jax.devices()[0].device_kind}",
    ]


def finish(
    out: Path, config: Config, groups: tuple[Group, ...], progress: Progress, held_out: HeldOut, clock: Clock
) -> None:
    """Write `summary.json` and the figures; print the closing table and how to use what was trained."""
    members = [(name, member) for group in groups for name, member in zip(group.names, group.members, strict=True)]
    in_order = [members.index(pair) for member in sweep_members(config.sweep) for pair in members if pair[1] == member]
    summary = summarize(config, groups, progress, held_out, clock)
    summary["members"] = [summary["members"][i] for i in in_order]
    write_json(out / "summary.json", summary)
    width = held_out.x.shape[1]
    draw_losses(
        out / "figures",
        [members[i][0] for i in in_order],
        member_colours([members[i][1] for i in in_order], width),
        progress.losses[:, in_order],
        [held_out.loss_floor(members[i][1].features) for i in in_order],
        f"{out.name}: reconstruction of activations of width {width}",
    )
    lines = ["", closing_table(summary["members"]), ""]
    if summary["empty_stories"] or summary["cut_stories"]:
        lines.append(
            f"stories       {summary['empty_stories']} without text were skipped; {summary['cut_stories']} longer than "
            f"the language model's positions were cut, {summary['tokens_cut']} tokens in all"
        )
    lines += [f"not finite    {m['name']}: its numbers mean nothing" for m in summary["members"] if m["non_finite"]]
    say(
        [
            *lines,
            f"harvest       {summary['harvest_tokens_per_second']:,.0f} tokens/s",
            f"training      {summary['train_tokens_per_second']:,.0f} tokens/s, all members together",
            f"figures       {out}/figures/loss.png, {out}/figures/loss_zoomed.png",
            f"use it        sae = jax_sae.load_autoencoder({str(out)!r}, name={members[in_order[-1]][0]!r}); "
            "features = sae.encode(x)",
        ]
    )


def summarize(
    config: Config, groups: tuple[Group, ...], progress: Progress, held_out: HeldOut, clock: Clock
) -> dict[str, Any]:
    """The contents of `summary.json`, with the members in the groups' order."""
    members = [(name, member) for group in groups for name, member in zip(group.names, group.members, strict=True)]
    fvus = [fvu for group in progress.state for fvu in held_out_fvu(held_out, group)]
    last = progress.losses[-max(1, config.train.steps // 100) :].mean(0, dtype=np.float64)
    found = []
    for i, (name, member) in enumerate(members):
        floor = held_out.fvu_floor(member.features)
        found.append(
            {
                "name": name,
                **asdict(member),
                "steps": progress.step,
                "tokens": progress.tokens,
                "loss_per_element": finite_or_none(last[i]),
                "fvu": finite_or_none(fvus[i]),
                "pca_floor_fvu": floor,
                "fvu_over_floor": finite_or_none(fvus[i] / floor) if floor > 0 else None,
                "non_finite": not (np.isfinite(progress.losses[:, i]).all() and np.isfinite(fvus[i])),
            }
        )
    position = progress.position
    return {
        "members": found,
        "harvest_tokens_per_second": clock.harvest_tokens / max(clock.harvest_seconds, 1e-9),
        "train_tokens_per_second": clock.train_tokens / max(clock.train_seconds, 1e-9),
        "held_out_tokens": len(held_out.x),
        "epochs": position.epoch,
        "empty_stories": position.empty_stories,
        "cut_stories": position.cut_stories,
        "tokens_cut": position.tokens_cut,
        "device": jax.devices()[0].device_kind,
    }


def closing_table(members: Sequence[dict[str, Any]]) -> str:
    """The table at the end of a run, from the members of `summary.json`."""
    header = ["member", "features", "seed", "learning rate", "loss/element", "held-out FVU", "PCA floor", "FVU/floor"]
    rows = [
        [
            member["name"],
            str(member["features"]),
            str(member["seed"]),
            f"{member['learning_rate']:g}",
            _number(member["loss_per_element"]),
            _number(member["fvu"]),
            _number(member["pca_floor_fvu"]),
            "-" if member["fvu_over_floor"] is None else f"{member['fvu_over_floor']:.3f}",
        ]
        for member in members
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return "0" if value == 0 else f"{value:.3e}" if value < 1e-3 else f"{value:.5f}"


def finite_or_none(value: float) -> float | None:
    """A number for JSON, which has no NaN and no infinity: None stands for them."""
    return float(value) if np.isfinite(value) else None
