"""Losses of the logits of a sharded linear layer, computed a tile at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._engine import arguments
from .._linear.divergence import check_teacher
from .._linear.dtypes import check_logits_dtype
from .._linear.head import LinearHead, as_rows, check_chunk_size, check_target, checked_head
from .._linear.ops import dtype_of_value
from .._losses.cross_entropy import cross_entropy_spec
from ..reference import Spec, Stats
from ..reference.choices import Reduction, Smoothing, TargetType
from .call import Arguments, arguments_of, call_of, global_labels, mean_of, shards_of, size_of
from .tiles import ShardLinearCall, shard_linear_loss
from .world import Group, world_of


@dataclass(kw_only=True)
class LinearArguments(Arguments):
    """The arguments of a loss of the logits of a layer."""

    head: LinearHead
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    chunk_size: int | None = None
    logits_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_chunk_size(self.chunk_size)
        check_logits_dtype(self.logits_dtype)


def _loss_of(
    prepare: Callable[[], LinearArguments],
    group: Group,
    mean_group: Group,
    num_classes: int | None,
) -> tuple[Tensor, Stats | None]:
    world = world_of(group)
    a = arguments_of(world, prepare, num_classes)
    x, weight, bias = a.head.tensors
    t, t_weight, t_bias = a.teacher
    more = {
        "mean over": size_of(mean_group),
        "of another layer": t_weight is not None,
        "dtype of logits": a.logits_dtype,
        # Which gradients are summed over the ranks.
        "gradients of hidden states": [v is not None and v.requires_grad for v in (x, t)],
    }
    hidden = x, None if t_weight is None else t
    shards = shards_of(world, a, x, len(weight), more, hidden)
    call = call_of(a, shards, mean_group)
    dtype = dtype_of_value(x, t)
    weights = (None if w is None else w.to(dtype) for w in (a.class_weight, a.row_weight))
    value, divisor, stats = shard_linear_loss(
        ShardLinearCall(call.spec, shards, a.stats, a.chunk_size or 0, a.logits_dtype),
        *(x, weight, bias, t, t_weight, t_bias, a.label, *weights),
    )
    value = mean_of(a, value, divisor, mean_group)
    shape = a.head.logits.shape[:-1]
    if a.spec.reduction == "none":
        value = value.reshape(shape)
    return value, None if stats is None else Stats(*(s.reshape(shape) for s in stats))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    return_stats: bool = False,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    group: Group = None,
    mean_group: Group = None,
    num_classes: int | None = None,
) -> Any:
    r"""Compute the cross entropy of a linear layer whose classes are sharded, in nats.

    The value, on every rank, is that of :func:`fastdiv.linear_cross_entropy` for the whole layer, a
    tile at a time.  Every rank has the hidden states and its rows of the weight, as in Megatron's
    column-parallel layer.  The backward sums the gradient of the hidden states over the group, so
    the caller must not.

    Args:
        input: Hidden states, shape ``(..., H)``, the same on every rank; float32, bfloat16, float16
            or float64.
        linear_weight: This rank's rows of the weight, shape ``(C_r, H)``, in the dtype of
            ``input``.
        target: Global class indices (int64, int32, uint8), shape ``(...)``, the same on every rank,
            or this rank's shard of probabilities (floating), shape ``(..., C_r)``.
        linear_bias: This rank's part of the bias, shape ``(C_r,)``.
        weight: Weights of this rank's classes, shape ``(C_r,)``; 1 by default.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight`` and the class weight of the label; NaN if no row counts) or
            ``"batchmean"`` (sum / ``input.size(0)``).
        ignore_index: Rows with this label do not count: their loss and gradient are 0, whatever
            they hold.  None means -100.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        smoothing: ``"all"`` spreads :math:`\varepsilon` over all classes, ``"others"`` over all but
            the label.
        temperature: :math:`T`, which divides the logits.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        z_loss: :math:`z`, the factor of the squared log-sum-exp.
        token_weight: Weights of the rows, shape ``(...)``, the same on every rank.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        return_stats: Also return :class:`fastdiv.Stats` of the whole rows, without gradient;
            ``argmax`` is a global index.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        group: The ranks that share the vocabulary; None for all processes.
        mean_group: Data-parallel ranks whose rows ``reduction="mean"`` averages over together, as
            :func:`token_mean` does; None for the rows of this rank only.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        The loss, float32 (float64 if input or target is), the same bits on every rank of ``group``;
        with ``return_stats`` a pair of the loss and the statistics.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, or a weight or an option
            requires a gradient.
        IndexError: A label is neither in the whole vocabulary nor ``ignore_index`` (on a CPU;
            elsewhere its row is NaN).
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> h, w = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.eye(3, 2)
        >>> fastdiv.distributed.linear_cross_entropy(h, w, torch.tensor([1, 0]))
        tensor(0.7531)
        >>> dist.destroy_process_group()

    Source: :func:`fastdiv.linear_cross_entropy`; Shoeybi et al., *Megatron-LM* (2019).
    """

    def prepare() -> LinearArguments:
        head = checked_head(input, linear_weight, linear_bias)
        logits = head.logits
        dim, classes = logits.dim() - 1, logits.shape[-1]
        arguments.check_reduction(reduction)
        ignored = arguments.check_ignored(-100 if ignore_index is None else ignore_index)
        spec = cross_entropy_spec(
            target,
            classes + 1,  # at least: other ranks have one more
            batch=logits.shape[0],
            reduction=reduction,
            ignore_index=ignored,
            label_smoothing=label_smoothing,
            smoothing=smoothing,
            temperature=temperature,
            softcap=softcap,
            z_loss=z_loss,
        )
        t = y = None
        if target.is_floating_point():
            check_target(logits, target)
            t = as_rows(target)
        else:
            y = global_labels(logits, dim, target, "target")
        return LinearArguments(
            spec,
            y,
            arguments.class_weights(logits, classes, weight),
            arguments.token_weights(logits, dim, token_weight),
            (arguments.check_share(label_smoothing, "label_smoothing"), smoothing),
            stats=return_stats,
            head=head,
            teacher=(t, None, None),
            chunk_size=chunk_size,
            logits_dtype=logits_dtype,
        )

    value, stats = _loss_of(prepare, group, mean_group, num_classes)
    return value if stats is None else (value, stats)


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    target_type: TargetType | None = None,
    target_linear_weight: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    reduction: Reduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    group: Group = None,
    mean_group: Group = None,
    num_classes: int | None = None,
) -> Tensor:
    """Compute the KL divergence of a linear layer whose classes are sharded.

    The value, on every rank, is that of :func:`fastdiv.linear_kl_div` for the whole layer, a tile
    at a time.  Every rank has the hidden states and its rows of the weight, as in Megatron's
    column-parallel layer.  The backward sums the gradient of the hidden states, also of a
    teacher's, over the group, so the caller must not.

    Args:
        input: Hidden states, shape ``(..., H)``, the same on every rank; float32, bfloat16, float16
            or float64.
        linear_weight: This rank's rows of the weight, shape ``(C_r, H)``, in the dtype of
            ``input``.
        target: This rank's shard of the teacher's rows, shape ``(..., C_r)``, or with
            ``target_linear_weight`` its hidden states, shape ``(..., K)``, the same on every rank.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.  Required
            unless it holds hidden states.
        target_linear_weight: This rank's rows of the teacher's weight, shape ``(C_r, K)``, in the
            dtype of ``target``.
        target_linear_bias: This rank's part of the teacher's bias, shape ``(C_r,)``.
        linear_bias: This rank's part of the bias, shape ``(C_r,)``.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.
        token_weight: Weights of the rows, shape ``(...)``, the same on every rank.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.
        group: The ranks that share the vocabulary; None for all processes.
        mean_group: Data-parallel ranks whose rows ``reduction="mean"`` averages over together, as
            :func:`token_mean` does; None for the rows of this rank only.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        The divergence in nats, float32 (float64 if input or target is), the same bits on every rank
        of ``group``.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, or a weight or an option
            requires a gradient.
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> h, w = torch.tensor([[1.0, 2.0]]), torch.eye(3, 2)
        >>> g, v = torch.tensor([[1.0]]), torch.tensor([[3.0], [1.0], [0.0]])
        >>> fastdiv.distributed.linear_kl_div(h, w, g, target_linear_weight=v)
        tensor(0.8112)
        >>> dist.destroy_process_group()

    Source: :func:`fastdiv.linear_kl_div`.
    """

    def prepare() -> LinearArguments:
        head = checked_head(input, linear_weight, linear_bias)
        logits = head.logits
        arguments.check_reduction(reduction)
        teacher = (target, target_type, target_linear_weight, target_linear_bias)
        kind, tensors = check_teacher(logits, *teacher)
        spec = Spec(
            loss="kl_div",
            target_type=kind,
            reduction=reduction,
            batch=logits.shape[0],
            scale=arguments.scale_of(temperature),
        )
        weight = arguments.token_weights(logits, logits.dim() - 1, token_weight)
        return LinearArguments(
            spec,
            row_weight=weight,
            head=head,
            teacher=tensors,
            chunk_size=chunk_size,
            logits_dtype=logits_dtype,
        )

    return _loss_of(prepare, group, mean_group, num_classes)[0]
