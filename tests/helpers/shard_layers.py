"""What ranks do with a linear loss whose layer FSDP2 shards over data-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fastdiv

WIDTH, CLASSES, ROWS = 6, 21, 5


def fully_sharded(group: Any, rank: int, kind: str, whole: bool) -> None:
    """Two steps of SGD; each rank has rows of its own, and gradients are averaged."""
    options = {"target_type": "logits"} if kind == "LinearKLDivLoss" else {}

    def make() -> torch.nn.Module:
        torch.manual_seed(4)
        return getattr(fastdiv.nn, kind)(WIDTH, CLASSES, bias=True, **options)

    labelled = kind == "LinearCrossEntropyLoss"
    hidden = torch.randn(2, ROWS, WIDTH)
    target = torch.randint(CLASSES, (2, ROWS)) if labelled else torch.randn(2, ROWS, CLASSES)
    plain, sharded = make(), make()
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(sharded.linear, mesh=mesh)
    if whole:
        fully_shard(sharded, mesh=mesh)
    for _ in range(2):
        mine = hidden[rank].clone().requires_grad_()
        value = sharded(mine, target[rank])
        leaf = hidden.clone().requires_grad_()
        losses = torch.stack([plain(h, t) for h, t in zip(leaf, target, strict=True)])
        torch.testing.assert_close(value, losses[rank])
        value.backward()
        losses.sum().backward()
        torch.testing.assert_close(mine.grad, leaf.grad[rank])
        pairs = zip(plain.parameters(), sharded.parameters(), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(theirs.grad.full_tensor(), ours.grad / 2)
            with torch.no_grad():
                ours -= 0.1 * ours.grad / 2
                theirs -= 0.1 * theirs.grad
                ours.grad = theirs.grad = None
