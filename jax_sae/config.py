"""Every setting of a run with its unit and default; TOML in, validated, JSON out. Standard library only.

Files in `configs/` and flags on the command line only override what stands here. The string after each field is what
`--help` shows.
"""

import dataclasses
import difflib
import os
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
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


@dataclass(frozen=True)
class ModelConfig:
    """The language model that is read."""

    path: str = "roneneldan/TinyStories-33M"
    """Hugging Face id or directory of a GPT-Neo."""
    layer: int = 2
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
    block_tokens: int = 131_072
    """Tokens (rows) that are harvested, shuffled among each other and held in memory at a time."""
    held_out_tokens: int = 65_536
    """Tokens of the held-out set, on which FVU and the PCA floor are measured; whole stories up to this number."""
    exclude_first_tokens: int = 0
    """Tokens at the start of each story that are not used, neither for training nor held out."""
    norm_limit: float = 0.0
    """Tokens whose activation has a larger norm |x|, in the model's scale, are not used; 0: no limit."""


@dataclass(frozen=True)
class Member:
    """One autoencoder of a sweep. None stands for what its kind's paper uses, or for [train]'s value."""

    features: int
    """Number of features F."""
    seed: int = 0
    """Seed of its initial values."""
    learning_rate: float | None = None
    """Peak learning rate; without it, 0.1 / sqrt(F)."""
    kind: str = "relu"
    """A file of jax_sae/autoencoder/kinds."""
    l1_coefficient: float | None = None
    """relu, gated: lambda, which weighs the sum of features times the norms of their directions."""
    l0_coefficient: float | None = None
    """jumprelu: lambda, which weighs the number of active features."""
    target_l0: float | None = None
    """jumprelu: the number of active features a token, instead of a lambda."""
    k: int | None = None
    """topk, batchtopk, matryoshka: active features a token."""
    auxk_coefficient: float | None = None
    """topk, batchtopk, matryoshka: weight of what dead features make of the error; 0: none."""
    bandwidth: float | None = None
    """jumprelu: width of the window around a threshold in which it has a gradient, as a part of sqrt(D)."""
    initial_threshold: float | None = None
    """jumprelu: each threshold at the start, as a part of sqrt(D)."""
    schedule: Schedule | None = None
    """Instead of train.schedule."""
    warmup: float | None = None
    """Instead of train.warmup."""
    decay: float | None = None
    """Instead of train.decay."""
    penalty_warmup: float | None = None
    """Instead of train.penalty_warmup."""
    clip: float | None = None
    """Largest norm of the gradient of the loss averaged over the tokens of a batch; 0: any."""
    decoder_norm: DecoderNorm | None = None
    """unit: directions are kept at norm 1, their gradients projected. free: they are not."""
    initialization: Initialization | None = None
    """torch, orthogonal or transposed, as in jax_sae/autoencoder/model.py."""
    initial_norm: float | None = None
    """With transposed: norm of each direction at the start."""
    encoder_bias: float | None = None
    """With orthogonal: initial b_enc in standard deviations of an activation."""
    decoder_bias: DecoderBias | None = None
    """What is added to the initial b_dec: nothing, or the mean or geometric median of the first activations."""
    dead_after_tokens: int | None = None
    """A feature that has not fired for so many tokens is dead, to AuxK and to resampling."""
    resamples: int | None = None
    """How often, evenly spread over the steps, dead features are set to activations with a large error."""


@dataclass(frozen=True)
class SweepConfig:
    """Which autoencoders are trained: every combination of the lists that their kind has, or the explicit members.

    An empty list stands for one value, what the kind's paper uses; in TOML a single value needs no brackets. Beside
    explicit members, a single value is that of every member that does not say otherwise and whose kind has it.
    """

    kinds: tuple[str, ...] = ("relu",)
    """relu, topk, batchtopk, matryoshka, jumprelu, gated: the files of jax_sae/autoencoder/kinds."""
    features: tuple[int, ...] = ()
    """Numbers of features F; without one, 8 times the width D of the activations."""
    l1_coefficient: tuple[float, ...] = ()
    """relu (default 0, the plain autoencoder), gated: lambda of the L1 penalty, weighted by the directions' norms."""
    l0_coefficient: tuple[float, ...] = ()
    """jumprelu: lambda of the number of active features."""
    target_l0: tuple[float, ...] = ()
    """jumprelu: numbers of active features a token to aim at, instead of a lambda."""
    k: tuple[int, ...] = ()
    """topk, batchtopk, matryoshka (default 32): active features a token."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial values."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates; without one, 0.1 / sqrt(F): 0.0036 for F = 768, 0.001 for F = 10,000."""
    scale_learning_rates: bool = False
    """Multiply them by 1 / sqrt(F / 2^14), as Gao et al. 2024 do."""
    auxk_coefficient: tuple[float, ...] = ()
    """topk, batchtopk, matryoshka (default 1/32): weight of what dead features make of the error; 0: none."""
    bandwidth: tuple[float, ...] = ()
    """jumprelu (default 0.05): width of the window in which a threshold has a gradient, as a part of sqrt(D)."""
    initial_threshold: tuple[float, ...] = ()
    """jumprelu (default 0.1): each threshold at the start, as a part of sqrt(D)."""
    schedule: tuple[Schedule, ...] = ()
    """Instead of train.schedule, for each member."""
    warmup: tuple[float, ...] = ()
    """Instead of train.warmup, for each member."""
    decay: tuple[float, ...] = ()
    """Instead of train.decay, for each member."""
    penalty_warmup: tuple[float, ...] = ()
    """Instead of train.penalty_warmup, for each member."""
    clip: tuple[float, ...] = ()
    """Largest norm of a member's gradient, of the loss averaged over a batch's tokens, |x|^2 being D; 0: any.
    Default 1, but 0 for relu without a penalty."""
    decoder_norm: tuple[DecoderNorm, ...] = ()
    """unit: directions are kept at norm 1, their gradients projected (default but for relu). free: they are not."""
    initialization: tuple[Initialization, ...] = ()
    """torch: torch.nn.Linear's uniform values. orthogonal: a random orthogonal W_dec, the default of relu without a
    penalty. transposed: random directions of norm initial_norm, the default of all others. With the last two W_enc is
    W_dec's transpose."""
    initial_norm: tuple[float, ...] = ()
    """With transposed: norm of each direction at the start; default 1, for relu 0.1."""
    encoder_bias: tuple[float, ...] = ()
    """With orthogonal: initial b_enc in standard deviations of an activation; above 0, features start active. Default 2
    where orthogonal is the default, else 0."""
    decoder_bias: tuple[DecoderBias, ...] = ()
    """What is added to the initial b_dec: zero, or the mean or geometric_median of the first activations."""
    dead_after_tokens: tuple[int, ...] = ()
    """A feature that has not fired for so many tokens is dead, to AuxK and to resampling; default a tenth of the run's
    tokens, 10 million at most."""
    resamples: tuple[int, ...] = ()
    """How often, evenly spread over the steps, dead features are set to activations with a large error; default 0."""
    members: tuple[Member, ...] = ()
    """Instead of the combinations: [[sweep.members]] in TOML, features=768,seed=1,kind=topk,k=16 as a flag."""


