"""What a run says of members that ended otherwise than they were meant."""

import re
from typing import Any

import pytest

from jax_sae.run.advice import advice

TOPK = {"name": "a", "kind": "topk", "features": 100, "k": 8, "l0": 8.0, "dead_features": 0, "diverged_at_step": None}
RELU = {**TOPK, "kind": "relu", "k": None, "l1_coefficient": 0.5}
JUMP = {**TOPK, "kind": "jumprelu", "k": None, "target_l0": 8.0, "initial_threshold": 0.1}


@pytest.mark.parametrize("member", [TOPK, RELU, JUMP, {**RELU, "l1_coefficient": 0.0, "l0": 90.0, "dead_features": 50}])
def test_nothing_is_said_of_what_is_well(member: dict[str, Any]) -> None:
    """A dense or partly dead plain autoencoder is well too, and a member that diverged is named elsewhere."""
    assert advice([member]) == []
    assert advice([{**JUMP, "l0": 50.0, "diverged_at_step": 3}]) == []


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ({**TOPK, "dead_features": 11}, "a has 11 of 100 features that are active on no held-out token: .*AuxK"),
        ({**RELU, "dead_features": 11}, "features that are active on no held-out token: .*resamples"),
        ({**RELU, "l0": 26.0}, "a is not sparse, L0 26.0 of 100: l1_coefficient 0.5 had little effect; raise it"),
        ({**JUMP, "l0": 9.0}, "a has an L0 of 9.0 where 8 was asked for: .*initial_threshold above 0.1"),
        ({**JUMP, "l0": 7.0}, "a has an L0 of 7.0 where 8 was asked for: .*initial_threshold below 0.1"),
    ],
)
def test_what_went_otherwise_is_said_with_what_helps(member: dict[str, Any], said: str) -> None:
    """One line each, six at most."""
    [line] = advice([TOPK, member])
    assert re.search(said, line)
    assert len(advice([member] * 9)) == 7
