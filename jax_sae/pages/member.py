"""What a page tells of a member: the blocks of its overview, of its features and of its stories."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from jax_sae.analysis.statistics import DENSE
from jax_sae.pages.blocks import block, whole_numbers
from jax_sae.pages.examples import INTERVALS, LEFT, RIGHT, SAMPLES, Examples, interval_edges
from jax_sae.pages.lens import Lens
from jax_sae.pages.neighbours import NEAREST, Neighbours
from jax_sae.pages.reading import CONTEXT, Reading, Seen, StoryFeatures
from jax_sae.pages.rules import Rule
from jax_sae.pages.tally import HALVES

MOST_IN_A_BLOCK = 4_500_000
"""Characters."""

FEATURES_IN_A_BLOCK = 1024
FEATURES_TO_SEARCH = 4096
TOKENS = 10
"""On which a feature fires, and after which, that are shown."""

SHOWN_SAMPLES = 5
RULES = 3
WHOLE_STORY = 512
"""Tokens of a story that are kept around an example; a shorter story is whole."""


@dataclass(frozen=True, eq=False)
class Looked:
    """All that is known of a member's F features."""

    name: str
    seen: Seen
    norms: np.ndarray
    """[F], of the directions that it writes, in the language model's scale."""
    lenses: Mapping[str, Lens]
    """Of each place that it writes and that has one."""
    sources: Mapping[str, Lens]
    """Of a transcoder, of each place that it reads and that has one: the encoder's directions among the embeddings."""
    rules: Sequence[Sequence[Rule]]
    nearest: Neighbours
    together: Neighbours | None
    matches: Mapping[str, Neighbours]
    """The best one in each other member, by that one's name."""
    seeds: frozenset[str]
    """Which of these differ from this one in nothing but the seed."""
    given: Mapping[int, str]
    """Labels from elsewhere."""

    @property
    def maximum(self) -> np.ndarray:
        """[F], the largest value of each feature; 0 if it never fires."""
        return self.seen.examples.maximum

    @property
    def best_match(self) -> np.ndarray:
        """[F], the mean cosine with the best ones of the other seeds, or without any, the best of any other member."""
        its = [found.likeness[:, 0] for name, found in self.matches.items() if name in self.seeds]
        if its:
            return np.mean(its, 0)
        others = [found.likeness[:, 0] for found in self.matches.values()]
        return np.max(others, 0) if others else np.full(len(self.norms), np.nan, np.float32)


def table_block(looked: Looked, tokens: int, words: Sequence[str]) -> str:
    """The overview: a column each.

    Of labels there is the order too, so that a browser need not compare a hundred thousand of them.
    """
    tally = looked.seen.tally
    labels = [rules[0] if rules else Rule("", 0.0, 0.0) for rules in looked.rules]
    outputs = _output_labels(looked)
    shown = [
        looked.given.get(f, rule.text or _raises(words[v] for v in raised))
        for f, (rule, raised) in enumerate(zip(labels, outputs, strict=True))
    ]
    return block(
        {"labels": [rule.text for rule in labels], "outputs": outputs, "given": looked.given},
        rank=ranks(shown),
        density=(tally.fired / tokens).astype(np.float32),
        maximum=looked.maximum,
        mean=(tally.sum / np.maximum(tally.fired, 1)).astype(np.float32),
        norm=looked.norms.astype(np.float32),
        match=looked.best_match.astype(np.float32),
        f1=np.array([rule.f1 for rule in labels], np.float32),
    )


def _output_labels(looked: Looked) -> list[list[int]]:
    """Of each feature the words that it raises far more than others, where its logits are peaked."""
    found: list[list[int]] = [[] for _ in looked.norms]
    for lens in looked.lenses.values():
        peaked = (lens.kurtosis > 2 * lens.random_kurtosis) & (lens.sd > 0)
        for f in np.flatnonzero(peaked):
            z = lens.raised_by[f] / lens.sd[f]
            found[f] = found[f] or [int(v) for v in lens.raised[f][z > 5][:3]]
    return found


def ranks(labels: Sequence[str]) -> np.ndarray:
    """The order of labels in small letters, float32; NaN where there is none."""
    _, rank = np.unique(np.array([label.lower() for label in labels], object), return_inverse=True)
    return np.where([bool(label) for label in labels], rank, np.nan).astype(np.float32)


