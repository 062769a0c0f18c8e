"""Tokens that a sweep must see until its held-out FVU is as good as it should be, for the recipe and for others.

Goals: an FVU 5 % above the PCA floor for F < D; 1e-3, and 3e-4, for F >= D. The floor is that of F directions for all
recipes: where each story is normalised by itself the decoder is told two numbers more of it, which favours those rows.

A learning rate that falls to zero at the last step makes a run of its own for each number of tokens: such a recipe is
trained at lengths from 50,000 tokens to the cap, four a decade, and the shortest that reaches a goal counts. At a
constant rate one run is looked at 20 times a decade, and the first look at which a goal is reached counts. So numbers
are too large by up to a factor of 1.78 and 1.12. A goal that some seed did not reach is reported as beyond the cap,
with the FVU that it had there.

Recipes that differ in initial values and learning rate alone are trained side by side, on the same batches.

    python benchmarks/convergence.py
    python benchmarks/convergence.py --activations acts/my_store --most-tokens 20000000
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from stepping import initial_state
from timing import ratios, report

from jax_sae.activations.batches import batch_runs, first_activations
from jax_sae.activations.normalize import estimate_dataset, identity
from jax_sae.activations.position import Position
from jax_sae.activations.sources import Source, Wrapped, open_sources
from jax_sae.commands.process import run_script
from jax_sae.config import Config, SweepConfig, validate
from jax_sae.config_tables import load_config
from jax_sae.errors import BadInput
from jax_sae.run.held_out import harvest_held_out, measure_held_out
from jax_sae.run.train import NORMALIZATION_TOKENS
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members
from jax_sae.sweep.update import update_many

CONFIGS = Path(__file__).parent.parent / "configs"
NEAR_FLOOR, SMALL_FVUS = 1.05, (1e-3, 3e-4)
FEWEST_TOKENS, LENGTHS_A_DECADE, LOOKS_A_LENGTH = 50_000, 4, 5
STORY_TOKENS = 200
"""B of the published recipe on rows, whose stories are not known: about the mean length of one."""

Curves = dict[tuple[str, int], list[tuple[int, list[float]]]]
"""Of each recipe and F: numbers of tokens, and the held-out FVU of each seed then."""


@dataclass(frozen=True)
class Recipes:
    """Recipes that share batches, schedule and Adam's decay rates: one run trains them all."""

    config: Config
    """Its `activations` and `train` count."""
    sweeps: Mapping[str, SweepConfig]
    """By the recipe's name."""


@dataclass(frozen=True, eq=False)
class Story:
    """The activations [T, D] of a story."""

    x: np.ndarray
    tokens_cut: int = 0
    tokens_excluded: int = 0

    def __len__(self) -> int:
        """Return its number of tokens."""
        return len(self.x)


@dataclass(frozen=True, eq=False)
class InMemory(Wrapped):
    """A source whose stories were harvested before: every run reads them."""

    stories: list[Story]

    def __len__(self) -> int:
        """Return the number of stories."""
        return len(self.stories)

    def read(self, items: Sequence[int]) -> list[Story]:
        """Return these stories."""
        return [self.stories[i] for i in items]

    def activations(self, items: Sequence[Story]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number in `items`, activations [T, D]) of each."""
        yield from ((i, story.x) for i, story in enumerate(items) if len(story))

    def count_tokens(self) -> tuple[int, bool]:
        """The tokens of all stories, which is exact."""
        return sum(map(len, self.stories)), True


def harvest_all(source: Source) -> InMemory:
    """Harvest a whole source."""
    stories = [Story(np.zeros((0, source.width), np.float32)) for _ in range(len(source))]
    for i, x in source.activations(source.read(range(len(source)))):
        stories[i] = Story(x.copy())
    return InMemory(source, stories)


def recipes_with_decay(config: Config, sweep: SweepConfig, steps: int) -> Recipes:
    """The recipe, and the same with torch's initial values, in a run of that many steps."""
    of_the_recipe = replace(config.sweep, features=sweep.features, seeds=sweep.seeds)
    torch = replace(of_the_recipe, initialization=("torch",), encoder_bias=(0.0,))
    return Recipes(
        replace(config, train=replace(config.train, steps=steps)),
        {"recipe": of_the_recipe, "recipe, but torch's initial values": torch},
    )


