"""DTensors in the plain functions, as the ranks of the distributed tests see them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastdiv
from helpers.cases import make_inputs
from helpers.shard_failures import outcome
from helpers.values import same, value_and_gradients

ROWS, CLASSES, WIDTH = 6, 13, 5  # neither of the first two can be shared out evenly by four
PLACEMENTS = {
    "replicated": ((4,), [Replicate()]),
    "rows": ((4,), [Shard(0)]),
    "classes": ((4,), [Shard(1)]),
    "rows and classes": ((2, 2), [Shard(0), Shard(1)]),
    "classes and rows": ((2, 2), [Shard(1), Shard(0)]),
    "rows, replicated": ((2, 2), [Shard(0), Replicate()]),
    "classes, replicated": ((2, 2), [Replicate(), Shard(1)]),
    "rows twice": ((2, 2), [Shard(0), Shard(0)]),
}

WHOLE_ROWS = ("replicated", "rows", "rows, replicated")


def compare(
    what: str, loss: Callable[..., Any], plain: list[Tensor], placed: list[Tensor]
) -> list[str]:
    """Values and gradients of DTensors against those of plain tensors, and where they are."""
    found = []
    results = []
    for tensors in (plain, placed):
        leaves = [
            v.detach().clone().requires_grad_() if v.is_floating_point() else v for v in tensors
        ]
        values = loss(*leaves)
        values = values if isinstance(values, tuple) else (values,)
        sum((v * (i + 1)).sum() for i, v in enumerate(values)).backward()
        results.append((values, [(v, v.grad) for v in leaves if v.is_floating_point()]))
    (expected, of_plain), (values, of_placed) = results
    try:
        for v, e in zip(values, expected, strict=True):
            assert isinstance(v, DTensor) and v.shape == e.shape, (v, e.shape)
            close(v.full_tensor(), e)
        for (leaf, grad), (_, e) in zip(of_placed, of_plain, strict=True):
            if isinstance(leaf, DTensor):
                assert grad.placements == leaf.placements, (grad.placements, leaf.placements)
                grad = grad.full_tensor()
            close(grad, e)
    except AssertionError as error:
        found.append(f"{what}: {error}")
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding of the largest entries, which sums in another order bring."""
    size = max(1.0, float(expected.detach().abs().max()))
    same(actual / size, expected / size, 1e-5)


def take(function: Any, **options: Any) -> dict[str, Any]:
    """Those that the function has."""
    known = inspect.signature(function).parameters
    return {k: v for k, v in options.items() if k in known}


def functions_of_logits(group: Any, rank: int, where: str) -> None:
    """Every function and reduction; labels and teachers as plain tensors, or placed."""
    x, t = make_inputs((ROWS, CLASSES), torch.float32)
    y, wrong = t.argmax(-1), []
    y[:2] = -100  # all of the first rank's rows
    index, weight = y.clamp(min=0), torch.linspace(0.5, 2.0, CLASSES)
    token_weight = torch.arange(ROWS) / 2.0
    top = t.log_softmax(-1).topk(3)
    divergences = {"target_type": "logits", "alpha": 0.5, "skew": 0.2}
    cases: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
        **{n: ([x, t], divergences) for n in fastdiv.__all__ if n.endswith(("_div", "_distance"))},
        "entropy": ([x], {}),
        "log_prob": ([x, index], {}),
        "log_prob_and_entropy": ([x, index], {}),
        **{
            name: ([x, top.values, top.indices], {"values_type": "log_probs"})
            for name in ("topk_kl_div", "topk_reverse_kl_div", "topk_js_div")
        },
        "cross_entropy": ([x, y], {"label_smoothing": 0.1, "weight": weight, "z_loss": 0.1}),
    }
    cases = {n: c for n, c in cases.items() if not n.startswith("linear")}
    shape, placements = PLACEMENTS[where]
    mesh = init_device_mesh("cpu", shape)
    of_rows = [Replicate() if p == Shard(1) else p for p in placements]
    for name, (tensors, options) in cases.items():
        function = getattr(fastdiv, name)
        if not hasattr(fastdiv.distributed, name) and where not in WHOLE_ROWS:
            continue
        placed = [distribute_tensor(x, mesh, placements)]
        for v in tensors[1:]:
            as_input = v.dim() == 2
            placed.append(distribute_tensor(v, mesh, placements if as_input else of_rows))
        reductions = ["none", "sum", "mean", "batchmean"]
        if "reduction" not in inspect.signature(function).parameters:
            reductions = ["none"]
        for reduction in reductions:
            more = {"token_weight": token_weight} if reduction == "mean" else {}
            how = take(function, **options, **more, reduction=reduction)
            loss = lambda *v, f=function, o=how: f(*v, **o)  # noqa: E731
            wrong += compare(f"{name} {reduction} {where}", loss, tensors, placed)
        wrong += compare(f"{name}, plain, {where}", loss, tensors, [placed[0], *tensors[1:]])
    assert not wrong, "\n".join(wrong)


