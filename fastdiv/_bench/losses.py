"""What is timed: every loss of whole rows as users call it, beside the same in torch operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv

from .._engine import ops
from ..reference import Spec, value_dtype
from . import eager

Loss = Callable[..., Tensor]  # (logits [R, C], *target) -> scalar

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
MATRICES = ("logits", "probs")  # targets as large as the logits; none asks for its gradient
TOP_K = 64


def _one(value: Any) -> Any:
    return value


class _AsComputed(torch.autograd.Function):
    """Logits as a model computes them: no leaf of the graph, so a backward may write over them."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def as_computed(x: Tensor) -> Tensor:
    """The same memory as logits that require a gradient; nothing comes before them."""
    return _AsComputed.apply(x.new_zeros((), requires_grad=True), x)


@dataclass(frozen=True)
class BenchmarkedLoss:
    """A public function with options, reduced to a scalar."""

    function: str
    target: str  # "labels", "logits", "probs", "topk" or "none"
    eager: Loss
    options: Mapping[str, Any] = field(default_factory=dict)
    variation: str = ""  # tells it from the function without options
    scalar: Callable[[Any], Tensor] = _one  # of what the function returns
    shape: float = 0.0  # beta, skew or alpha: see Spec

    @property
    def name(self) -> str:
        """What it is called on the command line and in files."""
        return "_".join(filter(None, (self.function, self.variation)))

    def fused(self, x: Tensor, *target: Tensor, **more: Any) -> Tensor:
        """The loss, ours."""
        return self.scalar(getattr(fastdiv, self.function)(x, *target, **self.options, **more))

    @property
    def in_place(self) -> Loss | None:
        """The same, where the backward may write over the logits."""
        accepted = inspect.signature(getattr(fastdiv, self.function)).parameters
        if "inplace_backward" not in accepted:
            return None
        return lambda x, *target: self.fused(x, *target, inplace_backward=True)

    def minimum_bytes(self, phase: str, logits_bytes: int) -> int:
        """The least traffic: every matrix read once in a phase, and one gradient written."""
        read = logits_bytes * (2 if self.target in MATRICES else 1)
        return {
            "forward": read,
            "backward": read + logits_bytes,
            "training": 2 * read + logits_bytes,
            "forward_grad": read + logits_bytes,
        }[phase]

    def make_inputs(
        self, shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[Tensor, ...]:
        """Logits, and what the target consists of; always the same."""
        generator = torch.Generator(device).manual_seed(0)

        def logits() -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)

        x = logits()
        if self.target == "none":
            return (x,)
        if self.target == "labels":
            return x, torch.randint(shape[1], shape[:1], generator=generator, device=device)
        if self.target == "topk":
            return (x, *logits().topk(min(TOP_K, shape[1])))
        return x, logits() if self.target == "logits" else logits().softmax(-1)

    @property
    def spec(self) -> Spec | None:
        """What the op of both directions in one go takes; None where it does not fit."""
        if self.variation or self.function not in ops.LOSSES:
            return None
        topk = {"topk": "logits", "labels": "none"}
        matrix = topk.get(self.target, self.target)
        return Spec(self.function, target_type=matrix, param=self.shape)

    def forward_grad(self, x: Tensor, *target: Tensor) -> Tensor:
        """The rows of the loss, and over the logits the gradient of their mean, in one go."""
        assert self.spec
        rows = x.shape[0]
        t, label = (target, (None,)) if self.target in MATRICES else ((None,), target or (None,))
        outputs = 2 if self.function == "log_prob_and_entropy" else 1
        upstream = x.new_full((outputs * rows,), 1 / rows, dtype=value_dtype(x.dtype))
        grad = upstream.view(outputs, rows) if outputs > 1 else upstream
        op = torch.ops.fastdiv._row_forward_grad.default
        return op(grad, x, t[0], label[0], None, None, *ops.options(self.spec), False)[0]


def _divergence(name: str, shape: float = 0.0, **options: Any) -> BenchmarkedLoss:
    options["target_type"] = "logits"
    return BenchmarkedLoss(name, "logits", getattr(eager, name), options, shape=shape)


LOSSES = {
    loss.name: loss
    for loss in (
        BenchmarkedLoss("cross_entropy", "labels", F.cross_entropy),
        BenchmarkedLoss(
            "cross_entropy",
            "labels",
            eager.cross_entropy_smoothed,
            {"label_smoothing": 0.1},
            variation="smoothed",
        ),
        BenchmarkedLoss("cross_entropy", "probs", F.cross_entropy, variation="of_probs"),
        _divergence("kl_div"),
        _divergence("reverse_kl_div"),
        _divergence("js_div", 0.5),
        _divergence("skew_kl_div", 0.1),
        _divergence("alpha_div", 0.5, alpha=0.5),
        _divergence("renyi_div", 0.5, alpha=0.5),
        _divergence("tv_distance"),
        _divergence("hellinger_distance", 0.5),
        BenchmarkedLoss("topk_kl_div", "topk", eager.topk_kl_div, {"values_type": "logits"}),
        BenchmarkedLoss("entropy", "none", eager.entropy, {"reduction": "mean"}),
        BenchmarkedLoss("log_prob", "labels", eager.log_prob, scalar=Tensor.mean),
        BenchmarkedLoss(
            "log_prob_and_entropy",
            "labels",
            eager.log_prob_and_entropy,
            scalar=eager.policy_loss,
        ),
    )
}
