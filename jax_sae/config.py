"""Every setting of a run with its unit, range and default. Standard library only.

Files in `configs/` and flags on the command line only override what stands here. The string after each field is what
`--help` shows.
"""

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any, Literal

from jax_sae.errors import BadInput, Contradiction

Normalization = Literal["dataset", "story", "none"]
Initialization = Literal["torch", "orthogonal", "transposed", "independent"]
DecoderNorm = Literal["free", "unit"]
DecoderBias = Literal["zero", "mean", "geometric_median"]
Batching = Literal["tokens", "story"]
Schedule = Literal["constant", "cosine", "linear"]
Dictionary = Literal["autoencoder", "transcoder", "skip_transcoder", "crosscoder"]
PrependBos = Literal["auto", "on", "off"]
WeightsDtype = Literal["float32", "bfloat16"]
Precision = Literal["float32", "tensorfloat32", "bfloat16"]
Moments = Literal["float32", "bfloat16"]

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


def part_above_0(name: str, value: float, most: float) -> None:
    """Raise BadInput unless 0 < value <= most."""
    if not 0 < value <= most:
        raise BadInput(f"{name} is {value}; a part of the tokens, above 0 and up to {most:g}, was expected")


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


def plain_name(name: str, value: str, most: float = 80) -> None:
    """Raise BadInput unless a name, after which members and files are called, has but letters, digits and . : _ -."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._:-]*", value) or len(value) > most:
        raise BadInput(
            f"{name} is {shortened(value)}; a name of up to {most:g} letters, digits and . : _ - was expected, such as "
            "9.resid_post"
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
    explicit: bool = False
    """Whether it has no list in [sweep]: only explicit members say it, and `sweep.dictionaries` stands for it."""


def setting(start: Any = None, **facts: Any) -> Any:
    """A field of a record of settings: its value where nothing is said, and its `Facts`."""
    return field(default=start, metadata={"facts": Facts(**facts)})


@dataclass(frozen=True)
class ModelConfig:
    """The language model that is read."""

    path: str = "roneneldan/TinyStories-33M"
    """Hugging Face id, directory or .gguf file of a language model (docs/places.md says which are run)."""
    layer: int = setting(2, check=not_negative)
    """Read the residual stream after this many blocks: Hugging Face's hidden_states[layer]."""
    precision: Precision = "float32"
    """What its matrix products round their factors to; sums and the residual stream stay float32."""
    dtype: WeightsDtype = "float32"
    """In which its weights are kept in memory; all is computed in float32."""
    models: tuple[str, ...] = ()
    """Instead of path, several that read the same token ids, each with a name: base=PATH tuned=PATH. Their places are
    base:9.resid_post and tuned:9.resid_post (docs/places.md)."""


def named_models(model: ModelConfig) -> dict[str, str]:
    """The path of each language model by its name; one alone has the name ''.

    Raises:
        BadInput: if one has no name, two have the same, or `path` is given too.
    """
    if not model.models:
        return {"": model.path}
    found: dict[str, str] = {}
    for each in model.models:
        name, _, path = each.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or not path:
            raise BadInput(
                f"model.models has {shortened(each)}; NAME=PATH was expected, such as base=google/gemma-3-270m, and a "
                "name of letters, digits and . _ -"
            )
        if name in found:
            raise BadInput(f"model.models has two with the name {name!r}; give each a name of its own")
        found[name] = path
    if model.path != ModelConfig.path:
        raise BadInput(
            f"model.path is {shortened(model.path)}, but model.models are given, which stand in its place; give one of "
            "them"
        )
    return found


@dataclass(frozen=True)
class TextConfig:
    """What the language model reads: a dataset with one story or document a row."""

    path: str = "roneneldan/TinyStories"
    """Hugging Face id, directory or file of a dataset; with streaming also an address, with {00..15} of several."""
    config: str = ""
    """Which configuration (subset), of a dataset that has several."""
    tokenizer: str = ""
    """Hugging Face id or directory of the tokenizer; empty: the language model's own."""
    column: str = "text"
    """The column that holds the story: as text, a list of token ids, or messages for the tokenizer's chat template;
    meta.text is an entry of the column meta."""
    split: str = "train"
    """The split to train on."""
    validation_split: str = ""
    """The held-out split; empty: 'validation' or 'test', else the end of the training split (with streaming its first
    1024 stories), then not trained on."""
    window: int = setting(0, check=not_negative)
    """Cut each document into windows of so many tokens, the last one shorter, each then a story; 0: documents are read
    whole, up to the language model's positions."""
    pack: bool = False
    """Let adjacent windows share one as long as they fit, each attending to itself alone; needs window."""
    prepend_bos: PrependBos = "auto"
    """Whether each story, so each window, begins with the tokenizer's BOS token; auto: where the tokenizer adds one."""
    streaming: bool = False
    """Read the text while training, shard by shard, without first downloading, counting or hashing it."""


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
    exclude_first_tokens: int | None = setting(check=not_negative)
    """Tokens at the start of each story that are not used, neither for training nor held out; default 1 where stories
    begin with BOS, else 0."""
    norm_limit: float = setting(0.0, check=not_negative, most=sys.float_info.max)
    """Tokens whose activation has a larger norm |x|, in the model's scale, are not used; 0: no limit."""


