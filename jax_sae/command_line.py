"""The command line of `scripts/train_all.py`: flags and files in, a run out, errors in one line."""

import dataclasses
import difflib
import os
import signal
import socket
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from reprlib import repr as shortened
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar

from jax_sae.config import (
    Config,
    Member,
    config_from_dict,
    config_to_dict,
    expected,
    load_config,
    option_types,
    validate,
)
from jax_sae.errors import BadInput, RunFailed
from jax_sae.language_model.hub import read_json

Options = TypeVar("Options")

MEMBER = "features=F,seed=S,learning_rate=LR"
"""How a member is written as a flag."""

STOPPING = (signal.SIGINT, signal.SIGTERM)

MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "model.path",
    "text.path",
    "text.tokenizer",
    "activations.path",
)

RUN_FILES = ("checkpoints", "metrics.jsonl", "figures", "summary.json")
"""What a run leaves, with config.json."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line apart from the settings of `Config`."""

    config: Path
    out: Path | None
    resume: bool
    settings: Config


def main(argv: Sequence[str], default_config: Path) -> int:
    """Run `train_all.py`; returns the exit code, as `run_script`, and 130 or 143 after Ctrl-C or SIGTERM.

    A first signal saves at the next step boundary and ends; a second one ends at once.
    """

    def work() -> int:
        arguments = parse(argv, default_config)
        out = choose_directory(arguments)
        config = settings_to_resume(arguments, out, argv, default_config) if arguments.resume else arguments.settings
        validate(config)
        from jax_sae.activations.interruptible import Stopped
        from jax_sae.sweep.train import train

        with Signals() as signals:
            try:
                finished = train(config, out, resume=arguments.resume, stop_requested=lambda step: signals.received > 0)
            except Stopped:
                print("stopped before training began; there was nothing to save")
                finished = False
        return 0 if finished else 128 + signals.received

    return run_script(argv, work)


def run_script(argv: Sequence[str], work: Callable[[], int]) -> int:
    """Do the work of a script, and return its exit code; what ends it badly is one line, or with --debug a traceback.

    0: done. 1: the work could not go on: a disk is full, every member diverged. 2: something given cannot be used. Any
    other exception is a defect of this package, and is raised.
    """
    keep_libraries_quiet()
    try:
        return work()
    except (BadInput, RunFailed, OSError, MemoryError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        message = str(error)
        if isinstance(error, OSError):
            message = f"a file could not be read or written ({error}); put that right, and go on with --resume"
        elif isinstance(error, MemoryError):
            message = f"there is too little memory ({error}); ask for less at a time"
        print("error:", *message.splitlines(), file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1


class Signals(AbstractContextManager["Signals"]):
    """Remembers the first SIGINT or SIGTERM within a `with` block; a second one ends the process at once.

    Python's own handler has to wait until the compiler or a dispatch returns, which may take half a minute. The
    interpreter also writes the number of each signal to a socket, at once, and a thread reads it there.
    """

    def __init__(self) -> None:
        """Nothing is heard before the `with` block."""
        self.received = 0

    def __enter__(self) -> "Signals":
        """Listen from now on."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno())
        self._before = [signal.signal(number, lambda *_: None) for number in STOPPING]
        return self

    def __exit__(self, *_: object) -> None:
        """Signals have their usual effect again."""
        for number, handler in zip(STOPPING, self._before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while number := int.from_bytes(self._reader.recv(1)):
            if number not in STOPPING:
                continue
            if self.received:
                os._exit(128 + number)
            self.received = number
            os.write(2, b"\nstopping: saving first; once more to end at once\n")


def keep_libraries_quiet() -> None:
    """Switch off what libraries print about themselves; must come before they are imported."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread that outlives a bar
    for name, value in {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)


def parse(argv: Sequence[str], default_config: Path, defaults: Config | None = None) -> Arguments:
    """Flags over `defaults`, or over those of the TOML file.

    Raises:
        BadInput: if a flag or the TOML file cannot be used.
        SystemExit: with code 0 after `--help`.
    """
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def member_rule(info: Any) -> PrimitiveConstructorSpec | None:
        if info.type is not Member:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=MEMBER,
            instance_from_str=lambda strings: parse_member(strings[0]),
            is_instance=lambda value: isinstance(value, Member),
            str_from_instance=lambda m: [f"features={m.features},seed={m.seed},learning_rate={m.learning_rate!r}"],
        )

    given = check_flags(argv)
    start = defaults or load_config(Path(given["config"][0]) if "config" in given else default_config)

    @dataclasses.dataclass(frozen=True)
    class CommandLine:
        """Train every autoencoder of a sweep at once on the activations of a language model.

        A flag overrides the TOML file of --config, and that the defaults. Exit codes: 0 finished, 1 the run could not
        go on (a full disk, every member diverged), 2 something given cannot be used, 130 or 143 stopped by Ctrl-C or
        SIGTERM after saving.
        """

        config: Path = default_config
        """TOML file with the settings of the run."""
        out: Path | None = None
        """Directory of the run; without it runs/NAME of the config, with -2, -3, ... where that is taken."""
        resume: bool = False
        """Go on from the newest checkpoint of the run in --out (or in the newest runs/NAME)."""
        debug: bool = False
        """Show the traceback of an error, above its one line."""
        settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=lambda: start)

    parsed = tyro.cli(
        CommandLine, args=list(argv), registry=registry, prog="train_all.py", config=(tyro.conf.FlagCreatePairsOff,)
    )
    return Arguments(parsed.config, parsed.out, parsed.resume, parsed.settings)