@dataclass(frozen=True)
class TrainConfig:
    """How they are trained."""

    steps: int = 10_000
    """Optimiser steps."""
    batching: Batching = "tokens"
    """tokens: shuffled tokens. story: one whole story a step, in order."""
    batch_tokens: int = 4096
    """Tokens B of a step; with story batching a step has the tokens of its story."""
    beta1: float = 0.9
    """Adam's decay rate of the first moment."""
    beta2: float = 0.999
    """Adam's decay rate of the second moment."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: constant, or falling to zero at the last step along a cosine or a line."""
    warmup: float = 0.01
    """The part of the steps, from 0 to 1, over which the learning rate rises linearly from zero."""
    decay: float = 0.2
    """The part of the steps after the warm-up, from 0 to 1, at their end, over which the learning rate falls."""
    penalty_warmup: float = 0.05
    """The part of the steps, from 0 to 1, over which the sparsity penalty (not k) rises linearly from zero."""
    checkpoint_every: int = 5000
    """Steps between checkpoints; there is one at the end too."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
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
    settings = flatten(config_from_dict(table, str(path)))
    return {f"{group}.{name}": settings[f"{group}.{name}"] for group, part in table.items() for name in part}


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


def without_none(hint: Any) -> Any:
    """X of `X | None`; any other type as it is."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) in (types.UnionType, typing.Union) else hint


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


def within_float32(name: str, value: float) -> None:
    """Raise BadInput if float32 would make a positive number zero or infinite."""
    if value and not SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise BadInput(
            f"{name} is {value!r}, which float32 would make {'zero' if value < 1 else 'infinite'}; "
            f"{SMALLEST_FLOAT32:.8g} to {LARGEST_FLOAT32:.8g} was expected"
        )


def part_of_steps(name: str, value: float) -> None:
    """Raise BadInput unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise BadInput(f"{name} is {value}; a part of the steps, from 0 to 1, was expected")


def validate(config: Config) -> None:
    """Check every value that can be judged without opening a model or a dataset, and is not a member's.

    Raises:
        BadInput: naming the setting, its value and what is expected.
    """
    train, activations = config.train, config.activations
    not_negative("model.layer", config.model.layer)
    positive("activations.block_tokens", activations.block_tokens)
    positive("activations.held_out_tokens", activations.held_out_tokens)
    positive("train.steps", train.steps, MOST_STEPS)
    for name in ("batch_tokens", "checkpoint_every", "log_every"):
        positive(f"train.{name}", getattr(train, name))
    not_negative("train.seed", train.seed, LARGEST_SEED)
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(train, name) <= LARGEST_BELOW_1:
            raise BadInput(
                f"train.{name} is {getattr(train, name)}; a number from 0 to {LARGEST_BELOW_1:.8f} was expected"
            )
    for name in ("warmup", "decay", "penalty_warmup"):
        part_of_steps(f"train.{name}", getattr(train, name))
    if train.batching == "tokens" and train.batch_tokens > activations.block_tokens:
        raise BadInput(
            f"train.batch_tokens is {train.batch_tokens}, but activations.block_tokens is {activations.block_tokens}; "
            "a block must hold at least one batch"
        )
    not_negative("activations.exclude_first_tokens", activations.exclude_first_tokens)
    for name in ("array", "mask"):
        if getattr(activations, name) and not activations.path:
            raise BadInput(
                f"activations.{name} is {getattr(activations, name)!r}, but activations.path is empty: there is no "
                "file that it could be about; name one, or leave it out"
            )
    not_negative("activations.norm_limit", activations.norm_limit, sys.float_info.max)
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
