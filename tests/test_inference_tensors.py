"""What was made under ``torch.inference_mode()``, a teacher above all, works in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
import fastdiv.distributed as sharded
from fastdiv._engine.inference import savable
from helpers import shard_arguments
from helpers.cases import LOSSES, PUBLIC_LOSSES, make_inputs
from helpers.in_place_calls import PROGRAMS, leaf, target_of
from helpers.linear_cases import TARGETS, LinearCase, make_case
from helpers.ranks import Ranks

pytestmark = pytest.mark.usefixtures("gloo")

# A loss of logits, of what it is called with besides, and of options.
Loss = Callable[..., Any]


def inferred(v: Any) -> Any:
    """The same tensors, made under inference mode."""
    if isinstance(v, tuple):
        return tuple(map(inferred, v))
    with torch.inference_mode():
        return v.clone() if isinstance(v, Tensor) else v


def gradient(value: Any, x: Tensor) -> Tensor:
    value = torch.stack(value) if isinstance(value, tuple) else value
    return torch.autograd.grad(value.sum(), x)[0]


LABELLED = [(case, case.call) for case in LOSSES if "log_prob" in case.name]
LABELLED += [(c, getattr(sharded, c.name)) for c, _ in LABELLED if not c.options]
EVERY = {**PROGRAMS, **{f"{c}-{call.__module__}": (c, call) for c, call in LABELLED}}


def test_every_function_with_a_target_is_looked_at() -> None:
    tested = {case.name for case, _ in EVERY.values()} | {f"linear_{name}" for name, _ in TARGETS}
    assert tested | {"entropy"} == set(PUBLIC_LOSSES)


@pytest.mark.parametrize("name", EVERY)
def test_target_labels_and_weights(name: str, backend: str) -> None:
    case, call = EVERY[name]
    x, teacher = leaf(4, 7), torch.randn(4, 7)
    given: dict[str, Any] = {}
    if "log_prob" not in name and name != "nn.LabelSmoothingLoss":
        given = {"token_weight": torch.tensor([1.0, 0.0, 2.0, 0.5])}
        if case.name == "cross_entropy":
            given["weight"] = torch.rand(7)
    t = target_of(case, teacher)
    expected = gradient(call(x, t, **given), x)
    t, given = inferred(t), {name: inferred(v) for name, v in given.items()}
    assert gradient(call(x, t, **given), x).equal(expected)
    with torch.no_grad():
        call(x, t, **given)
    with torch.inference_mode():
        call(inferred(x.detach()), t, **given)
    if "log_prob" not in name:  # in place
        assert gradient(call(x * 1, t, inplace_backward=True, **given), x).equal(expected)


@pytest.mark.parametrize("name", [n for n, p in PROGRAMS.items() if p[0].target != "labels"])
def test_logits_without_a_gradient(name: str) -> None:
    """The gradient is the target's, the student was made under inference mode."""
    case, call = PROGRAMS[name]
    x = torch.randn(4, 7)
    t = target_of(case, torch.randn(4, 7))
    values = t[0] if isinstance(t, tuple) else t
    values.requires_grad_()
    expected = gradient(call(x, t), values)
    assert gradient(call(inferred(x), t), values).equal(expected)


def test_statistics(backend: str) -> None:
    x, y, p = leaf(4, 7), torch.arange(4), torch.rand(4, 7)
    for t in (y, p):
        value, stats = fastdiv.cross_entropy(x, t, return_stats=True)
        got, of_inferred = fastdiv.cross_entropy(x, inferred(t), return_stats=True)
        assert gradient(got, x).equal(gradient(value, x))
        assert all(a.equal(b) for a, b in zip(stats, of_inferred, strict=True))


def test_distillation_module() -> None:
    x, t, y = leaf(4, 7), torch.randn(4, 7), torch.tensor([0, -100, 2, 6])
    loss = fastdiv.nn.DistillationLoss("js_div", temperature=2.0)
    weight = torch.rand(4)
    expected = gradient(loss(x, t, y, weight), x)
    assert gradient(loss(x, *map(inferred, (t, y, weight))), x).equal(expected)


