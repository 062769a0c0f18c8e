"""Every setting of a run with its unit and default; TOML in, validated, JSON out. Standard library only.

Files in `configs/` and flags on the command line only override what stands here. The string after each field is what
`--help` shows.
"""

import dataclasses
import difflib
import math
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

from jax_sae.errors import BadInput, Contradiction

Normalization = Literal["dataset", "story", "none"]
Initialization = Literal["torch", "orthogonal", "transposed"]
DecoderNorm = Literal["free", "unit"]
DecoderBias = Literal["zero", "mean", "geometric_median"]
Batching = Literal["tokens", "story"]
Schedule = Literal["constant", "cosine", "linear"]
Precision = Literal["float32", "tensorfloat32", "bfloat16"]

SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, 3.4028235e38  # the former the smallest normal one: less may become zero
LARGEST_BELOW_1 = 1 - 2.0**-24  # in float32, in which Adam divides by 1 - beta**step

IN_MEMORY = "<memory>"
"""What activations.path is where a program gave the activations, or another source."""

LARGEST_COUNT = 2**63 - 1
MOST_STEPS = 2**31 - 1  # Adam counts them in 32 bits
LARGEST_SEED = 2**32 - 1  # JAX makes a key of the last 32 bits


def positive(name: str, value: float, most: float = LARGEST_COUNT) -> None:
    """Raise BadInput unless 0 < value <= most."""
    if not 0 < value <= most:
        limit = f" and up to {most}" if value > most else ""
        raise BadInput(f"{name} is {shortened(value)}; a number above 0{limit} was expected")


def not_negative(name: str, value: float, most: float = LARGEST_COUNT) -> None:
    """Raise BadInput unless 0 <= value <= most."""
    if not 0 <= value <= most:
        limit = f", up to {most}," if value > most else ""
        raise BadInput(f"{name} is {shortened(value)}; 0 or more{limit} was expected")


def part_of_steps(name: str, value: float, most: float = 1) -> None:
    """Raise BadInput unless 0 <= value <= 1."""
    if not 0 <= value <= min(most, 1):
        raise BadInput(f"{name} is {value}; a part of the steps, from 0 to 1, was expected")


def from_0(name: str, value: float, most: float) -> None:
    """Raise BadInput unless 0 <= value <= most, which is below 1."""
    if not 0 <= value <= most:
        raise BadInput(f"{name} is {value}; a number from 0 to {most:.8f} was expected")


def within_float32(name: str, value: float) -> None:
    """Raise BadInput if float32 would make a positive number zero or infinite."""
    if value and not SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise BadInput(
            f"{name} is {value!r}, which float32 would make {'zero' if value < 1 else 'infinite'}; "
            f"{SMALLEST_FLOAT32:.8g} to {LARGEST_FLOAT32:.8g} was expected"
        )


@dataclass(frozen=True)
class Facts:
    """What holds of a setting beside its name, type and text; all but `check` and `most` of those of a member only."""

    default: Any = None
    """Its value where neither the member nor its kind says one; None: the kind has no such setting, or [train] says."""
    listed: bool = False
    """Whether only those kinds have it that list it in their `settings`."""
    sparsity: bool = False
    """Whether it makes features inactive; such lists stand first in [sweep]."""
    check: Callable[[str, Any, float], None] | None = None
    """Raises BadInput, with the name that it is given, for a value out of range; the largest one is `most`."""
    most: float = LARGEST_COUNT
    counts_features: bool = False
    """Whether it may not be above F."""
    traced: str = ""
    """The dtype in which a training step is given it, so that it may differ between members of a group."""
    initial: bool = False
    """Whether it is an attribute of the kind's module, for its initial values."""
    list: str = ""
    """The name of its list in [sweep], where not its own."""
    label: str = ""
    """What it is called in names of members, where not by its own name."""
    before: Any = None
    """Its value in runs of versions that did not have it, where not the default of now."""


def setting(start: Any = None, **facts: Any) -> Any:
    """A field of a record of settings: its value where nothing is said, and its `Facts`."""
    return field(default=start, metadata={"facts": Facts(**facts)})


@dataclass(frozen=True)
class ModelConfig:
    """The language model that is read."""

    path: str = "roneneldan/TinyStories-33M"
    """Hugging Face id or directory of a GPT-Neo."""
    layer: int = setting(2, check=not_negative)
    """Read the residual stream after this many blocks: Hugging Face's hidden_states[layer]."""
    precision: Precision = "float32"
    """What its matrix products round their factors to; sums and the residual stream stay float32."""


