"""The losses that are timed, each beside its formula in torch operations.

An entry of ``LOSSES`` is one function with its decorator: the formula, as the mean of the rows, and
the call of fastdiv that it is timed against.  A formula is the fastest one that was found.  These
were tried on two cores, forward and backward, and are slower:

* ``logsumexp`` in the place of ``log_softmax`` (up to three times);
* ``F.kl_div`` with and without ``log_target``;
* ``a * lp + b * lq`` instead of ``lerp``;
* the exponential of a logarithm where ``softmax`` gives it;
* the square of the difference of roots for Hellinger.

Cross entropy minus entropy is faster than the formula of KL in bfloat16.  It is not used, because
it keeps three digits of two large numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv

from .._engine import ops
from ..reference import Rows, Spec, value_dtype

Loss = Callable[..., Tensor]  # (logits [R, C], *target) -> scalar

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
MATRICES = ("logits", "probs")  # targets as large as the logits; none requires its gradient
TOP_K = 64


class _AsComputed(torch.autograd.Function):
    """Logits as a model computes them: no leaf of the graph, so a backward may overwrite them."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def as_computed(x: Tensor) -> Tensor:
    """Return the same memory as logits that require a gradient, with nothing before them."""
    return _AsComputed.apply(x.new_zeros((), requires_grad=True), x)


@dataclass(frozen=True)
class BenchmarkedLoss:
    """A public function with options, reduced to a scalar, and its formula in eager torch."""

    function: str
    target: str  # "labels", "logits", "probs", "topk", "topk_log_probs" or "none"
    eager: Loss
    options: Mapping[str, Any]
    variation: str = ""  # distinguishes it from the function without options
    scalar: Callable[[Any], Tensor] = lambda value: value  # from the result of the function
    param: float = 0.0  # beta, skew or alpha, as in Spec

    @property
    def name(self) -> str:
        """Return its name on the command line and in files."""
        return "_".join(filter(None, (self.function, self.variation)))

    def fused(self, x: Tensor, *target: Tensor, **more: Any) -> Tensor:
        """Compute the loss with fastdiv."""
        return self.scalar(getattr(fastdiv, self.function)(x, *target, **self.options, **more))

    @property
    def in_place(self) -> Loss | None:
        """Return the same with a backward that may overwrite the logits, if there is one."""
        accepted = inspect.signature(getattr(fastdiv, self.function)).parameters
        if "inplace_backward" not in accepted:
            return None
        return lambda x, *target: self.fused(x, *target, inplace_backward=True)

    @property
    def compile(self) -> Loss:
        """Return the formula under ``torch.compile``, for one shape."""
        return torch.compile(self.eager, dynamic=False)

    def minimum_bytes(self, phase: str, logits_bytes: int) -> int:
        """Return the least traffic: each matrix is read once per phase, one gradient is written."""
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
        """Make logits and the tensors of the target, the same every time."""
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
        if self.target == "topk_log_probs":
            return (x, *logits().log_softmax(-1).topk(min(TOP_K, shape[1])))
        return x, logits() if self.target == "logits" else logits().softmax(-1)

    @property
    def spec(self) -> Spec | None:
        """Return the options of ``forward_grad``; None if the loss is not one call of its op."""
        if self.variation or self.target == "topk" or self.function not in ops.LOSSES:
            return None
        matrix = "none" if self.target == "labels" else self.target
        return Spec(self.function, target_type=matrix, param=self.param)

    def forward_grad(self, x: Tensor, *target: Tensor) -> Tensor:
        """Compute the rows and, in the same pass, write the gradient of their mean over ``x``."""
        assert self.spec
        rows = x.shape[0]
        t, label = (target, (None,)) if self.target in MATRICES else ((None,), target or (None,))
        outputs = 2 if self.function == "log_prob_and_entropy" else 1
        upstream = x.new_full((outputs * rows,), 1 / rows, dtype=value_dtype(x.dtype))
        grad = upstream.view(outputs, rows) if outputs > 1 else upstream
        op = torch.ops.fastdiv._row_forward_grad.default
        rows_of_op = Rows(x, t[0], label=label[0])
        return op(grad, *rows_of_op, *ops.options(self.spec), False)[0]


LOSSES: dict[str, BenchmarkedLoss] = {}


def _against(
    function: str, target: str, options: Mapping[str, Any] | None = None, **more: Any
) -> Callable[[Loss], Loss]:
    """Decorate an eager formula: time it against this function of fastdiv with these options."""
    kind = {"target_type": "logits"} if target == "logits" else {}

    def add(eager: Loss) -> Loss:
        loss = BenchmarkedLoss(function, target, eager, {**kind, **(options or {})}, **more)
        LOSSES[loss.name] = loss
        return eager

    return add


