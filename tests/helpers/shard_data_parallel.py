"""Run linear losses whose weights FSDP2 shards, and compare with one process without it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fastdiv
from helpers.shard_failures import outcome
from helpers.values import same

WIDTH, CLASSES, ROWS = 6, 13, 5  # neither two nor four ranks have as many classes each
HALF = torch.bfloat16
POLICIES = {
    "float32": MixedPrecisionPolicy(),
    "bfloat16": MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=torch.float32),
    "bfloat16 sums": MixedPrecisionPolicy(param_dtype=HALF),
}
Loss = Callable[[Tensor, Any, Tensor], Tensor]


class Model(nn.Module):
    """A body and a head, whose loss is computed in the forward, or by the caller."""

    def __init__(self, loss: Loss, inside: bool, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.body = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = HEADS.get(loss, nn.Linear)(WIDTH, CLASSES, bias=True)
        if tied:
            self.layer.weight = self.embed.weight
        self.loss, self.inside = loss, inside

    @property
    def layer(self) -> nn.Linear:
        return getattr(self.head, "linear", self.head)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        h = self.body(self.embed(tokens))
        return self.loss(h, self.head, labels) if self.inside else h

    def value(self, tokens: Tensor, labels: Tensor) -> Tensor:
        out = self(tokens, labels)
        return out if self.inside else self.loss(out, self.head, labels)


def cross_entropy(h: Tensor, head: nn.Linear, y: Tensor) -> Tensor:
    return fastdiv.linear_cross_entropy(h, head.weight, y, linear_bias=head.bias, z_loss=0.1)


def per_row(h: Tensor, head: nn.Linear, y: Tensor) -> Tensor:
    """Logits are computed again in the backward."""
    return fastdiv.linear_cross_entropy(
        h, head.weight, y, linear_bias=head.bias, reduction="none"
    ).mean()


def log_probs(h: Tensor, head: nn.Linear, y: Tensor) -> Tensor:
    lp, entropy = fastdiv.linear_log_prob_and_entropy(h, head.weight, y, linear_bias=head.bias)
    return (entropy - lp).mean()


def teacher(h: Tensor, head: nn.Linear, y: Tensor) -> Tensor:
    """Both layers are the same head, so that its weight is gathered twice."""
    options = {"target_linear_weight": head.weight, "target_linear_bias": head.bias}
    return sum(
        f(h, head.weight, 2 * h.detach(), linear_bias=head.bias, **options)
        for f in (fastdiv.linear_kl_div, fastdiv.linear_reverse_kl_div, fastdiv.linear_js_div)
    )


def divergence(h: Tensor, head: nn.Linear, y: Tensor) -> Tensor:
    options = {"target_linear_weight": head.weight, "target_linear_bias": head.bias}
    return fastdiv.linear_kl_div(h, head.weight, 2 * h, linear_bias=head.bias, **options)


def module(h: Tensor, head: nn.Module, y: Tensor) -> Tensor:
    return head(h, y)


def module_per_row(h: Tensor, head: nn.Module, y: Tensor) -> Tensor:
    return head(h, y).mean()


def module_of_log_probs(h: Tensor, head: nn.Module, y: Tensor) -> Tensor:
    lp, entropy = head(h, y)
    return (entropy - lp).mean()


HEADS = {
    module: fastdiv.nn.LinearCrossEntropyLoss,
    module_per_row: partial(fastdiv.nn.LinearCrossEntropyLoss, reduction="none"),
    module_of_log_probs: fastdiv.nn.LinearLogProbAndEntropy,
}
LOSSES = (cross_entropy, per_row, log_probs, teacher)


def mesh_of(group: Any) -> DeviceMesh:
    size = dist.get_world_size(group)
    return init_device_mesh("cpu", (4,)) if size == 4 else DeviceMesh.from_group(group, "cpu")


def batches(size: int, steps: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of every step and rank."""
    torch.manual_seed(2)
    return torch.randint(CLASSES, (2, steps, size, ROWS)).unbind()