@dataclass(frozen=True)
class TextConfig:
    """What the language model reads: a dataset with one story a row."""

    path: str = "roneneldan/TinyStories"
    """Hugging Face id, directory or file of a dataset."""
    config: str = ""
    """Which configuration (subset), of a dataset that has several."""
    tokenizer: str = ""
    """Hugging Face id or directory of the tokenizer; empty: the language model's own."""
    column: str = "text"
    """The column that holds the story, as text or as a list of token ids; meta.text is an entry of the column meta."""
    split: str = "train"
    """The split to train on."""
    validation_split: str = ""
    """The held-out split; empty: 'validation' or 'test', else the end of the training split, then not trained on."""


@dataclass(frozen=True)
class ActivationsConfig:
    """What the autoencoders read."""

    path: str = ""
    """Instead of a language model: a store, or a file (.npy, .npz, .safetensors, .pt) or a folder by save_to_disk with
    rows [N, D] or stories [N, T, D]."""
    array: str = ""
    """Name of the array in a file of several; empty: 'activations', or the only one of floats."""
    mask: str = ""
    """Of [N, T, D], which are tokens, [N, T], 1 or 0: the array's name in the same file, or an .npy file; empty: the
    file's 'attention_mask' or 'mask', else all are."""
    normalization: Normalization = "dataset"
    """dataset: mean removed, mean squared norm D. story: per story (x - mean) / std * sqrt(D). none: as they are."""
    block_tokens: int = setting(131_072, check=positive)
    """Tokens (rows) that are harvested, shuffled among each other and held in memory at a time."""
    held_out_tokens: int = setting(65_536, check=positive)
    """Tokens of the held-out set, on which FVU and the PCA floor are measured; whole stories up to this number."""
    exclude_first_tokens: int = setting(0, check=not_negative)
    """Tokens at the start of each story that are not used, neither for training nor held out."""
    norm_limit: float = setting(0.0, check=not_negative, most=sys.float_info.max)
    """Tokens whose activation has a larger norm |x|, in the model's scale, are not used; 0: no limit."""


@dataclass(frozen=True)
class Member:
    """One autoencoder of a sweep. None stands for what its kind's paper uses, or for [train]'s value.

    A new setting is one more field here. Its list in [sweep], flag, check, place in names and record follow from it.
    """

    features: int = setting(dataclasses.MISSING, check=positive, most=2**31 - 1, traced="int32")
    """Number of features F."""
    seed: int = setting(0, list="seeds", check=not_negative, most=LARGEST_SEED, traced="uint32")
    """Seed of its initial values."""
    learning_rate: float | None = setting(
        list="learning_rates", label="lr", check=positive, most=math.inf, traced="float32"
    )
    """Peak learning rate; without it, 0.1 / sqrt(F)."""
    kind: str = setting("relu", list="kinds")
    """A file of jax_sae/autoencoder/kinds, or module:Class of one of your own."""
    l1_coefficient: float | None = setting(
        listed=True, sparsity=True, label="lambda", check=not_negative, most=math.inf, traced="float32"
    )
    """relu (default 0, the plain autoencoder), gated: lambda of the L1 penalty, weighted by the directions' norms."""
    l0_coefficient: float | None = setting(
        listed=True, sparsity=True, label="lambda", check=not_negative, most=math.inf, traced="float32"
    )
    """jumprelu: lambda of the number of active features."""
    target_l0: float | None = setting(
        listed=True, sparsity=True, label="target", check=positive, counts_features=True, traced="float32"
    )
    """jumprelu: numbers of active features a token to aim at, instead of a lambda."""
    k: int | None = setting(listed=True, sparsity=True, check=positive, counts_features=True, traced="int32")
    """topk, batchtopk, matryoshka (default 32): active features a token."""
    auxk_coefficient: float | None = setting(listed=True, check=not_negative, most=math.inf, traced="float32")
    """topk, batchtopk, matryoshka (default 1/32): weight of what dead features make of the error; 0: none."""
    bandwidth: float | None = setting(listed=True, check=positive, traced="float32")
    """jumprelu (default 0.05): width of the window in which a threshold has a gradient, as a part of sqrt(D)."""
    initial_threshold: float | None = setting(listed=True, check=positive, traced="float32", initial=True)
    """jumprelu (default 0.1): each threshold at the start, as a part of sqrt(D)."""
    schedule: Schedule | None = setting()
    """Instead of train.schedule, for each member."""
    warmup: float | None = setting(check=part_of_steps)
    """Instead of train.warmup, for each member."""
    decay: float | None = setting(check=part_of_steps)
    """Instead of train.decay, for each member."""
    penalty_warmup: float | None = setting(check=part_of_steps)
    """Instead of train.penalty_warmup, for each member."""
    clip: float | None = setting(default=1.0, before=0.0, check=not_negative, most=math.inf, traced="float32")
    """Largest norm of a member's gradient, of the loss averaged over a batch's tokens, |x|^2 being D; 0: any.
    Default 1, but 0 for relu without a penalty."""
    decoder_norm: DecoderNorm | None = setting(default="free")
    """unit: directions are kept at norm 1, their gradients projected (default but for relu). free: they are not."""
    initialization: Initialization | None = setting(default="transposed", initial=True)
    """torch: torch.nn.Linear's uniform values. orthogonal: a random orthogonal W_dec, the default of relu without a
    penalty. transposed: random directions of norm initial_norm, the default of all others. With the last two W_enc is
    W_dec's transpose."""
    initial_norm: float | None = setting(default=1.0, check=positive, initial=True)
    """With transposed: norm of each direction at the start; default 1, for relu 0.1."""
    encoder_bias: float | None = setting(default=0.0, check=not_negative, most=math.inf, initial=True)
    """With orthogonal: initial b_enc in standard deviations of an activation; above 0, features start active. Default 2
    where orthogonal is the default, else 0."""
    decoder_bias: DecoderBias | None = setting(default="zero")
    """What is added to the initial b_dec: zero, or the mean or geometric_median of the first activations."""
    dead_after_tokens: int | None = setting(check=positive, most=2**31 - 1, traced="int32")
    """A feature that has not fired for so many tokens is dead, to AuxK and to resampling; default a tenth of the run's
    tokens, 10 million at most."""
    resamples: int | None = setting(default=0, check=not_negative)
    """How often, evenly spread over the steps, dead features are set to activations with a large error; default 0."""