def _raises(words: Iterable[str]) -> str:
    """An output label, as the page words it."""
    quoted = " ".join(f"“{word}”" for word in words).replace("\n", "⏎").replace("\t", "⇥")
    return f"raises {quoted}" if quoted else ""


def search_blocks(looked: Looked) -> Iterator[tuple[int, str]]:
    """(the first feature, a block): the tokens by which features are found."""
    on = _most(sparse.csc_matrix(looked.seen.tally.mass_on), TOKENS)[0]
    columns = [on, *(each for lens in looked.lenses.values() for each in (lens.raised, lens.lowered))]
    ids = np.concatenate(columns, 1)
    for first in range(0, len(ids), FEATURES_TO_SEARCH):
        some = ids[first : first + FEATURES_TO_SEARCH]
        yield first, block({"columns": some.shape[1]}, ids=(some + 1).astype(np.uint32).ravel())


def story_block(looked: Looked, texts: Sequence[StoryFeatures]) -> str:
    """Texts of one's own, then the first stories of the text that was read."""
    stories = [*texts, *looked.seen.stories]
    return block(
        {"own": len(texts), "columns": stories[0].feature.shape[1]},
        start=_starts([len(story.token_ids) for story in stories]),
        ids=whole_numbers(np.concatenate([story.token_ids for story in stories])),
        feature=whole_numbers(np.concatenate([story.feature for story in stories]).ravel()),
        value=np.concatenate([story.value for story in stories]).ravel(),
    )


def feature_blocks(
    looked: Looked, reading: Reading, token_ids: Mapping[int, np.ndarray]
) -> Iterator[tuple[int, int, str]]:
    """(the first feature, the one after the last, a block): all that a feature's page shows.

    A block has as many features as there is room for.
    """
    samples = looked.seen.examples.samples()
    records = list(_records(looked, reading))
    shown = [shown_examples(looked.seen, samples, token_ids, f) for f in range(len(records))]

    def of(first: int, last: int) -> Iterator[tuple[int, int, str]]:
        made = _feature_block(looked, first, records[first:last], shown[first:last], token_ids)
        if len(made) <= MOST_IN_A_BLOCK or last - first == 1:
            yield first, last, made
            return
        middle = (first + last) // 2
        yield from of(first, middle)
        yield from of(middle, last)

    for first in range(0, len(records), FEATURES_IN_A_BLOCK):
        yield from of(first, min(first + FEATURES_IN_A_BLOCK, len(records)))


@dataclass(frozen=True)
class Example:
    """One that is shown."""

    group: int
    """0: the largest; 1: a sample of the highest interval, and so on."""
    story: int
    position: int
    value: float
    window: np.ndarray


def shown_examples(of: Seen, samples: Examples, token_ids: Mapping[int, np.ndarray], f: int) -> list[Example]:
    """The examples of a feature, without those that are like one before: the same token after the same tokens."""
    contexts: set[tuple[int, ...]] = set()
    found: list[Example] = []
    largest = of.examples.largest
    for table in (largest, samples):
        counts = [0] * (INTERVALS + 1)
        for i in range(table.story.shape[1]):
            group = 0 if table is largest else i // SAMPLES + 1
            story, at = int(table.story[f, i]), int(table.position[f, i])
            if story < 0 or (group and counts[group] == SHOWN_SAMPLES):
                continue
            context = tuple(token_ids[story][max(0, at - CONTEXT) : at + 1].tolist())
            if context not in contexts:
                contexts.add(context)
                counts[group] += 1
                found.append(Example(group, story, at, float(table.value[f, i]), table.window(f, i)))
    return found


