"""log_prob of one class or of k classes in each row, with padding, and log_prob_and_entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiv
from helpers.cases import DTYPES, make_inputs
from helpers.values import same, uneven, value_and_gradients

INDICES = [torch.int64, torch.int32, torch.int16, torch.uint8]


def make_index(rows: int, classes: int, k: int) -> Tensor:
    """Return indices of which some are padding, some are there twice, and one row is padding."""
    index = torch.randint(-1, classes, (rows, k))
    index[:, -1:] = index[:, :1]
    index[rows // 2] = -1
    return index


def plain(x: Tensor, index: Tensor) -> Tensor:
    index = index.long()
    found = x.log_softmax(-1).gather(-1, index.clamp(0))
    return torch.where(index == -1, 0.0, found)


@pytest.mark.parametrize("k", [0, 1, 2, 9, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, k: int, isa: str) -> None:
    """k may be larger than the number of classes, and 0."""
    for shape in ((5, 1), (5, 37), (3, 8201)):
        x, index = make_inputs(shape, dtype)[0], make_index(*shape, k)
        results = []
        for backend in ("native", "reference"):
            with fastdiv.backend(backend):
                results.append(
                    value_and_gradients(lambda x: fastdiv.log_prob(x, index), x, upstream=uneven)  # noqa: B023
                )
        exact = x.double()
        results.append(value_and_gradients(lambda x: plain(x, index), exact, upstream=uneven))  # noqa: B023
        native, reference, expected = results
        assert native[0].shape == index.shape and native[1].dtype == dtype
        same(native[0], expected[0].to(native[0].dtype), 1e-5 if dtype != torch.float64 else 1e-12)
        # The gradient of a class adds up k numbers, which may cancel.
        largest = expected[1].abs().max().clamp(min=0.1 * k + 1e-9)
        unit = max(torch.finfo(dtype).eps, 2e-7) if dtype != torch.float64 else 1e-12
        for found in (native, reference):
            assert ((found[1].double() - expected[1]).abs() <= 8 * unit * largest).all()
        assert native[1][shape[0] // 2].eq(0).all()


@pytest.mark.parametrize("dtype", INDICES, ids=str)
def test_dtypes_of_indices(dtype: torch.dtype) -> None:
    x = make_inputs((5, 37), torch.float32)[0]
    index = make_index(5, 37, 4)
    if dtype == torch.uint8:
        index.clamp_(0)
    expected = fastdiv.log_prob(x, index)
    apart = torch.cat([index, index + 1], -1).to(dtype)[:, :4]
    for given in (index.to(dtype), apart, index.to(dtype).t().contiguous().t()):
        assert fastdiv.log_prob(x, given).equal(expected)
        assert fastdiv.log_prob(x, given[:, 0]).equal(expected[:, 0])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_dimensions(dim: int) -> None:
    """k is last, wherever the classes are."""
    x = make_inputs((3, 4, 5), torch.float32)[0]
    rows = [n for i, n in enumerate(x.shape) if i != dim]
    index = torch.randint(-1, x.shape[dim], (*rows, 2))
    expected = plain(x.movedim(dim, -1), index)
    same(fastdiv.log_prob(x, index, dim=dim), expected)
    same(fastdiv.log_prob(x, index[..., 0], dim=dim), expected[..., 0])
    vector, of_vector = torch.randn(7), torch.tensor([3, -1, 6])
    same(fastdiv.log_prob(vector, of_vector), plain(vector, of_vector))
    same(fastdiv.log_prob(vector, of_vector[0]), vector.log_softmax(-1)[3])


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)
def test_padding_does_not_count(backend: str) -> None:
    """A row of padding may hold anything; padding beside a class adds nothing."""
    x = torch.randn(3, 6)
    x[1] = torch.nan
    for index in (torch.tensor([[2, -1], [-1, -1], [-1, 5]]), torch.tensor([2, -1, 5])):
        value, dx = value_and_gradients(lambda x: fastdiv.log_prob(x, index), x)  # noqa: B023
        assert value.isfinite().all() and value[index == -1].eq(0).all()
        assert dx[1].eq(0).all() and dx.isfinite().all()
        assert not value.signbit()[index == -1].any()
    own = x.requires_grad_()
    log_prob, entropy = fastdiv.log_prob_and_entropy(own, torch.tensor([2, -1, 5]))
    assert log_prob[1] == 0 and entropy[1] == 0 and entropy[0] > 0
    (dx,) = torch.autograd.grad((log_prob + entropy).sum(), own)
    assert dx[1].eq(0).all() and dx.isfinite().all()


def test_index_out_of_range_where_values_are_not_read() -> None:
    """The row is NaN, the others are as they were."""
    x, index = torch.randn(3, 6), torch.tensor([[0, 1], [2, 6], [3, 4]])
    compiled = torch.compile(fastdiv.log_prob, backend="aot_eager", fullgraph=True)
    with fastdiv.backend("reference"):
        value = compiled(x, index)
    assert value[1].isnan().all() and value[::2].equal(fastdiv.log_prob(x[::2], index[::2]))


def test_batch_invariance() -> None:
    x, index = make_inputs((7, 8201), torch.float32)[0], make_index(7, 8201, 5)
    whole = value_and_gradients(lambda x: fastdiv.log_prob(x, index), x)
    for i in range(7):
        own = slice(i, i + 1)
        alone = value_and_gradients(lambda x: fastdiv.log_prob(x, index[own]), x[own])  # noqa: B023
        assert all(a[own].equal(b) for a, b in zip(whole, alone, strict=True))
    one = fastdiv.log_prob(x, index[:, 0])
    assert one.equal(whole[0][:, 0])  # nor do the bits of a class depend on the others


def test_derivatives_and_transforms() -> None:
    x, index = make_inputs((4, 7), torch.float64)[0], make_index(4, 7, 3)

    def loss(x: Tensor, index: Tensor = index) -> Tensor:
        return fastdiv.log_prob(x, index, temperature=1.5)

    assert torch.autograd.gradcheck(loss, x.requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, x)
    x = x.detach()
    several = torch.stack([index, index.flip(-1)])
    each = torch.stack([loss(x, i) for i in several])
    same(torch.func.vmap(lambda i: loss(x, i))(several), each, 1e-12)
    same(torch.func.vmap(loss)(torch.stack([x, x + 1])), torch.stack([loss(x)] * 2), 1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x).equal(loss(x))


@pytest.mark.slow
def test_compiler() -> None:
    """Not a graph for each number of rows or of classes in a row."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastdiv.log_prob, backend=counter, fullgraph=True, dynamic=True)
    for rows, k in ((4, 3), (5, 3), (6, 9), (3, 2)):
        x, index = make_inputs((rows, 17), torch.float32)[0], make_index(rows, 17, k)
        results = []
        for function in (compiled, fastdiv.log_prob):
            results.append(value_and_gradients(lambda x: function(x, index), x))  # noqa: B023
        for a, e in zip(*results, strict=True):
            same(a, e)
    assert counter.frame_count == 1


def test_trace_and_remembered_calls() -> None:
    x, index = make_inputs((4, 17), torch.float32)[0], make_index(4, 17, 3)
    expected = plain(x, index)
    for _ in range(2):  # the second time, the kind of call is known
        same(fastdiv.log_prob(x, index), expected)
        same(fastdiv.log_prob(x, index[:, 0]), expected[:, 0])
        same(fastdiv.log_prob(x, index[:, :1]), expected[:, :1])
        with pytest.raises(IndexError, match="index has 17 in row 0"):
            fastdiv.log_prob(x, index.clamp(17))
    trace = torch.jit.trace(fastdiv.log_prob, (x, index), check_trace=False)
    same(trace(x[:3], index[1:, :]), plain(x[:3], index[1:]))
