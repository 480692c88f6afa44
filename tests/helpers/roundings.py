"""How far rounding may take a result from the truth: the scale of a row, and a count of roundings.

A result in float32 may be wrong by ``ROUNDINGS`` times 2**-24 of its scale, in the root mean
square.  Only the truth in float64 goes into that, so that neither a CPU nor a release of torch
moves it.  `truth_and_scale` says what the scale is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastdiv._C as native
from helpers.cases import Case, TopKCase, rand
from helpers.values import value_and_gradients

# How many roundings the value, the gradient of the input and that of the target have.  An
# exponential, a logarithm, a product and a division have about one each.  A float32 sum has two or
# three, since each of its lanes has 16 to 128 terms in a row.  Independent roundings add up as
# their squares do, so two to four are the rule.  Four things take more:
# - A power has the error of a logarithm of about 10, times alpha, in its exponent.
# - The gradient of a probability is a power or a logarithm that is divided by it.
# - skew KL and JS are written as a sum with a multiple of q - p (divergence.h), which is zero to
#   second order where rows are close.  Where they are apart, it is larger than the gradient.
# - A value is a mean of logarithms and the logarithm of a sum, each of which may be larger than it.
# Each number is one and a half times the largest that the three CPU instruction sets need, over all
# cases, dtypes and shapes of test_accuracy.  So a kernel with twice the error fails.
ROUNDINGS = {
    "cross_entropy": (4.0, 4.2, 1.5),
    "entropy": (2.2, 5.4, 0.0),
    "log_prob": (1.0, 1.8, 0.0),
    "log_prob_and_entropy": (1.0, 4.1, 0.0),
    "kl_div": (5.0, 4.8, 2.6),
    "reverse_kl_div": (5.2, 3.0, 3.6),
    "js_div": (1.4, 6.5, 3.2),
    "skew_kl_div": (2.2, 15.5, 23.0),
    "alpha_div": (13.3, 16.5, 14.0),
    "renyi_div": (1.8, 9.0, 12.0),
    "tv_distance": (1.5, 1.1, 1.2),
    "hellinger_distance": (1.0, 0.7, 11.0),
    # What follows the named log-probabilities is float64, and rounded once.
    "topk_kl_div": (1.4, 1.8, 5.5),
    "topk_reverse_kl_div": (1.4, 1.8, 5.5),
    "topk_js_div": (1.4, 1.8, 5.5),
}
# The largest error may be so many times what the root mean square may be, of the largest scale.
LARGEST = 4.0
# What the CUDA kernels take more: the sums of many threads are rebased and merged.  In rows of half
# precision they also use approximate instructions.
OF_A_GPU, OF_HALVES_ON_A_GPU = 1.0, 2.0
RESULTS = ("value", "gradient of input", "gradient of target")


class Normalised(TorchFunctionMode):
    """Keeps what ``torch.log_softmax`` returns while it is active: log q first, then log p."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.log_softmax and result.requires_grad:
            self.logs.append(result)
        return result


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbours around these float64 values in `dtype`."""
    info = torch.finfo(dtype)
    exponent = value.abs().clamp(min=info.tiny).log2().floor()
    return torch.ldexp(torch.full_like(value, info.eps), exponent)


def upstream_of(value: Tensor) -> Tensor:
    """Return positive numbers, so that two outputs do not cancel, the same for all dtypes."""
    return (rand(value.shape, generator=torch.Generator().manual_seed(1)) + 0.5).to(value.dtype)


evaluate = partial(value_and_gradients, upstream=upstream_of)


def in_double(t: Tensor | None) -> Tensor | None:
    """The same numbers in float64; labels as they are."""
    return t.double() if t is not None and t.is_floating_point() else t


def truth_and_scale(
    function: Callable[..., Tensor], x: Tensor, t: Tensor | None, case: Case
) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients in float64, and the scale of each of their numbers.

    * A value is made of logs of sums, which are uncertain by an ulp of 1 however small the value
      is.  Its scale is 1 + |value|.
    * The gradient of logits is (u - q sum(u)) / T, where u is the gradient with respect to log q
      before that is normalised.  Its scale is (|u| + q sum(|u|)) / T, the sizes that may cancel.
    * The gradient of given log-probabilities is p times a sum of logs, and that of given
      probabilities such a sum.  The scale is its size plus p, or plus 1, times the upstream
      gradient.
    """
    mode = Normalised()
    with mode:
        value, *found = evaluate(function, x.double(), in_double(t), also=mode.logs)
    logs = mode.logs
    grads, slopes = found[: len(found) - len(logs)], found[len(found) - len(logs) :]
    scales = [1 + value.abs()]
    for log, u, gradient in zip(logs, slopes, grads, strict=False):
        size = u.abs() + log.detach().exp() * u.abs().sum(-1, keepdim=True)
        if size.shape != gradient.shape:  # of the classes that a teacher of k names
            size = torch.zeros_like(gradient).scatter(-1, TopKCase.largest(t, -1)[1], size)
        scales.append(size / case.options.get("temperature", 1.0))
    if len(logs) < len(grads):  # the target came as probabilities or their logs
        scales.append(grads[1].abs() + uncertain_mass(case, t) * upstream_of(value).unsqueeze(-1))
    return [value, *grads], scales


