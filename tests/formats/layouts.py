"""One random dictionary in the layout of every tool, written with NumPy, and what each tool computes from its files.

A rule is what the tool's own code says, in the names of its own files, in float64. It knows nothing of this project.
"""

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

D, F, K = 6, 10, 3
_rng = np.random.default_rng(3)
X = (2 * _rng.normal(size=(64, D)) + 0.5).astype(np.float32)
W_ENC, W_DEC, W_SKIP = (_rng.normal(size=shape).astype(np.float32) for shape in ((D, F), (F, D), (D, D)))
B_ENC, THRESHOLD, R_MAG, B_MAG = (0.3 * _rng.normal(size=F).astype(np.float32) for _ in range(4))
B_DEC = (0.5 * _rng.normal(size=D)).astype(np.float32)
THRESHOLD = np.abs(THRESHOLD) + np.float32(0.2)

Tensors = dict[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]
"""Features [N, F], and what they write [N, D]."""


@dataclass(frozen=True)
class Layout:
    """Files of a tool."""

    path: str
    """Below a folder, what is given to the importer."""
    tensors: dict[str, Any]
    rule: Callable[[Any, np.ndarray], Pair]
    """(tensors in float64, x) -> features and what they write, as the tool's own code has it."""
    reads: str
    writes: str
    model: str
    weights: str = ""
    """The file of the tensors, below `path`; '': that itself."""
    config: tuple[str, Any] = ("", None)
    """Another file, and its contents."""

    def write(self, folder: Path) -> Path:
        """The files; returns what is given to the importer."""
        path = folder / self.path
        file = path / self.weights if self.weights else path
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(x) for name, x in self.tensors.items() if isinstance(x, np.ndarray)}
        if file.suffix == ".npz":
            np.savez(file, **arrays)
        elif file.suffix == ".safetensors":
            save_file(arrays, file)
        else:
            torch_save(self.tensors, file)
        name, content = self.config
        if name:
            text = content if isinstance(content, str) else json.dumps(content)
            ((path if self.weights else path.parent) / name).resolve().write_text(text)
        return path

    def computed(self, x: np.ndarray = X) -> Pair:
        """What the tool computes."""
        wide = {n: t.astype(np.float64) if isinstance(t, np.ndarray) else t for n, t in self.tensors.items()}
        return self.rule(wide, x.astype(np.float64))


