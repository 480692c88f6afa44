"""torch.compile where a size depends on data: the rows that a mask leaves, in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiv
from helpers.cases import make_inputs
from helpers.selection import nightly_but

ROWS, CLASSES = 6, 9
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, equal_nan=True)
WEIGHT = torch.linspace(-1, 1, 11 * CLASSES).view(11, CLASSES)

Call = Callable[[Tensor, Tensor, Tensor], Any]  # of the rows of x, of t, and the labels that stay


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


def stacked(both: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack(both)


def with_statistics(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    value, stats = fastdiv.cross_entropy(x, y, reduction="none", return_stats=True)
    return value + stats.lse + stats.entropy + stats.log_prob + stats.argmax


CALLS: dict[str, Call] = {
    **{
        f"cross_entropy {r}": partial(
            lambda x, t, y, reduction: fastdiv.cross_entropy(x, y, reduction=reduction), reduction=r
        )
        for r in ("none", "sum", "mean", "batchmean")
    },
    "cross_entropy soft": lambda x, t, y: fastdiv.cross_entropy(
        x, t.softmax(-1), label_smoothing=0.1
    ),
    "cross_entropy token_weight": lambda x, t, y: fastdiv.cross_entropy(x, y, token_weight=y * 0.5),
    "cross_entropy stats": with_statistics,
    "cross_entropy of a dimension": lambda x, t, y: fastdiv.cross_entropy(
        x.view(-1, 3, 3), y[:, None].expand(-1, 3).clamp(max=2)
    ),
    "entropy": lambda x, t, y: fastdiv.entropy(x, reduction="batchmean"),
    "log_prob": lambda x, t, y: fastdiv.log_prob(x, y),
    "log_prob_and_entropy": lambda x, t, y: stacked(fastdiv.log_prob_and_entropy(x, y)),
    **{
        f"kl_div {r}": partial(
            lambda x, t, y, reduction: fastdiv.kl_div(
                x, t, target_type="logits", reduction=reduction
            ),
            reduction=r,
        )
        for r in ("none", "mean", "batchmean", "pointwise")
    },
    "renyi_div": lambda x, t, y: fastdiv.renyi_div(x, t, target_type="logits", alpha=2.0),
    "topk_kl_div": lambda x, t, y: fastdiv.topk_kl_div(
        x, *t.topk(3), values_type="logits", missing="uniform"
    ),
    "topk_reverse_kl_div": lambda x, t, y: fastdiv.topk_reverse_kl_div(
        x, *t.log_softmax(-1).topk(3), values_type="log_probs", missing="tail", reduction="mean"
    ),
    "topk_js_div": lambda x, t, y: fastdiv.topk_js_div(
        x, *t.log_softmax(-1).topk(3), values_type="log_probs", missing="tail", reduction="none"
    ),
    "linear_cross_entropy": lambda x, t, y: fastdiv.linear_cross_entropy(x, WEIGHT, y),
    "linear_cross_entropy none": lambda x, t, y: fastdiv.linear_cross_entropy(
        x, WEIGHT, y, reduction="none"
    ),
    "linear_log_prob": lambda x, t, y: fastdiv.linear_log_prob(
        x, WEIGHT, torch.stack([y, y.clamp(min=-1)], -1).clamp(min=-1)
    ),
    "linear_log_prob_and_entropy": lambda x, t, y: stacked(
        fastdiv.linear_log_prob_and_entropy(x, WEIGHT, y)
    ),
    "linear_topk_kl_div": lambda x, t, y: fastdiv.linear_topk_kl_div(
        x, WEIGHT, *F.linear(t, WEIGHT).topk(3), values_type="logits", missing="tail"
    ),
    "linear_kl_div": lambda x, t, y: fastdiv.linear_kl_div(
        x, WEIGHT, F.linear(t, WEIGHT), target_type="logits"
    ),
    "linear_js_div hidden": lambda x, t, y: fastdiv.linear_js_div(
        x, WEIGHT, t, target_linear_weight=WEIGHT * 0.5
    ),
    "DistillationLoss": lambda x, t, y: fastdiv.nn.DistillationLoss("js_div")(x, t, y),
}


def masked(call: Call) -> Call:
    """Each tensor with a mask of its own, so that the compiler knows nothing of their sizes."""
    return lambda x, t, y: call(x[y != -100], t[y != -100], y[y != -100])


def check(function: Call, backend: str = "aot_eager") -> None:
    """Numbers of eager mode for several numbers of rows, none among them, from one graph."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    x, t = make_inputs((ROWS, CLASSES), torch.float32)
    for count in (4, 6, 1, 0):
        y = torch.arange(ROWS)
        y[count:] = -100
        found = []
        for f in (compiled, function):
            own = x.clone().requires_grad_()
            value = f(own, t, y)
            found.append([value, torch.autograd.grad(value.sum(), own)[0]])
        close(*found)
    assert counter.frame_count == 1


# The others differ in the formula only.
MOST = ["cross_entropy none", "cross_entropy mean", "cross_entropy soft", "cross_entropy stats"]
MOST += ["kl_div batchmean", "kl_div pointwise", "log_prob_and_entropy", "topk_kl_div"]
MOST += ["topk_reverse_kl_div", "topk_js_div"]
MOST += ["linear_cross_entropy", "linear_cross_entropy none", "linear_kl_div", "DistillationLoss"]


@pytest.mark.parametrize("name", nightly_but(MOST, CALLS))
def test_rows_that_a_mask_leaves(name: str) -> None:
    check(masked(CALLS[name]))


@pytest.mark.parametrize("soft", [False, True])
def test_torchs_own_call_when_patched(soft: bool) -> None:
    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, t.softmax(-1) if soft else y)

    with fastdiv.patch_torch():
        check(masked(call))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", nightly_but(["linear_cross_entropy"], ["cross_entropy mean", "linear_cross_entropy"])
)
def test_inductor(name: str) -> None:
    """With one size; of two that turn out to be equal, torch 2.13 compiles no loss, nor its own."""

    def function(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows = (y != -100).nonzero().squeeze(1)
        return CALLS[name](x[rows], t[rows], y[rows])

    check(function, "inductor")


def test_sizes_that_differ_at_run_time() -> None:
    """The compiled code notices, where the compiler cannot; with torch 2.11, the kernel does."""
    compiled = torch.compile(
        lambda x, y: fastdiv.cross_entropy(x[y != 1], y), backend="aot_eager", fullgraph=True
    )
    x, _ = make_inputs((3, CLASSES), torch.float32)
    compiled(x, torch.tensor([0, 3, 2]))
    with pytest.raises((RuntimeError, ValueError), match="assertion failed|has the wrong size"):
        compiled(x, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_that_are_known_keep_their_error(dynamic: bool) -> None:
    x, t = make_inputs((3, CLASSES), torch.float32)
    for function in (
        lambda x, t: fastdiv.cross_entropy(x, t.argmax(-1)),
        lambda x, t: fastdiv.kl_div(x, t, target_type="logits"),
        lambda x, t: fastdiv.linear_cross_entropy(x, WEIGHT, t.argmax(-1)),
    ):
        compiled = torch.compile(function, backend="aot_eager", dynamic=dynamic)
        with pytest.raises(ValueError, match="must have the shape of input"):
            compiled(x, t[:2])


def test_statistics_of_no_rows() -> None:
    value, stats = fastdiv.cross_entropy(
        torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.int64), return_stats=True
    )
    assert value.isnan() and all(s.shape == (0,) for s in stats)
