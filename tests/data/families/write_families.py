"""How the small models in this folder were made: by PyTorch's transformers, with what it gives at every place.

    pip install torch transformers
    PYTHONPATH=. python tests/data/families/write_families.py

Weights are random and large, those of norms and biases too, so that a forgotten one is seen; they have 10 bits, so that
float16 holds them. Texts are longer than the windows. Places are read with hooks at the modules that
`hugging_face_name` names.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from jax_sae.language_model.families import read_architecture
from jax_sae.language_model.places import hugging_face_name, places_of

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 61,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "gpt_neo": {
        "model_type": "gpt_neo",
        "hidden_size": 24,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["local", "global", "local"], 1]],
        "window_size": 7,
        "max_position_embeddings": 64,
        "vocab_size": 61,
    },
    "gpt_neox": {"model_type": "gpt_neox", **SMALL, "rotary_pct": 0.34},
    "gpt_neox_serial": {
        "model_type": "gpt_neox",
        **SMALL,
        "use_parallel_residual": False,
        "attention_bias": False,
        "rotary_pct": 1.0,
    },
    "llama": {"model_type": "llama", **SMALL, "head_dim": 8, "rope_parameters": LLAMA3, "attention_bias": True},
    "llama_linear": {
        "model_type": "llama",
        **SMALL,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0},
        "tie_word_embeddings": True,
        "mlp_bias": True,
        "rms_norm_eps": 1e-5,
    },
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": 7, "head_dim": 10},
    "qwen2": {"model_type": "qwen2", **SMALL, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 10},
    "gemma": {"model_type": "gemma", **SMALL, "num_key_value_heads": 1, "head_dim": 10},
    "gemma2": {
        "model_type": "gemma2",
        **SMALL,
        "head_dim": 10,
        "query_pre_attn_scalar": 7,
        "sliding_window": 7,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **SMALL,
        "num_hidden_layers": 4,
        "head_dim": 10,
        "query_pre_attn_scalar": 7,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
    },
    "smollm3": {"model_type": "smollm3", **SMALL, "no_rope_layer_interval": 2},
    "olmo2": {"model_type": "olmo2", **SMALL},
}


def write(name: str, settings: dict[str, Any], out: Path) -> None:
    """One model."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in key or ".ln_" in key or key.endswith("bias"):
                one = 1.0 if key.endswith("weight") and "gemma" not in name else 0.0
                value.copy_((one + 0.3 * noise).half())
            else:
                value.copy_((noise * (1.0 if "emb" in key or ".wte" in key or ".wpe" in key else 0.35)).half())
    out.mkdir(exist_ok=True)
    model.config.save_pretrained(out)
    said = json.loads((out / "config.json").read_text())
    architecture = read_architecture(said, name)
    found: dict[str, np.ndarray] = {}

    def keep(place: str, value: Any) -> None:
        found[place] = (value[0] if isinstance(value, tuple) else value).detach()[0].numpy().copy()

    for place in places_of(architecture):
        module, _, of = hugging_face_name(place, architecture, said["model_type"]).partition(":")
        if of:
            hook = lambda _, args, kwargs, place=place: keep(place, args or tuple(kwargs.values()))  # noqa: E731
            model.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
        else:
            model.get_submodule(module).register_forward_hook(lambda _, args, out, place=place: keep(place, out))
    ids = torch.randint(61, (1, 24), generator=generator)
    with torch.no_grad():
        result = model(ids, output_hidden_states=True)
    hidden = [state[0].numpy() for state in result.hidden_states]
    places = np.concatenate([found[place].reshape(len(ids[0]), -1) for place in places_of(architecture)], axis=1)
    logits = result.logits[0].numpy()
    np.savez(out / "expected.npz", ids=ids[0].numpy(), logits=logits, places=places, hidden=np.stack(hidden))
    tensors = {key: value.half().numpy() for key, value in model.state_dict().items()}
    head = tensors.pop("lm_head.weight")
    if not config.tie_word_embeddings:
        tensors["embed_out.weight" if "neox" in name else "lm_head.weight"] = head  # as save_pretrained calls it
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, out / "model.safetensors")


HERE = Path(__file__).parent
for model_name, model_settings in MODELS.items():
    if model_name in (sys.argv[1:] or MODELS):
        write(model_name, model_settings, HERE / model_name)
# the one that docs/add_a_language_model.md adds
exec(re.findall(r"```python\n(.*?)```", (HERE.parents[2] / "docs/add_a_language_model.md").read_text(), re.DOTALL)[0])
write(
    "stablelm",
    {"model_type": "stablelm", **SMALL, "hidden_size": 32, "use_qkv_bias": True},
    HERE.parent / "added_family",
)
