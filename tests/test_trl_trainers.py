"""TRL's trainers learn the same with the patch as without, for some steps of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiv.integrations.trl.patch as integration
from fastdiv.integrations.trl import hidden, losses
from fastdiv.integrations.trl.patch import CHUNKED, ON_CPU
from helpers.trl_functions import trl  # noqa: F401  # skips this file where TRL is missing
from helpers.trl_trainer import TRAINERS, train

STREAMS = integration._loaded(CHUNKED, ON_CPU) is not None
RUNS_ON = {
    "GKD": (losses, "js_div"),
    "GRPO": (hidden, "linear_log_prob_and_entropy"),
    "RLOO": (hidden, "linear_log_prob_and_entropy"),
    "KTO": (hidden, "linear_log_prob_and_entropy"),
    "DPO": (hidden, "linear_cross_entropy"),
    "SFT": (hidden, "linear_cross_entropy"),
    "Distillation": (hidden, "linear_js_div"),
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in TRAINERS]
OPTIONS += [
    ("GRPO", {"entropy_coef": 0.1, "loss_type": "cispo", "epsilon_high": 5.0}),
    ("GRPO", {"importance_sampling_level": "sequence", "num_iterations": 2}),
    ("DPO", {"use_weighting": True}),
]


@pytest.mark.cpu_only("a Trainer finds its own device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name,options", OPTIONS, ids=str)
def test_the_same_training(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients, and whatever else the trainer logs."""
    if not STREAMS and name != "GKD":
        pytest.skip("this version of TRL does not stream on a CPU")
    expected = train(tmp_path, name, **options)
    room, function = RUNS_ON[name]
    calls, original = [], getattr(room, function)
    monkeypatch.setattr(room, function, lambda *a, **k: calls.append(k) or original(*a, **k))
    with integration.apply():
        calls.clear()
        got = train(tmp_path, name, **options)
    # WPO's weighting needs log Σ p², which fastdiv leaves to TRL.
    assert len(calls) >= 3 or "use_weighting" in options
    assert len(got.gradients) == 3 and expected.gradients[0].abs().sum() > 0
    assert not got.gradients[-1].equal(got.gradients[0])
    assert got.losses == pytest.approx(expected.losses, rel=1e-4, abs=1e-5)
    for a, b in zip(got.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    for a, b in zip(got.logged, expected.logged, strict=True):
        # Accuracies count signs of rewards, which are rounding noise in DPO's first step.
        same = {k: v for k, v in b.items() if not k.endswith(("time", "accuracies"))}
        assert {k: a[k] for k in same} == pytest.approx(same, rel=1e-3, abs=1e-5)
