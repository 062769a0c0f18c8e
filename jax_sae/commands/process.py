"""A command's process: what libraries are told, exit codes, errors in one line."""

import errno
import hashlib
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from jax_sae.commands.stop_signals import STOPPED, free_quietly, raising_signals
from jax_sae.errors import BadInput, RunFailed
from jax_sae.processes import EndedElsewhere
from jax_sae.streams import lasting_streams, lost_output

BROKEN_PIPE = 13
"""SIGPIPE, which some systems do not have."""


def run_script(argv: Sequence[str], work: Callable[[], int]) -> int:
    """Do the work of a script, and return its exit code; what ends it badly is one line, or with --debug a traceback.

    0: done. 1: the work could not go on: a disk is full, every member diverged. 2: something given cannot be used. 128
    and the number of a signal: it was ended by that one, SIGPIPE (141) where nobody reads what it tells. Any other
    exception is a defect of this package, and is raised.
    """
    with lasting_streams(), raising_signals(), caches() as lines:
        keep_libraries_quiet()
        if lines and not {"-h", "--help"} & set(argv):
            print("\n".join(lines), file=sys.stderr)
        code = _exit_code(argv, work)
        sys.stdout.flush()
        lost = lost_output() - {errno.EIO, errno.EBADF}  # the terminal is gone, and nobody is there to be told
        if code or not lost:
            return code
        if errno.EPIPE in lost:
            return 128 + BROKEN_PIPE
        print(f"error: what was to be told could not be written ({os.strerror(min(lost))})", file=sys.stderr)
        return 1


def _exit_code(argv: Sequence[str], work: Callable[[], int]) -> int:
    try:
        return work()
    except KeyboardInterrupt as error:
        print(f"\n{STOPPED}", file=sys.stderr)
        free_quietly(error)
        return 128 + int((*error.args, signal.SIGINT)[0])
    except EndedElsewhere:
        return 1
    except (BadInput, RunFailed, OSError, MemoryError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        message = str(error)
        if isinstance(error, OSError):
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room, and go on with --resume" if is_full else "put that right; a run goes on with --resume"
            message = f"a file could not be read or written ({error}); {advice}"
        elif isinstance(error, MemoryError):
            message = f"there is too little memory ({error}); ask for less at a time"
        print("error:", *message.splitlines(), file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1


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
    os.environ["MPLBACKEND"] = "agg"  # figures are files; a notebook's backend, inherited from it, may not be there


@contextmanager
def caches() -> Iterator[list[str]]:
    """Say where libraries keep files, and how a GPU's memory is taken; must come before they are imported.

    Compiled programs are kept for the next process. The folder is the machine's own, because programs for another
    processor do not run, below $XDG_CACHE_HOME or ~/.cache; those that were not used for longest are removed at 1 GB. A
    GPU's memory is taken as it is needed. What is set in the environment stays.

    Where there is no home, or it cannot be written to, a temporary folder takes its place until the block ends.

    Yields:
        Lines that say what is not kept, and how to keep it.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # ~ stays where there is none
    wanted = {
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(10**9),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    lines = []
    with ExitStack() as stack:
        folder = home / "jax_sae" / "compiled" / hashlib.sha256(_processor().encode()).hexdigest()[:16]
        if can_be_written(folder):
            wanted["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            lines.append(
                f"note          {folder} cannot be written to: compiled programs are not kept for the next time; set "
                "JAX_COMPILATION_CACHE_DIR to a folder that can"
            )
        hub = Path(os.environ.get("HF_HOME") or home / "huggingface")
        if not can_be_written(Path(os.environ.get("HF_DATASETS_CACHE") or hub / "datasets")):
            temporary = Path(stack.enter_context(TemporaryDirectory(prefix="jax_sae-", ignore_cleanup_errors=True)))
            names = {"HF_DATASETS_CACHE": "datasets", "MPLCONFIGDIR": "matplotlib"}
            if not hub.is_absolute():  # else the hub would make a folder of the name ~
                names["HF_HOME"] = "huggingface"
            for name in names.keys() - os.environ.keys():
                wanted[name] = str(temporary / names[name])
                stack.callback(os.environ.pop, name, None)
            lines.append(
                f"note          {hub} cannot be written to: data sets are prepared anew each time, and nothing can be "
                "downloaded; set HF_HOME to a folder that can"
            )
        for name, value in wanted.items():
            os.environ.setdefault(name, value)
        yield lines


def _processor() -> str:
    """What a compiled program depends on."""
    with suppress(OSError):  # only Linux has it
        flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
        return platform.machine() + "".join(flags[:1])
    return platform.machine()


def can_be_written(folder: Path) -> bool:
    """Whether files can be written to a folder, which may have to be made."""
    if not folder.is_absolute():
        return False
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def refuse_missing_platform() -> None:
    """Raise BadInput where JAX has no device: JAX_PLATFORMS names a platform that is not there."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        why = f" ({' '.join(str(error).split())})" if str(error) else ""
        raise BadInput(
            f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}{why}; unset it to use what "
            "is there, or install JAX for that device: jax[cuda12] for a GPU"
        ) from error
