"""The README.md beside an exported dictionary: what it is, what it is worth, how it was trained, how it is loaded."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_sae.formats.conventions import hook_name, is_transcoder
from jax_sae.formats.dictionary import Dictionary


@dataclass(frozen=True)
class Loading:
    """How the files of a format are loaded: by the library of the format, and by NumPy alone."""

    tool: str
    """Its name; empty where it is this one."""
    tag: str
    """What the hub calls it."""
    code: str
    """With the library; {name} stands for what depends on the dictionary."""
    numpy: str
    """Lines that put arrays into `p` by the names of `Dictionary`."""


OF_TORCH = """import torch
p = {name: tensor.numpy() for name, tensor in torch.load("ae.pt", weights_only=True).items()}
for name, its in {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}.items():
    p[name] = p[its].T if its in p else p[name]
for name, its in {"b_enc": "encoder.bias", "b_dec": "decoder.bias"}.items():
    p[name] = p[its] if its in p else p.get(name)"""

LOADING = {
    "safetensors": Loading("", "jax_sae", "", 'p = load_file("dictionary.safetensors")'),
    "saelens": Loading(
        "SAELens",
        "saelens",
        """from sae_lens import SAE

sae = SAE.load_from_disk("{folder}")
features = sae.encode(x)  # x [..., {width}], a torch tensor
written = sae(x)""",
        'p = load_file("sae_weights.safetensors")',
    ),
    "dictionary_learning": Loading(
        "dictionary_learning",
        "dictionary_learning",
        """from dictionary_learning.utils import load_dictionary

dictionary, config = load_dictionary("{folder}", device="cpu")
features = dictionary.encode(x)  # x [N, {width}], a torch tensor
written = dictionary(x)""",
        OF_TORCH,
    ),
    "sparsify": Loading(
        "sparsify",
        "sparsify",
        """from sparsify import SparseCoder

coder = SparseCoder.load_from_disk("{folder}")
values, indices, _ = coder.encode(x)  # x [N, {width}], a torch tensor
written = coder(x).sae_out""",
        """p = load_file("sae.safetensors")
p["W_enc"], p["b_enc"] = p["encoder.weight"].T, p["encoder.bias"]""",
    ),
    "circuit_tracer": Loading(
        "circuit-tracer",
        "circuit-tracer",
        """from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

paths = {{i: f"{folder}/layer_{{i}}.safetensors" for i in range({layers})}}
transcoders = load_transcoder_set(paths, "{scan}", "{hook_in}", "{hook_out}")
# or, once it is on the hub: circuit_tracer.ReplacementModel.from_pretrained("{model}", "user/repo")""",
        """p = load_file("layer_0.safetensors")
p["W_enc"], p["threshold"] = p["W_enc"].T, p.get("activation_function.threshold")""",
    ),
}


def model_card(
    held: Dictionary,
    names: Sequence[str],
    format: str,
    sweep: Sequence[Mapping[str, Any]] = (),
    layers: int = 1,
) -> str:
    """The text of README.md.

    Args:
        held: the dictionary as it stands in the files; the first, where there are several.
        names: of the members that are exported.
        format: a key of `LOADING`.
        sweep: what is known of all members of the run, a row each: name, kind, features, l0, fvu and more.
        layers: how many dictionaries there are.
    """
    name = names[0] if names else f"a {held.kind} dictionary"
    title = f"{name}: {held.features:,} features{f' of {held.model}' if held.model else ''}"
    if layers > 1:
        title = f"{layers} transcoders of {held.features:,} features{f' of {held.model}' if held.model else ''}"
    parts = [
        _front_matter(held, format),
        f"# {title}",
        _what(held, names, layers),
        _worth(held.metadata.get("evaluation", {})),
        _frontier(sweep, names),
        _training(held.metadata),
        _how_to_load(held, names, format, layers),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(held: Dictionary, format: str) -> str:
    """What the hub reads; JSON is YAML."""
    what = "transcoder" if is_transcoder(held) else "sparse-autoencoder"
    content: dict[str, Any] = {
        "library_name": LOADING[format].tag,
        "tags": [what, "mechanistic-interpretability", "jax_sae", held.kind],
    }
    if _is_on_hub(held.model):
        content["base_model"] = held.model
    if _is_on_hub(text := held.metadata.get("training", {}).get("text", "")):
        content["datasets"] = [text]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in content.items()), "---"])


