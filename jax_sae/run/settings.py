"""Flags over a file over the defaults: the settings of a run, and where each of them came from.

What contradicts itself within the file or within the flags is refused. What the file says and a flag makes meaningless,
such as k where the flags ask for kinds without it, is left out, and that is said.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jax_sae.activations.places import Place
from jax_sae.config import Config, Member, SweepConfig, named_places, placements, places_of, validate
from jax_sae.config_tables import config_with, find_config, flatten, load_settings, option_names
from jax_sae.errors import BadInput, Contradiction
from jax_sae.language_model.hub import find_local
from jax_sae.run.directory import read_config
from jax_sae.sweep.members import EXPANSION, of_some_kinds, settings_of, sweep_members, with_features

FLAGS = "the command line"
CALL = "the call"
OF_MODEL = tuple(name for name in option_names() if name.startswith(("model.", "text.")))
OF_FILES = ("activations.path", "activations.array", "activations.mask")
OF_DATA = ("activations.path", "model.path", "model.models", "text.path")
OF_PRODUCT = (
    "sweep.kinds",
    "sweep.features",
    "sweep.seeds",
    "sweep.learning_rates",
    "sweep.dictionaries",
    "sweep.layers",
)
INSTEAD = {
    "activations.path": OF_MODEL,
    "model.path": ("model.models", *OF_FILES),
    "model.models": ("model.path", *OF_FILES),
    "text.path": OF_FILES,
    "sweep.members": OF_PRODUCT,
    "sweep.target_l0": ("sweep.l0_coefficient",),
    "sweep.l0_coefficient": ("sweep.target_l0",),
}
"""Settings, and those in whose place each of them stands."""
MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "model.path",
    "model.models",  # their paths; names are parts of places' and inputs'
    "text.path",
    "text.config",
    "text.tokenizer",
    "activations.path",
    "activations.mask",
    "mesh.data",
    "mesh.member",
    "mesh.feature",
    "mesh.auto",
    "sweep.places",  # a place has several names; members' names and `restore` tell others
)
ANY_WIDTH = 2**31 - 1
"""Features where their number is not known yet, because it depends on the activations."""
MOST_SHOWN = 6
"""Values of a list that are shown."""


@dataclass(frozen=True)
class Layer:
    """Settings of one origin, by dotted names."""

    origin: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Merged:
    """The settings of a run, and lines that say which of them are not the defaults."""

    config: Config
    lines: tuple[str, ...]


def base(config: Path | None, flags: Mapping[str, Any]) -> tuple[str, Layer]:
    """The name of a run, and what flags stand over: a file, the demo, or nothing but the defaults.

    The settings of `demo` are for plain autoencoders of its own language model and stories. Whoever names other kinds
    without a file gets `demo_sparse`, as far as it is of these kinds; whoever names other data, the defaults.

    Raises:
        BadInput: if the file cannot be used.
    """
    if config is not None:
        return find_config(config).stem, Layer(str(config), load_settings(config))
    demo = load_settings(Path("demo"))
    if any(_is_another(flags[name], demo.get(name, "")) for name in OF_DATA if name in flags):
        return "sweep", Layer("the defaults", {})
    if kinds := _kinds_asked_for(flags):
        return "demo_sparse", _of_kinds(Layer("demo_sparse", load_settings(Path("demo_sparse"))), kinds)
    return "demo", Layer("demo", demo)


def _is_another(name: str | tuple[str, ...], demos: str) -> bool:
    """Whether a name of a model, a text or activations means another than the demo's; several models always do."""
    if isinstance(name, tuple):
        return bool(name)
    here, there = find_local(name), find_local(demos)
    return name != demos and not (here and there and here.samefile(there))


