"""The two ways to sum gradients of a layer: over chunks of rows, and over blocks of classes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastdiv
from fastdiv._linear import ops, tiles
from fastdiv._linear.autograd import LinearCall
from fastdiv.reference import Spec
from helpers.cases import DTYPES
from helpers.linear_cases import DIVERGENCES, TARGETS, LinearCase, make_case, named_gradients

pytestmark = pytest.mark.usefixtures("one_thread")
REDUCED = [(n, t) for n, t in TARGETS if n in ("cross_entropy", *DIVERGENCES)]
EVERY_TARGET = pytest.mark.parametrize(("name", "target"), REDUCED)
BOTH_WAYS = pytest.mark.parametrize("accumulate", ["weight", "rows"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
# Of gradients, in units of the largest, as in test_linear.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def with_detached_target(case: LinearCase) -> LinearCase:
    """The same, but logits or probabilities as a target get no gradient."""
    if "target_linear_weight" not in case.leaves and "target" in case.leaves:
        case.label = case.leaves.pop("target")
    return case


def products(case: LinearCase, upstream: Tensor | None = None) -> tuple[int, dict[str, Tensor]]:
    """How many tiles of logits a step computes, in units of all logits, and its gradients."""
    computed = 0
    tile = tiles.TiledLogits.tile

    def counted(self: Any, rows: Any, classes: slice, dtype: torch.dtype) -> Tensor:
        nonlocal computed
        made = tile(self, rows, classes, dtype)
        if self.input is not None and self.weight is not None:
            computed += made.numel()
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles.TiledLogits, "tile", counted)
        _, gradients = named_gradients(case.call, case.leaves, upstream)
    layers = 2 if "target_linear_weight" in case.leaves else 1
    all_logits = case.leaves["input"][..., 0].numel() * len(case.leaves["linear_weight"]) * layers
    assert computed % all_logits == 0
    return computed // all_logits, gradients


# --- values and gradients -------------------------------------------------------------------------


@EVERY_TARGET
@pytest.mark.parametrize(
    ("dtype", "halves"),
    [(d, h) for d in DTYPES for h in (False, True) if d.itemsize == 2 or not h],
    ids=lambda v: {True: "halves", False: "floats"}.get(v, str(v)),
)
@BOTH_WAYS
def test_gradients(
    name: str,
    target: str,
    dtype: torch.dtype,
    accumulate: str,
    halves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways are near float64, and the logits are computed once or twice as they promise."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: halves)
    case = make_case(
        name, dtype=dtype, target=target, chunk_size=10, reduction="mean", accumulate=accumulate
    )
    if dtype.itemsize == 2:
        case = with_detached_target(case)
    times, gradients = products(case)
    assert times == (1 if accumulate == "weight" else 2)
    _, expected = case.truth()
    allowed = max(TOLERANCE[dtype], 0.05 if halves and dtype == torch.bfloat16 else 0)
    allowed = max(allowed, 0.01 if halves and dtype == torch.float16 else 0)
    for key, g in gradients.items():
        assert g.dtype == dtype and g.shape == case.leaves[key].shape
        largest = float(expected[key].abs().max())
        error = (g.double() - expected[key]).abs().max()
        assert error <= allowed * largest, f"{key}: {error / largest:.1e}"


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@HALVES
def test_options(reduction: str, dtype: torch.dtype) -> None:
    """Weights of rows and classes, ignored rows and a temperature, with statistics and without."""
    options: dict[str, Any] = {
        "reduction": reduction,
        "weight": torch.linspace(0.5, 40, 300),
        "token_weight": (torch.arange(37) % 3).double() * 100,
        "temperature": 0.5,
        "z_loss": 1e-2,
        "label_smoothing": 0.1,
        "ignore_index": 5,
    }
    case = make_case(dtype=dtype, chunk_size=7, accumulate="weight", **options)
    assert case.label is not None
    case.label[::4] = 5
    case.leaves["input"][::4] = torch.nan
    _, got = named_gradients(case.call, case.leaves)
    case.leaves["input"][::4] = 0
    _, expected = case.truth()
    for key, g in got.items():
        largest = float(expected[key].abs().max())
        assert (g.double() - expected[key]).abs().max() <= TOLERANCE[dtype] * largest, key
    leaves = {k: v.requires_grad_() for k, v in case.leaves.items()}
    loss, _ = fastdiv.linear_cross_entropy(
        leaves["input"], leaves["linear_weight"], case.label, linear_bias=leaves["linear_bias"],
        return_stats=True, **case.options,
    )  # fmt: skip
    again = torch.autograd.grad(loss, list(leaves.values()), torch.ones_like(loss))
    once = torch.autograd.grad(case.call(leaves), list(leaves.values()))
    for g, h in zip(again, once, strict=True):
        torch.testing.assert_close(g, h, rtol=2e-2, atol=1e-2 * float(h.abs().max()))


@HALVES
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_row_counts(dtype: torch.dtype, reduction: str) -> None:
    for rows in (0, 4):
        case = make_case(rows=(rows,), dtype=dtype, reduction=reduction, accumulate="weight")
        case.label = torch.full((rows,), -100)
        value, gradients = named_gradients(case.call, case.leaves)
        assert value.isnan() if reduction == "mean" else value == 0
        assert all((g == 0).all() for g in gradients.values())


# --- which way is taken ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "rows", "changes"),
    [
        (1, 40, {"dtype": torch.float32}),
        (2, 40, {"dtype": torch.float32, "reduction": "none"}),
        (2, 40, {"dtype": torch.bfloat16}),
        (2, 40, {"dtype": torch.float16}),
        (1, 400, {"dtype": torch.bfloat16}),  # 48 rows for each of the hidden size
        (2, 380, {"dtype": torch.bfloat16}),
    ],
)
def test_rule(times: int, rows: int, changes: dict[str, Any]) -> None:
    """A float32 sum of at most half of a twelfth of the logits is taken."""
    case = make_case(rows=(rows,), bias=False, **changes)
    assert products(case)[0] == times


def test_a_frozen_weight_in_half_precision_needs_no_sum() -> None:
    case = make_case(dtype=torch.bfloat16, bias=False)
    w = case.leaves.pop("linear_weight")
    h = case.leaves.pop("input").requires_grad_()
    made = []
    forward = LinearCall.forward

    def noted(self: LinearCall, tensors: Any, needed: Any, symbolic: Any) -> Any:
        made.append(forward(self, tensors, needed, symbolic))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearCall, "forward", noted)
        assert case.label is not None
        fastdiv.linear_cross_entropy(h, w, case.label).backward()
    assert made[0].gradients and made[0].gradients[1].numel() == 0


@pytest.mark.parametrize("words", ["weight", "rows"])
def test_a_teacher_in_another_precision(words: str) -> None:
    """Each gradient has the dtype of its tensor, and each weight its own sum."""
    case = make_case("kl_div", target="hidden", accumulate=words, reduction="mean")
    for key in ("input", "linear_weight", "linear_bias"):
        case.leaves[key] = case.leaves[key].half()
    _, got = named_gradients(case.call, case.leaves)
    _, expected = case.truth()
    for key, g in got.items():
        assert g.dtype == case.leaves[key].dtype
        largest = float(expected[key].abs().max())
        assert (g.double() - expected[key]).abs().max() <= 1e-2 * largest, key


# --- errors ---------------------------------------------------------------------------------------


def linear_losses() -> list[Any]:
    h, w, y = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, 2, 2])
    t = torch.randn(4, 7)
    divergences = [
        lambda name=name, **o: getattr(fastdiv, name)(h, w, t, target_type="logits", **o)
        for name in ("linear_kl_div", "linear_reverse_kl_div", "linear_js_div")
    ]
    many = torch.randn(7, 2, 3)
    return [
        lambda **o: fastdiv.linear_cross_entropy(h, w, y, **o),
        lambda **o: fastdiv.linear_cross_entropy(h, many, y[:, None].expand(4, 2), **o),
        *divergences,
    ]


@pytest.mark.parametrize("call", linear_losses())
def test_refused(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed."""
    call(accumulate="weight", reduction="sum")
    call(accumulate="rows", reduction="none")
    monkeypatch.setattr("fastdiv._linear.autograd.run", lambda *a: pytest.fail("it was computed"))
    monkeypatch.setattr("fastdiv._linear.cross_entropy.cross_entropy", lambda *a, **o: 0 / 0)
    for wrong in ("columns", True, 2, ("rows",)):
        with pytest.raises(ValueError, match=r"accumulate must be one of \('weight', 'rows'\)"):
            call(accumulate=wrong)
    with pytest.raises(ValueError, match="use accumulate=None, or reduce the loss"):
        call(accumulate="weight", reduction="none")