def uncertain_mass(case: Case, t: Tensor) -> Tensor:
    """What an ulp of a logarithm is multiplied by in the gradient of a given target."""
    mass = t.double().exp() if case.target == "log_probs" else torch.ones_like(t.double())
    if case.options.get("missing") != "uniform":
        return mass
    # The others share what is left of 1, which p has with the error of all of its digits.
    p = TopKCase.largest(t.double().exp() if case.target == "log_probs" else t.double(), -1)[0]
    rest = (1 - p.sum(-1, keepdim=True)).clamp(min=2**-24)
    return mass * (1 + 1 / rest)


def assert_rounded(
    name: str,
    where: str,
    results: Sequence[tuple[Tensor, Tensor, Tensor]],
    eager: Callable[[], Sequence[Tensor]],
    times: float = 1.0,
) -> None:
    """That ours is as close to the truth as the roundings of loss ``name`` allow.

    ``results`` has (ours, truth, scale) of the value, and of the gradients of input and target.
    ``times`` as many are allowed where other operations follow the kernels.  A failure says how
    many roundings would do, and the error of torch's own operations, which ``eager`` computes.
    """
    failures: list[str] = []
    for i, (ours, truth, scale) in enumerate(results):
        what = f"{RESULTS[i]} {where}"
        # A gradient beyond the largest half is infinite, and has no error.
        beyond = (i > 0) & (truth.abs() > torch.finfo(ours.dtype).max)
        equal = truth.isinf() & (ours == truth)  # an infinite value has none either
        error, scale, unit = (
            torch.where(equal | beyond & (v.isinf() | (j > 0)), 0.0, v)
            for j, v in enumerate(((ours.double() - truth).abs(), scale, ulp(truth, ours.dtype)))
        )
        if ours.dtype == torch.float64:
            allowed = 1e-12 * truth.abs().amax() + 1e-14
            assert (error <= allowed).all(), f"{what}: {error.max()} > {allowed}"
            continue
        of_half = unit / 2 if ours.dtype != torch.float32 else 0 * unit  # the last rounding
        count = ROUNDINGS[name][i] + of_a_gpu(results)
        reductions: list[tuple[str, Callable[[Tensor], Tensor], float]] = [
            ("root mean square", partial(root_mean_square, dim=-1 if i == 0 else None), 1.0),
            ("largest", torch.max, LARGEST),
        ]
        for kind, reduce, factor in reductions:
            found, rounding = reduce(error), factor * times * 2**-24 * reduce(scale)
            if not (found <= count * rounding + reduce(of_half)).all():
                theirs = reduce((eager()[i].double() - truth).abs())
                needed = ((found - reduce(of_half)) / rounding).max()
                takes = f"{what}, {kind}: takes {needed:.2f} roundings, {count} are allowed"
                failures.append(f"{takes}; error {found}, eager torch {theirs}")
    assert not failures, "\n".join(failures)


def of_a_gpu(results: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the roundings that the CUDA kernels may take more.

    In half precision an exponential and a logarithm are one instruction each, up to four off.
    """
    if not results[0][0].is_cuda and native.cpu_isas() != ["cuda_on_cpu"]:
        return 0.0
    half = len(results) > 1 and results[1][0].dtype in (torch.float16, torch.bfloat16)
    return OF_HALVES_ON_A_GPU if half else OF_A_GPU


def root_mean_square(v: Tensor, dim: int | None = None) -> Tensor:
    """Over rows and classes, or over rows alone, for the two outputs of log_prob_and_entropy."""
    return v.square().mean(dim).sqrt()
