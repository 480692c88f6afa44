"""TRL's losses on our kernels: values and gradients beside the functions that were not patched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
from helpers.trl_functions import (
    CLASSES,
    RUNS_ON,
    THEIRS,
    WITH_JSD,
    calls_of_ours,
    given_to,
    rows,
    some_labels,
)
from helpers.values import uneven, value_and_gradients

gradients = partial(value_and_gradients, upstream=uneven)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    yield from calls_of_ours(monkeypatch)


def agree(name: str, calls: list[str], *leaves: Tensor, **given: Any) -> None:
    """What TRL's own function has of the same numbers in double, in the dtype of its result."""
    theirs, ours = THEIRS[name], given_to(name)
    calls.clear()
    got = gradients(lambda *v: ours(*v, **given), *leaves)
    assert calls[0] == RUNS_ON[theirs.__name__], given
    with fastdiv.backend("reference"):  # what a function of TRL's calls in turn is TRL's, too
        exact = gradients(lambda *v: theirs(*v, **given), *(v.double() for v in leaves))
        plain = gradients(lambda *v: theirs(*v, **given), *leaves)
    assert [v.dtype for v in got] == [v.dtype for v in plain], given
    for a, b in zip(got, exact, strict=True):
        # Roundings of a few operations, or, of a half, of the result.
        tolerance = torch.finfo(a.dtype).eps * (2 if a.dtype.itemsize == 2 else 16)
        size = max(b.nan_to_num().abs().max().item(), 1e-3)
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * size, equal_nan=True
        )


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
    got = gradients(loss(given_to(WITH_JSD[0]), teacher), student)
    assert calls == ["js_div"] and got[0].dtype is loss(theirs, teacher)(student).dtype
    # TRL rounds the teacher's log-probabilities to its dtype.
    expected = gradients(loss(theirs, teacher.float()), student)
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


def test_classes_that_tie(calls: list[str]) -> None:
    """Equal logits give equal values, but each class has a gradient of its own."""
    x = rows(torch.float32, 3, 5)
    x[..., :4] = x.amax(-1, keepdim=True)
    index = torch.tensor([2, 0, 3, 0, 7]).expand(3, 5, 5)
    agree("selective_log_softmax", calls, x, index=index)


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
            got = gradients(lambda *v: given_to(name)(*v, beta=beta), wide_x, wide_t)  # noqa: B023
            expected = gradients(lambda *v: THEIRS[name](*v, beta=beta), x, t)  # noqa: B023
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
    expected = gradients(lambda *v: THEIRS[WITH_JSD[0]](*v, labels), x, t)
    x[1], t[0, 3] = torch.nan, torch.inf
    got = gradients(lambda *v: given_to(WITH_JSD[0])(*v, labels), x, t)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
