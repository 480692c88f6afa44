"""The sharded divergences that users call: KL, reverse KL and JS."""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from .._engine.in_place import check_in_place
from .._losses.divergence import js_loss
from ..reference import Spec
from ..reference.choices import Reduction, TargetType
from .call import RowArguments, loss_of
from .world import Group


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
    """Compute the Kullback-Leibler divergence of sharded rows.

    The value, on every rank, is that of :func:`fastdiv.kl_div` for whole rows, and as accurate next
    to 0.  The gradient is this shard's part of theirs.

    Args:
        input: This rank's logits; float32, bfloat16, float16 or float64.  In rank order, each has
            the next :math:`C_r` classes on ``dim``; all other dimensions are the same.
        target: This rank's shard of the teacher's rows, of the shape of ``input`` and any of its
            dtypes.  It gets a gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim`` and the same on
            every rank.  They multiply the loss and, in a mean, the denominator.  Rows of weight 0
            do not count, whatever they hold.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph nor
            a view of one, and must not share memory with other arguments.  Under ``torch.compile``
            a fresh gradient is used instead.
        group: The ranks that share the vocabulary; None for all processes.
        mean_group: Data-parallel ranks whose rows ``reduction="mean"`` averages over together, as
            :func:`token_mean` does; None for the rows of this rank only.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        The divergence in nats, float32 (float64 if input or target is), the same bits on every rank
        of ``group``.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

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
    """Compute the reverse Kullback-Leibler divergence of sharded rows.

    The value, on every rank, is that of :func:`fastdiv.reverse_kl_div` for whole rows, and as
    accurate next to 0.  The gradient is this shard's part of theirs.

    Args:
        input: This rank's logits; float32, bfloat16, float16 or float64.  In rank order, each has
            the next :math:`C_r` classes on ``dim``; all other dimensions are the same.
        target: This rank's shard of the teacher's rows, of the shape of ``input`` and any of its
            dtypes.  It gets a gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim`` and the same on
            every rank.  They multiply the loss and, in a mean, the denominator.  Rows of weight 0
            do not count, whatever they hold.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph nor
            a view of one, and must not share memory with other arguments.  Under ``torch.compile``
            a fresh gradient is used instead.
        group: The ranks that share the vocabulary; None for all processes.
        mean_group: Data-parallel ranks whose rows ``reduction="mean"`` averages over together, as
            :func:`token_mean` does; None for the rows of this rank only.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        The divergence in nats, float32 (float64 if input or target is), the same bits on every rank
        of ``group``.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

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
    r"""Compute the generalised Jensen-Shannon divergence of sharded rows.

    The value, on every rank, is that of :func:`fastdiv.js_div` for whole rows, which has the
    formula.  The gradient is this shard's part of theirs.  It takes two exchanges where other
    losses take one, since the mixture of two rows needs both of them normalised.

    Args:
        input: This rank's logits; float32, bfloat16, float16 or float64.  In rank order, each has
            the next :math:`C_r` classes on ``dim``; all other dimensions are the same.
        target: This rank's shard of the teacher's rows, of the shape of ``input`` and any of its
            dtypes.  It gets a gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        beta: :math:`\beta` in [0, 1], the share of the target in the mixture.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim`` and the same on
            every rank.  They multiply the loss and, in a mean, the denominator.  Rows of weight 0
            do not count, whatever they hold.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph nor
            a view of one, and must not share memory with other arguments.  Under ``torch.compile``
            a fresh gradient is used instead.
        group: The ranks that share the vocabulary; None for all processes.
        mean_group: Data-parallel ranks whose rows ``reduction="mean"`` averages over together, as
            :func:`token_mean` does; None for the rows of this rank only.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        The divergence in nats, float32 (float64 if input or target is), the same bits on every rank
        of ``group``.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

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
