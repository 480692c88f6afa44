"""Replacements of TRL's functions of hidden states, which never hold the logits of the last layer.

As in ``losses``, the first argument of each is TRL's original, and None is returned for a call that
belongs to it.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..._engine.arguments import FLOATS, are_plain, is_number
from ..._engine.backend import use_kernel
from ..._linear.cross_entropy import linear_cross_entropy
from ..._linear.divergence import linear_js_div
from ..._linear.log_prob import linear_log_prob, linear_log_prob_and_entropy
from .original import Function, is_positive

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ROWS_OF_SUM = 8192  # rows of a weight that are summed at a time
Layer = tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight, bias


def chunked_log_prob(
    original: Function,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OUTPUTS,
) -> tuple[Tensor | None, ...] | None:
    """Compute :func:`fastdiv.linear_log_prob`, and the other outputs that a trainer asks for.

    TRL's outputs are the log-probability, the entropy, log Σ p², the mean of the logits, and
    whether the target is the most likely class.  Those that ``outputs`` lacks are None.
    """
    softcap = final_logit_softcapping
    if (
        not _fit(hidden, weight, bias)
        or hidden.dim() != 2
        or not are_plain(hidden, targets)
        or targets.dtype is not torch.int64
        or targets.shape != hidden.shape[:1]
        or not (is_positive(temperature) and is_positive(logit_scale))
        or not (softcap is None or is_positive(softcap))
        or not (isinstance(chunk_size, int) and chunk_size > 0)
        or not isinstance(outputs, (tuple, list))
        or "log_sum_sq_probs" in outputs
        or ("mean_logits" in outputs and softcap is not None)  # which needs all logits
    ):
        return None
    layer = _as_computed(hidden, weight, bias)
    scaled = temperature / logit_scale
    options = {
        "temperature": scaled,
        "softcap": None if softcap is None else softcap / logit_scale,
    }
    try:
        log_prob, entropy, is_top1 = _of_targets(layer, targets, options, outputs)
    except IndexError:  # a target out of range
        if not hidden.is_cpu:
            raise
        return None
    mean = None
    if "mean_logits" in outputs:
        mean = _mean_logits(layer) / scaled
    floats = (v if v is None else v.float() for v in (log_prob, entropy, None, mean))
    return (*floats, is_top1)


def _of_targets(
    layer: Layer, targets: Tensor, options: dict[str, Any], outputs: tuple[str, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute log-probabilities, entropies, and whether targets are the most likely classes."""
    hidden, weight, bias = layer
    if "is_top1" in outputs:
        loss, stats = linear_cross_entropy(
            hidden,
            weight,
            targets,
            linear_bias=bias,
            reduction="none",
            return_stats=True,
            **options,
        )
        entropy = None
        if "entropy" in outputs:
            entropy = _WithGradient.apply(stats.entropy, targets, options, *layer)
        return -loss, entropy, stats.argmax == targets
    if "entropy" in outputs:
        both = linear_log_prob_and_entropy(hidden, weight, targets, linear_bias=bias, **options)
        return (*both, None)
    return linear_log_prob(hidden, weight, targets, linear_bias=bias, **options), None, None


class _WithGradient(torch.autograd.Function):
    """Entropies from the statistics of a loss, whose gradient is computed where it is used.

    SFT, DPO and KTO only log the entropy, so that its gradient would be computed in vain.
    """

    @staticmethod
    def forward(
        ctx: Any, entropy: Tensor, targets: Tensor, options: dict[str, Any], *layer: Tensor | None
    ) -> Tensor:
        """Keep what the gradient is computed from."""
        ctx.options = options
        ctx.save_for_backward(targets, *layer)
        return entropy.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the logits once more, and the gradient of their entropies."""
        targets, *layer = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            own: list[Any] = [
                v if v is None else v.detach().requires_grad_(need)
                for v, need in zip(layer, needed, strict=True)
            ]
            _, entropy = linear_log_prob_and_entropy(
                own[0], own[1], targets, linear_bias=own[2], **ctx.options
            )
        leaves = [v for v, need in zip(own, needed, strict=True) if need]
        found = iter(torch.autograd.grad(entropy, leaves, grad.to(entropy.dtype)))
        return (None, None, None, *(next(found) if need else None for need in needed))


@torch.no_grad()
def _mean_logits(layer: Layer) -> Tensor:
    """Compute the mean of each row's logits, which are those of the mean of the weight's rows."""
    hidden, weight, bias = layer
    # A CPU converts a matrix before it sums it, so it gets some rows at a time.
    sums = [rows.sum(0, dtype=torch.float32) for rows in weight.split(ROWS_OF_SUM)]
    mean = hidden.float() @ (torch.stack(sums).sum(0) / len(weight))
    return mean if bias is None else mean + bias.mean(dtype=torch.float32)


def chunked_divergence_loss(
    original: Function,
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute :func:`fastdiv.linear_js_div`, and the sum of the student's entropies."""
    student = (student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    teacher = (teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    if (
        not (_fit(*student) and _fit(*teacher) and are_plain(student[0], *teacher, completion_mask))
        or student[0].shape[:-1] != teacher[0].shape[:-1]
        or student[1].shape[0] != teacher[1].shape[0]
        or completion_mask.shape != student[0].shape[:-1]
        or not (is_number(beta) and 0 <= beta <= 1)
        or not isinstance(num_items_in_batch, (Tensor, int, float, NoneType))
        or not (is_positive(temperature) and is_positive(student_logit_scale))
        or student_logit_scale != teacher_logit_scale
        or (student_final_logit_softcapping, teacher_final_logit_softcapping) != (None, None)
    ):
        return None
    hidden, weight, bias = _as_computed(*student)
    target, target_weight, target_bias = _as_computed(*teacher)
    counts = completion_mask != 0
    scaled = temperature / student_logit_scale
    loss = linear_js_div(
        hidden,
        weight,
        target.detach(),
        beta=beta,
        target_linear_weight=target_weight.detach(),
        target_linear_bias=None if target_bias is None else target_bias.detach(),
        linear_bias=bias,
        temperature=scaled,
        reduction="sum",
        token_weight=counts,
        logits_dtype=torch.float32,  # TRL's are sums in float32, too
    )
    with torch.no_grad():
        index = torch.where(counts, 0, -1)  # -1 leaves a row out
        _, entropies = linear_log_prob_and_entropy(
            hidden, weight, index, linear_bias=bias, temperature=scaled
        )
    n_valid = counts.sum()
    divisor = n_valid.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, Tensor):
        divisor = divisor.to(loss.device)
    return loss.float() / divisor, entropies.float().sum(), n_valid


def _fit(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether TRL and fastdiv agree on such a layer, and there is a kernel for it."""
    return (
        weight is not None
        and are_plain(hidden, weight, bias)
        and hidden.dim() > 1
        and weight.dim() == 2
        and hidden.dtype in FLOATS
        and weight.dtype in FLOATS
        and hidden.numel() > 0
        and weight.numel() > 0
        and hidden.shape[-1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype in FLOATS))
        # ZeRO-3 frees a weight after the forward, and only TRL gathers it for the backward.
        and not hasattr(weight, "ds_status")
        and use_kernel(hidden)
    )


def _as_computed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Layer:
    """Cast a layer to the dtype of TRL's products: that of autocast, or of the hidden states."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
