"""SAELens 6.54: a folder with `cfg.json` and `sae_weights.safetensors`; those of versions before 6 too.

W_enc[D, F], b_enc[F], W_dec[F, D_written], b_dec; gated has b_gate, b_mag and r_mag in place of b_enc, jumprelu has
threshold[F], a skip transcoder W_skip[D_written, D]. b_dec is subtracted where `apply_b_dec_to_input` says so.
batchtopk and matryoshka are there for training only: once trained they are written as jumprelu, with one threshold.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jax_sae.activations.normalize import PerToken
from jax_sae.errors import BadInput
from jax_sae.formats.asked import NOTHING, Asked
from jax_sae.formats.conventions import hook_name, is_transcoder, one_place, with_b_dec
from jax_sae.formats.dictionary import Dictionary, Kind
from jax_sae.formats.scaling import row_norms, scaled, scaled_columns, scaled_rows
from jax_sae.formats.tensors import Facts, Tensors, as_float32, open_tensors, read_facts

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

KINDS: dict[str, Kind] = {
    **{"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"},
    **{"batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka"},
    **{"transcoder": "relu", "skip_transcoder": "relu"},
    **{"jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu"},
}
NORMALISERS: dict[str, PerToken | None] = {
    **{"none": None, "expected_average_only_in": None},
    **{"layer_norm": "layer_norm", "constant_norm_rescale": "norm"},
}

LAYOUT = "6.54.12"
"""The version of SAELens whose layout is written; it reads folders that name none as those of version 5."""

AUTOENCODERS = {"relu": "standard", "topk": "topk", "gated": "gated"}
AUTOENCODERS |= dict.fromkeys(("jumprelu", "batchtopk", "matryoshka"), "jumprelu")
WRITTEN_NORMALISERS = {None: "none", "layer_norm": "layer_norm", "norm": "constant_norm_rescale"}


def read(path: Path, asked: Asked = NOTHING) -> Dictionary:
    """The dictionary in a folder.

    Raises:
        BadInput: if it is damaged, or its architecture or its normalisation of activations cannot be held.
    """
    cfg = read_facts(path / CONFIG)
    kwargs = cfg.part("activation_fn_kwargs")
    architecture = cfg.one_of("architecture", KINDS, "standard")
    if cfg.text("activation_fn", "activation_fn_str") == "topk":  # as versions before 6 wrote it
        architecture = "topk"
    kind, is_transcoder = KINDS[architecture], "transcoder" in architecture
    subtracts = not is_transcoder and cfg.flag("apply_b_dec_to_input", True)
    normaliser, scale = _normalisation(cfg, asked)
    if is_transcoder and normaliser:
        raise BadInput(
            f"{cfg.where}: normalize_activations is {cfg.text('normalize_activations')!r} of a {architecture}, which "
            "writes at a scale of its own; it is not held"
        )
    tensors = open_tensors(path / WEIGHTS)
    b_enc = tensors.vector("b_gate" if kind == "gated" else "b_enc", length=cfg.size("d_sae"))
    F, b_dec = len(b_enc), tensors.vector("b_dec", length=cfg.size("d_out") if is_transcoder else cfg.size("d_in"))
    D = cfg.size("d_in") or (None if is_transcoder else len(b_dec))
    W_enc = tensors.encoder("W_enc", features=F, width=D, stated="as it is")
    W_dec = tensors.decoder("W_dec", features=F, width=len(b_dec), stated="as it is")
    W_skip, more = None, dict[str, Any]()
    if "skip" in architecture:
        W_skip = as_float32(tensors.array("W_skip").T)
    if kind == "gated":
        more = {name: tensors.vector(name, length=F) for name in ("r_mag", "b_mag")}
    if kind == "jumprelu":
        more["threshold"] = _threshold(tensors, F)
    if kind in ("batchtopk", "matryoshka"):  # as it is saved while it is trained
        more["threshold"] = np.full(F, tensors.number("topk_threshold"), np.float32)
    if "scaling_factor" in tensors:  # of versions before 6: of what a feature writes
        W_dec = scaled_rows(W_dec, tensors.vector("scaling_factor", length=F))
    tensors.refuse_others()
    if kind in ("topk", "batchtopk", "matryoshka") and cfg.flag("rescale_acts_by_decoder_norm", False):
        norms = row_norms(W_dec)
        if not norms.all():
            raise BadInput(f"{tensors.path}: W_dec has rows of zeros, but features are divided by their norms")
        W_enc, b_enc, W_dec = (
            scaled_columns(W_enc, norms, is_copy=True),
            scaled(b_enc, norms),
            scaled_rows(W_dec, 1 / norms, is_copy=True),
        )
    k = cfg.size("k") or kwargs.size("k")
    if scale != 1:  # which a skip goes through both ways
        W_enc, W_dec, b_dec = (
            scaled_rows(W_enc, scale, is_copy=True),
            scaled_rows(W_dec, 1 / scale, is_copy=True),
            scaled(b_dec, 1 / scale),
        )
    its = cfg.part("metadata") if "metadata" in cfg.content else cfg
    reads = its.text("hf_hook_name") if its.text("hook_name").endswith("hook_mlp_in") else ""
    return Dictionary(
        kind,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracts_b_dec=subtracts,
        W_skip=W_skip,
        k=asked.k_or(k, cfg.where) if kind == "topk" else k,
        normaliser=normaliser,
        **more,
        **asked.belongs_to(
            reads or its.text("hook_name", "hook_point"),
            its.text("hook_name_out") if is_transcoder else None,
            its.text("model_name"),
        ),
        metadata={"format": "saelens", "architecture": architecture, **_kept(its)},
    )


def _normalisation(cfg: Facts, asked: Asked) -> tuple[PerToken | None, float]:
    """What each token goes through, and what activations are multiplied by."""
    said = cfg.content.get("normalize_activations")
    if isinstance(said, bool | None):  # as early versions wrote it
        cfg = Facts({**cfg.content, "normalize_activations": "expected_average_only_in" if said else "none"}, cfg.where)
    name = cfg.one_of("normalize_activations", NORMALISERS, "none")
    if name == "expected_average_only_in" and asked.scale is None:
        raise BadInput(
            f"{cfg.where}: normalize_activations is {name!r}: activations are multiplied by sqrt(D) / their mean norm, "
            "which is not in the files, or has been taken into the weights already; give it by --scale, or --scale 1"
        )
    return NORMALISERS[name], asked.scale or 1.0


def _threshold(tensors: Tensors, F: int) -> np.ndarray:
    if "log_threshold" in tensors:
        return np.exp(tensors.vector("log_threshold", length=F))
    return tensors.vector("threshold", length=F)


def _kept(its: Facts) -> dict[str, object]:
    """What else the metadata say that is of use here."""
    kept = ("prepend_bos", "context_size", "dataset_path", "sae_lens_version", "neuronpedia_id")
    return {key: its.content[key] for key in kept if isinstance(its.content.get(key), str | int | bool)}


def write(dictionary: Dictionary, folder: Path) -> Dictionary:
    """Write a dictionary into a folder that is there.

    Returns:
        The same as it is held there.

    Raises:
        BadInput: if it reads or writes several places, or is a transcoder of kind topk or gated, which SAELens has not.
    """
    one_place(dictionary, "SAELens")
    cfg: dict[str, Any] = {"architecture": AUTOENCODERS[dictionary.kind]}
    if is_transcoder(dictionary):
        if dictionary.kind in ("topk", "gated"):
            raise BadInput(
                f"SAELens has no {dictionary.kind} transcoder, only relu and jumprelu: export it as safetensors"
            )
        if dictionary.normaliser:
            raise BadInput("SAELens undoes no normalisation of a token in a transcoder: export it as safetensors")
        dictionary = with_b_dec(dictionary, subtracted=False)
        jumps, skips = dictionary.threshold is not None, dictionary.W_skip is not None
        cfg = {"architecture": "_".join(["jumprelu"] * jumps + ["skip"] * skips + ["transcoder"])}
        cfg["d_out"] = len(dictionary.b_dec)
    tensors = {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if dictionary.W_skip is not None:
        tensors["W_skip"] = np.ascontiguousarray(dictionary.W_skip.T)
    if dictionary.threshold is not None:
        tensors["threshold"] = dictionary.threshold
    if dictionary.kind == "gated":
        tensors |= {"b_gate": tensors.pop("b_enc"), "r_mag": dictionary.r_mag, "b_mag": dictionary.b_mag}
    if dictionary.kind == "topk":
        cfg |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    hook = hook_name(dictionary.reads)
    cfg |= {
        "d_in": dictionary.width,
        "d_sae": dictionary.features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.subtracts_b_dec,
        "normalize_activations": WRITTEN_NORMALISERS[dictionary.normaliser],
        "reshape_activations": "hook_z" if hook and hook.endswith("hook_z") else "none",
        "metadata": _metadata(dictionary),
    }
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS)
    return dictionary


def _metadata(dictionary: Dictionary) -> dict[str, Any]:
    """As SAELens has it, and under `jax_sae` what else is known; it keeps words that it does not know."""
    training: Mapping[str, Any] = dictionary.metadata.get("training", {})
    bos = {"on": True, "off": False}.get(training.get("prepend_bos", "auto"))
    return {
        "sae_lens_version": LAYOUT,
        "sae_lens_training_version": None,
        "model_name": dictionary.model or None,
        "model_class_name": "HookedTransformer",
        "hook_name": hook_name(dictionary.reads),
        "hook_name_out": hook_name(dictionary.writes),
        "hook_head_index": None,
        "model_from_pretrained_kwargs": {},
        "context_size": training.get("context_size"),
        "seqpos_slice": None,
        "prepend_bos": bos,
        "dataset_path": training.get("text"),
        "neuronpedia_id": None,
        "jax_sae": dict(dictionary.metadata),
    }
