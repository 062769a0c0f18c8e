"""Time of feature pages: 1,000 features over 200,000 tokens, 18 members beside one, and what a browser takes.

    jax-sae train --config demo_sparse --out runs/demo_sparse
    python benchmarks/pages.py --run runs/demo_sparse --out /tmp/pages

The embedded model and its training text. The 1,000 features are topk's after a few steps, since what they have learned
does not matter to the time; the eighteen members are trained, since how many of their features are active does.
Processor time is given too, since it tells more than the clock on a busy machine. With a Chromium on the path
(tests/browser.py) the page is opened in it.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

import jax_sae
from jax_sae.activations.sources import open_sources
from jax_sae.commands.process import run_script
from jax_sae.pages.reading import read

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

TOKENS = 200_000
MEMBER = "batchtopk-F256-k8"
"""Beside which all of them are put."""

SORT = """(async () => {
  const F = 100000, random = () => Float32Array.from({ length: F }, Math.random);
  state.member = { ...facts.members[0], name: "many", features: F, seeds: [] };
  state.table = { density: random(), maximum: random(), mean: random(), norm: random(), match: random(), f1: random(),
    labels: Array.from({ length: F }, (_, f) => `label ${f % 977}`), given: {},
    rank: Float32Array.from({ length: F }, (_, f) => f % 977), outputs: Array.from({ length: F }, () => []) };
  await refresh();
  const times = [];
  for (const key of ["density", "maximum", "label", "index", "f1", "mean"]) {
    const begun = performance.now();
    sortBy(key);
    times.push(`${key} ${(performance.now() - begun).toFixed(0)}`);
  }
  return times.join(", ");
})()"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure feature pages."""

    run: Path
    """A run of demo_sparse that is finished."""
    out: Path
    """A new directory, for a run and its pages."""


@contextmanager
def measured(what: str) -> Iterator[list[float]]:
    """Print the time of a block; the list gets its seconds of processor time."""
    begun, processor = time.perf_counter(), time.process_time()
    found: list[float] = []
    yield found
    found.append(time.process_time() - processor)
    print(f"{what}: {time.perf_counter() - begun:.1f} s, {found[0]:.1f} s of processor time", flush=True)


def in_browser(page: Path) -> None:
    """First paint, and sorts of 100,000 rows."""
    from browser import browser, chromium

    if chromium() is None:
        print("no Chromium: not opened")
        return
    with browser() as found:
        found.look(1280, 900)
        for _ in range(3):
            found.open(page)
            found.wait("performance.getEntriesByName('first-contentful-paint').length")
            paint = found.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            ready = found.run("performance.now()")
            print(f"first paint after {paint:.0f} ms; its rows were there after {ready:.0f} ms at the latest")
        for _ in range(3):
            print(f"100,000 rows sorted and shown, ms: {found.run(SORT)}")
        print(f"complaints: {found.complaints}")


def main(options: Options) -> None:
    """Measure, and print."""
    small = {"steps": 30, "batch_tokens": 512, "log_every": 30, "quiet": True}
    wide = options.out / "wide"
    jax_sae.train("demo_sparse", out=wide, kinds=["topk"], features=1000, k=[16], **small)
    with measured("1,000 features, 200,000 tokens, all of it"):
        page = jax_sae.feature_pages(wide, tokens=TOKENS, training_text=True)
    with measured("the same again, compiled"):
        page = jax_sae.feature_pages(wide, tokens=TOKENS, training_text=True)
    for file in page.parent.iterdir():
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
    in_browser(page)
    run = jax_sae.open_run(options.run)
    source, _, _ = open_sources(run.config)
    members = {name: run[name] for name in run}
    read(source, members, TOKENS)  # compiles
    for _ in range(3):
        with measured(f"the pass for {MEMBER}") as one:
            read(source, {MEMBER: members[MEMBER]}, TOKENS)
        with measured(f"the pass for {len(members)} members") as all_of_them:
            read(source, members, TOKENS)
        print(f"{len(members)} members / one: {all_of_them[0] / one[0]:.2f} in processor time")


if __name__ == "__main__":
    options = tyro.cli(Options)
    sys.exit(run_script([], lambda: main(options) or 0))