def _is_on_hub(name: Any) -> bool:
    """Whether it has the form of a name on the hub."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def _what(held: Dictionary, names: Sequence[str], layers: int) -> str:
    metadata = held.metadata
    what = "A transcoder" if is_transcoder(held) else "A sparse autoencoder"
    if len(held.writes) > 1:
        what = "A crosscoder" if held.reads == held.writes else "A dictionary of several places"
    made = f", trained with {metadata['made_with']}" if "made_with" in metadata else ""
    run = f", of the run {metadata['run']}" if metadata.get("run") else ""
    at = f", at step {metadata['step']:,}" if isinstance(metadata.get("step"), int) else ""
    rows = {"members" if layers > 1 else "member": ", ".join(names), "kind": held.kind}
    rows["reads"] = _places(held.reads, held.width)
    rows["writes"] = _places(held.writes, len(held.b_dec))
    rows["features"] = f"{held.features:,}"
    if held.k is not None:
        rows["k"] = f"{held.k}"
    if held.W_skip is not None:
        rows["skip"] = "what it writes has x W_skip too"
    taken = "normalised token by token" if held.normaliser else "raw: what scaled them in training is in the weights"
    rows["activations"] = f"as the language model gives them, {taken}"
    if left_out := metadata.get("training", {}).get("excluded_first_tokens"):
        rows["first tokens"] = f"the first {left_out} of a story were not trained on: leave them out"
    return f"{what}{made}{run}{at}.\n\n{_table(['what', ''], list(map(list, rows.items())))}"


def _places(places: Sequence[str], width: int) -> str:
    names = ", ".join(f"`{place}` (TransformerLens: `{hook_name((place,))}`)" for place in places)
    return f"{names or 'not known'}, {width} numbers a token"


MEASURES = {
    "l0": "L0, features on a token",
    "fvu": "FVU, fraction of variance unexplained",
    "floor": "FVU of PCA with as many directions as features: the floor of all that is linear",
    "pca_l0_fvu": "FVU of PCA with L0 directions, which needs no training",
    "explained_variance": "explained variance",
    "dead_features": "features that never fired",
    "dense_features": "features that fire on more than a tenth of the tokens",
    "ce_loss_without_sae": "loss of the language model",
    "ce_loss_with_sae": "its loss with what this writes in place",
    "ce_loss_score_zero_ablation": "loss recovered, against zeros in place",
    "ce_loss_score_mean_ablation": "loss recovered, against the mean in place",
}


def _worth(evaluation: Mapping[str, Any]) -> str:
    rows = [[text, _number(evaluation[key])] for key, text in MEASURES.items() if evaluation.get(key) is not None]
    if not rows:
        return ""
    tokens = evaluation.get("tokens")
    on = f"On {tokens:,} held-out tokens" if tokens else "On held-out tokens"
    return f"## What it is worth\n\n{on}:\n\n{_table(['measure', 'value'], rows)}"


def _frontier(sweep: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A table of all members of the run, those that are exported in bold."""
    if not sweep:
        return ""
    columns = {
        "kind": "kind",
        "features": "F",
        "l0": "L0",
        "fvu": "FVU",
        "floor": "PCA floor",
        "ce_loss_score_zero_ablation": "loss recovered",
        "dead_features": "dead",
    }
    columns = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in sweep)}
    rows = []
    for row in sweep:
        name = f"**{row['name']}**" if row["name"] in names else str(row["name"])
        rows.append([name, *(_number(row.get(key)) for key in columns)])
    text = "The members of the sweep that it was trained in, all on the same tokens in the same order."
    return f"## The frontier\n\n{text}\n\n{_table(['member', *columns.values()], rows)}"


def _training(metadata: Mapping[str, Any]) -> str:
    settings = {**metadata.get("training", {}), **metadata.get("settings", {})}
    rows = [[key.replace("_", " "), _number(value)] for key, value in settings.items() if value is not None]
    return f"## How it was trained\n\n{_table(['setting', 'value'], rows)}" if rows else ""


