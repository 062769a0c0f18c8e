"""What an import costs: seconds, and the most memory of its process against the size of the dictionary in float32.

Each layout is written at random and imported by `jax-sae import` in a process of its own, without a language model:
files read, scales folded, a checkpoint written with its digests, and read again. The files have just been written, and
are read from the system's cache. What is mapped of them into memory counts too.

    python benchmarks/import_dictionary.py
    python benchmarks/import_dictionary.py --features 16384 --width 768
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tyro
from safetensors.numpy import save_file
from timing import report


def random_arrays(features: int, width: int) -> dict[str, np.ndarray]:
    """W_enc[D, F], W_dec[F, D], biases and thresholds."""
    rng = np.random.default_rng(0)
    arrays = {"W_enc": (width, features), "W_dec": (features, width), "b_enc": (features,), "b_dec": (width,)}
    found = {name: rng.standard_normal(shape, np.float32) for name, shape in arrays.items()}
    return {**found, "threshold": np.abs(found["b_enc"])}


def gemma_scope(arrays: dict[str, np.ndarray], folder: Path) -> Path:
    """Float32 as it is held here."""
    np.savez(folder / "params.npz", **arrays)
    return folder


def saelens_bfloat16(arrays: dict[str, np.ndarray], folder: Path) -> Path:
    """Half the bytes, with b_dec to be taken into the biases."""
    save_file({name: x.astype(ml_dtypes.bfloat16) for name, x in arrays.items()}, folder / "sae_weights.safetensors")
    cfg = {"architecture": "jumprelu", "d_in": len(arrays["b_dec"]), "metadata": {"model_name": "a/b"}}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def llamascopium(arrays: dict[str, np.ndarray], folder: Path) -> Path:
    """Both matrices turned round, and scaled."""
    its = {"encoder.weight": arrays["W_enc"].T, "decoder.weight": arrays["W_dec"].T, "encoder.bias": arrays["b_enc"]}
    its |= {"decoder.bias": arrays["b_dec"], "log_jumprelu_threshold": np.log(arrays["threshold"] + 0.1)}
    its |= {"dataset_average_activation_norm.blocks.1.hook_resid_post": np.array(20, np.float32)}
    save_file({name: np.ascontiguousarray(x) for name, x in its.items()}, folder / "sae_weights.safetensors")
    cfg = {"sae_type": "sae", "act_fn": "jumprelu", "hook_point_in": "blocks.1.hook_resid_post"}
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


LAYOUTS: tuple[Callable[[dict[str, np.ndarray], Path], Path], ...] = (gemma_scope, saelens_bfloat16, llamascopium)

IMPORT = """
import re, sys
from jax_sae.commands import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""
"""An import that prints the most memory that its process had, in KiB."""


def main(features: int = 65_536, width: int = 2304) -> None:
    """Print seconds and peak memory of each layout.

    Args:
        features: F.
        width: D.
    """
    arrays = random_arrays(features, width)
    size = sum(x.nbytes for x in arrays.values())
    rows: list[dict[str, Any]] = []
    for write in LAYOUTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "source"
            folder.mkdir()
            write(arrays, folder)
            words = ["import", str(folder), "--to", f"{name}/run", "--place", "1.resid_post"]
            before = os.times()
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", IMPORT, *words], check=True, capture_output=True, text=True)
            seconds, after = time.perf_counter() - start, os.times()
            peak = int(done.stdout.split()[-1]) * 1024
            rows.append(
                {
                    "layout": write.__name__,
                    "seconds": seconds,
                    "cpu seconds": after.children_user
                    + after.children_system
                    - before.children_user
                    - before.children_system,
                    "peak GB": peak / 1e9,
                    "peak / size": peak / size,
                }
            )
    report("import_dictionary", rows, features=features, width=width, gigabytes=round(size / 1e9, 2))


if __name__ == "__main__":
    tyro.cli(main)
