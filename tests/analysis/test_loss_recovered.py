"""What a language model loses is the plain formula on its logits, with its own blocks run from the layer on."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import REPOSITORY

from jax_sae.analysis import loss_recovered as module
from jax_sae.analysis.loss_recovered import LossRecovered, batch_at_once, loss_recovered, story_by_story
from jax_sae.errors import BadInput
from jax_sae.language_model import harvest
from jax_sae.language_model.decoder import Decoder
from jax_sae.language_model.pretrained import LanguageModel, load_language_model

TIED, UNTIED = (REPOSITORY / "tests" / "data" / name for name in ("gpt_neo_bin", "gpt_neo_untied"))
DEMO = REPOSITORY / "jax_sae" / "demo" / "model"
LAYERS = [(TIED, 0), (TIED, 2), (TIED, 4), (UNTIED, 1), (UNTIED, 3), (DEMO, 2)]
SAMPLE = "Once upon a time there was a little fox. It wanted to play with the big bear."
T = 32
"""What stories are padded to here; the models are causal."""


@pytest.fixture(autouse=True, scope="module")
def few_lengths() -> Iterator[None]:
    """Read one by one, and lost several at a time, padded to few lengths, so that few programs are compiled."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(harvest, "PADDED_TO_MULTIPLES_OF", {512: T})
        patched.setattr(harvest, "TOKENS_AT_A_TIME_ON_CPU", T)
        patched.setattr(module, "tokens_at_a_time", lambda: 1024)
        yield


class Scaled:
    """Features are the positive and negative parts of x; the reconstruction is their difference, scaled."""

    def __init__(self, scale: float) -> None:
        self.scale = np.float32(scale)

    def encode(self, x: Any) -> np.ndarray:
        return np.concatenate([np.maximum(x, 0), np.maximum(-np.asarray(x), 0)], -1)

    def decode(self, features: Any) -> np.ndarray:
        positive, negative = np.split(features, 2, -1)
        return self.scale * (positive - negative)


def stories_of(lm: LanguageModel, lengths: tuple[int, ...] = (9, 32, 2, 9, 1, 0, 32)) -> list[np.ndarray]:
    """Random token ids."""
    rng = np.random.default_rng(0)
    return [rng.integers(lm.model.architecture.vocab_size, size=T) for T in lengths]


def mean_of(lm: LanguageModel, stories: list[np.ndarray]) -> np.ndarray:
    """The mean activation."""
    return np.concatenate(lm.activations(stories)).mean(0)


@partial(jax.jit, static_argnums=(0, 1))
def logits_from(model: Decoder, layer: int, params: Any, x: np.ndarray) -> jax.Array:
    """Logits [B, T, V]."""
    return cast(jax.Array, model.apply({"params": params}, x, layer, method="logits_from"))


