"""Docstrings of public functions and modules describe every argument, in the same words everywhere.

An editor shows one docstring at a time, so each describes all of its arguments.
"""

from __future__ import annotations

import doctest
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import fastdiv
import fastdiv.distributed
from fastdiv.nn import base, linear_divergence
from fastdiv.reference import choices, topk

pytestmark = pytest.mark.cpu_only("docstrings")

PLACES = (fastdiv, fastdiv.nn, fastdiv.stats, fastdiv.distributed)
CALLABLES: dict[str, Callable[..., Any]] = {
    f"{place.__name__}.{name}": getattr(place, name)
    for place in PLACES
    for name in place.__all__
    if callable(getattr(place, name)) and name != "Stats"
}
MODULES = [path for path, value in CALLABLES.items() if inspect.isclass(value)]
EVERY_CALLABLE = pytest.mark.parametrize("path", CALLABLES)

SECTIONS = ("Args", "Shape", "Returns", "Raises", "Example", "Source")
MISSING_SECTIONS = {
    "fastdiv.backend": {"Source"},
    "fastdiv.build_info": {"Args", "Raises", "Source"},
    "fastdiv.patch_torch": {"Args", "Source"},
    "fastdiv.warm_gradients": {"Args", "Raises", "Source"},
}

# Functions whose text of an argument differs from that of the others of their family.
OWN_TEXTS = {
    ("fastdiv", "target"): {"cross_entropy"},
    ("fastdiv", "dim"): {"cross_entropy"},
    ("fastdiv", "missing"): {"topk_kl_div"},
    ("fastdiv", "reduction"): {
        "cross_entropy",
        "entropy",
        "renyi_div",
        "topk_js_div",
        "topk_kl_div",
        "topk_reverse_kl_div",
    },
    ("fastdiv", "temperature"): {
        "cross_entropy",
        "entropy",
        "log_prob",
        "log_prob_and_entropy",
        "topk_js_div",
        "topk_kl_div",
        "topk_reverse_kl_div",
    },
    ("fastdiv", "token_weight"): {"cross_entropy"},
    ("fastdiv", "index"): {"log_prob"},
    ("fastdiv", "class_mask"): {"topk_js_div", "topk_kl_div", "topk_reverse_kl_div"},
    ("fastdiv", "alpha"): {"renyi_div"},
    ("fastdiv, linear", "target"): {"linear_cross_entropy"},
    ("fastdiv, linear", "reduction"): {"linear_cross_entropy"},
    ("fastdiv, linear", "temperature"): {
        "linear_cross_entropy",
        "linear_log_prob",
        "linear_log_prob_and_entropy",
        "linear_topk_kl_div",
        "linear_topk_reverse_kl_div",
    },
    ("fastdiv, linear", "token_weight"): {"linear_cross_entropy"},
    ("fastdiv, linear", "class_mask"): {"linear_topk_kl_div", "linear_topk_reverse_kl_div"},
    ("fastdiv, linear", "index"): {"linear_log_prob"},
    ("fastdiv, linear", "missing"): {"linear_topk_kl_div"},
    ("fastdiv.nn", "dim"): {"CrossEntropyLoss"},
    ("fastdiv.nn", "smoothing"): {"LabelSmoothingLoss"},
    ("fastdiv.nn", "reduction"): {
        "CrossEntropyLoss",
        "DistillationLoss",
        "EntropyLoss",
        "RenyiDivLoss",
        "TopKJSDivLoss",
        "TopKKLDivLoss",
        "TopKReverseKLDivLoss",
    },
    ("fastdiv.nn", "temperature"): {
        "CrossEntropyLoss",
        "DistillationLoss",
        "EntropyLoss",
        "TopKJSDivLoss",
        "TopKKLDivLoss",
        "TopKReverseKLDivLoss",
    },
    ("fastdiv.nn", "missing"): {"TopKKLDivLoss"},
    ("fastdiv.nn", "scale_by_temperature"): {"DistillationLoss"},
    ("fastdiv.nn", "alpha"): {"DistillationLoss", "RenyiDivLoss"},
    ("fastdiv.nn, linear", "reduction"): {"LinearCrossEntropyLoss"},
    ("fastdiv.nn, linear", "temperature"): {
        "LinearCrossEntropyLoss",
        "LinearLogProb",
        "LinearLogProbAndEntropy",
        "LinearTopKKLDivLoss",
        "LinearTopKReverseKLDivLoss",
    },
    ("fastdiv.nn, linear", "missing"): {"LinearTopKKLDivLoss"},
    ("fastdiv.stats", "qk"): {"entropy"},
    ("fastdiv.distributed", "target"): {"cross_entropy"},
    ("fastdiv.distributed", "dim"): {"cross_entropy"},
    ("fastdiv.distributed", "reduction"): {"cross_entropy", "entropy"},
    ("fastdiv.distributed", "temperature"): {
        "cross_entropy",
        "entropy",
        "log_prob",
        "log_prob_and_entropy",
    },
    ("fastdiv.distributed", "group"): {"token_mean"},
    ("fastdiv.distributed, linear", "target"): {"linear_cross_entropy"},
    ("fastdiv.distributed, linear", "reduction"): {"linear_cross_entropy"},
    ("fastdiv.distributed, linear", "temperature"): {"linear_cross_entropy"},
}


