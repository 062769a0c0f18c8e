"""dictionary_learning 0.1.0, and SAEBench's dictionaries of it: a folder with `ae.pt` and `config.json`.

| `dict_class` | tensors |
|---|---|
| AutoEncoder | `bias`[D], `encoder.weight`[F, D], `encoder.bias`, `decoder.weight`[D, F]; the encoder sees x - bias |
| AutoEncoderNew | the same with `decoder.bias`[D] in place of `bias`; the encoder sees x |
| GatedAutoEncoder | `decoder_bias`[D], `r_mag`[F], `gate_bias`[F], `mag_bias`[F], `encoder.weight`, `decoder.weight` |
| JumpReluAutoEncoder | `W_enc`[D, F], `b_enc`, `W_dec`[F, D], `b_dec`, `threshold`[F]; the encoder sees x |
| AutoEncoderTopK, BatchTopKSAE | `b_dec`, `k`, `threshold`, `encoder.weight`, `encoder.bias`, `decoder.weight` |
| MatryoshkaBatchTopKSAE | `W_enc`[D, F], `b_enc`, `W_dec`[F, D], `b_dec`, `k`, `threshold`, `group_sizes` |
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.autoencoder.kinds.matryoshka import PARTS
from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked, Hook, hook_named
from jax_sae.formats.conventions import hook_name, is_transcoder, one_place, with_b_dec
from jax_sae.formats.dictionary import Dictionary, Kind
from jax_sae.formats.tensors import Facts, Tensors, open_tensors, read_facts
from jax_sae.language_model.places import when
from jax_sae.language_model.torch_file import write_torch_file

WEIGHTS, CONFIG = "ae.pt", "config.json"

KINDS: dict[str, Kind] = {
    **{"AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu"},
    **{"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka"},
}

CLASSES = {
    "relu": ("AutoEncoderNew", "StandardTrainerAprilUpdate"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "matryoshka": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer"),
}
"""Of each kind its class and its trainer there. `AutoEncoder` would rescale relu's features when it is loaded."""

