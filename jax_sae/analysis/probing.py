"""What the features of a run's members tell of labelled texts: sparse probes, beside those on raw activations and PCA.

    labelled texts ─► activations of each one's last token ─► features of each member ┐
                                       │ as they are, and along principal directions  ├─► the k columns that tell most
                                       └──────────────────────────────────────────────┘    ─► logistic regressions

The question is not whether a feature tells a label, but whether it does so better than what is there without it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_sae.activations.places import Place, columns
from jax_sae.analysis.labelled_texts import TextSet, text_sets
from jax_sae.analysis.probes import chosen, probed, split, stacked_sets
from jax_sae.analysis.steered import only_model
from jax_sae.autoencoder.baselines import add_rows, no_scatter, principal_directions
from jax_sae.errors import BadInput
from jax_sae.figures.drawing import save_each
from jax_sae.figures.probes import probe_figure
from jax_sae.language_model.harvest import harvest
from jax_sae.language_model.places import read_place, width_of
from jax_sae.language_model.pretrained import LanguageModel
from jax_sae.language_model.text import beginning, tokenize
from jax_sae.run.opened import config_of, load_members, open_inputs, read_facts
from jax_sae.run.progress import device, versions
from jax_sae.run.report import table, write_json
from jax_sae.streams import progress_bar, say
from jax_sae.trained import TrainedAutoencoder

MOST_TEXTS = 512
"""Of each label, to train on; and as many to test."""

KS = (1, 2, 5, 16)
"""Columns of a probe."""


def probe_run(
    run: Path,
    texts: Path | None = None,
    ks: Sequence[int] = KS,
    step: int | None = None,
) -> dict[str, Any]:
    """Probe every member of a run; write `probing.json` and a figure below `run`, and print tables.

    Args:
        run: the run's directory; training may be going on in it.
        texts: a file or folder of labelled texts, as `text_sets` reads them; None: those of the package sae-probes.
        ks: numbers of features that a probe may use.
        step: of the checkpoint; the newest if None.

    Returns:
        The contents of `probing.json`, as `probe_members` returns them.

    Raises:
        BadInput: if there is no such run, step or text, the language model is not the run's or it had none, it
            normalised each story by itself, or numbers of features are not above 0.
    """
    run = Path(os.path.expanduser(run))
    facts, suffix = read_facts(run, step)
    if not os.access(run, os.W_OK | os.X_OK):
        raise BadInput(f"{run} is read-only, and results are written there; copy the run, and probe the copy")
    if not ks or min(ks) < 1:
        raise BadInput(f"ks are {list(ks)}; numbers of features above 0 were expected")
    config = config_of(run, facts)
    members = load_members(run, config, facts)
    if some := next((sae for sae in members.values() if sae.per_story), None):
        raise BadInput(f"{run} normalised each story by itself, so the last token of a text alone has no {some.name}")
    sets, lines = text_sets(texts)
    _, models = open_inputs(str(run), config, facts, None)
    lm = only_model(str(run), models, "labelled texts are read by the run's own; probe a run of one")
    say(lines)
    places = tuple(dict.fromkeys(name or lm.places[0] for sae in members.values() for name in sae.reads))
    rows = [split(each.labels, MOST_TEXTS) for each in sets]
    x = last_tokens(lm, sets, rows, places)
    found = probe_members(members, sets, rows, x, tuple(sorted(set(ks))))
    record = {"step": facts["step"], "inputs": facts["inputs"], "device": device(), "versions": versions(), **found}
    file = run / f"probing{suffix}.json"
    write_json(file, record)
    say(["", *lines_of(record), "", f"written       {file}"])
    title = f"{run.resolve().name} at step {facts['step']:,}: probes of {len(sets)} sets of texts"
    say(save_each({run / "figures" / f"probing{suffix}.png": lambda: probe_figure(record, title)}))
    return record


def last_tokens(
    lm: LanguageModel,
    sets: Sequence[TextSet],
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    places: Sequence[str],
) -> dict[str, list[np.ndarray]]:
    """The activations of the last token of those texts that `rows` names: by place, of each set [texts, D].

    Texts longer than the language model reads are cut at the front, which is said. A text without tokens is refused.
    """
    (model, params), architecture = lm.whole, lm.model.architecture
    read = tuple(read_place(place, architecture, lm.model_type) for place in places)
    most, cut = architecture.max_position_embeddings, 0
    stories: list[np.ndarray] = []
    wanted = [np.concatenate(its) for its in rows]
    bos = beginning(lm.tokenizer, "auto")
    begin = [] if bos is None else [bos]
    for each, numbers in zip(sets, wanted, strict=True):
        for i, ids in zip(numbers, tokenize(lm.tokenizer, [each.texts[i] for i in numbers]), strict=True):
            if not ids:
                raise BadInput(f"text {i + 1} of {each.name}, {shortened(each.texts[i])}, has no tokens; leave it out")
            room = most - len(begin)
            cut += len(ids) > room
            stories.append(np.array(begin + ids[-room:], np.int32))
    if cut:
        say([f"note          of {cut:,} texts the last {most:,} tokens are read, as many as the model has positions"])
    widths = [width_of(place, architecture) for place in read]
    x = np.zeros((len(stories), sum(widths)), np.float32)
    with progress_bar(total=len(stories), unit=" texts", desc="texts", leave=False) as bar:
        for i, activations in harvest(model, read, params, stories):
            x[i] = activations[-1]
            bar.update(1)
    ends = np.cumsum([len(numbers) for numbers in wanted])[:-1]
    its = columns([Place(place, width) for place, width in zip(places, widths, strict=True)])
    return {place: np.split(x[:, slice(*its[place])], ends) for place in places}


def probe_members(
    members: Mapping[str, TrainedAutoencoder],
    sets: Sequence[TextSet],
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    x: Mapping[str, Sequence[np.ndarray]],
    ks: tuple[int, ...],
) -> dict[str, Any]:
    """Probe members, and what they read, on sets of labelled activations.

    Args:
        members: by their names.
        sets: names and labels.
        rows: of each set, which texts train and which test.
        x: by place, the activations of these, of each set [train and test, D].
        ks: numbers of columns, in order.

    Returns:
        `ks`, `sets` (name, labels, training and test texts), and `baselines` and `members`, lists of `name`, `reads`,
        `auc` and `accuracy`, {k: [of each set]}, `mean_auc` {k: over sets}, and `columns`, of each set the columns that
        were chosen, the best first. The baselines of what some member reads are "raw", "PCA", for which directions are
        those of all training texts, and "raw, all", a probe on all columns, whose only k is their number. Members also
        have `gain`, {k: mean AUC less that of the better of raw and PCA}, and `above_all_raw`, {k: sets in which their
        AUC is higher than with all of raw}.
    """
    only = next(iter(x)) if len(x) == 1 else ""
    of = {name: tuple(place or only for place in sae.reads) for name, sae in members.items()}
    labels, tests = [each.labels for each in sets], [np.concatenate(its) for its in rows]
    y, _, train, test = stacked_sets(labels, rows)
    S, N = y.shape

    def of_set(reads: Sequence[str], i: int) -> np.ndarray:
        """[N, D], zeros behind."""
        own = np.concatenate([x[place][i] for place in reads], -1)
        return np.pad(own, ((0, N - len(tests[i])), (0, 0)))

    found: dict[str, dict[str, Any]] = {}
    taken: list[np.ndarray] = []

    def add(name: str, reads: tuple[str, ...], columns_of: Any) -> None:
        numbers = []
        for i in range(S):
            best, its = chosen(columns_of(of_set(reads, i)), y[i], train[i], max(ks))
            taken.append(np.asarray(best))
            numbers.append([int(number) for number in np.asarray(its) if number >= 0])
        found[name] = {"name": name, "reads": list(reads), "columns": numbers}

    dense: dict[tuple[str, ...], dict[str, Any]] = {}
    for reads in dict.fromkeys(of.values()):
        at = "" if len(set(of.values())) == 1 else f" at {', '.join(reads)}"
        scatter = no_scatter(sum(x[place][0].shape[1] for place in reads))
        for i in range(S):
            scatter = add_rows(scatter, of_set(reads, i)[train[i] > 0])
        V = principal_directions(scatter)[1].astype(np.float32)
        add(f"raw{at}", reads, jnp.asarray)
        add(f"PCA{at}", reads, lambda rows, V=V: jnp.asarray(rows @ V.T))
        dense[reads] = {"name": f"raw, all{at}", "reads": list(reads)}
    with progress_bar(total=len(members), unit=" members", desc="features", leave=False) as bar:
        for name, sae in members.items():
            add(name, of[name], lambda rows, sae=sae: sae.encode(rows))
            bar.update(1)
    say([f"probes        {len(found) * S * len(ks):,} of {', '.join(map(str, ks))} columns"])
    together = probed(np.stack(taken), np.tile(np.arange(S), len(found)), y, train, test, ks=ks)
    for each, auc, right in zip(found.values(), *(_by(numbers, S) for numbers in together[:2]), strict=True):
        each |= _scores(ks, auc, right)
    for reads, each in dense.items():
        D = sum(x[place][0].shape[1] for place in reads)
        every = np.stack([np.asarray(chosen(of_set(reads, i), y[i], train[i], D)[0]) for i in range(S)])
        scores = probed(every, np.arange(S), y, train, test, ks=(D,), at_a_time=4)
        each |= _scores((D,), np.asarray(scores.auc), np.asarray(scores.accuracy))
    for name in members:
        its, (most,) = found[name], dense[of[name]]["auc"].values()
        others = [found[other]["mean_auc"] for other in found if other not in members and _same(found[other], its)]
        its["gain"] = {k: value - max(other[k] for other in others) for k, value in its["mean_auc"].items()}
        its["above_all_raw"] = {k: int(np.sum(np.array(auc) > np.array(most))) for k, auc in its["auc"].items()}
    return {
        "ks": list(ks),
        "sets": [
            {"name": each.name, "labels": list(each.names), "train": len(a), "test": len(b)}
            for each, (a, b) in zip(sets, rows, strict=True)
        ],
        "baselines": [*(its for name, its in found.items() if name not in members), *dense.values()],
        "members": [
            {**found[name], "kind": sae.kind, "l0": getattr(sae.origin, "l0", None)} for name, sae in members.items()
        ],
    }


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["reads"] == other["reads"])


def _by(numbers: Any, sets: int) -> np.ndarray:
    """[representations * sets, ks] -> [representations, sets, ks]."""
    array = np.asarray(numbers)
    return array.reshape(-1, sets, array.shape[-1])


def _scores(ks: Sequence[int], auc: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Of auc[sets, ks] and accuracies."""
    return {
        "auc": {str(k): auc[:, j].tolist() for j, k in enumerate(ks)},
        "accuracy": {str(k): right[:, j].tolist() for j, k in enumerate(ks)},
        "mean_auc": {str(k): float(auc[:, j].mean(dtype=np.float64)) for j, k in enumerate(ks)},
    }


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """The contents of `probing.json` for the screen."""
    ks = [str(k) for k in record["ks"]]
    header = ["mean AUC of probes on", *(f"k = {k}" for k in ks), *(f"gain, {k}" for k in ks), "above all of raw"]
    rows = []
    for each in [*record["baselines"], *record["members"]]:
        mean = each["mean_auc"]
        if ks[0] in mean:
            cells = [f"{mean[k]:.3f}" for k in ks]
        else:
            [(D, value)] = mean.items()
            cells = [f"{value:.3f} with {D}", *("" for _ in ks[1:])]
        gains = [f"{each['gain'][k]:+.3f}" if "gain" in each else "" for k in ks]
        above = f"{each['above_all_raw'][ks[-1]]} of {len(record['sets'])}" if "gain" in each else ""
        rows.append([each["name"], *cells, *gains, above])
    return [
        *table(header, rows),
        f"of {len(record['sets'])} sets of texts: AUC is 0.5 by chance and 1 where every text is told; gain is over "
        "the better of raw and PCA with as many columns;",
        f"above all of raw: sets in which k = {ks[-1]} tells more than a probe on every column of the activations",
    ]
