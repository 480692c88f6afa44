"""DistillationLoss against the sum of its parts, written in torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from fastdiv import reference
from fastdiv.nn import DistillationLoss
from helpers.cases import LOSSES, Case, make_inputs
from helpers.values import same, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

NAN = float("nan")


DIVERGENCES = [c for c in LOSSES if c.divergence and "temperature" not in c.options]
Y = torch.tensor([[0, -100, 7], [3, 2, -100]])
KEPT = Y != -100


def distilled(
    case: Case, x: Tensor, t: Tensor, alpha: float, temperature: float, squared: bool
) -> Tensor:
    """The sum of the two parts for the rows that count."""
    log_p = {
        "logits": lambda: (t / temperature).log_softmax(-1),
        "log_probs": lambda: t,
        "probs": t.log,
    }[case.target]()
    hard = F.cross_entropy(x, Y[KEPT], reduction="none")
    soft = case.eager(x / temperature, log_p) * (temperature**2 if squared else 1)
    return (1 - alpha) * hard + alpha * soft


@pytest.mark.parametrize(("alpha", "temperature", "squared"), [(0.3, 1, False), (0.9, 2.5, True)])
@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_distillation_is_the_formula(
    case: Case, alpha: float, temperature: float, squared: bool
) -> None:
    x, logits = make_inputs((2, 3, 9), torch.float64)
    t = case.make_target(x, logits)
    assert t is not None
    kept = [x[KEPT], t[KEPT]]
    x[~KEPT], t[~KEPT] = NAN, NAN
    for reduction in ("mean", "sum", "batchmean", "none"):
        module = DistillationLoss(
            case.name,
            alpha=alpha,
            temperature=temperature,
            scale_by_temperature=squared,
            target_type=case.target,
            reduction=reduction,
            divergence_options=case.options,
        )

        def expected(x: Tensor, t: Tensor, reduction: str = reduction) -> Tensor:
            rows = distilled(case, x, t, alpha, temperature, squared)
            divide = {"mean": len(rows), "batchmean": 2}.get(reduction, 1)
            return rows if reduction == "none" else rows.sum() / divide

        value, *grads = value_and_gradients(module, x, t, Y)
        want, *want_grads = value_and_gradients(expected, *kept)
        assert value.shape == (Y.shape if reduction == "none" else ())
        same(value[KEPT] if reduction == "none" else value, want, 1e-12)
        for grad, want_grad in zip(grads, want_grads, strict=True):
            assert (grad[~KEPT] == 0).all()
            same(grad[KEPT], want_grad, 1e-11)
        # A teacher that needs no gradient gets none, and changes nothing.
        value, dx = value_and_gradients(lambda x, m=module: m(x, t, Y), x)
        assert dx.equal(grads[0]) and not t.requires_grad


NAMES = {c.name: c.options for c in DIVERGENCES}


def test_every_divergence_has_its_name() -> None:
    through_an_option = {"reverse_skew_kl_div"}
    assert set(NAMES) == set(reference.DIVERGENCES) - through_an_option
    for name in NAMES:
        assert callable(getattr(fastdiv, name)) and DistillationLoss(name).divergence == name


def test_weights_of_the_parts_and_of_the_rows() -> None:
    x, t = make_inputs((2, 3, 9), torch.float32)
    weight = torch.tensor([[1.0, NAN, 0.5], [2.0, 0.0, NAN]])
    known = torch.where(KEPT, weight, 0.0)
    hard = fastdiv.cross_entropy(x, Y, dim=-1, token_weight=known)
    soft = fastdiv.kl_div(
        x, t, target_type="logits", reduction="mean", token_weight=known, temperature=2.0
    )
    for alpha in (0.0, 0.25, 1.0):
        module = DistillationLoss(alpha=alpha, temperature=2.0)
        same(module(x, t, Y, known), (1 - alpha) * hard + alpha * soft)
    # What a weight says of a row that does not count does not matter.
    same(DistillationLoss(alpha=1.0, temperature=2.0)(x, t, Y, weight), soft)
    # A part of weight 0 is not computed: 0 times infinity would be NaN.
    x[..., 3] = -torch.inf
    assert DistillationLoss(alpha=0.0)(x, t, Y.clamp(-100, 2)).isfinite()
    assert DistillationLoss("reverse_kl_div", alpha=1.0)(x, t, Y).isfinite()
    nothing = torch.full_like(Y, -100)
    value, dx = value_and_gradients(lambda x: DistillationLoss()(x, t, nothing), x)
    assert value.isnan() and (dx == 0).all()


def test_another_dimension_and_label_of_padding() -> None:
    x, t = make_inputs((2, 3, 9), torch.float32)
    labels = torch.where(KEPT, Y, 8)
    module = DistillationLoss(dim=1, ignore_index=8)
    same(module(x.mT, t.mT, labels), DistillationLoss()(x, t, Y))


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("name", ["kl_div", "js_div"])
def test_in_one_graph(name: str) -> None:
    x, t = make_inputs((2, 3, 9), torch.float32)
    module = DistillationLoss(
        name, temperature=2.0, scale_by_temperature=True, divergence_options=NAMES[name]
    )
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        value_and_gradients(compiled, x, t, Y), value_and_gradients(module, x, t, Y), strict=True
    ):
        same(actual, expected)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)  # no kernel takes it
def test_no_number_goes_to_the_host() -> None:
    """A tensor on the meta device has none to give."""
    x, t, y = (v.to("meta") for v in (*make_inputs((2, 3, 9), torch.float32), Y))
    value, dx, dt = value_and_gradients(DistillationLoss(), x, t, y)
    assert value.shape == () and dx.shape == dt.shape == x.shape


def test_copies_and_name() -> None:
    x, t = make_inputs((2, 3, 9), torch.float32)
    module = DistillationLoss("js_div", divergence_options={"beta": 0.1})
    for m in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert m(x, t, Y).equal(module(x, t, Y)) and not m.state_dict()
    assert repr(module).startswith("DistillationLoss('js_div', alpha=0.5,")
    assert repr(module).endswith("dim=-1, beta=0.1)")


@pytest.mark.usefixtures("checked_labels")
def test_bad_input() -> None:
    x, y, t = torch.zeros(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 9)
    module = DistillationLoss()
    for raises, says, call in (
        (ValueError, "divergence .*'js_div'.*'js'", lambda: DistillationLoss("js")),
        (ValueError, "alpha .*-0.1", lambda: DistillationLoss(alpha=-0.1)),
        (ValueError, "temperature .*0", lambda: DistillationLoss(temperature=0.0)),
        (ValueError, "reduction .*'pointwise'", lambda: DistillationLoss(reduction="pointwise")),
        (ValueError, "target_type .*'p'", lambda: DistillationLoss(target_type="p")),
        (ValueError, r"target .*\(2, 3, 8\)", lambda: module(x, t[..., :8], y)),
        (ValueError, r"labels .*\(2, 3\), got \(3,\)", lambda: module(x, t, y[0])),
        (TypeError, "labels .*float32", lambda: module(x, t, t)),
        (IndexError, r"\[0\] is 9", lambda: module(x, t, y + 9)),
        (IndexError, r"\[0\] is 9", lambda: DistillationLoss(alpha=1.0)(x, t, y + 9)),
        (TypeError, "beta", lambda: DistillationLoss(divergence_options={"beta": 1})(x, t, y)),
    ):
        with pytest.raises(raises, match=says):
            call()
