"""The bits of a row depend on nothing but the row and the instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.bits import backward_call, bits, evaluate, inputs, moved, statistics
from helpers.cases import KERNELS, Case, TopKCase

pytestmark = pytest.mark.usefixtures("isa")

LOW = [torch.float32, torch.bfloat16, torch.float16]
# Losses of named classes have no forward that writes the gradient.
WITH_FORWARD_GRAD = [c for c in KERNELS if c.name != "log_prob" and not isinstance(c, TopKCase)]
EVERY_CASE = pytest.mark.parametrize("case", KERNELS, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d)[6:])


def assert_same(
    got: list[Tensor], expected: list[Tensor], rows: slice | list[int], what: str
) -> None:
    for name, g, e in zip(
        ("value", "gradient", "gradient of the target"), got, expected, strict=False
    ):
        e = e[rows] if e.dim() else e
        different = (bits(g) != bits(e)).nonzero()
        assert g.shape == e.shape
        assert not len(different), (
            f"{name} differs {what}: at {different[0].tolist()} {g[tuple(different[0])]} against "
            f"{e[tuple(different[0])]}, {len(different)} places"
        )


def part(t: Tensor | None, rows: slice | list[int]) -> Tensor | None:
    return None if t is None else t[rows]


@pytest.mark.cpu_only("threads")
@EVERY_CASE
@EVERY_DTYPE
def test_threads(case: Case, dtype: torch.dtype) -> None:
    x, t = inputs(case, (97, 1031), dtype)  # three tasks of 32768 elements, and a short fourth
    torch.set_num_threads(1)
    expected = evaluate(case, x, t)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same(evaluate(case, x, t), expected, slice(None), f"with {threads} threads")


@EVERY_CASE
@EVERY_DTYPE
def test_neighbours(case: Case, dtype: torch.dtype) -> None:
    for classes in (5, 45, 517):  # below a vector, some lanes, a tile and a tail
        x, t = inputs(case, (37, classes), dtype)
        expected = evaluate(case, x, t)
        for r in (1, 2, 3, 36):
            alone = evaluate(case, x[r : r + 1].clone(), part(t, slice(r, r + 1)))
            assert_same(alone, expected, slice(r, r + 1), f"of row {r} alone")
        order = torch.randperm(37).tolist()
        shuffled = evaluate(case, x[order], part(t, order))
        assert_same(shuffled, expected, order, "in another position")


@EVERY_CASE
@EVERY_DTYPE
@pytest.mark.parametrize("classes", [67, 1031])
def test_alignment(case: Case, dtype: torch.dtype, classes: int) -> None:
    x, t = inputs(case, (4, classes), dtype)
    expected = evaluate(case, x, t)
    for offset in range(1, 16):
        same = t is None or not t.is_floating_point()
        got = evaluate(case, moved(x, offset), t if same else moved(t, (7 * offset) % 16))
        assert_same(got, expected, slice(None), f"{offset} elements further")


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_alignment_in_place(case: Case, dtype: torch.dtype) -> None:
    """The gradient written over logits at any address."""
    x, t = inputs(case, (4, 515), dtype)
    op, args, dx = backward_call(case, x, t)
    for offset in range(16):
        over = moved(x, offset)
        torch.ops.fastdiv._row_backward_(args[0], over, *args[2:-2], False)
        assert torch.equal(bits(over), bits(dx)), f"{offset} elements further"


@EVERY_CASE
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [*[(dtype, 8193) for dtype in LOW], (torch.float32, 50000)],  # a column, half a segment over
)
def test_split_columns(case: Case, dtype: torch.dtype, classes: int) -> None:
    x, t = inputs(case, (4, classes), dtype)
    torch.set_num_threads(1)
    expected = evaluate(case, x, t)
    torch.set_num_threads(2)  # four rows go to threads whole, up to three are split
    assert_same(evaluate(case, x, t), expected, slice(None), "with two threads")
    for threads, rows in ((2, slice(1, 2)), (3, slice(0, 4))):
        torch.set_num_threads(threads)
        got = evaluate(case, x[rows], part(t, rows))
        assert_same(got, expected, rows, f"of {rows} split over {threads} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["cross_entropy", "entropy", "kl_div", "js_div"])
def test_scalar_reductions(name: str, dtype: torch.dtype) -> None:
    case = next(c for c in KERNELS if c.name == name)
    x, t = inputs(case, (70000, 3), dtype)
    for reduction in ("sum", "mean", "batchmean"):
        torch.set_num_threads(1)
        expected = evaluate(case, x, t, reduction)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            got = evaluate(case, x, t, reduction)
            assert_same(got, expected, slice(None), f"with {threads} threads")


@pytest.mark.parametrize("case", WITH_FORWARD_GRAD, ids=str)
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(6, 700), (1, 8193)], ids=str)
def test_forward_grad(case: Case, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The fused skeleton gives the bits of the forward and of the backward."""
    x, t = inputs(case, shape, dtype)
    expected = evaluate(case, x, t)
    _, (upstream, _, *rest), _ = backward_call(case, x, t)
    rows, (_record, _total), options = rest[:6], rest[6:8], rest[8:-2]
    need_t = t is not None and t.is_floating_point()
    over = x.clone()
    value, dt = torch.ops.fastdiv._row_forward_grad(upstream, over, *rows, *options, need_t)
    got = [value.movedim(-1, 0), over, *([case.of_target(dt, t)] if need_t else [])]
    assert_same(got, expected[: len(got)], slice(None), "from forward_grad")


@pytest.mark.parametrize("case", [c for c in KERNELS if c.name == "cross_entropy"], ids=str)
@EVERY_DTYPE
def test_statistics(case: Case, dtype: torch.dtype) -> None:
    for shape in ((5, 1031), (2, 8193)):
        x, t = inputs(case, shape, dtype)
        torch.set_num_threads(1)
        plain = case.call(x, t, reduction="none")
        value, expected = statistics(case, x, t)
        assert torch.equal(bits(value), bits(plain)), "statistics change the value"
        torch.set_num_threads(2)
        for r in range(shape[0]):
            value, alone = statistics(case, x[r : r + 1], t[r : r + 1])
            assert torch.equal(bits(value), bits(plain[r : r + 1]))
            for name, one in alone._asdict().items():
                assert torch.equal(bits(one), bits(getattr(expected, name)[r : r + 1])), name
