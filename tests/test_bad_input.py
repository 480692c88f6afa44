"""Bad input raises torch's types of error, naming the argument, the value and the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastdiv

pytestmark = [pytest.mark.usefixtures("checked_labels"), pytest.mark.usefixtures("backend")]

NAN, INF = float("nan"), float("inf")
X, T, Y = torch.zeros(3, 5), torch.zeros(3, 5), torch.tensor([0, 1, 2])


def ce(x: Any = X, y: Any = Y, weight: Any = None, **options: Any) -> Any:
    return fastdiv.cross_entropy(x, y, weight, **options)


def kl(x: Any = X, t: Any = T, **options: Any) -> Any:
    return fastdiv.kl_div(x, t, **{"target_type": "logits", **options})


def js(x: Any = X, t: Any = T, **options: Any) -> Any:
    return fastdiv.js_div(x, t, **{"target_type": "logits", **options})


def entropy(x: Any = X, **options: Any) -> Any:
    return fastdiv.entropy(x, **options)


def log_prob(x: Any = X, y: Any = Y, **options: Any) -> Any:
    return fastdiv.log_prob(x, y, **options)


def both(x: Any = X, y: Any = Y, **options: Any) -> Any:
    return fastdiv.log_prob_and_entropy(x, y, **options)


def labels(*values: int) -> torch.Tensor:
    return torch.tensor(values)


Bad = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], type[Exception], list[str]]

# Function, arguments, options; the exception, and what its message must hold.
TABLE: list[Bad] = []


def bad(f: Callable[..., Any], *args: Any, raises: Any, says: str, **options: Any) -> None:
    TABLE.append((f, args, options, raises, says.split("|")))


LEAF = X.clone().requires_grad_()

# --- the input ---
for f in (ce, kl, js, entropy, log_prob, both):
    bad(f, [[1.0, 2.0]], raises=TypeError, says="input|Tensor|list")
    bad(f, None, raises=TypeError, says="input|Tensor|NoneType")
    for dtype in (torch.int64, torch.complex64, torch.bool):
        bad(f, X.to(dtype), raises=TypeError, says=f"input|float32|bfloat16|{dtype}")
    bad(f, torch.tensor(1.0), raises=ValueError, says="input|dimension|scalar")
    bad(f, X, dim=2, raises=IndexError, says="dim|2|(3, 5)")
    bad(f, X, dim=-3, raises=IndexError, says="dim|-3|(3, 5)")
    for value in (0.0, -1.0, NAN, INF):
        bad(f, X, temperature=value, raises=ValueError, says=f"temperature|positive|{value}")
bad(ce, torch.zeros(3, 0), raises=ValueError, says="(3, 0)|classes|dim 1")
bad(entropy, torch.zeros(0), raises=ValueError, says="(0,)|classes|dim 0")
bad(kl, torch.zeros(3, 0), torch.zeros(3, 0), raises=ValueError, says="(3, 0)|classes")
bad(log_prob, torch.zeros(3, 0), raises=ValueError, says="(3, 0)|classes")

# --- options ---
for f in (ce, kl, js, entropy):
    bad(f, reduction="average", raises=ValueError, says="reduction|'average'|batchmean")
for f in (ce, entropy):
    bad(f, reduction="pointwise", raises=ValueError, says="reduction|'pointwise'")
for value in (-0.1, 1.5, NAN):
    bad(ce, label_smoothing=value, raises=ValueError, says=f"label_smoothing|0 and 1|{value}")
    bad(js, beta=value, raises=ValueError, says=f"beta|0 and 1|{value}")
bad(ce, smoothing="none", raises=ValueError, says="smoothing|'none'|'others'")
bad(
    ce, torch.zeros(3, 1), labels(0, 0, 0), smoothing="others", label_smoothing=0.1,
    raises=ValueError, says="smoothing|'others'|two classes",
)  # fmt: skip
for value in (0.0, -30.0, NAN, INF):
    bad(ce, softcap=value, raises=ValueError, says=f"softcap|positive|{value}")
for value in (NAN, INF):
    bad(ce, z_loss=value, raises=ValueError, says=f"z_loss|finite|{value}")
for value in (0.0, -2.0, NAN, INF):
    bad(entropy, base=value, raises=ValueError, says=f"base|{value}")
bad(entropy, base=1, raises=ValueError, says="base|1")
for kind in ("softmax", None, "none", 0):
    bad(kl, target_type=kind, raises=ValueError, says=f"target_type|{kind!r}|log_probs")
bad(fastdiv.kl_div, X, T, raises=TypeError, says="target_type")
bad(
    ce,
    X.clone().requires_grad_(),
    inplace_backward=True,
    raises=ValueError,
    says="inplace_backward",
)
bad(
    kl,
    X.clone().requires_grad_(),
    inplace_backward=True,
    raises=ValueError,
    says="inplace_backward",
)

# --- the target ---
for f in (kl, js):
    bad(f, X, [[0.0]], raises=TypeError, says="target|Tensor|list")
    bad(f, X, Y, raises=TypeError, says="target|int64")
    bad(f, X, T[:2], raises=ValueError, says="target|(3, 5)|(2, 5)")
    bad(f, X, T[:, :4], raises=ValueError, says="target|(3, 5)|(3, 4)")
    bad(f, X, T.to("meta"), raises=RuntimeError, says=f"target|meta|{X.device}")
bad(ce, X, [0, 1, 2], raises=TypeError, says="target|Tensor|list")
bad(
    lambda: fastdiv.nn.DistillationLoss()(X, T, [0, 1, 2]),
    raises=TypeError, says="labels|Tensor|list",
)  # fmt: skip
bad(ce, X, labels(0, 1), raises=ValueError, says="target|(3,)|(2,)")
bad(ce, X, Y[:, None], raises=ValueError, says="target|(3,)|(3, 1)")
bad(
    ce,
    torch.zeros(2, 5, 7),
    torch.zeros(2, 5, dtype=torch.int64),
    raises=ValueError,
    says="(2, 7)|(2, 5)",
)
bad(ce, X, T[:, :4], raises=ValueError, says="target|(3, 5)|(3, 4)")
bad(ce, X, Y.to("meta"), raises=RuntimeError, says=f"target|meta|{X.device}")
bad(ce, X, T.to("meta"), raises=RuntimeError, says=f"target|meta|{X.device}")
for dtype in (torch.int8, torch.int16, torch.bool, torch.complex64):
    bad(ce, X, Y.to(dtype), raises=TypeError, says=f"target|int64|{dtype}")
bad(ce, X, labels(0, 5, 2), raises=IndexError, says="target[1]|5|5 classes|-100")
bad(ce, X, labels(0, 1, -1), raises=IndexError, says="target[2]|-1|5 classes|-100")
bad(ce, X, labels(0, 1, -100), ignore_index=7, raises=IndexError, says="target[2]|-100|5 classes|7")
bad(ce, X, labels(9, 0, 2), torch.ones(5), raises=IndexError, says="target[0]|9|5 classes")
bad(ce, X, labels(9, 0, 2), label_smoothing=0.1, raises=IndexError, says="target[0]|9|5 classes")
bad(ce, X, labels(9, 0, 2), return_stats=True, raises=IndexError, says="target[0]|9|5 classes")
bad(ce, X, labels(9, 0, 2).byte(), raises=IndexError, says="target[0]|9|5 classes")
for f in (log_prob, both):
    bad(f, X, [0, 1, 2], raises=TypeError, says="index|Tensor|list")
    bad(f, X, Y.float(), raises=TypeError, says="index|int64|float32")
    bad(f, X, labels(0), raises=ValueError, says="index|(3,)|(1,)")
    place = "index has {} in row 1" if f is log_prob else "index[1] is {}"
    for index in (5, -2, -100):
        says = f"{place.format(index)}|5 classes|-1"
        bad(f, X, labels(0, index, 2), raises=IndexError, says=says)
    bad(f, X, Y.to("meta"), raises=RuntimeError, says=f"index|meta|{X.device}")
bad(log_prob, X, Y[:2, None], raises=ValueError, says="index|(3,)|(2, 1)|k classes")
bad(log_prob, X, Y[:, None, None], raises=ValueError, says="index|(3,)|(3, 1, 1)|k classes")
bad(log_prob, X[None], Y[:, None], raises=ValueError, says="index|(1, 3)|(3, 1)|k classes")
bad(log_prob, X, torch.tensor([[0, 1], [2, 5], [0, 0]]), raises=IndexError, says="row 1|5 classes")
for dtype in (torch.int8, torch.bool):
    bad(log_prob, X, Y[:, None].to(dtype), raises=TypeError, says=f"index|int16|{dtype}")

# --- masks of classes, and temperatures in tensors ---
BITS = torch.ones(3, 1, dtype=torch.uint8)
for f in (ce, kl, js, entropy, log_prob, both):
    bad(f, X, class_mask=[True] * 5, raises=TypeError, says="class_mask|Tensor|list")
    for dtype in (torch.int64, torch.float32):
        says = f"class_mask|bool|uint8|{dtype}"
        bad(f, X, class_mask=torch.ones(5, dtype=dtype), raises=TypeError, says=says)
    for shape in ((4,), (2, 5), (3, 4), (1, 3, 5)):
        mask = torch.ones(shape, dtype=torch.bool)
        bad(f, X, class_mask=mask, raises=ValueError, says=f"class_mask|(3, 5)|(5,)|{shape}")
    bad(f, X, class_mask=BITS[:2], raises=ValueError, says="class_mask|(3, 1)|bits|(3, 5)|(2, 1)")
    mask = torch.ones(3, 5, dtype=torch.uint8)
    bad(f, X, class_mask=mask, raises=ValueError, says="class_mask|(3, 1)|bits|(3, 5)|(3, 5)")
    mask = torch.ones(5, dtype=torch.bool, device="meta")
    bad(f, X, class_mask=mask, raises=RuntimeError, says="class_mask|meta")
    for value in (0.0, -1.0, NAN, INF):
        says = f"temperature|positive|{value}"
        bad(f, X, temperature=torch.tensor(value), raises=ValueError, says=says)
        rows = torch.tensor([1.0, value, 1.0])
        bad(f, X, temperature=rows, raises=ValueError, says=f"{says}|[1]")
    for shape in ((2,), (3, 1), (1, 3), (0,)):
        says = f"temperature|one number|(3,)|{shape}"
        bad(f, X, temperature=torch.ones(shape), raises=ValueError, says=says)
    says = "temperature|float32|int64"
    bad(f, X, temperature=torch.tensor(2), raises=TypeError, says=says)
    bad(
        f, X, temperature=torch.ones(3, device="meta"), raises=RuntimeError, says="temperature|meta"
    )
bad(
    ce, torch.zeros(2, 9, 3), torch.zeros(2, 3, dtype=torch.int64),
    class_mask=torch.ones(2, 2, 3, dtype=torch.uint8),
    raises=ValueError, says="class_mask|bits|last|dim 1|(2, 9, 3)|bool",
)  # fmt: skip

# --- weights ---
W = torch.ones(5)
bad(ce, weight=torch.ones(4), raises=ValueError, says="weight|(5,)|(4,)")
bad(ce, weight=torch.ones(1, 5), raises=ValueError, says="weight|(5,)|(1, 5)")
bad(ce, weight=[1.0] * 5, raises=TypeError, says="weight|Tensor|list")
bad(ce, weight=W.to(torch.complex64), raises=TypeError, says="weight|complex64")
bad(ce, weight=W.clone().requires_grad_(), raises=ValueError, says="weight|gradient|detach")
bad(ce, weight=W.to("meta"), raises=RuntimeError, says=f"weight|meta|{X.device}")
for f in (ce, kl, js):
    bad(f, token_weight=torch.ones(4), raises=ValueError, says="token_weight|(3,)|(4,)")
    bad(f, token_weight=torch.ones(3, 1), raises=ValueError, says="token_weight|(3,)|(3, 1)")
    bad(f, token_weight=2.0, raises=TypeError, says="token_weight|Tensor|float")
bad(kl, token_weight="probability", raises=TypeError, says="token_weight|Tensor|str")
bad(
    ce, token_weight="confidence", raises=ValueError, says="token_weight|'probability'|'confidence'"
)
bad(ce, X, T, token_weight="probability", raises=ValueError, says="token_weight|class indices")
for f in (ce, kl, js):
    bad(
        f,
        token_weight=torch.ones(3, requires_grad=True),
        raises=ValueError,
        says="token_weight|detach",
    )
    says = f"token_weight|meta|{X.device}"
    bad(f, token_weight=torch.ones(3).to("meta"), raises=RuntimeError, says=says)


def name_of(row: Bad) -> str:
    function, args, options, raises, says = row
    return f"{function.__name__}-{raises.__name__}-{'-'.join(says)}"


@pytest.mark.parametrize(
    ("function", "args", "options", "raises", "says"), TABLE, ids=[name_of(row) for row in TABLE]
)
def test_bad_input(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    raises: type[Exception],
    says: list[str],
) -> None:
    with pytest.raises(raises) as error:
        function(*args, **options)
    assert error.type is raises
    message = str(error.value)
    missing = [word for word in says if word.lower() not in message.lower()]
    assert not missing, f"{missing} not in {message!r}"


def test_bad_backend() -> None:
    with pytest.raises(ValueError, match="backend.*'cuda'"), fastdiv.backend("cuda"):
        pass


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_native_backend_where_no_kernel_fits() -> None:
    with pytest.raises(RuntimeError, match="native.*meta.*auto"):
        fastdiv.entropy(X.to("meta"))
    with pytest.raises(RuntimeError, match="native.*pointwise"):
        kl(reduction="pointwise")
