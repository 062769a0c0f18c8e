"""Names of places in a language model: as they are written here, in TransformerLens and in Hugging Face's modules.

What each place is stands in `decoder.py`, and for each family in docs/places.md.
"""

import math
from functools import cache
from reprlib import repr as shortened

from jax_sae.errors import BadInput
from jax_sae.language_model.architectures import Architecture
from jax_sae.language_model.families import FAMILIES

OF_A_BLOCK = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_in", "mlp_hidden", "mlp_out", "resid_post")
"""Places of a block, in the order in which the network comes to them."""


def places_of(architecture: Architecture) -> list[str]:
    """All places of a network, in the order in which it comes to them."""
    here = [kind for kind in OF_A_BLOCK if not (architecture.parallel and kind == "resid_mid")]
    return ["embed", *(f"{i}.{kind}" for i in range(architecture.num_layers) for kind in here), "final_norm"]


def when(place: str) -> tuple[float, int] | None:
    """When a network comes to a place of this name: an earlier one has a smaller value; None of any other name."""
    outside = {"embed": (-1.0, 0), "final_norm": (math.inf, 0)}
    block, _, kind = place.partition(".")
    return (int(block), OF_A_BLOCK.index(kind)) if block.isdecimal() and kind in OF_A_BLOCK else outside.get(place)


def width_of(place: str, architecture: Architecture) -> int:
    """How many numbers a token has there."""
    if place.endswith(".z"):
        return architecture.num_heads * architecture.head_dim
    return architecture.intermediate_size if place.endswith(".mlp_hidden") else architecture.hidden_size


def layer_of(place: str, architecture: Architecture) -> int:
    """How many blocks are run to come there; with all of them the final norm is run too."""
    if place == "embed":
        return 0
    if place == "final_norm":
        return architecture.num_layers
    block, _, kind = place.partition(".")
    return int(block) + (kind != "resid_pre")


def place_of_layer(layer: int, architecture: Architecture) -> str:
    """The place of Hugging Face's `hidden_states[layer]`."""
    if layer == 0:
        return "embed"
    return "final_norm" if layer == architecture.num_layers else f"{layer - 1}.resid_post"


def stream_layer(place: str, architecture: Architecture) -> int | None:
    """The layer n whose `hidden_states[n]` a place is; None where it is not in the residual stream between blocks."""
    layer = layer_of(place, architecture)
    is_last = layer == architecture.num_layers
    if place == "final_norm" or place.endswith(".resid_pre") or place == "embed":
        return layer
    return layer if place.endswith(".resid_post") and not is_last else None


def transformer_lens_name(place: str) -> str:
    """What TransformerLens calls a place; that of mlp_in is there with the norm's weights folded or not, as asked."""
    if place == "embed":
        return "hook_embed"
    if place == "final_norm":
        return "ln_final.hook_normalized"
    block, _, kind = place.partition(".")
    inside = {"z": "attn.hook_z", "mlp_in": "mlp.hook_in", "mlp_hidden": "mlp.hook_post"}.get(kind, f"hook_{kind}")
    return f"blocks.{block}.{inside}"


def hugging_face_name(place: str, architecture: Architecture, model_type: str) -> str:
    """The module whose output a place is, or with `:input` behind it, whose input."""
    family = FAMILIES[model_type]
    prefix, after = family.prefixes[0], architecture.placement != "before"
    if place == "embed":
        return f"{prefix}{family.block.format(i=0)[:-1]}:input"
    if place == "final_norm":
        return f"{prefix}{family.outside['ln_f']}"
    number, _, kind = place.partition(".")
    block, inside = f"{prefix}{family.block.format(i=number)}", family.inside
    return {
        "resid_pre": f"{block[:-1]}:input",
        "z": f"{block}{inside['attn/out_proj']}:input",
        "attn_out": f"{block}{inside['ln_1_after' if after else 'attn/out_proj']}",
        "resid_mid": f"{block}{inside.get('ln_2', inside['mlp/c_fc'])}:input",
        "mlp_in": f"{block}{inside['mlp/c_fc']}:input",
        "mlp_hidden": f"{block}{inside['mlp/c_proj']}:input",
        "mlp_out": f"{block}{inside['ln_2_after' if after else 'mlp/c_proj']}",
        "resid_post": block[:-1],
    }[kind]


@cache
def _spellings(architecture: Architecture, model_type: str) -> dict[str, str]:
    """Every way to write a place -> the place."""
    family, spellings = FAMILIES[model_type], {}
    for place in places_of(architecture):
        # there hook_embed is without positions; mlp.hook_in and ln_final.hook_normalized depend on folded norms
        if not place.endswith(("embed", "final_norm", "mlp_in")):
            spellings[transformer_lens_name(place)] = place
        module = hugging_face_name(place, architecture, model_type)
        spellings |= {module.removeprefix(family.prefixes[0]): place, module: place}
        if place.endswith(("attn_out", "mlp_out")) and architecture.placement == "before":  # the modules around them
            parent = module.rpartition(".")[0].removesuffix(".attention")
            spellings |= {parent.removeprefix(family.prefixes[0]): place, parent: place}
    return spellings | {place: place for place in places_of(architecture)}


def read_place(name: str, architecture: Architecture, model_type: str) -> str:
    """A place as it is written here, from any of its names.

    Raises:
        BadInput: if the network has no such place.
    """
    place = _spellings(architecture, model_type).get(name) if isinstance(name, str) else None
    if place is None:
        last = architecture.num_layers - 1
        kinds = [each.partition(".")[2] for each in places_of(architecture) if each.startswith("0.")]
        raise BadInput(
            f"{shortened(name)} is no place of this language model; there are embed, final_norm and, for blocks N from "
            f"0 to {last}, {', '.join(f'N.{kind}' for kind in kinds)}; or their names in TransformerLens (blocks.N."
            "hook_resid_post) or Hugging Face's modules"
        )
    return place