@pytest.mark.parametrize("where", ["fastdiv", "distributed", "nn"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("name", "target"), TARGETS)
def test_linear(name: str, target: str, reduction: str, where: str, backend: str) -> None:
    """A teacher's rows, or its hidden states and its layer; labels and weights."""
    options: dict[str, Any] = {} if "log_prob" in name else {"reduction": reduction}
    case = make_case(name, (6,), 5, 11, target=target, bias=where != "nn", **options)
    if "log_prob" not in name:
        case.options["token_weight"] = torch.rand(6)
    call: Loss = case.call
    if where == "distributed":
        if f"linear_{name}" not in sharded.__all__:
            return
        call = _of(getattr(sharded, f"linear_{name}"), case)
    elif where == "nn":
        call = _of(_in_a_module(name, case), case)
    student = {k: v.requires_grad_() for k, v in case.leaves.items() if "target" not in k}
    teacher = {k: v for k, v in case.leaves.items() if "target" in k}

    def gradients() -> tuple[Tensor, ...]:
        value = call({**student, **teacher})
        value = torch.stack(value) if isinstance(value, tuple) else value
        return torch.autograd.grad(value.sum(), list(student.values()))

    expected = gradients()
    teacher = {k: inferred(v) for k, v in teacher.items()}
    case.label = inferred(case.label)
    case.options = {k: inferred(v) for k, v in case.options.items()}
    assert all(a.equal(b) for a, b in zip(gradients(), expected, strict=True))


def _of(function: Loss, case: LinearCase) -> Loss:
    def call(leaves: dict[str, Tensor]) -> Any:
        given = dict(leaves)
        first = given.pop("input"), given.pop("linear_weight"), *case.second_of(given)
        return function(*first, **given, **case.options)

    return call


def _in_a_module(name: str, case: LinearCase) -> Loss:
    kinds = {"kl_div": "KLDivLoss", "reverse_kl_div": "ReverseKLDivLoss", "js_div": "JSDivLoss"}
    kinds |= {"cross_entropy": "CrossEntropyLoss", "log_prob_and_entropy": "LogProbAndEntropy"}
    kinds |= {"topk_kl_div": "TopKKLDivLoss", "topk_reverse_kl_div": "TopKReverseKLDivLoss"}
    kinds |= {"log_prob": "LogProb"}
    kind = getattr(fastdiv.nn, f"Linear{kinds[name]}")

    def call(h: Tensor, w: Tensor, *t: Tensor, **given: Any) -> Any:
        of_call = ("token_weight", "target_linear_weight", "target_linear_bias")
        forward = {k: given.pop(k) for k in of_call if k in given}
        module = kind(5, 11, **given)
        del module.linear.weight
        module.linear.weight = w  # not a parameter: a leaf of the test's
        return module(h, *t, **forward)

    return call


# --- how they are saved ---


def test_no_copy_is_made() -> None:
    """What is saved is the teacher's own memory, strides and all."""
    with torch.inference_mode():
        t = torch.randn(40, 9)[::2, 1:8]
    x, saved = leaf(20, 7), []

    def pack(v: Tensor) -> Tensor:
        saved.append(v)
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        fastdiv.kl_div(x, t, target_type="logits")
    (found,) = [v for v in saved if v.data_ptr() == t.data_ptr()]
    assert found.stride() == t.stride() and not found.is_inference() and found.equal(t)


def test_tensors_that_are_no_inference_tensors_stay_what_they_are() -> None:
    x, y = torch.randn(3), None
    assert all(a is b for a, b in zip(savable(x, y), (x, y), strict=True))
    with torch.inference_mode():
        t = torch.randn(3)
        assert savable(t)[0] is t  # where nothing is saved


def test_a_negative_view() -> None:
    """Its memory holds the numbers with the other sign."""
    with torch.inference_mode():
        t = torch.randn(4, 7, dtype=torch.complex64).conj().imag
    assert t.is_neg()
    (found,) = savable(t)
    assert found.equal(t) and not found.is_inference()


def test_derivatives_and_transforms(backend: str) -> None:
    x, t = make_inputs((4, 7), torch.float64)
    teacher = inferred(t)

    def loss(t: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: fastdiv.js_div(x, t, target_type="logits")

    def curvature(t: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(t)(leaf), leaf, create_graph=True)
        return gradient(g.square(), leaf)

    assert curvature(teacher).equal(curvature(t))
    assert torch.autograd.gradcheck(loss(teacher), x.clone().requires_grad_())
    for transform in (torch.func.grad, torch.func.hessian):
        assert transform(loss(teacher))(x).equal(transform(loss(t))(x))
    rows = torch.func.vmap(torch.func.grad(loss(teacher[:1])))
    assert rows(x.unsqueeze(1)).equal(torch.func.vmap(torch.func.grad(loss(t[:1])))(x.unsqueeze(1)))
    batches = (batch := torch.stack([t, t.flip(0)])), inferred(batch)
    per_batch = torch.func.vmap(lambda x, t: fastdiv.js_div(x, t, target_type="logits"))
    leaves = torch.stack([x, x]).requires_grad_()
    expected, got = (gradient(per_batch(leaves, v), leaves) for v in batches)
    assert got.equal(expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        value = torch.autograd.forward_ad.unpack_dual(loss(teacher)(dual)).tangent
    torch.testing.assert_close(value, torch.func.jvp(loss(t), (x,), (t,))[1])


def test_a_retained_graph() -> None:
    x, t = leaf(4, 7), inferred(torch.randn(4, 7))
    value = fastdiv.kl_div(x, t, target_type="logits")
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    assert torch.autograd.grad(value, x)[0].equal(first)


def test_the_statistics_of_probability_vectors() -> None:
    p, q = torch.rand(3, 5), torch.rand(3, 5).requires_grad_()
    for name in ("kl_div", "js_div", "cross_entropy", "jensenshannon"):
        function = getattr(fastdiv.stats, name)
        assert gradient(function(inferred(p), q), q).equal(gradient(function(p, q), q))


# --- other libraries' functions ---


def test_patch_torch() -> None:
    x, y = leaf(4, 7), inferred(torch.arange(4))
    with fastdiv.patch_torch():
        value = torch.nn.functional.cross_entropy(x, y)
    expected = torch.nn.functional.cross_entropy(x, y.clone())
    torch.testing.assert_close(gradient(value, x), gradient(expected, x))


def test_trl() -> None:
    from helpers import trl_functions as functions

    x, t, y = leaf(2, 4, 9), torch.randn(2, 4, 9), torch.full((2, 4), 3)
    y[0] = -100
    for name in functions.WITH_JSD:
        theirs = functions.THEIRS[name]
        expected = gradient(theirs(x, t, y, beta=0.3), x)
        given = [inferred(v) for v in (t, y)]
        torch.testing.assert_close(gradient(theirs(x, *given, beta=0.3), x), expected)
        with functions.integration.apply():
            ours = functions.given_to(name)
            torch.testing.assert_close(gradient(ours(x, *given, beta=0.3), x), expected)


@pytest.mark.cpu_only("the ranks of these tests are processes of the CPU")
def test_ranks(ranks: Ranks) -> None:
    ranks.run(2, shard_arguments.inference_tensors)
