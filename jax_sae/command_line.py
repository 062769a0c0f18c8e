"""The command line of `scripts/train_all.py`: flags and files in, a run out, errors in one line."""

import dataclasses
import difflib
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from jax_sae.config import Config, Member, config_from_dict, config_to_dict, load_config, option_names, validate
from jax_sae.errors import BadInput, RunFailed

MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "model.path",
    "text.path",
    "text.tokenizer",
    "activations.path",
)


OWN_FLAGS = ("help", "config", "out", "resume", "debug")


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

        signals = Signals()
        try:
            finished = train(config, out, resume=arguments.resume, stop_requested=lambda step: signals.received > 0)
        except Stopped:
            print("stopped before the first step; there was nothing to save")
            finished = False
        return 0 if finished else 128 + signals.received

    return run_script(argv, work)


def run_script(argv: Sequence[str], work: Callable[[], int]) -> int:
    """Do the work of a script, and return its exit code; what ends it badly is one line, or with --debug a traceback.

    0: done. 1: the machine failed: a disk is full, every member diverged. 2: something given cannot be used. Any other
    exception is a defect of this package, and is raised.
    """
    keep_libraries_quiet()
    try:
        return work()
    except (BadInput, RunFailed, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if "--debug" in argv:
            traceback.print_exc()
        is_full = f"a file could not be written ({error}); make room, and go on with --resume"
        print(f"error: {is_full if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1


class Signals:
    """Remembers the first SIGINT or SIGTERM; a second one has its usual effect."""

    def __init__(self) -> None:
        """Listen from now on."""
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping: saving first; once more to end at once", file=sys.stderr)


def keep_libraries_quiet() -> None:
    """Switch off what libraries print about themselves; must come before they are imported."""
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
        BadInput: if the TOML file cannot be used.
        SystemExit: with code 2 and a message for an unknown or malformed flag, with code 0 after `--help`.
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
            metavar="features=F,seed=S,learning_rate=LR",
            instance_from_str=lambda strings: parse_member(strings[0]),
            is_instance=lambda value: isinstance(value, Member),
            str_from_instance=lambda m: [f"features={m.features},seed={m.seed},learning_rate={m.learning_rate!r}"],
        )

    check_flags(argv)
    given = next((argv[i + 1] for i, flag in enumerate(argv[:-1]) if flag == "--config"), None)
    given = next((flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")), given)
    start = defaults or load_config(Path(given) if given else default_config)

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


def check_flags(argv: Sequence[str]) -> None:
    """Raise BadInput at the first flag that does not exist, with the nearest one that does."""
    known = [
        "--help",
        "--config",
        "--out",
        "--resume",
        "--debug",
        *(f"--{name.replace('_', '-')}" for name in option_names()),
    ]
    for argument in argv:
        flag = argument.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=1)
            raise BadInput(f"unknown flag {flag}; " + (f"did you mean {nearest[0]}?" if nearest else "see --help"))


def parse_member(text: str) -> Member:
    """Read `features=768,seed=1,learning_rate=1e-3`; seed and learning rate may be left out.

    Raises:
        ValueError: if it is not of this form.
    """
    types = {"features": int, "seed": int, "learning_rate": float}
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key.strip() not in types:
            raise ValueError(f"{part!r} in {text!r}; features=F,seed=S,learning_rate=LR was expected")
        values[key.strip()] = types[key.strip()](value)
    if "features" not in values:
        raise ValueError(f"{text!r} does not say features=F")
    return Member(**values)


def choose_directory(arguments: Arguments) -> Path:
    """The directory of the run, which for a new one does not hold a run yet.

    Raises:
        BadInput: if --out holds a run and --resume is not given, or there is no run to resume.
    """
    default = Path("runs") / arguments.config.stem
    numbered = [default]
    while numbered[-1].exists():
        numbered.append(default.with_name(f"{default.name}-{len(numbered) + 1}"))
    if not arguments.resume:
        if arguments.out is None:
            return numbered[-1]
        if holds_run(arguments.out):
            raise BadInput(
                f"{arguments.out} already holds a run; go on with it by --resume, or give --out another name"
            )
        if arguments.out.exists() and not arguments.out.is_dir():
            raise BadInput(f"--out {arguments.out} is a file; a directory was expected")
        return arguments.out
    candidates = [arguments.out] if arguments.out is not None else [path for path in numbered if holds_run(path)]
    if not candidates or not holds_run(candidates[-1]):
        raise BadInput(f"{arguments.out or default} holds no run to resume; start one without --resume")
    return candidates[-1]


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
    path = out / "config.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    saved.pop("versions", None)
    own = config_from_dict(saved, str(path))
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
