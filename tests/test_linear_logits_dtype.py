"""Linear losses whose layer has half precision and whose logits are float32."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastdiv
from fastdiv._linear import tiles
from fastdiv._linear.tiles import Gradients, TiledLogits
from fastdiv.integrations.transformers.logits import DeferredLogits
from helpers.linear_cases import OF_CLASSES, TARGETS, TOPK, LinearCase, make_case, named_gradients

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_TARGET = pytest.mark.parametrize(("name", "target"), TARGETS)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
FLOAT = {"logits_dtype": torch.float32}


@pytest.fixture(params=[True, False], ids=["halves", "floats"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether halves are multiplied as they are, or converted."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: request.param)
    return bool(request.param)


def half_case(name: str, target: str, reduction: str, *rows: int, **options: Any) -> LinearCase:
    """A case whose dtype is bfloat16 if no other is given."""
    if name not in OF_CLASSES:
        options["reduction"] = reduction
    return make_case(name, rows, target=target, **{"dtype": torch.bfloat16, **options})


# --- values and gradients -------------------------------------------------------------------------


@HALVES
def test_log_probabilities_are_near_float64(dtype: torch.dtype, products: bool) -> None:
    """Logits that are rounded to bfloat16 are a thousand times farther away."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(64, 128, generator=generator).to(dtype)
    w = torch.randn(4000, 128, generator=generator).mul(128**-0.5 * 2).to(dtype)
    y = torch.randint(4000, (64,), generator=generator)
    truth = fastdiv.log_prob_and_entropy(h.double() @ w.double().t(), y)

    def error(**options: Any) -> float:
        got = fastdiv.linear_log_prob_and_entropy(h, w, y, **options)
        return max(float((a - b).abs().max()) for a, b in zip(got, truth, strict=True))

    assert error(**FLOAT) <= 2e-5
    if products:
        assert error() > 1e-4


@EVERY_TARGET
@REDUCTIONS
@HALVES
def test_values_are_near_float64(
    name: str, target: str, reduction: str, dtype: torch.dtype, products: bool
) -> None:
    """A teacher's hidden states have float32 logits, too."""
    case = half_case(name, target, reduction, 37, hidden=32, dtype=dtype, chunk_size=8)
    truth, _ = case.truth()
    torch.testing.assert_close(case.call(**FLOAT).double(), truth, rtol=1e-5, atol=1e-5)
    if products and dtype == torch.bfloat16 and target != "probs" and reduction == "none":
        assert (case.call() - truth).abs().max() > 1e-4


@EVERY_TARGET
@REDUCTIONS
def test_gradients_are_rounded_for_the_products_alone(
    name: str, target: str, reduction: str, products: bool
) -> None:
    """The gradient of a bias is a sum of floats, and has the error of its rounding alone.

    The others have the error of two roundings: of the gradient of the logits, and of the result.
    The first one is larger in units of a result that is a difference, as that of few classes is.
    """
    case = half_case(name, target, reduction, 300, hidden=32, classes=600, teacher_hidden=9)
    _, ours = named_gradients(lambda v: case.call(v, **FLOAT), case.leaves)
    _, truth = case.truth()
    for key, exact in truth.items():
        both = 2 if name in TOPK else 1.6
        roundings = 1 if key.endswith("bias") or not products else both
        of_one = (exact.bfloat16() - exact).norm()
        error = (ours[key].double() - exact).norm()
        assert ours[key].dtype == torch.bfloat16
        assert error <= 1.05 * roundings * of_one, f"{key}: {error / of_one:.2f} roundings"


