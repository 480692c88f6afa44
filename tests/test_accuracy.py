"""Values and gradients against float64, by the accept rule: |ours - truth| <= |eager - truth| + 2 ulp.

Truth is the reference in float64 of the very numbers that the kernel reads; `eager` is what a user of
torch would write.  For half inputs eager computes in float32 here: eager in half is so far off that
nothing could fail.  The rule is applied to the root mean square over many rows, where it is sharp (the
largest of a few rounding errors is a lottery that eager wins half of the time); the largest error may
be twice eager's, so that no single class goes astray.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, LOSSES, SHAPES, Case, make_inputs
from torch import Tensor

import fastdiv

CASES = {str(case): case for case in LOSSES}
SMALL = [(3, 1), (64, 7), (64, 513)]
# One of each kind of kernel: label, smoothed label, soft target, entropy, divergences.
FEW = [case for case in LOSSES if not case.options and case.target != "log_probs"]
FEW = [case for case in FEW if case.name != "log_prob"] + [LOSSES[1]]
NAMES = ("value", "gradient of input", "gradient of target")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbours around these float64 values in `dtype`."""
    info = torch.finfo(dtype)
    exponent = value.abs().clamp(min=info.tiny).log2().floor()
    return torch.ldexp(torch.full_like(value, info.eps), exponent)


def evaluate(function: Callable[..., Tensor], x: Tensor, t: Tensor | None) -> list[Tensor]:
    """Value, gradient of x, gradient of a floating t."""
    leaves = [v for v in (x, t) if v is not None and v.is_floating_point()]
    leaves = [v.detach().clone().requires_grad_() for v in leaves]
    value = function(leaves[0], leaves[1] if len(leaves) == 2 else t)
    # Positive, so that two outputs do not cancel; float32, so that all three see the same.
    upstream = torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def row_options(case: Case) -> dict[str, str]:
    return {} if case.name.startswith("log_prob") else {"reduction": "none"}


# Kept for the next instruction set; test_every_shape's are too large for that.
@functools.lru_cache(maxsize=len(LOSSES) * len(DTYPES) * len(SMALL))
def small_expected(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> tuple:
    return expected(CASES[name], dtype, shape)


def expected(case: Case, dtype: torch.dtype, shape: tuple[int, int], seed: int = 0) -> tuple:
    """Inputs, and truth and eager for them."""
    x, logits = make_inputs(shape, dtype, seed=seed)
    t = case.make_target(x, logits)
    if case.target == "probs" and case.divergence:
        # float16 probabilities underflow to 0, where eager is NaN; test_edge_rows has exact zeros.
        t = t.clamp(min=torch.finfo(dtype).tiny)
    options, compute = row_options(case), compute_dtype(dtype)
    double = t.double() if t is not None and t.is_floating_point() else t
    truth = evaluate(lambda x, t: case.truth(x, t, **options), x.double(), double)
    wide = t.to(compute) if t is not None and t.is_floating_point() else t
    eager = evaluate(case.eager_rows, x.to(compute), wide)
    return x, t, truth, [eager[0], *(g.to(dtype) for g in eager[1:])]


def rms(error: Tensor, name: str) -> Tensor:
    """Over rows and classes; the two outputs of log_prob_and_entropy apart."""
    return error.square().mean(-1 if name == "value" else None).sqrt()


def check(case: Case, x: Tensor, t: Tensor | None, truth: list[Tensor], eager: list[Tensor]) -> None:
    dtype, options = x.dtype, row_options(case)
    with fastdiv.backend("native"):
        ours = evaluate(lambda x, t: case.call(x, t, **options), x, t)
    for name, a, b, c in zip(NAMES, ours, truth, eager, strict=False):
        assert a.dtype == (compute_dtype(dtype) if name == "value" else dtype), (name, a.dtype)
        error, allowed = (a.double() - b).abs(), (c.double() - b).abs()
        where = f"{name} of shape {tuple(x.shape)}"
        if dtype == torch.float64:
            assert (error <= 1e-12 * b.abs().amax() + 1e-14).all(), (where, error.max())
            continue
        # A gradient is a difference of shares of the upstream gradient, which is about 1.
        unit = ulp(b, a.dtype) if name == "value" else ulp(b, a.dtype) + 2**-27
        assert (rms(error, name) <= rms(allowed, name) + 2 * rms(unit, name)).all(), (
            f"{where}: {rms(error, name)} > {rms(allowed, name)} (eager) + 2 * {rms(unit, name)} (ulp)"
        )
        assert error.max() <= 2 * allowed.max() + 2 * unit.max(), (
            f"{where}, largest: {error.max()} > 2 * {allowed.max()} (eager) + 2 * {unit.max()} (ulp)"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_every_loss_on_small_shapes(case: Case, dtype: torch.dtype, isa: str) -> None:
    for shape in SMALL:
        if shape[1] > 1 or case.options.get("smoothing") != "others":  # needs two classes
            check(case, *small_expected(str(case), dtype, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_shape(case: Case, dtype: torch.dtype, isa: str) -> None:
    for shape in SHAPES:
        check(case, *expected(case, dtype, shape))