SETTINGS: dict[str, Facts] = {each.name: each.metadata["facts"] for each in dataclasses.fields(Member)}
"""The facts of every setting of a member, by its name."""


def without_none(hint: Any) -> Any:
    """X of `X | None`; any other type as it is."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) in (types.UnionType, typing.Union) else hint


def _lists() -> Any:
    """A record with a list for every setting of a member; those that `SweepConfig` declares keep their places in it."""
    hints: dict[str, Any] = typing.get_type_hints(Member)
    lists: dict[str, Any] = {
        f.list or name: types.GenericAlias(tuple, (without_none(hints[name]), ...)) for name, f in SETTINGS.items()
    }
    first = ["kinds", "features", *(name for name, facts in SETTINGS.items() if facts.sparsity)]
    order = dict.fromkeys([*first, "seeds", "learning_rates", "scale_learning_rates", *lists])
    return dataclasses.make_dataclass("Lists", [(name, lists.get(name, bool), ()) for name in order], frozen=True)


Lists: Any = _lists()


@dataclass(frozen=True)
class SweepConfig(Lists):
    """Which autoencoders are trained: every combination of the lists that their kind has, or the explicit members.

    An empty list stands for one value, what the kind's paper uses; in TOML a single value needs no brackets. Beside
    explicit members, a single value is that of every member that does not say otherwise and whose kind has it.
    """

    # Every setting of `Member` has a list here, with its name and text; these are called or said otherwise.
    kinds: tuple[str, ...] = ("relu",)
    """relu, topk, batchtopk, matryoshka, jumprelu, gated: the files of jax_sae/autoencoder/kinds; or module:Class of
    one of your own (docs/add_a_kind.md)."""
    features: tuple[int, ...] = ()
    """Numbers of features F; without one, 8 times the width D of the activations."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial values."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates; without one, 0.1 / sqrt(F): 0.0036 for F = 768, 0.001 for F = 10,000."""
    scale_learning_rates: bool = False
    """Multiply them by 1 / sqrt(F / 2^14), as Gao et al. 2024 do."""
    members: tuple[Member, ...] = ()
    """Instead of the combinations: [[sweep.members]] in TOML, features=768,seed=1,kind=topk,k=16 as a flag."""


@dataclass(frozen=True)
class TrainConfig:
    """How they are trained."""

    steps: int = setting(10_000, check=positive, most=MOST_STEPS)
    """Optimiser steps."""
    batching: Batching = "tokens"
    """tokens: shuffled tokens. story: one whole story a step, in order."""
    batch_tokens: int = setting(4096, check=positive)
    """Tokens B of a step; with story batching a step has the tokens of its story."""
    beta1: float = setting(0.9, check=from_0, most=LARGEST_BELOW_1)
    """Adam's decay rate of the first moment."""
    beta2: float = setting(0.999, check=from_0, most=LARGEST_BELOW_1)
    """Adam's decay rate of the second moment."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: constant, or falling to zero at the last step along a cosine or a line."""
    warmup: float = setting(0.01, check=part_of_steps)
    """The part of the steps, from 0 to 1, over which the learning rate rises linearly from zero."""
    decay: float = setting(0.2, check=part_of_steps)
    """The part of the steps after the warm-up, from 0 to 1, at their end, over which the learning rate falls."""
    penalty_warmup: float = setting(0.05, check=part_of_steps)
    """The part of the steps, from 0 to 1, over which the sparsity penalty (not k) rises linearly from zero."""
    checkpoint_every: int = setting(5000, check=positive)
    """Steps between checkpoints; there is one at the end too."""
    log_every: int = setting(10, check=positive)
    """Steps between lines of metrics.jsonl."""
    seed: int = setting(0, check=not_negative, most=LARGEST_SEED)
    """Seed of the order of stories and of the shuffling of tokens."""
    precision: Precision = "float32"
    """What matrix products round their factors to; parameters, sums, losses and Adam stay float32."""


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def config_names() -> dict[str, Path]:
    """The files that come with the package, by name: `configs/` of the repository, which an installed package holds."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def find_config(name: Path) -> Path:
    """The file of that name or, where there is none, the one that comes with the package under it."""
    name = Path(os.path.expanduser(name))
    return name if name.is_file() else config_names().get(str(name), name)


def load_config(path: Path) -> Config:
    """Read a TOML file whose tables are the fields of `Config`; or one that comes with the package, by its name.

    Raises:
        BadInput: if the file is missing or is no TOML, or a key or value is not one of `Config`'s.
    """
    return config_with(load_settings(path))


def load_settings(path: Path) -> dict[str, Any]:
    """What a TOML file says, by dotted names such as `train.steps`; errors as for `load_config`."""
    path = find_config(path)
    try:
        with open(path, "rb") as file:
            table = tomllib.loads(file.read().decode("utf-8-sig"))  # some editors begin with a byte order mark
    except OSError as error:
        raise BadInput(
            f"cannot read the config {path}: {error.strerror}; give a TOML file, or the name of one that comes with "
            f"the package: {', '.join(config_names())}"
        ) from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, thousands of digits or brackets
        raise BadInput(f"{path} is not valid TOML in UTF-8: {error}") from error
    config_from_dict(table, str(path))
    return settings_in(table, str(path))


def settings_in(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What nested tables say, by dotted names such as `train.steps`; types are checked, and not whether values fit.

    Arrays of NumPy serve as lists and numbers, and paths as strings.

    Raises:
        BadInput: at the first key or type that does not fit; `where` names the tables.
    """
    table = _plain(table)
    settings = flatten(_build(Config, table, where, ""))
    return {f"{group}.{name}": settings[f"{group}.{name}"] for group, part in table.items() for name in part}


