"""One feature, as a program and a notebook see it: `Run.feature`."""

from pathlib import Path

import numpy as np
import pytest

import jax_sae
from jax_sae.activations.sources import open_sources
from jax_sae.pages.feature import BEFORE

MEMBER = "topk-F96-seed0"


def test_examples_are_where_it_is_largest(run: Path) -> None:
    """Of a run that normalises each story and leaves its first token out; against one story encoded after the other."""
    opened = jax_sae.open_run(run)
    sae = opened[MEMBER]
    _, source, _ = open_sources(opened.config)
    stories = [story.token_ids for story in source.read(range(12))]
    x = source.lm.activations(stories)
    values = [np.array(sae.encode(story)) for story in x]
    for story in values:
        story[0] = 0
    f = int(np.argmax(np.mean([story.max(0) > 0 for story in values], 0)))
    n = sum(len(story) - 1 for story in values)
    found = opened.feature(MEMBER, f, tokens=n, examples=1000)
    assert found.read == n and found.density == sum(int((story[:, f] > 0).sum()) for story in values) / n
    largest = sorted((float(story[:, f].max()) for story in values if story[:, f].any()), reverse=True)
    np.testing.assert_allclose(
        [found.maximum, found.mean * found.fired], [largest[0], sum(s[:, f].sum() for s in values)], rtol=1e-4
    )
    shown = [float(example.values.max()) for example in found.examples]
    assert (
        shown == sorted(shown, reverse=True)
        and 1 < len(shown) <= len(largest)
        and set(np.round(shown, 4)) <= set(np.round(largest, 4))
    )
    best = max(range(len(values)), key=lambda i: values[i][:, f].max())
    at = int(values[best][:, f].argmax())
    first = max(0, at - BEFORE)
    assert "".join(found.examples[0].tokens) == source.tokenizer.decode(stories[best][first : at + 9])
    np.testing.assert_allclose(found.examples[0].values, values[best][first : at + 9, f], rtol=1e-4, atol=1e-5)
    lines = repr(found).splitlines()
    assert lines[0] == f"Feature {f} of {MEMBER}" and sum("[" in line for line in lines) == len(shown)
    assert found._repr_html_().count("<tr>") == len(shown) and "background:rgba" in found._repr_html_()
    assert len(found.raised) == len(found.lowered) == 10 and found.raised[0][1] > 0 > found.lowered[0][1]


@pytest.mark.long
def test_texts_of_ones_own_are_read_instead(run: Path) -> None:
    """What looks like HTML is text; a feature that never fires has no example; what cannot be shown is refused."""
    opened = jax_sae.open_run(run)
    text = "Tom <b>saw</b> a dog. Tom was happy."
    features = [opened.feature(MEMBER, f, [text]) for f in range(6)]
    assert all(found.read == features[0].read and len(found.examples) == (found.fired > 0) for found in features)
    assert any(found.fired for found in features) and not all(found.fired for found in features)
    assert not any("<b>saw" in found._repr_html_() for found in features)
    for asked, message in (
        ((MEMBER, 96), "has no feature 96; its features are 0 to 95"),
        (("other", 1), "has no member 'other'"),
        ((MEMBER, 1, [""]), "no token that the language model knows"),
    ):
        with pytest.raises(jax_sae.BadInput, match=message):
            opened.feature(*asked)
    with pytest.raises(jax_sae.BadInput, match="tokens is 0; one above 0 was expected"):
        opened.feature(MEMBER, 1, tokens=0)
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    rows = jax_sae.train(activations=x, features=8, steps=1, batch_tokens=16, held_out_tokens=50, quiet=True)
    with pytest.raises(jax_sae.BadInput, match="hold no token ids, so there is no text to show"):
        rows.feature(rows.names[0], 1)
