"""Words of a command line -> settings; what cannot be one is refused in one line."""

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, Literal, TypeVar

from jax_sae.config import Config, Member, SweepConfig, without_none
from jax_sae.config_tables import expected, flatten, option_types
from jax_sae.errors import BadInput
from jax_sae.run.loggers import LOGGERS

Options = TypeVar("Options")

MEMBER = "features=F,kind=KIND,seed=S,learning_rate=LR,..."
"""How a member is written as a flag."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line of `jax-sae train`."""

    config: Path | None
    out: Path | None
    resume: bool
    settings: dict[str, Any]
    """Those settings of `Config` that flags give, by dotted names."""
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    loggers: tuple[str, ...] = ()
    """Where metrics are shown too: tensorboard, wandb."""


def parse(argv: Sequence[str]) -> Arguments:
    """Read the command line of `jax-sae train`.

    Raises:
        BadInput: if a flag cannot be used.
        SystemExit: with code 0 after `--help`.
    """
    import tyro
    from tyro import constructors

    registry = constructors.ConstructorRegistry()

    @registry.primitive_rule
    def member_rule(info: Any) -> constructors.PrimitiveConstructorSpec | None:
        if info.type is not Member:
            return None
        return constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=MEMBER,
            instance_from_str=lambda strings: parse_member(strings[0]),
            is_instance=lambda value: isinstance(value, Member),
            str_from_instance=lambda m: [
                ",".join(
                    f"{name}={'+'.join(value) if isinstance(value, tuple) else value}"
                    for name, value in dataclasses.asdict(m).items()
                    if value is not None
                )
            ],
        )

    @registry.struct_rule
    def sweep_rule(info: Any) -> constructors.StructConstructorSpec | None:
        if info.type is not SweepConfig:
            return None
        texts = texts_of_sweep()
        fields = [
            constructors.StructFieldSpec(name, hint, getattr(info.default, name), texts[name])
            for name, hint in typing.get_type_hints(SweepConfig).items()
        ]
        return constructors.StructConstructorSpec(SweepConfig, tuple(fields))

    given = check_flags(argv)

    @dataclasses.dataclass(frozen=True)
    class CommandLine:
        """Train every autoencoder of a sweep at once on the activations of a language model.

        A flag overrides the file of --config, and that the defaults, which stand here. With neither, it is the demo.
        Exit codes: 0 finished, 1 the run could not go on (a full disk, every member diverged), 2 something given cannot
        be used, 130, 143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP after saving.
        """

        config: Path | None = None
        """TOML file with settings, or the name of one that comes with the package. Without it, demo; with
        sweep.kinds or the like, demo_sparse as far as it is of those kinds; with model, text or activations of one's
        own, the defaults."""
        out: Path | None = None
        """Directory of the run; without it runs/NAME of the config, with -2, -3, ... where that is taken."""
        resume: bool = False
        """Go on from the newest checkpoint of the run in --out (or in the newest runs/NAME)."""
        tensorboard: bool = False
        """Show losses, densities and the frontier in TensorBoard too: tensorboard/ in --out (docs/logs.md)."""
        wandb: bool = False
        """The same in Weights & Biases, as one run."""
        debug: bool = False
        """Show the traceback of an error, above its one line."""
        coordinator: str | None = None
        """HOST:PORT of the first of several processes that train the run together (docs/many_devices.md)."""
        num_processes: int | None = None
        """How many they are; give all three, or none where a cluster's launcher says it."""
        process_id: int | None = None
        """Which this is, from 0."""
        settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    parsed = tyro.cli(
        CommandLine,
        args=list(argv),
        registry=registry,
        prog="jax-sae train",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    values = flatten(parsed.settings)
    settings = {name: values[name] for name in given if name in values}
    return expand_home(
        Arguments(
            parsed.config,
            parsed.out,
            parsed.resume,
            settings,
            parsed.coordinator,
            parsed.num_processes,
            parsed.process_id,
            tuple(name for name in LOGGERS if getattr(parsed, name)),
        )
    )


@cache
def texts_of_sweep() -> dict[str, str]:
    """What is said of each setting of a sweep; of lists, what is said of the member's setting."""
    from docstring_parser import parse_from_object  # as tyro itself reads the strings after fields

    documented = [*parse_from_object(Member).params, *parse_from_object(SweepConfig).params]
    return {each.arg_name: " ".join(str(each.description).split()) for each in documented}


def read_options(options: type[Options], argv: Sequence[str], prog: str) -> Options:
    """The flags of a command as its dataclass, in which a field without a default has to be given.

    Raises:
        BadInput: if a flag cannot be used, or is missing.
        SystemExit: with code 0 after `--help`.
    """
    import tyro

    marks = typing.get_type_hints(options, include_extras=True)
    positional = [name for name, hint in marks.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ())]
    fields = dataclasses.fields(options)  # type: ignore[arg-type]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    values_given(argv, dict(_flat_hints(options)), positional, required)
    return expand_home(tyro.cli(options, args=list(argv), prog=prog, config=(tyro.conf.FlagCreatePairsOff,)))


def _flat_hints(options: type[Any]) -> Iterator[tuple[str, Any]]:
    """The type of each field, and in place of a field that is a record itself those of its fields: mesh.data."""
    for name, hint in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(hint):
            yield from ((f"{name}.{its}", each) for its, each in typing.get_type_hints(hint).items())
        else:
            yield name, hint


def expand_home(options: Options) -> Options:
    """The same with `~` and `~user` expanded at the start of each path, as no shell does in `--out=~/x`."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    paths = {name: Path(os.path.expanduser(value)) for name, value in values.items() if isinstance(value, Path)}
    return dataclasses.replace(options, **paths)  # type: ignore[type-var]


def check_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """The values that are given to each flag of `jax-sae train`; errors as for `values_given`."""
    own = {"config": Path, "out": Path, "resume": bool, "debug": bool, **dict.fromkeys(LOGGERS, bool)}
    of_processes = {"coordinator": str | None, "num_processes": int | None, "process_id": int | None}
    return values_given(argv, {**own, **of_processes, **option_types()})


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
    hint = typing.get_args(hint)[0] if many else without_none(hint)
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
    if hint is bool:
        return word in ("true", "false")
    try:
        (parse_member if hint is Member else hint)(word)
    except ValueError:
        return False
    return True


def parse_member(text: str) -> Member:
    """Read `features=768,seed=1,kind=topk,k=16`, the fields of `Member`; all but features may be left out.

    Raises:
        ValueError: if it is not of this form.
    """
    types = {name: without_none(hint) for name, hint in typing.get_type_hints(Member).items()}
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        key = key.strip()
        if key not in types or key in values:
            raise ValueError(f"{key!r} is not a part of a member, or stands twice")
        if typing.get_origin(types[key]) is tuple:
            values[key] = tuple(value.split("+"))  # a comma ends a part, and a place may have any of the others
            continue
        if not _fits(types[key], value):
            raise ValueError(f"{key} is {value!r}; {expected(types[key])} was expected")
        if types[key] is bool:
            values[key] = value == "true"
        else:
            values[key] = value if typing.get_origin(types[key]) is Literal else types[key](value)
    if "features" not in values:
        raise ValueError("features=F is missing")
    return Member(**values)
