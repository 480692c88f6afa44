"""What is timed: every loss, and the strongest simple way to write it in torch operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv

from .. import _ops
from ..reference import Spec, value_dtype

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [R, C], target) -> scalar

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


@dataclass(frozen=True)
class BenchmarkedLoss:
    """One loss as users call it, reduced to a scalar."""

    name: str
    fused: Loss
    eager: Loss
    spec: Spec  # of its rows
    in_place: Loss | None = None  # where the backward may write over the logits
    teacher: bool = False  # the target is a second matrix of logits, without gradient; else labels

    def minimum_bytes(self, phase: str, logits_bytes: int) -> int:
        """The least traffic: every matrix read once in a phase, and one gradient written."""
        read = logits_bytes * (2 if self.teacher else 1)
        return {
            "forward": read,
            "backward": read + logits_bytes,
            "training": 2 * read + logits_bytes,
            "forward_grad": read + logits_bytes,
        }[phase]

    def make_inputs(
        self, shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Logits and target, always the same."""
        generator = torch.Generator(device).manual_seed(0)

        def logits() -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)

        x = logits()
        if self.teacher:
            return x, logits()
        return x, torch.randint(shape[1], shape[:1], generator=generator, device=device)

    def forward_grad(self, x: Tensor, target: Tensor) -> Tensor:
        """The rows of the loss, and over the logits the gradient of their mean, in one go."""
        rows = x.shape[0]
        t, label = (target, None) if self.teacher else (None, target)
        outputs = 2 if self.spec.loss == "log_prob_and_entropy" else 1
        upstream = x.new_full((outputs * rows,), 1 / rows, dtype=value_dtype(x.dtype))
        grad = upstream.view(outputs, rows) if outputs > 1 else upstream
        label = None if self.spec.loss == "entropy" else label
        options = _ops.options(self.spec)
        op = torch.ops.fastdiv._row_forward_grad.default
        return op(grad, x, t, label, None, None, *options, False)[0]


def _divergence(name: str, eager: Loss) -> BenchmarkedLoss:
    function: Callable[..., Tensor] = getattr(fastdiv, name)
    spec = Spec(name, target_type="logits", shape=0.5 if name == "js_div" else 0.0)
    return BenchmarkedLoss(
        name,
        lambda x, t: function(x, t, target_type="logits"),
        eager,
        spec,
        lambda x, t: function(x, t, target_type="logits", inplace_backward=True),
        teacher=True,
    )


# Each eager formulation is the fastest of those that were tried: F.kl_div with or without
# log_target, cross entropy less entropy, softmax beside log_softmax instead of its exponential.


def _eager_kl(x: Tensor, t: Tensor) -> Tensor:
    lq, lp = torch.log_softmax(x, -1), torch.log_softmax(t, -1)
    return (lp.exp() * (lp - lq)).sum(-1).mean()


def _eager_reverse_kl(x: Tensor, t: Tensor) -> Tensor:
    lq, lp = torch.log_softmax(x, -1), torch.log_softmax(t, -1)
    return (lq.exp() * (lq - lp)).sum(-1).mean()


def _eager_js(x: Tensor, t: Tensor) -> Tensor:
    lq, lp = torch.log_softmax(x, -1), torch.log_softmax(t, -1)
    q, p = torch.softmax(x, -1), torch.softmax(t, -1)
    lm = (0.5 * (q + p)).log()
    return 0.5 * (p * (lp - lm) + q * (lq - lm)).sum(-1).mean()


def _eager_entropy(x: Tensor, _: Tensor) -> Tensor:
    lq = torch.log_softmax(x, -1)
    return -(lq.exp() * lq).sum(-1).mean()


def _policy_loss(log_prob: Tensor, entropy: Tensor) -> Tensor:
    return -(log_prob + 0.01 * entropy).mean()


def _eager_policy(x: Tensor, y: Tensor) -> Tensor:
    lq = torch.log_softmax(x, -1)
    log_prob = lq.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return _policy_loss(log_prob, -(lq.exp() * lq).sum(-1))


LOSSES = {
    loss.name: loss
    for loss in (
        BenchmarkedLoss(
            "cross_entropy",
            fastdiv.cross_entropy,
            F.cross_entropy,
            Spec("cross_entropy"),
            lambda x, y: fastdiv.cross_entropy(x, y, inplace_backward=True),
        ),
        _divergence("kl_div", _eager_kl),
        _divergence("reverse_kl_div", _eager_reverse_kl),
        _divergence("js_div", _eager_js),
        BenchmarkedLoss(
            "entropy",
            lambda x, _: fastdiv.entropy(x, reduction="mean"),
            _eager_entropy,
            Spec("entropy"),
        ),
        BenchmarkedLoss(
            "log_prob_and_entropy",
            lambda x, y: _policy_loss(*fastdiv.log_prob_and_entropy(x, y)),
            _eager_policy,
            Spec("log_prob_and_entropy"),
        ),
    )
}
