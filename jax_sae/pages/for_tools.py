"""What a pass over a text tells of features -> the files of Neuronpedia, and those of circuit-tracer's graphs.

Both take what the pages show: the largest examples and samples of each fifth of the sizes, with the feature's values on
the tokens around them, how often it fires, and the tokens that it raises and lowers.
"""

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.formats.conventions import hook_name
from jax_sae.formats.dictionary import Tool
from jax_sae.formats.folder import check_new_folder, new_folder
from jax_sae.formats.of_trained import public_name
from jax_sae.language_model.places import when
from jax_sae.pages.examples import INTERVALS, LEFT, interval_edges
from jax_sae.pages.lens import Lens
from jax_sae.pages.make import TOKENS, directions, lenses_of, member_named, with_text, words_of
from jax_sae.pages.member import shown_examples
from jax_sae.pages.neighbours import NEAREST, Neighbours, nearest, unit_rows
from jax_sae.pages.reading import Seen, read, token_ids_of
from jax_sae.pages.tally import BARS, bar_edges
from jax_sae.run.opened import config_of, load_members, open_inputs, read_facts
from jax_sae.streams import say
from jax_sae.trained import TrainedAutoencoder

CREATOR = "clkht01d40000jv08hvalcvly"
"""Who made something, where Neuronpedia runs at home: the id that it begins with."""

FEATURES_IN_A_FILE = 1024
DIGITS = 5
"""Of values, after the point or in all, whichever is more."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What the pass tells of a member."""

    name: str
    sae: TrainedAutoencoder
    layer: int
    """The block in which it writes."""
    seen: Seen
    lens: Lens | None
    nearest: Neighbours
    directions: np.ndarray
    """[F, D], in the language model's scale."""


@dataclass(frozen=True)
class Excerpt:
    """An example as other tools show it."""

    group: int
    """0: the largest; from 1 on the fifths of the sizes, largest first."""
    tokens: list[str]
    values: list[float]
    at: int
    """The token that it is an example for, of these."""


@dataclass(frozen=True, eq=False)
class Pass:
    """A pass over a text."""

    run: Path
    model: str
    text: str
    step: int
    tokens: int
    stories: int
    members: Sequence[Looked]
    words: Sequence[str]
    token_ids: Mapping[int, np.ndarray]

    def excerpts(self, looked: Looked, f: int) -> list[Excerpt]:
        """The examples of a feature."""
        samples, found = looked.seen.examples.samples(), []
        for its in shown_examples(looked.seen, samples, self.token_ids, f):
            ids = self.token_ids[its.story]
            first, last = max(0, its.position - LEFT), min(len(ids), its.position - LEFT + len(its.window))
            values = np.asarray(its.window, np.float32)[first - (its.position - LEFT) :][: last - first]
            words = [self.words[v] for v in ids[first:last]]
            found.append(Excerpt(its.group, words, _rounded(values), its.position - first))
        return found


