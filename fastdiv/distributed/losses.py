"""The sharded losses of logits; each is the function of :mod:`fastdiv` of the same name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._engine import arguments
from .._engine.in_place import check_in_place
from .._losses.cross_entropy import cross_entropy_spec
from .._losses.divergence import js_loss
from ..reference import Spec
from ..reference.choices import Reduction, Smoothing, TargetType
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
    r"""Cross entropy of logits whose classes are sharded over the ranks of a group.

    The value, on every rank, is that of :func:`fastdiv.cross_entropy` of whole rows; the gradient
    is this shard's part of theirs.  Label smoothing is over all classes, the z-loss of their
    log-sum-exp, and all other options mean what they mean there.

    Args:
        input: This rank's logits, with its :math:`C_r` classes on ``dim``; those of rank 0 come
            first, and so on.  The sizes may differ, all other dimensions may not.
        target: Class indices, counted over the whole vocabulary and the same on every rank, or this
            shard's probabilities.
        weight: Weights of this shard's classes, shape ``(C_r,)``.
        dim: Dimension of the classes; by default torch's, 1, or 0 for one-dimensional input.
        ignore_index: Rows with this label do not count.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        label_smoothing: In [0, 1], spread over all classes of all shards.
        smoothing: ``"all"`` or ``"others"``.
        temperature: Divides the logits.
        softcap: Soft cap of the logits.
        z_loss: Factor of the squared log-sum-exp.
        token_weight: Weights of the rows, the same on every rank.
        inplace_backward: The gradient is written over the logits; see
            :func:`fastdiv.cross_entropy`.
        return_stats: Also return statistics of the whole rows; the argmax is a global index.
        group: The ranks that share the vocabulary; all processes for None.
        mean_group: Data-parallel ranks over whose rows, all of them, ``reduction="mean"`` is to
            average, as :func:`token_mean` does.  None: over this rank's rows.
        num_classes: All classes of all shards.  If given, shards that do not have as many in all
            are refused on every rank, as logits that were already gathered would be.

    Returns:
        The loss, the same bits on every rank of ``group``, and the statistics if asked for.

    Raises:
        TypeError: a dtype that is not one of those of :func:`fastdiv.cross_entropy`.
        ValueError: shapes that do not fit, an option out of its range, or that requires a gradient,
            logits that may not be overwritten.
        IndexError: a label outside of the vocabulary (on CPU; elsewhere such a row is NaN).
        RuntimeError: another rank's arguments were refused, or it does not call the same loss of as
            many rows with the same labels; there is no process group.

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
            input.shape[d] + 1,  # one more at least, on the other ranks
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


def _divergence(
    loss: str,
    input: Tensor,
    target: Tensor,
    *,
    target_type: str,
    dim: int,
    reduction: str,
    temperature: float,
    token_weight: Tensor | None,
    inplace_backward: bool,
    group: Group,
    mean_group: Group,
    num_classes: int | None,
    beta: float = 0.0,
) -> Tensor:
    def prepare() -> RowArguments:
        name, param = (loss, 0.0) if loss != "js_div" else js_loss(beta)
        arguments.check_logits(input)
        arguments.check_logits(target, "target")
        arguments.check_target_type(target_type)
        d = arguments.class_dim(input, dim)
        arguments.check_reduction(reduction)
        logits, rows = arguments.same_dtype(input, target)
        row_weight = arguments.token_weights(logits, d, token_weight)
        x, t = arguments.same_rows(logits, rows, d)
        if inplace_backward:
            check_in_place(input, target=target, token_weight=token_weight)
        spec = Spec(
            loss=name,
            target_type=target_type,
            reduction=reduction,
            batch=input.shape[0],
            scale=arguments.scale_of(temperature),
            param=param,
            inplace=inplace_backward,
        )
        return RowArguments(spec, row_weight=row_weight, input=input, dim=d, x=x, t=t)

    return loss_of(prepare, group, mean_group, num_classes)[0]


def kl_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
    group: Group = None,
    mean_group: Group = None,
    num_classes: int | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of sharded rows, :math:`\mathrm{KL}(p \| q)`.

    That of :func:`fastdiv.kl_div` of whole rows, on every rank, as accurate next to zero.

    Args:
        input: This rank's logits, with its classes on ``dim``; see :func:`cross_entropy`.
        target: This shard of the teacher's rows.  Gets a gradient where it requires one.
        target_type: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        dim: Dimension of the classes.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        temperature: Divides the input's logits, and the target's where it has some.
        token_weight: Weights of the rows, the same on every rank.
        inplace_backward: The gradient is written over the logits; see
            :func:`fastdiv.cross_entropy`.
        group: The ranks that share the vocabulary; all processes for None.
        mean_group: Data-parallel ranks that ``reduction="mean"`` is to average over.
        num_classes: All classes of all shards.  If given, shards that do not have as many in all
            are refused on every rank, as logits that were already gathered would be.

    Returns:
        The divergence in nats, the same bits on every rank of ``group``.

    Raises:
        TypeError: a dtype that is not one of those of :func:`fastdiv.kl_div`.
        ValueError: shapes that do not fit, an option out of its range, or that requires a gradient,
            logits that may not be overwritten.
        RuntimeError: as of :func:`cross_entropy`.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.distributed.kl_div(x, t, target_type="logits")
        tensor(0.0389)
        >>> dist.destroy_process_group()

    Source: :func:`fastdiv.kl_div`, by the chain rule over groups of classes.
    """
    return _divergence(
        "kl_div",
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        inplace_backward=inplace_backward,
        group=group,
        mean_group=mean_group,
        num_classes=num_classes,
    )


def reverse_kl_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
    group: Group = None,
    mean_group: Group = None,
    num_classes: int | None = None,
) -> Tensor:
    r"""Reverse Kullback-Leibler divergence of sharded rows, :math:`\mathrm{KL}(q \| p)`.

    That of :func:`fastdiv.reverse_kl_div` of whole rows; arguments, result and errors are those of
    :func:`kl_div`.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.distributed.reverse_kl_div(x, t, target_type="logits")
        tensor(0.0390)
        >>> dist.destroy_process_group()

    Source: :func:`fastdiv.reverse_kl_div`.
    """
    return _divergence(
        "reverse_kl_div",
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        inplace_backward=inplace_backward,
        group=group,
        mean_group=mean_group,
        num_classes=num_classes,
    )


def js_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    beta: float = 0.5,
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
    group: Group = None,
    mean_group: Group = None,
    num_classes: int | None = None,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence of sharded rows.

    That of :func:`fastdiv.js_div` of whole rows.  It takes two exchanges where the others take one:
    a mixture of two rows can only be looked at once both are normalised.

    ``beta`` is that of :func:`fastdiv.js_div`; all other arguments, result and errors are those of
    :func:`kl_div`.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.distributed.js_div(x, t, target_type="logits")
        tensor(0.0097)
        >>> dist.destroy_process_group()

    Source: :func:`fastdiv.js_div`.
    """
    return _divergence(
        "js_div",
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        inplace_backward=inplace_backward,
        group=group,
        mean_group=mean_group,
        num_classes=num_classes,
        beta=beta,
    )
