"""What is asked for where files of a tool do not say it: model, places, k, scale; and how tools call models and places.

Names of places here are those of language_model/places.py.
"""

import re
from dataclasses import dataclass
from typing import Any

from jax_sae.errors import BadInput


@dataclass(frozen=True)
class Asked:
    """What a person says of a dictionary beside its files."""

    model: str = ""
    """The language model; stands in place of what the files say, which may be a name without its owner."""
    reads: tuple[str, ...] = ()
    """Places; stand in place of what the files say."""
    writes: tuple[str, ...] = ()
    k: int | None = None
    """Active features a token; has to be what the files say, where they say it."""
    scale: float | None = None
    """What activations are multiplied by before they are encoded, and what is written is divided by."""
    source: str = ""
    """The name by which the files were asked for: names of repositories may say what no file says."""

    def k_or(self, found: int | None, where: str) -> int:
        """That of the files, or the one that is asked for.

        Raises:
            BadInput: if there is none, or two different ones.
        """
        if found is None and self.k is None:
            raise BadInput(f"{where}: does not say k, the number of active features a token; give it by --k")
        if found is not None and self.k is not None and found != self.k:
            raise BadInput(f"{where}: k is {found}, but --k is {self.k}; leave that out")
        return self.k if found is None else found  # type: ignore[return-value]

    def scale_or(self, found: float | None, where: str) -> float:
        """That of the files, or the one that is asked for, else 1; BadInput if there are two different ones."""
        if found is not None and self.scale is not None and abs(found / self.scale - 1) > 1e-3:
            raise BadInput(f"{where}: activations are scaled by {found:g}, but --scale is {self.scale:g}; leave it out")
        return found or self.scale or 1.0

    def belongs_to(self, read: "Hook | str", written: "Hook | str | None", model: str) -> dict[str, Any]:
        """What it reads and writes, and its model, as fields of a `Dictionary`: what is asked for, else what is found.

        Args:
            read: the hook by its tool's name, '' where that is not known.
            written: of what it writes; None: an autoencoder, which writes what it reads.
            model: by its tool's name.

        Raises:
            BadInput: if tools mean different places by a hook, and none is asked for.
        """
        reads, writes, before_weights = self.reads, self.writes, False
        if not reads:
            hook = hook_named(read) if isinstance(read, str) else read
            reads, before_weights = (hook.place,) * bool(hook.place), hook.before_norm_weights
        if not self.writes:
            hook = hook_named(written) if isinstance(written, str) else written or Hook("")
            writes = reads if written is None else (hook.place,) * bool(hook.place)
        return {
            "reads": reads,
            "writes": writes,
            "model": self.model or model_named(model),
            "before_norm_weights": before_weights,
        }


NOTHING = Asked()


@dataclass(frozen=True)
class Hook:
    """A place as a tool calls it."""

    place: str
    before_norm_weights: bool = False
    """Whether it is mlp_in without the weights of the norm that makes it."""


OF_TRANSFORMER_LENS = {
    **{f"hook_{name}": name for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{"attn.hook_z": "z", "mlp.hook_in": "mlp_in", "mlp.hook_post": "mlp_hidden", "mlp.hook_out": "mlp_out"},
}
OF_HUGGING_FACE = {
    **{"": "resid_post", "output": "resid_post", "input": "resid_pre"},
    **{"self_attn.o_proj.input": "z", "mlp.input": "mlp_in", "mlp": "mlp_out", "mlp.output": "mlp_out"},
    **{"pre_feedforward_layernorm.output": "mlp_in", "post_feedforward_layernorm.output": "mlp_out"},
    **{"post_attention_layernorm.output": "attn_out", "attn": "attn_out", "attention": "attn_out"},
    **{"self_attn": "attn_out", "self_attn.output": "attn_out"},
}


def hook_named(name: str) -> Hook:
    """The place of a hook in TransformerLens, or of a module in Hugging Face's; an empty one where it is not known.

    Raises:
        BadInput: if tools mean different places by it.
    """
    outside = {"hook_embed": "embed", "embed_tokens": "embed", "ln_final.hook_normalized": "final_norm"}
    if name in outside:
        return Hook(outside[name])
    if match := re.fullmatch(r"blocks\.(\d{1,4})\.([\w.]+)", name):
        block, inside = match.groups()
        if inside == "hook_mlp_in":
            raise BadInput(
                f"{name} is the residual stream before the MLP's norm in TransformerLens, and what the norm gives the "
                f"MLP elsewhere; say which by --reads {block}.resid_mid or --reads {block}.mlp_in"
            )
        if inside == "ln2.hook_normalized":
            return Hook(f"{block}.mlp_in", before_norm_weights=True)
        return Hook(f"{block}.{OF_TRANSFORMER_LENS[inside]}" if inside in OF_TRANSFORMER_LENS else "")
    if match := re.fullmatch(r"(?:\w+\.)*(?:layers|h)[._](\d{1,4})(?:\.([\w.]+))?", name):
        block, inside = match.group(1), match.group(2) or ""
        return Hook(f"{block}.{OF_HUGGING_FACE[inside]}" if inside in OF_HUGGING_FACE else "")
    return Hook("")


OWNERS = {
    r"gpt2-small": "openai-community/gpt2",
    r"gpt2(-(medium|large|xl))?": "openai-community/{}",
    r"gemma-.*": "google/{}",
    r"pythia-.*": "EleutherAI/{}",
    r"tiny-?stories-.*": "roneneldan/{}",
    r"Llama-3\..*": "meta-llama/{}",
    r"Qwen.*": "Qwen/{}",
}
"""Names of models without their owner, as patterns, and how Hugging Face calls them."""


def model_named(name: str) -> str:
    """How Hugging Face calls a language model that a tool calls so; the name itself where that is not known."""
    if "/" in name:
        return name
    for pattern, full in OWNERS.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return full.format(re.sub("^tiny-?stories", "TinyStories", name, flags=re.IGNORECASE))
    return name
