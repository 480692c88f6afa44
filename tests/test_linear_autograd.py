"""Derivatives of linear losses of any order and kind, and the compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from helpers.linear_cases import OF_CLASSES, TARGETS, LinearCase, make_case, named_gradients

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_TARGET = pytest.mark.parametrize(("name", "target"), TARGETS)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])


def small_case(name: str, target: str, reduction: str, **options: Any) -> LinearCase:
    if name not in OF_CLASSES:
        options["reduction"] = reduction
    options = {"chunk_size": 2, "dtype": torch.float64, **options}
    return make_case(name, (3,), 2, 5, target=target, teacher_hidden=3, **options)


@EVERY_TARGET
@REDUCTIONS
def test_first_and_second_derivatives(name: str, target: str, reduction: str) -> None:
    case = small_case(name, target, reduction)
    names = list(case.leaves)
    leaves = [v.requires_grad_() for v in case.leaves.values()]

    def function(*tensors: Tensor) -> Tensor:
        return case.call(dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivative_of_all_options() -> None:
    options = {"label_smoothing": 0.1, "softcap": 4.0, "z_loss": 0.01, "temperature": 2.0}
    case = small_case("cross_entropy", "labels", "mean", **options)
    leaves = [v.requires_grad_() for v in case.leaves.values()]
    names = list(case.leaves)
    assert torch.autograd.gradgradcheck(
        lambda *v: case.call(dict(zip(names, v, strict=True))), leaves
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_upstream_gradients(reduction: str) -> None:
    case = make_case(rows=(4,), reduction=reduction)
    leaves = {k: v.requires_grad_() for k, v in case.leaves.items()}
    upstream = torch.eye(4) if reduction == "none" else torch.tensor([1.0, 2.0])

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vmap(
            lambda g: torch.autograd.grad(value, list(leaves.values()), g, retain_graph=True)
        )(upstream)

    torch.testing.assert_close(gradients(case.call(leaves)), gradients(case.unfused(leaves)))


def test_one_tensor_in_two_places() -> None:
    """A model distilled into itself: its weight gets the gradients of both sides, once."""
    h, g = torch.randn(2, 4, 3, dtype=torch.float64).requires_grad_().unbind(0)
    w = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)

    def ours() -> Tensor:
        return fastdiv.linear_js_div(h, w, g, target_linear_weight=w)

    def plain() -> Tensor:
        return fastdiv.js_div(F.linear(h, w), F.linear(g, w), target_type="logits")

    first, second = [], []
    for function in (ours, plain):
        (grad,) = torch.autograd.grad(function(), w, create_graph=True)
        first.append(grad)
        second.append(torch.autograd.grad(grad.square().sum(), [w, h, g]))
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*second)


@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_retained_graph_and_upstream(reduction: str, dtype: torch.dtype) -> None:
    """Each backward gives the same, scaled by what comes from upstream; gradients accumulate."""
    case = make_case(dtype=dtype, reduction=reduction)
    leaves = {k: v.requires_grad_() for k, v in case.leaves.items()}
    tensors = list(leaves.values())
    value = case.call(leaves)
    upstream = torch.linspace(-1, 2, value.numel()).view_as(value)
    once = torch.autograd.grad(value, tensors, upstream, retain_graph=True)
    kept = [g.clone() for g in once]
    twice = torch.autograd.grad(value, tensors, 2 * upstream, retain_graph=True)
    for g, same, doubled in zip(once, kept, twice, strict=True):
        assert torch.equal(g, same), "a backward changed what an earlier one returned"
        torch.testing.assert_close(doubled, 2 * g, rtol=1e-2 if g.dtype.itemsize == 2 else 1e-5,
                                   atol=1e-6)  # fmt: skip
    for _ in range(2):
        case.call(leaves).sum().backward()
    expected = named_gradients(case.call, case.leaves, torch.full_like(value, 2.0))[1]
    for name, v in leaves.items():
        assert v.grad is not None
        rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(v.grad, expected[name], rtol=rtol, atol=rtol * largest)


def test_freed_graph_raises() -> None:
    case = make_case()
    leaves = {k: v.requires_grad_() for k, v in case.leaves.items()}
    value = case.call(leaves)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@REDUCTIONS
@pytest.mark.parametrize("target", ["labels", "probs", "hidden"])
def test_gradients_only_where_required(target: str, reduction: str) -> None:
    """Every subset of the tensors; those of the others are not computed."""
    name = "cross_entropy" if target == "labels" else "kl_div"
    case = make_case(name, target=target, dtype=torch.float64, reduction=reduction)
    _, expected = named_gradients(case.call, case.leaves)
    names = list(case.leaves)
    for chosen in range(1, 2 ** len(names)):
        wanted = [n for i, n in enumerate(names) if chosen >> i & 1]
        leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in case.leaves.items()}
        value = case.call(leaves)
        upstream = torch.linspace(1, 2, value.numel()).view_as(value).to(value)
        value.backward(upstream)
        for key, leaf in leaves.items():
            if key in wanted:
                torch.testing.assert_close(leaf.grad, expected[key])
            else:
                assert leaf.grad is None


@REDUCTIONS
def test_a_frozen_head_takes_no_product_for_its_gradient(
    monkeypatch: pytest.MonkeyPatch, reduction: str
) -> None:
    from fastdiv._linear.tiles import Gradients

    summed = []
    end = Gradients.end
    monkeypatch.setattr(
        Gradients, "end", lambda self, c: (summed.append(self.of_weight), end(self, c))[1]
    )
    case = make_case(bias=False, reduction=reduction)
    case.leaves["input"].requires_grad_()
    case.call().sum().backward()
    assert summed and all(v is None for v in summed)


def test_no_gradient_no_graph() -> None:
    case = make_case()
    with torch.no_grad():
        leaves = {k: v.requires_grad_() for k, v in case.leaves.items()}
        assert not case.call(leaves).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(case.call(), case.unfused())


# --- transforms, compiler, autocast ---------------------------------------------------------------


@EVERY_TARGET
@REDUCTIONS
def test_torch_func(name: str, target: str, reduction: str) -> None:
    case = small_case(name, target, reduction)
    value = case.call()
    upstream = torch.linspace(1, 2, value.numel(), dtype=torch.float64).view_as(value)
    _, expected = named_gradients(case.call, case.leaves, upstream)
    got = torch.func.grad(lambda v: (case.call(v) * upstream).sum())(case.leaves)
    torch.testing.assert_close(got, expected)
    tangents = {k: torch.ones_like(v) for k, v in case.leaves.items()}
    _, tangent = torch.func.jvp(lambda v: (case.call(v) * upstream).sum(), (case.leaves,),
                                (tangents,))  # fmt: skip
    torch.testing.assert_close(tangent, sum(g.sum() for g in expected.values()))


def test_vmap_over_hidden_states() -> None:
    w, y = torch.randn(7, 3), torch.randint(7, (4,))
    h = torch.randn(5, 4, 3)
    got = torch.func.vmap(lambda v: fastdiv.linear_cross_entropy(v, w, y))(h)
    expected = torch.stack([fastdiv.linear_cross_entropy(v, w, y) for v in h])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("name", "target", "reduction", "dynamic"),
    [
        ("cross_entropy", "labels", "mean", False),
        ("cross_entropy", "labels", "none", True),
        ("js_div", "hidden", "mean", True),
        ("log_prob_and_entropy", "labels", "none", True),
    ],
)
def test_compile(name: str, target: str, reduction: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    options = {} if name in OF_CLASSES else {"reduction": reduction}
    cases = [make_case(name, (rows,), target=target, **options) for rows in (37, 41)]

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(leaves: Any, label: Tensor | None) -> Tensor:
        return LinearCase(name, leaves, label, cases[0].options).call()

    for case in cases:
        got = named_gradients(lambda v, y=case.label: compiled(v, y), case.leaves)
        torch.testing.assert_close(got, named_gradients(case.call, case.leaves))
        with torch.no_grad():
            torch.testing.assert_close(compiled(case.leaves, case.label), got[0])


@pytest.mark.cpu_only("inductor of the CPU")
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    case = make_case(label_smoothing=0.1)

    def step(h: Tensor, w: Tensor) -> Tensor:
        return fastdiv.linear_cross_entropy(h.tanh(), w, case.label, label_smoothing=0.1) * 3

    leaves = {k: case.leaves[k] for k in ("input", "linear_weight")}
    got = named_gradients(lambda v: torch.compile(step, fullgraph=True)(*v.values()), leaves)
    torch.testing.assert_close(got, named_gradients(lambda v: step(*v.values()), leaves))


@REDUCTIONS
def test_autocast(reduction: str) -> None:
    """As F.linear: layers in the lower precision; the loss in float32, gradients as leaves are."""
    case = make_case("kl_div", target="hidden", reduction=reduction)
    half = {k: v.bfloat16() for k, v in case.leaves.items()}
    expected = named_gradients(case.call, half)
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16):
        value, gradients = named_gradients(case.call, case.leaves)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected[0])
    for name, g in gradients.items():
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, expected[1][name].float())


def test_opcheck() -> None:
    """Schemas, fakes and tracing of the two ops."""
    from fastdiv._engine.ops import packed
    from fastdiv._linear import ops
    from fastdiv.reference import Spec

    h, w = torch.randn(4, 3), torch.randn(7, 3)
    y = torch.randint(7, (4,))
    tensors = (h, w, *[None] * 4, torch.rand(4), y, None, None, torch.rand(4, 7) < 0.9)
    options = packed(Spec("cross_entropy", reduction="mean"))
    needed = [True, True, *[False] * 4, True]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for need in (needed, [False] * 7):
        arguments = (*tensors, *options, True, 0, None, need)
        torch.library.opcheck(torch.ops.fastdiv._linear_forward, arguments, test_utils=tests)
    value, divisor, record, *_ = ops.forward(*tensors, *options, True, 0, None, [False] * 7)
    arguments = (torch.ones_like(value), divisor, record, *tensors, *options, 0, None, needed)
    torch.library.opcheck(torch.ops.fastdiv._linear_backward, arguments, test_utils=tests)


def test_import_does_not_load_dynamo() -> None:
    """Which takes a second, for those who do not compile."""
    code = "import sys, fastdiv; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
