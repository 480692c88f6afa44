"""What linear losses accept and refuse: torch's signature, modules, errors of arguments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastdiv
from helpers.linear_cases import make_case, named_gradients

H, W, Y = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, 2, 2])
OF_TORCH = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "input must be a Tensor", {"input": 1.0}),
        (TypeError, "linear_weight must be of dtype", {"linear_weight": W.long()}),
        (TypeError, "linear_weight must have the dtype of input", {"linear_weight": W.double()}),
        (TypeError, "linear_bias must have the dtype", {"linear_bias": torch.ones(7).half()}),
        (TypeError, "target must hold", {"target": Y.short()}),
        (ValueError, r"linear_weight must have shape \(classes, 3\)", {"linear_weight": W.t()}),
        (ValueError, "linear_weight must have shape", {"linear_weight": W[:0]}),
        (ValueError, r"linear_bias must have shape \(7,\)", {"linear_bias": torch.ones(3)}),
        (ValueError, r"target must have the shape of input without", {"target": Y[:3]}),
        (ValueError, r"shape of the logits, \(4, 7\), got \(4, 6\)", {"target": torch.rand(4, 6)}),
        (ValueError, r"weight must have shape \(7,\)", {"weight": torch.ones(3)}),
        (ValueError, "token_weight must have", {"token_weight": torch.ones(3)}),
        (ValueError, "reduction must be", {"reduction": "pointwise"}),
        (ValueError, "chunk_size must be a positive number", {"chunk_size": 0}),
        (ValueError, "chunk_size must be", {"linear_weight": W.unsqueeze(1), "chunk_size": 0}),
        (ValueError, "temperature must be", {"temperature": 0.0}),
        (ValueError, "label_smoothing must be", {"label_smoothing": 1.5}),
    ],
)
def test_cross_entropy_refuses(error: Any, words: str, changes: dict[str, Any]) -> None:
    arguments = {"input": H, "linear_weight": W, "target": Y, **changes}
    with pytest.raises(error, match=words):
        fastdiv.linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (ValueError, "target_type must be one of", {"target_type": None}),
        (ValueError, "needs a target_linear_weight", {"target_linear_bias": torch.ones(7)}),
        (ValueError, "target_type must be 'logits'", {"target_linear_weight": torch.ones(7, 7),
                                                      "target_type": "probs"}),
        (ValueError, "target_linear_weight must have", {"target_linear_weight": torch.ones(7, 2)}),
        (ValueError, "shape of the logits", {"target_linear_weight": torch.ones(6, 7)}),
        (TypeError, "target_linear_weight must have the dtype of target",
         {"target_linear_weight": torch.ones(7, 7).double()}),
    ],
)  # fmt: skip
def test_divergences_refuse(error: Any, words: str, changes: dict[str, Any]) -> None:
    arguments = {"target_type": "logits", **changes}
    for name in ("kl_div", "reverse_kl_div", "js_div"):
        with pytest.raises(error, match=words):
            getattr(fastdiv, f"linear_{name}")(H, W, torch.randn(4, 7), **arguments)


@pytest.mark.usefixtures("checked_labels")
def test_labels_out_of_range() -> None:
    """The row is that of the batch, not of a chunk, and nothing has been computed."""
    wrong = Y.clone()
    wrong[3] = 7
    with pytest.raises(IndexError, match=r"target\[3\] is 7, out of range for 7 classes"):
        fastdiv.linear_cross_entropy(H.requires_grad_(), W, wrong, chunk_size=1)
    with pytest.raises(IndexError, match=r"index\[3\] is 7"):
        fastdiv.linear_log_prob_and_entropy(H, W, wrong, chunk_size=1)


# --- torch's signature ----------------------------------------------------------------------------


@OF_TORCH
@pytest.mark.parametrize("chunks", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dimensions", [(), (2,), (2, 3)])
@pytest.mark.parametrize("soft", [False, True])
def test_calls_of_torch(
    chunks: int | None, reduction: str, dimensions: tuple[int, ...], soft: bool
) -> None:
    options = None
    if chunks and not dimensions and not soft:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    w, b = torch.randn(7, *dimensions, 3), torch.randn(7, *dimensions)
    target = torch.randint(7, (4, *dimensions))
    if soft:
        target = torch.rand(4, 7, *dimensions).softmax(1)
    arguments = {
        "linear_bias": b,
        "weight": torch.rand(7),
        "reduction": reduction,
        "ignore_index": None if soft else 2,
        "options": options,
    }
    expected = F.linear_cross_entropy(H, w, target, **arguments)
    got = fastdiv.linear_cross_entropy(H, w, target, **arguments)
    torch.testing.assert_close(got, expected)


def test_one_row() -> None:
    expected = F.cross_entropy(F.linear(H[0], W), Y[0])
    torch.testing.assert_close(fastdiv.linear_cross_entropy(H[0], W, Y[0]), expected)


# --- modules --------------------------------------------------------------------------------------


@OF_TORCH
def test_module_is_torchs() -> None:
    """The same constructor, parameters and value; a state dict fits both."""
    for options in ({}, {"bias": True, "out_features": (2,), "label_smoothing": 0.1}):
        theirs = torch.nn.LinearCrossEntropyLoss(3, 7, weight=torch.rand(7), **options)
        ours = fastdiv.nn.LinearCrossEntropyLoss(3, 7, weight=torch.ones(7), **options)
        ours.load_state_dict(theirs.state_dict())
        target = torch.randint(7, (4, *options.get("out_features", ())))
        torch.testing.assert_close(ours(H, target), theirs(H, target))


@pytest.mark.parametrize("name", ["KLDiv", "ReverseKLDiv", "JSDiv"])
def test_modules_of_divergences(name: str) -> None:
    function = {"KLDiv": "kl_div", "ReverseKLDiv": "reverse_kl_div", "JSDiv": "js_div"}[name]
    case = make_case(function, target="hidden", temperature=2.0)
    kind = getattr(fastdiv.nn, f"Linear{name}Loss")
    module = kind(8, 300, bias=True, temperature=2.0, scale_by_temperature=True)
    module.linear.weight.data = case.leaves["linear_weight"]
    module.linear.bias.data = case.leaves["linear_bias"]
    teacher = {k: v for k, v in case.leaves.items() if k.startswith("target_")}
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        got = m(case.leaves["input"], case.leaves["target"], **teacher)
        torch.testing.assert_close(got, 4 * case.call())
    assert "temperature=2.0" in repr(module)
    with pytest.raises(TypeError, match="no options"):
        kind(3, 7, label_smoothing=0.1)
    for name in ("input", "linear_bias", "token_weight", "target_linear_weight"):
        with pytest.raises(TypeError, match=f"no options .*{name}"):
            kind(3, 7, **{name: None})  # which are given in the call, or are the layer's


def test_module_of_a_policy_and_a_tied_weight() -> None:
    embedding = torch.nn.Embedding(7, 3)
    module = fastdiv.nn.LinearLogProbAndEntropy(3, 7)
    module.linear.weight = embedding.weight
    log_prob, entropy = module(H, Y)
    expected = fastdiv.log_prob_and_entropy(F.linear(H, embedding.weight), Y)
    torch.testing.assert_close((log_prob, entropy), expected)
    (log_prob.sum() + entropy.sum()).backward()
    assert embedding.weight.grad is not None


# --- other backends -------------------------------------------------------------------------------


def test_reference_backend() -> None:
    """The loss of whole logits, by the reference."""
    case = make_case("kl_div", target="hidden")
    expected = named_gradients(case.call, case.leaves)
    with fastdiv.backend("reference"):
        got = named_gradients(case.call, case.leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_meta_tensors() -> None:
    value = fastdiv.linear_cross_entropy(
        torch.empty(4, 3, device="meta"), torch.empty(7, 3, device="meta"), Y.to("meta")
    )
    assert value.shape == () and value.is_meta