def _plain(value: Any) -> Any:
    """The same in types that TOML has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


def full_name(name: str) -> str:
    """The dotted name of a setting that is called by its last part, or by its table's name and that: `model_path`.

    Where the last part stands in several tables, it is the sweep's.

    Raises:
        BadInput: if there is none, or several and none of the sweep.
    """
    names = option_names()
    fitting = [full for full in names if name in (full, full.replace(".", "_"), full.partition(".")[2])]
    of_sweep = [full for full in fitting if full.startswith("sweep.")]
    if len(fitting) == 1 or of_sweep:
        return (of_sweep or fitting)[0]
    if fitting:
        either = " or ".join(full.replace(".", "_") for full in fitting)
        raise BadInput(f"the call: {name} may be one of several settings; write {either}")
    short = {full.partition(".")[2]: full for full in names} | {full.replace(".", "_"): full for full in names}
    nearest = difflib.get_close_matches(name, short, n=1)
    raise BadInput(
        f"the call: unknown setting {name[:80]!r}; "
        + (f"did you mean {nearest[0]!r}?" if nearest else "jax-sae train --help names them all")
    )


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {
        f"{group.name}.{setting.name}": getattr(getattr(config, group.name), setting.name)
        for group in dataclasses.fields(config)
        for setting in dataclasses.fields(getattr(config, group.name))
    }


def config_with(settings: Mapping[str, Any], config: Config | None = None) -> Config:
    """The settings, by dotted names, over those of a `Config`; without one, over the defaults."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, setting = name.partition(".")
        tables.setdefault(group, {})[setting] = value
    config = config or Config()
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **table) for group, table in tables.items()}
    )


