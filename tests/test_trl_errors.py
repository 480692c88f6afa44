"""TRL's functions on ours: whatever is wrong with a call, the error is TRL's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastdiv.integrations import trl as integration
from helpers import trl_functions
from helpers.trl_functions import CLASSES, THEIRS, given_to

pytestmark = [
    pytest.mark.cpu_only("torch says it in other words elsewhere"),
    pytest.mark.filterwarnings("ignore"),  # torch's, of what is in beta
]
X, T = torch.randn(2, 3, CLASSES), torch.randn(2, 3, CLASSES)
Y = torch.tensor([[0, 1, -100], [8, 2, 3]])
ODD = [
    None, "x", 1, [1], object(), X.numpy(), torch.tensor(1.0), torch.zeros(0, CLASSES), X.int(),
    X.to_sparse(), X.to("meta"), X[:1], X[..., :4], X.half(), Y, Y.int(), Y.clamp(min=0), Y[:1],
    torch.full((2, 3), 99), Y.to_sparse(),
]  # fmt: skip
NUMBERS = [
    None,
    0,
    -1.0,
    float("nan"),
    float("inf"),
    True,
    "x",
    [1],
    torch.tensor(0.5),
    np.array(2),
]
OPTIONS: dict[str, list[Any]] = {
    "labels": ODD,
    "row_mask": ODD,
    "beta": NUMBERS,
    "temperature": NUMBERS,
    "top_k": [None, -1, 3, 99, True, "x"],
    "reduction": [None, "none", "x", 1, ["sum"]],
    "num_items_in_batch": [0, 2.5, torch.tensor(3), "x", [1]],
    "logits_are_probs": [True],
    "chunk_size": [0, -1, None, 1.5, "x"],
    "entropy_requires_grad": [False, None],
    "unknown": [1],
}


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with integration.apply():
        yield


def outcome(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str]:
    try:
        value = function(*args, **options)
    except Exception as error:
        return type(error), str(error)
    values = value if isinstance(value, tuple) else (value,)
    return "value", str([(v.dtype, tuple(v.shape)) for v in values])


@pytest.mark.parametrize("name", THEIRS)
def test_the_same_error(name: str) -> None:
    theirs, ours = THEIRS[name], given_to(name)
    assert theirs is not ours
    second = [T] if name in trl_functions.WITH_JSD else [Y.clamp(min=0)]
    second = [] if name == "entropy_from_logits" else second
    calls: list[tuple[list[Any], dict[str, Any]]] = [([v, *second], {}) for v in ODD]
    calls += [([X, v], {}) for v in ODD] + [([None, None], {}), ([], {}), ([X] * 20, {})]
    calls += [([X, *second], {k: v}) for k, values in OPTIONS.items() for v in values]
    wrong = []
    for args, options in calls:
        expected, got = outcome(theirs, *args, **options), outcome(ours, *args, **options)
        if got != expected and not isinstance(expected[0], str):
            wrong.append(([type(v) for v in args], options, expected, got))
    assert not wrong, wrong[:3]
