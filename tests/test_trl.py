"""TRL's losses on our kernels: values and gradients beside the functions that were not patched."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
import fastdiv.integrations.trl as integration
from fastdiv.integrations import _trl_losses
from trl_functions import CLASSES, THEIRS, WITH_JSD, given_to

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
RUNS_ON = {
    "generalized_jsd_loss": "js_div",
    "selective_log_softmax": "log_prob",
    "selective_log_softmax_and_entropy": "log_prob_and_entropy",
    "entropy_from_logits": "entropy",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The functions of fastdiv that were called, under the patch."""
    called: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        function = getattr(_trl_losses, name)
        return lambda *args, **given: called.append(name) or function(*args, **given)

    for name in RUNS_ON.values():
        monkeypatch.setattr(_trl_losses, name, spy(name))
    with integration.apply():
        yield called


def with_gradients(function: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
    """Values, and gradients for upstream gradients that are not 1."""
    inputs = [v.detach().clone().requires_grad_() for v in leaves]
    values = function(*inputs)
    values = [v for v in (values if isinstance(values, tuple) else [values]) if v.requires_grad]
    upstream = [torch.linspace(0.5, 1.5, v.numel()).to(v).reshape(v.shape) for v in values]
    return [*values, *torch.autograd.grad(values, inputs, upstream)]


def agree(name: str, calls: list[str], *leaves: Tensor, **given: Any) -> None:
    """What TRL's own function has of the same numbers in double, in the dtype of its result."""
    theirs, ours = THEIRS[name], given_to(name)
    calls.clear()
    got = with_gradients(lambda *v: ours(*v, **given), *leaves)
    assert calls[0] == RUNS_ON[theirs.__name__], given
    with fastdiv.backend("reference"):  # what a function of TRL's calls in turn is TRL's, too
        exact = with_gradients(lambda *v: theirs(*v, **given), *(v.double() for v in leaves))
        plain = with_gradients(lambda *v: theirs(*v, **given), *leaves)
    assert [v.dtype for v in got] == [v.dtype for v in plain], given
    for a, b in zip(got, exact, strict=True):
        # Roundings of a few operations, or, of a half, of the result.
        tolerance = torch.finfo(a.dtype).eps * (2 if a.dtype.itemsize == 2 else 16)
        size = max(b.nan_to_num().abs().max().item(), 1e-3)
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * size, equal_nan=True
        )


def rows(dtype: torch.dtype, *shape: int) -> Tensor:
    return (3 * torch.randn(*shape, CLASSES)).to(dtype)


def some_labels() -> tuple[Tensor | None, ...]:
    """Without; some ignored, a sequence wholly; all ignored."""
    labels = torch.randint(CLASSES, (3, 5))
    labels[0, 2:], labels[1] = -100, -100
    return None, labels, torch.full_like(labels, -100)


@every_dtype
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1.0])
def test_jsd(calls: list[str], beta: float, dtype: torch.dtype) -> None:
    every_jsd(WITH_JSD[0], calls, beta, dtype)


@pytest.mark.parametrize("beta", [0, 0.1, 1.0])
@pytest.mark.parametrize("name", WITH_JSD[1:])
def test_jsd_of_other_trainers(calls: list[str], name: str, beta: float) -> None:
    every_jsd(name, calls, beta, torch.float32)


def every_jsd(name: str, calls: list[str], beta: float, dtype: torch.dtype) -> None:
    """Of the student and of a teacher that learns, too."""
    student, teacher = rows(dtype, 3, 5), rows(dtype, 3, 5)
    how = [{"reduction": reduction} for reduction in ("batchmean", "sum", "mean")]
    if "num_items_in_batch" in inspect.signature(THEIRS[name]).parameters:
        numbers = (7, torch.tensor(7), torch.tensor(7.0))
        how += [{"num_items_in_batch": number, "reduction": "none"} for number in numbers]
    for labels in some_labels():
        for temperature, reduced in zip((1.0, 2.0) * 3, how, strict=False):
            options = {"labels": labels, "beta": beta, "temperature": temperature, **reduced}
            agree(name, calls, student, teacher, **options)


def test_jsd_of_a_slice_and_of_two_dtypes(calls: list[str]) -> None:
    """As GKD has them: without the last token, the teacher in halves and without gradient."""
    student, teacher = rows(torch.float32, 3, 6), rows(torch.bfloat16, 3, 6)
    labels = some_labels()[1]

    def loss(function: Callable[..., Tensor], teacher: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x[:, :-1], teacher[:, :-1], labels, 0.1)

    theirs = THEIRS[WITH_JSD[0]]
    got = with_gradients(loss(given_to(WITH_JSD[0]), teacher), student)
    assert calls == ["js_div"] and got[0].dtype is loss(theirs, teacher)(student).dtype
    # TRL rounds the teacher's log-probabilities to its dtype.
    expected = with_gradients(loss(theirs, teacher.float()), student)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("k", [None, 1, 4])