def config_from_dict(table: dict[str, Any], where: str) -> Config:
    """Build and validate a `Config` from nested dictionaries, as TOML and JSON give them; `where` names them in errors.

    Raises:
        BadInput: at the first key or value that does not fit.
    """
    config = _build(Config, table, where, "")
    validate(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries and lists, ready for JSON; `config_from_dict` takes them back."""
    return dataclasses.asdict(config)


def _build(cls: type, table: Any, where: str, prefix: str) -> Any:
    if not isinstance(table, dict):
        keys = ", ".join(typing.get_type_hints(cls))
        raise BadInput(
            f"{where}: {prefix.rstrip('.')} is {shortened(table)}; a table with the keys {keys} was expected"
        )
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise BadInput(f"{where}: unknown key {(prefix + key)[:80]!r}{_nearest(prefix + key)}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    for key in sorted(required - set(table)):
        raise BadInput(f"{where}: '{prefix}{key}' is missing")
    return cls(**{key: _convert(hints[key], value, where, prefix + key) for key, value in table.items()})


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    """`value` as the type `hint`; whole numbers serve as floats, nothing else is cast."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where, name + ".")
    if origin is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(arguments[0], item, where, name) for item in values)
    if hint != (something := without_none(hint)):
        return None if value is None else _convert(something, value, where, name)
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if value in arguments if origin is Literal else type(value) is hint:
        return value
    raise BadInput(f"{where}: {name} is {shortened(value)}; {expected(hint)} was expected")


def expected(hint: Any) -> str:
    """What a value of a setting's type is called in messages."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return {int: "a whole number", float: "a number", str: "a string"}.get(hint, "a list")


def _nearest(name: str) -> str:
    matches = difflib.get_close_matches(name, option_names(), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else f"; known are {', '.join(option_names())}"


def option_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """The type of every setting, by its dotted name such as `train.batch_tokens`."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and dataclasses.is_dataclass(hint):
            found |= option_types(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


def option_names() -> list[str]:
    """Every setting by its dotted name."""
    return list(option_types())


def check_ranges(record: Any, called: Callable[[str], str]) -> None:
    """Raise BadInput for a setting of a record that is out of its range; `called` makes its full name of its own."""
    for each in dataclasses.fields(record):
        facts, value = each.metadata.get("facts", Facts()), getattr(record, each.name)
        if facts.check and value is not None:
            facts.check(called(each.name), value, facts.most)


def validate(config: Config) -> None:
    """Check every value that can be judged without opening a model or a dataset, and is not a member's.

    Raises:
        BadInput: naming the setting, its value and what is expected.
    """
    train, activations = config.train, config.activations
    for group in dataclasses.fields(config):
        check_ranges(getattr(config, group.name), f"{group.name}.{{}}".format)
    if train.batching == "tokens" and train.batch_tokens > activations.block_tokens:
        raise BadInput(
            f"train.batch_tokens is {train.batch_tokens}, but activations.block_tokens is {activations.block_tokens}; "
            "a block must hold at least one batch"
        )
    for name in ("array", "mask"):
        if getattr(activations, name) and not activations.path:
            raise BadInput(
                f"activations.{name} is {getattr(activations, name)!r}, but activations.path is empty: there is no "
                "file that it could be about; name one, or leave it out"
            )
    if activations.norm_limit and (train.batching == "story" or activations.normalization == "story"):
        raise Contradiction(
            "activations.norm_limit",
            f"is {activations.norm_limit}",
            "it needs tokens that do not depend on the rest of their story, so train.batching and "
            "activations.normalization cannot be 'story'",
            "use 'tokens' and 'dataset', or activations.exclude_first_tokens in place of the limit",
            value=activations.norm_limit,
            others=("train.batching", "activations.normalization"),
        )
