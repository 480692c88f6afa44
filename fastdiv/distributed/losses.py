"""Losses of sharded logits, the functions of :mod:`fastdiv` of the same names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._engine import arguments
from .._engine.in_place import check_in_place
from .._losses.cross_entropy import cross_entropy_spec
from ..reference.choices import Reduction, Smoothing
from .call import RowArguments, global_labels, loss_of
from .world import Group


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    group: Group = None,
    mean_group: Group = None,
    num_classes: int | None = None,
) -> Any:
    r"""Compute the cross entropy of logits whose classes are sharded, in nats.

    The value, on every rank, is that of :func:`fastdiv.cross_entropy` for whole rows, which has the
    formula.  The gradient is this shard's part of theirs.  Label smoothing is over all classes, and
    the z-loss is that of their log-sum-exp.

    Args:
        input: This rank's logits; float32, bfloat16, float16 or float64.  In rank order, each has
            the next :math:`C_r` classes on ``dim``; all other dimensions are the same.
        target: Global class indices (int64, int32, uint8) of the shape of ``input`` without
            ``dim``, the same on every rank, or this rank's shard of probabilities (floating).
        weight: Weights of this rank's classes, shape ``(C_r,)``; 1 by default.
        dim: Dimension of the classes; by default 1, as in torch, or 0 if ``input`` has one
            dimension.
        ignore_index: Rows with this label do not count: their loss and gradient are 0, whatever
            they hold.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight`` and the class weight of the label; NaN if no row counts) or
            ``"batchmean"`` (sum / ``input.size(0)``).
        label_smoothing: :math:`\varepsilon` in [0, 1].
        smoothing: ``"all"`` spreads :math:`\varepsilon` over all classes, ``"others"`` over all but
            the label.
        temperature: :math:`T`, which divides the logits.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        z_loss: :math:`z`, the factor of the squared log-sum-exp.  :math:`\omega` is the class
            weight of the label, and 1 for probabilities.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim`` and the same on
            every rank.  They multiply the loss and, in a mean, the denominator.  Rows of weight 0
            do not count, whatever they hold.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph nor
            a view of one, and must not share memory with other arguments.  Under ``torch.compile``
            a fresh gradient is used instead.
        return_stats: Also return :class:`fastdiv.Stats` of the whole rows, without gradient;
            ``argmax`` is a global index.
        group: The ranks that share the vocabulary; None for all processes.
        mean_group: Data-parallel ranks whose rows ``reduction="mean"`` averages over together, as
            :func:`token_mean` does; None for the rows of this rank only.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        The loss, float32 (float64 if input or target is), the same bits on every rank of ``group``;
        with ``return_stats`` a pair of the loss and the statistics.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: A label is neither in the whole vocabulary nor ``ignore_index`` (on a CPU;
            elsewhere its row is NaN), or ``input`` has no dimension ``dim``.
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shard = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])  # of one rank: all classes
        >>> fastdiv.distributed.cross_entropy(shard, torch.tensor([2, 0]))
        tensor(0.7531)
        >>> dist.destroy_process_group()

    Source: Shoeybi et al., *Megatron-LM* (2019), of the plain cross entropy.
    """

    def prepare() -> RowArguments:
        arguments.check_logits(input)
        d = arguments.class_dim(input, (1 if input.dim() > 1 else 0) if dim is None else dim)
        arguments.check_reduction(reduction)
        spec = cross_entropy_spec(
            target,
            input.shape[d] + 1,  # at least: other ranks have one more
            batch=input.shape[0],
            reduction=reduction,
            ignore_index=arguments.check_ignored(ignore_index),
            label_smoothing=label_smoothing,
            smoothing=smoothing,
            temperature=temperature,
            softcap=softcap,
            z_loss=z_loss,
            inplace=inplace_backward,
        )
        logits, t, y = input, None, None
        if target.is_floating_point():
            arguments.check_logits(target, "target")
            logits, probabilities = arguments.same_dtype(input, target)
            x, t = arguments.same_rows(logits, probabilities, d)
        else:
            x, y = arguments.as_rows(input, d), global_labels(input, d, target, "target")
        class_weight = arguments.class_weights(logits, input.shape[d], weight)
        row_weight = arguments.token_weights(logits, d, token_weight)
        if inplace_backward:
            check_in_place(input, target=target, weight=weight, token_weight=token_weight)
        return RowArguments(
            spec,
            y,
            class_weight,
            row_weight,
            (arguments.check_share(label_smoothing, "label_smoothing"), smoothing),
            stats=return_stats,
            input=input,
            dim=d,
            x=x,
            t=t,
        )

    value, stats = loss_of(prepare, group, mean_group, num_classes)
    return value if stats is None else (value, stats)
