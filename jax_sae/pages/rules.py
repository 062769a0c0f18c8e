"""Labels without another model: rules about tokens that say where a feature fires, found on one half of the stories.

A rule is a set of tokens on which, or after which, or a place in the story at which, the feature should fire. It is
found on the stories with even numbers, by the largest F1, and what is shown of it was counted on those with odd ones:

precision   of the tokens of which the rule says so, the part on which the feature fires
recall      of the tokens on which it fires, the part of which the rule says so

A rule that is true of nothing there is no rule.

A rule with two good numbers says when the feature fires; what it is for may be another thing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from jax_sae.pages.tally import PLACES_IN_STORY, Tally, TokenTally

LEAST_FIRED = 10
"""On the half in which rules are found; with fewer there is none."""

LEAST_F1 = 0.2
MOST_TOKENS = 6
"""That a rule names."""

COST_OF_A_TOKEN = 0.01
"""Of F1, that each token more has to bring."""

FEATURES_AT_A_TIME = 256

LEAST_SHARING = 4
"""Tokens that have a beginning or an end in common, if it is to be a rule."""


@dataclass(frozen=True)
class Rule:
    """A rule, and what it is worth on the other half of the stories."""

    text: str
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of both."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def find_rules(tally: Tally, tokens: TokenTally, words: Sequence[str]) -> list[list[Rule]]:
    """Of each feature its rules, of each form the best, by F1 on the half in which they are found.

    Args:
        tally: of a member.
        tokens: of the same text.
        words: [V], what each token id says.
    """
    V = len(words)
    find, check = slice(0, V), slice(V, 2 * V)
    names, has = properties(words)
    fired = tally.fired_at.sum(1)
    good: list[list[tuple[float, Rule]]] = [[] for _ in fired[0]]

    def add(feature: int, text: str, found: tuple[float, float], checked: tuple[float, float], cost: float = 0) -> None:
        """A rule of its true positives and the tokens that it names, on each half."""
        value = _f1(found[0], found[1], fired[0][feature]) - cost
        if value >= LEAST_F1:
            precision = checked[0] / checked[1] if checked[1] else 0.0
            recall = checked[0] / fired[1][feature] if fired[1][feature] else 0.0
            good[feature].append((value, Rule(text, precision, recall)))

    for on, seen, form in ((tally.fired_on, tokens.ids, "{}"), (tally.fired_after, tokens.before, "after {}")):
        halves = [sparse.csc_matrix(on[half]) for half in (find, check)]
        for feature in np.flatnonzero(fired[0] >= LEAST_FIRED):
            chosen = _best_tokens(halves[0], int(feature), seen[0], fired[0][feature])
            if len(chosen):
                its = [halves[i][chosen, feature].sum() for i in (0, 1)]
                of = [float(seen[i][chosen].sum()) for i in (0, 1)]
                said = form.format(" ".join(f"“{words[v]}”" for v in chosen).replace("\n", "⏎"))
                add(int(feature), said, (its[0], of[0]), (its[1], of[1]), COST_OF_A_TOKEN * (len(chosen) - 1))
    about_places, place_has = _places()
    shared = [
        (names, has, [sparse.csc_matrix(tally.fired_on[half]) for half in (find, check)], tokens.ids),
        (about_places, place_has, [sparse.csc_matrix(its) for its in tally.fired_at], tokens.places),
    ]
    enough = np.flatnonzero(fired[0] >= LEAST_FIRED)
    for texts, matrix, on_halves, seen in shared:
        named = [matrix @ its for its in seen]
        for first in range(0, len(enough), FEATURES_AT_A_TIME):
            some = enough[first : first + FEATURES_AT_A_TIME]
            hits = [np.asarray((matrix @ its[:, some]).todense()) for its in on_halves]  # [rules, features]
            best = _f1(hits[0], named[0][:, None], fired[0][some]).argmax(0)
            for j, (feature, i) in enumerate(zip(some, best, strict=True)):
                add(int(feature), texts[i], (hits[0][i, j], named[0][i]), (hits[1][i, j], named[1][i]))
    return [[rule for _, rule in sorted(its, key=lambda each: -each[0])] for its in good]


def _f1(hits: Any, named: Any, fired: Any) -> Any:
    return 2 * hits / np.maximum(named + fired, 1)


def _best_tokens(on: sparse.csc_matrix, feature: int, seen: np.ndarray, fired: float) -> np.ndarray:
    """Up to MOST_TOKENS ids whose set has the largest F1, less its cost; tried in the order of hits^2 / seen."""
    its = slice(on.indptr[feature], on.indptr[feature + 1])
    ids, hits = on.indices[its], on.data[its]
    order = np.argsort(-(hits**2) / seen[ids], kind="stable")[:MOST_TOKENS]
    n = np.arange(len(order))
    value = _f1(np.cumsum(hits[order]), np.cumsum(seen[ids[order]]), fired) - COST_OF_A_TOKEN * n
    return ids[order][: int(value.argmax()) + 1] if len(order) else order


def _places() -> tuple[list[str], sparse.csr_matrix]:
    """Rules about a token's place in its story, and which places each names."""
    last = PLACES_IN_STORY - 1
    rules = {
        "the first token of a story": [0],
        "the first four tokens of a story": [0, 1],
        "the first tenth of a story": [0, 1, 2],
        "the first half of a story": list(range(7)),
        "the second half of a story": list(range(7, last + 1)),
        "the last tenth of a story": [last],
    }
    matrix = np.zeros((len(rules), PLACES_IN_STORY))
    for i, places in enumerate(rules.values()):
        matrix[i, places] = 1
    return list(rules), sparse.csr_matrix(matrix)


def properties(words: Sequence[str]) -> tuple[list[str], sparse.csr_matrix]:
    """What tokens can have in common: names [n], and which tokens have it, [n, V]."""
    tests: dict[str, Callable[[str], bool]] = {
        "a capital at the beginning": lambda word: word.strip()[:1].isupper(),
        "capitals only": lambda word: len(word.strip()) > 1 and word.strip().isupper(),
        "digits": lambda word: word.strip().isdigit(),
        "punctuation": lambda word: bool(word.strip()) and not any(c.isalnum() for c in word),
        "a space or a line break": lambda word: bool(word) and not word.strip(),
        "the beginning of a word": lambda word: word[:1] == " " and word.strip()[:1].isalpha(),
        "the middle or end of a word": lambda word: word[:1].isalpha(),
    }
    ids: dict[str, list[int]] = {
        name: [i for i, word in enumerate(words) if test(word)] for name, test in tests.items()
    }
    for i, word in enumerate(words):
        for name in _ends(word):
            ids.setdefault(name, []).append(i)
    named = [(name, its) for name, its in ids.items() if len(its) >= LEAST_SHARING]
    rows = np.repeat(np.arange(len(named)), [len(its) for _, its in named])
    columns = np.concatenate([np.zeros(0, int), *(np.array(its, int) for _, its in named)])
    return [name for name, _ in named], sparse.csr_matrix(
        (np.ones(len(rows)), (rows, columns)), (len(named), len(words))
    )


def _ends(word: str) -> Iterator[str]:
    """The beginnings and ends of a word, as names of what it has in common with others."""
    bare = word.strip().lower()
    if bare.isalpha():
        for n in range(1, min(5, len(bare))):
            yield f"begins with “{bare[:n]}”"
            yield f"ends with “{bare[-n:]}”"
