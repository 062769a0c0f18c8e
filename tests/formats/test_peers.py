"""The tools themselves load what is written for them, and compute what was trained, on raw activations.

Skipped where a tool is not installed: `pip install "jax_sae[peers]"`, and without their dependencies, which loading
does not use, `pip install --no-deps dictionary-learning==0.1.0 eai-sparsify==1.3.3 circuit-tracer==0.5.0`.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from formats.made import far, made
from formats.test_export import HELD, by_readme

torch = pytest.importorskip("torch", reason="torch and the other tools are not installed")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # theirs


def tool(name: str) -> Any:
    """A tool's module; the test is skipped where it is not installed."""
    if name.startswith("dictionary_learning") and "nnsight" not in sys.modules:
        try:
            import_module("nnsight")
        except ImportError:  # it reads language models, and no dictionary
            sys.modules["nnsight"] = ModuleType("nnsight")
            sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]
    return pytest.importorskip(name, reason="it is not installed", exc_type=ImportError)


def by_saelens(folder: Path, x: Any) -> tuple[Any, Any]:
    sae = tool("sae_lens").SAE.load_from_disk(folder)
    return sae.encode(x), sae(x)


def by_dictionary_learning(folder: Path, x: Any) -> tuple[Any, Any]:
    dictionary, _ = tool("dictionary_learning.utils").load_dictionary(str(folder), device="cpu")
    return dictionary.encode(x), dictionary(x)


def by_sparsify(folder: Path, x: Any) -> tuple[Any, Any]:
    coder = tool("sparsify").SparseCoder.load_from_disk(folder)
    values, indices, _ = coder.encode(x)
    return torch.zeros(len(x), coder.num_latents).scatter_(1, indices, values), coder(x).sae_out


def by_circuit_tracer(folder: Path, x: Any) -> tuple[Any, Any]:
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text())
    of = tool("circuit_tracer.transcoder.single_layer_transcoder")
    hooks = config["feature_input_hook"], config["feature_output_hook"]
    assert hooks == ("mlp.hook_in", "hook_mlp_out") and config["model_kind"] == "transcoder_set"
    transcoders = of.load_transcoder_set({0: str(folder / "layer_0.safetensors")}, config["scan"], *hooks)
    return transcoders.encode(x[None])[0], transcoders[0](x)


TOOLS: dict[str, Callable[[Path, Any], tuple[Any, Any]]] = {
    "saelens": by_saelens,
    "dictionary_learning": by_dictionary_learning,
    "sparsify": by_sparsify,
    "circuit_tracer": by_circuit_tracer,
}


@pytest.mark.parametrize("format", TOOLS)
def test_the_tool_computes_what_was_trained(format: str, tmp_path: Path) -> None:
    """Features and what is written, of every kind and placement that the format holds, to 1e-5 of their size."""
    for kind, placement in sorted(HELD[format]):
        sae, x = made(kind, placement)
        folder = sae.export(format, tmp_path / f"{kind} {placement}")  # type: ignore[arg-type]
        with torch.no_grad():
            features, written = (its.numpy() for its in TOOLS[format](folder, torch.from_numpy(x)))
        errors = far(features, sae.encode(x)), far(written, sae(x))
        print(f"{format:20} {kind:10} {placement:16} features {errors[0]:.1e} written {errors[1]:.1e}")
        assert max(errors) < 1e-5, (kind, placement)
        if format == "dictionary_learning":  # which takes torch
            assert far(by_readme(folder, x)[1], sae(x)) < 1e-5
