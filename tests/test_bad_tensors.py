"""Tensors that are not dense numbers: every function names the argument, and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
import fastdiv.distributed as sharded

pytestmark = pytest.mark.usefixtures("backend", "gloo")

X, T, Y = torch.randn(4, 5), torch.randn(4, 5).softmax(-1), torch.tensor([0, 1, 2, 4])
H, W, B, V = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5), torch.rand(4)

# Functions by the arguments that are tensors, with what they may be.
Arguments = dict[str, Tensor]
LOGITS: Arguments = {"input": X, "token_weight": V}
DIVERGENCE: Arguments = {**LOGITS, "target": T}
LABELLED: Arguments = {**LOGITS, "target": Y, "weight": B.exp()}
SOFT: Arguments = {**LABELLED, "target": T}
LAYER: Arguments = {"input": H, "linear_weight": W, "linear_bias": B, "token_weight": V}
TEACHER: Arguments = {"target": H, "target_linear_weight": W, "target_linear_bias": B}
TOPK: Arguments = {**LOGITS, "values": T[:, :2], "indices": torch.tensor([[0, 1]] * 4)}
SHARED: Arguments = {"class_mask": X > -3, "temperature": V + 0.5}
PAIR: Arguments = {"pk": T, "qk": T.flip(0)}
PROBS = {"target_type": "probs"}

PROGRAMS: dict[str, tuple[Callable[..., Any], Arguments]] = {}
for name in ("kl_div", "reverse_kl_div", "js_div", "skew_kl_div", "alpha_div", "renyi_div",
             "tv_distance", "hellinger_distance"):  # fmt: skip
    for place in (fastdiv, sharded) if name in sharded.__all__ else (fastdiv,):
        options = {**PROBS, **({"alpha": 0.5} if name in ("alpha_div", "renyi_div") else {})}
        PROGRAMS[f"{place.__name__}.{name}"] = partial(getattr(place, name), **options), DIVERGENCE
for place in (fastdiv, sharded):
    PROGRAMS |= {
        f"{place.__name__}.cross_entropy": (place.cross_entropy, LABELLED),
        f"{place.__name__}.cross_entropy of probabilities": (place.cross_entropy, SOFT),
        f"{place.__name__}.entropy": (place.entropy, {"input": X}),
        f"{place.__name__}.log_prob": (place.log_prob, {"input": X, "index": Y}),
        f"{place.__name__}.log_prob_and_entropy": (
            place.log_prob_and_entropy,
            {"input": X, "index": Y},
        ),
        f"{place.__name__}.linear_cross_entropy": (
            place.linear_cross_entropy,
            {**LAYER, "target": Y, "weight": B.exp()},
        ),
        f"{place.__name__}.linear_kl_div": (
            partial(place.linear_kl_div, **PROBS),
            {**LAYER, "target": T},
        ),
        f"{place.__name__}.linear_kl_div of a layer": (
            place.linear_kl_div,
            {**LAYER, **TEACHER},
        ),
    }
for name in ("linear_reverse_kl_div", "linear_js_div"):
    PROGRAMS[f"fastdiv.{name}"] = (getattr(fastdiv, name), {**LAYER, **TEACHER})
PROGRAMS |= {
    "fastdiv.linear_log_prob_and_entropy": (
        fastdiv.linear_log_prob_and_entropy,
        {"input": H, "linear_weight": W, "linear_bias": B, "index": Y},
    ),
    "fastdiv.linear_log_prob": (
        fastdiv.linear_log_prob,
        {"input": H, "linear_weight": W, "linear_bias": B, "index": Y, **SHARED},
    ),
    **{
        f"fastdiv.{name} of all options": (getattr(fastdiv, name), {**LAYER, **TEACHER, **SHARED})
        for name in ("linear_kl_div", "linear_reverse_kl_div", "linear_js_div")
    },
    "fastdiv.linear_cross_entropy of all options": (
        fastdiv.linear_cross_entropy,
        {**LAYER, "target": Y, **SHARED},
    ),
    **{
        f"fastdiv.{name}": (
            partial(getattr(fastdiv, name), values_type="probs"),
            {**LAYER, "values": TOPK["values"], "indices": TOPK["indices"], **SHARED},
        )
        for name in ("linear_topk_kl_div", "linear_topk_reverse_kl_div")
    },
    **{
        f"fastdiv.{name}": (partial(getattr(fastdiv, name), values_type="probs"), TOPK)
        for name in ("topk_kl_div", "topk_reverse_kl_div", "topk_js_div")
    },
    "nn.LabelSmoothingLoss": (
        lambda x, target: fastdiv.nn.LabelSmoothingLoss(5, -1, 0.1)(x, target),
        {"x": X[None], "target": Y[None]},
    ),
    "nn.DistillationLoss": (
        fastdiv.nn.DistillationLoss(target_type="probs"),
        {**DIVERGENCE, "labels": Y},
    ),
    **{
        f"stats.{name}": (getattr(fastdiv.stats, name), {"p": T, "q": T} if name[0] == "j" and
                          name != "js_div" else PAIR)
        for name in ("entropy", "kl_div", "js_div", "cross_entropy", "jensenshannon")
    },
    "stats.information_content": (fastdiv.stats.information_content, {"pk": T}),
}  # fmt: skip
NAMES = [(name, argument) for name, (_, given) in PROGRAMS.items() for argument in given]


def test_every_function_is_looked_at() -> None:
    functions = {f"fastdiv.{n}" for n in fastdiv.__all__ if n.endswith(("div", "distance"))}
    functions |= {f"fastdiv.{n}" for n in fastdiv.__all__ if "entropy" in n or "log_prob" in n}
    functions |= {f"stats.{n}" for n in fastdiv.stats.__all__}
    functions |= {f"fastdiv.distributed.{n}" for n in sharded.__all__ if n != "token_mean"}
    assert functions <= PROGRAMS.keys()


def of_a_kind(v: Tensor) -> dict[str, tuple[Tensor, str]]:
    """Tensors of other layouts, and what the error must say of each."""
    with warnings.catch_warnings():  # of what is a prototype, in beta or to go
        warnings.simplefilter("ignore")
        rows = [v.flatten(), v.flatten()[:3]]
        kinds = {
            "sparse": (v.to_sparse(), "sparse_coo.*to_dense"),
            "nested": (torch.nested.nested_tensor(rows), "nested.*to_padded_tensor"),
            "jagged": (torch.nested.nested_tensor(rows, layout=torch.jagged), "nested.*jagged"),
        }
        if v.dim() == 2:
            kinds["CSR"] = (v.to_sparse_csr(), "sparse_csr.*to_dense")
        if v.dtype is torch.float32:
            kinds["mkldnn"] = (v.to_mkldnn(), "mkldnn.*to_dense")
            quantized = torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)
            kinds["quantized"] = (quantized, "quantized, got torch.qint8.*dequantize")
    return kinds


@pytest.mark.cpu_only("layouts that other devices do not have")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(("name", "argument"), NAMES)
def test_layout_is_refused(name: str, argument: str) -> None:
    function, given = PROGRAMS[name]
    function(**given)
    for kind, (v, says) in of_a_kind(given[argument]).items():
        with pytest.raises(TypeError, match=f"{argument} must.*{says}"):
            function(**{**given, argument: v})
            pytest.fail(kind)


@pytest.mark.parametrize("name", PROGRAMS)
def test_meta_tensors(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and dtypes without values, for who wants to know the memory of a step."""
    function, given = PROGRAMS[name]
    if backend == "native":  # demanded, and there is no kernel
        return
    expected = function(**given)
    monkeypatch.setenv("FASTDIV_CHECK", "1")  # which reads the values that there are
    got = function(**{k: v.to("meta") for k, v in given.items()})
    both = [v if isinstance(v, tuple) else (v,) for v in (got, expected)]
    for a, b in zip(*both, strict=True):
        assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype
