"""The settings of a sweep -> its members: complete, checked and named."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from jax_sae.activations.places import Place
from jax_sae.autoencoder.kinds import kind_named, kind_names
from jax_sae.config import (
    SETTINGS,
    Member,
    SweepConfig,
    check_ranges,
    named_places,
    not_negative,
    placements,
    plain_name,
    positive,
    within_float32,
)
from jax_sae.errors import BadInput, Contradiction
from jax_sae.language_model.places import when

GENERAL: dict[str, Any] = {name: facts.default for name, facts in SETTINGS.items() if facts.default is not None}
"""Settings that every kind has, with the default of those kinds that do not say otherwise."""
PLACEMENT = ("place", "reads", "writes", "skip")
"""Settings that say what a member reads and writes, and what goes past its features."""
OPTIONAL = [name for name in SETTINGS if name not in (*PLACEMENT, "kind", "features", "seed", "learning_rate")]
"""Settings that come between the number of features and the seed, in the order of lists and in names."""
LEARNING_RATE_OF_ONE_FEATURE = 0.1
"""The default learning rate is this / sqrt(F): about the best from F = 64 to 1152 (docs/LOG.md), and beyond by the law
of Gao et al. 2024 (https://arxiv.org/abs/2406.04093), section 3."""
EXPANSION = 8
"""F / D where no number of features is given."""
LEARNING_RATE_WIDTH = 2**14
"""F at which `scale_learning_rates` changes nothing."""


def of_some_kinds(*kinds: str) -> dict[str, list[str]]:
    """Each setting that not every kind has, and the kinds that have it: of those in the package and of `kinds`."""
    listed = {kind: kind_named(kind).settings for kind in (*kind_names(), *kinds)}
    return {name: [kind for kind in listed if name in listed[kind]] for name, f in SETTINGS.items() if f.listed}


def sweep_members(sweep: SweepConfig) -> tuple[Member, ...]:
    """The explicit members, or every combination of the lists that a kind has: complete and checked.

    The lists are nested as the fields of `Member` stand, places, kinds and features outermost, but seeds and learning
    rates innermost. Where an explicit member says nothing, a list's single value counts, apart from kinds, features,
    seeds and learning rates. What then is None is filled in with the kind's default; it stays None where the kind has
    no such setting, or where [train] says it.

    Raises:
        BadInput: if there is none, one stands there twice, or a value does not fit, or not its kind.
    """
    members = _explicit(sweep) or combinations(sweep)
    if sweep.scale_learning_rates:
        members = [_scaled(member) for member in members]
    members = [complete(member) for member in members]
    if not members:
        raise BadInput("the sweep has no members: sweep.kinds, sweep.features and sweep.seeds each need a value")
    for member in members:
        check(member)
    if len({bool(named_places([asdict(member)])) for member in members}) > 1:
        raise BadInput("some of sweep.members have a place and some have none; give each of them its place")
    for i, member in enumerate(members):
        if member in members[:i]:
            raise BadInput(f"the sweep has this member twice: {describe_member(member)}")
    return tuple(members)


def with_features(sweep: SweepConfig, places: Sequence[Place]) -> SweepConfig:
    """The sweep, with F = EXPANSION times the width D of its place where it says no number of features.

    Of several places that a member reads or writes, the widest one counts. Where the numbers differ, the combinations
    of the lists become explicit members.
    """
    if sweep.features or sweep.members:
        return sweep
    widths = {place.name: place.width for place in places}
    its = placements(sweep)
    if lacking := [name for name in named_places(its) if name not in widths]:
        raise BadInput(f"sweep.places names {', '.join(lacking)}, which is not there")
    features = [EXPANSION * max(widths[name] for name in named_places([each]) or widths) for each in its]
    if len(set(features)) == 1:
        return replace(sweep, features=(features[0],))
    members = [
        member
        for each, F in zip(its, features, strict=True)
        for member in combinations(replace(sweep, features=(F,)), [each])
    ]
    return SweepConfig(scale_learning_rates=sweep.scale_learning_rates, members=tuple(members))


def _explicit(sweep: SweepConfig) -> list[Member]:
    """The explicit members, with the single values of the lists that they have and do not say.

    Raises:
        BadInput: if a list has several values.
    """
    members, kinds = list(sweep.members), [member.kind for member in sweep.members]
    only = of_some_kinds(*kinds)
    if members and (sweep.layers or set(sweep.dictionaries) != {"autoencoder"}):
        raise Contradiction(
            "sweep.layers" if sweep.layers else "sweep.dictionaries",
            f"is {' '.join(map(str, sweep.layers or sweep.dictionaries))}",
            "explicit members are not combined with lists",
            "say in sweep.members what each reads and writes",
            value=sweep.layers or sweep.dictionaries,
            others=("sweep.members",),
        )
    for name in ["place", *OPTIONAL] if members else ():
        values = getattr(sweep, SETTINGS[name].list or name)
        if len(values) > 1:
            raise Contradiction(
                _option(name),
                f"has {len(values)} values",
                "explicit members are not combined with lists",
                "give one value, for all members that do not say otherwise, or say it in sweep.members",
                value=values,
                others=("sweep.members",),
            )
        if values and not set(kinds) & set(only.get(name, kinds)):
            raise _of_another_kind(name, values, kinds, only[name])
        for i, member in enumerate(members):
            if name == "place" and member.reads:
                continue
            if values and getattr(member, name) is None and member.kind in only.get(name, [member.kind]):
                members[i] = replace(member, **{name: values[0]})
    return members


def combinations(sweep: SweepConfig, its_placements: Sequence[Mapping[str, Any]] | None = None) -> list[Member]:
    """Every combination of the lists that a kind has, at each of the placements; those of the sweep, if None.

    Raises:
        BadInput: if a list is given that none of the kinds has, or dictionaries lack the layers or places they need.
    """
    if its_placements is None:
        _refuse_dictionaries(sweep)
        its_placements = placements(sweep)
    lists = {name: getattr(sweep, facts.list or name) for name, facts in SETTINGS.items() if not facts.explicit}
    only = of_some_kinds(*sweep.kinds)
    for name, kinds in only.items():
        if lists[name] and not set(kinds) & set(sweep.kinds):
            raise _of_another_kind(name, lists[name], sweep.kinds, kinds)
    order = ["features", *(n for n in OPTIONAL if lists[n]), "seed", *["learning_rate"] * bool(sweep.learning_rates)]
    found = []
    for placement, kind in product(its_placements, sweep.kinds):
        names = [name for name in order if kind in only.get(name, [kind])]
        for values in product(*(lists[name] for name in names)):
            found.append(Member(kind=kind, **placement, **dict(zip(names, values, strict=True))))
    return found


def _refuse_dictionaries(sweep: SweepConfig) -> None:
    """Raise BadInput unless the places or layers are given that the sweep's dictionaries need."""
    if not sweep.dictionaries:
        raise BadInput(
            "sweep.dictionaries is empty; autoencoder, transcoder, skip_transcoder or crosscoder is expected"
        )
    for layer in sweep.layers:
        not_negative("sweep.layers", layer)
    transcoders = [each for each in sweep.dictionaries if each.endswith("transcoder")]
    if transcoders and not sweep.layers:
        raise BadInput(
            f"sweep.dictionaries has {transcoders[0]}, which reads the input of a block's MLP and writes its output: "
            "say of which blocks by sweep.layers, counted from 0"
        )
    places = placements(replace(sweep, dictionaries=("crosscoder",)))[0]["reads"]
    if "crosscoder" in sweep.dictionaries and len(places) < 2:
        raise BadInput(
            f"sweep.dictionaries has crosscoder, which is over several places, but there {'is' if places else 'are'} "
            f"{places[0] if places else 'none'}; give at least two of sweep.places, or of sweep.layers"
        )
    if set(transcoders) == set(sweep.dictionaries) and sweep.places:
        raise BadInput(
            f"sweep.places is {' '.join(sweep.places)}, but transcoders go by sweep.layers, and there is nothing else; "
            "leave it out, or give explicit members with reads and writes"
        )


def _scaled(member: Member) -> Member:
    """The member with its learning rate times 1 / sqrt(F / 2^14)."""
    if member.learning_rate is None:
        raise BadInput(
            "sweep.scale_learning_rates multiplies learning rates, but a member has none; give sweep.learning_rates, "
            "or leave it out: the default falls with 1 / sqrt(F) by itself"
        )
    positive(_option("features"), member.features)
    return replace(member, learning_rate=member.learning_rate / math.sqrt(member.features / LEARNING_RATE_WIDTH))


def complete(member: Member) -> Member:
    """The member with its kind's defaults in place of None.

    Raises:
        BadInput: if it has a setting that its kind does not have.
    """
    kind = kind_named(member.kind)
    member = _placed(member)
    for name, kinds in of_some_kinds(member.kind).items():
        if getattr(member, name) is not None and member.kind not in kinds:
            raise _of_another_kind(name, (getattr(member, name),), (member.kind,), kinds)
    defaults = GENERAL | dict(kind.defaults(settings_of(member)))
    if member.reads != member.writes:
        defaults["initialization"] = "independent"
    if (member.initialization or defaults["initialization"]) != "orthogonal":
        defaults["encoder_bias"] = 0.0  # it belongs to that
    defaults["learning_rate"] = LEARNING_RATE_OF_ONE_FEATURE / math.sqrt(min(max(1, member.features), 2**31))
    if (member.decoder_norm or defaults["decoder_norm"]) == "unit":
        defaults["initial_norm"] = 1.0
    return replace(member, **{name: value for name, value in defaults.items() if getattr(member, name) is None})


def _placed(member: Member) -> Member:
    """The member with its placement as it is kept: `place` alone of an autoencoder, else `reads` and `writes`.

    Raises:
        BadInput: if these do not go together.
    """
    if member.place and (member.reads or member.writes):
        raise BadInput(
            f"a member has the place {member.place}, and reads or writes besides; give place to an autoencoder, reads "
            "and writes to another dictionary"
        )
    if member.writes and not member.reads:
        raise BadInput(f"a member writes {' and '.join(member.writes)}, but does not say what it reads")
    reads, writes = tuple(member.reads or ()), tuple(member.writes or member.reads or ())
    for which, names in (("reads", reads), ("writes", writes)):
        for name in names:
            plain_name(f"{which} of a member", name)
        if len(set(names)) < len(names):
            raise BadInput(f"a member {which} {' and '.join(names)}: one of them twice")
    if member.skip and (not reads or set(reads) & set(writes)):
        raise BadInput(
            "a member has skip, but writes a place that it reads, which would go past its features whole; skip belongs "
            "to dictionaries that write other places than they read"
        )
    for name in writes:
        if name not in reads and not any(_leads_to(each, name) for each in reads):
            raise BadInput(
                f"a member reads {' and '.join(reads)} and writes {name}, to which the network comes earlier: nothing "
                "that is read leads there; swap them, or read an earlier place"
            )
    if len(reads) == 1 and reads == writes:
        return replace(member, place=reads[0], reads=None, writes=None, skip=None)
    return replace(member, reads=reads or None, writes=writes or None, skip=member.skip or None)


def _leads_to(read: str, written: str) -> bool:
    """Whether a place is earlier than another in the network; yes where the names do not tell."""
    of_read, of_written = when(read), when(written)
    return of_read is None or of_written is None or of_read < of_written


def _of_another_kind(name: str, values: Sequence[Any], found: Sequence[str], kinds: Sequence[str]) -> Contradiction:
    return Contradiction(
        _option(name),
        f"is {values[0]!r}",
        f"kind {' or '.join(repr(kind) for kind in dict.fromkeys(found))} does not have it",
        f"{', '.join(kinds)} have",
        value=values,
        others=("sweep.kinds", "sweep.members"),
    )


def _option(name: str) -> str:
    return f"sweep.{SETTINGS[name].list or name}"


def check(member: Member) -> None:
    """Raise BadInput unless a complete member can be trained."""
    check_ranges(member, _option)
    for name, value in settings_of(member).items():
        if isinstance(value, float):
            within_float32(_option(name), value)
        if SETTINGS[name].counts_features and value > member.features:
            raise Contradiction(
                _option(name),
                f"is {value:g}",
                f"the member has {member.features} features",
                "give at most that",
                value=value,
                others=("sweep.features", "sweep.members"),
            )
    start = ("sweep.initialization", "sweep.decoder_norm", "sweep.kinds", "sweep.members")
    if member.encoder_bias and member.initialization != "orthogonal":
        raise Contradiction(
            "sweep.encoder_bias",
            f"is {member.encoder_bias:g}",
            "it belongs to sweep.initialization = 'orthogonal'",
            "set that, or leave it at 0",
            value=member.encoder_bias,
            others=start,
        )
    if member.decoder_norm == "unit" and member.initialization == "transposed" and member.initial_norm != 1:
        raise Contradiction(
            "sweep.initial_norm",
            f"is {member.initial_norm:g}",
            "sweep.decoder_norm = 'unit' makes it 1",
            "drop one",
            value=member.initial_norm,
            others=start,
        )
    needed = [name for name, default in kind_named(member.kind).settings.items() if default is None]
    given = [name for name in needed if getattr(member, name) is not None]
    if needed and len(given) != 1:
        found = " and ".join(f"{_option(name)} {getattr(member, name):g}" for name in given) or "neither"
        raise BadInput(
            f"kind {member.kind!r} needs {' or '.join(map(_option, needed))}"
            + (f", one of them, not {found}" if len(needed) > 1 else "")
        )


def settings_of(member: Member) -> dict[str, Any]:
    """The settings that a complete member has, by name; those of [train] only if it says otherwise."""
    return {name: value for name, value in asdict(member).items() if value is not None}


def recorded_member(settings: Mapping[str, Any]) -> Member:
    """The complete member that `settings_of` gave; what its version did not have is as it was there.

    Defaults may have changed since; a member has those with which it began, because all of them are recorded.
    """
    before = {name: facts.before for name, facts in SETTINGS.items() if facts.before is not None}
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    return complete(Member(**{**before, **settings, **lists}))


def describe_member(member: Member) -> str:
    """On one line what a complete member is: not how it begins, nor what its kind does by default, but k."""
    its = kind_named(member.kind).defaults(settings_of(member))
    defaults: Mapping[str, Any] = {"kind": "relu", **its, "k": None}
    shown = [
        (name.replace("_", " "), " ".join(value) if isinstance(value, tuple) else value)
        for name, value in settings_of(member).items()
        if name not in GENERAL and value != defaults.get(name)
    ]
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown)


