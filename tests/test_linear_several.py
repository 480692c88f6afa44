"""Cross entropy of several hidden states that share a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from helpers.recorder import Recorder
from helpers.values import value_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
SHAPES = ((5,), (2, 3), (0,), (4, 1, 2), ())  # of the rows of each input
WIDTH, CLASSES = 6, 31


def tensors(
    soft: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Inputs, weight, bias, targets and weights of the rows."""
    torch.manual_seed(0)
    inputs = [torch.randn(*s, WIDTH).to(dtype) for s in SHAPES]
    w, b = torch.randn(CLASSES, WIDTH).to(dtype), torch.randn(CLASSES).to(dtype)
    if soft:
        targets = [torch.rand(*s, CLASSES).softmax(-1).to(dtype) for s in SHAPES]
    else:
        targets = [torch.randint(CLASSES, s) for s in SHAPES]
        targets[0][:2] = -100
        targets[3][:] = -100  # no row counts
    weights = [torch.rand(s).add(0.5) for s in SHAPES]
    weights[1][0, 0] = 0
    return inputs, w, b, targets, weights


def separate(
    inputs: Any, w: Tensor, targets: Any, token_weight: Any = None, **options: Any
) -> tuple[Any, ...]:
    """A call for each input."""
    weights = [None] * len(inputs) if token_weight is None else token_weight
    return tuple(
        fastdiv.linear_cross_entropy(x, w, y, token_weight=v, **options)
        for x, y, v in zip(inputs, targets, weights, strict=True)
    )


def total(losses: Any) -> Tensor:
    """A number that takes every loss with a factor of its own; NaN, a mean of no rows, counts 0."""
    return sum(
        (i + 1) * (v * torch.linspace(1, 2, v.numel()).view(v.shape)).nansum()
        for i, v in enumerate(losses)
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "smoothing": "others", "temperature": 2.0, "chunk_size": 3},
    {"weight": torch.linspace(0.5, 2, CLASSES), "z_loss": 0.01, "softcap": 5.0},
]


@REDUCTIONS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_equal_to_separate_calls(
    options: dict[str, Any], soft: bool, weighted: bool, reduction: str
) -> None:
    """Values of every shape of rows, with the gradients of all tensors."""
    inputs, w, b, targets, weights = tensors(soft)
    if soft:
        options = {k: v for k, v in options.items() if k != "smoothing"}
    how = {**options, "reduction": reduction, "token_weight": weights if weighted else None}
    n = len(inputs)

    def of(function: Any) -> Any:
        def call(*v: Tensor) -> Tensor:
            second = v[n + 2 :] if soft else targets
            return total(function(v[:n], v[n], second, linear_bias=v[n + 1], **how))

        return value_and_gradients(call, *inputs, w, b, *(targets if soft else ()))

    got = fastdiv.linear_cross_entropy(inputs, w, targets, linear_bias=b, **how)
    expected = separate(inputs, w, targets, linear_bias=b, **how)
    assert type(got) is tuple
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(of(fastdiv.linear_cross_entropy), of(separate), rtol=1e-5, atol=1e-5)


@REDUCTIONS
def test_statistics(reduction: str) -> None:
    inputs, w, _, targets, _ = tensors()
    how = {"reduction": reduction, "return_stats": True}
    got = fastdiv.linear_cross_entropy(tuple(inputs), w, tuple(targets), **how)
    for (a, of_a), (b, of_b) in zip(got, separate(inputs, w, targets, **how), strict=True):
        assert type(of_a) is fastdiv.Stats
        torch.testing.assert_close((a, *of_a), (b, *of_b), equal_nan=True)


