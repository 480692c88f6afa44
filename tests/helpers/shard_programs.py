"""What people do with sharded losses, as the ranks of the distributed tests do it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fastdiv
import fastdiv.distributed as sharded
from helpers.cases import make_inputs
from helpers.shards import SIZES, classes_of, digest, size_of
from helpers.values import same, value_and_gradients


def problem(group: Any, rank: int, dtype: torch.dtype = torch.float32) -> Any:
    """Logits, teacher, labels (one of them ignored), and which classes are this rank's."""
    sizes = SIZES[size_of(group)]
    x, t = make_inputs((12, sum(sizes)), dtype)
    y = t.argmax(-1)
    y[3] = -100
    return x, t, y, classes_of(rank, sizes)


# --- autograd ---------------------------------------------------------------------------------


def backwards(group: Any, rank: int) -> None:
    """A second loss call, a retained graph, accumulation, in place, second derivatives, func."""
    x, t, y, mine = problem(group, rank)
    expected = value_and_gradients(lambda x: fastdiv.cross_entropy(x, y), x)[1][:, mine]

    def loss(x: Tensor, **options: Any) -> Tensor:
        return sharded.cross_entropy(x, y, group=group, **options)

    shard = x[:, mine].clone().requires_grad_()
    first, second = loss(shard), loss(shard)
    first.backward(retain_graph=True)
    same(shard.grad, expected)
    first.backward()
    second.backward()
    same(shard.grad, 3 * expected)

    over = shard.detach().clone().requires_grad_() * 1.0
    over.retain_grad()
    memory = over.data_ptr()
    (grad,) = torch.autograd.grad(loss(over, inplace_backward=True), over)
    same(grad, expected)
    assert grad.data_ptr() == memory

    def curvature(loss: Any, x: Tensor, v: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad(g, x, v)[0]

    # The Hessian times a vector, of which every rank has its part.
    whole = curvature(lambda x: fastdiv.cross_entropy(x, y), x, t)[:, mine]
    same(curvature(loss, x[:, mine], t[:, mine]), whole)
    same(torch.func.grad(loss)(x[:, mine]), expected)
    _, tangent = torch.func.jvp(loss, (x[:, mine],), (t[:, mine],))
    same(tangent, torch.func.jvp(lambda x: fastdiv.cross_entropy(x, y), (x,), (t,))[1])
    per_row = torch.func.vmap(torch.func.grad(lambda x: sharded.entropy(x, group=group)))
    same(per_row(x[:, mine]), torch.func.vmap(torch.func.grad(fastdiv.entropy))(x)[:, mine])

    h, w = x[:, :9], x.t()[:, :9].contiguous()
    label = torch.zeros(len(h), dtype=torch.int64)
    whole = curvature(lambda h: fastdiv.linear_cross_entropy(h, w, label), h, t[:, :9])
    ours = curvature(
        lambda h: sharded.linear_cross_entropy(h, w[mine], label, group=group), h, t[:, :9]
    )
    same(ours, whole)


def statistics(group: Any, rank: int) -> None:
    x, t, y, mine = problem(group, rank)
    x[:, 0] = x[:, -1] = 20.0  # of two largest logits the first
    for target, part in ((y, y), (t.softmax(-1), t.softmax(-1)[:, mine])):
        loss, expected = fastdiv.cross_entropy(x, target, return_stats=True, label_smoothing=0.1)
        value, found = sharded.cross_entropy(
            x[:, mine], part, return_stats=True, label_smoothing=0.1, group=group
        )
        same(value, loss)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            same(a, b)
    w = torch.eye(x.shape[1])
    _, expected = fastdiv.linear_cross_entropy(x, w, y, return_stats=True)
    _, found = sharded.linear_cross_entropy(x, w[mine], y, return_stats=True, group=group)
    for a, b in zip(found, expected, strict=True):
        same(a, b)


# --- compilers and other parallelism ----------------------------------------------------------


def compiled(group: Any, rank: int) -> list[str]:
    x, t, y, mine = problem(group, rank)
    w = make_inputs((x.shape[1], 9), torch.float32)[0]

    def losses(x: Tensor, t: Tensor, h: Tensor, w: Tensor) -> Tensor:
        value = sharded.cross_entropy(2 * x, y, label_smoothing=0.1, group=group)
        value = value + sharded.js_div(x, t, target_type="logits", group=group)
        value = value + sharded.log_prob(x, y.clamp(min=0), group=group).sum()
        both = sharded.linear_cross_entropy(h, w, y, group=group, mean_group=group)
        return value + both + sharded.linear_kl_div(h, w, t, target_type="logits", group=group)

    arguments = (x[:, mine], t[:, mine], x[:, :9], w[mine])
    eager = value_and_gradients(losses, *arguments)
    traced = value_and_gradients(
        torch.compile(losses, fullgraph=True, backend="aot_eager"), *arguments
    )
    for a, b in zip(traced, eager, strict=True):
        same(a, b)

    def rows(x: Tensor, h: Tensor, w: Tensor) -> Tensor:
        label = torch.zeros(len(x), dtype=torch.int64)
        value = sharded.cross_entropy(x, label, reduction="batchmean", group=group)
        return value + sharded.linear_cross_entropy(h, w, label, group=group)

    dynamic = torch.compile(rows, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (12, 7):
        some = (x[:count, mine], x[:count, :9], w[mine])
        for a, b in zip(
            value_and_gradients(dynamic, *some), value_and_gradients(rows, *some), strict=True
        ):
            same(a, b)

    def loss(x: Tensor) -> Tensor:
        return sharded.entropy(x * 1.0, group=group)

    built = value_and_gradients(torch.compile(loss, fullgraph=True), arguments[0])
    for a, b in zip(built, value_and_gradients(loss, arguments[0]), strict=True):
        same(a, b)
    return [digest(traced[0], built[0])]


def changing_options(group: Any, rank: int) -> None:
    """Options that change from step to step take two graphs, and mean what they mean eagerly."""
    x, t, y, mine = problem(group, rank)
    w = make_inputs((x.shape[1], 9), torch.float32)[0]

    def losses(x: Tensor, t: Tensor, h: Tensor, w: Tensor, v: float) -> Tensor:
        value = sharded.cross_entropy(
            2 * x, y, label_smoothing=v / 10, temperature=v, z_loss=v, group=group
        )
        value = value + sharded.js_div(x, t, target_type="logits", beta=v / 4, group=group)
        return value + sharded.linear_cross_entropy(h, w, y, softcap=10 * v, group=group)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    arguments = (x[:, mine], t[:, mine], x[:, :9], w[mine])
    for v in (1.5, 2.25, 0.75, 3.0):
        traced = value_and_gradients(lambda *tensors, v=v: compiled(*tensors, v), *arguments)
        eager = value_and_gradients(lambda *tensors, v=v: losses(*tensors, v), *arguments)
        for a, b in zip(traced, eager, strict=True):
            same(a, b)
    assert counter.frame_count == 2, counter.frame_count


def fake(group: Any, rank: int) -> None:
    """Under FakeTensorMode, as memory is estimated, no rank asks another, nor any tensor."""
    with FakeTensorMode():
        x, t, w = torch.randn(6, 5), torch.randn(6, 5), torch.randn(5, 3)
        h, y = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
        losses: list[tuple[Any, list[Tensor]]] = [
            (lambda x: sharded.cross_entropy(x, y, label_smoothing=0.1, group=group), [x]),
            (lambda x: sharded.entropy(x, reduction="mean", mean_group=group, group=group), [x]),
            (lambda x: sharded.log_prob(x, y, group=group), [x]),
            (lambda x: sharded.log_prob_and_entropy(x, y, group=group)[1], [x]),
            (lambda h, w: sharded.linear_cross_entropy(h, w, y, group=group), [h, w]),
            (lambda h, w, t: sharded.linear_kl_div(
                h, w, t, target_type="logits", num_classes=9, group=group
            ), [h, w, t]),
        ]  # fmt: skip
        for name in ("kl_div", "reverse_kl_div", "js_div"):
            f = getattr(sharded, name)
            losses.append(
                (lambda x, t, f=f: f(x, t, target_type="logits", group=group), [x, t])  # type: ignore[misc]
            )
        for loss, tensors in losses:
            for a, b in zip(value_and_gradients(loss, *tensors)[1:], tensors, strict=True):
                assert a.shape == b.shape and isinstance(a, FakeTensor)
        try:
            sharded.entropy(x, reduction="all", group=group)
        except ValueError:
            return
        raise AssertionError("no ValueError")


def dtensors(group: Any, rank: int) -> None:
    """Values, gradients and placements of torch's own loss_parallel; losses that it lacks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, t = make_inputs((6, 13), torch.float32)
    y = t.argmax(-1)
    logits = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
    for reduction in ("mean", "sum", "none"):
        with loss_parallel():
            expected = F.cross_entropy(logits, y, reduction=reduction)
            gradient = torch.autograd.grad(expected.sum(), logits)[0]
        ours = fastdiv.cross_entropy(logits, y, reduction=reduction)
        assert isinstance(ours, DTensor) and ours.placements == expected.placements
        same(ours.to_local(), expected.to_local())
        ours.sum().backward()
        assert logits.grad.placements == (Shard(1),)
        same(logits.grad.full_tensor(), gradient.full_tensor())
        logits.grad = None
    # Plain tensors are the same on all ranks, and cut; keywords and statistics.
    teacher = distribute_tensor(t, mesh, [Shard(1)])
    whole = fastdiv.kl_div(x, t, target_type="logits")
    for target in (t, teacher):
        same(fastdiv.kl_div(logits, target, target_type="logits").to_local(), whole)
    weight = torch.rand(13)
    value, stats = fastdiv.cross_entropy(
        input=logits, target=y, weight=weight, label_smoothing=0.1, return_stats=True
    )
    same(value.to_local(), fastdiv.cross_entropy(x, y, weight, label_smoothing=0.1))
    assert stats.argmax.full_tensor().equal(x.argmax(-1))
    same(fastdiv.log_prob_and_entropy(logits, y)[1].to_local(), fastdiv.entropy(x))

    hidden = x[:, :5].clone().requires_grad_()
    matrix = make_inputs((13, 5), torch.float32)[0]
    expected = value_and_gradients(
        lambda h, w: fastdiv.linear_cross_entropy(h, w, y), hidden, matrix
    )
    cut = distribute_tensor(matrix, mesh, [Shard(0)]).requires_grad_()
    fastdiv.linear_cross_entropy(hidden, cut, y).backward()
    same(hidden.grad, expected[1], 2e-5)
    same(cut.grad.full_tensor(), expected[2], 2e-5)

    for error, call in (
        (TypeError, lambda: fastdiv.tv_distance(logits, teacher, target_type="logits")),
        (ValueError, lambda: fastdiv.entropy(distribute_tensor(x[:, :2], mesh, [Shard(1)]))),
    ):
        try:
            call()
        except error:
            continue
        raise AssertionError(f"no {error.__name__}")

    mesh = init_device_mesh("cpu", (2, 2))
    logits = distribute_tensor(x, mesh, [Shard(0), Shard(1)]).requires_grad_()
    rows = distribute_tensor(y, mesh, [Shard(0), Replicate()])
    value, dx = value_and_gradients(lambda x: fastdiv.cross_entropy(x, y, reduction="sum"), x)
    ours = fastdiv.cross_entropy(logits, rows, reduction="sum")
    ours.backward()
    same(ours.full_tensor(), value)
    same(logits.grad.full_tensor(), dx)
    each = fastdiv.cross_entropy(logits, rows, reduction="none")
    assert each.placements == (Shard(0), Replicate())
    same(each.full_tensor(), fastdiv.cross_entropy(x, y, reduction="none"))


def data_parallel(group: Any, rank: int) -> float:
    """DDP over shards of the batch, of which one has no token that counts: the mean over all."""
    size = size_of(group)
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 17)
    h, y = torch.randn(4 * size, 5), torch.randint(0, 17, (4 * size,))
    y[: 4 + 3] = -100  # none of rank 0's, one of rank 1's
    fastdiv.cross_entropy(model(h), y).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    copy = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    of_rank = slice(4 * rank, 4 * rank + 4)
    total = fastdiv.cross_entropy(copy(h[of_rank]), y[of_rank], reduction="sum")
    loss = sharded.token_mean(total, (y[of_rank] != -100).sum(), group)
    loss.backward()
    same(model.weight.grad, expected)
    if size == 4:  # two halves of the vocabulary, and two of the batch
        mesh = init_device_mesh("cpu", (2, 2))
        batch, classes = mesh.get_group(0), mesh.get_group(1)
        of_rank = slice(8 * (rank // 2), 8 * (rank // 2) + 8)
        half = slice(0, 8) if rank % 2 == 0 else slice(8, 17)
        weight = model.weight.detach()[half].clone().requires_grad_()
        share = sharded.linear_cross_entropy(
            h[of_rank],
            weight,
            y[of_rank],
            linear_bias=model.bias.detach()[half],
            group=classes,
            mean_group=batch,
        )
        share.backward()
        dist.all_reduce(weight.grad, group=batch)
        same(weight.grad / 2, expected[half])
    average = loss.detach().clone()
    dist.all_reduce(average, group=group)
    same(average / size, fastdiv.cross_entropy(copy(h), y))
    nothing = sharded.token_mean(torch.zeros(()), 0, group)
    assert nothing.isnan()
    return float(average)