def _feature_block(
    looked: Looked,
    first: int,
    records: Sequence[Mapping[str, Any]],
    shown: Sequence[Sequence[Example]],
    token_ids: Mapping[int, np.ndarray],
) -> str:
    excerpts: dict[tuple[int, int], int] = {}
    examples = [(first + f, example) for f, its in enumerate(shown) for example in its]
    of_excerpt = []
    for _, example in examples:
        T = len(token_ids[example.story])
        begin = 0 if T <= WHOLE_STORY else max(0, min(example.position - WHOLE_STORY // 2, T - WHOLE_STORY))
        of_excerpt.append(excerpts.setdefault((example.story, begin), len(excerpts)))
    texts = [token_ids[story][begin : begin + WHOLE_STORY] for story, begin in excerpts]
    windows = np.array([example.window for _, example in examples], np.float32).reshape(-1, LEFT + 1 + RIGHT)
    most = np.array([looked.maximum[f] for f, _ in examples], np.float32)[:, None]
    return block(
        {"first": first, "features": records},
        start=_starts([len(its) for its in shown]),
        group=np.array([example.group for _, example in examples], np.uint8),
        excerpt=whole_numbers(np.array(of_excerpt, int)),
        position=whole_numbers(np.array([example.position for _, example in examples], int)),
        value=np.array([example.value for _, example in examples], np.float32),
        window=np.where(windows > 0, np.clip(np.rint(windows / most * 255), 1, 255), 0).astype(np.uint8).ravel(),
        excerpt_start=_starts([len(text) for text in texts]),
        excerpt_story=whole_numbers(np.array([story for story, _ in excerpts], int)),
        excerpt_first=whole_numbers(np.array([begin for _, begin in excerpts], int)),
        excerpt_ids=whole_numbers(np.concatenate([np.zeros(0, np.int32), *texts])),
    )


def _records(looked: Looked, reading: Reading) -> Iterator[dict[str, Any]]:
    tally = looked.seen.tally
    V = tally.mass_on.shape[0]
    on, mass = _most(sparse.csc_matrix(tally.mass_on), TOKENS)
    fired_on, fired_after = (
        sparse.csr_matrix(sum(sparse.csr_matrix(its)[half * V : (half + 1) * V] for half in range(HALVES)))
        for its in (tally.fired_on, tally.fired_after)
    )
    after, after_count = _most(sparse.csc_matrix(fired_after), TOKENS)
    seen, at = reading.tokens.ids.sum(0), tally.fired_at.sum(0)
    fired_on = sparse.csc_matrix(fired_on)
    edges = interval_edges(np.where(looked.maximum > 0, looked.maximum, 1))
    for f, rules in enumerate(looked.rules):
        fired, total = int(tally.fired[f]), float(tally.sum[f])
        bars = np.flatnonzero(tally.histogram[f])
        first_bar, last_bar = (bars[0], bars[-1]) if len(bars) else (0, -1)
        its_fired = fired_on[:, [f]].toarray().ravel()
        yield {
            "fired": fired,
            "dense": fired > DENSE * reading.n_tokens,
            "bars": [int(first_bar), *tally.histogram[f, first_bar : last_bar + 1].tolist()],
            "edges": edges[f],
            "rules": [[rule.text, rule.precision, rule.recall] for rule in rules[:RULES]],
            "on": [[v, m / total, its_fired[v], seen[v]] for v, m in zip(on[f], mass[f], strict=True) if v >= 0],
            "after": [[v, n / max(fired, 1)] for v, n in zip(after[f], after_count[f], strict=True) if v >= 0],
            "at_first": at[0, f] / max(fired, 1),
            "lens": {place: _of_lens(lens, f) for place, lens in looked.lenses.items()},
            "reads": {place: _of_lens(lens, f) for place, lens in looked.sources.items()},
            "nearest": _pairs(looked.nearest, f),
            "together": None if looked.together is None else _pairs(looked.together, f),
            "matches": sorted(
                ([name, *_pairs(its, f)[0], name in looked.seeds] for name, its in looked.matches.items()),
                key=lambda match: (not match[3], -match[2]),
            ),
        }


def _of_lens(lens: Lens, f: int) -> dict[str, Any]:
    return {
        "up": list(zip(lens.raised[f], lens.raised_by[f], strict=True)),
        "down": list(zip(lens.lowered[f], lens.lowered_by[f], strict=True)),
        "sd": lens.sd[f],
        "kurtosis": lens.kurtosis[f],
    }


def _pairs(neighbours: Neighbours, f: int) -> list[list[Any]]:
    both = zip(neighbours.feature[f][:NEAREST], neighbours.likeness[f][:NEAREST], strict=True)
    return [[int(j), float(likeness)] for j, likeness in both if j >= 0]


def _most(columns: sparse.csc_matrix, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each column the rows [F, n] of its n largest entries, -1 where there are fewer, and these."""
    F = columns.shape[1]
    rows, values = np.full((F, n), -1, np.int32), np.zeros((F, n))
    for f in range(F):
        its = slice(columns.indptr[f], columns.indptr[f + 1])
        order = np.argsort(-columns.data[its], kind="stable")[:n]
        rows[f, : len(order)], values[f, : len(order)] = columns.indices[its][order], columns.data[its][order]
    return rows, values


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)
