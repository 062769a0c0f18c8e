"""Several processes that train one run together: how they meet, share and end.

JAX's own runtime joins them (`jax.distributed`). Each has its own devices, and a mesh is of all of them. All take the
same steps, and what a process knows alone, a signal or an error, is shared before it counts. The first writes files and
tells the user; of a checkpoint each writes what lies on its devices.
"""

import ctypes
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.errors import BadInput, RunFailed, SourceLost

SECONDS_TO_MEET = 60
"""How long processes wait for each other at the start."""

SECONDS_UNHEARD = 30
"""After so long without a sign of another process it counts as lost, and all end."""

SECONDS_UNSEEN = 10
"""How long what one process has written may take to be seen by another one: file systems on a network remember."""

CLUSTERS = {
    "Slurm's srun": ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"),
    "TPU": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
}
"""Of environments that start several processes and that JAX knows, variables by which they are seen. The first of them
says how many there are, by a number or by names, but for Kubernetes, whose jobs have such an index at all."""


class EndedElsewhere(RunFailed):
    """Another process of the run could not go on; it says why."""

    def __init__(self, what: str, of_reading: bool = False) -> None:
        """With `of_reading` it is what it reads, so that all save the run before they end."""
        super().__init__(what)
        self.of_reading = of_reading


@dataclass(frozen=True)
class Meeting:
    """Where processes meet: HOST:PORT of the first one, how many they are, and which this is, from 0."""

    coordinator: str
    num_processes: int
    process_id: int


def detected() -> str | None:
    """The environment that started several processes, this one among them; None if there is none."""
    for name, (number, beside) in CLUSTERS.items():
        said = os.environ.get(number, "")
        count = int(said) if said.isdigit() else len([each for each in said.split(",") if each])
        if os.environ.get(beside) and (count > 1 or (name == "Kubernetes" and said)):
            return name
    return None


def meeting(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Meeting | None:
    """What the command line says of the processes; None if it says nothing.

    Raises:
        BadInput: if it does not say all of it, or the numbers cannot be.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise BadInput(f"{' and '.join(missing)} is missing; give all of {', '.join(given)}, or none of them")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise BadInput(f"--coordinator is {coordinator!r}; HOST:PORT of the first process was expected")
    if num_processes < 1:
        raise BadInput(f"--num-processes is {num_processes}; a number above 0 was expected")
    if not 0 <= process_id < num_processes:
        raise BadInput(f"--process-id is {process_id}; a number from 0 to {num_processes - 1} was expected")
    return Meeting(coordinator, num_processes, process_id)


def join(asked: Meeting | None) -> list[str]:
    """Join the other processes, as the command line or the environment says; before any device is used.

    Returns:
        A line that says which, none where this process is alone.

    Raises:
        BadInput: if the others are not there within SECONDS_TO_MEET.
    """
    found = None if asked else detected()
    if asked is None and found is None:
        return []
    if asked and asked.num_processes == 1:
        return ["processes     1, alone"]
    import jax

    waits: dict[str, Any] = {
        "initialization_timeout": SECONDS_TO_MEET,
        "heartbeat_timeout_seconds": SECONDS_UNHEARD,
    }
    where = f"at {asked.coordinator}" if asked else f"as {found} says"
    not_met = (
        f"the processes of this run did not meet {where} within {SECONDS_TO_MEET} s; start all of them, with the same "
        "--coordinator and --num-processes"
    )
    say_when_aborted(not_met)
    if asked and asked.process_id > 0:
        _refuse_unreachable(asked)
    try:
        if asked:
            jax.distributed.initialize(asked.coordinator, asked.num_processes, asked.process_id, **waits)
        else:
            jax.distributed.initialize(**waits)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{not_met} ({_short(error)})") from error
    say_when_aborted(GONE)
    return [
        f"processes     {jax.process_count()}, {where}; this is number {jax.process_index()} on "
        f"{socket.gethostname()}, with {jax.local_device_count()} of {jax.device_count()} devices"
    ]


def _refuse_unreachable(asked: Meeting) -> None:
    """Raise BadInput unless something listens at the coordinator's address before long: JAX's client would abort."""
    host, _, port = asked.coordinator.rpartition(":")
    end = time.monotonic() + SECONDS_TO_MEET
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise BadInput(
                    f"nothing listens at --coordinator {asked.coordinator} for {SECONDS_TO_MEET} s ({_short(error)}); "
                    "start the process with --process-id 0 there, and let this one reach it"
                ) from error
            time.sleep(0.5)


GONE = "another process of this run is gone; start all of them again, with --resume"

_at_abort: list[Any] = []  # what C calls has to stay alive


def say_when_aborted(what: str) -> None:
    """A line when JAX's runtime ends this process, which it does by SIGABRT where another one is not heard."""

    def tell(_: int) -> None:
        os.write(2, f"\nerror: {what}\n".encode())

    _at_abort.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(tell))
    ctypes.CDLL(None).signal(
        signal.SIGABRT, _at_abort[-1]
    )  # Python's own handler waits for the main thread, which hangs


