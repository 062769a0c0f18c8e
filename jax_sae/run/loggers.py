"""A run for those who watch it: in TensorBoard and in Weights & Biases, from the lines of metrics.jsonl.

These are the truth, and what stands elsewhere follows from them. When a run is resumed, each logger is given all lines
up to the step where the run goes on, and takes those that it lacks: of a line that it has beyond that step, which comes
again, a reader sees one.
"""

import io
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jax_sae.config import Config
from jax_sae.config_tables import config_to_dict
from jax_sae.errors import BadInput
from jax_sae.language_model.hub import one_line
from jax_sae.streams import say

BINS_A_DECADE = 4
HELD_OUT = ("fvu", "pca_floor_fvu", "fvu_over_floor", "linear_fvu", "l0", "dead_features")
"""What of a member's entry in `summary.json` becomes a scalar, called `held_out_fvu` and so on."""

Line = dict[str, Any]
"""A line of metrics.jsonl."""


class Histogram(NamedTuple):
    """How many features have a value between each two edges."""

    edges: np.ndarray
    """[K + 1] float64, rising."""
    counts: np.ndarray
    """[K] int64."""


class Silence(NamedTuple):
    """Of a member, for how long its features have been silent."""

    dead_features: int
    """Those that have not fired for `dead_after_tokens` tokens."""
    tokens_since_fired: Histogram
    """log10 of 1 + the tokens since a feature fired, by features."""


class Result(NamedTuple):
    """What is told once a run is finished."""

    members: Sequence[Mapping[str, Any]]
    """As `summary.json` has them."""
    densities: Mapping[str, Histogram]
    """By member: log10 of the part of the held-out tokens on which a feature fires, of those that do."""
    table: str
    """The closing table."""
    pictures: Sequence[Path]
    """PNG files: the frontier, of each place."""


def histogram(values: np.ndarray, lowest: float, highest: float) -> Histogram:
    """Values [n] in bins of a quarter, from the whole number below the lowest to that above the highest."""
    first, last = int(np.floor(lowest)), max(int(np.ceil(highest)), int(np.floor(lowest)) + 1)
    edges = np.linspace(first, last, (last - first) * BINS_A_DECADE + 1)
    return Histogram(edges, np.histogram(values, edges)[0])


def density_histogram(fired: np.ndarray, tokens: int) -> Histogram:
    """Of how many tokens each feature fired on [F], of so many: log10 of the part; silent features are in no bin."""
    return histogram(np.log10(fired[fired > 0]) - np.log10(tokens), -np.log10(max(tokens, 10)), 0.0)


def silence(tokens_since_fired: np.ndarray, dead_after_tokens: int) -> Silence:
    """Of the tokens since each feature fired [F], and after how many one is dead."""
    logarithms = np.log10(1.0 + tokens_since_fired)
    its = histogram(logarithms, 0.0, float(logarithms.max(initial=0)))
    return Silence(int(np.sum(tokens_since_fired >= dead_after_tokens)), its)


class Logger(Protocol):
    """One place where a run is watched; anything that it raises is said, and ends it, but not the run."""

    def begin(self, step: int, lines: Iterable[Line], members: Sequence[str]) -> str:
        """Open what is written, for a run that goes on after `step`, and take the lines up to it that are lacking.

        Returns:
            What to do to see it.
        """

    def write(self, lines: Sequence[Line]) -> None:
        """Take lines of later steps."""

    def silences(self, step: int, of_members: Mapping[str, Silence]) -> None:
        """Take what is known of the features of some members at a checkpoint."""

    def end(self, step: int, result: Result) -> None:
        """Take what a finished run comes to."""

    def close(self) -> None:
        """Everything has been told, or the run was stopped."""


