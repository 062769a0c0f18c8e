"""What SAELens itself writes is imported and computes what SAELens does, on raw activations; skipped where it is not.

`pip install "jax_sae[peers]"` brings it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.test_import import as_trained

from jax_sae.formats.read import read_dictionary

torch = pytest.importorskip("torch", reason="torch and the other tools are not installed")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # theirs

D, F, K = 16, 40, 6
HOOKS = {"hook_name": "blocks.3.hook_resid_mid", "hook_name_out": "blocks.3.hook_mlp_out", "model_name": "gpt2-small"}

SAVED: dict[str, dict[str, Any]] = {
    "standard": {},
    "topk": {"k": K},
    "topk by norms": {"k": K, "rescale_acts_by_decoder_norm": True},
    "topk of layer norm": {"k": K, "normalize_activations": "layer_norm"},
    "jumprelu": {"apply_b_dec_to_input": False},
    "jumprelu of tokens of one norm": {"normalize_activations": "constant_norm_rescale"},
    "gated": {},
    "transcoder": {"d_out": D, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": D, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": D, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": D, "apply_b_dec_to_input": False},
}


def randomised(sae: Any) -> Any:
    """The same with random parameters, thresholds above 0."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.randn(parameter.shape, generator=rng) * 0.5
            parameter.copy_(values.abs() if name == "threshold" else values)
    return sae


def assert_same(folder: Path, sae: Any) -> None:
    """Features and what is written, to 1e-5 of the largest number."""
    x = 3 * torch.randn((200, D), generator=torch.Generator().manual_seed(1)) + 1
    with torch.no_grad():
        features = sae.encode(x)
        features, written = (features.to_dense() if features.is_sparse else features).numpy(), sae(x).numpy()
    ours = as_trained(read_dictionary(folder))
    np.testing.assert_allclose(ours.encode(x), features, rtol=0, atol=1e-5 * np.abs(features).max())
    np.testing.assert_allclose(ours(x), written, rtol=0, atol=1e-5 * np.abs(written).max())


@pytest.mark.parametrize("name", SAVED)
def test_what_saelens_saves_is_imported(name: str, tmp_path: Path) -> None:
    """Every architecture that one of its models has once it is trained."""
    lens = pytest.importorskip("sae_lens", reason="it is not installed", exc_type=ImportError)
    architecture = name.split()[0]
    config = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "metadata": HOOKS, **SAVED[name]}
    config["architecture"] = architecture
    cls, of = lens.registry.get_sae_class(architecture)
    sae = randomised(cls(of.from_dict(config)))
    sae.save_model(tmp_path)
    if "rescale" in str(SAVED[name]):  # its features have other sizes: they are those of directions of norm 1
        ours = as_trained(read_dictionary(tmp_path))
        x = torch.randn((50, D))
        with torch.no_grad():
            np.testing.assert_allclose(ours(x), sae(x).numpy(), atol=1e-4)
        return
    assert_same(tmp_path, sae)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "jumprelu", "topk", "gated", "standard"])
def test_what_its_trainers_save_for_use_is_imported(architecture: str, tmp_path: Path) -> None:
    """Some of them are converted to another architecture, which SAELens reads back itself."""
    lens = pytest.importorskip("sae_lens", reason="it is not installed", exc_type=ImportError)
    config = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "metadata": HOOKS}
    config |= {"k": K} if "topk" in architecture else {}
    config |= {"matryoshka_widths": [10, F]} if architecture.startswith("matryoshka") else {}
    cls, of = lens.registry.get_sae_training_class(architecture)
    training = randomised(cls(of.from_dict(config)))
    if hasattr(training, "topk_threshold"):
        training.topk_threshold.fill_(0.8)
    training.save_inference_model(tmp_path)
    assert_same(tmp_path, lens.SAE.load_from_disk(tmp_path))