def _kinds_asked_for(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that flags name; none where these are plain autoencoders, as the demo has them."""
    members, l1 = flags.get("sweep.members", ()), flags.get("sweep.l1_coefficient")
    if members:
        is_plain = all(member.kind == "relu" and not member.l1_coefficient for member in members)
        return () if is_plain and not l1 else tuple(member.kind for member in members)
    kinds: tuple[str, ...] = flags.get("sweep.kinds", ("relu",) if l1 else ())
    return () if set(kinds) == {"relu"} and l1 is not None and not any(l1) else kinds


def _of_kinds(layer: Layer, kinds: tuple[str, ...]) -> Layer:
    """The layer for some kinds, without the settings that none of them has."""
    others = {f"sweep.{name}" for name, having in of_some_kinds(*kinds).items() if not set(having) & set(kinds)}
    settings = {name: value for name, value in layer.settings.items() if name not in others}
    return replace(layer, settings=settings | {"sweep.kinds": kinds})


def merge(lower: Layer, flags: Mapping[str, Any], origin: str = FLAGS) -> Merged:
    """Flags over a lower layer over the defaults.

    Raises:
        BadInput: if a value is not valid, or two settings contradict each other of which neither may be left out.
    """
    kept = dict(lower.settings)
    left_out: dict[tuple[str, str], list[str]] = {}  # origin and reason -> settings
    unread: set[str] = set()  # flags in whose place another flag stands
    for name, others in INSTEAD.items():
        for other in others if flags.get(name) and name not in unread else ():
            of_lower = kept.pop(other, None)
            if flags.get(other) or of_lower:
                of = origin if flags.get(other) else lower.origin
                left_out.setdefault((of, f"{name} is given instead"), []).append(other)
            unread |= {other} & set(flags)
    while True:
        config = config_with({**kept, **flags})
        try:
            validate(config)
            features = config.sweep.features or (() if config.sweep.members else (ANY_WIDTH,))
            sweep_members(replace(config.sweep, features=features))
        except Contradiction as error:
            rest = _without(kept, error)
            if error.setting in flags or rest == kept or not set(error.others) & set(flags):
                given = [name for name in (error.setting, *error.others) if name in kept and name not in flags]
                of = f" ({' and '.join(given)} of {lower.origin})" if given else ""
                raise BadInput(f"{error}{of}") from error
            some = error.setting in rest
            left_out.setdefault((lower.origin, error.reason), []).append(
                error.setting + f" {_shown(error.value)}" * some
            )
            kept = rest
        else:
            lines = origins(Layer(lower.origin, kept), Layer(origin, flags))
            lines += [f"left out      {', '.join(names)} of {of}: {why}" for (of, why), names in left_out.items()]
            return Merged(config, tuple(lines))


def settings_to_resume(out: Path, lower: Layer | None, flags: Mapping[str, Any], origin: str = FLAGS) -> Merged:
    """The settings with which the run in `out` goes on: its own, changed where flags say so and that is allowed.

    With --config on the command line, `lower`, the settings are those of the file and the flags, as for a new run, so
    that the command that started a run resumes it with --resume added; without, those of its config.json and the flags.

    Raises:
        BadInput: naming every setting that differs from the run's and must not.
    """
    own = read_config(out)
    before = flatten(own)
    of_sweep = {name: value for name, value in flags.items() if name.startswith("sweep.")}
    if lower is None and of_sweep and _at_the_widths_of(own.sweep, config_with(of_sweep).sweep) == own.sweep:
        flags = {name: value for name, value in flags.items() if name not in of_sweep}
    if lower is None:
        config = config_with(flags, own)
        validate(config)
        merged = Merged(config, tuple(origins(Layer(str(out / "config.json"), before), Layer(origin, flags))))
    else:
        merged = merge(lower, flags, origin)
        sweep = merged.config.sweep
        if not sweep.features:  # the run's own depend on the width of its activations
            sweep = _at_the_widths_of(own.sweep, replace(sweep, features=own.sweep.features))
        activations = merged.config.activations
        if activations.exclude_first_tokens is None:  # it depends on the tokenizer
            activations = replace(activations, exclude_first_tokens=own.activations.exclude_first_tokens)
        merged = replace(merged, config=replace(merged.config, sweep=sweep, activations=activations))
    now = flatten(merged.config)
    without_meaning: tuple[str, ...] = ()
    if before["activations.path"] and now["activations.path"]:
        without_meaning += OF_MODEL
    if before["sweep.members"] and now["sweep.members"]:
        without_meaning += OF_PRODUCT
    refused = [
        f"{name} {before[name]!r} -> {now[name]!r}"
        for name in before
        if before[name] != now[name] and name not in (*MAY_CHANGE_ON_RESUME, *without_meaning)
    ]
    if refused:
        raise BadInput(
            f"{out} was started with other settings ({'; '.join(refused)}); resume with its own, or start a new run"
        )
    return merged


def _at_the_widths_of(own: SweepConfig, sweep: SweepConfig) -> SweepConfig:
    """The sweep with 8 features a number at each place, where it says no number and the run's own did so too."""
    if sweep.features or sweep.members or not own.members:
        return sweep
    widths: dict[str, int] = {}
    for member in own.members:  # of a dictionary of several, the widest has so many, and no other has more
        for name in named_places([asdict(member)]):
            widths[name] = min(widths.get(name, member.features), member.features // EXPANSION)
    places = [Place(name, width) for name, width in widths.items()]
    its = sweep if named_places(placements(sweep)) else replace(sweep, places=places_of(own))
    return with_features(its, places) if set(named_places(placements(its))) <= set(widths) else sweep


def _without(settings: dict[str, Any], error: Contradiction) -> dict[str, Any]:
    """The settings without the value that cannot stand, and without its setting where that was its only one."""
    values = settings.get(error.setting)
    if not isinstance(values, tuple):
        values = (values,)
    gone = error.value if isinstance(error.value, tuple) else (error.value,)
    left = tuple(value for value in values if value not in gone)
    rest = {name: value for name, value in settings.items() if name != error.setting}
    return settings if left == values else rest | ({error.setting: left} if left else {})


def origins(lower: Layer, upper: Layer) -> list[str]:
    """The settings that are not the defaults, a line for each place that they came from."""
    defaults = flatten(Config())
    of_lower = Layer(
        lower.origin, {name: value for name, value in lower.settings.items() if name not in upper.settings}
    )
    lines = []
    for layer in (of_lower, upper):
        shown = [f"{name} {_shown(value)}" for name, value in layer.settings.items() if value != defaults[name]]
        if shown:
            lines.append(f"settings      from {layer.origin}: {', '.join(shown)}")
    return lines


def _shown(value: Any) -> str:
    """A setting's value, shortened."""
    if isinstance(value, tuple):
        more = [f"... ({len(value)} in all)"] if len(value) > MOST_SHOWN else []
        return " ".join([*map(_shown, value[:MOST_SHOWN]), *more]) or "none"
    if isinstance(value, Member):
        return ",".join(f"{name}={_shown(part)}" for name, part in settings_of(value).items())
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"
