"""The harvest of two of four blocks at TinyStories-33M's size, as a fraction of the rate `jnp.dot` reaches.

Story lengths are drawn from a log-normal distribution around 200 tokens. Counted
are 24 D^2 operations a token and block for the matrix products and 4 T D for attention over all T positions, for real
tokens only: padding counts as time lost. Weights are random; they do not change the time.

    python benchmarks/harvest.py
"""

import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from timing import seconds, spread

from jax_sae.language_model.gpt_neo import GPTNeo, GPTNeoConfig
from jax_sae.language_model.harvest import harvest

TINYSTORIES_33M = {
    "model_type": "gpt_neo",
    "hidden_size": 768,
    "num_layers": 4,
    "num_heads": 16,
    "attention_types": [[["global", "local"], 2]],
}
LAYER = 2
ROWS = 4096  # of the matrix products that it is compared with


def main(tokens: int = 65536, rounds: int = 5) -> None:
    """Print tokens per second, and the fraction of the rate of matrix products.

    Args:
        tokens: how many are harvested.
        rounds: how often it is timed.
    """
    config = GPTNeoConfig.from_hugging_face(TINYSTORIES_33M, "benchmarks/harvest.py")
    model, D = GPTNeo(config, LAYER), config.hidden_size
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(0, 0.02, s.shape), jnp.float32), shapes)
    stories: list[np.ndarray] = []
    while sum(map(len, stories)) < tokens:
        length = int(np.clip(random.lognormal(np.log(190), 0.35), 20, 1000))
        stories.append(random.integers(0, config.vocab_size, length))
    n = sum(map(len, stories))
    operations = sum(LAYER * len(story) * (24 * D * D + 4 * len(story) * D) for story in stories)
    x = jax.random.normal(jax.random.key(0), (ROWS, D))
    W = [jax.random.normal(jax.random.key(1), (D, out)) for out in (D, 4 * D)]
    dot = jax.jit(jnp.dot)
    times = seconds(
        {"dot": lambda: [dot(x, w) for w in W], "harvest": lambda: [a for _, a in harvest(model, params, stories)]},
        rounds,
    )
    rate = [2 * ROWS * D * 5 * D / t for t in times["dot"]]
    ratios = [operations / t / r for t, r in zip(times["harvest"], rate, strict=True)]
    speed = [n / t for t in times["harvest"]]
    print(f"{len(stories)} stories, {n} tokens, mean length {n / len(stories):.0f}")
    print(
        f"{spread(speed)} tokens/s, fraction of jnp.dot {spread(ratios)}, "
        f"jnp.dot {statistics.median(rate) / 1e9:.0f} GF/s"
    )
    results = {"tokens_per_second": statistics.median(speed), "ratio": statistics.median(ratios)}
    print(json.dumps({"benchmark": "harvest", "device": jax.devices()[0].device_kind, "results": results}))


if __name__ == "__main__":
    tyro.cli(main)
