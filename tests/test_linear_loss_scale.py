"""Loss scales of float16, with both ways to sum gradients of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiv._linear import tiles
from helpers.linear_cases import LinearCase, make_case, named_gradients

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH_WAYS = pytest.mark.parametrize("accumulate", ["weight", "rows"])


def scaled_case(accumulate: str, hidden_scale: float, **options: Any) -> LinearCase:
    """A mean over 2000 rows, whose probabilities are about 1/300."""
    case = make_case(
        rows=(2000,), hidden=4, dtype=torch.float16, bias=False, accumulate=accumulate, **options
    )
    case.leaves["input"] *= hidden_scale
    case.leaves["linear_weight"] /= hidden_scale
    return case


def error_in_roundings(case: LinearCase, scale: float) -> dict[str, float]:
    """Return the errors of the gradients over those of rounding exact ones to float16."""
    _, got = named_gradients(case.call, case.leaves, torch.tensor(scale))
    _, exact = case.truth(torch.tensor(scale, dtype=torch.float64))
    return {
        key: float((g.double() - exact[key]).norm() / (exact[key].half() - exact[key]).norm())
        for key, g in got.items()
    }


@pytest.mark.parametrize("halves", [True, False], ids=["halves", "floats"])
@BOTH_WAYS
def test_a_loss_scale(accumulate: str, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torch.amp.GradScaler`` begins with.  It is applied before anything is rounded."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: halves)
    errors = error_in_roundings(scaled_case(accumulate, 1.0), 2.0**16)
    # Products of halves round the logits, and their gradient.
    assert max(errors.values()) <= (8 if halves else 1.1), errors


@pytest.mark.parametrize("halves", [True, False], ids=["halves", "floats"])
def test_gradients_of_logits_that_float16_cannot_hold(
    halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upstream gradient of 2^-10 would make them 2e-9; their sums times h are larger."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: halves)
    case = scaled_case("weight", 2.0**12)
    _, got = named_gradients(case.call, case.leaves, torch.tensor(2.0**-10))
    _, exact = case.truth(torch.tensor(2.0**-10, dtype=torch.float64))
    key = "linear_weight"
    assert float(exact[key].abs().max()) > torch.finfo(torch.float16).tiny
    error = (got[key].double() - exact[key]).norm() / (exact[key].half() - exact[key]).norm()
    assert error <= (8 if halves else 1.1)
    # Smaller ones are subnormal, and still rounded once.
    errors = error_in_roundings(case, 2.0**-14)
    assert errors[key] <= (4 if halves else 1.1), errors


@BOTH_WAYS
def test_a_loss_scale_that_is_too_large(accumulate: str) -> None:
    """Gradients are then infinite, by which a scaler finds out; with a smaller one, finite."""
    case = scaled_case(accumulate, 1.0)
    for scale, finite in ((2.0**40, False), (2.0**12, True)):
        _, gradients = named_gradients(case.call, case.leaves, torch.tensor(scale))
        assert all(bool(g.isfinite().all()) == finite for g in gradients.values())


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("largest", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("of", ["token_weight", "weight"])
def test_weights_of_any_size(
    of: str, largest: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of the logits overflow float16 only if the result does."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: True)
    weights = torch.rand(37 if of == "token_weight" else 300, dtype=torch.float64) * largest
    case = make_case(
        dtype=torch.float16, bias=False, accumulate="weight", reduction="sum",
        temperature=temperature, **{of: weights},
    )  # fmt: skip
    scale = min(temperature, 1.0) / largest
    _, got = named_gradients(case.call, case.leaves, torch.tensor(scale))
    _, exact = case.truth(torch.tensor(scale, dtype=torch.float64))
    for key, g in got.items():
        assert g.isfinite().all()
        if temperature >= 1:  # which multiplies the rounding of the logits
            error = (g.double() - exact[key]).abs().max() / exact[key].abs().max()
            assert error <= 1e-2, f"{key}: {error:.1e}"
