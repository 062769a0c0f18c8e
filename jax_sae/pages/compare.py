"""A run -> one page on its members beside each other: which is how sparse and how good, and which features they share.

Members that write the same places are compared: by directions, and where the run read a text, by firing on the same
tokens of it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.analysis.evaluation import stabilities
from jax_sae.analysis.meta_structure import FRACTION, K, MetaStructure, meta_structure
from jax_sae.config import Config
from jax_sae.errors import BadInput
from jax_sae.figures.colours import line_looks
from jax_sae.language_model.hub import read_json
from jax_sae.pages.blocks import block, whole_numbers
from jax_sae.pages.files import COMPARISON, FEATURES, Pages, prepared
from jax_sae.pages.make import directions, member_named, with_text, words_of
from jax_sae.pages.member import ranks
from jax_sae.pages.neighbours import firing_match, nearest, unit_rows
from jax_sae.pages.reading import Reading, read
from jax_sae.pages.rules import find_rules
from jax_sae.run.opened import config_of, load_members, open_inputs, read_facts
from jax_sae.run.saved_checkpoints import Tree
from jax_sae.streams import say
from jax_sae.sweep.members import placement_labels
from jax_sae.trained import TrainedAutoencoder

TOKENS = 50_000
MOST_TOGETHER = 8192
"""Features of members that write the same places; with more, firing together is not counted."""

MOST_IN_ONE_FILE = 300_000
"""Matches, a feature of one member in another."""


@dataclass(frozen=True, eq=False)
class _Compared:
    """What is known of a member."""

    name: str
    sae: TrainedAutoencoder
    unit: np.ndarray
    """[F, D], its directions at norm 1."""
    labels: Sequence[str]
    density: np.ndarray
    """[F] float32, of the tokens; NaN where there was no text."""
    meta: MetaStructure | None

    @property
    def is_there(self) -> np.ndarray:
        """[F], whether a feature fired; without a text, whether it has a direction."""
        return np.any(self.unit, axis=1) if np.isnan(self.density).all() else self.density > 0


def compare_members(
    run: str | Path,
    members: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    step: int | None = None,
    tokens: int | None = None,
) -> Path:
    """Write a page on a run's members beside each other; open the file that is returned with a browser.

    Args:
        run: the run's directory; training may be going on in it.
        members: their names, at least two; none: all of the run.
        out: a directory for the page; without it `compare` in the run's, where it replaces the one of before.
        step: of the checkpoint; the newest if None.
        tokens: whole stories of the held-out text up to this number are read; 50,000, or all there are, if None. A run
            on activations from files is compared by directions alone.

    Returns:
        The path of `index.html`: all there is with few features, else beside files that it loads.

    Raises:
        BadInput: if there is no such run, step or member, fewer than two members, the language model, its tokenizer or
            the text is not there or not the one of the run, or the page cannot be written there.
    """
    run = Path(os.path.expanduser(run))
    facts, suffix = read_facts(run, step)
    config = config_of(run, facts)
    if tokens is not None and tokens < 1:
        raise BadInput(f"the number of tokens is {tokens}; one above 0 was expected")
    every = load_members(run, config, facts)
    chosen = {name: member_named(run, every, name) for name in members or every}
    if len(chosen) < 2:
        raise BadInput(f"{run}: {next(iter(chosen))} alone is nothing to compare; name two members or more")
    source: Any
    source, _ = open_inputs(str(run), config, facts, None)
    directory = prepared(run / "compare" if out is None else Path(os.path.expanduser(out)), COMPARISON)
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, sae in chosen.items():
        alike.setdefault(tuple(sae.writes), []).append(name)
    groups = [
        names
        for names in alike.values()
        if len(names) > 1 and sum(chosen[name].features for name in names) <= MOST_TOGETHER
    ]
    reading = None
    try:
        source = with_text(run, config, source)
    except BadInput as error:
        say([f"note          {error}: members are compared by directions alone"])
    else:
        features = sum(sae.features for sae in chosen.values())
        say([f"reading       {source.name}, for {features:,} features at once"])
        reading = read(source, chosen, TOKENS if tokens is None else tokens, groups)
    say([f"directions    a small dictionary on those of each of {len(chosen)} members"])
    compared = {name: _look(name, sae, reading, source) for name, sae in chosen.items()}
    file, beside = _write(run, directory, facts, suffix, config, source.name, compared, alike, groups, reading)
    files = f", and {beside} files beside it that it loads" if beside else ", which is all there is"
    say([f"written       {file}{files}"])
    return file


def _look(name: str, sae: TrainedAutoencoder, reading: Reading | None, source: Any) -> _Compared:
    written = directions(sae)
    labels, density = [""] * sae.features, np.full(sae.features, np.nan, np.float32)
    if reading is not None:
        tally = reading.members[name].tally
        words = words_of(source, np.flatnonzero(reading.tokens.ids.sum(0)))
        labels = [rules[0].text if rules else "" for rules in find_rules(tally, reading.tokens, words)]
        density = (tally.fired / reading.n_tokens).astype(np.float32)
    return _Compared(name, sae, unit_rows(written), labels, density, meta_structure(written))


def _write(
    run: Path,
    directory: Path,
    facts: Tree,
    suffix: str,
    config: Config,
    text: str,
    compared: Mapping[str, _Compared],
    alike: Mapping[tuple[str, ...], Sequence[str]],
    groups: Sequence[Sequence[str]],
    reading: Reading | None,
) -> tuple[Path, int]:
    group_of = {name: names for names in alike.values() for name in names}
    matches = sum(its.sae.features * (len(group_of[name]) - 1) for name, its in compared.items())
    pages = Pages(directory, matches <= MOST_IN_ONE_FILE, COMPARISON)
    measured = _measured(run, facts["step"], suffix)
    labels = placement_labels([its.sae.member for its in compared.values()])
    lines = {
        label: line_looks(
            [(its.sae.kind, its.sae.features) for its, at in zip(compared.values(), labels, strict=True) if at == label]
        )
        for label in labels
    }
    described = []
    for number, (name, its) in enumerate(compared.items()):
        look = lines[labels[number]][its.sae.kind, its.sae.features]
        others = [other for other in group_of[name] if other != name]
        by_direction = [nearest(its.unit, compared[other].unit, 1) for other in others]
        there = its.is_there
        numbers = {key: getattr(its.sae.origin, key, None) for key in ("l0", "fvu")} | measured.get(name, {})
        meta = its.meta
        columns = {"density": its.density, "there": there.astype(np.uint8), "rank": ranks(its.labels)}
        described.append(
            {
                "name": name,
                "kind": its.sae.kind,
                "features": its.sae.features,
                "placement": labels[number],
                "colour": look.colour,
                "marker": look.marker,
                **numbers,
                "never": int((~there).sum()),
                "others": others,
                "alike": [float(found.likeness[there, 0].mean()) if there.any() else None for found in by_direction],
                "meta": None
                if meta is None
                else {"explained": meta.explained, "random": meta.random_explained, "l0": meta.l0},
                "table": pages.add(f"{number}-table", block({"labels": its.labels}, **columns)),
                "matches": pages.add(f"{number}-0", _matches(its, others, by_direction, compared, groups, reading)),
                "parts": pages.add(f"{number}-meta", _parts(meta)) if meta is not None else None,
            }
        )
    feature_pages = run / "pages" / "index.html"
    has_pages = feature_pages.is_file() and FEATURES.mark in feature_pages.read_text(errors="replace")[:400]
    return pages.finish(
        {
            "title": f"Members of {run.resolve().name}",
            "run": str(run),
            "step": facts["step"],
            "tokens": None if reading is None else reading.n_tokens,
            "text": text,
            "pages": os.path.relpath(feature_pages, directory) if has_pages else None,
            "counted": [name for names in groups for name in names] if reading is not None else [],
            "stability": stabilities({name: its.sae for name, its in compared.items()}, facts),
            "meta": {"fraction": FRACTION, "k": K},
            "random": _random_match(compared),
            "model": config.model.path,
            "version": version("jax_sae"),
            "members": described,
        }
    )


def _matches(
    its: _Compared,
    others: Sequence[str],
    by_direction: Sequence[Any],
    compared: Mapping[str, _Compared],
    groups: Sequence[Sequence[str]],
    reading: Reading | None,
) -> str:
    """Of each feature the best one in each other member: [others * F] of each, those of one member after the other."""
    nothing = np.zeros(0, np.int32)
    directed = np.concatenate([nothing, *(found.feature[:, 0] for found in by_direction)])
    cosine = np.concatenate([nothing, *(found.likeness[:, 0] for found in by_direction)])
    arrays = {"feature": whole_numbers(directed), "cosine": np.round(cosine, 3).astype(np.float32)}
    for group, together in zip(groups, () if reading is None else reading.together, strict=False):
        if its.name not in group:
            continue
        assert reading is not None
        ends = np.cumsum([compared[name].sae.features for name in group])
        rows = {name: slice(end - compared[name].sae.features, end) for name, end in zip(group, ends, strict=True)}
        fired = {name: reading.members[name].tally.fired for name in group}
        firing = [
            firing_match(together.of(rows[its.name], rows[o]), fired[its.name], fired[o], reading.n_tokens)
            for o in others
        ]
        arrays["fires"] = (np.concatenate([found.feature[:, 0] for found in firing]) + 1).astype(np.uint32)
        arrays["phi"] = np.round(np.concatenate([found.likeness[:, 0] for found in firing]), 3).astype(np.float32)
    return block({}, **arrays)


def _parts(meta: MetaStructure) -> str:
    """The meta-features that are active on most directions first."""
    order = np.argsort(-meta.used, kind="stable")
    return block(
        {"columns": meta.largest.shape[1]},
        used=whole_numbers(meta.used[order]),
        feature=(meta.largest[order] + 1).astype(np.uint32).ravel(),
        value=np.round(meta.value[order], 3).astype(np.float32).ravel(),
    )


def _measured(run: Path, step: int, suffix: str) -> dict[str, dict[str, Any]]:
    """What an evaluation at this step, or the summary at the end, says of members."""
    keys = ("l0", "fvu", "ce_loss_score_zero_ablation")
    found: dict[str, dict[str, Any]] = {}
    for file in (run / "summary.json", run / f"evaluation{suffix}.json"):
        content = read_json(file) if file.is_file() else {}
        for member in content.get("members", ()):
            if content.get("step", member.get("steps")) == step:
                its = {key: member[key] for key in keys if member.get(key) is not None}
                pca = ((member.get("baselines") or {}).get("pca_l0") or {}).get("fvu")
                found[member["name"]] = found.get(member["name"], {}) | its | ({} if pca is None else {"pca_fvu": pca})
    return found


def _random_match(compared: Mapping[str, _Compared]) -> dict[str, float]:
    """By member, the mean cosine of random directions with the best of as many random ones as it has features."""
    rng, found = np.random.default_rng(0), {}
    for name, its in compared.items():
        some, among = (unit_rows(rng.standard_normal((n, its.unit.shape[1]))) for n in (256, its.sae.features))
        found[name] = float(nearest(some, among, 1).likeness.mean())
    return found
