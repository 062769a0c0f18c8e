"""A folder is uploaded to the hub, and loaded from there; the hub is a stand-in on this machine, asked by a process."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from formats.made import far, made
from language_model.test_hub import FILES, SHA, StandIn
from running import REPOSITORY

from jax_sae.errors import BadInput
from jax_sae.language_model.hub import check_repository


class Writable(StandIn):
    """The stand-in, to which a/made may be uploaded, with the token `right`, as small files are: within the commit."""

    def do_POST(self) -> None:
        """Make a repository, say that all files are small, or take a commit."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}/a/made"
        if self.headers["Authorization"] != "Bearer right":
            return self.answer(401, b'{"error": "Invalid username or password."}')
        if self.path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        if self.path == "/api/repos/create":
            FILES["/models/a/made"] = {}
            return self.answer(200, json.dumps({"url": url}).encode())
        if self.path.startswith("/api/models/a/made/preupload/"):
            files = [
                {"path": its["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for its in json.loads(content)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}).encode())
        if self.path.startswith("/api/models/a/made/commit/"):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    FILES["/models/a/made"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            its = {"commitUrl": f"{url}/commit/{SHA}", "commitOid": SHA}
            return self.answer(200, json.dumps(its).encode())
        return self.answer(404)


SCRIPT = """
import os
import sys
from pathlib import Path
import numpy as np
from jax_sae.errors import BadInput, RunFailed
from jax_sae.language_model.hub import push_folder
from jax_sae.run.load import load_autoencoder
folder, *tokens = sys.argv[1:]
for os.environ["HF_TOKEN"] in tokens:
    try:
        push_folder(Path(folder), "a/made")
        sae = load_autoencoder("hf://a/made")
        np.save("features", sae.encode(np.load("x.npy")))
        print(sae)
    except (BadInput, RunFailed) as error:
        print(error)
"""


def in_a_process(folder: Path, endpoint: str, *tokens: str) -> list[str]:
    """The lines that a process prints that uploads a folder with each token in turn."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HTTP"))}
    more = {"HF_HOME": str(folder.parent / "home"), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
    more |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), *tokens]
    done = subprocess.run(command, env=kept | more, capture_output=True, text=True, cwd=folder.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_folder_is_uploaded_and_loaded_from_there(tmp_path: Path) -> None:
    """All its files; a hub that refuses, or does not answer, is said in a line."""
    sae, x = made("topk", "autoencoder")
    np.save(tmp_path / "x", x)
    folder = sae.export("saelens", tmp_path / "made")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Writable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        refused, said = in_a_process(folder, endpoint, "wrong", "right")
        assert "the hub refuses" in refused and "hf auth login" in refused
        assert said == "TrainedAutoencoder('F40', kind topk, F 40, D 12, k 4, step 1)"
        assert far(np.load(tmp_path / "features.npy"), sae.encode(x)) < 1e-5
        assert FILES["/models/a/made"] == {file.name: file.read_bytes() for file in folder.iterdir()}
    finally:
        server.shutdown()
        server.server_close()
        FILES.pop("/models/a/made", None)


def test_what_cannot_be_uploaded_is_said_before_anything_is_written() -> None:
    """A name without an owner; a hub that is switched off."""
    with pytest.raises(BadInput, match="cannot upload to 'made'; user/repo was expected"):
        check_repository("made")
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE is set; unset it, or leave --push out"):
        check_repository("a/made")