def feature_files(
    run: str | Path,
    members: Sequence[str],
    tool: Tool,
    to: str | Path,
    *,
    step: int | None = None,
    tokens: int | None = None,
) -> Path:
    """Write what is known of a run's features for Neuronpedia, or for circuit-tracer's graphs.

    neuronpedia: a folder `LAYER-MEMBER` for each, with release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl,
    features/batch-N.jsonl.gz and activations/batch-N.jsonl.gz, as its import takes them.
    circuit_tracer_features: features/index.json.gz and features/layer_N.bin, to stand beside transcoders on the hub.

    Args:
        run: the run's directory; training may be going on in it.
        members: their names; none: all of the run. Of circuit_tracer_features one a layer.
        tool: whose files.
        to: a folder that is empty, or not there yet; it is written as a whole or not at all.
        step: of the checkpoint; the newest if None.
        tokens: whole held-out stories up to this number are read; 200,000, or all there are, if None.

    Returns:
        The folder.

    Raises:
        BadInput: if there is no such run, step or member, a member writes several places or one outside of a block, it
            normalised each story by itself, the run read activations of which no text is known, or the language model
            or the text is not there or not the one of the run.
        RunFailed: if a file cannot be written.
    """
    if tool not in get_args(Tool):
        raise BadInput(f"the tool is {tool!r}; one of {', '.join(get_args(Tool))} was expected")
    if tokens is not None and tokens < 1:
        raise BadInput(f"the number of tokens is {tokens}; one above 0 was expected")
    folder = Path(os.path.expanduser(to))
    check_new_folder(folder)
    found = _look(Path(os.path.expanduser(run)), members, step, TOKENS if tokens is None else tokens)
    layers = [looked.layer for looked in found.members]
    if tool == "circuit_tracer_features" and len(set(layers)) < len(layers):
        raise BadInput(f"there are members of layers {', '.join(map(str, layers))}; circuit-tracer takes one a layer")
    with new_folder(folder) as partial:
        if tool == "neuronpedia":
            for looked in found.members:
                _for_neuronpedia(found, looked, partial)
        else:
            _for_circuit_tracer(found, partial / "features")
    say([f"written       {folder}: {sum(looked.sae.features for looked in found.members):,} features"])
    return folder


def _look(run: Path, names: Sequence[str], step: int | None, n_tokens: int) -> Pass:
    """Read the held-out text for these members."""
    facts, _ = read_facts(run, step)
    config = config_of(run, facts)
    every = load_members(run, config, facts)
    chosen = {name: member_named(run, every, name) for name in names or every}
    layers = {name: _layer_of(sae) for name, sae in chosen.items()}
    source = with_text(run, config, open_inputs(str(run), config, facts, None)[0])
    say([f"reading       {source.name}, for {sum(sae.features for sae in chosen.values()):,} features at once"])
    reading = read(source, chosen, n_tokens)
    wanted: set[int] = set()
    for its in reading.members.values():
        wanted |= set(np.unique(its.examples.largest.story)) | set(np.unique(its.examples.samples().story))
    found = []
    for name, sae in chosen.items():
        written = directions(sae)
        lenses = lenses_of(source, sae.writes, written, is_read=False)
        units = unit_rows(written)
        alike = nearest(units, units, NEAREST, is_itself=True)
        found.append(
            Looked(name, sae, layers[name], reading.members[name], next(iter(lenses.values()), None), alike, written)
        )
    token_ids = token_ids_of(source, n_tokens, wanted - {-1})
    said = [np.concatenate([np.zeros(0, int), *token_ids.values()])]
    said += [np.stack([its.lens.raised, its.lens.lowered]).ravel() for its in found if its.lens is not None]
    words = words_of(source, np.unique(np.concatenate(said)))
    model, text = public_name(config.model.path), public_name(config.activations.path or config.text.path)
    return Pass(run, model, text, facts["step"], reading.n_tokens, reading.n_stories, found, words, token_ids)


def _layer_of(sae: TrainedAutoencoder) -> int:
    """The block in which a member writes.

    Raises:
        BadInput: if that is not one, or what it writes has a scale for each story.
    """
    at = when(sae.writes[0]) if len(sae.writes) == 1 else None
    if at is None or not 0 <= at[0] < 1e9:
        where = ", ".join(sae.writes) if any(sae.writes) else "at a place that the run does not know"
        raise BadInput(f"{sae.name} writes {where}; these files are of features that write one place within a block")
    if sae.per_story:
        raise BadInput(f"{sae.name} normalised each story by itself, so its features have no direction of one length")
    return int(at[0])


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in np.asarray(values, np.float64).ravel()]


def _bars(looked: Looked, f: int) -> tuple[list[float], list[int]]:
    """The middles of the histogram's bars between the first and the last that are not empty, and their heights."""
    counts, edges = looked.seen.tally.histogram[f], bar_edges().astype(np.float64)
    some = np.flatnonzero(counts)
    if not len(some):
        return [], []
    its = slice(some[0], some[-1] + 1)
    middles = (edges[:-1] + edges[1:])[:BARS] / 2
    return _rounded(middles[its]), counts[its].tolist()