def terms_and_statistics(group: Any, rank: int) -> None:
    """Of rows that are shared out, one rank having none of them."""
    x, t = make_inputs((ROWS, CLASSES), torch.float32)
    y, mesh = t.argmax(-1), init_device_mesh("cpu", (4,))
    rows = distribute_tensor(x, mesh, [Shard(0)])
    terms = lambda x, t: fastdiv.kl_div(x, t, target_type="logits", reduction="pointwise")  # noqa: E731
    assert not compare("pointwise", terms, [x, t], [rows, t])
    value, stats = fastdiv.cross_entropy(rows, y, return_stats=True)
    close(value.full_tensor(), fastdiv.cross_entropy(x, y))
    assert stats.argmax.placements == (Shard(0),)
    assert stats.argmax.full_tensor().equal(x.argmax(-1))
    leaf = rows.clone().requires_grad_()
    assert outcome(lambda: fastdiv.cross_entropy(leaf, y, inplace_backward=True))[0] == "ValueError"
    own = leaf * 1
    memory = own.to_local().data_ptr()
    fastdiv.cross_entropy(own, y, inplace_backward=True).backward()
    expected = value_and_gradients(lambda x: fastdiv.cross_entropy(x, y), x)[1]
    same(leaf.grad.full_tensor(), expected)
    if own.to_local().numel():
        assert own.to_local().data_ptr() == memory
        mine = slice(2 * rank, 2 * rank + 2)
        same(own.to_local().detach(), expected[mine])  # overwritten
    # One row, of which two of the ranks have nothing.
    both = init_device_mesh("cpu", (2, 2))
    for name in ("cross_entropy", "js_div"):
        target = y[:1] if name == "cross_entropy" else t[:1]
        options = {} if name == "cross_entropy" else {"target_type": "logits"}
        loss = lambda x, t, n=name, o=options: getattr(fastdiv, n)(x, t, **o)  # noqa: E731
        row = distribute_tensor(x[:1], both, [Shard(0), Shard(1)])
        assert not compare("one row", loss, [x[:1], target], [row, target])
    many = distribute_tensor(torch.ones(5, 2, WIDTH), mesh, [Shard(0)])
    kind, text = outcome(lambda: fastdiv.linear_cross_entropy(x[:, :WIDTH], many, y))
    assert kind == "ValueError" and "more than two dimensions" in text


