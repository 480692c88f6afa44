"""Facts found by calling TRL's own functions: the dtypes of results, and whether formulas agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..._engine.backend import backend
from ..._engine.torch_private import constant

Function = Callable[..., Any]
PADDING = -100  # TRL's label for a token that does not count


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
    name, known = original.__name__, inspect.signature(original).parameters
    sample = _sample(name, (torch.float64,), "cpu")
    with torch.no_grad(), backend("auto"):
        for options in _options(name):
            given = sample | {k: v for k, v in options.items() if k in known}
            try:
                torch.testing.assert_close(
                    replacement(original, **given),
                    original(**given),
                    rtol=1e-9,
                    atol=1e-12,
                    equal_nan=True,
                )
            except AssertionError:
                return False
    return True


def _sample(
    name: str, dtypes: tuple[torch.dtype, ...], device: torch.device | str
) -> dict[str, Tensor]:
    """Return small required arguments for TRL's function of this name."""
    x = torch.tensor([[[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]]], dtype=dtypes[0], device=device)
    if name == "generalized_jsd_loss":
        return {"student_logits": x, "teacher_logits": x.flip(-1).to(dtypes[-1])}
    if name == "entropy_from_logits":
        return {"logits": x}
    return {"logits": x, "index": torch.tensor([[2, 0]], device=device)}


def _options(name: str) -> Iterator[dict[str, Any]]:
    """Yield optional arguments for it, some of which a version may lack."""
    yield {}
    mask = torch.tensor([[1, 0]], device="cpu")
    if name != "generalized_jsd_loss":
        yield {"temperature": 2.0, "row_mask": mask, "entropy_requires_grad": False}
        return
    nothing = torch.full_like(mask, PADDING)
    for labels in (None, torch.where(mask == 1, mask, PADDING), nothing):
        yield {"labels": labels}
        for beta in (0, 0.3, 1):
            for how in ({"reduction": "sum"}, {"reduction": "mean"}, {"num_items_in_batch": 3}):
                yield {"labels": labels, "beta": beta, "temperature": 2.0, **how}
