"""Linear losses of a top-k teacher: equal to those of whole logits, with all that these allow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from fastdiv._linear import tiles
from helpers.cases import TARGET_TYPES, as_type
from helpers.values import same, uneven, value_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, HIDDEN, CLASSES, K = 23, 8, 300, 6
POLICIES = [
    *(("topk_kl_div", m) for m in ("ignore", "renormalize", "tail", "uniform")),
    *(("topk_reverse_kl_div", m) for m in ("ignore", "renormalize", "tail")),
]
EVERY_POLICY = pytest.mark.parametrize(("name", "missing"), POLICIES)
EVERY_TYPE = pytest.mark.parametrize("values_type", TARGET_TYPES)


def problem(values_type: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight, bias and values; indices, of which some are padding."""
    h, w, b = torch.randn(ROWS, HIDDEN), torch.randn(CLASSES, HIDDEN), torch.randn(CLASSES)
    values, indices = as_type(torch.randn(ROWS, CLASSES) * 3, values_type).topk(K)
    indices[2, 1] = indices[4] = -1
    values[2, 1] = math.nan
    return [v.to(dtype) for v in (h, w, b, values)], indices


def both(name: str, indices: Tensor, **options: Any) -> tuple[Any, Any]:
    """The loss of the layer, and that of its whole logits."""
    of_tiles = {"chunk_size": options.pop("chunk_size", 7)}

    def ours(h: Tensor, w: Tensor, b: Tensor, v: Tensor, *t: Tensor) -> Tensor:
        more = {"temperature": t[0]} if t else {}
        function = getattr(fastdiv, f"linear_{name}")
        return function(h, w, v, indices, linear_bias=b, **of_tiles, **options, **more)

    def whole(h: Tensor, w: Tensor, b: Tensor, v: Tensor, *t: Tensor) -> Tensor:
        more = {"temperature": t[0]} if t else {}
        function = getattr(fastdiv, name)
        return function(F.linear(h, w, b), v, indices.long(), **options, **more)

    return ours, whole


@EVERY_POLICY
@EVERY_TYPE
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_equals_whole_logits(name: str, missing: str, values_type: str, reduction: str) -> None:
    """Value and gradients, that of the teacher's values too."""
    tensors, indices = problem(values_type)
    mask = torch.rand(ROWS, CLASSES) > 0.1
    weight = torch.rand(ROWS).index_fill(0, torch.tensor([5, 22]), 0.0)
    options: dict[str, Any] = {"values_type": values_type, "missing": missing}
    for more in ({}, {"class_mask": mask, "token_weight": weight}):
        ours, whole = both(name, indices, reduction=reduction, **options, **more)
        temperature = torch.rand(ROWS, dtype=torch.float64) + 0.5
        got = value_and_gradients(ours, *tensors, temperature, upstream=uneven)
        expected = value_and_gradients(whole, *tensors, temperature, upstream=uneven)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


@EVERY_POLICY
def test_float32_logits_of_a_half_precision_layer(name: str, missing: str) -> None:
    tensors, indices = problem("log_probs", torch.bfloat16)
    options: dict[str, Any] = {"values_type": "log_probs", "missing": missing}
    ours, _ = both(name, indices, logits_dtype=torch.float32, reduction="none", **options)
    _, whole = both(name, indices, reduction="none", **options)
    got = value_and_gradients(ours, *tensors, upstream=uneven)
    expected = value_and_gradients(whole, *(v.double() for v in tensors), upstream=uneven)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=2e-5, atol=2e-5)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-2 * float(b.abs().max()))


@EVERY_POLICY
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_narrow_indices(name: str, missing: str, dtype: torch.dtype) -> None:
    tensors, indices = problem("probs")
    if dtype == torch.uint8:
        tensors[3] = tensors[3].nan_to_num(0.1)
        indices = torch.arange(250, 250 + K).expand(ROWS, K)
    ours, whole = both(name, indices.to(dtype), values_type="probs", missing=missing)
    got, expected = (value_and_gradients(f, *tensors) for f in (ours, whole))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@EVERY_POLICY
def test_padded_rows_and_rows_that_do_not_count(name: str, missing: str) -> None:
    """They are 0 whatever they hold.  On a CPU their logits are not computed."""
    (h, w, b, values), indices = problem("log_probs")
    weight = torch.ones(ROWS)
    weight[10:], indices[5:10] = 0, -1
    h[4:], values[4:] = math.nan, math.nan
    multiplied = []
    tile = tiles.TiledLogits.tile

    def noted(self: Any, rows: Any, *rest: Any) -> Tensor:
        found = tile(self, rows, *rest)
        multiplied.append(len(found))
        return found

    ours, _ = both(name, indices, values_type="log_probs", missing=missing, token_weight=weight,
                   reduction="none", chunk_size=None)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles.TiledLogits, "tile", noted)
        value, dh, *others = value_and_gradients(ours, h, w, b, values)
    assert (value[4:] == 0).all() and (dh[4:] == 0).all()
    assert all(d.isfinite().all() for d in others)
    if h.is_cpu:
        assert sum(multiplied) == 2 * 4


def test_a_dead_row() -> None:
    """A row whose classes are all masked is NaN, and the others stay."""
    tensors, indices = problem("probs")
    mask = torch.ones(ROWS, CLASSES, dtype=torch.bool)
    mask[8] = False
    for name, missing in POLICIES:
        options: Any = {"values_type": "probs", "missing": missing, "reduction": "none"}
        ours, whole = both(name, indices, class_mask=mask, **options)
        same(ours(*tensors), whole(*tensors), 1e-9)
        assert ours(*tensors)[8].isnan()