@pytest.mark.parametrize("accumulate", ["weight", "rows"])
@HALVES
def test_many_blocks(
    accumulate: str, dtype: torch.dtype, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes whose gradients are rounded in several blocks."""
    monkeypatch.setattr(tiles, "NARROWED", {True: 48, False: 48})
    monkeypatch.setattr(tiles, "ROUNDED", 16)
    case = make_case(dtype=dtype, chunk_size=10, reduction="mean", accumulate=accumulate, **FLOAT)
    _, got = named_gradients(case.call, case.leaves)
    _, truth = LinearCase(case.name, case.leaves, case.label, {"reduction": "mean"}).truth()
    for key, g in got.items():
        assert (g.double() - truth[key]).abs().max() <= 2**-7 * truth[key].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@REDUCTIONS
def test_nothing_changes_for_wider_layers(dtype: torch.dtype, reduction: str) -> None:
    case = make_case("kl_div", target="hidden", dtype=dtype, reduction=reduction)
    got = named_gradients(lambda v: case.call(v, **FLOAT), case.leaves)
    torch.testing.assert_close(got, named_gradients(case.call, case.leaves), rtol=0, atol=0)


def test_a_teacher_in_half_precision_beside_a_student_in_another(products: bool) -> None:
    for student in (True, False):
        case = make_case("kl_div", target="hidden", reduction="none")
        for key in case.leaves:
            if key.startswith("target") != student:
                case.leaves[key] = case.leaves[key].bfloat16()
        truth, _ = case.truth()
        torch.testing.assert_close(case.call(**FLOAT).double(), truth, rtol=1e-5, atol=1e-5)


def test_statistics_and_many_dimensions_of_classes(products: bool) -> None:
    h, y = torch.randn(5, 8).bfloat16(), torch.randint(7, (5, 2))
    w, b = torch.randn(7, 2, 8).bfloat16(), torch.randn(7, 2).bfloat16()
    got = fastdiv.linear_cross_entropy(h, w, y, linear_bias=b, return_stats=True, **FLOAT)
    x = F.linear(h.double(), w.double().flatten(0, 1), b.double().flatten()).view(5, 7, 2)
    expected = fastdiv.cross_entropy(x, y, return_stats=True)
    for a, e in ((got[0], expected[0]), (got[1].lse, expected[1].lse)):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    one = fastdiv.linear_cross_entropy(h, w[:, 0], y[:, 0], return_stats=True, **FLOAT)
    lse = torch.logsumexp(h.double() @ w[:, 0].double().t(), -1)
    torch.testing.assert_close(one[1].lse.double(), lse, rtol=1e-5, atol=1e-5)


# --- a GPU's products -----------------------------------------------------------------------------


def test_a_gpu_gives_the_sums_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies halves into float32, and rounds their gradient in blocks."""
    if not torch.__version__.startswith("2.11"):  # which has no such product of meta tensors
        x, w = (torch.empty(s, 8, dtype=torch.bfloat16, device="meta") for s in (4, 30))
        on_meta = TiledLogits(x, w, w[:, 0], torch.float32)
        tile = on_meta.tile(slice(0, 4), slice(0, 30), torch.float32)  # torch checks the arguments
        assert tile.dtype == torch.float32 and tile.shape == (4, 30)
    mm, calls = torch.mm, []

    def product(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        if "out_dtype" not in options:
            return mm(a, b, **options)
        calls.append((a.dtype, b.dtype, options["out_dtype"]))
        return mm(a.float(), b.float())

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(tiles, "multiplies", lambda half: True)
    h, w = torch.randn(4, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    logits = TiledLogits(h, w, torch.arange(30).bfloat16(), torch.float32)
    logits.converts = False  # as on a GPU
    tile = logits.tile(slice(1, 4), slice(5, 30), torch.float32)
    assert calls == [(torch.bfloat16, torch.bfloat16, torch.float32)]
    exact = h[1:].double() @ w[5:].double().t() + torch.arange(5, 30)
    torch.testing.assert_close(tile.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_tile_is_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rounded a block at a time."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: True)
    monkeypatch.setattr(tiles, "NARROWED", {True: 64, False: 64})
    largest = [0]
    add = tiles._add_product
    monkeypatch.setattr(
        tiles,
        "_add_product",
        lambda total, rows, a, b: (largest.append(a.untyped_storage().nbytes()),
                                   add(total, rows, a, b)),
    )  # fmt: skip
    h, w = torch.randn(4, 8).bfloat16(), torch.randn(300, 8).bfloat16()
    logits = TiledLogits(h, w, None, torch.float32)
    gradients = Gradients(logits, (True, True, False))
    gradients.begin(slice(0, 300))
    gradients.add(torch.randn(4, 300), slice(0, 4), slice(0, 300))
    assert max(largest) == 4 * 64 * 2


# --- logits that are held whole -------------------------------------------------------------------


@EVERY_TARGET
def test_second_derivatives(name: str, target: str, products: bool) -> None:
    """Those of float32 logits, also where the first backward computed halves."""
    case = half_case(name, target, "mean", 5, hidden=4, classes=9)

    def twice(function: Any) -> list[Tensor]:
        leaves = {k: v.detach().requires_grad_() for k, v in case.leaves.items()}
        value = function(leaves).float()
        upstream = torch.linspace(1, 2, value.numel()).view_as(value)
        first = torch.autograd.grad(value, list(leaves.values()), upstream, create_graph=True)
        total = sum(g.float().square().sum() for g in first)
        return list(torch.autograd.grad(total, list(leaves.values())))

    def of_floats(leaves: Mapping[str, Tensor]) -> Tensor:
        with fastdiv.backend("reference"):
            return case.unfused({k: v.float() for k, v in leaves.items()})

    ours, expected = twice(lambda v: case.call(v, **FLOAT)), twice(of_floats)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2 * float(b.abs().max()))


@EVERY_TARGET
@pytest.mark.parametrize("how", ["reference", "func", "jvp", "trace"])
def test_whole_logits_are_float32(name: str, target: str, how: str) -> None:
    case = half_case(name, target, "none", 7, hidden=32)
    truth, _ = case.truth()
    if how == "reference":
        with fastdiv.backend("reference"):
            got = case.call(**FLOAT)
    elif how == "func":
        got = torch.func.vmap(lambda _: case.call(**FLOAT))(torch.zeros(1))[0]
    elif how == "jvp":
        tangents = {k: torch.zeros_like(v) for k, v in case.leaves.items()}
        got, _ = torch.func.jvp(lambda v: case.call(v, **FLOAT), (case.leaves,), (tangents,))
    else:
        hidden = case.leaves["input"]
        traced = torch.jit.trace(lambda h: case.call({**case.leaves, "input": h}, **FLOAT), hidden)
        got = traced(hidden)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


# --- autocast and the compiler --------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@REDUCTIONS
def test_autocast(reduction: str, whole: bool, products: bool) -> None:
    """It casts the layer to halves, and the logits are float32 sums all the same."""
    case = make_case("kl_div", target="hidden", hidden=32, reduction=reduction)
    half = LinearCase(case.name, {k: v.bfloat16() for k, v in case.leaves.items()}, None,
                      case.options)  # fmt: skip
    truth, of_truth = half.truth()
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16), fastdiv.backend("reference" if whole else "auto"):
        value, gradients = named_gradients(lambda v: case.call(v, **FLOAT), case.leaves)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
    for key, g in gradients.items():
        largest = float(of_truth[key].abs().max())
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), of_truth[key], rtol=0, atol=1e-2 * largest)


