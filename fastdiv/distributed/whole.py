"""Whole rows on every rank, by differentiable collectives, where the kernels do not serve.

All ranks compute the same loss of the same rows, so the upstream gradient is the same on all of
them, and each takes its part.  By this convention gather and part are each other's derivatives, and
so are copy and sum, of any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .world import Shards, gather, sum_over


class _Gather(torch.autograd.Function):
    """Concatenates the last dimension of all shards."""

    @staticmethod
    def forward(shards: Shards, v: Tensor) -> Tensor:
        most = max(shards.sizes)
        padded = torch.nn.functional.pad(v, (0, most - v.shape[-1]))
        parts = gather(shards.world, padded).unbind(0)
        return torch.cat([p[..., :n] for p, n in zip(parts, shards.sizes, strict=True)], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shards = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Part.apply(ctx.shards, grad)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _Gather.apply(ctx.shards, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], shards: Shards, v: Tensor) -> tuple[Tensor, int]:
        return _Gather.apply(shards, v.movedim(in_dims[1], 0)), 0


class _Part(torch.autograd.Function):
    """Takes this rank's part of the last dimension."""

    @staticmethod
    def forward(shards: Shards, v: Tensor) -> Tensor:
        return v.narrow(-1, shards.first, shards.sizes[shards.world.rank]).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shards = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Gather.apply(ctx.shards, grad)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _Part.apply(ctx.shards, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], shards: Shards, v: Tensor) -> tuple[Tensor, int]:
        return _Part.apply(shards, v.movedim(in_dims[1], 0)), 0


class _Copy(torch.autograd.Function):
    """Copies a tensor that is equal on all ranks; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(shards: Shards, v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shards = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Sum.apply(ctx.shards, grad)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _Copy.apply(ctx.shards, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], shards: Shards, v: Tensor) -> tuple[Tensor, int]:
        return _Copy.apply(shards, v.movedim(in_dims[1], 0)), 0


class _Sum(torch.autograd.Function):
    """Sums over the ranks."""

    @staticmethod
    def forward(shards: Shards, v: Tensor) -> Tensor:
        return sum_over(shards.world.name, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shards = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Copy.apply(ctx.shards, grad)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _Sum.apply(ctx.shards, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], shards: Shards, v: Tensor) -> tuple[Tensor, int]:
        return _Sum.apply(shards, v.movedim(in_dims[1], 0)), 0


def gathered(shards: Shards, v: Tensor) -> Tensor:
    """Gather all classes of a tensor whose last dimension is sharded."""
    return _Gather.apply(shards, v)


def shared(shards: Shards, v: Tensor) -> Tensor:
    """Return a tensor that is equal on all ranks, for a different part of the loss on each."""
    return _Copy.apply(shards, v)