def several() -> bool:
    """Whether there are several processes."""
    import jax

    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes files and tells the user; true where it is alone."""
    import jax

    return jax.process_index() == 0


def gathered(values: Any) -> np.ndarray:
    """Numbers of each process, [processes, ...]; all have to ask at the same time.

    Raises:
        RunFailed: if one of them is gone.
    """
    from jax.experimental import multihost_utils

    with others_are_there():
        return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


def told(what: Any) -> list[Any]:
    """What each process says, something that JSON can hold, in their order; all have to ask at the same time."""
    if not several():
        return [what]
    text = json.dumps(what).encode()
    most = int(gathered(len(text)).max())
    return [json.loads(bytes(each)) for each in gathered(np.frombuffer(text.ljust(most), np.uint8))]


@contextmanager
def others_are_there() -> Iterator[None]:
    """Within it, an error of JAX's runtime means that another process is gone, and is raised as such."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not several():
            raise
        raise RunFailed(f"{GONE} ({_short(error)})") from error


OF_READING, OF_ELSE = 1, 2
"""What a process could not do: read what it was given, after which a run is saved, or something else."""


@contextmanager
def together() -> Iterator[None]:
    """Within it each process works by itself; at its end all go on, or none.

    Raises:
        EndedElsewhere: if another process raised something, which it says itself.
    """
    if not several():
        yield
        return
    try:
        yield
    except Exception as error:
        gathered(OF_READING if isinstance(error, (BadInput, SourceLost)) else OF_ELSE)
        raise
    if (problems := gathered(0)).any():
        raise EndedElsewhere(
            "another process of this run could not go on, and says why", of_reading=OF_ELSE not in problems
        )


def agree(settings: Mapping[str, str]) -> None:
    """Raise BadInput, in the first process, unless all have the same settings, or digests, of what they compute with.

    Raises:
        EndedElsewhere: in the others.
    """
    first, *others = told(dict(settings))
    for i, other in enumerate(others, 1):
        names = [name for name in first | other if first.get(name) != other.get(name)]
        if names and not is_first():
            raise EndedElsewhere("the processes of this run differ in their settings")
        if names:
            which = "; ".join(
                f"{name} {first.get(name)} in number 0, {other.get(name)} in number {i}" for name in names
            )
            raise BadInput(
                f"the processes of this run differ: {which}; start all of them with the same command, on the same files"
            )


def refuse_separate_disks(directory: Path) -> None:
    """Raise BadInput, in each process that does not see what the first one writes into a directory.

    Raises:
        EndedElsewhere: in the others.
    """
    if not several():
        return
    seen = directory / f".seen-by-all-{int(first_says(int.from_bytes(os.urandom(2))))}"
    with together():
        if is_first():
            seen.touch()
    try:
        with together():
            if not is_there(seen):
                raise BadInput(
                    f"{directory} on {socket.gethostname()} is not the directory that the first process writes to; "
                    "--out has to lie on a disk that all processes share"
                )
    finally:
        if is_first():
            seen.unlink()


def is_there(path: Path) -> bool:
    """Whether a file or folder that another process has written is there, or comes within SECONDS_UNSEEN."""
    end = time.monotonic() + SECONDS_UNSEEN
    while not path.exists():
        if time.monotonic() > end:
            return False
        os.listdir(path.parent if path.parent.is_dir() else ".")  # a file system on a network looks again
        time.sleep(0.1)
    return True


def _short(error: Exception) -> str:
    """What a library says of an error, on a line that is not long."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:120]


def first_says(value: float) -> float:
    """The first process's number, in all of them."""
    return float(gathered(float(value))[0]) if several() else value  # a large whole number would not be sent whole


def any_of(flag: bool) -> bool:
    """Whether it is so in any process."""
    return bool(gathered(flag).any()) if several() else flag


def own_share(n: int) -> np.ndarray:
    """[n] bool: which of n things this process does; each is done by one."""
    import jax

    return np.arange(n) % jax.process_count() == jax.process_index()


def summed(x: np.ndarray) -> np.ndarray:
    """The sum of arrays of all processes, in each of them; each number is 0 in all but one, so that it is exact."""
    import jax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    firsts = [next(each for each in jax.devices() if each.process_index == i) for i in range(jax.process_count())]
    mesh = Mesh(np.array(firsts), ("process",))
    own = jax.device_put(x[None], firsts[jax.process_index()])
    parts = jax.make_array_from_single_device_arrays((len(firsts), *x.shape), NamedSharding(mesh, P("process")), [own])
    with others_are_there():
        return np.asarray(jax.jit(lambda each: each.sum(0), out_shardings=NamedSharding(mesh, P()))(parts))
