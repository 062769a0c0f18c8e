"""A command's process: what libraries are told, exit codes, errors in one line."""

import errno
import hashlib
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from jax_sae.errors import BadInput, RunFailed


def run_script(argv: Sequence[str], work: Callable[[], int]) -> int:
    """Do the work of a script, and return its exit code; what ends it badly is one line, or with --debug a traceback.

    0: done. 1: the work could not go on: a disk is full, every member diverged. 2: something given cannot be used. Any
    other exception is a defect of this package, and is raised.
    """
    keep_libraries_quiet()
    prepare_jax()
    try:
        return work()
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


def prepare_jax() -> None:
    """Compiled programs are kept for the next process, and a GPU's memory is taken as it is needed; must come first.

    What is set in the environment stays. The folder is the machine's own, because programs for another processor do not
    run, below $XDG_CACHE_HOME or ~/.cache; the programs that were not used for longest are removed at 1 GB.
    """
    processor = platform.machine()
    with suppress(OSError):  # only Linux has it
        flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
        processor += "".join(flags[:1])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "jax_sae" / "compiled" / hashlib.sha256(processor.encode()).hexdigest()[:16]
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(10**9),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }.items():
        os.environ.setdefault(name, value)
