"""linear_log_prob: what the table of linear losses does not say of k classes in each row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from fastdiv._linear import tiles
from helpers.values import same, uneven, value_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, HIDDEN, CLASSES = 37, 8, 300
KINDS = {  # shapes of indices after the rows
    "one": (),
    "k = 1": (1,),
    "k = 5": (5,),
    "more than classes": (CLASSES + 3,),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def layer(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias."""
    h, w, b = torch.randn(rows, HIDDEN), torch.randn(CLASSES, HIDDEN), torch.randn(CLASSES)
    return h.to(dtype), w.to(dtype), b.to(dtype)


def indices(kind: str, rows: int = ROWS) -> Tensor:
    """Random classes, of which some are padding and one is there twice."""
    index = torch.randint(CLASSES, (rows, *KINDS[kind]))
    index[3] = index[rows - 2] = -1
    if index.dim() > 1 and index.shape[1] > 2:
        index[5, 1] = index[5, 2]
        index[6, 0] = -1
    return index


def plain(
    h: Tensor,
    w: Tensor,
    b: Tensor,
    index: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The formula, of whole logits."""
    x = F.linear(h, w, b)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    x = x / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    x = x if mask is None else x.masked_fill(~mask, -torch.inf)
    several = index if index.dim() == x.dim() else index.unsqueeze(-1)
    value = x.log_softmax(-1).gather(-1, several.long().clamp(min=0))
    return torch.where(several == -1, 0.0, value).reshape(index.shape)


def mask_of(index: Tensor) -> Tensor:
    """A mask that leaves the classes of the indices in."""
    mask = torch.rand(ROWS, CLASSES) > 0.3
    return mask.scatter(-1, index.reshape(ROWS, -1).clamp(min=0), True)


def bits_of(mask: Tensor) -> Tensor:
    """The bits of a mask."""
    padded = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


# --- values and gradients -------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk_size", [None, 10])
def test_equals_whole_logits(kind: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    tensors, index = layer(dtype), indices(kind)
    temperature = torch.rand(ROWS, dtype=torch.float64) + 0.5
    mask = mask_of(index)

    def ours(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return fastdiv.linear_log_prob(
            h, w, index, linear_bias=b, temperature=t, softcap=4.0, class_mask=mask,
            logits_dtype=torch.float32, chunk_size=chunk_size,
        )  # fmt: skip

    def whole(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return plain(h, w, b, index, t, 4.0, mask)

    got = value_and_gradients(ours, *tensors, temperature, upstream=uneven)
    wide = [v.double() for v in tensors]
    expected = value_and_gradients(whole, *wide, temperature, upstream=uneven)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        tolerance = TOLERANCE[dtype] if 0 < i < 4 else min(TOLERANCE[dtype], 1e-4)
        scale = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_dtypes_of_indices(kind: str, dtype: torch.dtype) -> None:
    """An unsigned one has no padding."""
    (h, w, b), index = layer(), indices(kind)
    index = (index % 256).to(dtype) if dtype == torch.uint8 else index.to(dtype)

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fastdiv.linear_log_prob(h, w, index, linear_bias=b, chunk_size=10)

    got = value_and_gradients(ours, h, w, b, upstream=uneven)
    expected = value_and_gradients(
        lambda h, w, b: plain(h, w, b, index.long()), h, w, b, upstream=uneven
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@EVERY_KIND
def test_masks_of_every_form_have_the_bits_of_a_masked_copy(kind: str) -> None:
    (h, w, bias), index = layer(torch.float32), indices(kind)
    one = torch.arange(CLASSES) % 7 != 3
    for mask in (mask_of(index), one):
        forms = [mask, bits_of(mask)]
        forms += [mask.expand(ROWS, -1), mask[None]] if mask is one else []

        def masked(h: Tensor, w: Tensor, m: Tensor = mask) -> Tensor:
            x = F.linear(h, w, bias).masked_fill(~m, -torch.inf)
            return fastdiv.log_prob(x, index)

        expected = value_and_gradients(masked, h, w, upstream=uneven)
        found = []
        for m in forms:

            def ours(h: Tensor, w: Tensor, m: Tensor = m) -> Tensor:
                return fastdiv.linear_log_prob(h, w, index, linear_bias=bias, class_mask=m)

            found.append(value_and_gradients(ours, h, w, upstream=uneven))
        for got in found:
            assert all(v.equal(same) for v, same in zip(got, found[0], strict=True))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert not one[index.clamp(min=0)].all()  # some of the classes are masked
    inside = fastdiv.linear_log_prob(h, w, index, linear_bias=bias, class_mask=one)
    assert inside.isneginf().equal(~one[index.clamp(min=0)] & (index >= 0))


@pytest.mark.parametrize("products", [True, False])
def test_float32_logits_of_a_half_precision_layer(
    products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "multiplies", lambda half: products)
    h, w = torch.randn(64, 128).bfloat16(), torch.randn(4000, 128).mul(128**-0.5 * 2).bfloat16()
    index = torch.randint(4000, (64, 6))
    truth = fastdiv.log_prob(h.double() @ w.double().t(), index)

    def error(**options: Any) -> float:
        return float((fastdiv.linear_log_prob(h, w, index, **options) - truth).abs().max())

    assert error(logits_dtype=torch.float32) <= 2e-5
    assert not products or error() > 1e-3


def test_as_linear_log_prob_and_entropy() -> None:
    (h, w, b), index = layer(torch.float32), indices("one")
    options: Any = {"linear_bias": b, "temperature": 1.3, "class_mask": bits_of(mask_of(index))}
    both = fastdiv.linear_log_prob_and_entropy(h, w, index, **options)
    same(fastdiv.linear_log_prob(h, w, index, **options), both[0])


def test_shapes_of_rows() -> None:
    (h, w, b), index = layer(), indices("k = 5")
    whole = fastdiv.linear_log_prob(h, w, index, linear_bias=b)
    rows = fastdiv.linear_log_prob(h[:36].view(2, 9, 2, -1), w, index[:36].view(2, 9, 2, 5),
                                   linear_bias=b)  # fmt: skip
    same(rows, whole[:36].view(2, 9, 2, 5), 1e-12)
    one = fastdiv.linear_log_prob(h[0], w, index[0], linear_bias=b)
    same(one, whole[0], 1e-12)
    assert fastdiv.linear_log_prob(h[:0], w, index[:0], linear_bias=b).shape == (0, 5)
    assert fastdiv.linear_log_prob(h[0], w, index[0, 0], linear_bias=b).shape == ()


# --- padding --------------------------------------------------------------------------------------


def test_padding_adds_nothing_whatever_its_row_holds() -> None:
    (h, w, b), index = layer(), indices("k = 5")
    index[10:20] = -1

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fastdiv.linear_log_prob(h, w, index, linear_bias=b, chunk_size=7)

    expected = value_and_gradients(ours, h, w, b)
    h[10:20] = math.nan
    got = value_and_gradients(ours, h, w, b)
    assert (got[0][index == -1] == 0).all() and (got[1][10:20] == 0).all()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.cpu_only("a GPU computes all rows")
@pytest.mark.parametrize("kind", ["one", "k = 5"])
def test_rows_of_padding_are_not_multiplied(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied = []
    multiply = tiles.multiply
    monkeypatch.setattr(
        tiles, "multiply", lambda x, *a: (multiplied.append(len(x)), multiply(x, *a))[1]
    )
    (h, w, _), index = layer(torch.float32), indices(kind)
    index[10:] = -1
    for needs_gradient, times in ((False, 1), (True, 2)):
        value = fastdiv.linear_log_prob(h.requires_grad_(needs_gradient), w, index)
        if needs_gradient:
            value.sum().backward()
        assert sum(multiplied) == 9 * times  # of the first ten rows, one is padding
        multiplied.clear()


def test_rows_that_are_dead() -> None:
    """A row without a class that takes part is NaN, as one at -inf; its logits get no gradient."""
    (h, w, b), index = layer(), indices("k = 5")
    mask = torch.ones(ROWS, CLASSES, dtype=torch.bool)
    mask[8] = False
    value, dh = value_and_gradients(
        lambda h: fastdiv.linear_log_prob(h, w, index, linear_bias=b, class_mask=mask), h
    )
    others = torch.arange(ROWS) != 8
    assert value[8].isnan().all() and (dh[8] == 0).all()
    same(value[others], plain(h, w, b, index)[others], 1e-12)
    assert dh[others].isfinite().all()


# --- autograd, transforms and the compiler --------------------------------------------------------


def small(kind: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of hidden states, weight, bias and temperatures, with tensors for it."""
    h, w, b = torch.randn(3, 2), torch.randn(5, 2), torch.randn(5)
    index = torch.tensor([[1, 4], [0, 0], [3, -1]])
    index = index if kind != "one" else index[:, 1]
    mask = torch.tensor([True, True, False, True, True])

    def function(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return fastdiv.linear_log_prob(
            h, w, index, linear_bias=b, temperature=t, class_mask=mask, softcap=3.0, chunk_size=2
        )

    return function, tuple(v.double() for v in (h, w, b, torch.tensor([0.7, 1.0, 2.0])))


@pytest.mark.parametrize("kind", ["one", "k = 2"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_derivatives(kind: str, backend: str) -> None:
    function, tensors = small(kind)
    leaves = [v.requires_grad_() for v in tensors]
    with fastdiv.backend(backend):
        assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("kind", ["one", "k = 2"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_transforms(kind: str, backend: str) -> None:
    function, tensors = small(kind)
    with fastdiv.backend(backend):
        _, *expected = value_and_gradients(function, *tensors)
        got = torch.func.grad(lambda v: function(*v).sum())(tensors)
        torch.testing.assert_close(list(got), expected)
        batch = torch.stack([tensors[0], 2 * tensors[0]])
        mapped = torch.func.vmap(lambda h: function(h, *tensors[1:]))(batch)
        torch.testing.assert_close(mapped, torch.stack([function(h, *tensors[1:]) for h in batch]))


def test_compiled_with_rows_and_temperatures_that_change() -> None:
    torch._dynamo.reset()
    h, w, b = layer(torch.float32)
    graphs = []

    def noted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=noted)
    def compiled(h: Tensor, w: Tensor, b: Tensor, index: Tensor, t: Any) -> Tensor:
        return fastdiv.linear_log_prob(h, w, index, linear_bias=b, temperature=t)

    steps = [(rows, t) for rows, t in ((9, 0.5), (20, 0.75), (31, 0.9), (17, 1.25))]
    for as_tensor in (False, True):
        for rows, t in steps:
            index = indices("k = 5")[:rows]
            temperature = torch.tensor(t) if as_tensor else t

            def step(f: Any, i: Tensor = index, t: Any = temperature, n: int = rows) -> Any:
                return value_and_gradients(lambda h, w, b: f(h, w, b, i, t), h[:n], w, b)

            expected = step(lambda h, w, b, i, t: plain(h, w, b, i, float(t)))
            torch.testing.assert_close(step(compiled), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 3  # one for numbers, which may be known at first, and one for tensors


@pytest.mark.cpu_only("inductor of the CPU")
def test_compiled_with_inductor() -> None:
    torch._dynamo.reset()
    (h, w, b), index = layer(torch.float32), indices("k = 5")

    def step(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mask = torch.ones(CLASSES, dtype=torch.bool)
        return fastdiv.linear_log_prob(h.tanh(), w, index, linear_bias=b, class_mask=mask) * 2

    got = value_and_gradients(torch.compile(step, fullgraph=True), h, w, b)
    torch.testing.assert_close(got, value_and_gradients(step, h, w, b))


def test_autocast() -> None:
    (h, w, b), index = layer(torch.float32), indices("k = 5")
    half = [v.bfloat16() for v in (h, w, b)]

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fastdiv.linear_log_prob(h, w, index, linear_bias=b)

    expected = value_and_gradients(ours, *half)
    with torch.autocast(h.device.type, torch.bfloat16):
        got = value_and_gradients(ours, h, w, b)
    assert all(v.dtype == torch.float32 for v in got)
    torch.testing.assert_close(got, tuple(v.float() for v in expected))


def test_determinism_and_threads() -> None:
    """The same bits for any number of threads, in float64 where products split no sum."""
    (h, w, b), index = layer(), indices("k = 5")
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            found.append(fastdiv.linear_log_prob(h, w, index, linear_bias=b))
    finally:
        torch.set_num_threads(threads)
    assert found[0].equal(found[1]) and found[0].equal(found[2])


# --- bad input ------------------------------------------------------------------------------------

H, W, Y = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([[0, 6], [2, -1], [1, 1], [5, 3]])
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"index": Y + 1}, IndexError, r"index .*7.* out of range for 7 classes"),
    ({"index": Y - 1}, IndexError, r"-2"),
    ({"index": Y.float()}, TypeError, "index must hold int64, int32, int16 or uint8"),
    ({"index": Y[:3]}, ValueError, r"index must have the shape of input without its class"),
    ({"index": Y[..., None]}, ValueError, r"or a last dimension of k classes more"),
    ({"class_mask": torch.ones(4, 6, dtype=torch.bool)}, ValueError, "class_mask must be broad"),
    ({"class_mask": torch.ones(7)}, TypeError, "class_mask must be bool, or uint8"),
    ({"class_mask": torch.ones(4, 2, dtype=torch.uint8)}, ValueError, "class_mask must be broad"),
    ({"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, ValueError, r"temperature .* got 0.0 at"),
    ({"temperature": torch.ones(3)}, ValueError, "temperature must be one number, or have"),
    ({"temperature": -1.0}, ValueError, "temperature must be a positive"),
    ({"softcap": 0.0}, ValueError, "softcap must be a positive"),
    ({"logits_dtype": torch.float64}, ValueError, "logits_dtype must be None or torch.float32"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number"),
    ({"linear_weight": W[:, :2]}, ValueError, "linear_weight must have shape"),
]


@pytest.mark.cpu_only("elsewhere values are not read")
@pytest.mark.parametrize("wrong", BAD, ids=lambda w: ",".join(w[0]) + w[2][:12])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_refused_before_anything_is_computed(
    wrong: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, error, says = wrong
    monkeypatch.setattr(tiles.TiledLogits, "tile", lambda *a: pytest.fail("it was computed"))
    given = {"input": H, "linear_weight": W, "index": Y, **options}
    with fastdiv.backend(backend), pytest.raises(error, match=says):
        fastdiv.linear_log_prob(**given)
