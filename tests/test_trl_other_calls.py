"""Calls of TRL's losses that are TRL's also under the patch: the same bits, or the same error."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.trl_functions import (
    CLASSES,
    THEIRS,
    WITH_JSD,
    calls_of_ours,
    given_to,
    rows,
    some_labels,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    yield from calls_of_ours(monkeypatch)


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
    "class -1": ("log_prob", (X, torch.where(INDEX == 0, -1, INDEX).fill_diagonal_(-1)), {}),
    "k classes, one of them -1": ("log_prob", (X, torch.stack([INDEX, 0 * INDEX - 1], -1)), {}),
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
    """Probabilities, and a part of a distribution."""
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
    assert tried == len(WITH_JSD) - 1
    if "top_k" in known:
        all_of_it = {"top_k": CLASSES}
        got, expected = (f(X, T, LABELS, **all_of_it) for f in (given_to(name), THEIRS[name]))
        torch.testing.assert_close(got, expected)
        assert calls == ["js_div"]
