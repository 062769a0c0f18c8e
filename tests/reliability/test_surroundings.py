"""A whole run where nothing is as in a terminal, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import SMALL
from running import REPOSITORY

pytestmark = pytest.mark.slow


def can_be_nobody() -> bool:
    """Whether this process may start one as a user that does not exist, and that user may read what it needs."""
    if shutil.which("setpriv") is None or os.getuid() != 0:
        return False
    command = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", sys.executable]
    command += ["-c", "import jax_sae.commands.train, tqdm, jax"]  # an environment below a closed directory has none
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True).returncode == 0


@pytest.fixture
def everyones() -> Iterator[Path]:
    """A directory in which everyone may write; those of pytest are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


@pytest.mark.skipif(not can_be_nobody(), reason="needs root, `setpriv`, and packages that everyone may read")
def test_a_user_without_a_name_a_home_a_terminal_or_unicode(everyones: Path) -> None:
    """ASCII, a path that is not UTF-8, a notebook's MPLBACKEND, output closed: all that a run leaves is there."""
    out = os.fsdecode("r\xe4".encode() + b"\xff")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_C", "HOME", "XDG"))}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment |= {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY), "TMPDIR": "/nonexistent"}
    nobody = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", sys.executable, "-m", "jax_sae"]

    def run(*argv: str, shell: str = 'exec "$@"') -> subprocess.CompletedProcess[bytes]:
        command = ["bash", "-c", shell, "bash", *nobody, *argv]
        return subprocess.run(command, cwd=everyones, env=environment, capture_output=True, timeout=300)

    told = run("train", *SMALL, "--out", out)
    assert told.returncode == 0, told.stderr
    assert b"Traceback" not in told.stderr and told.stderr.count(b"note  ") == 2
    assert rb"load_autoencoder('r\udcc3\udca4\udcff', name='F4')" in told.stdout
    assert {path.name for path in everyones.iterdir()} == {out}
    assert json.loads((everyones / out / "summary.json").read_text())["members"][0]["name"] == "F4"
    assert (everyones / out / "figures" / "training.png").is_file()
    closed = run("evaluate", out, "--tokens", "100", shell='exec "$@" >&- 2>&- <&-')
    assert closed.returncode == 0 and (everyones / out / "evaluation.json").is_file()
    assert all((everyones / out / name).read_bytes()[:4] == b"\x89PNG" for name in ("figures/frontier.png",))
    helped = run("train", "--help", shell='"$@" | head -1; exit ${PIPESTATUS[0]}')
    assert helped.returncode in (0, 141) and b"Traceback" not in helped.stderr