class TensorBoard:
    """Event files in `tensorboard/` of a run's directory: a folder a member, so that one chart shows them all.

    Each session of a run begins new files, which tell a reader to forget what those before have from some step on.
    """

    def __init__(self, out: Path, config: Config) -> None:
        """For the run in a directory; nothing is made yet."""
        self._folder = out / "tensorboard"
        self._name = f"events.out.tfevents.{time.time_ns()}.jax_sae"

    def begin(self, step: int, lines: Iterable[Line], members: Sequence[str]) -> str:
        """As `Logger.begin`; the last line that all members have is written anew, with all that follow it."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        there = min(last_step(self._folder / member) for member in members)
        known: list[Line] = []
        for line in lines:
            if line["step"] <= there:
                known.clear()
            known.append(line)
        restart = SessionLog(status=SessionLog.START)
        for member in members:
            self._append(member, [self._event(step=known[0]["step"] if known else 0, session_log=restart)])
        self.write(known)
        return f"tensorboard --logdir {self._folder}"

    def write(self, lines: Sequence[Line]) -> None:
        """As `Logger.write`."""
        for member in lines[0]["members"] if lines else ():
            self._append(member, [self._scalars(line["step"], line["members"][member]) for line in lines])

    def silences(self, step: int, of_members: Mapping[str, Silence]) -> None:
        """As `Logger.silences`."""
        for member, its in of_members.items():
            told = self._histogram("tokens_since_fired", its.tokens_since_fired)
            self._append(member, [self._scalars(step, {"dead_features": its.dead_features}), self._event(step, [told])])

    def end(self, step: int, result: Result) -> None:
        """As `Logger.end`; table and pictures stand in a folder of their own."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        for member in result.members:
            name = member["name"]
            held_out = {f"held_out_{metric}": member.get(metric) for metric in HELD_OUT}
            told = [self._histogram("held_out_density", result.densities[name])]
            self._append(name, [self._scalars(step, held_out), self._event(step, told)])
        table = "".join(f"    {line}\n" for line in result.table.split("\n"))  # indented: shown as it is
        text = TensorProto(dtype=DT_STRING, string_val=[table.encode()])
        is_text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        told = [Summary.Value(tag="members", metadata=is_text, tensor=text)]
        for picture in result.pictures:
            content = picture.read_bytes()
            width, height = struct.unpack_from(">II", content, 16)
            image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
            told.append(Summary.Value(tag=picture.stem, image=image))
        self._append(
            "all", [self._event(step, session_log=SessionLog(status=SessionLog.START)), self._event(step, told)]
        )

    def close(self) -> None:
        """As `Logger.close`; all has been written already."""

    def _append(self, folder: str, events: Sequence[Any]) -> None:
        """Write events to this session's file in a folder: all of them, on disk as far as the system is concerned."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        path = self._folder / folder / self._name
        path.parent.mkdir(parents=True, exist_ok=True)
        first = [] if path.exists() else [self._event(file_version="brain.Event:2")]
        records = io.BytesIO()
        for event in [*first, *events]:
            RecordWriter(records).write(event.SerializeToString())
        with open(path, "ab") as file:
            file.write(records.getvalue())

    def _event(self, step: int = 0, values: Sequence[Any] = (), **others: Any) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        its = {"summary": Summary(value=values)} if values else {}
        return Event(wall_time=time.time(), step=step, **its, **others)

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> Any:
        from tensorboard.compat.proto.summary_pb2 import Summary

        finite = {tag: value for tag, value in values.items() if value is not None}
        return self._event(step, [Summary.Value(tag=tag, simple_value=value) for tag, value in finite.items()])

    def _histogram(self, tag: str, its: Histogram) -> Any:
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        centres = (its.edges[1:] + its.edges[:-1]) / 2
        told = HistogramProto(
            min=its.edges[0],
            max=its.edges[-1],
            num=its.counts.sum(),
            sum=its.counts @ centres,
            sum_squares=its.counts @ centres**2,
            bucket_limit=its.edges,
            bucket=[0, *its.counts],
        )
        return Summary.Value(tag=tag, histo=told)


def last_step(folder: Path) -> int:
    """The step of the last whole event in the newest event file of a folder; 0 where there is none."""
    from tensorboard.compat.proto.event_pb2 import Event

    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return 0
    event = b""
    with open(files[-1], "rb") as file:
        while len(head := file.read(12)) == 12:  # the length of an event, and a checksum of it
            length = struct.unpack("<Q", head[:8])[0]
            found = file.read(length)
            if len(file.read(4)) < 4:  # the event's own checksum: a run that is killed may leave half an event
                break
            event = found
    return int(Event.FromString(event).step)


class WeightsAndBiases:
    """One run of Weights & Biases, whose id is kept in `wandb.json` of the run's directory, with members as series.

    Without a network (WANDB_MODE=offline) each session of a run writes all of it, and what those before have written is
    set aside: a process that is killed takes its last lines with it, and nothing tells which.
    """

    def __init__(self, out: Path, config: Config) -> None:
        """For the run in a directory; nothing is made yet."""
        self._out, self._config = out, config
        self._run: Any = None

    def begin(self, step: int, lines: Iterable[Line], members: Sequence[str]) -> str:
        """As `Logger.begin`."""
        import wandb

        kept = self._out / "wandb.json"
        id = json.loads(kept.read_text())["id"] if kept.exists() else None
        for before in self._out.glob(f"wandb/offline-run-*-{id}") if id else ():
            aside = self._out / "wandb" / "superseded" / before.name
            aside.parent.mkdir(exist_ok=True)
            os.replace(before, aside)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jax_sae"),
            id=id,
            name=self._out.name,
            dir=self._out,
            resume="allow",
            reinit="create_new",  # a program may have a run of its own
            config=config_to_dict(self._config),
            settings=wandb.Settings(console="off", silent=True, finish_timeout=60),
        )
        kept.write_text(json.dumps({"id": self._run.id}) + "\n")
        self.write(lines)
        return f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else str(self._run.url)

    def write(self, lines: Iterable[Line]) -> None:
        """As `Logger.write`; lines that are there, as those of a process that was killed may be, are left out."""
        for line in lines:
            told = {
                f"{metric}/{member}": value
                for member, its in line["members"].items()
                for metric, value in its.items()
                if value is not None
            }
            self._log(line["step"], {"tokens": line["tokens"], **told})

    def silences(self, step: int, of_members: Mapping[str, Silence]) -> None:
        """As `Logger.silences`."""
        for member, its in of_members.items():
            told = self._histogram(its.tokens_since_fired)
            self._log(step, {f"dead_features/{member}": its.dead_features, f"tokens_since_fired/{member}": told})

    def end(self, step: int, result: Result) -> None:
        """As `Logger.end`."""
        import wandb

        columns = list(dict.fromkeys(name for member in result.members for name in member))
        rows = [[_plain(member.get(name)) for name in columns] for member in result.members]
        told = {f"held_out_density/{name}": self._histogram(its) for name, its in result.densities.items()}
        pictures = {picture.stem: wandb.Image(str(picture)) for picture in result.pictures}
        self._log(step, {**told, **pictures, "members": wandb.Table(columns=[*columns], data=rows)})
        for member in result.members:
            its = {f"held_out_{metric}/{member['name']}": member.get(metric) for metric in HELD_OUT}
            self._run.summary.update({name: value for name, value in its.items() if value is not None})

    def close(self) -> None:
        """As `Logger.close`; waits for a minute at most until all is sent."""
        if self._run is not None:
            self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.step:
            self._run.log(values, step=step)

    def _histogram(self, its: Histogram) -> Any:
        import wandb

        return wandb.Histogram(np_histogram=(its.counts, its.edges))


def _plain(value: Any) -> Any:
    """A value for a cell of a table."""
    return value if isinstance(value, str | int | float | None) else str(value)


LOGGERS: dict[str, Callable[[Path, Config], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""By the name of its flag, of its extra and of the module that it needs."""


