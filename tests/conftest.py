"""What several test files use. No network: the hub is switched off before any library reads the switch.

Compiled programs are shared with the processes that tests start, in a folder that lives as long as the tests: some of
those processes compile and some read what others compiled, and both must give the same bits. Each worker of
pytest-xdist has a folder of its own, because JAX writes a program in place, where another could read half of it. After
each file of tests the workers exchange whole programs by way of pytest's own cache, where the next `pytest` finds them.

Most of the time of the fast tests goes into compiling small programs, so XLA optimises them as little as it can, unless
XLA_FLAGS says otherwise: `.ci/run` sets it to nothing for the slow tests, which run with XLA's usual optimisation.
"""

import gc
import hashlib
import os
import shutil
import signal
import tempfile
import time
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# In one part, else an operation may differ in its last bit in two programs; and without fusion emitters as long as
# XLA has that flag: it ends the process at one that it does not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
# No limit, although a run sets one: with it, JAX reads the dates of all programs whenever it adds one, and adds none
# where another process has left a program without its date.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"  # else the folder's name is part of a program's key
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # no program says of each operation where it was called
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # matrices are small, and the threads wait for one another by computing

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pyarrow
import pytest
from pyarrow import parquet
from running import REPOSITORY, never, nothing_learned

from jax_sae.commands.process import _processor
from jax_sae.config import Config
from jax_sae.config_tables import load_config
from jax_sae.language_model import harvest
from jax_sae.run.train import train

# Of what is alive when it looks, Python's garbage collector finds nearly all alive, and JAX is called each time.
gc.set_threshold(20_000, 20, 50)

FILES_KEPT = 8
files_since_then: list[int] = []

# As a terminal has them: what starts the tests in the background, or by nohup, has them ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


PROGRAMS = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
KEPT_SECONDS = 7 * 86_400
kept_programs: list[Path] = []
"""Where programs are exchanged; none if processes are killed, which may be writing one, or nothing is to be kept."""


