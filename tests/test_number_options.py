"""Options that are numbers: what counts as one, and what is refused in every function of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiv
import fastdiv.distributed as sharded
from helpers.cases import PUBLIC_LOSSES

pytestmark = pytest.mark.usefixtures("gloo")

# Every option that is a number, with one that it may be.
NUMBERS = {
    "temperature": 2.0,
    "beta": 0.25,
    "alpha": 0.5,
    "skew": 0.25,
    "softcap": 20.0,
    "z_loss": 0.5,
    "label_smoothing": 0.25,
    "smoothing": 0.25,  # of LabelSmoothingLoss
    "base": 2.0,
}
INTEGERS = ("ignore_index", "padding_idx")

X, T, Y = torch.randn(4, 5), torch.randn(4, 5).softmax(-1), torch.tensor([0, 1, 2, 4])
H, W = torch.randn(4, 3), torch.randn(5, 3)
GIVEN = {"input": X, "target": T, "index": Y, "values": T[:, :2], "linear_weight": W}
GIVEN |= {"indices": torch.tensor([[0, 1]] * 4), "pk": T, "qk": T.flip(0), "p": T, "q": T.flip(0)}
KINDS = {"target_type": "probs", "values_type": "probs", "alpha": 0.5}

Program = Callable[..., Any]


def numbers_of(function: Any) -> list[str]:
    """The options that are numbers; ``smoothing`` is the name of a kind, too."""
    parameters = inspect.signature(function).parameters
    kinds = parameters.get("label_smoothing") is not None
    return [n for n in NUMBERS if n in parameters and not (kinds and n == "smoothing")]


def of_function(function: Any, **more: Any) -> Program:
    """Its required arguments are filled in."""
    parameters = inspect.signature(function).parameters

    def call(**options: Any) -> Any:
        given = {**GIVEN, **KINDS, **more}
        if "linear_weight" in parameters:
            given["input"] = H
        if "softcap" in parameters or "linear_cross_entropy" in function.__name__:
            given["target"] = Y
        required = {k: v for k, v in given.items() if k in parameters}
        return function(**{**required, **options})

    return call


def of_module(kind: Any) -> Program:
    def call(**options: Any) -> Any:
        given: dict[str, Any] = {}
        parameters = inspect.signature(kind).parameters
        if "in_features" in parameters:
            given = {"in_features": 3, "num_classes": 5}
            if "divergence" in kind.__mro__[1].__name__.lower():
                given["target_type"] = "probs"
        elif kind is fastdiv.nn.LabelSmoothingLoss:
            given = {"size": 5, "padding_idx": -1, "smoothing": 0.1}
        given |= {k: v for k, v in KINDS.items() if k in parameters}
        if kind is fastdiv.nn.DistillationLoss:
            return kind(**{**given, **options})(X, T, Y)
        module = kind(**{**given, **options})
        if kind is fastdiv.nn.EntropyLoss:
            return module(X)
        if "TopK" in kind.__name__:
            rows = H if "in_features" in parameters else X
            return module(rows, T[:, :2], GIVEN["indices"])
        if kind is fastdiv.nn.LabelSmoothingLoss:
            return module(X[None], Y[None])
        hard = "CrossEntropy" in kind.__name__ or "LogProb" in kind.__name__
        return module(H if "in_features" in parameters else X, Y if hard else T)

    return call


# Of linear modules the options are those of the function.
FUNCTION_OF = {
    "LinearCrossEntropyLoss": fastdiv.linear_cross_entropy,
    "LinearKLDivLoss": fastdiv.linear_kl_div,
    "LinearReverseKLDivLoss": fastdiv.linear_reverse_kl_div,
    "LinearJSDivLoss": fastdiv.linear_js_div,
    "LinearLogProb": fastdiv.linear_log_prob,
    "LinearLogProbAndEntropy": fastdiv.linear_log_prob_and_entropy,
    "LinearTopKKLDivLoss": fastdiv.linear_topk_kl_div,
    "LinearTopKReverseKLDivLoss": fastdiv.linear_topk_reverse_kl_div,
}
PROGRAMS: dict[str, tuple[Any, Program]] = {}
for place, names in (
    (fastdiv, PUBLIC_LOSSES),
    (fastdiv.stats, fastdiv.stats.__all__),
    (sharded, [n for n in sharded.__all__ if n != "token_mean"]),
):
    for name in names:
        function = getattr(place, name)
        PROGRAMS[f"{place.__name__}.{name}"] = (function, of_function(function))
for name in fastdiv.nn.__all__:
    kind = getattr(fastdiv.nn, name)
    PROGRAMS[f"fastdiv.nn.{name}"] = (FUNCTION_OF.get(name, kind), of_module(kind))
OPTIONS = [
    (name, option) for name, (known_by, _) in PROGRAMS.items() for option in numbers_of(known_by)
]
EVERY_OPTION = pytest.mark.parametrize(("name", "option"), OPTIONS)


def value_of(result: Any) -> Tensor:
    return torch.stack(result) if isinstance(result, tuple) else torch.as_tensor(result)


def test_every_option_is_looked_at() -> None:
    for name in NUMBERS:
        assert any(option == name for _, option in OPTIONS), name
    # An annotation says what else is a number.
    numbers = set()
    for place in (fastdiv, fastdiv.nn, fastdiv.stats, sharded):
        for name in place.__all__:
            function = getattr(place, name)
            if callable(function) and name != "Stats":
                parameters = inspect.signature(function).parameters.values()
                numbers |= {p.name for p in parameters if "float" in str(p.annotation)}
    assert numbers - {"count"} <= NUMBERS.keys(), numbers


def may_be_tensor(name: str, option: str) -> bool:
    """Whether it may be a tensor with a gradient, or of one number for each row."""
    return "Tensor" in str(inspect.signature(PROGRAMS[name][0]).parameters[option].annotation)


@pytest.mark.parametrize(("name", "option"), [o for o in OPTIONS if not may_be_tensor(*o)])
def test_what_requires_a_gradient_is_refused(name: str, option: str) -> None:
    call = PROGRAMS[name][1]
    value = NUMBERS[option]
    says = rf"{option} gets no gradient: pass {option}\.detach\(\)"
    for tensor in (torch.nn.Parameter(torch.tensor(value)), torch.tensor([value]).requires_grad_()):
        with pytest.raises(ValueError, match=says):
            call(**{option: tensor})
    learnt = torch.tensor(0.5 * value).requires_grad_() * 2
    with pytest.raises(ValueError, match=says):
        call(**{option: learnt})
    with pytest.raises(ValueError, match=says), torch.autograd.forward_ad.dual_level():
        tangent = torch.tensor(1.0)
        call(**{option: torch.autograd.forward_ad.make_dual(torch.tensor(value), tangent)})


@EVERY_OPTION
def test_numbers_of_all_kinds(name: str, option: str) -> None:
    call = PROGRAMS[name][1]
    value = NUMBERS[option]
    torch.manual_seed(0)
    expected = value_of(call(**{option: value}))
    kinds: list[Any] = [torch.tensor(value), torch.nn.Parameter(torch.tensor(value)).detach()]
    kinds += [torch.tensor(value, dtype=torch.float64), torch.tensor([value])]
    kinds += [np.float64(value), np.float32(value), np.float16(value), np.array(value)]
    kinds += [Fraction(value)] + ([int(value), np.int64(value)] if value == int(value) else [])
    for kind in kinds:
        torch.manual_seed(0)
        assert value_of(call(**{option: kind})).equal(expected), repr(kind)


@EVERY_OPTION
def test_what_is_no_number_is_refused(name: str, option: str) -> None:
    call = PROGRAMS[name][1]
    several = (torch.full((2,), 0.5), np.full(2, 0.5), torch.zeros(0))
    for value in several:
        with pytest.raises(ValueError, match=rf"{option} must be one number, (or .*)?got .*\("):
            call(**{option: value})
    for value in ("0.5", [0.5], True, False, torch.tensor(True), np.bool_(True), object()):
        with pytest.raises(TypeError, match=f"{option} must be a number( or .*)?, got"):
            call(**{option: value})
    if option not in ("base", "softcap"):
        with pytest.raises(TypeError, match=f"{option} must be a number, got None"):
            call(**{option: None})


def test_what_a_module_is_given_later() -> None:
    """An option may be set anew, as a temperature that is annealed is."""
    loss = fastdiv.nn.KLDivLoss(target_type="probs")
    loss.temperature = 3.0
    assert loss(X, T).equal(fastdiv.kl_div(X, T, target_type="probs", temperature=3.0))
    loss.temperature = torch.nn.Parameter(torch.tensor(3.0))
    loss(X, T).backward()
    assert loss.temperature.grad != 0
    options = {"beta": torch.nn.Parameter(torch.tensor(0.5))}
    distillation = fastdiv.nn.DistillationLoss("js_div", divergence_options=options)
    with pytest.raises(ValueError, match="beta gets no gradient"):
        distillation(X, T, Y)


# --- labels that do not count ---

WITH_IGNORED = [
    name
    for name, (known_by, _) in PROGRAMS.items()
    if {*INTEGERS} & inspect.signature(known_by).parameters.keys()
]


@pytest.mark.parametrize("name", WITH_IGNORED)
def test_ignored_label(name: str) -> None:
    known_by, call = PROGRAMS[name]
    (option,) = {*INTEGERS} & inspect.signature(known_by).parameters.keys()
    torch.manual_seed(0)
    expected = value_of(call(**{option: 4}))
    for value in (np.int64(4), torch.tensor(4)):
        torch.manual_seed(0)
        assert value_of(call(**{option: value})).equal(expected)
    as_torch = "linear" in name.lower()  # where None means -100
    wrong: list[Any] = [1.5, "4", True, False, torch.tensor(1.5), *([] if as_torch else [None])]
    for value in wrong:
        with pytest.raises(TypeError, match=f"{option} must be an int, got .* such as -100"):
            call(**{option: value})
    if as_torch:
        call(**{option: None})