def member_names(members: Sequence[Member]) -> list[str]:
    """One name a member, unique: F768, with topk- before it in a sweep of several kinds, and what tells apart behind.

    Such as F768-seed1, F768-lr0.001, topk-F768-k32; in a sweep of several placements with its label in front of all
    else, 9.mlp_out-topk-F768-k32, 9.transcoder-topk-F768-k32, crosscoder-topk-F768-k32. A kind from elsewhere is called
    by its class, with its module in front where another one is called alike.
    """
    kinds = list(dict.fromkeys(member.kind for member in members))
    short = {kind: re.split("[:.]", kind)[-1] for kind in kinds}
    times = Counter(each.lower() for each in short.values())  # as some disks see them
    called = {kind: short[kind] if times[short[kind].lower()] == 1 else _dotted(kind) for kind in kinds}
    labels = placement_labels(members)
    names = []
    for member, label in zip(members, labels, strict=True):
        its = (label, member.kind, member.features)
        alike = [other for other, of in zip(members, labels, strict=True) if (of, other.kind, other.features) == its]
        name = f"{label}-" * (len(set(labels)) > 1)
        name += f"{called[member.kind]}-" * (len(kinds) > 1) + f"F{member.features}"
        for setting in [*OPTIONAL, "seed", "learning_rate"]:
            value = getattr(member, setting)
            if value is not None and len({getattr(other, setting) for other in alike}) > 1:
                name += f"-{SETTINGS[setting].label or setting}{value}"
        names.append(name)
    return names


