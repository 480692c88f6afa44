"""Entropy of sharded rows, and log-probability of their tokens."""

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
    r"""Shannon entropy of rows of logits whose classes are sharded.

    That of :func:`fastdiv.entropy` of whole rows, on every rank, with gradient.

    Args:
        input: This rank's logits, with its classes on ``dim``; see :func:`cross_entropy`.
        dim: Dimension of the classes.
        temperature: Divides the logits.
        base: Base of the logarithm: nats by default.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        group: The ranks that share the vocabulary; all processes for None.
        mean_group: Data-parallel ranks that ``reduction="mean"`` is to average over.
        num_classes: All classes of all shards.  If given, shards that do not have as many in all
            are refused on every rank, as logits that were already gathered would be.

    Returns:
        The entropy, the same bits on every rank of ``group``.

    Raises:
        TypeError: a dtype that is not one of those of :func:`fastdiv.entropy`.
        ValueError: no classes along ``dim``, an option out of its range.
        RuntimeError: as of :func:`cross_entropy`.

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
    r"""Log-probability of one class a row of logits whose classes are sharded.

    That of :func:`fastdiv.log_prob` of whole rows, on every rank, with gradient.

    Args:
        input: This rank's logits, with its classes on ``dim``; see :func:`cross_entropy`.
        index: Class indices, counted over the whole vocabulary and the same on every rank.
        dim: Dimension of the classes.
        temperature: Divides the logits.
        group: The ranks that share the vocabulary; all processes for None.
        num_classes: All classes of all shards.  If given, shards that do not have as many in all
            are refused on every rank, as logits that were already gathered would be.

    Returns:
        One value a row in nats, the same bits on every rank of ``group``.

    Raises:
        TypeError: a dtype that is not one of those of :func:`fastdiv.log_prob`.
        ValueError: shapes that do not fit, an option out of its range.
        IndexError: an index outside of the vocabulary (on CPU; elsewhere the row is NaN).
        RuntimeError: as of :func:`cross_entropy`.

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
    r"""Log-probability of one class a row, and entropy of the row, of sharded logits.

    Both in one pass and one exchange, with gradient; arguments and errors are those of
    :func:`log_prob`.

    Returns:
        ``(log_prob, entropy)`` in nats, one value a row each.

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