@pytest.mark.parametrize(
    ("name", "target", "reduction", "dynamic"),
    [
        ("cross_entropy", "labels", "mean", False),
        ("js_div", "hidden", "none", True),
        ("log_prob_and_entropy", "labels", "none", True),
    ],
)
def test_compile(name: str, target: str, reduction: str, dynamic: bool, products: bool) -> None:
    torch._dynamo.reset()
    cases = [half_case(name, target, reduction, rows) for rows in (37, 41)]

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(leaves: Any, label: Tensor | None) -> Tensor:
        return LinearCase(name, leaves, label, cases[0].options).call(**FLOAT)

    for case in cases:
        got = named_gradients(lambda v, y=case.label: compiled(v, y), case.leaves)
        expected = named_gradients(lambda v, c=case: c.call(v, **FLOAT), case.leaves)
        torch.testing.assert_close(got, expected)


def test_compile_whole_logits_under_autocast() -> None:
    torch._dynamo.reset()
    case = make_case(hidden=32)
    half = LinearCase(case.name, {k: v.bfloat16() for k, v in case.leaves.items()}, case.label)
    device = torch.get_default_device().type

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(leaves: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return case.call(leaves, **FLOAT)

    with fastdiv.backend("reference"):
        got = compiled(case.leaves)
    torch.testing.assert_close(got.double(), half.truth()[0], rtol=1e-5, atol=1e-5)


@HALVES
@REDUCTIONS
def test_fake_tensors(reduction: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, reduction=reduction, **FLOAT)
    mode = FakeTensorMode()
    leaves, label = tree_map_only(Tensor, mode.from_tensor, (case.leaves, case.label))
    with mode:
        fake = LinearCase(case.name, leaves, label, case.options)
        value, gradients = named_gradients(fake.call, leaves)
    assert value.dtype == torch.float32
    for key, g in gradients.items():
        assert (g.shape, g.dtype) == (case.leaves[key].shape, dtype)


@HALVES
def test_opcheck(dtype: torch.dtype) -> None:
    from fastdiv._engine.ops import packed
    from fastdiv._linear import ops
    from fastdiv.reference import Spec

    h, w = torch.randn(4, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    tensors = (h, w, *[None] * 5, torch.randint(7, (4,)), None, None, None)
    options = packed(Spec("cross_entropy", reduction="mean"))
    needed = [True, True, *[False] * 5]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*tensors, *options, False, 0, torch.float32)
    for need in (needed, [False] * 7):
        given = (*arguments, need)
        torch.library.opcheck(torch.ops.fastdiv._linear_forward, given, test_utils=tests)
    value, divisor, record, *_ = ops.forward(*arguments, [False] * 7)
    given = (torch.ones_like(value), divisor, record, *tensors, *options, 0, torch.float32, needed)
    torch.library.opcheck(torch.ops.fastdiv._linear_backward, given, test_utils=tests)


# --- modules --------------------------------------------------------------------------------------

MODULES: list[tuple[str, dict[str, Any]]] = [
    ("LinearCrossEntropyLoss", {"reduction": "none"}),
    ("LinearLogProbAndEntropy", {}),
    ("LinearKLDivLoss", {"reduction": "none"}),
    ("LinearJSDivLoss", {"reduction": "none"}),
]
EVERY_MODULE = pytest.mark.parametrize(("kind", "options"), MODULES)


def module_and_tensors(kind: str, **options: Any) -> tuple[nn.Module, list[Tensor], dict[str, Any]]:
    """A module in bfloat16, its arguments, and those of a teacher's layer."""
    torch.manual_seed(0)
    module = getattr(fastdiv.nn, kind)(32, 50, bias=True, dtype=torch.bfloat16, **options)
    hidden = torch.randn(9, 32).mul(4).bfloat16()
    if not kind.endswith("DivLoss"):
        return module, [hidden, torch.randint(50, (9,))], {}
    teacher = {"target_linear_weight": torch.randn(50, 6).bfloat16()}
    return module, [hidden, torch.randn(9, 6).bfloat16()], teacher


def stacked(value: Any) -> Tensor:
    return torch.stack(value) if isinstance(value, tuple) else value


def truth_of(module: nn.Module, tensors: list[Tensor], teacher: dict[str, Any]) -> Tensor:
    double = copy.deepcopy(module).double()
    tensors = [v.double() if v.is_floating_point() else v for v in tensors]
    return stacked(double(*tensors, **{k: v.double() for k, v in teacher.items()}))


@EVERY_MODULE
@pytest.mark.parametrize("hook", [False, True])
def test_modules(kind: str, options: dict[str, Any], hook: bool, products: bool) -> None:
    """A hook that reads the logits gets float32."""
    module, tensors, teacher = module_and_tensors(kind, **options, **FLOAT)
    expected = truth_of(module, tensors, teacher)
    assert "logits_dtype=torch.float32" in repr(module)
    seen = []
    if hook:
        module.linear.register_forward_hook(lambda _, given, logits: seen.append(logits.dtype))
    copies = (
        (module, copy.deepcopy(module)) if hook else (module, pickle.loads(pickle.dumps(module)))
    )
    for m in copies:
        got = stacked(m(*tensors, **teacher))
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert not hook or (seen and set(seen) == {torch.float32})
    assert "forward" not in vars(module.linear)


@EVERY_MODULE
def test_modules_under_autocast_with_a_hook(kind: str, options: dict[str, Any]) -> None:
    module, tensors, teacher = module_and_tensors(kind, **options, **FLOAT)
    expected = truth_of(module, tensors, teacher)
    module.float().linear.register_forward_hook(lambda *_: None)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = module(*(v.float() if v.is_floating_point() else v for v in tensors), **teacher)
    torch.testing.assert_close(stacked(got).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", ["LinearCrossEntropyLoss", "LinearKLDivLoss"])
def test_adapters(kind: str, held: bool, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of an adapter are added to those of its layer in float32."""
    peft = pytest.importorskip("peft")
    module, tensors, teacher = module_and_tensors(kind, reduction="none", **FLOAT)
    options = {"target_modules": ["linear"], "init_lora_weights": False, "r": 1, "lora_alpha": 1}
    peft.inject_adapter_in_model(peft.LoraConfig(**options), module)
    for name, v in module.named_parameters():
        if "lora_A" in name:  # whose product is exact: the adapter's hidden states are halves
            v.data = torch.zeros_like(v.data).index_fill_(1, torch.tensor([3]), 1.0)
    module.bfloat16()
    expected = truth_of(module, tensors, teacher)
    if held:
        monkeypatch.setattr(DeferredLogits, "as_one_product", lambda self: None)
    got = module(*tensors, **teacher)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


class Rounded(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@EVERY_MODULE
def test_a_layer_that_rounds_its_logits_is_refused(kind: str, options: dict[str, Any]) -> None:
    module, tensors, teacher = module_and_tensors(kind, **options, **FLOAT)
    module.linear = Rounded(32, 50, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="a Rounded that is compiled .* in torch.bfloat16"):
        module(*tensors, **teacher)
    module.options["logits_dtype"] = None
    module(*tensors, **teacher)
    module.options["logits_dtype"] = torch.float32
    tensors = [v.float() if v.is_floating_point() else v for v in tensors]
    module.float()(*tensors, **{k: v.float() for k, v in teacher.items()})


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [torch.float64, torch.bfloat16, "float32", 32, float])
def test_refused(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed."""
    monkeypatch.setattr("fastdiv._linear.autograd.run", lambda *a: pytest.fail("it was computed"))
    message = r"logits_dtype must be None or torch.float32, got .*(float|32)"
    for name, target in TARGETS:
        with pytest.raises(ValueError, match=message):
            make_case(name, target=target).call(logits_dtype=wrong)
    h, w, y = torch.randn(4, 3), torch.randn(7, 2, 3), torch.randint(7, (4, 2))
    with pytest.raises(ValueError, match=message):
        fastdiv.linear_cross_entropy(h, w, y, logits_dtype=wrong)
    for kind, _ in MODULES:
        module, tensors, teacher = module_and_tensors(kind, logits_dtype=wrong)
        module.linear.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=message):
            module(*tensors, **teacher)