def placement_of(member: Member) -> tuple[Any, ...]:
    """What it reads and writes, and whether anything goes past its features: members that differ here share nothing."""
    return tuple(getattr(member, name) for name in PLACEMENT)


def placement_labels(members: Sequence[Member]) -> list[str]:
    """What tells their placements apart, on the screen and in names of files; of each member, in their order.

    A place; 9.transcoder and 9.skip_transcoder of what reads 9.mlp_in and writes 9.mlp_out; crosscoder; else the first
    places that are read and written, 9.resid_mid-to-9.resid_post. What would be called alike is numbered from the
    second one on.
    """
    labels: dict[tuple[Any, ...], str] = {}
    for member in members:
        if (its := placement_of(member)) not in labels:
            label = placement_label(member)
            alike = sum(re.sub(r"-\d+$", "", other) == label for other in labels.values())
            labels[its] = f"{label}-{alike + 1}" if alike else label
    return [labels[placement_of(member)] for member in members]


def placement_label(member: Member) -> str:
    """That of a member by itself; empty where it has no place."""
    if not (member.reads and member.writes):
        return member.place or ""
    if member.reads == member.writes:
        return "crosscoder"
    block = member.reads[0].rpartition(".")[0]
    skip = "skip_" if member.skip else ""
    if (member.reads, member.writes) == ((f"{block}.mlp_in",), (f"{block}.mlp_out",)):
        return f"{block}.{skip}transcoder"
    return f"{member.reads[0]}-to-{member.writes[0]}{'-skip' if skip else ''}"


def _dotted(kind: str) -> str:
    """`module:Class` as a part of a file's name."""
    return kind.replace(":", ".").replace("<locals>.", "")