def recipes_at_constant_rates(config: Config, published: Config, sweep: SweepConfig) -> list[Recipes]:
    """The published recipe and the same at a higher rate; shuffled tokens at that rate, from both initial values.

    Args:
        config: of the recipe; its source, B and orthogonal initialisation are used.
        published: the config of the published recipe.
        sweep: its features and seeds are used.
    """
    torch = replace(published.sweep, features=sweep.features, seeds=sweep.seeds)
    faster = replace(torch, learning_rates=(1e-3,))
    orthogonal = replace(config.sweep, features=sweep.features, seeds=sweep.seeds, learning_rates=(1e-3,))
    activations, train = published.activations, published.train
    shuffled = replace(train, batching="tokens", batch_tokens=config.train.batch_tokens)
    what, story = "published", "a story a step"
    if config.activations.path:
        activations, train = config.activations, replace(shuffled, batch_tokens=STORY_TOKENS)
        what, story = "nearly published", f"{STORY_TOKENS} shuffled rows a step"
    return [
        Recipes(
            replace(config, activations=activations, train=train),
            {f"{what}: torch's initial values, 1e-5, {story}": torch, f"{what}, but 1e-3": faster},
        ),
        Recipes(
            replace(config, train=shuffled),
            {
                "constant 1e-3, torch's initial values": faster,
                "constant 1e-3, the recipe's initial values": orthogonal,
            },
        ),
    ]


def train(recipes: Recipes, source: Source, held_out_source: Source, looks: Sequence[int]) -> Curves:
    """Train all recipes until the last look; held-out FVUs at the first step that reaches each number of tokens."""
    config = recipes.config
    normalization = identity(source.width)
    if config.activations.normalization == "dataset":
        seed = config.train.seed if config.train.batching == "tokens" else None
        normalization = estimate_dataset(np.concatenate(first_activations(source, NORMALIZATION_TOKENS, seed)))
    [held_out] = harvest_held_out(held_out_source, normalization, config.activations)
    groups = [(name, sweep, make_groups(sweep_members(sweep))) for name, sweep in recipes.sweeps.items()]
    all_groups = tuple(group for *_, of_it in groups for group in of_it)
    state, forms = initial_state(all_groups, source.width, config.train), tuple(group.form for group in all_groups)
    members = [[(name, member) for member in group.members] for name, _, of_it in groups for group in of_it]
    found: Curves = {}
    ahead, tokens, step = list(looks), 0, 0
    for run in batch_runs(source, normalization, Position(), config.activations, config.train):
        # A story is padded to a power of two: tokens of weight 0 change nothing, and few shapes have to be compiled.
        more = (1 << (run.x.shape[1] - 1).bit_length()) - run.x.shape[1] if config.train.batching == "story" else 0
        x = jax.device_put(np.pad(run.x, ((0, 0), (0, more), (0, 0))))
        weights = jax.device_put(np.pad(run.weights, ((0, 0), (0, more))))
        after = tokens + run.weights.sum(1).astype(int).cumsum()
        first = 0
        while first < len(after):
            last = min(len(after), int(np.searchsorted(after, ahead[0])) + 1)
            state, _ = update_many(state, x, weights, first, last, step, forms=forms, train=config.train)
            step += last - first
            first, tokens = last, int(after[last - 1])
            if tokens < ahead[0]:
                continue
            fvus: dict[tuple[str, int], list[float]] = {}
            for of_group, group, form in zip(members, state, forms, strict=True):
                measured = measure_held_out(group, form, [held_out], [held_out])
                for (name, member), (fvu, *_) in zip(of_group, measured, strict=True):
                    fvus.setdefault((name, member.features), []).append(fvu)
            for which, of_seeds in fvus.items():
                found.setdefault(which, []).append((tokens, of_seeds))
            ahead = [look for look in ahead if look > tokens]
            if not ahead:
                return found
    raise AssertionError("batches never end")


def tokens_to(goal: float, curve: list[tuple[int, list[float]]]) -> list[int] | None:
    """Of each seed, the tokens at the first look with an FVU of `goal` or less; None if a seed had none."""
    first = [next((tokens for tokens, of_seeds in curve if of_seeds[i] <= goal), None) for i in range(len(curve[0][1]))]
    return None if None in first else first


