"""The modules of the linear losses, whose layer is more than its weight: it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import fastdiv
from helpers import shard_layers, zero3
from helpers.ranks import Ranks
from helpers.recorder import Recorder

ROWS, WIDTH, CLASSES = 6, 5, 31


class Loss:
    """A module, a second argument for it, and what it computes, from logits."""

    def __init__(self, kind: str, of_logits: Callable[..., Any], second: str, **options: Any):
        self.kind, self.of_logits, self.second, self.options = kind, of_logits, second, options

    def make(self) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(3)
        module = getattr(fastdiv.nn, self.kind)(WIDTH, CLASSES, bias=True, **self.options)
        hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
        labels = torch.randint(CLASSES, (ROWS,))
        return module, hidden, labels if self.second == "labels" else torch.randn(ROWS, CLASSES)

    def of(self, logits: Tensor, second: Tensor) -> Tensor:
        options = {k: v for k, v in self.options.items() if k != "chunk_size"}
        return total(self.of_logits(logits, second, **options))


LOSSES = [
    Loss("LinearCrossEntropyLoss", fastdiv.cross_entropy, "labels", label_smoothing=0.1),
    Loss("LinearCrossEntropyLoss", fastdiv.cross_entropy, "labels", reduction="none"),
    Loss("LinearKLDivLoss", fastdiv.kl_div, "logits", target_type="logits", temperature=2.0),
    Loss("LinearReverseKLDivLoss", fastdiv.reverse_kl_div, "logits", target_type="logits"),
    Loss("LinearJSDivLoss", fastdiv.js_div, "logits", target_type="logits", beta=0.3),
    Loss("LinearLogProb", fastdiv.log_prob, "labels", chunk_size=4),
    Loss("LinearLogProbAndEntropy", fastdiv.log_prob_and_entropy, "labels", chunk_size=4),
]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.options}")


def total(value: Any) -> Tensor:
    return sum(v.sum() for v in value) if isinstance(value, tuple) else value.sum()


def gradients(value: Tensor, hidden: Tensor, module: nn.Module) -> dict[str, Tensor]:
    leaves = {"hidden": hidden, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {"value": value.detach(), **dict(zip(leaves, found, strict=True))}


def recorded(module: nn.Module, *arguments: Tensor) -> tuple[Tensor, bool]:
    """The value, and whether it was computed without holding the logits."""
    with Recorder() as ops:
        value = total(module(*arguments))
    return value, any(op.name() == "fastdiv::_linear_forward" for op, _ in ops.calls)


def pruned(layer: nn.Linear) -> None:
    prune.random_unstructured(layer, "weight", amount=0.5)


def normalised_by_a_hook(layer: nn.Linear) -> None:
    weight_norm(layer)


def normalised(layer: nn.Linear) -> None:
    parametrizations.weight_norm(layer)


def scaled_input(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))


def scaled_logits(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda _, inputs, logits: logits / 2)


def clipped_gradient(layer: nn.Linear) -> None:
    layer.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * 0.5,))


# What is done to a layer, and whether its logits must be held for it.
CHANGES = {
    pruned: False,
    normalised_by_a_hook: False,
    normalised: False,
    scaled_input: False,
    scaled_logits: True,
    clipped_gradient: True,
}


@EVERY_LOSS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_what_hangs_on_a_layer_counts(loss: Loss, change: Callable[..., None]) -> None:
    module, hidden, second = loss.make()
    change(module.linear)
    for _ in range(2):  # weight_norm raised at the second step
        expected = gradients(loss.of(module.linear(hidden), second), hidden, module)
        value, fused = recorded(module, hidden, second)
        torch.testing.assert_close(gradients(value, hidden, module), expected)
        assert fused == (not CHANGES[change])
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.9)


@EVERY_LOSS
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora(loss: Loss, dropout: float) -> None:
    """PEFT puts a layer of its own in the place of the linear one; its adapters are trained."""
    peft = pytest.importorskip("peft")
    module, hidden, second = loss.make()
    options = {"target_modules": ["linear"], "init_lora_weights": False, "lora_dropout": dropout}
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, **options), module)

    def seeded(function: Callable[[], Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return gradients(function(), hidden, module)

    expected = seeded(lambda: loss.of(module.linear(hidden), second))
    assert {name.split(".")[1] for name in expected if "." in name} == {"lora_A", "lora_B"}
    torch.testing.assert_close(seeded(lambda: total(module(hidden, second))), expected)
    assert recorded(module, hidden, second)[1]


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@EVERY_LOSS
def test_a_layer_of_another_kind_is_called(loss: Loss) -> None:
    """Its logits are held, for nobody knows how they come about."""
    module, hidden, second = loss.make()
    inner = module.linear
    replaced = nn.Linear(WIDTH, CLASSES)
    replaced.forward = lambda v: nn.Linear.forward(replaced, v) + 1
    layers = [
        Scaled(WIDTH, CLASSES),
        nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, CLASSES)),
        replaced,
    ]
    for layer in layers:
        module.linear = layer
        expected = gradients(loss.of(layer(hidden), second), hidden, module)
        value, fused = recorded(module, hidden, second)
        torch.testing.assert_close(gradients(value, hidden, module), expected)
        assert not fused
    module.linear = inner
    assert recorded(module, hidden, second)[1]


def test_many_dimensions_of_classes() -> None:
    module = fastdiv.nn.LinearCrossEntropyLoss(WIDTH, 7, out_features=(2, 3), ignore_index=None)
    hidden, target = torch.randn(4, WIDTH), torch.randint(7, (4, 2, 3))
    expected = module(hidden, target)
    module.linear.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(module(hidden, target), expected)


def test_a_teachers_layer_beside_a_called_one() -> None:
    module = fastdiv.nn.LinearKLDivLoss(WIDTH, CLASSES)
    hidden, target, weight = torch.randn(4, WIDTH), torch.randn(4, 3), torch.randn(CLASSES, 3)
    expected = module(hidden, target, target_linear_weight=weight)
    module.linear.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(module(hidden, target, target_linear_weight=weight), expected)
    with pytest.raises(ValueError, match="target_linear_bias needs"):
        module(hidden, target, target_linear_bias=torch.randn(CLASSES))
    with pytest.raises(ValueError, match="target_type"):
        module(hidden, torch.randn(4, CLASSES))


@pytest.mark.parametrize("change", [pruned, scaled_logits])
def test_compiled(change: Callable[..., None]) -> None:
    torch._dynamo.reset()
    module, hidden, second = LOSSES[0].make()
    change(module.linear)
    expected = gradients(module(hidden, second), hidden, module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    value = compiled(hidden, second)
    torch.testing.assert_close(gradients(value, hidden, module), expected)


def test_a_failure_leaves_the_layer_as_it_was() -> None:
    module, hidden, second = LOSSES[0].make()
    pruned(module.linear)
    with pytest.raises(IndexError):
        module(hidden, second + CLASSES)
    assert "forward" not in vars(module.linear)


def test_hooks_of_parallelize_module_beside_others() -> None:
    module, hidden, second = LOSSES[0].make()

    def hook(*_: Any) -> None: ...

    hook.__module__ = "torch.distributed.tensor._api"
    module.linear.register_forward_hook(hook)
    module(hidden, second)
    pruned(module.linear)
    with pytest.raises(RuntimeError, match="parallelize_module"):
        module(hidden, second)


@EVERY_LOSS
def test_partitioned_layer(loss: Loss) -> None:
    """ZeRO-3 fills the weight while the layer runs, so the loss is computed there."""
    module, hidden, second = loss.make()
    hidden = hidden.clone()  # no leaf, as ZeRO-3 empties the weight when its gradient is known
    expected = gradients(total(module(hidden, second)), hidden, module)
    held = zero3.partition(module.linear)
    value, fused = recorded(module, hidden, second)
    assert fused and all(parameter.numel() == 0 for parameter in held)
    found = gradients(value, hidden, module)
    torch.testing.assert_close(found, expected)
    assert all(parameter.numel() == 0 for parameter in held)


def test_statistics_of_a_partitioned_layer() -> None:
    loss = Loss("LinearCrossEntropyLoss", fastdiv.cross_entropy, "labels", return_stats=True)
    module, hidden, second = loss.make()
    expected = module(hidden, second)
    zero3.partition(module.linear)
    value, stats = module(hidden, second)
    assert torch.equal(value, expected[0]) and torch.equal(stats.argmax, expected[1].argmax)


@pytest.mark.parametrize("name", ["weight", "bias", "target_linear_weight"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_partitioned_weight_outside_of_its_layer(name: str, autocast: bool) -> None:
    layer, hidden = nn.Linear(WIDTH, CLASSES), torch.randn(ROWS, WIDTH)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    zero3.partition(layer)
    empty = pytest.raises(RuntimeError, match=r"ZeRO-3 of DeepSpeed.* call a module of fastdiv.nn")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), empty:
        if name == "target_linear_weight":
            fastdiv.linear_kl_div(hidden, weight, hidden, target_linear_weight=layer.weight)
        else:
            of_layer = (layer.weight, bias) if name == "weight" else (weight, layer.bias)
            labels = torch.zeros(ROWS, dtype=torch.int64)
            fastdiv.linear_cross_entropy(hidden, of_layer[0], labels, linear_bias=of_layer[1])


@pytest.mark.cpu_only("the ranks of these tests are processes of the CPU")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["LinearCrossEntropyLoss", "LinearKLDivLoss"])
def test_fully_sharded_layer(ranks: Ranks, kind: str, whole: bool) -> None:
    """FSDP2 of the layer: ranks have rows of their own, and the value is that of a whole layer."""
    ranks.run(2, shard_layers.fully_sharded, kind, whole)
