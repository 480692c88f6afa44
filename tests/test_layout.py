"""Shapes, class dimensions, strides, alignment and label types: tensors that are not [R, C]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from fastdiv._engine import arguments
from helpers.cases import KERNELS, LOSSES, Case, make_inputs
from helpers.values import same, uneven, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

gradients = partial(value_and_gradients, upstream=uneven)  # each row with a gradient of its own
SHAPES_AND_DIMS = [((7,), 0), ((7,), -1), ((5, 4, 3), 0), ((5, 4, 3), 1), ((5, 4, 3), -2)]
SHAPES_AND_DIMS += [((2, 5, 4, 3), dim) for dim in (0, 1, -1, -2)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS, ids=str)
@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_classes_on_any_dimension(case: Case, shape: tuple[int, ...], dim: int) -> None:
    moved = list(shape)
    classes = moved.pop(dim)
    x, logits = make_inputs((*moved, classes), torch.float32)
    t = case.make_target(x, logits)
    # As rows of a matrix, row by row.
    rows = x.reshape(-1, classes)
    flat = t.reshape(rows.shape if t.is_floating_point() else -1) if t is not None else None
    expected = gradients(lambda x, t: case.call(x, t, **case.per_row), rows, flat)
    x_dim = x.movedim(-1, dim).contiguous()
    t_dim = t.movedim(-1, dim).contiguous() if t is not None and t.is_floating_point() else t
    value, *grads = gradients(lambda x, t: case.call(x, t, dim=dim, **case.per_row), x_dim, t_dim)
    outputs = (2,) if case.name == "log_prob_and_entropy" else ()
    assert value.shape == (*outputs, *moved)
    assert value.reshape(expected[0].shape).equal(expected[0])
    for grad, want in zip(grads, expected[1:], strict=True):
        assert grad.shape == x_dim.shape
        assert grad.movedim(dim, -1).reshape(want.shape).equal(want)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row slice": lambda x: torch.cat([x, x, x], -1)[:, x.shape[1] : 2 * x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "every second class": lambda x: x.repeat_interleave(2, -1)[:, ::2],
    "odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "overlapping rows": lambda x: x[:1].expand(x.shape),
    "broadcast classes": lambda x: x[:, :1].expand(x.shape),
}


SIDES = [
    (case, side)
    for case in KERNELS
    if not case.options
    for side in (("input", "target", "both") if case.soft else ("input",))
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "side"), SIDES, ids=str)
def test_strides_do_not_matter(case: Case, side: str, layout: str) -> None:
    x, logits = make_inputs((6, 603), torch.float32)
    t = case.make_target(x, logits)
    if side != "target":
        x = LAYOUTS[layout](x)
    if side != "input":
        t = LAYOUTS[layout](t)
    plain = [v.clone(memory_format=torch.contiguous_format) if v is not None else v for v in (x, t)]
    expected = gradients(lambda x, t: case.call(x, t, **case.per_row), *plain)
    actual = gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    for a, b in zip(actual, expected, strict=True):
        assert a.equal(b)


def test_rows_are_views_where_the_classes_are_contiguous() -> None:
    big = torch.randn(4, 6, 40)
    for view in (big[:, 1], big[:, :, 3:20], big[1, ::2], big.transpose(0, 1)[2], big[1, 2]):
        rows = arguments.as_rows(view, view.dim() - 1)
        # [:, :, 3:20] has rows at one stride; nothing of it is copied.
        assert rows.untyped_storage().data_ptr() == big.untyped_storage().data_ptr()
        assert rows.stride(1) == 1


SOFT = ("cross_entropy", "probs")
WITH_TARGET_ROWS = [c for c in KERNELS if c.divergence or (c.name, c.target) == SOFT]


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "bfloat16")], ids=str)
@pytest.mark.parametrize("case", WITH_TARGET_ROWS, ids=str)
def test_input_and_target_of_two_dtypes(case: Case, dtypes: tuple[str, str]) -> None:
    """Weights, too, are taken in the dtype that holds both."""
    x, logits = make_inputs((4, 37), torch.float64)
    x, t = (
        v.to(getattr(torch, d))
        for v, d in zip((x, case.make_target(x, logits)), dtypes, strict=True)
    )
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    options = {} if case.divergence else {"weight": torch.linspace(0.5, 1.5, 37)}
    loss = partial(case.call, token_weight=weight, **options)
    value, dx, dt = gradients(loss, x, t)
    expected = gradients(loss, x.double(), t.double())
    assert value.equal(expected[0]) and dx.dtype == x.dtype and dt.dtype == t.dtype
    assert dx.equal(expected[1].to(x.dtype)) and dt.equal(expected[2].to(t.dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_label_types(dtype: torch.dtype) -> None:
    x, _ = make_inputs((2, 300, 3), torch.float32)
    y = torch.randint(0, 256, (2, 3))
    expected = F.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(fastdiv.cross_entropy(x, y.to(dtype), reduction="none"), expected)
    torch.testing.assert_close(fastdiv.log_prob(x, y.to(dtype), dim=1), -expected)
    ignored = fastdiv.cross_entropy(x, y.to(dtype), ignore_index=int(y[0, 0]), reduction="none")
    assert ignored[0, 0] == 0


def test_labels_with_strides() -> None:
    x, _ = make_inputs((4, 3, 7), torch.float32)
    y = torch.randint(0, 7, (3, 8)).t()[::2]
    assert not y.is_contiguous()
    torch.testing.assert_close(
        fastdiv.cross_entropy(x, y, dim=-1), F.cross_entropy(x.movedim(-1, 1), y)
    )


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_input_and_target_of_different_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, t = make_inputs((3, 50), torch.float64)
    x, t = x.to(dtypes[0]), t.to(dtypes[1])
    value, dx, dt = gradients(
        lambda x, t: fastdiv.kl_div(x, t, target_type="logits", reduction="none"), x, t
    )
    assert (value.dtype, dx.dtype, dt.dtype) == (torch.float32, *dtypes)
    expected = fastdiv.kl_div(x.float(), t.float(), target_type="logits", reduction="none")
    assert value.equal(expected)


# --- numbers of classes that are no multiple of a vector, and addresses ------------------------


@pytest.mark.parametrize("classes", [1, 3, 7, 9, 15, 17, 31, 33, 63, 65, 511, 513, 1000, 8193])
def test_softcap_before_padding_lanes(classes: int) -> None:
    # Capping a lane that was padded with -inf gives it the mass e^-softcap.
    x, _ = make_inputs((3, classes), torch.float32)
    y = torch.arange(3) % classes
    value, dx = value_and_gradients(lambda x: fastdiv.cross_entropy(x, y, softcap=1.0), x)
    expected = value_and_gradients(lambda x: F.cross_entropy(torch.tanh(x), y), x)
    same(value, expected[0])
    same(dx, expected[1])


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("classes", [2, 5, 10, 11, 14, 18, 521, 8195])
@pytest.mark.parametrize("case", [case for case in LOSSES if not case.options], ids=str)
def test_every_tail_length(case: Case, classes: int) -> None:
    # A tail loop with the wrong step leaves classes out, or takes them twice.
    x, logits = make_inputs((3, classes), torch.float32)
    t = case.make_target(x, logits)
    actual = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    with fastdiv.backend("reference"):
        expected = value_and_gradients(lambda x, t: case.call(x, t, **case.per_row), x, t)
    for a, b in zip(actual, expected, strict=True):
        same(a, b, 5e-5 if case.target == "probs" else 5e-6)


def test_labels_and_logits_that_begin_at_an_odd_address() -> None:
    # 16-byte loads of labels[1:].
    labels = torch.randint(0, 11, (8,))
    for start in range(4):
        y = labels[start:]
        x = torch.randn(len(y) * 11 + 3)[3:].view(len(y), 11)
        same(fastdiv.cross_entropy(x, y), F.cross_entropy(x, y))
        same(fastdiv.log_prob(x, y.int()), -F.cross_entropy(x, y, reduction="none"))


def test_rows_further_apart_than_32_bits_reach() -> None:
    # Only the pages of two rows are touched.
    stride, classes = 2**31 + 64, 1000
    try:
        big = torch.empty(stride + classes, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"address space: {error}")
    rows = big.as_strided((2, classes), (stride, 1))
    rows.copy_(make_inputs((2, classes), torch.bfloat16)[0])
    y = torch.tensor([1, 2])
    same(fastdiv.cross_entropy(rows, y), F.cross_entropy(rows.float(), y))
    same(
        fastdiv.kl_div(rows, rows.flip(0), target_type="logits"),
        fastdiv.kl_div(rows.clone(), rows.flip(0), target_type="logits"),
    )
