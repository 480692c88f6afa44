"""Masks of classes, tensors as temperature and DFT weights in linear losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiv
from fastdiv._linear import tiles
from fastdiv._linear.loops import Problem
from helpers.linear_cases import DIVERGENCES, LinearCase, make_case, named_gradients
from helpers.values import same, uneven, value_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, CLASSES = 37, 300
WAYS = [("none", None), ("mean", None), ("mean", "rows"), ("sum", "weight"), ("batchmean", None)]
EVERY_WAY = pytest.mark.parametrize(("reduction", "accumulate"), WAYS)
KINDS = [
    ("cross_entropy", "labels"),
    ("cross_entropy", "probs"),
    *[(n, t) for n in DIVERGENCES for t in ("logits", "log_probs", "probs", "hidden")],
]
EVERY_KIND = pytest.mark.parametrize(("name", "target"), KINDS)


def bits_of(mask: Tensor) -> Tensor:
    """The bits of a mask."""
    padded = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def mask_for(case: LinearCase) -> Tensor:
    """A mask that leaves the labels in."""
    mask = torch.rand(ROWS, CLASSES) > 0.3
    return mask if case.label is None else mask.scatter(-1, case.label[:, None].clamp(min=0), True)


def masked_copies(case: LinearCase, mask: Tensor) -> Any:
    """The loss of logits, and a target, that are copied with -inf, or no mass, where masked."""

    def call(v: dict[str, Tensor]) -> Tensor:
        options = {k: o for k, o in case.options.items() if k not in ("chunk_size", "accumulate")}
        x = F.linear(v["input"], v["linear_weight"], v["linear_bias"])
        x = x.masked_fill(~mask, -torch.inf)
        if case.name == "cross_entropy":
            second = case.label if case.label is not None else v["target"].masked_fill(~mask, 0.0)
            return fastdiv.cross_entropy(x, second, dim=-1, **options)
        t = v["target"]
        if "target_linear_weight" in v:
            t = F.linear(t, v["target_linear_weight"], v["target_linear_bias"])
            options["target_type"] = "logits"
        t = t.masked_fill(~mask, 0.0 if options["target_type"] == "probs" else -torch.inf)
        return getattr(fastdiv, case.name)(x, t, **options)

    return call


# --- masks ----------------------------------------------------------------------------------------


@EVERY_KIND
@EVERY_WAY
def test_a_mask_is_a_masked_copy(name: str, target: str, reduction: str, accumulate: Any) -> None:
    case = make_case(name, (ROWS,), target=target, dtype=torch.float64, chunk_size=10,
                     reduction=reduction, accumulate=accumulate)  # fmt: skip
    for mask in (mask_for(case), mask_for(case).any(0) & (torch.arange(CLASSES) % 5 != 2)):
        if case.label is not None and mask.dim() == 1:
            case.label = case.label - (case.label % 5 == 2).long()
        expected = named_gradients(masked_copies(case, mask), case.leaves)
        for form in (mask, bits_of(mask)):
            got = named_gradients(lambda v, m=form: case.call(v, class_mask=m), case.leaves)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_blocks_that_begin_within_a_byte() -> None:
    """Each row of bits is unpacked from its first byte on."""
    case = make_case(rows=(3,), classes=35, reduction="none", chunk_size=1)
    mask = (torch.rand(3, 35) > 0.3).scatter(-1, case.label[:, None], True)  # type: ignore[index]
    blocks = []
    with pytest.MonkeyPatch.context() as patch:
        of_tile = Problem._mask_of
        patch.setattr(
            Problem, "_mask_of", lambda p, r, c: (blocks.append(c.start), of_tile(p, r, c))[1]
        )
        got, expected = (
            named_gradients(lambda v, m=m: case.call(v, class_mask=m), case.leaves)
            for m in (bits_of(mask), mask)
        )
    assert any(start % 8 for start in blocks)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_mask_of_a_layer_of_many_dimensions() -> None:
    h, w = torch.randn(4, 3), torch.randn(7, 2, 3)
    y, mask = torch.randint(6, (4, 2)), torch.arange(7) < 6
    temperature = torch.rand(4, 2) + 0.5
    options: Any = {"temperature": temperature, "token_weight": "probability"}
    logits = F.linear(h, w.flatten(0, 1)).view(4, 7, 2).masked_fill(~mask[:, None], -torch.inf)
    expected = fastdiv.cross_entropy(logits, y, **options)
    same(fastdiv.linear_cross_entropy(h, w, y, class_mask=mask, **options), expected)


def test_a_label_that_is_masked_out() -> None:
    """Its loss is infinite, and its gradient finite."""
    case = make_case(rows=(ROWS,), reduction="none")
    assert case.label is not None
    mask = mask_for(case)
    mask[4, case.label[4]] = False
    value, gradients = named_gradients(lambda v: case.call(v, class_mask=mask), case.leaves)
    assert value[4] == torch.inf and value.isinf().sum() == 1
    assert all(g.isfinite().all() for g in gradients.values())


# --- temperatures ---------------------------------------------------------------------------------


@EVERY_KIND
@EVERY_WAY
def test_temperatures_get_a_gradient(
    name: str, target: str, reduction: str, accumulate: Any
) -> None:
    """One number for all rows, or one for each, against autograd of whole logits in float64."""
    more: dict[str, Any] = {}
    if name == "cross_entropy":
        more = {"softcap": 4.0, "z_loss": 0.05, "label_smoothing": 0.1}
    case = make_case(name, (ROWS,), target=target, dtype=torch.float64, chunk_size=10,
                     reduction=reduction, accumulate=accumulate, **more)  # fmt: skip
    of_rows = torch.rand(ROWS, dtype=torch.float64) + 0.5
    for t in (torch.tensor(1.3, dtype=torch.float64), of_rows):

        def ours(v: dict[str, Tensor]) -> Tensor:
            return case.call(v)

        def plain(v: dict[str, Tensor]) -> Tensor:
            with fastdiv.backend("reference"):
                return case.unfused({k: x for k, x in v.items() if k != "temperature"},
                                    temperature=v["temperature"])  # fmt: skip

        leaves = {**case.leaves, "temperature": t}
        got, expected = named_gradients(ours, leaves), named_gradients(plain, leaves)
        assert got[1]["temperature"].abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tensor_has_the_bits_of_a_number(
    name: str, target: str, dtype: torch.dtype, reduction: str
) -> None:
    case = make_case(name, (ROWS,), target=target, dtype=dtype, reduction=reduction)
    expected = named_gradients(lambda v: case.call(v, temperature=0.7), case.leaves)
    for t in (torch.tensor(0.7, dtype=torch.float64), torch.full((ROWS,), 0.7).double()):
        got = named_gradients(lambda v, t=t: case.call(v, temperature=t), case.leaves)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_second_derivatives_by_temperature() -> None:
    h, w = torch.randn(3, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    t, y = torch.tensor([0.7, 1.0, 2.0], dtype=torch.float64), torch.tensor([4, 0, 2])
    leaves = [v.requires_grad_() for v in (h, w, t)]
    for reduction in ("mean", "none"):

        def function(h: Tensor, w: Tensor, t: Tensor, r: str = reduction) -> Tensor:
            return fastdiv.linear_cross_entropy(
                h, w, y, temperature=t, reduction=r, z_loss=0.1, softcap=3.0, chunk_size=2
            )

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


def test_rows_that_do_not_count_give_their_temperature_no_gradient() -> None:
    case = make_case(rows=(ROWS,), dtype=torch.float64, reduction="mean")
    assert case.label is not None
    case.label[7] = -100
    case.leaves["input"][7] = torch.nan
    leaves = {**case.leaves, "temperature": torch.ones(ROWS, dtype=torch.float64)}
    _, gradients = named_gradients(case.call, leaves)
    assert gradients["temperature"][7] == 0
    assert all(g.isfinite().all() for g in gradients.values())


# --- DFT ------------------------------------------------------------------------------------------


@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("products", [True, False])
def test_weights_by_probability(
    reduction: str,
    accumulate: Any,
    dtype: torch.dtype,
    products: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each row is multiplied by the probability of its label; a mean divides by their number."""
    monkeypatch.setattr(tiles, "multiplies", lambda half: products)
    case = make_case(rows=(ROWS,), dtype=dtype, chunk_size=10, reduction=reduction,
                     accumulate=accumulate, logits_dtype=torch.float32)  # fmt: skip
    assert case.label is not None
    case.leaves["linear_weight"] = case.leaves["linear_weight"] / 4
    case.label[[3, 30]] = -100
    counts = case.label != -100

    def plain(v: dict[str, Tensor]) -> Tensor:
        x = F.linear(v["input"], v["linear_weight"], v["linear_bias"])
        rows = F.cross_entropy(x, case.label, reduction="none")
        rows = rows * (-rows).exp().detach() * counts
        divisor = {"mean": counts.sum(), "batchmean": ROWS}.get(reduction, 1)
        return rows if reduction == "none" else rows.sum() / divisor

    got = named_gradients(lambda v: case.call(v, token_weight="probability"), case.leaves)
    expected = named_gradients(plain, case.double().leaves)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    for key, g in got[1].items():
        largest = float(expected[1][key].abs().max())
        atol = (1e-11 if dtype == torch.float64 else 1e-2) * largest
        torch.testing.assert_close(g.double(), expected[1][key], rtol=0, atol=atol)