def one_process(model: Model, tokens: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Leave the mean of the ranks' gradients in ``model``, and return the ranks' losses."""
    values: list[Tensor] = []
    for x, y in zip(tokens, labels, strict=True):
        copy = Model(model.loss, model.inside, model.layer.weight is model.embed.weight)
        copy.load_state_dict(model.state_dict())
        copy.to(dtype)
        values.append(copy.value(x, y))
        values[-1].backward()
        for whole, of_rank in zip(model.parameters(), copy.parameters(), strict=True):
            mean = of_rank.grad.to(whole.dtype) / len(tokens)
            whole.grad = mean if whole.grad is None else whole.grad + mean
    return values


def compare_gradients(sharded: nn.Module, plain: nn.Module, tolerance: float, what: str) -> None:
    for (name, ours), whole in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad.placements == ours.placements, (what, name, ours.grad.placements)
        assert ours.grad.dtype == whole.grad.dtype, (what, name)
        error = (ours.grad.full_tensor() - whole.grad).abs().max() / whole.grad.abs().max()
        assert error < tolerance, f"{what}, {name}: {error}"


def train(
    mesh: DeviceMesh,
    rank: int,
    loss: Loss,
    policy: str,
    *,
    inside: bool,
    own: bool | str,
    reshard: bool | int | None,
    tied: bool = False,
    accumulate: bool = False,
) -> None:
    """Two steps of SGD, or two batches of one step, with rows of its own on every rank."""
    what = f"{loss.__name__} {policy} {inside=} {own=} {reshard=} {tied=} {accumulate=}"
    size = mesh.size()
    dtype = HALF if POLICIES[policy].param_dtype else torch.float32
    # One process rounds the sum of several gradients of a weight, and a half sums those of ranks.
    rounds = policy == "bfloat16 sums" or (dtype == HALF and loss is teacher or tied or accumulate)
    tolerance = 2e-2 if rounds and dtype == HALF else 1e-5
    plain, sharded = Model(loss, inside, tied), Model(loss, inside, tied)
    options = {"mesh": mesh, "mp_policy": POLICIES[policy], "reshard_after_forward": reshard}
    if own:
        fully_shard(sharded.layer if own == "layer" else sharded.head, **options)
    fully_shard(sharded, **options)
    for step, (x, y) in enumerate(zip(*batches(size, 2), strict=True)):
        if accumulate:
            sharded.set_requires_gradient_sync(step == 1)
        value = sharded.value(x[rank], y[rank])
        same(value.detach(), one_process(plain, x, y, dtype)[rank].detach(), 1e-5)
        value.backward()
        if accumulate and step == 0:
            continue
        compare_gradients(sharded, plain, tolerance, what)
        with torch.no_grad():
            for ours, whole in zip(sharded.parameters(), plain.parameters(), strict=True):
                ours -= 0.1 * ours.grad
                whole -= 0.1 * ours.grad.full_tensor()
                ours.grad = whole.grad = None


def functions(group: Any, rank: int, policy: str) -> None:
    """A function in the model's forward and after it, with the head in either group."""
    mesh = mesh_of(group)
    ways = itertools.product((True, False), (True, False), (True, False, None))
    for i, (inside, own, reshard) in enumerate(ways):
        train(mesh, rank, LOSSES[i % 4], policy, inside=inside, own=own, reshard=reshard)
    # Torch fails to accumulate gradients of other dtypes in a group whose module is not called.
    for own in (True, False) if policy != "bfloat16" else (False,):
        for inside, accumulate in itertools.product((True, False), repeat=2):
            how = {"inside": inside, "own": own, "reshard": True, "accumulate": accumulate}
            train(mesh, rank, cross_entropy, policy, tied=not own, **how)


def modules(group: Any, rank: int, policy: str) -> None:
    """Modules of ``fastdiv.nn``, sharded with the model, by themselves, or by their layer."""
    mesh = mesh_of(group)
    ways = itertools.product((True, False), ("layer", True, False), (True, False))
    for i, (inside, own, reshard) in enumerate(ways):
        loss = tuple(HEADS)[i % 3]
        train(mesh, rank, loss, policy, inside=inside, own=own, reshard=reshard)
    for accumulate in (True, False):
        how = {"inside": True, "own": False, "reshard": True, "accumulate": accumulate}
        train(mesh, rank, module, policy, tied=True, **how)


def one_layer(mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(WIDTH, CLASSES)
    return fully_shard(layer, mesh=mesh, mp_policy=policy or POLICIES["float32"])


def rows_of(rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3 + rank)
    return torch.randn(ROWS, WIDTH), torch.randint(CLASSES, (ROWS,))


def policies_of_one_call(group: Any, rank: int) -> None:
    """Hidden states are cast as the module would cast them, and a loss is never rounded."""
    mesh, (h, y) = mesh_of(group), rows_of(rank)
    options = {"param_dtype": HALF, "reduce_dtype": torch.float32, "output_dtype": HALF}
    layer = one_layer(mesh, MixedPrecisionPolicy(**options))
    weight = layer.weight.full_tensor().to(HALF)
    expected = fastdiv.linear_cross_entropy(h.to(HALF), weight, y)
    leaf = h.clone().requires_grad_()
    value = fastdiv.linear_cross_entropy(leaf, layer.weight, y)
    value.backward()
    assert torch.equal(value, expected) and leaf.grad.dtype == torch.float32
    strict = one_layer(mesh, MixedPrecisionPolicy(param_dtype=HALF, cast_forward_inputs=False))
    kind, text = outcome(lambda: fastdiv.linear_cross_entropy(h, strict.weight, y))
    assert kind == "TypeError" and "dtype" in text, (kind, text)

    for reduction in ("mean", "none"):
        torch.manual_seed(1)
        loss = fastdiv.nn.LinearCrossEntropyLoss(WIDTH, CLASSES, reduction=reduction)
        whole = loss.linear.weight.detach().to(HALF).requires_grad_()
        expected = fastdiv.linear_cross_entropy(h.to(HALF), whole, y, reduction=reduction)
        expected.mean().backward()
        fully_shard(loss.linear, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options))
        leaf = h.clone().requires_grad_()
        value = loss(leaf, y)
        value.mean().backward()
        assert value.dtype == torch.float32 and torch.equal(value, expected)
        mean = fastdiv.distributed.world.sum_over(
            mesh.get_group().group_name, whole.grad.float() / mesh.size()
        )
        same(loss.linear.weight.grad.full_tensor(), mean, 1e-6)


def other_gradients(group: Any, rank: int) -> None:
    """Another divisor, a weight without a gradient, second derivatives, and a replaced weight."""
    mesh, (h, y) = mesh_of(group), rows_of(rank)
    gradients = []
    for divisor in (None, 3.0):
        layer = one_layer(mesh)
        if divisor:
            layer.set_gradient_divide_factor(divisor)
        fastdiv.linear_cross_entropy(h, layer.weight, y, linear_bias=layer.bias).backward()
        gradients.append(layer.weight.grad.full_tensor())
    same(gradients[1], gradients[0] * mesh.size() / 3.0)

    layer = one_layer(mesh)
    weight = layer.weight.full_tensor().detach().requires_grad_()
    layer.requires_grad_(False)
    assert not fastdiv.linear_cross_entropy(h, layer.weight, y).requires_grad

    layer.requires_grad_(True)
    curvatures = []
    for w in (layer.weight, weight):
        leaf = h.clone().requires_grad_()
        value = fastdiv.linear_cross_entropy(leaf, w, y)
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        curvatures.append(torch.autograd.grad(slope.square().sum(), (leaf, w)))
    same(curvatures[0][0], curvatures[1][0])
    mean = curvatures[1][1].clone()
    dist.all_reduce(mean, group=mesh.get_group())
    same(curvatures[0][1].full_tensor(), mean / mesh.size())

    # Of a gradient each rank has a shard, and again the ranks' gradients are averaged.
    (slope,) = torch.autograd.grad(
        fastdiv.linear_cross_entropy(h, layer.weight, y), layer.weight, create_graph=True
    )
    ours = torch.autograd.grad(slope.to_local().square().sum(), layer.weight)[0]
    rows = [rows_of(r) for r in range(mesh.size())]
    mean = sum(fastdiv.linear_cross_entropy(h, weight, y) for h, y in rows) / mesh.size()
    (slope,) = torch.autograd.grad(mean, weight, create_graph=True)
    whole = torch.autograd.grad(slope.square().sum(), weight)[0]
    same(ours.full_tensor(), whole / mesh.size())

    state = {k: (2 * v).detach() for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    same(
        fastdiv.linear_cross_entropy(h, layer.weight, y),
        fastdiv.linear_cross_entropy(h, 2 * weight, y),
    )


def refused(group: Any, rank: int) -> dict[str, tuple[str, str]]:
    """What is computed from a weight of other rows, compiled code, and all-gather extensions."""
    mesh, (h, y) = mesh_of(group), rows_of(rank)
    layer = one_layer(mesh)
    found = {
        "computed": outcome(lambda: fastdiv.linear_cross_entropy(h, layer.weight.detach(), y)),
        "shape": outcome(lambda: fastdiv.linear_cross_entropy(h[:, 1:], layer.weight, y)),
    }
    compiled = torch.compile(
        lambda w: fastdiv.linear_cross_entropy(h, w, y), fullgraph=True, backend="eager"
    )
    found["compiled"] = outcome(lambda: compiled(layer.weight))
    layer.weight._local_tensor.fsdp_pre_all_gather = None
    found["extension"] = outcome(lambda: fastdiv.linear_cross_entropy(h, layer.weight, y))
    return found


def compiled_beside(group: Any, rank: int) -> None:
    """Sharded classes compile whole, beside a parameter of ``fully_shard`` of another shape."""
    mesh, (h, y) = mesh_of(group), rows_of(0)
    one_layer(mesh)
    whole = torch.randn(CLASSES + 1, WIDTH)
    weight = distribute_tensor(whole, mesh, [Shard(0)])
    torch._dynamo.reset()
    compiled = torch.compile(fastdiv.linear_cross_entropy, fullgraph=True, backend="eager")
    same(compiled(h, weight, y).to_local(), fastdiv.linear_cross_entropy(h, whole, y))


def smaller_shards(group: Any, rank: int) -> None:
    """After the forward, the module holds shards of two ranks, which get no gradient."""
    mesh = mesh_of(group)
    for own in (True, False):
        train(mesh, rank, cross_entropy, "float32", inside=False, own=own, reshard=2)


def replicas(group: Any, rank: int) -> None:
    """HSDP: two replicas of shards of two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for policy, inside, own in itertools.product(POLICIES, (True, False), (True, False)):
        train(mesh, rank, cross_entropy, policy, inside=inside, own=own, reshard=True)


def tensor_parallel(group: Any, rank: int) -> None:
    """Shards over data-parallel ranks of a layer whose classes two ranks share."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for loss, policy in itertools.product((cross_entropy, divergence), ("float32", "bfloat16")):
        plain, sharded = Model(loss, False), Model(loss, False)
        parallelize_module(sharded.head, mesh["tp"], ColwiseParallel())
        for module in (sharded.head, sharded):
            fully_shard(module, mesh=mesh["dp"], mp_policy=POLICIES[policy])
        half = POLICIES[policy].param_dtype is not None
        for x, y in zip(*batches(2, 2), strict=True):
            mine = mesh.get_local_rank("dp")
            value = sharded.value(x[mine], y[mine])
            assert value.placements == (Replicate(),)
            expected = one_process(plain, x, y, HALF if half else torch.float32)[mine]
            same(value.to_local().detach(), expected.detach(), 1e-2 if half else 1e-5)
            value.backward()
        compare_gradients(sharded, plain, 2e-2 if half else 1e-5, f"tp {loss.__name__} {policy}")
