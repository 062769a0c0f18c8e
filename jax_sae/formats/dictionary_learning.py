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

import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked, Hook
from jax_sae.formats.dictionary import Dictionary, Kind
from jax_sae.formats.tensors import Facts, Tensors, open_tensors, read_facts

WEIGHTS, CONFIG = "ae.pt", "config.json"

KINDS: dict[str, Kind] = {
    **{"AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu"},
    **{"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka"},
}


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
    tensors.refuse_others({"threshold"} if kind == "topk" else {"group_sizes"} if kind == "matryoshka" else ())
    return Dictionary(
        kind,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        **more,
        **asked.belongs_to(_hook(trainer), "" if buffer.text("io") == "in_and_out" else None, trainer.text("lm_name")),
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
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < 1000:
        return Hook("")
    kinds = {"resid": "resid_post", "mlp": "mlp_out", "att": "attn_out"}
    kind = next((kind for mark, kind in kinds.items() if mark in name), "" if name else "resid_post")
    return Hook(f"{layer}.{kind}" if kind else "")