def _logs(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log_softmax(x, -1), torch.log_softmax(t, -1)


def _probs(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.softmax(x, -1), torch.softmax(t, -1)


def _powers(x: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(*_logs(x, t), 0.5).exp().sum(-1)  # by logarithms: roots have no slope at 0


_against("cross_entropy", "labels")(F.cross_entropy)


@_against("cross_entropy", "labels", {"label_smoothing": 0.1}, variation="smoothed")
def _smoothed(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, label_smoothing=0.1)


_against("cross_entropy", "probs", variation="of_probs")(F.cross_entropy)


@_against("kl_div", "logits")
def _kl_div(x: Tensor, t: Tensor) -> Tensor:
    lq, lp = _logs(x, t)
    return (lp.exp() * (lp - lq)).sum(-1).mean()


@_against("reverse_kl_div", "logits")
def _reverse_kl_div(x: Tensor, t: Tensor) -> Tensor:
    lq, lp = _logs(x, t)
    return (lq.exp() * (lq - lp)).sum(-1).mean()


@_against("js_div", "logits", param=0.5)
def _js_div(x: Tensor, t: Tensor) -> Tensor:
    (lq, lp), (q, p) = _logs(x, t), _probs(x, t)
    lm = (0.5 * (q + p)).log()
    return 0.5 * (p * (lp - lm) + q * (lq - lm)).sum(-1).mean()


@_against("skew_kl_div", "logits", param=0.1)
def _skew_kl_div(x: Tensor, t: Tensor) -> Tensor:
    q, p = _probs(x, t)
    return (p * (torch.log_softmax(t, -1) - torch.lerp(q, p, 0.1).log())).sum(-1).mean()


@_against("alpha_div", "logits", {"alpha": 0.5}, param=0.5)
def _alpha_div(x: Tensor, t: Tensor) -> Tensor:
    return (4 * (1 - _powers(x, t))).mean()


@_against("renyi_div", "logits", {"alpha": 0.5}, param=0.5)
def _renyi_div(x: Tensor, t: Tensor) -> Tensor:
    return (-2 * _powers(x, t).log()).mean()


@_against("tv_distance", "logits")
def _tv_distance(x: Tensor, t: Tensor) -> Tensor:
    q, p = _probs(x, t)
    return 0.5 * (q - p).abs().sum(-1).mean()


@_against("hellinger_distance", "logits", param=0.5)
def _hellinger_distance(x: Tensor, t: Tensor) -> Tensor:
    return (1 - _powers(x, t)).mean()


def _named_logs(x: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log_softmax(x, -1).gather(-1, indices), torch.log_softmax(values, -1)


@_against("topk_kl_div", "topk", {"values_type": "logits"})
def _topk_kl_div(x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    lq, lp = _named_logs(x, values, indices)
    return (lp.exp() * (lp - lq)).sum(-1).mean()


@_against("topk_reverse_kl_div", "topk", {"values_type": "logits"})
def _topk_reverse_kl_div(x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    lq, lp = _named_logs(x, values, indices)
    return (lq.exp() * (lq - lp)).sum(-1).mean()


@_against("topk_js_div", "topk", {"values_type": "logits"})
def _topk_js_div(x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    lq, lp = _named_logs(x, values, indices)
    (q, p), lm = (lq.exp(), lp.exp()), (0.5 * (lq.exp() + lp.exp())).log()
    return 0.5 * (p * (lp - lm) + q * (lq - lm)).sum(-1).mean()


@_against(
    "topk_kl_div",
    "topk_log_probs",
    {"values_type": "log_probs", "missing": "tail"},
    variation="tail",
)
def _topk_kl_div_tail(x: Tensor, log_probs: Tensor, indices: Tensor) -> Tensor:
    lq, p = torch.log_softmax(x, -1).gather(-1, indices), log_probs.exp()
    named = (p * (log_probs - lq)).sum(-1)
    if indices.shape == x.shape:
        return named.mean()
    # Only a sum of the other classes is exact, but it takes another pass over a matrix.
    left, tail = ((1 - v.sum(-1)).clamp(min=1e-6) for v in (p, lq.exp()))
    return (named + left * (left / tail).log()).mean()


@_against("entropy", "none", {"reduction": "mean"})
def _entropy(x: Tensor) -> Tensor:
    lq = torch.log_softmax(x, -1)
    return -(lq.exp() * lq).sum(-1).mean()


@_against("log_prob", "labels", scalar=Tensor.mean)
def _log_prob(x: Tensor, y: Tensor) -> Tensor:
    return -F.cross_entropy(x, y)


def _policy_loss(log_prob_and_entropy: tuple[Tensor, Tensor]) -> Tensor:
    log_prob, entropy = log_prob_and_entropy
    return -(log_prob + 0.01 * entropy).mean()


@_against("log_prob_and_entropy", "labels", scalar=_policy_loss)
def _log_prob_and_entropy(x: Tensor, y: Tensor) -> Tensor:
    lq = torch.log_softmax(x, -1)
    log_prob = lq.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return _policy_loss((log_prob, -(lq.exp() * lq).sum(-1)))


def peers(loss: str) -> dict[str, Loss]:
    """Return other libraries' fused losses for GPUs, if installed, called as their users do."""
    found: dict[tuple[str, str], Loss] = {}
    with suppress(ImportError):
        liger = import_module("liger_kernel.transformers")
        kl = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
        js = liger.LigerJSD(beta=0.5)
        found["cross_entropy", "liger"] = liger.LigerCrossEntropyLoss()
        found["kl_div", "liger"] = lambda x, t: kl(*_logs(x, t))  # it takes log-probabilities
        found["js_div", "liger"] = lambda x, t: js(*_logs(x, t))
    with suppress(ImportError):
        quack = import_module("quack.cross_entropy")
        found["cross_entropy", "quack"] = lambda x, y: quack.cross_entropy(x, y).mean()
    return {name: call for (key, name), call in found.items() if key == loss}
