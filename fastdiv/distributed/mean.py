"""The mean over all tokens of a batch on several data-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .world import Group, sum_over, world_of


def token_mean(total: Tensor, count: Tensor | float, group: Group = None) -> Tensor:
    r"""Compute this rank's share in the mean over all tokens of a data-parallel group.

    .. math:: \frac{W \sum_{\text{tokens of this rank}} \ell}{\sum_{\text{ranks}} \text{count}}

    :math:`W` is the number of ranks.  Averaged over them, as DDP and FSDP average gradients, the
    shares give the mean over all tokens, each with the same weight. (The average of the ranks' own
    means gives the tokens of a rank with few of them more weight, and is NaN if a rank has none.)

    Args:
        total: Sum of the losses of this rank's tokens; 0 for no tokens.
        count: Number of these tokens, or the sum of their weights; it gets no gradient.
        group: The data-parallel ranks; None for all processes.

    Returns:
        The share, differentiable in ``total``.  It is NaN on every rank if no rank has a token.

    Raises:
        RuntimeError: There is no process group.

    Example:
        >>> import torch, fastdiv, fastdiv.distributed
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x, y = torch.zeros(3, 4), torch.tensor([1, -100, 2])
        >>> total = fastdiv.cross_entropy(x, y, reduction="sum")
        >>> fastdiv.distributed.token_mean(total, (y != -100).sum())
        tensor(1.3863)
        >>> dist.destroy_process_group()

    Source: *Fixing gradient accumulation* in Hugging Face Transformers (2024), on the same mistake
    over steps instead of ranks.
    """
    world = world_of(group)
    of_rank = torch.as_tensor(count, device=total.device).detach().to(total.dtype)
    of_all = of_rank
    if world.size > 1:
        of_all = sum_over(world.name, of_rank)
    return total * (world.size / of_all)