def _part_between(looked: Looked, f: int, low: float, high: float, tokens: int) -> float:
    """The part of all tokens on which a feature has a value between two, by its histogram, whose bars are even."""
    edges, counts = bar_edges().astype(np.float64), looked.seen.tally.histogram[f]
    below = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(high, edges, below) - np.interp(low, edges, below)) / tokens


def _for_neuronpedia(found: Pass, looked: Looked, folder: Path) -> None:
    """A source: its own folder."""
    model, name = _slug(found.model.rpartition("/")[2]), _slug(looked.name)
    source, release = f"{looked.layer}-{name}", _slug(found.run.resolve().name)
    now, sae = datetime.now(UTC).isoformat(timespec="seconds"), looked.sae
    made = {"creatorId": CREATOR, "createdAt": now}
    described = f"{sae.kind}, {sae.features:,} features, {', '.join(sae.writes)}, by jax_sae {version('jax_sae')}"
    records: dict[str, dict[str, Any]] = {
        "release": {"name": release, "description": f"The run {release}", "creatorName": "jax_sae", "urls": [], **made},
        "model": {
            **{"id": model, "instruct": False, "displayNameShort": model, "displayName": model},
            **{"owner": found.model.rpartition("/")[0], "updatedAt": now, **made},
        },
        "sourceset": {
            **{"modelId": model, "name": name, "description": described, "releaseName": release},
            **{"creatorName": "jax_sae", "visibility": "PUBLIC", **made},
        },
        "source": {
            **{"modelId": model, "setName": name, "id": source, "visibility": "PUBLIC", "dataset": found.text},
            **{"num_prompts": found.stories, "notes": f"{looked.name} at step {found.step}", **made},
        },
    }
    (folder / source).mkdir()
    for kind, record in records.items():
        (folder / source / f"{kind}.jsonl").write_text(json.dumps(record) + "\n")
    belongs = {"modelId": model, "layer": source, **made}
    for number, first in enumerate(range(0, sae.features, FEATURES_IN_A_FILE)):
        features, activations = [], []
        for f in range(first, min(first + FEATURES_IN_A_FILE, sae.features)):
            excerpts = found.excerpts(looked, f)
            features.append({**belongs, "index": str(f), "sourceSetName": name, **_feature(found, looked, f)})
            for i, its in enumerate(excerpts):
                key = f"{found.run.resolve()} {source} {f} {i}"
                more = _activation(found, looked, f, its)
                activations.append({**belongs, "id": _cuid(key), "index": str(f), **more})
        for kind, lines in (("features", features), ("activations", activations)):
            (folder / source / kind).mkdir(exist_ok=True)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / source / kind / f"batch-{number}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 5, mtime=0))


def _feature(found: Pass, looked: Looked, f: int) -> dict[str, Any]:
    """The fields of Neuronpedia's feature that say what it is."""
    maximum, middles = float(looked.seen.examples.maximum[f]), _bars(looked, f)
    lens, near = looked.lens, looked.nearest.feature[f] >= 0
    logits: dict[str, Any] = {"pos_str": [], "pos_values": [], "neg_str": [], "neg_values": []}
    if lens is not None:
        for sign, ids, by in (("pos", lens.raised, lens.raised_by), ("neg", lens.lowered, lens.lowered_by)):
            logits |= {f"{sign}_str": [found.words[v] for v in ids[f]], f"{sign}_values": _rounded(by[f])}
    return {
        "maxActApprox": maximum,
        "hasVector": True,
        "vector": _rounded(looked.directions[f]),
        "vectorDefaultSteerStrength": maximum,
        "hookName": hook_name(looked.sae.writes),
        "topkCosSimIndices": looked.nearest.feature[f][near].tolist(),
        "topkCosSimValues": _rounded(looked.nearest.likeness[f][near]),
        **logits,
        "frac_nonzero": float(looked.seen.tally.fired[f] / found.tokens),
        "freq_hist_data_bar_values": middles[0],
        "freq_hist_data_bar_heights": middles[1],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "decoder_weights_dist": [],
    }