def torch_save(entries: dict[str, Any], path: Path) -> None:
    """What torch.save writes of a dictionary of tensors, numbers, texts and such dictionaries; without torch."""
    storages: list[bytes] = []

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def whole(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def opcodes(value: Any) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(text(name) + opcodes(each) for name, each in value.items()) + b"u"
        if isinstance(value, str):
            return text(value)
        if isinstance(value, int):
            return whole(value)
        x = np.asarray(value)
        kind = {"float32": b"Float", "int32": b"Int", "int64": b"Long"}[x.dtype.name]
        storages.append(np.ascontiguousarray(x).tobytes())
        storage = text("storage") + b"ctorch\n" + kind + b"Storage\n" + text(str(len(storages) - 1)) + text("cpu")
        strides = [stride // x.itemsize for stride in np.ascontiguousarray(x).strides] if x.ndim else []
        shape, steps = (b"(" + b"".join(map(whole, sizes)) + b"t" for sizes in (x.shape, strides))
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + storage
            + whole(x.size)
            + b"tQ"
            + whole(0)
            + shape
            + steps
            + b"\x89ccollections\nOrderedDict\n)RtR"
        )

    description = b"\x80\x02" + opcodes(entries) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", description)
        for number, content in enumerate(storages):
            archive.writestr(f"archive/data/{number}", content)


# What tools compute


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


def largest(z: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, the others 0."""
    order = np.argsort(-z, axis=1)[:, :k]
    found = np.zeros_like(z)
    np.put_along_axis(found, order, np.take_along_axis(z, order, 1), 1)
    return found


def saelens(architecture: str, subtracts: bool, normalised: str = "none", rescaled: bool = False) -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        mean, std = np.zeros((len(x), 1)), np.ones((len(x), 1))
        if normalised == "layer_norm":
            mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
            x = (x - mean) / (std + 1e-5)
        if normalised == "constant_norm_rescale":
            std = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
            x = x / std
        sae_in = x - t["b_dec"] * subtracts
        norms = np.linalg.norm(t["W_dec"], axis=1) if rescaled else 1
        if architecture == "gated":
            on = sae_in @ t["W_enc"] + t["b_gate"] > 0
            f = on * relu(sae_in @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"])
        else:
            z = (sae_in @ t["W_enc"] + t["b_enc"]) * norms
            f = largest(relu(z), K) if architecture == "topk" else relu(z)
            f = f * (z > t["threshold"]) if "jumprelu" in architecture else f
        skip = x @ t["W_skip"].T if "skip" in architecture else 0
        return f, (f / norms @ t["W_dec"] + t["b_dec"] + skip) * std + mean

    tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    tensors |= {"b_gate": B_ENC, "r_mag": R_MAG, "b_mag": B_MAG} if architecture == "gated" else {"b_enc": B_ENC}
    tensors |= {"threshold": THRESHOLD} if "jumprelu" in architecture else {}
    tensors |= {"W_skip": W_SKIP.T} if "skip" in architecture else {}
    is_transcoder = "transcoder" in architecture
    metadata = {"model_name": "gpt2-small", "hook_name": "blocks.7.hook_resid_pre", "prepend_bos": True}
    if is_transcoder:
        metadata |= {"hook_name": "blocks.7.mlp.hook_in", "hook_name_out": "blocks.7.hook_mlp_out"}
    cfg = {"architecture": architecture, "d_in": D, "d_sae": F, "apply_b_dec_to_input": subtracts}
    cfg |= {"normalize_activations": normalised, "k": K, "rescale_acts_by_decoder_norm": rescaled, "metadata": metadata}
    reads, writes = ("7.mlp_in", "7.mlp_out") if is_transcoder else ("7.resid_pre", "7.resid_pre")
    model, config = "openai-community/gpt2", ("cfg.json", cfg)
    return Layout("sae", tensors, rule, reads, writes, model, "sae_weights.safetensors", config)


def dictionary_learning(dict_class: str) -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        if dict_class in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
            W_enc, b_enc, W_dec, b_dec = t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"]
        else:
            W_enc, W_dec = t["encoder.weight"].T, t["decoder.weight"].T
            b_enc = t.get("encoder.bias", 0)
            b_dec = next(t[name] for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in t)
        subtracts = dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder")
        z = (x - b_dec * subtracts) @ W_enc + b_enc
        f = relu(z)
        if dict_class == "GatedAutoEncoder":
            f = (z + t["gate_bias"] > 0) * relu(np.exp(t["r_mag"]) * z + t["mag_bias"])
        elif dict_class == "AutoEncoderTopK":
            f = largest(f, K)
        elif "threshold" in t:
            f = f * (f > t["threshold"])
        return f, f @ W_dec + b_dec

    k, threshold = np.array(K, np.int32), np.array(0.7, np.float32)
    layers: Tensors = {"encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T}
    four: Tensors = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    biased = layers | {"encoder.bias": B_ENC}
    tensors: Tensors = {
        "AutoEncoder": biased | {"bias": B_DEC},
        "AutoEncoderNew": biased | {"decoder.bias": B_DEC},
        "GatedAutoEncoder": layers | {"decoder_bias": B_DEC, "r_mag": R_MAG, "gate_bias": B_ENC, "mag_bias": B_MAG},
        "JumpReluAutoEncoder": four | {"threshold": THRESHOLD},
        "AutoEncoderTopK": biased | {"b_dec": B_DEC, "k": k, "threshold": threshold},
        "BatchTopKSAE": biased | {"b_dec": B_DEC, "k": k, "threshold": threshold},
        "MatryoshkaBatchTopKSAE": four | {"k": k, "threshold": threshold, "group_sizes": np.array([4, 6])},
    }[dict_class]
    trainer = {"dict_class": dict_class, "layer": 8, "lm_name": "EleutherAI/pythia-160m-deduped", "k": K}
    config = ("config.json", {"trainer": trainer | {"submodule_name": "resid_post_layer_8"}, "buffer": {"io": "out"}})
    place, model = "8.resid_post", "EleutherAI/pythia-160m-deduped"
    return Layout("trainer_0", tensors, rule, place, place, model, "ae.pt", config)


def sparsify(transcode: bool) -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        z = relu((x if transcode else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
        f = largest(z, K)
        return f, f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "W_skip" in t else 0)

    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    tensors |= {"W_skip": W_SKIP} if transcode else {}
    cfg = {"d_in": D, "k": K, "num_latents": 0, "expansion_factor": 32, "activation": "topk", "transcode": transcode}
    cfg = ("cfg.json", {k: v for k, v in cfg.items() if k != "num_latents"} | {"skip_connection": transcode})
    where, reads, writes = (
        ("layers.5.mlp", "5.mlp_in", "5.mlp_out") if transcode else ("layers.5", "5.resid_post", "5.resid_post")
    )
    return Layout(f"repo/{where}", tensors, rule, reads, writes, "", "sae.safetensors", cfg)


def jumprelu(t: Any, x: np.ndarray) -> Pair:
    """Gemma Scope's."""
    names = {name.lower(): tensor for name, tensor in t.items()}
    z = x @ names["w_enc"] + names["b_enc"]
    f = (z > names["threshold"]) * relu(z)
    return f, f @ names["w_dec"] + names["b_dec"] + (x @ t["affine_skip_connection"] if len(t) > 5 else 0)


GEMMA: Tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}


def gemma_scope(site: str, folder: str, reads: str, writes: str) -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        if folder != "embedding":
            return jumprelu(t, x)
        f, y = jumprelu(t, x / np.sqrt(D))
        return f, y * np.sqrt(D)

    path = f"gemma-scope-2b-pt-{site}/{folder}/width_16k/average_l0_82"
    return Layout(path, GEMMA, rule, reads, writes, "google/gemma-2-2b", "params.npz")


def gemma_scope_2(folder: str, reads: str, writes: str) -> Layout:
    tensors = {name.lower(): tensor for name, tensor in GEMMA.items()}
    is_transcoder = folder.startswith("transcoder")
    tensors |= {"affine_skip_connection": W_SKIP} if is_transcoder else {}
    path = f"gemma-scope-2-1b-it/{folder}/layer_12_width_16k_l0_medium"
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-it", "affine_connection": is_transcoder}
    its = ("config.json", config)
    return Layout(path, tensors, jumprelu, reads, writes, "google/gemma-3-1b-it", "params.safetensors", its)


def circuit_tracer(kind: str, early: bool = False) -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        z = x @ t["W_enc"].T + t["b_enc"]
        f = relu(z)
        if kind == "jumprelu":
            f = z * (z > t["activation_function.threshold"])
        elif kind == "topk":
            f = largest(relu(z), K)  # its code keeps one below 0 where fewer than k are above; a feature is not so here
        return f, f @ (t["W_dec"].T if early else t["W_dec"]) + t["b_dec"] + (x @ t["W_skip"].T if early else 0)

    tensors = {"W_enc": W_ENC.T, "W_dec": W_DEC.T if early else W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
    tensors |= {"activation_function.threshold": THRESHOLD} if kind == "jumprelu" else {}
    tensors |= {"W_skip": W_SKIP} if early else {}
    text = f"""
model_name: "meta-llama/Llama-3.2-1B"  # which it belongs to
model_kind: transcoder_set
feature_input_hook: {"hook_resid_mid" if early else "'mlp.hook_in'"}
feature_output_hook: hook_mlp_out
scan: mntss/transcoder
{f"activation: topk{chr(10)}k: {K}" if kind == "topk" else ""}
transcoders:
  - "hf://somewhere/layer_0.safetensors"
"""
    config, reads = ("config.yaml", text), "11.resid_mid" if early else "11.mlp_in"
    path, model = "set/layer_11.safetensors", "meta-llama/Llama-3.2-1B"
    return Layout(path, tensors, rule, reads, "11.mlp_out", model, config=config)


def qwen3_transcoder() -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        f = relu(x @ t["W_enc"].T + t["b_enc"])
        return f, f @ t["W_dec"] + t["b_dec"]

    tensors = {"W_enc": W_ENC.T, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
    config = ("wanb-config.yaml", f"d_model:\n  value: {D}\nd_feature:\n  value: {F}\n")
    path = "qwen3-14b-transcoders-lowl0/layer_3.safetensors"
    return Layout(path, tensors, rule, "3.mlp_in", "3.mlp_out", "Qwen/Qwen3-14B", config=config)


def llama_scope() -> Layout:
    of_in, of_out, threshold = 12.5, 3.25, 0.11

    def rule(t: Any, x: np.ndarray) -> Pair:
        z = x * (np.sqrt(D) / of_in) @ t["encoder.weight"].T + t["encoder.bias"]
        f = z * (z > threshold * np.sqrt(D) / of_in)
        return f, (f @ t["decoder.weight"].T + t["decoder.bias"]) / (np.sqrt(D) / of_out)

    tensors = {"encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T, "encoder.bias": B_ENC, "decoder.bias": B_DEC}
    parameters = {
        **{"d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": threshold},
        **{"hook_point_in": "blocks.8.hook_resid_mid", "hook_point_out": "blocks.8.hook_mlp_out"},
        "dataset_average_activation_norm": {"in": of_in, "out": of_out},
    }
    its, weights = ("hyperparams.json", parameters), "checkpoints/final.safetensors"
    path, model = "Llama3_1-8B-Base-L8TC-8x", "meta-llama/Llama-3.1-8B"
    return Layout(path, tensors, rule, "8.resid_mid", "8.mlp_out", model, weights, its)


def llamascopium(act: str, norm: str, by_norms: bool) -> Layout:
    hook, mean_norm = "blocks.15.hook_resid_post", np.array(4.25, np.float32)

    def rule(t: Any, x: np.ndarray) -> Pair:
        factor: Any = {
            "inference": 1.0,
            "dataset-wise": np.sqrt(D) / 4.25,
            "token-wise": np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True),
        }[norm]
        norms = np.linalg.norm(t["W_D"], axis=1) if by_norms else 1.0
        z = (x * factor @ t["W_E"] + t["b_E"]) * norms
        f = largest(relu(z), K) if act == "topk" else z * (z > np.exp(t["activation_function.log_jumprelu_threshold"]))
        f = f / norms
        return f * (norms if act == "topk" else 1), (f @ t["W_D"] + t["b_D"]) / factor

    tensors = {"W_E": W_ENC, "b_E": B_ENC, "W_D": W_DEC, "b_D": B_DEC}
    tensors |= {"activation_function.log_jumprelu_threshold": np.log(THRESHOLD)} if act == "jumprelu" else {}
    tensors |= {f"dataset_average_activation_norm.{hook}": mean_norm}
    config = {
        **{"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": act, "norm_activation": norm},
        **{"sparsity_include_decoder_norm": by_norms, "top_k": K, "hook_point_in": hook, "hook_point_out": hook},
    }
    place, its = "15.resid_post", ("config.json", config)
    return Layout("L15R", tensors, rule, place, place, "", "sae_weights.safetensors", its)


def qwen_scope() -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        f = largest(relu(x @ t["W_enc"].T + t["b_enc"]), K)
        return f, f @ t["W_dec"].T + t["b_dec"]

    tensors = {"W_enc": W_ENC.T, "W_dec": W_DEC.T, "b_enc": B_ENC, "b_dec": B_DEC}
    path = f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/layer4.sae.pt"
    return Layout(path, tensors, rule, "4.resid_post", "4.resid_post", "Qwen/Qwen3-1.7B-Base")


def openai(activation: str) -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        mu, std = np.zeros((len(x), 1)), np.ones((len(x), 1))
        if activation == "TopK":
            mu, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
            x = (x - mu) / (std + 1e-5)
        z = (x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
        f = largest(relu(z), K) if activation == "TopK" else relu(z)
        return f, (f @ t["decoder.weight"].T + t["pre_bias"]) * std + mu

    tensors: dict[str, Any] = {
        **{"pre_bias": B_DEC, "latent_bias": B_ENC, "stats_last_nonzero": np.zeros(F, np.int64)},
        **{"encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T, "activation": activation},
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {},
    }
    location = "resid_post_attn_v5_32k" if activation == "TopK" else "mlp_post_act"
    place = "9.resid_mid" if activation == "TopK" else "9.mlp_hidden"
    return Layout(f"{location}/autoencoders/9.pt", tensors, rule, place, place, "openai-community/gpt2")


def goodfire() -> Layout:
    def rule(t: Any, x: np.ndarray) -> Pair:
        f = relu(x @ t["encoder_linear.weight"].T + t["encoder_linear.bias"])
        return f, f @ t["decoder_linear.weight"].T + t["decoder_linear.bias"]

    tensors = {"encoder_linear.weight": W_ENC.T, "encoder_linear.bias": B_ENC}
    tensors |= {"decoder_linear.weight": W_DEC.T, "decoder_linear.bias": B_DEC}
    path, model = "Llama-3.1-8B-Instruct-SAE-l19.pth", "meta-llama/Llama-3.1-8B-Instruct"
    return Layout(path, tensors, rule, "19.resid_post", "19.resid_post", model)


LAYOUTS: dict[str, Layout] = {
    "saelens standard": saelens("standard", True),
    "saelens standard, x itself": saelens("standard", False),
    "saelens topk": saelens("topk", True),
    "saelens topk, x itself": saelens("topk", False),
    "saelens topk by norms": saelens("topk", True, rescaled=True),
    "saelens topk of layer norm": saelens("topk", True, "layer_norm"),
    "saelens jumprelu": saelens("jumprelu", True),
    "saelens jumprelu of tokens of one norm": saelens("jumprelu", False, "constant_norm_rescale"),
    "saelens gated": saelens("gated", True),
    "saelens gated, x itself": saelens("gated", False),
    "saelens transcoder": saelens("transcoder", False),
    "saelens skip transcoder": saelens("skip_transcoder", False),
    "saelens jumprelu transcoder": saelens("jumprelu_transcoder", False),
    "saelens jumprelu skip transcoder": saelens("jumprelu_skip_transcoder", False),
    **{
        f"dictionary_learning {name}": dictionary_learning(name)
        for name in (
            *("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"),
            *("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"),
        )
    },
    "sparsify": sparsify(False),
    "sparsify skip transcoder": sparsify(True),
    "gemma_scope": gemma_scope("res", "layer_12", "12.resid_post", "12.resid_post"),
    "gemma_scope att": gemma_scope("att", "layer_12", "12.z", "12.z"),
    "gemma_scope mlp": gemma_scope("mlp", "layer_12", "12.mlp_out", "12.mlp_out"),
    "gemma_scope embedding": gemma_scope("res", "embedding", "embed", "embed"),
    "gemma_scope transcoder": gemma_scope("transcoders", "layer_12", "12.mlp_in", "12.mlp_out"),
    "gemma_scope_2": gemma_scope_2("resid_post", "12.resid_post", "12.resid_post"),
    "gemma_scope_2 att": gemma_scope_2("attn_out_all", "12.z", "12.z"),
    "gemma_scope_2 transcoder": gemma_scope_2("transcoder", "12.mlp_in", "12.mlp_out"),
    "circuit_tracer relu": circuit_tracer("relu"),
    "circuit_tracer relu, as they were, with a skip": circuit_tracer("relu", early=True),
    "circuit_tracer jumprelu": circuit_tracer("jumprelu"),
    "circuit_tracer topk": circuit_tracer("topk"),
    "circuit_tracer, of Qwen3": qwen3_transcoder(),
    "llama_scope": llama_scope(),
    "llamascopium jumprelu": llamascopium("jumprelu", "dataset-wise", True),
    "llamascopium jumprelu, folded": llamascopium("jumprelu", "inference", False),
    "llamascopium topk of tokens of one norm": llamascopium("topk", "token-wise", True),
    "qwen_scope": qwen_scope(),
    "openai topk": openai("TopK"),
    "openai relu": openai("ReLU"),
    "goodfire": goodfire(),
}
"""By the name of the format, and what is special about it."""
