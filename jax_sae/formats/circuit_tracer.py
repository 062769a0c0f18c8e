"""circuit-tracer's transcoders of single layers: `layer_N.safetensors`, with `config.yaml` beside them.

`W_enc`[F, D], `b_enc`, `W_dec`[F, D], in earlier files [D, F], `b_dec`, and `W_skip`[D, D] that is used as x W_skip^T.
jumprelu where there is `activation_function.threshold`[F], topk where the config says so, else relu. Those of Qwen3 are
kept so too, with `wandb-config.yaml`. A cross-layer transcoder is refused.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked, Hook
from jax_sae.formats.conventions import hook_name, one_place, with_b_dec
from jax_sae.formats.dictionary import Dictionary, Kind
from jax_sae.formats.tensors import as_float32, open_tensors, read_plain_yaml

CONFIG = "config.yaml"


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The transcoder of one layer in its file, or in a folder that has one.

    Raises:
        BadInput: if it is damaged, the folder has several, or it is a cross-layer transcoder.
    """
    folder = path if path.is_dir() else path.parent
    config = read_plain_yaml(folder / CONFIG)
    if config.text("model_kind") == "cross_layer_transcoder" or list(folder.glob("W_enc_*.safetensors")):
        raise BadInput(
            f"{path}: a cross-layer transcoder, whose features of each layer write all later ones; a dictionary here "
            "has all its features read the same places. Import single-layer transcoders"
        )
    files = sorted(path.glob("layer_*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        shown = ", ".join(file.name for file in files[:4]) or "none"
        raise BadInput(f"{path}: has {len(files)} transcoders ({shown}); name the file of one")
    tensors = open_tensors(files[0])
    b_enc, b_dec = tensors.vector("b_enc"), tensors.vector("b_dec")
    F, D = len(b_enc), len(b_dec)
    W_enc = tensors.encoder("W_enc", features=F, width=None, stated="transposed")
    W_dec = tensors.decoder("W_dec", features=F, width=D, stated="open")
    W_skip = as_float32(tensors.array("W_skip").T) if "W_skip" in tensors else None
    kind: Kind = "relu"
    more: dict[str, Any] = {}
    activation = config.one_of("activation", ("relu", "topk", "jumprelu"), "relu")
    if "activation_function.threshold" in tensors:
        kind, more["threshold"] = "jumprelu", tensors.vector("activation_function.threshold", length=F)
        if more["threshold"].min() < 0:
            raise BadInput(f"{files[0]}: a threshold is below 0, where features are negative; none is here")
    elif activation == "topk" or "k" in tensors:
        k = tensors.count("k") if "k" in tensors else config.size("k")
        kind, more["k"] = "topk", asked.k_or(k, str(files[0]))
    elif activation == "jumprelu":
        raise BadInput(f"{files[0]}: {CONFIG} says jumprelu, but there is no activation_function.threshold")
    tensors.refuse_others()
    layer = re.search(r"layer_(\d{1,3})\.safetensors$", files[0].name)
    read, written = (
        ("", "")
        if layer is None
        else (
            f"blocks.{layer.group(1)}.{config.text(key) or usual}"
            for key, usual in (("feature_input_hook", "mlp.hook_in"), ("feature_output_hook", "hook_mlp_out"))
        )
    )
    model = config.text("model_name")
    if not model and (match := re.search(r"qwen3-(\d+(\.\d+)?)b", f"{asked.source}/{path.absolute()}", re.IGNORECASE)):
        model = f"Qwen/Qwen3-{match.group(1)}B"
    return Dictionary(
        kind,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=False,
        W_skip=W_skip,
        **more,
        **asked.belongs_to(read, written or Hook(""), model),
        metadata={"format": "circuit_tracer"},
    )


def write(dictionaries: Sequence[Dictionary], folder: Path) -> Dictionary:
    """Write a set of transcoders, one for each layer from 0 on, into a folder that is there.

    Returns:
        That of layer 0, as it is held there.

    Raises:
        BadInput: if one is no transcoder within a block, is of kind topk or gated, normalises each token, or writes
            another number of numbers than it reads; if a layer is lacking, or they differ in what they read and write,
            in F, in their model, or in having a skip.
    """
    layers: dict[int, Dictionary] = {}
    hooks: set[tuple[str, str]] = set()
    for dictionary in dictionaries:
        layer, its_hooks = _layer_and_hooks(dictionary)
        if layer in layers:
            raise BadInput(f"two of them are transcoders of layer {layer}; circuit-tracer takes one a layer")
        layers[layer] = dictionary
        hooks.add(its_hooks)
    if sorted(layers) != list(range(len(layers))):
        has = ", ".join(map(str, sorted(layers)))
        raise BadInput(f"there are transcoders of layer {has}; circuit-tracer needs one of each from 0 on")
    forms = {(its.features, its.width, its.W_skip is not None, its.model) for its in layers.values()}
    if len(hooks) > 1 or len(forms) > 1:
        raise BadInput(
            "they differ in what they read and write, F, D, their model or in having a skip; circuit-tracer has one of "
            "each for a set"
        )
    hook_in, hook_out = hooks.pop()
    its = layers[0]
    # JSON is YAML, and a name such as "no" stays a text
    config = {
        "model_name": its.model,
        "model_kind": "transcoder_set",
        "feature_input_hook": hook_in,
        "feature_output_hook": hook_out,
        "scan": its.metadata.get("run") or "jax_sae",
    }
    (folder / CONFIG).write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items()))
    layers = {layer: with_b_dec(dictionary, subtracted=False) for layer, dictionary in layers.items()}
    for layer, held in layers.items():
        tensors: dict[str, Any] = {
            "W_enc": np.ascontiguousarray(held.W_enc.T),
            "b_enc": held.b_enc,
            "W_dec": held.W_dec,
            "b_dec": held.b_dec,
        }
        if held.threshold is not None:
            tensors["activation_function.threshold"] = np.maximum(held.threshold, 0)  # there is no relu beside it
        if held.W_skip is not None:
            tensors["W_skip"] = np.ascontiguousarray(held.W_skip.T)
        save_file(tensors, folder / f"layer_{layer}.safetensors", {"jax_sae": json.dumps(dict(held.metadata))})
    return layers[0]


def _layer_and_hooks(dictionary: Dictionary) -> tuple[int, tuple[str, str]]:
    """The layer of a transcoder that a set may have, and what it reads and writes there."""
    one_place(dictionary, "circuit-tracer")
    if dictionary.kind not in ("relu", "jumprelu", "batchtopk", "matryoshka"):
        raise BadInput(f"circuit-tracer loads relu and jumprelu transcoders, and this is {dictionary.kind}")
    if dictionary.normaliser:
        raise BadInput(f"circuit-tracer has no {dictionary.normaliser} of each token")
    names = [(hook_name(places) or "").split(".", 2) for places in (dictionary.reads, dictionary.writes)]
    if any(len(name) != 3 or name[0] != "blocks" for name in names) or names[0][1] != names[1][1]:
        reads, writes = (", ".join(places) or "an unknown place" for places in (dictionary.reads, dictionary.writes))
        raise BadInput(
            f"it reads {reads} and writes {writes}; circuit-tracer has transcoders within one block, such as from "
            "0.mlp_in to 0.mlp_out"
        )
    if dictionary.width != len(dictionary.b_dec):
        raise BadInput(
            f"{dictionary.width} numbers are read and {len(dictionary.b_dec)} written, but circuit-tracer has one width"
        )
    return int(names[0][1]), (names[0][2], names[1][2])