def rest_of_network(lm: LanguageModel, x: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of stories without padding, from their activations at the layer."""
    model, params = lm.whole
    return np.asarray(logits_from(model, lm.layer, params, x))


def by_hand(
    lm: LanguageModel,
    stories: list[np.ndarray],
    scale: float,
    mean: np.ndarray,
    exclude: int = 0,
    limit: float = np.inf,
    place: str | None = None,
) -> dict[str, float]:
    """Every number from its definition, story by story, in float64 from the logits on."""

    @jax.jit
    def with_spliced(ids: np.ndarray, spliced: np.ndarray) -> jax.Array:
        return cast(jax.Array, lm.run(ids, lambda at, y: spliced if at == place else y))

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    ce: dict[str, list[float]] = {"without": [], "sae": [], "zero": [], "mean": []}
    kl: dict[str, list[float]] = {"sae": [], "zero": [], "mean": []}
    replaced = 0
    for ids in stories:
        if len(ids) < 2:
            continue
        x = lm.activations([ids])[0] if place is None else lm.activations([ids], [place])[place][0]
        keep = (np.arange(len(ids)) < exclude) | (np.linalg.norm(x, axis=1) > limit)
        replaced += int((~keep).sum())
        spliced = np.where(keep[:, None], x, np.stack([x, np.float32(scale) * x, 0 * x, 0 * x + mean]))
        spliced, ids_padded = np.pad(spliced, ((0, 0), (0, T - len(ids)), (0, 0))), np.pad(ids, (0, T - len(ids)))
        if place is None:
            logits = rest_of_network(lm, spliced)[:, : len(ids)]
        else:
            logits = np.asarray(with_spliced(np.stack([ids_padded] * 4), spliced))[:, : len(ids)]
        log_p = dict(zip(ce, log_softmax(logits), strict=True))
        for name in ce:
            ce[name] += [-log_p[name][t, ids[t + 1]] for t in range(len(ids) - 1)]
        for name in kl:
            p = np.exp(log_p["without"])
            kl[name] += [float(p[t] @ (log_p["without"][t] - log_p[name][t])) for t in range(len(ids) - 1)]
    CE, KL = ({name: float(np.mean(values)) for name, values in each.items()} for each in (ce, kl))
    n_tokens = sum(len(ids) for ids in stories if len(ids) > 1)
    return {
        "predictions": len(ce["sae"]),
        "replaced_tokens": replaced,
        "untouched_tokens": n_tokens - replaced,
        "ce_loss_without_sae": CE["without"],
        "ce_loss_with_sae": CE["sae"],
        "ce_loss_with_zero_ablation": CE["zero"],
        "ce_loss_with_mean_ablation": CE["mean"],
        "ce_loss_score_zero_ablation": (CE["zero"] - CE["sae"]) / (CE["zero"] - CE["without"]),
        "ce_loss_score_mean_ablation": (CE["mean"] - CE["sae"]) / (CE["mean"] - CE["without"]),
        "kl_div_with_sae": KL["sae"],
        "kl_div_with_zero_ablation": KL["zero"],
        "kl_div_with_mean_ablation": KL["mean"],
        "kl_div_score_zero_ablation": (KL["zero"] - KL["sae"]) / KL["zero"],
        "kl_div_score_mean_ablation": (KL["mean"] - KL["sae"]) / KL["mean"],
    }


def assert_close(found: LossRecovered, expected: dict[str, float]) -> None:
    """To float32's rounding in the network; scores to that divided by their denominators."""
    numbers = asdict(found)
    assert numbers.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("_ablation") and "score" in name:
            ablation = name.rsplit("score_", 1)[1]
            part = "ce_loss" if name.startswith("ce") else "kl_div"
            without = expected["ce_loss_without_sae"] if part == "ce_loss" else 0
            tolerance = 1e-4 / abs(expected[f"{part}_with_{ablation}"] - without) * (1 + abs(value))
            assert numbers[name] == pytest.approx(value, abs=tolerance), name
        else:
            assert numbers[name] == pytest.approx(value, rel=1e-5, abs=2e-5), name


@pytest.mark.long
@pytest.mark.parametrize(("directory", "layer"), LAYERS)
def test_untouched_activations_give_the_same_logits(directory: Path, layer: int) -> None:
    """At the first, a middle and the last layer, after the final layer norm, with a tied and an untied head.

    To 1e-4 at a scale of 2 to 17, since rounding differs between two programs; mostly it is 1e-6.
    """
    lm = load_language_model(str(directory), layer)
    text = SAMPLE if directory == DEMO else stories_of(lm)[1]
    [x], [logits] = lm.activations([text]), lm.logits([text])
    assert lm.whole[0].architecture.num_layers == {TIED: 4, UNTIED: 3, DEMO: 4}[directory]
    np.testing.assert_allclose(rest_of_network(lm, x[None])[0], logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("directory", "layer"), [(TIED, 2), (UNTIED, 3)])
def test_losses_are_the_formulas_on_unpadded_stories(directory: Path, layer: int) -> None:
    """Stories of unequal lengths, among them one without a token and one without a prediction."""
    lm = load_language_model(str(directory), layer)
    stories = stories_of(lm)
    mean = mean_of(lm, stories)
    found = loss_recovered(lm, stories, {"half": batch_at_once(Scaled(0.5))}, mean)
    assert_close(found["half"], by_hand(lm, stories, 0.5, mean))
    assert found["half"].predictions == 8 + 31 + 1 + 8 + 31


PLACES = [("gemma2", "1.mlp_out"), ("gpt_neox", "2.z"), ("qwen2", "0.resid_mid"), ("gpt2", "2.resid_post")]


@pytest.mark.long
@pytest.mark.parametrize(("model", "place"), PLACES)
def test_at_every_place_of_every_family(model: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network goes on with what is put in there; logits are made of some tokens at a time."""
    lm = load_language_model(str(REPOSITORY / "tests" / "data" / "families" / model), places=[place])
    stories = stories_of(lm, (9, 3, 1, 20))
    mean = np.concatenate(lm.activations(stories)).mean(0)
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", 61 * 17)
    found = loss_recovered(lm, stories, {"half": batch_at_once(Scaled(0.5))}, mean, exclude_first_tokens=1)
    assert_close(found["half"], by_hand(lm, stories, 0.5, mean, 1, place=place))


def by_tap(
    lm: LanguageModel, stories: list[np.ndarray], inputs: list[np.ndarray], writes: list[str]
) -> Callable[[Any], float]:
    """The cross-entropy of `lm.run` with a tap that puts what a dictionary writes at each place, but for first tokens.

    Of stories with the inputs [T, D] of each.
    """

    @jax.jit
    def log_p_of(ids: np.ndarray, written: np.ndarray) -> jax.Array:
        parts = dict(zip(writes, jnp.split(written, len(writes), -1), strict=True))

        def put(place: str, y: jax.Array) -> jax.Array:
            return jnp.where(jnp.arange(T)[:, None] >= 1, parts[place], y) if place in parts else y

        return jax.nn.log_softmax(lm.run(ids, put))

    def of(dictionary: Any) -> float:
        losses: list[float] = []
        for ids, x in zip(stories, inputs, strict=True):
            more = (0, T - len(ids))
            log_p = np.asarray(log_p_of(np.pad(ids, more), np.pad(np.asarray(dictionary(x)), (more, (0, 0)))))
            losses += [-float(log_p[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        return float(np.mean(losses))

    return of


WRITTEN = [
    ("gemma2", ["1.mlp_in"], ["1.mlp_out"]),
    ("gpt_neox", ["0.mlp_in", "2.z"], ["2.attn_out", "0.resid_post"]),
    ("qwen2", ["1.resid_post"], ["final_norm", "0.mlp_out", "embed"]),
    ("gpt2", ["2.resid_pre", "1.resid_post"], ["1.resid_post", "2.resid_pre", "2.resid_post"]),
]


@pytest.mark.long
@pytest.mark.parametrize(("model", "reads", "writes"), WRITTEN)
def test_several_places_are_replaced_at_once(model: str, reads: list[str], writes: list[str]) -> None:
    """As a run with a tap that replaces them all, by what is made of a clean run; in any order, at any blocks.

    Where two names are one place in the stream, the one that the network comes to later counts.
    """
    lm = load_language_model(str(REPOSITORY / "tests" / "data" / "families" / model))
    stories = stories_of(lm, (9, 3, 20))
    found = [np.concatenate(each, -1) for each in zip(*lm.activations(stories, reads).values(), strict=True)]
    of_written = lm.activations(stories, writes)
    mean = np.concatenate([np.concatenate(its).mean(0) for its in of_written.values()])
    matrix = np.random.default_rng(1).normal(size=(found[0].shape[-1], len(mean))).astype(np.float32) / 9
    maps = {
        "a": lambda x: np.maximum(x @ matrix, 0),
        "mean": lambda x: np.broadcast_to(mean, (*x.shape[:-1], len(mean))),
    }
    dictionaries = {name: lambda x, lengths, f=f: f(x) for name, f in maps.items()}
    got = loss_recovered(lm, stories, dictionaries, mean, 1, reads=reads, writes=writes)
    loss_of = by_tap(lm, stories, found, writes)
    for name, f in maps.items():
        assert got[name].ce_loss_with_sae == pytest.approx(loss_of(f), rel=1e-5)
    assert got["mean"].ce_loss_with_sae == got["a"].ce_loss_with_mean_ablation
    assert got["a"].ce_loss_score_zero_ablation != pytest.approx(1, abs=1e-3)


def test_what_was_there_recovers_everything_and_so_does_the_mlp_itself() -> None:
    """On the demo's model: a dictionary that copies two places, and one that is the MLP it stands in for."""
    lm = load_language_model(str(DEMO))
    texts = [SAMPLE, "The bear said: yes, we can play together. And they were happy.", "No."]
    _, mlp = lm.whole[1], cast(Any, lm.params)["h_1"]["mlp"]

    def itself(x: np.ndarray, lengths: np.ndarray) -> jax.Array:
        hidden = jax.nn.gelu(x @ mlp["c_fc"]["kernel"] + mlp["c_fc"]["bias"])
        return hidden @ mlp["c_proj"]["kernel"] + mlp["c_proj"]["bias"]

    for name, dictionary, reads, writes in (
        ("the MLP", itself, ["1.mlp_in"], ["1.mlp_out"]),
        ("a copy", lambda x, lengths: x, ["2.resid_post", "0.mlp_out"], None),
    ):
        D = 64 * len(writes or reads)
        found = loss_recovered(lm, texts, {name: dictionary}, np.zeros(D), reads=reads, writes=writes)[name]
        assert found.ce_loss_with_zero_ablation > found.ce_loss_without_sae + 0.05
        assert found.ce_loss_score_zero_ablation == pytest.approx(1, abs=1e-4)
        assert found.kl_div_score_zero_ablation == pytest.approx(1, abs=1e-4)
        assert found.kl_div_with_sae == pytest.approx(0, abs=1e-6)


@pytest.mark.long
def test_of_two_language_models_that_of_the_written_places_is_run() -> None:
    """What is read of the other one is of its own clean run; in which order the models stand does not matter."""
    base = load_language_model(str(DEMO))
    rng = np.random.default_rng(0)
    tuned = replace(base, params=jax.tree.map(lambda p: p * rng.uniform(0.9, 1.1, p.shape).astype("f"), base.params))
    stories = stories_of(base, (9, 3, 20))
    reads, writes = ["a:1.mlp_in", "b:3.resid_post", "b:1.mlp_in"], ["b:1.mlp_out", "b:2.resid_post"]
    x, y = base.activations(stories, ["1.mlp_in"]), tuned.activations(stories, ["3.resid_post", "1.mlp_in"])
    inputs = [np.concatenate(each, -1) for each in zip(*x.values(), *y.values(), strict=True)]
    matrix = rng.normal(size=(192, 128)).astype(np.float32) / 9
    expected = by_tap(tuned, stories, inputs, ["1.mlp_out", "2.resid_post"])(lambda x: x @ matrix)
    for models in ({"a": base, "b": tuned}, {"b": tuned, "a": base}):
        found = loss_recovered(
            models, stories, {"F8": lambda x, lengths: x @ matrix}, np.zeros(128), 1, reads=reads, writes=writes
        )
        assert found["F8"].ce_loss_with_sae == pytest.approx(expected, rel=1e-5)
    with pytest.raises(BadInput, match="different places of one language model were expected"):
        loss_recovered(models, stories, {}, np.zeros(128), reads=reads, writes=["a:1.mlp_out", "b:1.mlp_out"])
    with pytest.raises(BadInput, match=r"'1\.mlp_in' is of none of the language models b, a; write the name"):
        loss_recovered(models, stories, {}, np.zeros(64), reads=["1.mlp_in"])


@pytest.mark.parametrize(("exclude", "quantile"), [(3, 1.0), (0, 0.7), (2, 0.45)])
def test_excluded_and_large_tokens_stay_as_they_are(exclude: int, quantile: float) -> None:
    """Under the autoencoder and under both ablations, and they are counted."""
    lm = load_language_model(str(TIED), 2)
    stories = stories_of(lm)
    mean = mean_of(lm, stories)
    norms = np.linalg.norm(np.concatenate(lm.activations(stories)), axis=1)
    limit = float(np.quantile(norms, quantile)) if quantile < 1 else 0.0
    found = loss_recovered(lm, stories, {"sae": batch_at_once(Scaled(0.3))}, mean, exclude, limit)["sae"]
    assert_close(found, by_hand(lm, stories, 0.3, mean, exclude, limit or np.inf))
    assert found.untouched_tokens > 0


def test_the_identity_scores_1_and_an_ablation_0() -> None:
    """On the demo's model and its own text, where ablations lose much; several autoencoders are in one pass."""
    lm = load_language_model(str(DEMO), 2)
    texts = [SAMPLE, "The bear said: yes, we can play together. And they were happy.", "No."]
    mean = np.concatenate(lm.activations(texts)).mean(0)
    found = loss_recovered(
        lm,
        texts,
        {
            "identity": batch_at_once(Scaled(1)),
            "zero": batch_at_once(Scaled(0)),
            "mean": lambda x, lengths: np.broadcast_to(mean, x.shape),
        },
        mean,
    )
    identity, zero, of_mean = found["identity"], found["zero"], found["mean"]
    assert identity.ce_loss_with_zero_ablation > identity.ce_loss_without_sae + 1
    assert identity.ce_loss_with_mean_ablation > identity.ce_loss_without_sae + 0.5
    for score in ("ce_loss_score", "kl_div_score"):
        for ablation in ("zero", "mean"):
            assert getattr(identity, f"{score}_{ablation}_ablation") == pytest.approx(1, abs=1e-5)
            assert getattr(found[ablation], f"{score}_{ablation}_ablation") == 0
    assert identity.kl_div_with_sae == pytest.approx(0, abs=1e-6)
    assert zero.ce_loss_with_sae == zero.ce_loss_with_zero_ablation
    assert of_mean.kl_div_with_sae == of_mean.kl_div_with_mean_ablation
    assert len({(each.ce_loss_without_sae, each.kl_div_with_zero_ablation) for each in found.values()}) == 1
    assert -np.log(np.finfo(np.float32).tiny) > identity.ce_loss_without_sae > 0


def test_neither_padding_nor_company_changes_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other stories in the batch, a batch of one, and reconstructions of padding that are not finite."""
    lm = load_language_model(str(TIED), 2)
    stories = stories_of(lm, (20, 9, 31))
    mean = mean_of(lm, stories)

    def spoilt(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.where(np.arange(x.shape[1])[:, None] < lengths[:, None, None], 0.5 * x, np.nan)

    together = loss_recovered(lm, stories, {"sae": spoilt}, mean)["sae"]
    alone = [loss_recovered(lm, [ids], {"sae": batch_at_once(Scaled(0.5))}, mean)["sae"] for ids in stories]
    weights = [19, 8, 30]
    for name in ("ce_loss_without_sae", "ce_loss_with_sae", "kl_div_with_sae", "kl_div_with_mean_ablation"):
        expected = np.average([getattr(each, name) for each in alone], weights=weights)
        assert getattr(together, name) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(module, "MOST_TOKENS_AT_A_TIME", 1)
    one_by_one = loss_recovered(lm, stories, {"sae": spoilt}, mean)["sae"]
    assert one_by_one.ce_loss_with_sae == pytest.approx(together.ce_loss_with_sae, rel=1e-6)


def test_story_by_story_sees_whole_stories_without_padding() -> None:
    """For an autoencoder that subtracts each story's own mean, the same as a batch where it does not."""
    lm = load_language_model(str(TIED), 2)
    stories = stories_of(lm)
    mean, seen = mean_of(lm, stories), []

    def half(x: np.ndarray) -> np.ndarray:
        seen.append(len(x))
        return 0.5 * x

    autoencoders = {"batch": batch_at_once(Scaled(0.5)), "stories": story_by_story(half)}
    found = loss_recovered(lm, stories, autoencoders, mean)
    assert found["batch"] == found["stories"]
    assert sorted(seen) == [2, 9, 9, 32, 32]


@pytest.mark.long
def test_one_program_for_each_padded_length() -> None:
    """However many stories there are of it; lengths that are padded to the same share it."""
    lm = load_language_model(str(TIED), 2)
    mean = np.zeros(lm.width)
    module._losses_and_divergences.clear_cache()
    loss_recovered(lm, stories_of(lm, (9, 3, 16, 12) * 20), {"sae": batch_at_once(Scaled(0.5))}, mean)
    assert module._losses_and_divergences._cache_size() == 1
    loss_recovered(lm, stories_of(lm, (5, 60)), {"sae": batch_at_once(Scaled(0.5))}, mean)
    loss_recovered(lm, stories_of(lm, (14,)), {"sae": batch_at_once(Scaled(0.9))}, mean)
    assert module._losses_and_divergences._cache_size() == 2


def test_what_cannot_be_measured_is_refused() -> None:
    """Nothing to predict, nothing to replace, another width, and what is not finite, in one line each."""
    lm = load_language_model(str(TIED), 2)
    mean, stories = np.zeros(lm.width), stories_of(lm, (5, 7))
    half = {"F8": batch_at_once(Scaled(0.5))}
    with pytest.raises(BadInput, match="none of the 2 texts has 2 tokens or more"):
        loss_recovered(lm, stories_of(lm, (1, 0)), half, mean)
    with pytest.raises(BadInput, match="all 12 tokens are excluded first tokens or over the norm limit"):
        loss_recovered(lm, stories, half, mean, exclude_first_tokens=7)
    with pytest.raises(BadInput, match="the mean has the shape"):
        loss_recovered(lm, stories, half, mean[:-1])
    with pytest.raises(BadInput, match="different places of one language model were expected"):
        loss_recovered(lm, stories, half, np.zeros(2 * lm.width), reads=["0.z", "0.z"])
    with pytest.raises(BadInput, match="norm_limit is 3, but there are several places"):
        loss_recovered(lm, stories, half, mean, norm_limit=3, reads=["0.mlp_in"], writes=["0.mlp_out"])
    with pytest.raises(BadInput, match="F8 gives reconstructions of the shape"):
        loss_recovered(lm, stories, {"F8": lambda x, lengths: x[0]}, mean)
    with pytest.raises(BadInput, match="F8 gives a reconstruction that is not finite"):
        loss_recovered(lm, stories, {"F8": lambda x, lengths: x * np.nan}, mean)
    with pytest.raises(BadInput, match="has token ids from 1 to 1000000"):
        loss_recovered(lm, [np.array([1, 10**6])], half, mean)