@EVERY_POLICY
def test_derivatives_and_transforms(name: str, missing: str) -> None:
    h, w, b = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2), (5, 2), (5,)))
    values, indices = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1).topk(2)
    indices[0, 1] = -1
    options: Any = {"values_type": "log_probs", "missing": missing, "reduction": "none"}
    ours, _ = both(name, indices, chunk_size=2, **options)
    leaves = [v.requires_grad_() for v in (h, w, b, values)]
    assert torch.autograd.gradcheck(ours, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, leaves)
    _, *expected = value_and_gradients(ours, *leaves)
    got = torch.func.grad(lambda v: ours(*v).sum())(tuple(v.detach() for v in leaves))
    torch.testing.assert_close(list(got), expected)


def test_compiled_with_rows_that_change() -> None:
    torch._dynamo.reset()
    (h, w, b, values), indices = problem("log_probs", torch.float32)
    values = values.nan_to_num(0.0)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(h: Tensor, w: Tensor, v: Tensor, indices: Tensor, t: Tensor) -> Tensor:
        return fastdiv.linear_topk_kl_div(
            h, w, v, indices, values_type="log_probs", missing="tail", temperature=t
        )

    for rows, t in ((9, 0.5), (20, 1.0), (17, 2.0)):
        given = (h[:rows], w, values[:rows], indices[:rows], torch.tensor(t))
        expected = value_and_gradients(
            lambda h, w, v, i, t: fastdiv.topk_kl_div(
                F.linear(h, w), v, i, values_type="log_probs", missing="tail", temperature=t
            ),
            *given,
        )
        torch.testing.assert_close(value_and_gradients(compiled, *given), expected,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["LinearTopKKLDivLoss", "LinearTopKReverseKLDivLoss"]
)  # fmt: skip
@pytest.mark.parametrize("hook", [False, True])
def test_module(kind: str, hook: bool) -> None:
    """The function of its layer, also where a hook needs the logits; T^2; a learnt temperature."""
    (h, _, _, values), indices = problem("log_probs", torch.float32)
    values = values.nan_to_num(0.0)
    temperature = torch.nn.Parameter(torch.tensor(2.0))
    module = getattr(fastdiv.nn, kind)(
        HIDDEN, CLASSES, bias=True, values_type="log_probs", missing="tail",
        temperature=temperature, scale_by_temperature=True, chunk_size=4,
    )  # fmt: skip
    assert dict(module.named_parameters())["temperature"] is temperature
    if hook:
        module.linear.register_forward_hook(lambda *_: None)
    weight, mask = torch.rand(ROWS), torch.arange(CLASSES) % 5 != 1
    function = fastdiv.linear_topk_kl_div
    if "Reverse" in kind:
        function = fastdiv.linear_topk_reverse_kl_div

    def expected(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return t**2 * function(
            h, w, values, indices, linear_bias=b, values_type="log_probs", missing="tail",
            temperature=t, token_weight=weight, class_mask=mask,
        )  # fmt: skip

    leaves = (module.linear.weight, module.linear.bias, temperature)
    value = module(h, values, indices, weight, mask)
    found = (value, *torch.autograd.grad(value, leaves))
    wanted = value_and_gradients(expected, h, *leaves)
    wanted = (wanted[0], *wanted[2:])
    finite = value.isfinite()
    assert finite or value == wanted[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "input": torch.randn(2, 3),
    "linear_weight": torch.randn(7, 3),
    "values": torch.tensor([[0.5, 0.3], [0.2, 0.1]]),
    "indices": torch.tensor([[0, 6], [3, -1]]),
    "values_type": "probs",
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"indices": torch.tensor([[0, 7], [3, 2]])}, IndexError, "indices has 7 in row 0, out of"),
    ({"indices": torch.tensor([[0, 1], [3, -2]])}, IndexError, "indices has -2 in row 1"),
    ({"indices": torch.tensor([[0, 1], [3, 3]])}, ValueError, "indices has 3 twice in row 1"),
    ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "must have the shape of val"),
    ({"indices": torch.zeros(2, 2)}, TypeError, "indices must hold int64, int32, int16 or uint8"),
    ({"values": torch.zeros(2, 8)}, ValueError, "values must have between 1 and 7 classes"),
    ({"values": torch.zeros(3, 2)}, ValueError, "values must have the shape of input"),
    ({"values_type": "rows"}, ValueError, "values_type must be one of"),
    ({"missing": "all"}, ValueError, "missing must be one of"),
    ({"reduction": "pointwise"}, ValueError, "reduction must not be 'pointwise'"),
    ({"class_mask": torch.ones(6, dtype=torch.bool)}, ValueError, "class_mask must be broadcast"),
    ({"temperature": torch.zeros(2)}, ValueError, "temperature must be a positive finite number"),
    ({"logits_dtype": torch.float16}, ValueError, "logits_dtype must be None or torch.float32"),
]


@pytest.mark.cpu_only("elsewhere values are not read")
@pytest.mark.parametrize("wrong", BAD, ids=lambda w: ",".join(w[0]) + w[2][-12:])
@pytest.mark.parametrize("name", ["linear_topk_kl_div", "linear_topk_reverse_kl_div"])
def test_refused_before_anything_is_computed(
    name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, error, says = wrong
    getattr(fastdiv, name)(**GOOD)
    monkeypatch.setattr(tiles.TiledLogits, "tile", lambda *a: pytest.fail("it was computed"))
    with pytest.raises(error, match=says):
        getattr(fastdiv, name)(**{**GOOD, **options})


def test_uniform_is_for_kl_div_alone() -> None:
    with pytest.raises(ValueError, match="must not be 'uniform' for linear_topk_reverse_kl_div"):
        fastdiv.linear_topk_reverse_kl_div(**GOOD, missing="uniform")