def test_selective_log_softmax(
    calls: list[str], k: int | None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Of one class a token, or of k, which may repeat."""
    name = "selective_log_softmax"
    index = torch.randint(CLASSES, shape if k is None else (*shape, k))
    agree(name, calls, rows(dtype, *shape), index=index)
    if "temperature" in inspect.signature(THEIRS[name]).parameters:
        for mask in (None, torch.randint(2, index.shape), torch.randint(2, index.shape).bool()):
            agree(name, calls, rows(dtype, *shape), index=index, temperature=0.7, row_mask=mask)


@every_dtype
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5)], ids=str)
def test_entropy(calls: list[str], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    agree("entropy_from_logits", calls, rows(dtype, *shape))
    agree("entropy_from_logits", calls, rows(dtype, *shape), chunk_size=2)


@every_dtype
@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=str)
@pytest.mark.parametrize("differentiated", [True, False])
def test_both(
    calls: list[str], differentiated: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    name = "selective_log_softmax_and_entropy"
    if name not in THEIRS:
        pytest.skip("this version of TRL has none")
    index = torch.randint(CLASSES, shape)
    for temperature, mask in ((1.0, None), (0.7, None), (2.0, torch.randint(2, shape))):
        options = {"temperature": temperature, "row_mask": mask}
        agree(
            name,
            calls,
            rows(dtype, *shape),
            index=index,
            entropy_requires_grad=differentiated,
            **options,
        )
    log_prob, entropy = given_to(name)(rows(dtype, *shape).requires_grad_(), index, differentiated)
    assert log_prob.requires_grad and entropy.requires_grad == differentiated


def test_results_may_be_overwritten(calls: list[str]) -> None:
    """As DPO overwrites the tokens of the prompt."""
    index = torch.randint(CLASSES, (3, 5))
    for name in [name for name in THEIRS if name.startswith("selective")]:

        def masked(x: Tensor, name: str = name) -> tuple[Tensor, ...]:
            values = given_to(name)(x, index)
            values = values if isinstance(values, tuple) else (values,)
            for v in values:
                v[index < 4] = 0.0
            return values

        x = rows(torch.float32, 3, 5).requires_grad_()
        sum(v.sum() for v in masked(x)).backward()
        assert x.grad is not None and (x.grad[index < 4] == 0).all()
        assert (x.grad[index >= 4] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(calls: list[str], dtype: torch.dtype) -> None:
    x, t, index = rows(dtype, 3, 5), rows(dtype, 3, 5), torch.randint(CLASSES, (3, 5))
    given = {name: (x, index) for name in THEIRS}
    given |= {"entropy_from_logits": (x,)} | dict.fromkeys(WITH_JSD, (x, t))
    for name, arguments in given.items():
        with torch.autocast(x.device.type, torch.bfloat16):
            got = given_to(name)(*arguments)
            with fastdiv.backend("reference"):
                expected = THEIRS[name](*arguments)
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert set(calls) == {RUNS_ON[function.__name__] for function in THEIRS.values()}


def test_excluded_classes(calls: list[str]) -> None:
    """A class at -inf is as one that is not there, where TRL's JSD and entropy give NaN."""
    x, t = rows(torch.float32, 2, 5), rows(torch.float32, 2, 5)
    wide_x, wide_t = (torch.cat([v, torch.full_like(v[..., :2], -torch.inf)], -1) for v in (x, t))
    for name in WITH_JSD:
        for beta in (0, 0.3, 1):
            assert THEIRS[name](wide_x, wide_t, beta=beta).isnan()
            got = with_gradients(lambda *v: given_to(name)(*v, beta=beta), wide_x, wide_t)  # noqa: B023
            expected = with_gradients(lambda *v: THEIRS[name](*v, beta=beta), x, t)  # noqa: B023
            torch.testing.assert_close(got[0], expected[0])
            for a, b in zip(got[1:], expected[1:], strict=True):
                torch.testing.assert_close(a[..., :-2], b, rtol=1e-5, atol=1e-6)
    entropy = given_to("entropy_from_logits")(wide_x)
    torch.testing.assert_close(entropy, THEIRS["entropy_from_logits"](x))
    index = torch.tensor([CLASSES, CLASSES + 1, 0])  # excluded ones, alone and with another
    for k in (2, 3):
        got = given_to("selective_log_softmax")(wide_x, index[:k].expand(2, 5, k))
        expected = wide_x.log_softmax(-1)[..., index[:k]]
        torch.testing.assert_close(got, expected)


def test_padding_may_hold_anything(calls: list[str]) -> None:
    x, t = rows(torch.float32, 3, 5), rows(torch.float32, 3, 5)
    labels = some_labels()[1]
    assert labels is not None
    expected = with_gradients(lambda *v: THEIRS[WITH_JSD[0]](*v, labels), x, t)
    x[1], t[0, 3] = torch.nan, torch.inf
    got = with_gradients(lambda *v: given_to(WITH_JSD[0])(*v, labels), x, t)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


X, T, INDEX = rows(torch.float32, 3, 5), rows(torch.float32, 3, 5), torch.randint(CLASSES, (3, 5))
LABELS = some_labels()[1]


class Tagged(Tensor):
    pass


# Of which function, with what: TRL's own bits, or its own error.
OTHERS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "every term": ("jsd", (X, T), {"reduction": "none"}),
    "every term that counts": ("jsd", (X, T, LABELS), {"reduction": "terms"}),
    "beta outside [0, 1]": ("jsd", (X, T), {"beta": 1.5}),
    "beta as a tensor": ("jsd", (X, T), {"beta": torch.tensor(0.5)}),
    "a negative temperature": ("jsd", (X, T), {"temperature": -1.0}),
    "temperature 0": ("jsd", (X, T), {"temperature": 0.0}),
    "a teacher of other classes": ("jsd", (X, T[..., 1:]), {}),
    "a teacher to broadcast": ("jsd", (X, T[:1]), {}),
    "an integer teacher": ("jsd", (X, T.long()), {}),
    "labels of sequences": ("jsd", (X, T, INDEX[:, 0]), {}),
    "too many labels": ("jsd", (X, T, INDEX[:, :4]), {}),
    "an empty batch": ("jsd", (X[:0], T[:0]), {}),
    "one row": ("jsd", (X[0, 0], T[0, 0]), {}),
    "a list": ("jsd", ([1.0, 2.0], T), {}),
    "a subclass": ("jsd", (X.as_subclass(Tagged), T), {}),
    "an unknown argument": ("jsd", (X, T), {"gamma": 1.0}),
    "no teacher": ("jsd", (X,), {}),
    "a class too many": ("log_prob", (X, INDEX + CLASSES), {}),
    "a negative class": ("log_prob", (X, INDEX - CLASSES), {}),
    "k classes, one too many": ("log_prob", (X, INDEX[..., None] + CLASSES), {}),
    "int32 classes": ("log_prob", (X, INDEX.int()), {}),
    "classes of fewer tokens": ("log_prob", (X, INDEX[:, :4]), {}),
    "integer logits": ("log_prob", (X.long(), INDEX), {}),
    "no tokens": ("log_prob", (X[:0], INDEX[:0]), {}),
    "no index": ("log_prob", (X,), {}),
    "a single row": ("log_prob", (X[0, 0], INDEX[0, 0]), {}),
    "meta": ("entropy", (X.to("meta"),), {}),
    "no chunk": ("entropy", (X,), {"chunk_size": 0}),
    "no rows": ("entropy", (X[:0],), {}),
    "complex logits": ("entropy", (X.to(torch.complex64),), {}),
}