def refuse_missing(names: Sequence[str], out: Path | None) -> None:
    """Raise BadInput for a logger whose package is not installed, and for any where the run has no directory."""
    for name in names:
        if getattr(find_spec(name), "origin", None) is None:  # a folder of that name, such as a run's, is no package
            raise BadInput(f"{name} is asked for, but is not installed; pip install 'jax_sae[{name}]', or leave it out")
        if out is None:
            raise BadInput(f"{name} is asked for, but the run has no directory, where its files go; give out")


def read_lines(metrics: Path) -> Iterator[Line]:
    """The lines of a metrics.jsonl, which may not be there yet."""
    if metrics.exists():
        with open(metrics) as file:
            yield from map(json.loads, file)


class Loggers:
    """The loggers of a run, which have no say in it: one that fails is told of once, and written to no more."""

    def __init__(self, names: Sequence[str], out: Path | None, config: Config = Config()) -> None:  # noqa: B008
        """Those with these names, of LOGGERS; none of a run without a directory."""
        self._loggers = {name: LOGGERS[name](out, config) for name in names} if out else {}

    def __enter__(self) -> "Loggers":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self.tell(lambda logger: logger.close())

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._loggers)

    def begin(self, step: int, metrics: Path, members: Sequence[str]) -> None:
        """Let them begin after `step`, from the lines in `metrics`, and say where to look."""
        self._each(lambda name, logger: say([f"{name:<14}{logger.begin(step, read_lines(metrics), members)}"]))

    def tell(self, what: Callable[[Logger], object]) -> None:
        """Call a function with each of them."""
        self._each(lambda name, logger: what(logger))

    def _each(self, what: Callable[[str, Logger], object]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                what(name, logger)
            except Exception as error:  # of a full disk, a network, or whatever the logger's package raises
                del self._loggers[name]
                say(
                    [
                        f"warning       {name} failed ({one_line(error)}); the run goes on without it, and its lines "
                        "are in metrics.jsonl"
                    ]
                )