def pytest_unconfigure() -> None:
    """Remove the compiled programs of this worker."""
    shutil.rmtree(PROGRAMS, ignore_errors=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Modules and tests stay until the end, so the garbage collector need not look at them; programs are fetched."""
    gc.freeze()
    if hasattr(session.config, "cache") and not any(item.get_closest_marker("slow") for item in session.items):
        kept = Path(session.config.cache.mkdir("programs")) / hashlib.sha256(_processor().encode()).hexdigest()[:16]
        kept.mkdir(exist_ok=True)
        kept_programs.append(kept)
        exchange_programs()


def pytest_keyboard_interrupt() -> None:
    """What was being written may be half a program."""
    kept_programs.clear()


def exchange_programs() -> None:
    """Fetch the programs that others have compiled, and give them those of this worker; old ones are forgotten."""
    for kept in kept_programs:
        there, here = ({file.name: file for file in folder.glob("*-cache")} for folder in (kept, PROGRAMS))
        for name in there.keys() - here.keys():
            if there[name].stat().st_mtime > time.time() - KEPT_SECONDS:
                (PROGRAMS / name).symlink_to(there[name])
            else:
                there[name].unlink(missing_ok=True)
        for name in here.keys() - there.keys():
            if not here[name].is_symlink():
                begun = kept / f"{name}.{os.getpid()}"
                shutil.copyfile(here[name], begun)
                begun.rename(kept / name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`pytest -n 2` gives each worker one run of files: else both compile their programs and train their runs.

    Whoever is done first takes some of those that the other one has not begun.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def beginnings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of 400 and 60 beginnings of the demo's stories, of at most 128 tokens."""
    folder = tmp_path_factory.mktemp("text") / "beginnings"
    folder.mkdir()
    for split, rows in {"train": 400, "validation": 60}.items():
        stories = parquet.read_table(REPOSITORY / "jax_sae" / "demo" / "stories" / f"{split}.parquet")["text"][:rows]
        cut = [story.as_py()[:350] for story in stories]
        parquet.write_table(pyarrow.table({"text": cut}), folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def demo_config(beginnings: str) -> Config:
    """The demo, but only 12 steps of 64 tokens of beginnings of its stories, with checkpoints at 5, 10 and 12."""
    config = load_config(REPOSITORY / "configs" / "demo.toml")
    return replace(
        config,
        text=replace(config.text, path=beginnings),
        activations=replace(config.activations, block_tokens=448, held_out_tokens=500),
        train=replace(config.train, steps=12, batch_tokens=64, warmup=0.2, checkpoint_every=5, log_every=2),
    )


@pytest.fixture(scope="session")
def demo_run(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `demo_config`."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jax_sae.figures.drawing.save_figure", empty_figure)
        assert train(demo_config, out, resume=False, stop_requested=never)
    return out


@pytest.fixture
def learning_nothing() -> Iterator[None]:
    """For a test of runs whose numbers do not matter."""
    with nothing_learned():
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_of_some_files_before_are_forgotten() -> Iterator[None]:
    """JAX keeps all that it has compiled, and the more it keeps, the slower it compiles; so not of all files.

    Files that follow one another share much: kept for some, a third less is compiled or read from the disk.
    """
    yield
    exchange_programs()
    files_since_then.append(1)
    if len(files_since_then) == FILES_KEPT:
        files_since_then.clear()
        jax.clear_caches()


@pytest.fixture(autouse=True)
def a_line_of_metrics_a_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch ends at each line of metrics, however fast the machine is, so that tests can say where a run stops."""
    monkeypatch.setattr("jax_sae.run.train.SECONDS_A_DISPATCH", 0.0)


@pytest.fixture(autouse=True, scope="session")
def few_tokens_are_enough_for_a_mean() -> Iterator[None]:
    """Half the work of a small run would go into the norms and the normalisation of 16,384 tokens.

    And a tenth into the tokens of 256 stories, which are counted whenever a text is opened.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jax_sae.run.train.NORMALIZATION_TOKENS", 2048)
        patched.setattr("jax_sae.language_model.text.STORIES_TO_COUNT", 64)
        yield


LENGTHS, TOKENS = harvest.PADDED_TO_MULTIPLES_OF, harvest.TOKENS_AT_A_TIME_ON_CPU


@pytest.fixture(autouse=True, scope="session")
def stories_are_read_in_few_shapes() -> Iterator[None]:
    """One by one, padded to 128, 256 or 512 tokens: else a third of what a small run compiles are shapes of stories."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(harvest, "PADDED_TO_MULTIPLES_OF", {128: 128})
        patched.setattr(harvest, "TOKENS_AT_A_TIME_ON_CPU", 128)
        yield


@pytest.fixture(autouse=True, scope="module")
def tests_of_reading_read_as_users_do(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several stories at a time, of about the same length."""
    with pytest.MonkeyPatch.context() as patched:
        if {"language_model", "activations"} & set(request.path.parts):
            patched.setattr(harvest, "PADDED_TO_MULTIPLES_OF", LENGTHS)
            patched.setattr(harvest, "TOKENS_AT_A_TIME_ON_CPU", TOKENS)
        yield


DRAWING = {"figures", "test_surroundings.py"}
MAKING_FIGURES = {
    "test_train.py",
    "test_places.py",
    "test_evaluation.py",
    "test_evaluate_dictionaries.py",
    "test_probing.py",
}


@pytest.fixture(autouse=True, scope="module")
def few_figures_are_made(request: pytest.FixtureRequest) -> Iterator[None]:
    """A third of the time of a small run is for pixels, which only tests of figures need, and a tenth for all else.

    Some tests of runs make the figures without painting them.
    """
    parts = set(request.path.parts)
    with pytest.MonkeyPatch.context() as patched:
        if not DRAWING & parts:
            patched.setattr("jax_sae.figures.drawing.save_figure", empty_figure)
        if not (DRAWING | MAKING_FIGURES) & parts:
            for module in ("run.report", "analysis.evaluation", "analysis.probing"):
                patched.setattr(f"jax_sae.{module}.save_each", empty_figures)
        yield


def empty_figures(figures: Mapping[Path, object]) -> list[str]:
    """Files where the figures would be, and the line that says so."""
    for file in figures:
        empty_figure(None, file)
    return [f"figures       {', '.join(map(str, figures))}"] if figures else []


def empty_figure(figure: object, file: Path) -> None:
    """Files where the figure would be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"\x89PNG")
    file.with_suffix(".svg").touch()