def _activation(found: Pass, looked: Looked, f: int, its: Excerpt) -> dict[str, Any]:
    """The fields of Neuronpedia's activation; -1 stands for no interval, among the largest."""
    low, high = _interval(looked, f, its.group)
    contains = _part_between(looked, f, low, high, found.tokens) if its.group else -1
    largest = int(np.argmax(its.values))
    return {
        "tokens": its.tokens,
        "values": its.values,
        "maxValue": its.values[largest],
        "maxValueTokenIndex": largest,
        "minValue": min(its.values),
        "binMin": low if its.group else -1,
        "binMax": high if its.group else -1,
        "binContains": contains,
        "qualifyingTokenIndex": its.at,
        "dataSource": found.text,
    }


def _interval(looked: Looked, f: int, group: int) -> tuple[float, float]:
    """Between which values the samples of a group lie."""
    maximum = looked.seen.examples.maximum[f]
    edges = [float(maximum), *interval_edges(np.array([maximum or 1], np.float32))[0].tolist(), 0.0]
    return edges[max(group, 1)], edges[max(group, 1) - 1]


def _slug(name: str) -> str:
    """A name of small letters, digits and dashes, as stands in addresses there."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "unnamed"


def _cuid(key: str) -> str:
    """25 small letters and digits, the first a c, the same for the same key."""
    number, digits = int.from_bytes(hashlib.sha256(key.encode()).digest()), "0123456789abcdefghijklmnopqrstuvwxyz"
    return "c" + "".join(digits[number // 36**i % 36] for i in range(24))


def _for_circuit_tracer(found: Pass, folder: Path) -> None:
    """Of each layer its features, one after the other, each compressed by itself; and where each begins."""
    folder.mkdir()
    index: dict[str, dict[str, Any]] = {}
    for looked in found.members:
        offsets, file = [0], f"layer_{looked.layer}.bin"
        with (folder / file).open("wb") as out:
            for record in _records(found, looked):
                offsets.append(offsets[-1] + out.write(gzip.compress(json.dumps(record).encode(), 5, mtime=0)))
        index[str(looked.layer)] = {"filename": file, "offsets": offsets}
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode(), 5, mtime=0))


def _records(found: Pass, looked: Looked) -> Iterator[dict[str, Any]]:
    """The features of a layer, as circuit-tracer's graphs show them."""
    names = ["Top activations", *(f"Interval {n} of {INTERVALS}" for n in range(1, INTERVALS + 1))]
    for f in range(looked.sae.features):
        maximum, excerpts = float(looked.seen.examples.maximum[f]), found.excerpts(looked, f)
        lens = looked.lens
        quantiles = []
        for group, name in enumerate(names):
            its = [
                {
                    "tokens_acts_list": each.values,
                    "train_token_ind": each.at,
                    "is_repeated_datapoint": False,
                    "tokens": each.tokens,
                }
                for each in excerpts
                if each.group == group
            ]
            if its:
                quantiles.append({"quantile_name": name, "examples": its})
        values, heights = _bars(looked, f)
        yield {
            "transcoder_id": looked.name,
            "index": f,
            "examples_quantiles": quantiles,
            "top_logits": [] if lens is None else [found.words[v] for v in lens.raised[f]],
            "bottom_logits": [] if lens is None else [found.words[v] for v in lens.lowered[f]],
            "act_min": 0.0,
            "act_max": maximum,
            "quantile_values": values,
            "histogram": [float(height) for height in heights],
            "activation_frequency": float(looked.seen.tally.fired[f] / found.tokens),
        }