def test_a_target_of_halves_that_wants_a_gradient() -> None:
    """It is as large as the logits, and has no sum in float32."""
    case = make_case("kl_div", target="logits", dtype=torch.float16, reduction="sum")
    with pytest.raises(ValueError, match=r"logits in half precision, got torch.float16: detach it"):
        named_gradients(lambda v: case.call(v, accumulate="weight"), case.leaves)
    assert products(case)[0] == 2
    with torch.no_grad():
        case.call(accumulate="weight")


@pytest.mark.cpu_only("a process group of the CPU")
def test_sharded_classes() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        w = distribute_tensor(torch.randn(7, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
        h, y = torch.randn(4, 3), torch.tensor([0, 6, 2, 2])
        with pytest.raises(ValueError, match=r"accumulate='weight' is not supported for sharded"):
            fastdiv.linear_cross_entropy(h, w, y, accumulate="weight")
        values = [fastdiv.linear_cross_entropy(h, w, y, accumulate=a) for a in (None, "rows")]
        assert values[0] == values[1]
    finally:
        dist.destroy_process_group()


# --- autograd and the compiler --------------------------------------------------------------------


@BOTH_WAYS
def test_derivatives(accumulate: str) -> None:
    case = make_case(
        "kl_div", (3,), 2, 5, target="hidden", teacher_hidden=3, chunk_size=2,
        dtype=torch.float64, accumulate=accumulate,
    )  # fmt: skip
    names, leaves = list(case.leaves), [v.requires_grad_() for v in case.leaves.values()]

    def function(*tensors: Tensor) -> Tensor:
        return case.call(dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@HALVES
@BOTH_WAYS
def test_retained_graph(accumulate: str, dtype: torch.dtype) -> None:
    """Each backward has its own scale, and none changes what an earlier one returned."""
    case = make_case(dtype=dtype, accumulate=accumulate)
    leaves = [v.requires_grad_() for v in case.leaves.values()]
    value = case.call()
    once = torch.autograd.grad(value, leaves, torch.tensor(4.0), retain_graph=True)
    kept = [g.clone() for g in once]
    twice = torch.autograd.grad(value, leaves, torch.tensor(8.0), retain_graph=True)
    for g, same, doubled in zip(once, kept, twice, strict=True):
        assert torch.equal(g, same)
        torch.testing.assert_close(doubled, 2 * g, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("accumulate", ["weight", "rows", None])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(accumulate: str | None, dynamic: bool) -> None:
    torch._dynamo.reset()
    cases = [make_case(rows=(r,), dtype=torch.float16, accumulate=accumulate) for r in (37, 41)]

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(leaves: Any, label: Tensor | None) -> Tensor:
        return LinearCase("cross_entropy", leaves, label, cases[0].options).call()

    for case in cases:
        got = named_gradients(lambda v, y=case.label: compiled(v, y), case.leaves)
        torch.testing.assert_close(got, named_gradients(case.call, case.leaves))


@pytest.mark.parametrize("accumulate", ["weight", None])
def test_compile_rows_that_a_mask_leaves(accumulate: str | None) -> None:
    """The rule cannot compare a number of rows that depends on data."""
    torch._dynamo.reset()
    case = make_case(rows=(40,), dtype=torch.bfloat16, bias=False, accumulate=accumulate)
    assert case.label is not None

    def step(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        keep = (y % 2 == 0).nonzero().squeeze(1)
        return fastdiv.linear_cross_entropy(h[keep], w, y[keep], accumulate=accumulate)

    leaves = {k: case.leaves[k] for k in ("input", "linear_weight")}
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = named_gradients(lambda v: compiled(*v.values(), case.label), leaves)
    expected = named_gradients(lambda v: step(*v.values(), case.label), leaves)
    torch.testing.assert_close(got, expected)


@HALVES
@BOTH_WAYS
def test_fake_tensors(accumulate: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, accumulate=accumulate)
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
    """The forward's gradients are float32 sums, as its fake says."""
    from fastdiv._engine.ops import packed

    h, w = torch.randn(4, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    tensors = (h, w, *[None] * 5, torch.randint(7, (4,)), None, None, None)
    arguments = (*tensors, *packed(Spec("cross_entropy", reduction="mean")), False, 0, None)
    needed = [True, True, *[False] * 5]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastdiv._linear_forward, (*arguments, needed), test_utils=tests)
    *_, dh, dw, _, _, _, _, _ = ops.forward(*arguments, needed)
    assert dh.dtype == dw.dtype == torch.float32


# --- products on a GPU ----------------------------------------------------------------------------


def test_a_gpu_adds_products_to_their_sum_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product apart from its sum would take the memory of another one."""
    if not torch.__version__.startswith("2.11"):  # which has no such product of meta tensors
        total = torch.zeros(6, 5, device="meta")
        a, b = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((4, 3), (3, 5)))
        tiles._add_product(total, slice(0, 4), a, b)  # torch checks the arguments
    sums = []

    def addmm(self: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any, out: Tensor) -> Tensor:
        sums.append((self.data_ptr(), out.data_ptr(), out.dtype, out_dtype))
        return out.copy_(self + a.float() @ b.float())

    monkeypatch.setattr(tiles, "rounds_products", lambda x: False)
    monkeypatch.setattr(torch, "addmm", addmm)
    total = torch.ones(6, 5)
    a, b = torch.randn(4, 3).bfloat16(), torch.randn(3, 5).bfloat16()
    tiles._add_product(total, slice(2, 6), a, b)
    place = total[2:].data_ptr()
    assert sums == [(place, place, torch.float32, torch.float32)]
    torch.testing.assert_close(total[2:], 1 + a.float() @ b.float())
    assert (total[:2] == 1).all()


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CrossEntropy", "KLDiv", "ReverseKLDiv", "JSDiv"])
def test_modules(name: str) -> None:
    """They keep the option, show it, and add nothing to the state."""
    kind = getattr(fastdiv.nn, f"Linear{name}Loss")
    module = kind(3, 7, accumulate="rows")
    assert "accumulate='rows'" in repr(module)
    assert module.state_dict().keys() == kind(3, 7).state_dict().keys()
    h = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, 6, 2, 2]) if name == "CrossEntropy" else torch.randn(4, 3)
    more = {} if name == "CrossEntropy" else {"target_linear_weight": torch.randn(7, 3)}
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        value = m(h, target, **more)
        assert type(value.grad_fn).__name__ == "_EagerLossBackward"
        assert value.grad_fn.gradients == ()
    module.linear.register_forward_hook(lambda *_: None)  # takes the loss of real logits
    torch.testing.assert_close(module(h, target, **more), value)
    with pytest.raises(ValueError, match="accumulate must be one of"):
        kind(3, 7, accumulate="all")(h, target, **more)
    with pytest.raises(TypeError, match="no options"):
        fastdiv.nn.LinearLogProbAndEntropy(3, 7, accumulate="rows")
