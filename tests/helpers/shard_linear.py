"""Sharded losses of linear layers, as the ranks of the distributed tests compute them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastdiv
import fastdiv.distributed as sharded
from fastdiv._linear import tiles
from fastdiv.distributed import infinite_rows
from helpers.cases import make_inputs
from helpers.shards import SIZES, classes_of, digest, size_of
from helpers.values import same, value_and_gradients


def linear(group: Any, rank: int, dtype: torch.dtype) -> list[str]:
    """Against the loss of the whole layer: values, and the gradient of everything."""
    sizes, found, wrong = SIZES[size_of(group)], [], []
    mine = classes_of(rank, sizes)
    hidden, teacher = make_inputs((40, 24), dtype, scale=1.0, seed=1)
    w, v = make_inputs((sum(sizes), 24), dtype, scale=0.7, seed=2)
    b = make_inputs((1, sum(sizes)), dtype, seed=3)[0][0]
    y = (hidden @ w.t()).argmax(-1)
    y[::7] = -100
    p = (teacher.double() @ v.double().t()).softmax(-1).to(dtype)
    class_weight = torch.linspace(0.5, 1.5, sum(sizes), dtype=torch.float32).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    # Tensors that are the same on all ranks, that are cut along the first, and along the last
    # dimension; and the loss of them and options.
    cases: dict[str, Any] = {
        "labels": (lambda m, h, w, b, **o: m.linear_cross_entropy(h, w, y, linear_bias=b, **o),
                   (hidden,), (w, b), ()),
        "soft": (lambda m, h, w, p, **o: m.linear_cross_entropy(h, w, p, **o),
                 (hidden,), (w,), (p,)),
        "layers": (lambda m, h, g, w, v, **o:
                   m.linear_kl_div(h, w, g, target_linear_weight=v, temperature=2.0, **o),
                   (hidden, teacher), (w, v), ()),
        "logits": (lambda m, h, w, t, **o: m.linear_kl_div(h, w, t, target_type="logits", **o),
                   (hidden,), (w,), (p.log(),)),
    }  # fmt: skip
    every: list[dict[str, Any]] = [{}, {"reduction": "none"}, {"reduction": "mean"}]
    options = {
        "labels": [
            *every,
            {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 8.0},
            {"label_smoothing": 0.1, "smoothing": "others", "chunk_size": 7},
            {"weight": class_weight, "label_smoothing": 0.1},
        ],
        "soft": [{}, {"reduction": "none", "label_smoothing": 0.2}],
    }
    for name, (function, alike, rows, columns) in cases.items():
        for how in options.get(name, every):
            cut = {k: v[mine] if k == "weight" else v for k, v in how.items()}
            whole = value_and_gradients(
                lambda *a, f=function, o=how: f(fastdiv, *a, **o), *alike, *rows, *columns
            )
            ours = value_and_gradients(
                lambda *a, f=function, o=cut: f(sharded, *a, group=group, **o),
                *alike,
                *(v[mine] for v in rows),
                *(v[:, mine] for v in columns),
            )
            n = 1 + len(alike)
            expected = (
                *whole[:n],
                *(g[mine] for g in whole[n : n + len(rows)]),
                *(g[:, mine] for g in whole[n + len(rows) :]),
            )
            # Of whole layers halves add up their gradients in another order.
            tolerance = {torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
            for i, (a, b_) in enumerate(zip(ours, expected, strict=True)):
                try:
                    size = max(1.0, float(b_.abs().max()))
                    same(a.double() / size, b_.double() / size, tolerance)
                except AssertionError as error:
                    wrong.append(f"{name} {how}, tensor {i}: {error}")
            found.append(digest(*ours[:n]))
    assert not wrong, "\n".join(wrong)
    return found


def float_logits(group: Any, rank: int) -> None:
    """Layers in half precision with float32 logits: near float64, in every path of the values."""
    sizes, mine = SIZES[size_of(group)], classes_of(rank, SIZES[size_of(group)])
    hidden, teacher = (v.bfloat16() for v in make_inputs((40, 24), torch.float32, seed=1))
    w, v = (m.bfloat16() for m in make_inputs((sum(sizes), 24), torch.float32, scale=0.7, seed=2))
    y = (hidden @ w.t()).argmax(-1)
    # Every second tensor is a weight, of which a rank has its rows.
    losses: dict[Callable[..., Tensor], tuple[Tensor, ...]] = {
        lambda m, h, w, **o: m.linear_cross_entropy(h, w, y, **o): (hidden, w),
        lambda m, h, w, g, v, **o: m.linear_kl_div(h, w, g, target_linear_weight=v, **o): (
            hidden, w, teacher, v,
        ),
    }  # fmt: skip
    # A new mesh of some ranks would wait for the others.
    mesh = init_device_mesh("cpu", (4,)) if group is None else DeviceMesh.from_group(group, "cpu")
    for reduction in ("none", "mean"):
        for loss, leaves in losses.items():
            truth, *exact = value_and_gradients(
                lambda *a, f=loss, r=reduction: f(fastdiv, *a, reduction=r),
                *(leaf.double() for leaf in leaves),
            )
            how = {"reduction": reduction, "logits_dtype": torch.float32}
            ours = partial(loss, sharded, group=group, chunk_size=7, **how)
            parts = [leaf[mine] if i % 2 else leaf for i, leaf in enumerate(leaves)]
            exact = [g[mine] if i % 2 else g for i, g in enumerate(exact)]
            for multiplies in (True, False):
                with patch.object(tiles, "multiplies", lambda half, m=multiplies: m):
                    value, *found = value_and_gradients(ours, *parts)
                same(value.double(), truth, 1e-5)
                for a, b in zip(found, exact, strict=True):
                    same(a.double() / b.abs().max(), b / b.abs().max(), 1e-2)
            with fastdiv.backend("reference"):
                same(ours(*parts).double(), truth, 1e-5)
            placed = [
                distribute_tensor(leaf, mesh, [Shard(0)]) if i % 2 else leaf
                for i, leaf in enumerate(leaves)
            ]
            with patch.object(tiles, "multiplies", lambda half: True):
                value = loss(fastdiv, *placed, **how)
            same(value.full_tensor().double(), truth, 1e-5)
    h, own = hidden.clone().requires_grad_(), w[mine].clone().requires_grad_()
    value = sharded.linear_cross_entropy(h, own, y, group=group, logits_dtype=torch.float32)
    (first,) = torch.autograd.grad(value, h, create_graph=True)
    second = torch.autograd.grad(first.float().square().sum(), own)[0]
    assert second.dtype == torch.bfloat16 and second.isfinite().all() and second.any()
    for wrong in (torch.float64, None if rank else torch.float32):
        try:
            sharded.linear_cross_entropy(hidden, own, y, group=group, logits_dtype=wrong)
        except (ValueError, RuntimeError) as error:
            assert "logits_dtype must be" in str(error) or "dtype of logits" in str(error), error
        else:
            raise AssertionError(f"{wrong} was accepted")


def infinite(group: Any, rank: int, like_gpu: bool) -> list[str]:
    """Rows of infinite divergence, and a shard without mass, of layers; teachers' gradients too.

    A GPU is not asked whether there are such rows: ``like_gpu`` does what is done there.
    """
    sizes, found, wrong = SIZES[size_of(group)], [], []
    mine, last = classes_of(rank, sizes), classes_of(len(sizes) - 1, sizes)
    hidden, teacher = make_inputs((40, 24), torch.float32, scale=1.0, seed=1)
    w, v = make_inputs((sum(sizes), 24), torch.float32, scale=0.5, seed=2)
    one, shard = torch.zeros(sum(sizes)), torch.zeros(sum(sizes))
    one[sizes[0] + 1], shard[last] = -math.inf, -math.inf
    t = teacher @ v.t()
    t[::2, sizes[0] + 1] = -math.inf  # which makes these rows finite
    t[::2, last] = -math.inf
    p = t.softmax(-1)

    def layers(m: Any, h: Tensor, g: Tensor, w: Tensor, v: Tensor, b: Tensor, **o: Any) -> Tensor:
        return m.linear_kl_div(h, w, g, target_linear_weight=v, linear_bias=b, **o)

    asked = infinite_rows.none_found
    if like_gpu:
        infinite_rows.none_found = lambda found: False
    try:
        for name, bias in (("one class", one), ("a shard", shard)):
            for kind, target in (("layers", teacher), ("logits", t), ("probs", p)):
                dense = kind != "layers"
                f = layers
                if dense:
                    f = lambda m, h, t, w, b, k=kind, **o: m.linear_kl_div(  # noqa: E731
                        h, w, t, target_type=k, linear_bias=b, **o
                    )
                weights = (w,) if dense else (w, v)
                whole = value_and_gradients(
                    lambda *a, f=f, b=bias: f(fastdiv, *a, b, reduction="none"),
                    *(hidden, target, *weights),
                )
                ours = value_and_gradients(
                    lambda *a, f=f, b=bias[mine]: f(
                        sharded, *a, b, reduction="none", group=group, chunk_size=7
                    ),
                    *(hidden, target[:, mine] if dense else target),
                    *(m[mine] for m in weights),
                )
                expected = (
                    *whole[:2],
                    whole[2][:, mine] if dense else whole[2],
                    *(g[mine] for g in whole[3:]),
                )
                for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
                    try:
                        same(a, b, 1e-4)
                    except AssertionError as error:
                        wrong.append(f"{name}, {kind}, tensor {i}: {error}")
                found.append(digest(*ours[:2]))
    finally:
        infinite_rows.none_found = asked
    assert not wrong, "\n".join(wrong)
    return found


def linear_memory(group: Any, rank: int) -> int:
    """The most numbers that a forward and a backward hold at a time in one tensor."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            for v in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(v, Tensor):
                    self.most = max(self.most, v.untyped_storage().nbytes() // v.element_size())
            return out

    h = torch.randn(1024, 8, requires_grad=True)
    w = torch.randn(3000, 8, requires_grad=True)
    with Largest() as largest:
        sharded.linear_cross_entropy(h, w, torch.arange(1024), group=group).backward()
    return largest.most


def linear_flops(group: Any, rank: int) -> dict[str, int]:
    """Products of a shard's layer that a forward and a backward count, by loss."""
    h, t = torch.randn(2, 6, 8).unbind()
    w = torch.randn(10, 8, requires_grad=True)
    losses = {
        "cross_entropy": lambda: sharded.linear_cross_entropy(h, w, torch.arange(6), group=group),
        "kl_div": lambda: sharded.linear_kl_div(
            h, w, t, target_linear_weight=w.detach(), group=group
        ),
    }
    found = {}
    for name, loss in losses.items():
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        found[name] = counter.get_total_flops() // (2 * 6 * 8 * 10)
    return found