def read_options(options: type[Options], argv: Sequence[str], prog: str) -> Options:
    """The flags of a script as its dataclass, in which a field without a default has to be given.

    Raises:
        BadInput: if a flag cannot be used, or is missing.
        SystemExit: with code 0 after `--help`.
    """
    import tyro

    marks = typing.get_type_hints(options, include_extras=True)
    positional = [name for name, hint in marks.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ())]
    fields = dataclasses.fields(options)  # type: ignore[arg-type]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    values_given(argv, typing.get_type_hints(options), positional, required)
    return tyro.cli(options, args=list(argv), prog=prog, config=(tyro.conf.FlagCreatePairsOff,))


def check_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """The values that are given to each flag of `train_all.py`; errors as for `values_given`."""
    return values_given(argv, {"config": Path, "out": Path, "resume": bool, "debug": bool, **option_types()})


def values_given(
    argv: Sequence[str], types: Mapping[str, Any], positional: Sequence[str] = (), required: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Refuse in one line of our own words what tyro would refuse in a box of several; nothing where there is --help.

    Args:
        argv: `--name value ...`, `--name=value`, of a bool `--name`, and the values of `positional`.
        types: of each name: bool, int, float, str, Path, Member, a Literal, one of these or None, or a tuple of one.
        positional: names that take a value without a flag.
        required: names that have to be there.

    Returns:
        The words that were given to each name; where a flag stands twice, to the second.

    Raises:
        BadInput: if a flag does not exist, or has too few or too many values or one that is not of its type.
    """
    names = {f"--{name.replace('_', '-')}": name for name in types if name not in positional}
    given: list[tuple[str, list[str]]] = []
    takes_more = False  # whether the words that follow are values of the last flag
    if "-h" in argv or "--help" in argv:
        return {}
    for word in argv:
        if word.startswith("-") and word != "-" and not _fits(float, word):
            flag, has_value, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in names:
                nearest = difflib.get_close_matches(flag, [*names, "--help"], n=1)
                raise BadInput(f"unknown flag {flag}; " + (f"did you mean {nearest[0]}?" if nearest else "see --help"))
            given.append((names[flag], [value] if has_value else []))
            takes_more = not has_value and types[names[flag]] is not bool
        elif takes_more:
            name, words = given[-1]
            words.append(word)
            takes_more = typing.get_origin(types[name]) is tuple
        elif free := [name for name in positional if name not in dict(given)]:
            given.append((free[0], [word]))
        else:
            raise BadInput(f"no flag takes {word!r}; write --NAME {word}, with a name from --help")
    shown = {name: flag for flag, name in names.items()}
    for name, words in given:
        _check_values(shown.get(name, name), types[name], words)
    for name in required:
        if name not in dict(given):
            raise BadInput(f"{shown.get(name, name)} is missing; it has to be given, see --help")
    return dict(given)


def _check_values(flag: str, hint: Any, words: Sequence[str]) -> None:
    """Raise BadInput unless the words are as many as a flag takes, and of its type."""
    if hint is bool:
        if words:
            raise BadInput(f"{flag} is {shortened(words[0])}, but it takes no value; write {flag}, or leave it out")
        return
    many = typing.get_origin(hint) is tuple
    if many or typing.get_origin(hint) is UnionType:
        hint = typing.get_args(hint)[0]
    wanted = {Path: "a path", Member: MEMBER}.get(hint) or expected(hint)
    if not words and not many:
        raise BadInput(f"{flag} has no value; {wanted} was expected")
    for word in words:
        if not _fits(hint, word):
            raise BadInput(f"{flag} is {shortened(word)}; {wanted} was expected")


def _fits(hint: Any, word: str) -> bool:
    """Whether a word can be read as a value of a type."""
    if typing.get_origin(hint) is Literal:
        return word in typing.get_args(hint)
    if hint is Path:
        return word != ""
    try:
        (parse_member if hint is Member else hint)(word)
    except ValueError:
        return False
    return True


def parse_member(text: str) -> Member:
    """Read `features=768,seed=1,learning_rate=1e-3`; seed and learning rate may be left out.

    Raises:
        ValueError: if it is not of this form.
    """
    types = {"features": int, "seed": int, "learning_rate": float}
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        key = key.strip()
        if key not in types or key in values:
            raise ValueError(f"{key!r} is not a part of a member, or stands twice")
        values[key] = types[key](value)
    if "features" not in values:
        raise ValueError("features=F is missing")
    return Member(**values)


def choose_directory(arguments: Arguments) -> Path:
    """The directory of the run, which for a new one does not hold a run yet.

    Raises:
        BadInput: if --out holds a run, or part of one, and --resume is not given, if there is no run to resume, or if
            --out cannot be a directory.
    """
    default, out = Path("runs") / arguments.config.stem, arguments.out
    try:
        numbered = [default]
        while numbered[-1].exists():
            numbered.append(default.with_name(f"{default.name}-{len(numbered) + 1}"))
        if arguments.resume:
            runs = [path for path in (numbered if out is None else [out]) if holds_run(path)]
            if not runs:
                raise BadInput(f"{out or default} holds no run to resume; start one without --resume")
            return runs[-1]
        if out is None:
            return numbered[-1]
        if holds_run(out):
            raise BadInput(f"{out} already holds a run; go on with it by --resume, or give --out another name")
        if left := [name for name in RUN_FILES if (out / name).exists()]:
            raise BadInput(
                f"{out} holds part of a run ({', '.join(left)}), but no config.json; give --out another name, or "
                "move that away"
            )
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            problem = "is read-only" if there.is_dir() else "is a file"
            raise BadInput(f"--out {out} cannot be a run's directory: {there} {problem}; give it another name")
        return out
    except OSError as error:  # such as a name that is too long
        name = out or default
        raise BadInput(f"--out {name} cannot be a run's directory: {error.strerror}; give it another name") from error


def holds_run(directory: Path) -> bool:
    """Whether a run was started in a directory."""
    return (directory / "config.json").exists()


def settings_to_resume(arguments: Arguments, out: Path, argv: Sequence[str], default_config: Path) -> Config:
    """The settings with which the run in `out` goes on: its own, changed where flags say so and that is allowed.

    With --config on the command line the settings are those of the file and the flags, as for a new run, so that the
    command that started a run resumes it with --resume added; without, those in the run's config.json and the flags.

    Raises:
        BadInput: naming every setting that differs from the run's and must not.
    """
    saved = read_json(out / "config.json")
    saved.pop("versions", None)
    own = config_from_dict(saved, str(out / "config.json"))
    config = arguments.settings
    if not any(flag == "--config" or flag.startswith("--config=") for flag in argv):
        config = parse(argv, default_config, own).settings
    before, now = flatten(config_to_dict(own)), flatten(config_to_dict(config))
    refused = [
        f"{name} {before[name]!r} -> {now[name]!r}"
        for name in before
        if before[name] != now[name] and name not in MAY_CHANGE_ON_RESUME
    ]
    if refused:
        raise BadInput(
            f"{out} was started with other settings ({'; '.join(refused)}); resume with its own, or start a new run"
        )
    return config


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {dotted name: value}."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