def test_one_pass_over_the_weight() -> None:
    """One forward, one backward, and one gradient of the weight."""
    inputs, w, _, targets, _ = tensors()
    w.requires_grad_()
    with Recorder() as ops:
        total(fastdiv.linear_cross_entropy(inputs, w, targets)).backward()
    names = [op.name() for op, _ in ops.calls]
    assert names.count("fastdiv::_linear_forward") == 1
    assert names.count("fastdiv::_linear_backward") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_float32_logits(dtype: torch.dtype) -> None:
    """The weight's gradient is rounded once, not once for each input."""
    inputs, w, _, targets, _ = tensors(dtype=dtype)
    w.requires_grad_()
    losses = fastdiv.linear_cross_entropy(inputs, w, targets, logits_dtype=torch.float32)
    (got,) = torch.autograd.grad(total(losses), w)
    exact = w.detach().double().requires_grad_()
    double = separate([x.double() for x in inputs], exact, targets)
    torch.testing.assert_close(losses[0].double(), double[0].detach(), rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(total(double), exact)
    error, largest = (got.double() - expected).abs().max(), expected.abs().max()
    assert got.dtype == dtype and error <= 2 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_derivatives_and_transforms(backend: str) -> None:
    inputs, w, _, targets, _ = tensors(dtype=torch.float64)
    inputs, targets = [inputs[0][:3], inputs[1]], [targets[0][:3], targets[1]]

    def loss(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return fastdiv.linear_cross_entropy([x, y], w, targets, reduction="mean")

    leaves = [v.requires_grad_() for v in (*inputs, w)]
    with fastdiv.backend(backend):
        assert torch.autograd.gradcheck(loss, leaves)
        assert torch.autograd.gradgradcheck(loss, leaves)
        got = torch.func.grad(lambda w: sum(loss(*inputs, w)))(w)
        expected = torch.autograd.grad(sum(separate(inputs, w, targets)), w)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(h: Tensor, g: Tensor, w: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return fastdiv.linear_cross_entropy([h, g], w, [y, z], reduction=reduction)

    for rows in (5, 7):
        h, g, w = (torch.randn(n, WIDTH) for n in (rows, rows + 1, CLASSES))
        y, z = torch.randint(CLASSES, (rows,)), torch.randint(CLASSES, (rows + 1,))
        got = value_and_gradients(lambda *v, y=y, z=z: total(compiled(*v, y, z)), h, g, w)
        expected = value_and_gradients(
            lambda a, b, w, y=y, z=z: total(separate([a, b], w, [y, z], reduction=reduction)),
            *(h, g, w),
        )
        torch.testing.assert_close(got, expected)


def test_autocast() -> None:
    """Inputs may differ in dtype, which autocast makes one."""
    inputs, w, _, targets, _ = tensors()
    inputs[0] = inputs[0].bfloat16()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = fastdiv.linear_cross_entropy(inputs, w, targets)
        expected = separate(inputs, w, targets)
    torch.testing.assert_close(got, expected, equal_nan=True)


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}])
def test_module(options: dict[str, Any], hook: bool, weighted: bool) -> None:
    inputs, _, _, targets, weights = tensors()
    module = fastdiv.nn.LinearCrossEntropyLoss(WIDTH, CLASSES, bias=True, **options)
    calls = []
    if hook:
        module.linear.register_forward_hook(lambda _, given, logits: calls.append(logits.shape))
    given = weights if weighted else None
    layer = {"linear_bias": module.linear.bias, "token_weight": given}
    expected = separate(inputs, module.linear.weight, targets, **layer, **options)
    got = module(inputs, targets, given)
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert len(calls) == hook  # the layer is called once


def test_module_of_an_adapter() -> None:
    """Its product has longer hidden states than the inputs."""
    peft = pytest.importorskip("peft")
    inputs, _, _, targets, _ = tensors()
    module = fastdiv.nn.LinearCrossEntropyLoss(WIDTH, CLASSES)
    config = peft.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)
    logits = [module.linear(x).reshape(-1, CLASSES) for x in inputs]
    expected = tuple(F.cross_entropy(x, y.flatten()) for x, y in zip(logits, targets, strict=True))
    torch.testing.assert_close(module(inputs, targets), expected, equal_nan=True)


