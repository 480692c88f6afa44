"""Float options that change from step to step: two graphs, the numbers of eager, whatever option.

The first graph takes the option for a constant, the second is for every other value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiv
from helpers.cases import make_inputs
from helpers.selection import nightly_but
from helpers.values import value_and_gradients

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
VALUES = (0.5, 0.4, 0.3, 0.7)
CLASSES = 17

Call = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of x, t, labels and the option


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def found(function: Callable[..., Any], step: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return value and gradients; a call may have no use for the teacher."""
    x, t, *others = step
    return value_and_gradients(lambda x, t: function(x, t, *others), x, t, unused=True)


def count(
    function: Callable[..., Any], steps: list[tuple[Any, ...]], backend: str = "aot_eager"
) -> int:
    """How many graphs the steps take, of which each gives what it gives in eager mode."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for step in steps:
        close(found(compiled, step), found(function, step))
    return counter.frame_count


def steps_of(values: tuple[float, ...] = VALUES) -> list[tuple[Any, ...]]:
    x, t = make_inputs((6, CLASSES), torch.float32)
    return [(x, t, t.argmax(-1), v) for v in values]


def of_labels(name: str) -> Call:
    return lambda x, t, y, v: fastdiv.cross_entropy(x, y, **{name: v})


def of_target(function: str, option: str, **options: Any) -> Call:
    options.setdefault("target_type", "logits")
    return lambda x, t, y, v: getattr(fastdiv, function)(x, t, **options, **{option: v})


def of_layer(function: str, option: str, **options: Any) -> Call:
    def call(x: Tensor, t: Tensor, y: Tensor, v: float) -> Tensor:
        weight = torch.linspace(-1, 1, 11 * CLASSES).view(11, CLASSES)
        labels = "entropy" in function or "log_prob" in function
        target = y % 11 if labels else t @ weight.T
        value = getattr(fastdiv, function)(x, weight, target, **options, **{option: v})
        return torch.stack(value) if isinstance(value, tuple) else value

    return call


def of_classes(x: Tensor, t: Tensor, y: Tensor, v: float) -> Tensor:
    values, classes = t.topk(3)
    return fastdiv.topk_kl_div(x, values, classes, values_type="logits", temperature=v)


def of_mixed_classes(x: Tensor, t: Tensor, y: Tensor, v: float) -> Tensor:
    values, classes = t.log_softmax(-1).topk(3)
    return fastdiv.topk_js_div(
        x, values, classes, values_type="log_probs", missing="tail", beta=v, temperature=1 + v
    )


def of_statistics(x: Tensor, t: Tensor, y: Tensor, v: float) -> Tensor:
    value, stats = fastdiv.cross_entropy(x, y, temperature=v, return_stats=True)
    return value + stats.lse + stats.entropy + stats.log_prob + stats.argmax


CALLS: dict[str, Call] = {
    **{
        f"cross_entropy {name}": of_labels(name)
        for name in ("temperature", "softcap", "z_loss", "label_smoothing")
    },
    "cross_entropy others": lambda x, t, y, v: fastdiv.cross_entropy(
        x, y, label_smoothing=v, smoothing="others"
    ),
    "cross_entropy soft": lambda x, t, y, v: fastdiv.cross_entropy(
        x, t.softmax(-1), label_smoothing=v, temperature=1 + v
    ),
    "cross_entropy stats": of_statistics,
    "entropy temperature": lambda x, t, y, v: fastdiv.entropy(x, temperature=v),
    "entropy base": lambda x, t, y, v: fastdiv.entropy(x, base=v, reduction="mean"),
    "log_prob": lambda x, t, y, v: fastdiv.log_prob(x, y, temperature=v),
    "log_prob_and_entropy": lambda x, t, y, v: torch.stack(
        fastdiv.log_prob_and_entropy(x, y, temperature=v)
    ),
    **{
        f"{name} temperature": of_target(name, "temperature")
        for name in ("kl_div", "reverse_kl_div", "tv_distance", "hellinger_distance")
    },
    "js_div": of_target("js_div", "beta"),
    "skew_kl_div": of_target("skew_kl_div", "skew"),
    "skew_kl_div reverse": of_target("skew_kl_div", "skew", reverse=True),
    "alpha_div": of_target("alpha_div", "alpha"),
    "renyi_div": of_target("renyi_div", "alpha"),
    "js_div pointwise": of_target("js_div", "beta", reduction="pointwise"),
    "alpha_div pointwise": of_target("alpha_div", "alpha", reduction="pointwise"),
    "kl_div pointwise": of_target("kl_div", "temperature", reduction="pointwise"),
    "topk_kl_div": of_classes,
    "topk_js_div": of_mixed_classes,
    **{
        f"linear_cross_entropy {name}": of_layer("linear_cross_entropy", name)
        for name in ("temperature", "softcap", "z_loss", "label_smoothing")
    },
    "linear_cross_entropy rows": of_layer("linear_cross_entropy", "temperature", reduction="none"),
    "linear_log_prob": of_layer("linear_log_prob", "softcap", temperature=2.0),
    "linear_log_prob_and_entropy": of_layer("linear_log_prob_and_entropy", "temperature"),
    "linear_kl_div": of_layer("linear_kl_div", "temperature", target_type="logits"),
    "linear_reverse_kl_div": of_layer("linear_reverse_kl_div", "temperature", target_type="logits"),
    "linear_js_div": of_layer("linear_js_div", "beta", target_type="logits"),
}


# The others go through the code of these.
MOST = [
    *(f"cross_entropy {o}" for o in ("temperature", "softcap", "z_loss", "label_smoothing")),
    *("cross_entropy others", "cross_entropy soft", "cross_entropy stats"),
    *("entropy base", "log_prob_and_entropy", "kl_div temperature", "js_div"),
    *("skew_kl_div reverse", "alpha_div", "renyi_div", "js_div pointwise", "topk_kl_div"),
    "topk_js_div",
    *("linear_cross_entropy label_smoothing", "linear_cross_entropy rows"),
    *("linear_log_prob_and_entropy", "linear_kl_div", "linear_js_div"),
]
SOME = ["cross_entropy label_smoothing", "cross_entropy soft", "entropy base"]
SOME += ["js_div", "alpha_div", "topk_kl_div"]


@pytest.mark.parametrize("name", nightly_but(MOST, CALLS))
def test_two_graphs(name: str) -> None:
    assert count(CALLS[name], steps_of()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", nightly_but(SOME, [name for name in CALLS if not name.startswith("linear")])
)
def test_two_graphs_of_the_reference(name: str) -> None:
    """Where there is no kernel, or a transform of torch.func is compiled."""
    with fastdiv.backend("reference"):
        assert count(CALLS[name], steps_of()) == 2


def modules() -> dict[str, tuple[torch.nn.Module, str]]:
    nn = fastdiv.nn
    return {
        **{
            f"CrossEntropyLoss {name}": (nn.CrossEntropyLoss(), name)
            for name in ("temperature", "softcap", "z_loss", "label_smoothing")
        },
        "KLDivLoss": (
            nn.KLDivLoss(target_type="logits", scale_by_temperature=True),
            "temperature",
        ),
        "JSDivLoss": (nn.JSDivLoss(target_type="logits"), "beta"),
        "SkewKLDivLoss": (nn.SkewKLDivLoss(target_type="logits"), "skew"),
        "AlphaDivLoss": (nn.AlphaDivLoss(target_type="logits", alpha=0.3), "alpha"),
        "EntropyLoss": (nn.EntropyLoss(), "temperature"),
        "DistillationLoss alpha": (nn.DistillationLoss("js_div"), "alpha"),
        "DistillationLoss temperature": (
            nn.DistillationLoss("kl_div", scale_by_temperature=True),
            "temperature",
        ),
        "DistillationLoss beta": (nn.DistillationLoss("js_div"), "divergence_options"),
        "LabelSmoothingLoss": (nn.LabelSmoothingLoss(CLASSES, -1, 0.1), "smoothing"),
        "LinearCrossEntropyLoss": (nn.LinearCrossEntropyLoss(CLASSES, 40), "options"),
        "LinearKLDivLoss": (
            nn.LinearKLDivLoss(CLASSES, CLASSES, target_type="logits", scale_by_temperature=True),
            "options",
        ),
    }


SET_LATER = ["CrossEntropyLoss temperature", "KLDivLoss", "LabelSmoothingLoss", "LinearKLDivLoss"]
SET_LATER += [f"DistillationLoss {option}" for option in ("alpha", "temperature", "beta")]


@pytest.mark.parametrize("name", nightly_but(SET_LATER, modules()))
def test_two_graphs_of_a_module(name: str) -> None:
    """Its attributes are set from step to step."""
    module, option = modules()[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for x, t, y, value in steps_of():
        if option == "options":
            module.options["temperature"] = value
        elif option == "divergence_options":
            module.divergence_options["beta"] = value
        else:
            setattr(module, option, value)
        more: tuple[Tensor, ...] = (t,)
        if name.startswith("LabelSmoothing"):
            x, more = x[None], (y[None],)
        elif "CrossEntropy" in name:
            more = (y,)
        elif name.startswith("Entropy"):
            more = ()
        elif name.startswith("Distillation"):
            more = (t, y)
        own = x.clone().requires_grad_()
        found = []
        for function in (compiled, module):
            loss = function(own, *more)
            found.append([loss, *torch.autograd.grad(loss, own)])
        close(*found)
    assert counter.frame_count == 2


def test_special_points_have_graphs_of_their_own() -> None:
    """At the two ends of beta another divergence is meant."""
    values = (0.5, 0.4, 0.0, 0.3, 1.0)
    first = count(CALLS["js_div"], steps_of(values))
    torch._dynamo.reset()
    assert count(CALLS["js_div"], steps_of((*values, 0.2, 0.0, 0.6, 1.0, 0.1))) == first


def test_bad_values_are_refused_by_the_second_graph() -> None:
    x, t, y, _ = steps_of()[0]
    compiled = torch.compile(CALLS["kl_div temperature"], backend="aot_eager")
    for value in (1.0, 2.0, 3.0):
        compiled(x, t, y, value)
    with pytest.raises(ValueError, match="temperature must be a positive finite number, got -1"):
        compiled(x, t, y, -1.0)


def test_an_option_and_the_batch() -> None:
    """Both change at a time."""
    steps = []
    for rows, value in ((6, 1.0), (6, 1.5), (5, 2.0), (9, 2.5), (4, 0.5)):
        x, t = make_inputs((rows, CLASSES), torch.float32)
        steps.append((x, t, t.argmax(-1), value))
    assert count(CALLS["kl_div temperature"], steps) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    nightly_but(
        ["linear_cross_entropy temperature"], ["js_div", "linear_cross_entropy temperature"]
    ),
)
def test_inductor(name: str) -> None:
    assert count(CALLS[name], steps_of(), "inductor") == 2
