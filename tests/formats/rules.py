"""What the files of each format compute, in NumPy, by the tools' own code: x[N, D] -> features, what is written.

Everything is read from the files, and nothing is known but them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from jax_sae.language_model.torch_file import open_torch_file

Numbers = tuple[np.ndarray, np.ndarray]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def top(x: np.ndarray, k: int) -> np.ndarray:
    return np.where(x >= np.sort(x, 1)[:, [-k]], x, 0)


def saelens(folder: Path, x: np.ndarray) -> Numbers:
    cfg, p = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    W_enc, W_dec, b_dec, what = p["W_enc"], p["W_dec"], p["b_dec"], cfg["architecture"]
    z = (x - b_dec if cfg["apply_b_dec_to_input"] else x) @ W_enc
    if what == "gated":
        f = (z + p["b_gate"] > 0) * relu(z * np.exp(p["r_mag"]) + p["b_mag"])
    elif what == "topk":
        f = relu(top(z + p["b_enc"], cfg["k"]))
    else:
        f = relu(z + p["b_enc"])
        f = f * (z + p["b_enc"] > p["threshold"]) if "jumprelu" in what else f
    return f, f @ W_dec + b_dec + (x @ p["W_skip"].T if "skip" in what else 0)


def dictionary_learning(folder: Path, x: np.ndarray) -> Numbers:
    its_class = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    tensors: Any = open_torch_file(folder / "ae.pt")
    p = {name: tensor.read() for name, tensor in tensors.items()}
    if its_class == "JumpReluAutoEncoder":
        z = x @ p["W_enc"] + p["b_enc"]
        f = relu(z * (z > p["threshold"]))
        return f, f @ p["W_dec"] + p["b_dec"]
    if its_class == "MatryoshkaBatchTopKSAE":
        assert p["group_sizes"].sum() == len(p["b_enc"]) and (p["group_sizes"] > 0).all()
        z = relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        f = z * (z > p["threshold"])
        return f, f @ p["W_dec"] + p["b_dec"]
    W_enc, W_dec = p["encoder.weight"].T, p["decoder.weight"].T
    if its_class == "GatedAutoEncoder":
        z = (x - p["decoder_bias"]) @ W_enc
        f = (z + p["gate_bias"] > 0) * relu(np.exp(p["r_mag"]) * z + p["mag_bias"])
        return f, f @ W_dec + p["decoder_bias"]
    if its_class == "AutoEncoderNew":
        f = relu(x @ W_enc + p["encoder.bias"])
        return f, f @ W_dec + p["decoder.bias"]
    z = relu((x - p["b_dec"]) @ W_enc + p["encoder.bias"])
    f = {"AutoEncoderTopK": top(z, int(p["k"])), "BatchTopKSAE": z * (z > p["threshold"])}[its_class]
    return f, f @ W_dec + p["b_dec"]


def sparsify(folder: Path, x: np.ndarray) -> Numbers:
    cfg, p = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    z = relu((x if cfg["transcode"] else x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
    f = top(z, cfg["k"])
    return f, f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if cfg["skip_connection"] else 0)


def circuit_tracer(folder: Path, x: np.ndarray) -> Numbers:
    p = load_file(folder / "layer_0.safetensors")
    z = x @ p["W_enc"].T + p["b_enc"]
    threshold = "activation_function.threshold"
    f = z * (z > p[threshold]) if threshold in p else relu(z)
    return f, f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if "W_skip" in p else 0)
