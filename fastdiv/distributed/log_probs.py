"""The entropy of sharded rows, and the log-probability of their tokens."""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from ..reference import Spec
from ..reference.choices import Reduction
from .call import RowArguments, global_labels, loss_of
from .world import Group


def entropy(
    input: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    base: float | None = None,
    reduction: Reduction = "none",
    group: Group = None,
    mean_group: Group = None,
    num_classes: int | None = None,
) -> Tensor:
    """Compute the Shannon entropy of rows of logits whose classes are sharded.

    The value, on every rank, is that of :func:`fastdiv.entropy` for whole rows.  The gradient is
    this shard's part of theirs.

    Args:
        input: This rank's logits; float32, bfloat16, float16 or float64.  In rank order, each has
            the next :math:`C_r` classes on ``dim``; all other dimensions are the same.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.
        base: Base of the logarithm: None for nats, 2 for bits.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).
        group: The ranks that share the vocabulary; None for all processes.
        mean_group: Data-parallel ranks whose rows ``reduction="mean"`` averages over together, as
            :func:`token_mean` does; None for the rows of this rank only.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        The entropy, float32 (float64 for float64 input), the same bits on every rank of ``group``.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: There are no classes along ``dim``, or an option is out of range or requires a
            gradient.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> fastdiv.distributed.entropy(torch.zeros(8), base=2)
        tensor(3.)
        >>> dist.destroy_process_group()

    Source: :func:`fastdiv.entropy`, by the chain rule over groups of classes.
    """

    def prepare() -> RowArguments:
        arguments.check_logits(input)
        d = arguments.class_dim(input, dim)
        arguments.check_reduction(reduction)
        arguments.log_of_base(base)
        scale = arguments.scale_of(temperature)
        spec = Spec("entropy", reduction=reduction, batch=input.shape[0], scale=scale)
        return RowArguments(spec, input=input, dim=d, x=arguments.as_rows(input, d))

    value, _ = loss_of(prepare, group, mean_group, num_classes)
    return value if base is None else (value / arguments.log_of_base(base)).to(value.dtype)


def log_prob(
    input: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    group: Group = None,
    num_classes: int | None = None,
) -> Tensor:
    """Compute the log-probability of one class per row of sharded logits, in nats.

    The value, on every rank, is that of :func:`fastdiv.log_prob` for whole rows.  The gradient is
    this shard's part of theirs.

    Args:
        input: This rank's logits; float32, bfloat16, float16 or float64.  In rank order, each has
            the next :math:`C_r` classes on ``dim``; all other dimensions are the same.
        index: Global class indices (int64, int32, uint8), the same on every rank.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.
        group: The ranks that share the vocabulary; None for all processes.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        One value per row, float32 (float64 for float64 input), the same bits on every rank of
        ``group``.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range or requires a gradient.
        IndexError: An index is not in the whole vocabulary (on a CPU; elsewhere its row is NaN), or
            ``input`` has no dimension ``dim``.
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> fastdiv.distributed.log_prob(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([-1.3863, -1.3863])
        >>> dist.destroy_process_group()

    Source: :func:`fastdiv.log_prob`.
    """
    return -_of_index("cross_entropy", input, index, dim, temperature, group, num_classes)


def log_prob_and_entropy(
    input: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    group: Group = None,
    num_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of one class per row, and the entropy, of sharded logits.

    The values, on every rank, are those of :func:`fastdiv.log_prob_and_entropy` for whole rows, in
    one pass and one exchange.  The gradient is this shard's part of theirs.

    Args:
        input: This rank's logits; float32, bfloat16, float16 or float64.  In rank order, each has
            the next :math:`C_r` classes on ``dim``; all other dimensions are the same.
        index: Global class indices (int64, int32, uint8), the same on every rank.
        dim: Dimension of the classes.
        temperature: :math:`T`, which divides the logits.
        group: The ranks that share the vocabulary; None for all processes.
        num_classes: Number of classes of all shards together.  If given, all ranks raise where the
            shards have another number, for example where each holds all classes.

    Returns:
        ``(log_prob, entropy)`` in nats, one value per row each, float32 (float64 for float64
        input), the same bits on every rank of ``group``.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, or an option is out of range or requires a gradient.
        IndexError: An index is not in the whole vocabulary (on a CPU; elsewhere its row is NaN), or
            ``input`` has no dimension ``dim``.
        RuntimeError: There is no process group, tensors are on different devices, another rank
            raised, or the ranks differ in the call, its options, shapes, labels or token weights.

    Example:
        >>> import torch, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> fastdiv.distributed.log_prob_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
        (tensor([-1.3863]), tensor([1.3863]))
        >>> dist.destroy_process_group()

    Source: :func:`fastdiv.log_prob_and_entropy`.
    """
    both = _of_index("log_prob_and_entropy", input, index, dim, temperature, group, num_classes)
    log_prob, entropy = both.unbind(0)
    return log_prob, entropy


def _of_index(
    loss: str,
    input: Tensor,
    index: Tensor,
    dim: int,
    temperature: float,
    group: Group,
    num_classes: int | None,
) -> Tensor:
    def prepare() -> RowArguments:
        arguments.check_logits(input)
        d = arguments.class_dim(input, dim)
        label = global_labels(input, d, index, "index")
        ignored = arguments.NO_LABEL_IGNORED
        spec = Spec(loss, ignore_index=ignored, scale=arguments.scale_of(temperature))
        x = arguments.as_rows(input, d)
        return RowArguments(spec, label, label_name="index", input=input, dim=d, x=x)

    return loss_of(prepare, group, num_classes=num_classes)[0]