@dataclass(frozen=True)
class Member:
    """One dictionary of a sweep. None stands for what its kind's paper uses, or for [train]'s value.

    An autoencoder reads and writes one `place`. Any other dictionary says what it `reads` and what it `writes`.

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
    frequency_coefficient: float | None = setting(
        listed=True, label="frequency", check=not_negative, most=math.inf, traced="float32"
    )
    """jumprelu (default 0): weight of how much more often than frequency_limit features fire."""
    frequency_limit: float | None = setting(listed=True, label="limit", check=part_above_0, most=1, traced="float32")
    """jumprelu (default 0.1): the part of the tokens on which a feature may fire without that penalty."""
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
    penalty. transposed: random directions of norm initial_norm, the default of all others. With these two W_enc is
    W_dec's transpose. independent: as transposed, but W_enc has random directions of norm 1 of its own, the default of
    dictionaries that write other places than they read."""
    initial_norm: float | None = setting(default=1.0, check=positive, initial=True)
    """With transposed and independent: norm of each direction at the start; default 1, for relu 0.1."""
    encoder_bias: float | None = setting(default=0.0, check=not_negative, most=math.inf, initial=True)
    """With orthogonal: initial b_enc in standard deviations of an activation; above 0, features start active. Default 2
    where orthogonal is the default, else 0."""
    decoder_bias: DecoderBias | None = setting(default="zero")
    """What is added to the initial b_dec: zero, or the mean or geometric_median of the first activations."""
    dead_after_tokens: int | None = setting(check=positive, most=2**31 - 1, traced="int32")
    """A feature that has not fired for so many tokens is dead, to AuxK and to resampling; default a tenth of the run's
    tokens, 10 million at most."""
    place: str | None = setting(list="places", check=plain_name, most=80)
    """Which activations it reads, such as 9.mlp_out; without it, those of the only place there is."""
    resamples: int | None = setting(default=0, check=not_negative)
    """How often, evenly spread over the steps, dead features are set to activations with a large error; default 0."""
    reads: tuple[str, ...] | None = setting(explicit=True)
    """Places that it reads, side by side, in place of `place`; 5.mlp_in or, as a flag, 5.mlp_in+6.mlp_in."""
    writes: tuple[str, ...] | None = setting(explicit=True)
    """Places that it writes; without them, those that it reads: a crosscoder."""
    skip: bool | None = setting(explicit=True)
    """Whether what it reads goes to what it writes through a matrix of its own too, W_skip; default no."""


SETTINGS: dict[str, Facts] = {each.name: each.metadata["facts"] for each in dataclasses.fields(Member)}
"""The facts of every setting of a member, by its name."""


def without_none(hint: Any) -> Any:
    """X of `X | None`; any other type as it is."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) in (types.UnionType, typing.Union) else hint


def _lists() -> Any:
    """A record with a list for every setting of a member; those that `SweepConfig` declares keep their places in it."""
    hints: dict[str, Any] = typing.get_type_hints(Member)
    lists: dict[str, Any] = {
        f.list or name: types.GenericAlias(tuple, (without_none(hints[name]), ...))
        for name, f in SETTINGS.items()
        if not f.explicit
    }
    first = ["places", "kinds", "features", *(name for name, facts in SETTINGS.items() if facts.sparsity)]
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
    places: tuple[str, ...] = ()
    """Places at each of which the sweep is trained, in one pass, such as 4.resid_post 9.mlp_out (docs/places.md); none:
    the one that model.layer says, or that the activations are of."""
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
    dictionaries: tuple[Dictionary, ...] = ("autoencoder",)
    """autoencoder: one at each place. transcoder: one for each layer, from its MLP's input to the output.
    skip_transcoder: the same with a linear way past the features. crosscoder: one over all places."""
    layers: tuple[int, ...] = ()
    """Blocks, counted from 0, of transcoders; of autoencoders and crosscoders too, after each of them, unless places
    are given."""


def placements(sweep: SweepConfig) -> list[dict[str, Any]]:
    """What each dictionary of a sweep's lists reads and writes, as settings of a member; [{}] where nothing is said."""
    places = sweep.places or tuple(f"{layer}.resid_post" for layer in sweep.layers)
    found: list[dict[str, Any]] = []
    for dictionary in sweep.dictionaries:
        if dictionary == "autoencoder":
            found += [{"place": place} for place in places or (None,)]
        elif dictionary == "crosscoder":
            found.append({"reads": places, "writes": places})
        else:
            skip = {"skip": True} if dictionary == "skip_transcoder" else {}
            found += [{"reads": (f"{n}.mlp_in",), "writes": (f"{n}.mlp_out",), **skip} for n in sweep.layers]
    return found


def places_of(sweep: SweepConfig) -> tuple[str, ...]:
    """The places that a sweep names, in the order of its members; none where it is trained at the only one there is."""
    if not sweep.members:
        return named_places(placements(sweep))
    return named_places([*({"place": place} for place in sweep.places), *map(dataclasses.asdict, sweep.members)])


def named_places(its: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """All places of placements, each once."""
    found = [[each.get("place"), *(each.get("reads") or ()), *(each.get("writes") or ())] for each in its]
    return tuple(dict.fromkeys(name for names in found for name in names if name))


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
    moments: Moments = "float32"
    """What Adam's two moments are kept in; with bfloat16 a sweep takes two thirds of the memory, and FVU is a little
    worse (docs/performance.md)."""


@dataclass(frozen=True)
class MeshConfig:
    """On how many devices; without any of these, on the first one."""

    data: int | None = setting(None, check=positive)
    """Parts of a batch's rows, which sum their gradients once a step."""
    member: int | None = setting(None, check=positive)
    """Parts of the members of a group, which send each other nothing."""
    feature: int | None = setting(None, check=positive)
    """Parts of each member's features, which sum what they write at each step."""
    auto: bool = False
    """Choose those that are not given by the devices, their memory and the sweep."""


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


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
    named_models(config.model)
    if config.text.pack and not config.text.window:
        raise BadInput("text.pack is true, but text.window is 0: there is no window to share; give its tokens")
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