# --- errors ---------------------------------------------------------------------------------------

H, G, W = torch.randn(4, 3), torch.randn(2, 3), torch.randn(7, 3)
Y, Z = torch.tensor([0, 6, 2, 2]), torch.tensor([1, 1])


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "input must be a Tensor or a list", {"input": 1.0}),
        (ValueError, "input must hold at least one Tensor", {"input": []}),
        (TypeError, r"input\[1\] must be a Tensor", {"input": [H, 1.0]}),
        (ValueError, r"input\[1\] must have the width of input\[0\], 3, got shape \(2, 2\)",
         {"input": [H, G[:, :2]]}),
        (TypeError, r"input\[1\] must have the dtype of input\[0\]", {"input": [H, G.double()]}),
        (RuntimeError, r"input\[1\] is on meta, but", {"input": [H, G.to("meta")]}),
        (ValueError, "linear_weight must have shape", {"linear_weight": W.t()}),
        (TypeError, "target must be a list of 2 Tensors, one for each input, got Tensor",
         {"target": Y}),
        (ValueError, "target must hold 2 Tensors, one for each input, got 1", {"target": [Y]}),
        (TypeError, r"target\[1\] must be a Tensor", {"target": [Y, None]}),
        (TypeError, r"target\[1\] must hold int64", {"target": [Y, Z.short()]}),
        (ValueError, "either class indices or probabilities", {"target": [Y, torch.rand(2, 7)]}),
        (ValueError, r"target\[1\] must have the shape", {"target": [Y, Y]}),
        (ValueError, r"target\[1\] must have the shape of the logits, \(2, 7\)",
         {"target": [torch.rand(4, 7), torch.rand(4, 7)]}),
        (IndexError, r"target\[1\]\[0\] is 7, out of range", {"target": [Y, Z + 6]}),
        (TypeError, "token_weight must be a list of 2", {"token_weight": torch.ones(4)}),
        (ValueError, "token_weight must hold 2", {"token_weight": [torch.ones(4)]}),
        (ValueError, r"token_weight\[1\] must have the shape",
         {"token_weight": [torch.ones(4), torch.ones(4)]}),
        (ValueError, r"token_weight\[0\] gets no gradient",
         {"token_weight": [torch.ones(4, requires_grad=True), torch.ones(2)]}),
        (ValueError, "upstream gradients of several losses are unknown", {"accumulate": "weight"}),
        (ValueError, "accumulate must be one of", {"accumulate": "columns"}),
        (ValueError, "reduction must be", {"reduction": "pointwise"}),
        (ValueError, "temperature must be", {"temperature": 0.0}),
        (ValueError, "logits_dtype must be", {"logits_dtype": torch.float64}),
        (TypeError, "must be Tensors where input is one", {"input": H}),
        (TypeError, "must be Tensors where input is one",
         {"input": H, "target": Y, "token_weight": [torch.ones(4)]}),
    ],
)  # fmt: skip
def test_refused(
    error: Any, words: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is computed."""
    monkeypatch.setattr("fastdiv._linear.autograd.run", lambda *a: pytest.fail("it was computed"))
    arguments = {"input": [H, G], "linear_weight": W, "target": [Y, Z], **changes}
    with pytest.raises(error, match=words):
        fastdiv.linear_cross_entropy(**arguments)


@pytest.mark.cpu_only("a process group of the CPU")
def test_dtensors_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        w, h = distribute_tensor(W, mesh, [Shard(0)]), distribute_tensor(H, mesh, [Replicate()])
        with pytest.raises(TypeError, match="input must be a Tensor, got list"):
            fastdiv.linear_cross_entropy([H, G], w, [Y, Z])
        with pytest.raises(TypeError, match="a list of inputs does not take DTensors"):
            fastdiv.linear_cross_entropy([h, G], W, [Y, Z])
    finally:
        dist.destroy_process_group()