def outcome(function: Callable[..., Any], *args: Any, **given: Any) -> Any:
    try:
        value = function(*args, **given)
    except Exception as error:
        return type(error), str(error)
    return type(value), value.dtype, value.shape, None if value.is_meta else str(value.tolist())


@pytest.mark.cpu_only("some of these end a GPU's context")
@pytest.mark.parametrize("other", OTHERS)
def test_other_calls_are_trls(calls: list[str], other: str) -> None:
    short, args, given = OTHERS[other]
    of = {"log_prob": "selective_log_softmax", "entropy": "entropy_from_logits"}
    for name in WITH_JSD if short == "jsd" else [of[short]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert outcome(given_to(name), *args, **given) == outcome(THEIRS[name], *args, **given)
    assert not calls or "class" in other


def test_options_that_are_trls(calls: list[str]) -> None:
    """Probabilities, a part of a distribution, an index of k classes beside an entropy."""
    tried = 0
    for name in WITH_JSD:
        known = inspect.signature(THEIRS[name]).parameters
        p, q = X.softmax(-1)[..., 1:], T.softmax(-1)[..., 1:]  # of some of the classes
        for option, given in (("logits_are_probs", True), ("top_k", 3)):
            if option in known:
                arguments = (p, q) if option == "logits_are_probs" else (X, T)
                got, expected = (
                    f(*arguments, LABELS, **{option: given}) for f in (given_to(name), THEIRS[name])
                )
                assert got.equal(expected)
                tried += 1
    assert not calls
    if "top_k" in known:  # that is all of it
        agree(name, calls, X, T, top_k=CLASSES)
    assert tried == len(WITH_JSD) - 1
