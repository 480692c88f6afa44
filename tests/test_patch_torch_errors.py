"""patch_torch: whatever is wrong with a call, the error is torch's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from helpers.torch_patched import TORCHS, torch_has_its_own

pytestmark = [
    pytest.mark.cpu_only("torch says it in other words elsewhere"),
    pytest.mark.filterwarnings("ignore"),  # torch's, of what is in beta or deprecated
]
X, Y, P, W = torch.randn(3, 5), torch.tensor([0, 1, 4]), torch.rand(3, 5), torch.rand(5)


@pytest.fixture(autouse=True)
def reversed_by_all() -> Iterator[None]:
    yield from torch_has_its_own()


def odd_tensors() -> list[Any]:
    """What may be in the place of any tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [torch.randn(5), torch.randn(4)]
        return [
            None, "x", 1, 1.5, True, [1, 2], object(), X.numpy(),
            torch.tensor(1.0), torch.tensor(1), torch.zeros(3, 0), torch.zeros(0, 5),
            X.to_sparse(), X.to_sparse_csr(), X.to_mkldnn(), Y.to_sparse(),
            torch.nested.nested_tensor(rows),
            torch.nested.nested_tensor(rows, layout=torch.jagged),
            torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
            X.int(), X.bool(), X.to(torch.complex64), X.to(torch.float8_e4m3fn), X.to("meta"),
            X[:2], X[None], X.half(), X.double(), torch.randn(3, 5, 2),
            Y.int(), Y[:2], Y[:, None], Y.to("meta"), torch.tensor([0, 9, 1]),
            torch.tensor([-1, 0, 1]), W[:3], W.double(), W.clone().requires_grad_(),
        ]  # fmt: skip


ODD = odd_tensors()
OPTIONS: dict[str, list[Any]] = {
    "weight": ODD,
    "size_average": [True, False, "x", X],
    "reduce": [True, False, "x", X],
    "ignore_index": [None, 1.0, True, False, "x", 2**70, 2**63, -(2**63), torch.tensor(1), X, [1]],
    "reduction": [None, "pointwise", "batchmean", "", 1, X, ["mean"], {}, b"mean"],
    "label_smoothing": [None, -0.1, 2, 10**400, float("nan"), True, "x", X, W.sum() / 10, [1]],
    "unknown": [1],
}
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *(((x, t), {}) for x in (*ODD, X) for t in (*ODD, Y, P)),
    *(((X, t), {k: v}) for t in (Y, P) for k, values in OPTIONS.items() for v in values),
    *((arguments, {}) for arguments in ((), (X,), (X, Y, W, 1, 2, 3, 4, 5, 6))),
    ((X,), {"input": X, "target": Y}),
    ((None,), {"target": None, "weight": None}),
]


def outcome(function: Callable[..., Tensor], *args: Any, **options: Any) -> tuple[Any, str]:
    try:
        value = function(*args, **options)
    except Exception as error:
        return type(error), str(error)
    return value.dtype, str(tuple(value.shape))


def test_the_same_error() -> None:
    wrong, failed = [], 0
    for args, options in CALLS:
        expected = outcome(TORCHS, *args, **options)
        failed += isinstance(expected[0], type)
        with fastdiv.patch_torch():
            got = outcome(F.cross_entropy, *args, **options)
        if got != expected:
            wrong.append((args, options, expected, got))
    assert not wrong, wrong[:3]
    assert failed > 1000


def test_the_same_error_of_a_module() -> None:
    for loss in (torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(W, label_smoothing=0.1)):
        for x, t in ((None, Y), (X, None), (None, None), (X.to_sparse(), Y), (X, Y.double())):
            expected = outcome(loss, x, t)
            with fastdiv.patch_torch():
                assert outcome(loss, x, t) == expected