def test_weights_by_probability_with_other_options() -> None:
    """The probability is that of the loss: capped, masked and at its temperature."""
    case = make_case(rows=(ROWS,), dtype=torch.float64, softcap=4.0, label_smoothing=0.1,
                     z_loss=0.01, token_weight="probability", chunk_size=10)  # fmt: skip
    leaves = {**case.leaves, "temperature": torch.rand(ROWS, dtype=torch.float64) + 0.5}
    options = {"weight": torch.rand(CLASSES) + 0.5}

    def plain(v: dict[str, Tensor]) -> Tensor:
        own = {k: o for k, o in case.options.items() if k not in ("chunk_size", "token_weight")}
        x = F.linear(v["input"], v["linear_weight"], v["linear_bias"])
        with fastdiv.backend("reference"):
            return fastdiv.cross_entropy(
                x, case.label, token_weight="probability", temperature=v["temperature"],
                **own, **options,
            )  # fmt: skip

    got = named_gradients(lambda v: case.call(v, **options), leaves)
    expected = named_gradients(plain, leaves)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("token_weight", [None, "probability"])
def test_lists_share_temperature_and_mask(reduction: str, token_weight: Any) -> None:
    h, g, w = (torch.randn(*s, dtype=torch.float64) for s in ((5, 3), (2, 4, 3), (11, 3)))
    y, z = torch.randint(9, (5,)), torch.randint(9, (2, 4))
    y[2] = -100
    mask, t = torch.arange(11) < 9, torch.tensor(0.7, dtype=torch.float64)
    options: dict[str, Any] = {"reduction": reduction, "token_weight": token_weight}
    options |= {"class_mask": mask, "softcap": 5.0}

    def together(h: Tensor, g: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return fastdiv.linear_cross_entropy([h, g], w, [y, z], temperature=t, **options)

    def apart(h: Tensor, g: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            fastdiv.linear_cross_entropy(a, w, b, temperature=t, **options)
            for a, b in ((h, y), (g, z))
        )

    got, expected = (value_and_gradients(f, h, g, w, t, upstream=uneven) for f in (together, apart))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CrossEntropy", "KLDiv", "ReverseKLDiv", "JSDiv", "LogProb"])
@pytest.mark.parametrize("hook", [False, True])
def test_modules(kind: str, hook: bool) -> None:
    """A mask of the call and a temperature that is learnt, also where a hook needs the logits."""
    name = "LinearLogProb" if kind == "LogProb" else f"Linear{kind}Loss"
    function = getattr(fastdiv, {"CrossEntropy": "linear_cross_entropy", "KLDiv": "linear_kl_div",
                                 "ReverseKLDiv": "linear_reverse_kl_div", "JSDiv": "linear_js_div",
                                 "LogProb": "linear_log_prob"}[kind])  # fmt: skip
    temperature = nn.Parameter(torch.tensor(1.5))
    options: dict[str, Any] = {"target_type": "logits"} if "Div" in kind else {}
    module = getattr(fastdiv.nn, name)(3, 11, temperature=temperature, **options)
    assert {n for n, _ in module.named_parameters()} == {"linear.weight", "temperature"}
    assert "temperature=Parameter of shape ()" in repr(module)
    if hook:
        module.linear.register_forward_hook(lambda *_: None)
    h, mask = torch.randn(5, 3), torch.arange(11) < 9
    second = torch.randn(5, 11) if "Div" in kind else torch.randint(9, (5,))

    def ours(w: Tensor, t: Tensor) -> Tensor:
        return function(h, w, second, temperature=t, class_mask=mask, **options)

    leaves = (module.linear.weight, temperature)
    value = module(h, second, class_mask=mask)
    got = (value.detach(), *torch.autograd.grad(value.sum(), leaves))
    torch.testing.assert_close(got, value_and_gradients(ours, *leaves), rtol=1e-4, atol=1e-5)
    module.load_state_dict({**module.state_dict(), "temperature": torch.tensor(3.0)})
    same(module(h, second, class_mask=mask), ours(module.linear.weight, torch.tensor(3.0)), 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_squared_temperatures(reduction: str) -> None:
    """A temperature for each row needs values for each."""
    h, x, of_rows = torch.randn(5, 3), torch.randn(5, 11), torch.rand(5) + 0.5
    options: dict[str, Any] = {"target_type": "logits", "reduction": reduction}
    module = fastdiv.nn.LinearKLDivLoss(
        3, 11, scale_by_temperature=True, temperature=of_rows, **options
    )
    if reduction != "none":
        with pytest.raises(ValueError, match="needs reduction='none'"):
            module(h, x)
        return
    value = fastdiv.linear_kl_div(h, module.linear.weight, x, temperature=of_rows, **options)
    same(module(h, x), value * of_rows**2)


@pytest.mark.parametrize("hook", [False, True])
def test_module_with_weights_by_probability(hook: bool) -> None:
    h, y, weight = torch.randn(5, 3), torch.randint(11, (5,)), torch.rand(5)
    module = fastdiv.nn.LinearCrossEntropyLoss(3, 11, token_weight="probability")
    assert "token_weight='probability'" in repr(module)
    w = module.linear.weight.detach()
    if hook:
        module.linear.register_forward_hook(lambda *_: None)
    own = fastdiv.linear_cross_entropy(h, w, y, token_weight="probability")
    same(module(h, y), own)
    same(module(h, y, weight), fastdiv.linear_cross_entropy(h, w, y, token_weight=weight))
    several = module([h, h[:2]], [y, y[:2]])
    same(several[0], own)
    same(several[1], fastdiv.linear_cross_entropy(h[:2], w, y[:2], token_weight="probability"))


# --- bad input ------------------------------------------------------------------------------------

H, W, Y, X = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, 2, 1]), torch.randn(4, 7)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"class_mask": torch.ones(4, 6, dtype=torch.bool)}, ValueError, "class_mask must be broad"),
    ({"class_mask": torch.ones(2, dtype=torch.uint8)}, ValueError, "class_mask must be broad"),
    ({"class_mask": torch.ones(7, dtype=torch.int64)}, TypeError, "class_mask must be bool"),
    ({"class_mask": [True] * 7}, TypeError, "class_mask must be a Tensor"),
    ({"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])}, ValueError, r"got -1.0 at \[2\]"),
    ({"temperature": torch.ones(2, 2)}, ValueError, "temperature must be one number, or have"),
    ({"temperature": torch.ones(4, dtype=torch.int64)}, TypeError, "temperature must be a number"),
]
OF_LABELS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"token_weight": "confidence"}, ValueError, "token_weight, if it is a word, must be one of"),
    ({"token_weight": "probability", "target": X.softmax(-1)}, ValueError, "needs class indices"),
]
OF_LISTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": torch.ones(8)}, ValueError, "temperature must be one number for a list"),
    ({"class_mask": torch.ones(8, 7, dtype=torch.bool)}, ValueError, "class_mask must have one"),
    ({"class_mask": torch.ones(6, dtype=torch.bool)}, ValueError, "class_mask must be broad"),
    ({"token_weight": "confidence"}, ValueError, "token_weight, if it is a word, must be one of"),
]
CALLS: list[tuple[str, dict[str, Any], Any]] = [
    *(("linear_cross_entropy", {"target": Y}, wrong) for wrong in (*BAD, *OF_LABELS)),
    *((f"linear_{n}", {"target": X, "target_type": "logits"}, w) for n in DIVERGENCES for w in BAD),
    *(("linear_cross_entropy", {"input": [H, H], "target": [Y, Y]}, w) for w in OF_LISTS),
]


@pytest.mark.cpu_only("elsewhere values are not read")
@pytest.mark.parametrize(("name", "given", "wrong"), CALLS)
def test_refused_before_anything_is_computed(
    name: str, given: Any, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, error, says = wrong
    given = {"input": H, "linear_weight": W, **given}
    getattr(fastdiv, name)(**given)
    monkeypatch.setattr(tiles.TiledLogits, "tile", lambda *a: pytest.fail("it was computed"))
    with pytest.raises(error, match=says):
        getattr(fastdiv, name)(**{**given, **options})
