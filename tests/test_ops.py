"""The contracts of the private ops: schema, fakes, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiv
from helpers.cases import KERNELS, KINDS, Case, TopKCase, make_inputs
from helpers.recorder import Recorder

EVERY_CASE = pytest.mark.parametrize("case", KERNELS, ids=str)
REDUCIBLE = [c for c in KERNELS if "log_prob" not in c.name]
WITH_TARGET = [
    c for c in KERNELS if c.target not in ("labels", "none") and not isinstance(c, TopKCase)
]


def op_calls(case: Case, dtype: torch.dtype, **options: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every op that a forward and a backward of this case call, with its arguments."""
    x, t = make_inputs((4, 5), dtype)
    t = case.make_target(x, t)
    inputs = [x.requires_grad_()]
    if t is not None and t.is_floating_point():
        inputs.append(t.requires_grad_())
    stats = case.name == "cross_entropy"
    with Recorder() as record:
        torch.autograd.grad(case.call(x, t, **options).sum(), inputs)
        if stats:
            options = {"return_stats": True, **case.options, **options}
            fastdiv.cross_entropy(x, t, **options)
    calls = [(op, tuple(detached(a) for a in args)) for op, args in record.calls]
    (op, (grad, x, *rest)) = next(c for c in calls if "backward" in str(c[0]))
    ops = torch.ops.fastdiv
    calls.append((ops._row_backward_.default, (grad, x.clone(), *rest[:-2], rest[-1])))
    if grad.dim() and not names_classes(case):
        rest = (*rest[:6], *rest[8:-2], rest[-1])  # without record and divisor
        calls.append((ops._row_forward_grad.default, (grad, x.clone(), *rest)))
    return calls


def names_classes(case: Case) -> bool:
    """Whether the loss has a value for each of k classes, and so no forward with gradient."""
    return case.name == "log_prob" or isinstance(case, TopKCase)


def detached(v: Any) -> Any:
    return v.detach() if isinstance(v, Tensor) else v


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(case: Case, dtype: torch.dtype) -> None:
    """Schema, fake kernel and tracing, of every op (their autograd is our own Function)."""
    calls = op_calls(case, dtype, **case.per_row)
    expected = 5 if case.name == "cross_entropy" else 3 if names_classes(case) else 4
    assert len({op for op, _ in calls}) == expected
    for op, args in calls:
        torch.library.opcheck(op, args)


@EVERY_CASE
def test_fakes_agree_with_the_kernels(case: Case) -> None:
    """Shapes, strides and dtypes, for every reduction and either gradient alone."""
    reductions = [{}] if "log_prob" in case.name else [{"reduction": r} for r in ("none", "mean")]
    calls = [
        c
        for dtype in (torch.float64, torch.float16, torch.float32, torch.bfloat16)
        for options in reductions
        for c in op_calls(case, dtype, **options)
    ]
    for op, args in calls:
        variants = [args]
        if op._opname == "_row_backward":
            variants += [
                (*args[:-2], x, t and case in WITH_TARGET)
                for x, t in ((True, False), (False, True), (False, False))
            ]
        for args in variants:
            real = op(*args)
            with FakeTensorMode() as mode:
                fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
            real, fake = (v if isinstance(v, tuple) else (v,) for v in (real, fake))
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), op
