"""What several test files use. No network: the hub is switched off before any library reads the switch."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jax_sae.config import Config, load_config
from jax_sae.sweep.train import train


REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def demo_config() -> Config:
    """The demo, but only 12 steps of 64 tokens, with checkpoints at 5, 10 and 12."""
    config = load_config(REPOSITORY / "configs" / "demo.toml")
    return replace(
        config,
        activations=replace(config.activations, block_tokens=448, held_out_tokens=1500),
        train=replace(config.train, steps=12, batch_tokens=64, warmup_steps=2, checkpoint_every=5, log_every=2),
    )


def stop_at(step: int) -> Callable[[], bool]:
    """A `stop_requested` that asks for a stop at a step, where every step is a dispatch (log_every = 1)."""
    calls = iter(range(1, 10**9))
    return lambda: next(calls) >= step


def never() -> bool:
    """A `stop_requested` that does not."""
    return False


@pytest.fixture(scope="session")
def demo_run(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `demo_config`."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    assert train(demo_config, out, resume=False, stop_requested=never)
    return out