def functions_of_layers(group: Any, rank: int) -> None:
    """Every linear function; hidden states and weights placed in every way that fits."""
    h, g = make_inputs((ROWS, WIDTH), torch.float32, scale=1.0)
    w, v = make_inputs((CLASSES, WIDTH), torch.float32, scale=1.0, seed=1)
    b, y, wrong = w[:, 0].contiguous(), (h @ w.t()).argmax(-1), []
    y[:2] = -100
    ways = [
        ((4,), [Replicate()], [Shard(0)]),
        ((4,), [Shard(0)], [Shard(0)]),
        ((4,), [Shard(0)], [Shard(1)]),
        ((4,), [Shard(0)], [Replicate()]),
        ((4,), [Replicate()], [Replicate()]),
        ((2, 2), [Shard(0), Replicate()], [Shard(0), Shard(0)]),
        ((2, 2), [Shard(0), Replicate()], [Replicate(), Shard(0)]),
    ]

    def cross_entropy(h: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
        return fastdiv.linear_cross_entropy(h, w, y, linear_bias=b, **options)

    def of_layers(f: Any) -> Any:
        return lambda h, w, g, v, b, **o: f(
            h, w, g, target_linear_weight=v, target_linear_bias=b, **o
        )

    def both(h: Tensor, w: Tensor, b: Tensor, **_: Any) -> Any:
        return fastdiv.linear_log_prob_and_entropy(h, w, y.clamp(min=0), linear_bias=b)

    cases: dict[str, Any] = {
        "linear_cross_entropy": (cross_entropy, [h, w, b]),
        "linear_kl_div": (of_layers(fastdiv.linear_kl_div), [h, w, g, v, b]),
        "linear_reverse_kl_div": (of_layers(fastdiv.linear_reverse_kl_div), [h, w, g, v, b]),
        "linear_js_div": (of_layers(fastdiv.linear_js_div), [h, w, g, v, b]),
        "linear_log_prob_and_entropy": (both, [h, w, b]),
    }
    for shape, of_h, of_w in ways:
        mesh = init_device_mesh("cpu", shape)
        classes = any(p == Shard(0) and q == Replicate() for p, q in zip(of_w, of_h, strict=True))
        for name, (function, tensors) in cases.items():
            if classes and not hasattr(fastdiv.distributed, name):
                continue
            of_b = [Replicate() if p == Shard(1) else p for p in of_w]
            places = {ROWS: of_h, CLASSES: of_w}
            placed = [
                distribute_tensor(v, mesh, places[len(v)] if v.dim() == 2 else of_b)
                for v in tensors
            ]
            for reduction in ("none", "sum", "mean", "batchmean"):
                loss = lambda *v, f=function, r=reduction: f(*v, reduction=r)  # noqa: E731
                what = f"{name} {reduction} {of_h} {of_w}"
                wrong += compare(what, loss, tensors, placed)
            # With a plain weight, or plain hidden states, that are whole on every rank.
            if name == "linear_cross_entropy":
                wrong += compare(f"{what}, plain layer", loss, tensors, [placed[0], w, b])
                if Shard(1) not in of_w and len(shape) == 1 and classes:
                    wrong += compare(f"{what}, plain rows", loss, tensors, [h, *placed[1:]])
    assert not wrong, "\n".join(wrong)


def fsdp(group: Any, rank: int) -> tuple[str, str]:
    """Placed rows give the loss of all ranks; what is computed from a weight is refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = nn.Linear(WIDTH, CLASSES)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    fully_shard(layer, mesh=mesh)
    h = make_inputs((8, WIDTH), torch.float32)[0]
    y = torch.arange(8)
    mine = slice(2 * rank, 2 * rank + 2)
    refused = outcome(lambda: fastdiv.linear_cross_entropy(h[mine], 2 * layer.weight, y[mine]))
    weight.requires_grad_(), bias.requires_grad_()
    expected = fastdiv.linear_cross_entropy(h, weight, y, linear_bias=bias)
    expected.backward()

    def rows(v: Tensor) -> DTensor:
        return DTensor.from_local(v[mine], mesh, [Shard(0)])

    loss = fastdiv.linear_cross_entropy(rows(h), layer.weight, rows(y), linear_bias=layer.bias)
    loss.backward()
    same(loss.full_tensor(), expected)
    for ours, whole in ((layer.weight, weight), (layer.bias, bias)):
        assert ours.grad.placements == ours.placements
        same(ours.grad.full_tensor(), whole.grad)
        ours.grad = None
    # FSDP2's own call averages the ranks' gradients of their own means.
    fastdiv.cross_entropy(layer(h[mine]), y[mine]).backward()
    same(layer.weight.grad.full_tensor(), weight.grad)
    return refused


def plain_tensors(group: Any, rank: int) -> dict[str, tuple[str, str]]:
    """Plain tensors beside DTensors that are not the same on the last rank."""
    x, t = make_inputs((ROWS, CLASSES), torch.float32)
    y, odd = t.argmax(-1), rank == 3
    found = {}
    for where in ("classes", "rows", "rows and classes"):
        shape, placements = PLACEMENTS[where]
        mesh = init_device_mesh("cpu", shape)
        logits = distribute_tensor(x, mesh, placements)
        other = y.flip(0) if odd else y
        found[f"labels, {where}"] = outcome(lambda x=logits, y=other: fastdiv.cross_entropy(x, y))
        other = t + odd
        found[f"teacher, {where}"] = outcome(
            lambda x=logits, t=other: fastdiv.kl_div(x, t, target_type="logits")
        )
    return found


def without_values(group: Any, rank: int) -> None:
    """Where values may not be read, as on a GPU, a tensor that differs makes the loss NaN."""
    h, _ = make_inputs((ROWS, WIDTH), torch.float32)
    w = make_inputs((CLASSES, WIDTH), torch.float32, seed=1)[0]
    y, read = torch.arange(ROWS), fastdiv._engine.arguments.values_may_be_read
    fastdiv._engine.arguments.values_may_be_read = lambda v: False
    try:
        for shape in ((4,), (2, 2)):
            mesh = init_device_mesh("cpu", shape)
            placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
            weight = distribute_tensor(w, mesh, placements)
            same(
                fastdiv.linear_cross_entropy(h, weight, y).to_local(),
                fastdiv.linear_cross_entropy(h, w, y),
            )
            own = (h + rank).requires_grad_()
            loss = fastdiv.linear_cross_entropy(own, weight, y)
            loss.backward()
            assert loss.to_local().isnan() and own.grad.isnan().all()
    finally:
        fastdiv._engine.arguments.values_may_be_read = read