def _how_to_load(held: Dictionary, names: Sequence[str], format: str, layers: int) -> str:
    its = LOADING[format]
    parts = ["## How to load it"]
    if format in ("safetensors", "saelens"):
        parts.append(
            _code(
                "With jax_sae",
                'import jax_sae\n\nsae = jax_sae.load_autoencoder("FOLDER")  # or "hf://user/repo"\n'
                f"features = sae.encode(x)  # x [..., {held.width}]\nwritten = sae(x)",
            )
        )
    if its.tool:
        hooks = [(hook_name(places) or "").split(".", 2)[-1] for places in (held.reads, held.writes)]
        facts = {"width": held.width, "layers": layers, "scan": held.metadata.get("run") or "jax_sae"}
        facts |= {"hook_in": hooks[0], "hook_out": hooks[1], "model": held.model, "folder": "FOLDER"}
        parts.append(_code(f"With {its.tool}", its.code.format(**facts)))
    loads = "NumPy" if "torch" not in its.numpy else "torch and NumPy"
    parts.append(_code(f"With {loads} alone", numpy_code(held, format)))
    return "\n\n".join(parts)


def numpy_code(held: Dictionary, format: str) -> str:
    """Lines that load the files from the working directory, and define encode(x) and decode(features, x)."""
    loads_safetensors = "load_file" in LOADING[format].numpy
    lines = ["import numpy as np", *["from safetensors.numpy import load_file"] * loads_safetensors, ""]
    lines += [*LOADING[format].numpy.splitlines(), ""]
    if held.kind == "gated":
        names = {
            "dictionary_learning": ("gate_bias", "mag_bias", "decoder_bias"),
            "saelens": ("b_gate", "b_mag", "b_dec"),
        }
        gate, magnitude, b_dec = names.get(format, ("b_enc", "b_mag", "b_dec"))
        lines += [f'p |= {{"b_enc": p["{gate}"], "b_mag": p["{magnitude}"], "b_dec": p["{b_dec}"]}}', ""]
    lines += ["", *_normalised(held), "def encode(x):  # [N, D] -> [N, F]"]
    x = "normalised(x)[0]" if held.normaliser else "x"
    lines.append(f'    p_ = ({x} - p["b_dec"]) @ p["W_enc"]' if held.subtracts_b_dec else f'    p_ = {x} @ p["W_enc"]')
    lines.append('    z = p_ + p["b_enc"]')
    if held.kind == "gated":
        lines.append('    return np.where(z > 0, np.maximum(p_ * np.exp(p["r_mag"]) + p["b_mag"], 0), 0)')
    elif held.kind == "topk":
        lines += [
            f"    kth = np.sort(z, axis=1)[:, [-{held.k}]]",
            "    return np.where(z >= kth, np.maximum(z, 0), 0)",
        ]
    elif held.threshold is not None:
        lines.append('    return np.where(z > p["threshold"], np.maximum(z, 0), 0)')
    else:
        lines.append("    return np.maximum(z, 0)")
    lines += ["", "", "def decode(features, x):"]
    written = 'features @ p["W_dec"] + p["b_dec"]'
    if held.W_skip is not None:
        skip = 'p["W_skip"]' if format == "safetensors" else 'p["W_skip"].T'
        written += f" + {x} @ {skip}"
    if held.normaliser:
        lines += ["    _, mean, scale = normalised(x)", f"    return ({written}) * scale + mean"]
    else:
        lines.append(f"    return {written}")
    return "\n".join(lines)


def _normalised(held: Dictionary) -> list[str]:
    """A function for what each token goes through first, if it goes through anything."""
    if held.normaliser is None:
        return []
    of = {
        "layer_norm": [
            "    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)",
            "    return (x - mean) / (std + 1e-5), mean, std",
        ],
        "norm": [
            f"    scale = np.linalg.norm(x, axis=1, keepdims=True) / {held.width} ** 0.5",
            "    return x / scale, 0, scale",
        ],
    }
    return ["def normalised(x):", *of[held.normaliser], "", ""]


def _code(title: str, code: str) -> str:
    return f"### {title}\n\n```python\n{code}\n```"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