@cache
def sections(path: str) -> dict[str, str]:
    """The text below each heading."""
    parts = re.split(
        rf"^({'|'.join(SECTIONS)}):", inspect.getdoc(CALLABLES[path]) or "", flags=re.M
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def described(path: str) -> dict[str, str]:
    """The arguments of the section ``Args`` with their texts, in order."""
    parts = re.split(r"^    (\w+): ", sections(path).get("Args", ""), flags=re.M)
    return {
        name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def parameters(path: str) -> list[str]:
    """The parameters of the signature; a module of a linear loss passes some on to its function."""
    value = CALLABLES[path]
    signature = inspect.signature(value).parameters
    names = [n for n, p in signature.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(names) == len(signature):
        return names
    of_call = {*inspect.signature(value.forward).parameters, "linear_weight", "linear_bias"}
    passed_on = inspect.signature(value.function).parameters.keys() - of_call - {*names}
    return names + [n for n in inspect.signature(value.function).parameters if n in passed_on]


def functions(path: str) -> list[Callable[..., Any]]:
    """The functions of Python that a user calls."""
    value = CALLABLES[path]
    return [value.__init__, value.forward] if inspect.isclass(value) else [value]


def words(hint: Any) -> Iterator[str]:
    """The strings that an annotation allows."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from words(part)


@EVERY_CALLABLE
def test_every_argument_is_described(path: str) -> None:
    assert list(described(path)) == parameters(path)


@EVERY_CALLABLE
def test_sections(path: str) -> None:
    wanted = {"Returns", "Raises"} if path not in MODULES else {"Shape"}
    wanted |= {"Args", "Example", "Source"}
    assert wanted - sections(path).keys() == MISSING_SECTIONS.get(path, set())


@EVERY_CALLABLE
def test_example(path: str) -> None:
    examples = doctest.DocTestParser().get_examples(sections(path)["Example"])
    assert any(example.want for example in examples)
    assert any(f"{path}(" in example.source for example in examples)


@pytest.mark.parametrize("path", MODULES)
def test_every_tensor_of_a_module_is_described(path: str) -> None:
    """The class describes the arguments of a call, since an editor does not show ``forward``."""
    shape = re.findall(r"^    \* (.*?): ", sections(path)["Shape"], flags=re.M)
    names = re.findall(r"\w+", " ".join(shape))
    assert names == [*inspect.signature(CALLABLES[path].forward).parameters][1:] + ["Result"]


def test_an_argument_has_one_text_in_a_family() -> None:
    texts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for path in CALLABLES:
        place, _, name = path.rpartition(".")
        family = place + ", linear" * name.lower().startswith("linear")
        for argument, text in described(path).items():
            texts[family, argument][name] = text
    for key, of_functions in texts.items():
        own = OWN_TEXTS.get(key, set())
        assert own <= of_functions.keys(), key
        common = {text for name, text in of_functions.items() if name not in own}
        assert len(common) == 1, (key, of_functions)
        assert common.isdisjoint(of_functions[name] for name in own), key
    assert OWN_TEXTS.keys() <= texts.keys()


@EVERY_CALLABLE
def test_words(path: str) -> None:
    """An argument that is a word has a ``Literal`` type, and the text lists the words."""
    texts = described(path)
    for function in functions(path):
        for name, hint in get_type_hints(function).items():
            assert hint is not str, name
            for word in words(hint):
                if name in texts:
                    assert f'``"{word}"``' in texts[name], (name, word)


def test_lists_of_words() -> None:
    assert tuple(base.FUNCTIONS) == get_args(choices.Divergence)
    assert {topk.rest_of(word, "probs") for word in get_args(choices.KLMissing)} == set(topk.NAMED)


@pytest.mark.parametrize("path", [p for p in MODULES if ".Linear" in p])
def test_options_of_linear_modules(path: str) -> None:
    """The types of the options that a constructor passes on are those of its function."""
    kind: Any = CALLABLES[path]
    hint = get_type_hints(kind.__init__).get("options", Any)
    if hint is Any:
        return
    (options,) = get_args(hint)
    hints, of_function = get_type_hints(options), get_type_hints(kind.function)
    own = inspect.signature(kind).parameters.values()
    known = {*parameters(path)} - {p.name for p in own if p.kind is not p.VAR_KEYWORD}
    extra = (
        {"beta"} if options is linear_divergence.DivergenceOptions else set()
    )  # one of the classes has it
    assert hints.keys() - extra == known - extra
    assert {name: hints[name] for name in known} == {name: of_function[name] for name in known}