def main(activations: str = "", most_tokens: int = 5_000_000, seeds: tuple[int, ...] = (0, 1)) -> int:
    """Print the FVUs on the way, then the tokens to each goal.

    Args:
        activations: a store, or an .npy, .safetensors or .pt file with one array [N, D]; without it, the embedded
            language model reads its stories. Rows have no stories: the published recipe then takes 200 shuffled rows a
            step, and one normalisation for all.
        most_tokens: the cap; more than the data has are read again.
        seeds: of the initial values; the spread is that of these.
    """
    begun = time.perf_counter()
    config = load_config(CONFIGS / ("tinystories_33m.toml" if activations else "demo.toml"))
    config = replace(config, activations=replace(config.activations, path=activations))
    B = config.train.batch_tokens
    if most_tokens < max(B, FEWEST_TOKENS):
        raise BadInput(f"--most-tokens is {most_tokens}; at least {max(B, FEWEST_TOKENS)} were expected")
    source, held_out_source, lines = open_sources(config)
    D = source.width
    published = load_config(CONFIGS / "tinystories_33m_as_published.toml")
    sweep = SweepConfig(features=(100 * D // 768, D - 1, D, 1000 * D // 768), seeds=seeds)
    validate(replace(config, sweep=sweep))
    say("\n".join(lines))
    if not activations:
        source, held_out_source = harvest_all(source), harvest_all(held_out_source)
    n_lengths = 1 + int(LENGTHS_A_DECADE * np.log10(most_tokens / max(B, FEWEST_TOKENS)))
    looks = [
        round(most_tokens / 10 ** (i / LENGTHS_A_DECADE / LOOKS_A_LENGTH))
        for i in range(1 + (n_lengths - 1) * LOOKS_A_LENGTH)
    ]
    with_decay: Curves = {}
    for length in reversed(looks[::LOOKS_A_LENGTH]):
        steps = round(length / B)
        say(f"{steps * B:,} tokens, with a decay to zero")
        for which, curve in train(
            recipes_with_decay(config, sweep, steps), source, held_out_source, [steps * B]
        ).items():
            with_decay.setdefault(which, []).extend(curve)
    at_constant_rates: Curves = {}
    for recipes in recipes_at_constant_rates(config, published, sweep):
        say(f"{most_tokens:,} tokens, {'; '.join(recipes.sweeps)}")
        at_constant_rates |= train(recipes, source, held_out_source, looks[::-1])

    facts = {"activations": activations or config.model.path, "D": D, "B": B, "seeds": len(seeds), "cap": most_tokens}
    at_lengths = {which: curve[::-LOOKS_A_LENGTH][::-1] for which, curve in at_constant_rates.items()}
    report("convergence, on the way", rows_on_the_way(with_decay | at_lengths), **facts)
    print()
    [floors] = harvest_held_out(held_out_source, identity(D), replace(config.activations, normalization="none"))
    goals = [(F, f"{NEAR_FLOOR} x floor", NEAR_FLOOR * floors.fvu_floor(F)) for F in sweep.features if F < D]
    goals += [(F, f"{fvu:g}", fvu) for fvu in SMALL_FVUS for F in sweep.features if F >= D]
    reference = next(iter(at_constant_rates))[0]
    rows = goal_rows(with_decay | at_constant_rates, goals, reference, most_tokens)
    report("convergence", rows, **facts, compared_with=reference, seconds=round(time.perf_counter() - begun))
    return 0


def rows_on_the_way(curves: Curves) -> list[dict[str, Any]]:
    """A line for each recipe and number of tokens, with the FVUs of each F."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for (name, F), curve in curves.items():
        for tokens, of_seeds in curve:
            row = rows.setdefault((name, tokens), {"recipe": name, "tokens": tokens})
            row[f"FVU of F = {F}"] = one_or_all(of_seeds)
    return list(rows.values())


def goal_rows(
    curves: Curves, goals: Sequence[tuple[int, str, float]], reference: str, most_tokens: int
) -> list[dict[str, Any]]:
    """A line for each goal and recipe: tokens to the goal, and how many times fewer than `reference` needs.

    Where the reference did not reach the goal, that factor is a lower bound: the cap over the most tokens of any seed.
    """
    rows = []
    for F, what, goal in goals:
        of_reference = tokens_to(goal, curves[reference, F])
        for name in dict.fromkeys(name for name, _ in curves):
            found = tokens_to(goal, curves[name, F])
            row: dict[str, Any] = {"F": F, "goal": what, "FVU": goal, "recipe": name}
            if found is None:
                row |= {"tokens": f"> {most_tokens:,}", "FVU at the cap": one_or_all(curves[name, F][-1][1])}
            elif of_reference is None:
                row |= {"tokens": one_or_all(found), "times fewer": f"at least {most_tokens / max(found):.3g}"}
            else:
                row |= {"tokens": one_or_all(found), "times fewer": one_or_all(ratios(of_reference, found))}
            rows.append(row)
    return rows


def one_or_all(of_seeds: list[Any]) -> Any:
    """The number, where there is one seed only."""
    return of_seeds if len(of_seeds) > 1 else of_seeds[0]


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_script(sys.argv[1:], lambda: tyro.cli(main)))
