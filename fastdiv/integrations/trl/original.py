"""Facts found by calling TRL's own functions: the dtypes of results, and whether formulas agree."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..._engine.arguments import is_number
from ..._engine.backend import backend
from ..._engine.torch_private import constant

Function = Callable[..., Any]
PADDING = -100  # TRL's label for a token that does not count
# Names of TRL's functions
JSD = "generalized_jsd_loss"
ENTROPY = "entropy_from_logits"
LOG_PROB = "ChunkedLogProbFunction"
DIVERGENCE = "_chunked_divergence_loss"


def is_positive(value: Any) -> bool:
    """Tell whether this is a positive finite number, as a temperature is."""
    return is_number(value) and 0 < value < math.inf


def signature_of(original: Function) -> inspect.Signature:
    """Return the signature of TRL's function; that of an autograd function is its forward's."""
    forward = getattr(original, "forward", None)
    if forward is None:
        return inspect.signature(original)
    _, *parameters = inspect.signature(forward).parameters.values()  # the first is the context
    return inspect.Signature(parameters)


def call_of(original: Function) -> Function:
    """Return what TRL calls: the function, or ``apply`` of an autograd function."""
    return getattr(original, "apply", original)


@constant
def result_dtype(original: Function, *logits: Tensor) -> torch.dtype:
    """Return the dtype of the result that TRL's function computes from such logits.

    It depends on autocast, and on TRL's own kernels on a GPU.
    """
    device = logits[0].device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return _result_dtype(original, tuple(v.dtype for v in logits), device, autocast)


@constant
def least_count(original: Function) -> int:
    """Return the least divisor of batchmean: 1, or in older versions 0, which gives NaN."""
    return _least_count(original)


@cache
def _result_dtype(
    original: Function, dtypes: tuple[torch.dtype, ...], device: torch.device, _autocast: Any
) -> torch.dtype:
    with torch.no_grad():
        value = original(**_sample(original.__name__, dtypes, device))
    return (value[0] if isinstance(value, tuple) else value).dtype


@cache
def _least_count(original: Function) -> int:
    sample = _sample(original.__name__, (torch.float32,), "cpu")
    nothing = original(**sample, labels=torch.full((1, 2), PADDING, device="cpu"))
    return 0 if nothing.isnan() else 1


def same_values(original: Function, replacement: Function) -> bool:
    """Tell whether both compute the same from a sample, with all options of TRL's function."""
    name, signature = original.__name__, signature_of(original)
    sample = _sample(name, (torch.float64,), "cpu")
    rtol = 1e-5 if name in (LOG_PROB, DIVERGENCE) else 1e-9  # these two compute in float32
    with torch.no_grad(), backend("auto"):
        for options in _options(name):
            known = {k: v for k, v in options.items() if k in signature.parameters}
            given = signature.bind(**(sample | known))
            given.apply_defaults()  # an autograd function takes no keywords
            try:
                torch.testing.assert_close(
                    replacement(original, **given.arguments),
                    call_of(original)(*given.args),
                    rtol=rtol,
                    atol=rtol,
                    equal_nan=True,
                )
            except AssertionError:
                return False
    return True


def _sample(
    name: str, dtypes: tuple[torch.dtype, ...], device: torch.device | str
) -> dict[str, Any]:
    """Return small required arguments for TRL's function of this name."""
    x = torch.tensor([[[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]]], dtype=dtypes[0], device=device)
    index = torch.tensor([[2, 0]], device=device)
    if name == JSD:
        return {"student_logits": x, "teacher_logits": x.flip(-1).to(dtypes[-1])}
    if name == ENTROPY:
        return {"logits": x}
    if name not in (LOG_PROB, DIVERGENCE):
        return {"logits": x, "index": index}
    weight = torch.stack([x[0, 0], x[0, 1], -x[0, 0] - x[0, 1], x[0, 1] / 2])
    if name == LOG_PROB:
        targets = {"targets": index[0], "temperature": 2.0, "chunk_size": 3}
        return {"hidden": x[0], "weight": weight, "bias": None, **targets}
    return {
        "student_hidden_states": x,
        "teacher_hidden_states": x.flip(1),
        "student_lm_head_weight": weight,
        "teacher_lm_head_weight": weight.flip(0),
        "completion_mask": torch.tensor([[1, 0]], device=device),
        "beta": 0.3,
    }


def _options(name: str) -> Iterator[dict[str, Any]]:
    """Yield optional arguments for it, some of which a version may lack."""
    options = {JSD: _of_jsd, LOG_PROB: _of_log_prob, DIVERGENCE: _of_divergence}
    yield from options.get(name, _of_logits)()


def _of_logits() -> Iterator[dict[str, Any]]:
    yield {}
    mask = torch.tensor([[1, 0]], device="cpu")
    yield {"temperature": 2.0, "row_mask": mask, "entropy_requires_grad": False}


def _of_jsd() -> Iterator[dict[str, Any]]:
    yield {}
    mask = torch.tensor([[1, 0]], device="cpu")
    nothing = torch.full_like(mask, PADDING)
    for labels in (None, torch.where(mask == 1, mask, PADDING), nothing):
        yield {"labels": labels}
        for beta in (0, 0.3, 1):
            for how in ({"reduction": "sum"}, {"reduction": "mean"}, {"num_items_in_batch": 3}):
                yield {"labels": labels, "beta": beta, "temperature": 2.0, **how}


def _of_log_prob() -> Iterator[dict[str, Any]]:
    bias = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64, device="cpu")
    every = ("log_probs", "entropy", "mean_logits", "is_top1")
    for outputs in (every[:1], every[:2], every[:3], every):
        yield {"outputs": outputs}
        yield {"outputs": outputs, "bias": bias, "logit_scale": 0.5}
    for outputs in (every[:1], every[:2], every[::3]):
        yield {"outputs": outputs, "final_logit_softcapping": 1.5, "logit_scale": 0.5}


def _of_divergence() -> Iterator[dict[str, Any]]:
    bias = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64, device="cpu")
    scale = {"student_logit_scale": 0.5, "teacher_logit_scale": 0.5, "temperature": 2.0}
    for beta in (0, 0.3, 1):
        yield {"beta": beta, "student_lm_head_bias": bias, **scale}
        yield {"beta": beta, "teacher_lm_head_bias": bias, "num_items_in_batch": 3}
    yield {"completion_mask": torch.zeros(1, 2, dtype=torch.int64, device="cpu")}
