"""Around a loss: modules, autocast, data parallelism."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastdiv
from helpers.cases import LOSSES, Case, TopKCase, make_inputs, module_of
from helpers.ranks import Ranks

EVERY_CASE = pytest.mark.parametrize("case", LOSSES, ids=str)
REDUCIBLE = [c for c in LOSSES if "log_prob" not in c.name]
WITH_TARGET = [c for c in LOSSES if c.target not in ("labels", "none")]
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)


OF_ROWS = [c for c in REDUCIBLE if not isinstance(c, TopKCase)]


@pytest.mark.parametrize("case", OF_ROWS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
def test_modules(case: Case, reduction: str) -> None:
    """The same bits as the function, also of a copy and of what a pickle brings back."""
    x, t = make_inputs((4, 5), torch.float32)
    args = [v for v in (x, case.make_target(x, t)) if v is not None]
    options = {"reduction": reduction, **case.options}
    expected = case.call(x, args[1] if t is not None and len(args) > 1 else None, **options)
    if case.divergence:
        options["target_type"] = case.target
    module = module_of(case.name)(**options)
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        close(m(*args), expected, rtol=0, atol=0)
        assert repr(m).startswith(type(module).__name__)
        assert all(f"{name}={value!r}" in repr(m) for name, value in options.items())
    assert not module.state_dict()
    if case.divergence:
        squared = module_of(case.name)(**options, scale_by_temperature=True)
        assert "scale_by_temperature=True" in repr(squared)
        close(squared(*args), expected * case.options.get("temperature", 1.0) ** 2)
        weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
        weighted = case.call(*args, reduction=reduction, token_weight=weight)
        close(module(*args, token_weight=weight), weighted)


@pytest.mark.parametrize("name", ["KLDiv", "ReverseKLDiv", "JSDiv"])
def test_masks_and_temperatures_of_a_top_k_teacher(name: str) -> None:
    """A mask of the call, and a temperature that is learnt."""
    x, (values, indices) = torch.randn(4, 9), torch.randn(4, 9).log_softmax(-1).topk(3)
    temperature = torch.nn.Parameter(torch.tensor(1.5))
    module = getattr(fastdiv.nn, f"TopK{name}Loss")(
        values_type="log_probs", missing="tail", temperature=temperature
    )
    assert list(module.parameters()) == [temperature]
    mask = (torch.arange(9) < 4).expand(4, 9).scatter(-1, indices, True)
    function = {
        "KLDiv": fastdiv.topk_kl_div,
        "ReverseKLDiv": fastdiv.topk_reverse_kl_div,
        "JSDiv": fastdiv.topk_js_div,
    }[name]
    options = {"values_type": "log_probs", "missing": "tail", "temperature": temperature}
    masked, plain = (function(x, values, indices, class_mask=m, **options) for m in (mask, None))
    assert masked != plain
    close(module(x, values, indices, class_mask=mask), masked, rtol=0, atol=0)
    module(x, values, indices, class_mask=mask).backward()
    assert temperature.grad is not None and temperature.grad != 0


def test_state_of_cross_entropy_module() -> None:
    weight = torch.rand(5)
    x, y = torch.randn(4, 5), torch.tensor([0, 3, -100, 4])
    module = fastdiv.nn.CrossEntropyLoss(weight)
    close(module(x, y), fastdiv.cross_entropy(x, y, weight))
    other = fastdiv.nn.CrossEntropyLoss(torch.ones(5))
    other.load_state_dict(module.state_dict())
    close(other(x, y), module(x, y))
    assert module.to(torch.float64).weight.dtype == torch.float64
    options = {
        "ignore_index": 1,
        "label_smoothing": 0.2,
        "smoothing": "others",
        "softcap": 9.0,
        "z_loss": 1e-2,
        "temperature": 2.0,
        "return_stats": True,
        "reduction": "sum",
    }
    value, stats = fastdiv.nn.CrossEntropyLoss(**options)(x, y.abs() % 5)
    expected, expected_stats = fastdiv.cross_entropy(x, y.abs() % 5, **options)
    close((value, *stats), (expected, *expected_stats), rtol=0, atol=0)


@EVERY_CASE
def test_autocast(case: Case) -> None:
    """Autocast changes what comes before the loss, not the loss."""
    for dtype in (torch.float32, torch.bfloat16):
        x, t = make_inputs((4, 33), dtype)
        t = case.make_target(x, t)
        x.requires_grad_()
        expected = case.call(x, t)
        with torch.autocast(x.device.type, torch.bfloat16):
            value = case.call(x, t)
        assert value.dtype == torch.float32
        close(value, expected, rtol=0, atol=0)
        got = torch.autograd.grad(value.sum(), x)
        close(got, torch.autograd.grad(expected.sum(), x), rtol=0, atol=0)
    layer = torch.nn.Linear(8, 33)
    with torch.autocast(x.device.type, torch.bfloat16):
        logits = layer(torch.randn(4, 8))
        value = case.call(logits, t)
    assert logits.dtype == torch.bfloat16
    value.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()


def replica(group: dist.ProcessGroup, rank: int) -> list[np.ndarray]:
    model, loss, (inputs, y, t) = ddp_problem()
    model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    half = slice(4 * rank, 4 * rank + 4)
    loss(model(inputs[half]), y[half], t[half]).backward()
    return [p.grad.numpy() for p in model.parameters()]


def ddp_problem() -> tuple[torch.nn.Module, Callable[..., Tensor], list[Tensor]]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 11))

    def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        hard = fastdiv.cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-2)
        soft = fastdiv.js_div(x, t, target_type="logits", inplace_backward=False)
        return hard + soft + fastdiv.entropy(x, reduction="mean")

    return model, loss, [torch.randn(8, 6), torch.randint(11, (8,)), torch.randn(8, 11)]


@pytest.mark.cpu_only("processes of their own, over gloo")
def test_ddp(ranks: Ranks) -> None:
    """Two processes with half the batch each end up with the gradient of the whole batch."""
    results = ranks.run(2, replica)
    model, loss, (inputs, y, t) = ddp_problem()
    loss(model(inputs), y, t).backward()
    for gradients in results:
        for p, g in zip(model.parameters(), gradients, strict=True):
            close(torch.from_numpy(g), p.grad, rtol=1e-5, atol=1e-6)
