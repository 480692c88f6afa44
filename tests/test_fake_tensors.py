"""Tensors without values, by which torch's tools estimate the memory of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastdiv
from helpers.cases import LOSSES, PUBLIC_LOSSES, Case, make_inputs, module_of
from helpers.linear_cases import OF_CLASSES, TARGETS, LinearCase, make_case

BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])
ROWS, CLASSES, HIDDEN = 4, 12, 8


def as_fake(mode: FakeTensorMode, tensors: Any) -> Any:
    """What the tools do with a model that exists: every tensor becomes one without values."""
    return tree_map_only(Tensor, mode.from_tensor, tensors)


def same_kind(fake: list[Tensor], real: list[Tensor]) -> None:
    """Tensors without values that are like the real ones in all else."""
    for a, b in zip(fake, real, strict=True):
        assert isinstance(a, FakeTensor) and not isinstance(b, FakeTensor)
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def step(call: Callable[[], Any], leaves: list[Tensor]) -> list[Tensor]:
    """What a call returns, and the gradients of it."""
    for v in leaves:
        v.requires_grad_()
    value = call()
    total = sum(v.float().sum() for v in tree_leaves(value) if v.requires_grad)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*tree_leaves(value), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("case", LOSSES, ids=str)
@BACKENDS
def test_every_loss(case: Case, backend: str) -> None:
    x, t = make_inputs((ROWS, CLASSES), torch.bfloat16)
    real = (x, case.make_target(x, t))
    mode = FakeTensorMode()
    fake = as_fake(mode, real)

    def both(x: Tensor, t: Tensor | None) -> list[Tensor]:
        leaves = [x] if t is None or not t.is_floating_point() else [x, t]
        return step(lambda: case.call(x, t), leaves)

    with fastdiv.backend(backend):
        expected = both(*real)
        with mode:
            same_kind(both(*fake), expected)


def linear_case(name: str, target: str, **options: Any) -> LinearCase:
    if name in OF_CLASSES:
        options.pop("reduction", None)
    return make_case(name, (ROWS,), HIDDEN, CLASSES, target=target, **options)


@pytest.mark.parametrize(("name", "target"), TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@BACKENDS
def test_every_linear_loss(
    name: str, target: str, reduction: str, dtype: torch.dtype, backend: str
) -> None:
    case = linear_case(name, target, reduction=reduction, dtype=dtype)
    mode = FakeTensorMode()
    fake = LinearCase(name, *as_fake(mode, (case.leaves, case.label)), case.options)

    def both(c: LinearCase) -> list[Tensor]:
        return step(c.call, list(c.leaves.values()))

    with fastdiv.backend(backend):
        real = both(case)
        with mode:
            same_kind(both(fake), real)


def inputs() -> dict[str, Any]:
    """Random ones of every kind."""
    torch.manual_seed(0)
    x, t = (torch.randn(ROWS, CLASSES, requires_grad=True) for _ in range(2))
    values, indices = t.detach().topk(3)
    return {
        "x": x,
        "t": t,
        "p": t.softmax(-1).detach(),
        "y": torch.randint(CLASSES, (ROWS,)),
        "h": torch.randn(ROWS, HIDDEN, requires_grad=True),
        "w": torch.randn(CLASSES, HIDDEN, requires_grad=True),
        "values": values,
        "indices": indices,
    }


Call = Callable[[Any, dict[str, Any]], Any]


def of_logits(m: Any, v: dict[str, Any]) -> Any:
    return m(v["x"], v["t"])


def of_labels(m: Any, v: dict[str, Any]) -> Any:
    return m(v["x"], v["y"])


def of_hidden(m: Any, v: dict[str, Any]) -> Any:
    return m(v["h"], v["x"])


LINEAR = (HIDDEN, CLASSES)
MODULES: dict[str, tuple[tuple[Any, ...], dict[str, Any], Call]] = {
    **{
        module_of(case.name).__name__: ((), {"target_type": "logits", **case.options}, of_logits)
        for case in LOSSES
        if case.divergence
    },
    "CrossEntropyLoss": ((torch.ones(CLASSES),), {"return_stats": True}, of_labels),
    "EntropyLoss": ((), {}, lambda m, v: m(v["x"])),
    **{
        f"TopK{name}Loss": (
            (),
            {"values_type": "logits"},
            lambda m, v: m(v["x"], v["values"], v["indices"]),
        )
        for name in ("JSDiv", "KLDiv", "ReverseKLDiv")
    },
    **{
        f"LinearTopK{name}Loss": (
            LINEAR,
            {"values_type": "logits"},
            lambda m, v: m(v["h"], v["values"], v["indices"]),
        )
        for name in ("KLDiv", "ReverseKLDiv")
    },
    "LabelSmoothingLoss": ((CLASSES, -1, 0.1), {}, lambda m, v: m(v["x"][None], v["y"][None])),
    "DistillationLoss": ((), {}, lambda m, v: m(v["x"], v["t"], v["y"])),
    "LinearCrossEntropyLoss": (LINEAR, {}, lambda m, v: m(v["h"], v["y"])),
    "LinearLogProb": (LINEAR, {}, lambda m, v: m(v["h"], v["y"])),
    "LinearLogProbAndEntropy": (LINEAR, {}, lambda m, v: m(v["h"], v["y"])),
    **{
        f"Linear{name}Loss": (LINEAR, {"target_type": "logits"}, of_hidden)
        for name in ("JSDiv", "KLDiv", "ReverseKLDiv")
    },
}


def test_the_tables_are_complete() -> None:
    assert MODULES.keys() == set(fastdiv.nn.__all__)
    tried = {c.name for c in LOSSES} | {f"linear_{name}" for name, _ in TARGETS}
    assert tried == set(PUBLIC_LOSSES)


@pytest.mark.parametrize("name", MODULES)
@BACKENDS
def test_every_module(name: str, backend: str) -> None:
    arguments, options, call = MODULES[name]
    module = getattr(fastdiv.nn, name)(*arguments, **options)

    def both(m: nn.Module, v: dict[str, Any]) -> list[Tensor]:
        leaves = [w for w in (*v.values(), *m.parameters()) if w.requires_grad]
        return step(lambda: call(m, v), leaves)

    mode = FakeTensorMode()
    given = as_fake(mode, inputs())
    with fastdiv.backend(backend):
        expected = both(module, inputs())
        with mode:
            same_kind(both(module_of_fakes(mode, module), given), expected)


def module_of_fakes(mode: FakeTensorMode, module: nn.Module) -> nn.Module:
    """A module whose parameters and buffers have no values."""
    for part in module.modules():
        for group in (part._parameters, part._buffers):
            group.update(as_fake(mode, dict(group)))
    return module


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@BACKENDS
def test_real_labels_beside_fake_logits(backend: str, alpha: float) -> None:
    """A mode may let real tensors in; what comes of them has no values to be looked at."""
    v = inputs()
    with fastdiv.backend(backend), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, t = (mode.from_tensor(v[k]).detach().requires_grad_() for k in "xt")
        loss = fastdiv.nn.DistillationLoss(alpha=alpha)
        values = [
            loss(x, t, v["y"]),
            fastdiv.topk_kl_div(x, v["values"], v["indices"], values_type="logits"),
            fastdiv.linear_cross_entropy(v["h"], v["w"], v["y"]),
            fastdiv.cross_entropy(v["x"], v["y"]),
            fastdiv.stats.entropy(v["p"]),
        ]
        sum(w.sum() for w in values).backward()
    assert isinstance(x.grad, FakeTensor) and x.grad.shape == (ROWS, CLASSES)


@pytest.mark.parametrize("name", fastdiv.stats.__all__)
def test_statistics(name: str) -> None:
    function, p = getattr(fastdiv.stats, name), inputs()["p"]
    mode = FakeTensorMode()
    fake = as_fake(mode, p)

    def both(p: Tensor) -> list[Tensor]:
        of_two = name not in ("entropy", "information_content")
        return step(lambda: function(p, p.flip(0)) if of_two else function(p), [p])

    expected = both(p)
    with mode:
        same_kind(both(fake), expected)


def test_patched_torch() -> None:
    v = inputs()
    with FakeTensorMode() as mode, fastdiv.patch_torch():
        x, y = mode.from_tensor(v["x"]), mode.from_tensor(v["y"])
        value, gradient = step(lambda: F.cross_entropy(x, y), [x])
    assert value.shape == () and gradient.shape == x.shape


def test_a_second_derivative_and_one_in_place() -> None:
    v = inputs()
    with FakeTensorMode() as mode:
        h, w, y = (mode.from_tensor(v[k]) for k in "hwy")
        (g,) = torch.autograd.grad(fastdiv.linear_cross_entropy(h, w, y), h, create_graph=True)
        assert torch.autograd.grad(g.square().sum(), w)[0].shape == w.shape
        x = h @ w.t()
        fastdiv.cross_entropy(x, y, inplace_backward=True).backward()
        assert h.grad is not None and h.grad.shape == h.shape