SUBTRACTING = ("topk", "batchtopk", "matryoshka", "gated")
"""Kinds whose classes encode x - b_dec."""


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The dictionary in a folder, or in a .pt file.

    Raises:
        BadInput: if it is damaged, or its class is not known.
    """
    file = path / WEIGHTS if path.is_dir() else path
    config = read_facts(file.with_name(CONFIG))
    trainer, buffer = config.part("trainer"), config.part("buffer")
    tensors = open_tensors(file)
    name = _class(trainer, tensors)
    kind = KINDS[name]
    more: dict[str, Any] = {}
    if kind in ("topk", "batchtopk", "matryoshka"):
        k = tensors.count("k") if "k" in tensors else trainer.size("k")
        more["k"] = asked.k_or(k, str(file)) if kind == "topk" else k
    b_enc = tensors.vector("gate_bias" if kind == "gated" else "encoder.bias", "b_enc")
    F, b_dec = len(b_enc), tensors.vector("b_dec", "bias", "decoder_bias", "decoder.bias")
    its = ("W_enc", "W_dec") if "W_enc" in tensors else ("encoder.weight", "decoder.weight")
    stated: Any = "as it is" if "W_enc" in tensors else "transposed"
    W_enc = tensors.encoder(its[0], features=F, width=len(b_dec), stated=stated)
    W_dec = tensors.decoder(its[1], features=F, width=len(b_dec), stated=stated)
    if kind == "gated":
        more |= {"r_mag": tensors.vector("r_mag", length=F), "b_mag": tensors.vector("mag_bias", length=F)}
    elif kind == "jumprelu":
        more["threshold"] = tensors.vector("threshold", length=F)
    elif kind != "topk" and more:
        more["threshold"] = np.full(F, tensors.number("threshold"), np.float32)
    written = trainer.text("submodule_name_out") if buffer.text("io") == "in_and_out" else None  # as `write` says it
    tensors.refuse_others({"threshold"} if kind == "topk" else {"group_sizes"} if kind == "matryoshka" else ())
    return Dictionary(
        kind,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        **more,
        **asked.belongs_to(_hook(trainer), written, trainer.text("lm_name")),
        metadata={"format": "dictionary_learning", "dict_class": name},
    )


def _class(trainer: Facts, tensors: Tensors) -> str:
    """The class, by the config or, where there is none, by its tensors."""
    said = re.sub(r"^.*\.|'>$", "", trainer.text("dict_class"))
    if said:
        if said not in KINDS:
            raise trainer.bad("dict_class", f"known are {', '.join(KINDS)}")
        return said
    marks = {"gate_bias": "GatedAutoEncoder", "group_sizes": "MatryoshkaBatchTopKSAE", "bias": "AutoEncoder"}
    found = next((name for mark, name in marks.items() if mark in tensors), None)
    if found is None and "k" in tensors:
        raise BadInput(
            f"{tensors.path}: AutoEncoderTopK and BatchTopKSAE have the same tensors, and there is no {CONFIG} beside "
            'it that says which it is: write one, {"trainer": {"dict_class": "BatchTopKSAE"}}'
        )
    if found is None:
        found = "JumpReluAutoEncoder" if "W_enc" in tensors else "AutoEncoderNew"
    return found


def _hook(trainer: Facts) -> Hook:
    """What it is trained on, by its layer and the name of its submodule, which usually is resid_post_layer_N."""
    name, layer = trainer.text("submodule_name"), trainer.content.get("layer")
    if name.startswith("blocks.") and (hook := hook_named(name)).place:  # as `write` says it
        return hook
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < 1000:
        return Hook("")
    kinds = {"resid": "resid_post", "mlp": "mlp_out", "att": "attn_out"}
    kind = next((kind for mark, kind in kinds.items() if mark in name), "" if name else "resid_post")
    return Hook(f"{layer}.{kind}" if kind else "")


def write(dictionary: Dictionary, folder: Path) -> Dictionary:
    """Write a dictionary into a folder that is there.

    A transcoder is held if it writes as many numbers as it reads: its biases make up for a b_dec that is subtracted.

    Returns:
        The same as it is held there.

    Raises:
        BadInput: if it reads or writes several places, has a skip, writes another number of numbers than it reads,
            normalises each token, k is not known, or its thresholds differ and its class has one for all.
    """
    one_place(dictionary, "dictionary_learning")
    if dictionary.W_skip is not None:
        raise BadInput("dictionary_learning has no skip: export it to saelens, sparsify or circuit_tracer")
    if dictionary.width != len(dictionary.b_dec):
        raise BadInput(
            f"{dictionary.width} numbers are read and {len(dictionary.b_dec)} written, but dictionary_learning's "
            "classes have one width: export it as safetensors"
        )
    if dictionary.normaliser:
        raise BadInput(f"dictionary_learning has no {dictionary.normaliser} of each token: export it to saelens")
    kind = dictionary.kind
    if kind in ("batchtopk", "matryoshka"):
        assert dictionary.threshold is not None
        if dictionary.k is None:
            raise BadInput(f"dictionary_learning's {CLASSES[kind][0]} needs a k, and none is known: export to saelens")
        if len(np.unique(dictionary.threshold)) > 1:  # crosscoders, and what others wrote
            kind = "jumprelu"
    held = with_b_dec(dictionary, subtracted=kind in SUBTRACTING)
    write_torch_file(folder / WEIGHTS, _state_dict(held, kind))
    (folder / CONFIG).write_text(json.dumps(_config(held, *CLASSES[kind]), indent=2) + "\n")
    return held


def _state_dict(held: Dictionary, kind: str) -> dict[str, np.ndarray]:
    """The tensors by the names of the class."""
    if kind == "jumprelu":
        return {name: getattr(held, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    counts: dict[str, np.ndarray] = {}
    if held.k is not None:
        threshold = -1.0 if held.threshold is None else held.threshold[0]  # topk has none; -1 is unset
        counts = {"k": np.array(held.k, np.int32), "threshold": np.array(threshold, np.float32)}
    if kind == "matryoshka":
        ends = sorted({max(1, round(part * held.features)) for part in PARTS})
        sizes = {"group_sizes": np.diff([0, *ends]).astype(np.int64)}
        return {name: getattr(held, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | counts | sizes
    layers = {"encoder.weight": held.W_enc.T, "decoder.weight": held.W_dec.T}
    if kind == "gated":
        assert held.r_mag is not None and held.b_mag is not None
        return {
            "decoder_bias": held.b_dec,
            "r_mag": held.r_mag,
            "gate_bias": held.b_enc,
            "mag_bias": held.b_mag,
            **layers,
        }
    bias = {"decoder.bias" if kind == "relu" else "b_dec": held.b_dec}
    return {**layers, "encoder.bias": held.b_enc, **bias, **(counts if kind != "relu" else {})}


def _config(held: Dictionary, its_class: str, trainer: str) -> dict[str, Any]:
    """As its trainers save it, as far as that is known; `layer` is the number of the block."""
    settings = held.metadata.get("settings", {})
    at = when(held.reads[0]) if held.reads else None
    return {
        "trainer": {
            "trainer_class": trainer,
            "dict_class": its_class,
            "activation_dim": held.width,
            "dict_size": held.features,
            "k": held.k,
            "lr": settings.get("learning_rate"),
            "seed": settings.get("seed"),
            "steps": held.metadata.get("step"),
            "layer": int(at[0]) if at and 0 <= at[0] < 1e9 else None,
            "lm_name": held.model or None,
            "submodule_name": hook_name(held.reads),
            "submodule_name_out": hook_name(held.writes),
        },
        "buffer": {
            "d_submodule": held.width,
            "io": "in_and_out" if is_transcoder(held) else "out",
            "ctx_len": held.metadata.get("training", {}).get("context_size"),
        },
        "jax_sae": dict(held.metadata) | {"reads": held.reads, "writes": held.writes},
    }
