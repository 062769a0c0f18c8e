"""Steering: what a tap adds, sets and takes away; what is written with it; what cannot be done is said in one line."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import REPOSITORY

import jax_sae
from jax_sae.activations.normalize import Normalization
from jax_sae.analysis.steering import intervention, next_predictions, predictions_compared, texts_written
from jax_sae.autoencoder.kinds import kind_named
from jax_sae.autoencoder.model import init_params
from jax_sae.commands.steer import main
from jax_sae.config import Config, Member
from jax_sae.encode_decode import model_of
from jax_sae.rows import padded
from jax_sae.trained import Origin, TrainedAutoencoder

D, F = 64, 24
PROMPT = "Once upon a time there was a big dog"


@pytest.fixture(scope="module")
def lm() -> jax_sae.LanguageModel:
    return jax_sae.load_language_model(str(REPOSITORY / "jax_sae" / "demo" / "model"))


def made(kind: str, reads: tuple[str, ...], writes: tuple[str, ...] = (), skip: bool = False) -> TrainedAutoencoder:
    """A dictionary with random parameters; an autoencoder at the first of `reads` if it writes nothing else."""
    written = (D,) * len(writes)
    model = kind_named(kind)(D * len(reads), F, written, skip, "independent" if written else "transposed")
    width, to = D * len(reads), D * len(writes)
    member = Member(F, kind=kind, k=3, reads=reads, writes=writes) if writes else Member(F, kind=kind, k=3)
    return TrainedAutoencoder(
        params=init_params(model, 0),
        memory={"threshold": jnp.float32(0.5)} if kind == "batchtopk" else {},
        settings={"k": jnp.float32(3)} if kind == "topk" else {},
        normalization=Normalization(jnp.linspace(-1, 2, width), jnp.linspace(0.2, 0.4, width)),
        kind=kind,
        of_written=Normalization(jnp.linspace(0, 1, to), jnp.linspace(0.1, 0.5, to)) if writes else None,
        written=written,
        origin=Origin("it", 5, member, Config(), place="" if writes else reads[0]),
    )


AUTOENCODER = made("topk", ("1.resid_post",))
TRANSCODER = made("batchtopk", ("0.mlp_in", "1.attn_out"), ("1.mlp_out", "2.resid_post"))
CROSSCODER = made("topk", ("0.resid_post", "2.resid_post"), ("0.resid_post", "2.resid_post"))


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "sae",
    [pytest.param(AUTOENCODER, id="autoencoder"), pytest.param(TRANSCODER, id="transcoder", marks=pytest.mark.long)],
)
def test_what_is_added_set_and_taken_away(lm: jax_sae.LanguageModel, sae: TrainedAutoencoder) -> None:
    """Nothing by 0 or its own value; else as a tap by hand, also where several places are read before those written."""
    ids = lm.token_ids([PROMPT])[0]
    read = lm.activations([ids], sae.reads)
    x = np.concatenate([read[name][0] for name in sae.reads], -1)
    features = sae.encode(x)  # [T, F]
    i = int(np.argmax(np.sum(features > 0, 0)))
    assert 0 < np.mean(features[:, i] > 0)
    steered = jax.jit(lambda s, clamp: lm.run(ids, jax_sae.steer(sae, i, s, clamp=clamp)), static_argnums=1)
    plain = lm.run(ids)
    close(steered(0.0, False), plain)

    @jax.jit
    def by_hand(changes: jax.Array) -> jax.Array:
        """changes[T] of the feature, in the features that are decoded."""

        def tap(place: str, y: jax.Array) -> jax.Array:
            if place not in sae.writes:
                return y
            changed = jnp.asarray(features).at[:, i].add(changes)
            return y + sae.decode(changed, place=place) - sae.decode(features, place=place)

        return lm.run(ids, tap)

    close(steered(7.0, False), by_hand(7.0))
    close(steered(7.0, True), by_hand(7.0 - features[:, i]))
    close(steered(0.0, True), by_hand(-features[:, i]))
    assert np.abs(steered(0.0, True) - plain).max() > 0.01
    each = jnp.array([-3.0, 0.0, 5.0])
    at_once = jax.vmap(lambda s: lm.run(ids, jax_sae.steer(sae, i, s)))(each)
    close(at_once, np.stack([steered(s, False) for s in each]))


def test_a_feature_set_to_its_own_value_changes_nothing(lm: jax_sae.LanguageModel) -> None:
    """Of one token: the others of the prompt are of another value. Nor does it matter that a tap used it first."""
    ids = lm.token_ids([PROMPT])[0][:1]
    x = lm.activations([ids], AUTOENCODER.reads)["1.resid_post"][0]
    features = AUTOENCODER.encode(x)
    i = int(np.argmax(features[0]))
    assert features[0, i] > 0
    model_of.cache_clear()
    close(lm.run(ids, jax_sae.steer(AUTOENCODER, i, features[0, i], clamp=True)), lm.run(ids))
    np.testing.assert_array_equal(AUTOENCODER.encode(x), features)


@pytest.mark.long
def test_texts_are_those_of_generate_and_of_a_loop_without_a_cache(lm: jax_sae.LanguageModel, demo_run: Path) -> None:
    """Greedy and drawn; for each seed; and what is said of them is what the logits say."""
    sae = jax_sae.load_autoencoder(demo_run, name="F64")
    ids, what, most, room = lm.token_ids([PROMPT])[0], intervention(sae, True), 24, 128
    model, params = lm.whole
    numbers: Any = (model, params, sae, 3, jnp.float32(20))
    tap = jax_sae.steer(sae, 3, 20.0, clamp=True)
    given = padded(ids, (room,))

    def written(temperature: float) -> Any:
        seeds = jnp.array([4, 5])
        return texts_written(*numbers, given, len(ids), most, -1, temperature, 1.0, seeds, room=room, what=what)

    greedy, ends = written(0.0)
    rows = np.asarray(greedy)[:, :most]
    assert rows[0].tolist() == rows[1].tolist() and ends.tolist() == [most, most]
    likeliest, untouched = (np.argmax(lm.run(rows, each)[0], -1)[len(ids) - 1 : -1].tolist() for each in (tap, None))
    assert likeliest == rows[0, len(ids) :].tolist() != untouched
    drawn, _ = written(0.8)
    for row, seed in zip(drawn, (4, 5), strict=True):
        assert row[:most].tolist() == lm.generate(ids, most - len(ids), temperature=0.8, seed=seed, tap=tap).tolist()

    loss, divergence = (each[:, : most - 1] for each in predictions_compared(*numbers, drawn, what=what))
    log_p, log_q = (jax.nn.log_softmax(lm.run(drawn[:, :most], each)) for each in (None, tap))
    close(loss, -np.take_along_axis(log_p[:, :-1], drawn[:, 1:most, None], -1)[..., 0])
    close(divergence, np.sum(np.exp(log_p) * (log_p - log_q), -1)[:, :-1])
    before, after = next_predictions(*numbers, given, len(ids), what=what)
    close(before, jax.nn.softmax(lm.run(ids)[-1]))
    close(after, jax.nn.softmax(lm.run(ids, tap)[-1]))


def test_what_cannot_be_steered_is_told(lm: jax_sae.LanguageModel) -> None:
    """In one line."""
    nameless = made("topk", ("",))
    elsewhere = made("topk", ("7.resid_post",))
    ids = lm.token_ids([PROMPT])[0]
    for ask, message in (
        (lambda: jax_sae.steer(AUTOENCODER, F, 1.0), r"it has no feature 24; its features are 0 to 23"),
        (lambda: jax_sae.steer(AUTOENCODER, 0, float("nan")), r"strength is nan; a number from -"),
        (lambda: jax_sae.steer(AUTOENCODER, 0, 1e30), r"strength is 1e\+30; .* is beyond float32"),
        (lambda: jax_sae.steer(nameless, 0, 1.0), r"does not say where its activations are from; give place="),
        (lambda: jax_sae.steer(nameless, 0, 1.0, place="here"), r"'here', which is no place of a language model"),
        (lambda: lm.run(ids, jax_sae.steer(elsewhere, 0, 1.0)), r"the language model has no place 7.resid_post"),
        (
            lambda: jax_sae.steer(CROSSCODER, 0, 1.0, clamp=True),
            r"it writes 0.resid_post before it has read 2.resid_post, so its features are not known there",
        ),
    ):
        with pytest.raises(jax_sae.BadInput, match=message) as error:
            ask()
        assert "\n" not in str(error.value)
    there = jax_sae.steer(nameless, 0, 1.0, place="1.resid_post")
    close(lm.run(ids, there), lm.run(ids, jax_sae.steer(AUTOENCODER, 0, 1.0)))  # the same parameters
    added = lm.run(ids, jax_sae.steer(CROSSCODER, 0, 1.0))
    assert np.abs(added - lm.run(ids)).max() > 0.01


@pytest.mark.long
def test_a_command_writes_texts_side_by_side(demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And `run.steer` gives the same, as a record that JSON has; one line and exit code 2 for what cannot be used."""
    asked = [str(demo_run), "--member", "F64", "--feature", "3", "--prompt", "Once upon a time", "--tokens", "5"]
    assert main([*asked, "--strength", "2", "1e15", "--seeds", "7", "8"]) == 0
    told = capsys.readouterr().out
    assert all(part in told for part in ("\n2 ", "--- untouched, seed 7", "--- 2 added, seed 8", "KL from the model's"))
    found = jax_sae.open_run(demo_run).steer("F64", 3, "Once upon a time", [2.0, 1e15], max_new_tokens=5, seeds=[7, 8])
    json.dumps(found, allow_nan=False)
    without, added, much = found["results"]
    assert without["strength"] is None and without["kl"] == 0 < added["kl"] < much["kl"]
    assert all(each["texts"][0] in told and len(each["texts"]) == 2 for each in found["results"])
    assert found["largest"] > 0 and len(added["next_tokens"]) == 10
    taken = jax_sae.open_run(demo_run).steer("F64", 3, "Once", how="ablate", max_new_tokens=2, seeds=[0, 1])
    assert [each["strength"] for each in taken["results"]] == [None, 0.0] and taken["results"][1]["kl"] >= 0
    capsys.readouterr()
    for flags, message in (
        ({"--member": "F65"}, "has no member 'F65'; its members are F8, F63, F64, F83"),
        ({"--step": "7"}, "has no checkpoint at step 7; there are 5, 10, 12"),
        ({"--feature": "64"}, "F64 has no feature 64; its features are 0 to 63"),
        ({"--prompt": ""}, "the prompt has no tokens"),
        ({"--prompt": "a b c " * 300}, "tokens, but the model 512 positions: cut it"),
        ({"--tokens": "600"}, "max_new_tokens is 600; 1 to "),
        ({"--strength": "1e30"}, "strength is 1e+30; a number from "),
        ({"--ablate": None, "--strength": "1"}, "strength is 1, but ablation sets the feature to 0"),
        ({"--ablate": None, "--clamp": None}, "--clamp and --ablate are both given"),
    ):
        merged = dict(zip(asked[1::2], asked[2::2], strict=True)) | flags
        assert main([asked[0], *(word for pair in merged.items() for word in pair if word is not None)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
