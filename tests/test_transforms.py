"""torch.func: grad, vmap, jvp, jacobians and hessians, against those of plain torch operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fastdiv
from helpers.cases import KERNELS, Case, make_inputs

EVERY_CASE = pytest.mark.parametrize("case", KERNELS, ids=str)
REDUCIBLE = [c for c in KERNELS if "log_prob" not in c.name]
WITH_TARGET = [c for c in KERNELS if c.target not in ("labels", "none")]
BATCH, SHAPE = 3, (4, 5)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def batch_of(case: Case) -> tuple[Tensor, Tensor | None]:
    x, t = make_inputs((BATCH, *SHAPE), torch.float64)
    return x, case.make_target(x, t)


def reference(function: Callable[..., Any], *args: Any) -> Any:
    """What the same transform gives on plain torch operations."""
    with fastdiv.backend("reference"):
        return function(*args)


def scalar(case: Case) -> Callable[..., Tensor]:
    """The loss as one number that tells its rows apart, of logits and target."""

    def function(x: Tensor, t: Tensor | None = None) -> Tensor:
        value = case.call(x, t)
        return (value * torch.linspace(1, 2, value.numel()).view_as(value)).sum()

    return function


@EVERY_CASE
def test_grad(case: Case) -> None:
    x, t = batch_of(case)
    args = (x[0],) if t is None else (x[0], t[0])
    sides = (0, 1) if case in WITH_TARGET else 0
    close(grad(scalar(case), sides)(*args), reference(grad(scalar(case), sides), *args))


@EVERY_CASE
def test_vmap(case: Case) -> None:
    """Batched on either side or both, along any dimension: what a loop gives."""
    x, t = batch_of(case)
    if t is None:
        close(vmap(case.call, (0, None))(x, None), torch.stack([case.call(v, None) for v in x]))
        close(
            vmap(case.call, (2, None))(x.movedim(0, 2), None), vmap(case.call, (0, None))(x, None)
        )
        return
    both = torch.stack([case.call(v, w) for v, w in zip(x, t, strict=True)])
    close(vmap(case.call)(x, t), both)
    close(vmap(case.call, (1, 0))(x.movedim(0, 1), t), both)
    close(vmap(case.call, (0, -1))(x, t.movedim(0, -1)), both)
    close(vmap(case.call, out_dims=-1)(x, t), both.movedim(0, -1))
    close(vmap(case.call, (0, None))(x, t[1]), torch.stack([case.call(v, t[1]) for v in x]))
    close(vmap(case.call, (None, 0))(x[1], t), torch.stack([case.call(x[1], w) for w in t]))
    one_row = vmap(vmap(lambda v, w: case.call(v[None], w[None])))(x, t)  # nested
    rows = case.call(x.flatten(0, 1), t.flatten(0, 1), **case.per_row).unflatten(-1, x.shape[:2])
    close(one_row.squeeze(-1).sum(), rows.sum())


@pytest.mark.parametrize("rows", [1, 2])
def test_vmap_over_vectors_with_gaps(rows: int) -> None:
    """Labels and weights of one row need no copy to become a vector, but one without gaps."""
    x, _ = make_inputs((BATCH, rows, 5), torch.float64)
    y = torch.randint(5, (BATCH, 2 * rows))[:, ::2]
    w = torch.rand(BATCH, 2 * rows, dtype=torch.float64)[:, ::2]

    def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return fastdiv.cross_entropy(x, y, token_weight=w)

    for dims in ((0, 0, 0), (0, None, 0), (0, 0, None), (0, None, None), (None, 0, 0)):
        args = [v if d == 0 else v[0] for v, d in zip((x, y, w), dims, strict=True)]
        for function in (loss, grad(loss)):
            close(vmap(function, dims)(*args), reference(vmap(function, dims), *args))


def reductions_of(case: Case) -> list[str]:
    """Those that the loss has; "pointwise" is for sums over the classes."""
    pointwise = ["pointwise"] if case.divergence and case.name != "renyi_div" else []
    return ["none", "sum", "mean", "batchmean", *pointwise]


@pytest.mark.parametrize(
    ("case", "reduction"), [(c, r) for c in REDUCIBLE for r in reductions_of(c)], ids=str
)
def test_vmap_of_reductions(case: Case, reduction: str) -> None:
    x, t = batch_of(case)
    call = partial(case.call, reduction=reduction)
    dims = (0, None) if t is None else (0, 0)
    targets = [None] * BATCH if t is None else t
    expected = torch.stack([call(v, w) for v, w in zip(x, targets, strict=True)])
    close(vmap(call, dims)(x, t), expected)

    def loss(x: Tensor, t: Tensor | None) -> Tensor:
        return call(x, t).sin().sum()  # a loss whose upstream gradient differs with the row

    gradients = torch.stack([grad(loss)(v, w) for v, w in zip(x, targets, strict=True)])
    close(vmap(grad(loss), dims)(x, t), gradients)


@pytest.mark.parametrize("target", ["labels", "probs"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_vmap_with_weights_and_ignored_rows(target: str, reduction: str) -> None:
    """A mean has its own divisor in every batch entry."""
    case = next(c for c in KERNELS if c.name == "cross_entropy" and c.target == target)
    x, t = batch_of(case)
    if target == "labels":
        t[0, 1] = t[2, :3] = -100
    weight, token_weight = torch.rand(5).double(), torch.rand(BATCH, 4).double()
    token_weight[1, 2] = 0

    def loss(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return fastdiv.cross_entropy(x, t, weight, token_weight=w, reduction=reduction)

    rows = list(zip(x, t, token_weight, strict=True))
    close(vmap(loss)(x, t, token_weight), torch.stack([loss(*r) for r in rows]))
    total = grad(lambda *r: loss(*r).sum())
    close(vmap(total)(x, t, token_weight), torch.stack([total(*r) for r in rows]))
    shared = torch.stack([total(v, w, token_weight[1]) for v, w in zip(x, t, strict=True)])
    close(vmap(total, (0, 0, None))(x, t, token_weight[1]), shared)


@pytest.mark.parametrize("target", ["labels", "probs"])
def test_vmap_of_statistics(target: str) -> None:
    case = next(c for c in KERNELS if c.name == "cross_entropy" and c.target == target)
    x, t = batch_of(case)
    call = partial(fastdiv.cross_entropy, return_stats=True, reduction="none")
    value, stats = vmap(call)(x, t)
    for i in range(BATCH):
        one, expected = call(x[i], t[i])
        close(value[i], one)
        for got, e in zip(stats, expected, strict=True):
            close(got[i], e)
    close(vmap(grad(lambda x, t: call(x, t)[0].sum()))(x, t), vmap(grad(scalar_sum(case)))(x, t))


def scalar_sum(case: Case) -> Callable[..., Tensor]:
    return lambda x, t=None: case.call(x, t, **case.per_row).sum()


@EVERY_CASE
def test_vmap_of_grad(case: Case) -> None:
    """Per-sample gradients, of both sides."""
    x, t = batch_of(case)
    args = (x,) if t is None else (x, t)
    sides = (0, 1) if case in WITH_TARGET else 0
    got = vmap(grad(scalar(case), sides))(*args)
    close(got, reference(vmap(grad(scalar(case), sides)), *args))
    shared = vmap(grad(scalar(case)), (0, None))(x, t[0]) if t is not None else None
    if t is not None:
        close(shared, torch.stack([grad(scalar(case))(v, t[0]) for v in x]))


@EVERY_CASE
def test_jvp(case: Case) -> None:
    x, t = batch_of(case)
    args = [x[0]] + ([t[0]] if case in WITH_TARGET else [])
    tangents = [torch.randn_like(v) for v in args]
    call = case.call if case in WITH_TARGET else lambda x: case.call(x, None if t is None else t[0])

    def forward_mode(*args: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(call, args, tuple(tangents))

    close(forward_mode(*args), reference(forward_mode, *args))
    close(
        vmap(partial(jvp, call), (None, 0))(tuple(args), tuple(v[None] for v in tangents))[1][0],
        forward_mode(*args)[1],
    )
    if len(args) == 2:  # the tangent of one side alone
        got = jvp(lambda t: case.call(args[0], t), (args[1],), (tangents[1],))
        close(got, reference(jvp, lambda t: case.call(args[0], t), (args[1],), (tangents[1],)))


@EVERY_CASE
def test_jacobians_and_hessians(case: Case) -> None:
    x, t = batch_of(case)
    x, t = x[0, :2, :3], None if t is None else t[0, :2]
    t = t[:, :3].contiguous() if case in WITH_TARGET else (t % 3 if t is not None else None)
    call, loss = (lambda x: case.call(x, t)), (lambda x: scalar(case)(x, t))
    for transform in (jacrev, jacfwd):
        close(transform(call)(x), reference(transform(call), x))
    expected = reference(jacrev(jacrev(loss)), x)
    for transform in (hessian, lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacrev(f))):
        close(transform(loss)(x), expected)
    if case in WITH_TARGET:
        mixed = lambda f: jacfwd(jacrev(f, argnums=1), argnums=(0, 1))  # noqa: E731
        close(mixed(scalar(case))(x, t), reference(mixed(scalar(case)), x, t))
