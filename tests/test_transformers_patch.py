"""Patches of Transformers: which models, how they end, and what is said of models we don't know."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.trainer import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from fastdiv._engine import backend
from fastdiv.integrations.transformers import apply
from fastdiv.integrations.transformers import forward as model_forward
from fastdiv.integrations.transformers.logits import DeferredLogits
from helpers.transformers_models import DECODER, KINDS, agree, step

pytestmark = pytest.mark.cpu_only("the models are made on the CPU")

THEIRS = [
    (LlamaForCausalLM, "forward"),
    (PreTrainedModel, "__init_subclass__"),
    (PreTrainedModel, "__call__"),
    (Trainer, "compute_loss"),
    (LabelSmoother, "__call__"),
]


@pytest.fixture(autouse=True)
def reversed_by_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    monkeypatch.setattr(model_forward, "_reported", set())
    before = [vars(owner).get(name) for owner, name in THEIRS]
    yield
    assert [vars(owner).get(name) for owner, name in THEIRS] == before


def is_deferred(model: nn.Module, **batch: Any) -> bool:
    return isinstance(model(**(batch or KINDS["llama"].batch())).logits, DeferredLogits)


def test_models_before_and_after() -> None:
    before = KINDS["llama"].make()
    patch = apply()
    after = KINDS["llama"].make()
    assert is_deferred(before) and is_deferred(after)
    patch.undo()
    patch.undo()
    assert not is_deferred(before) and not is_deferred(after)


def test_one_model() -> None:
    ours, another = KINDS["llama"].make(), KINDS["llama"].make()
    with apply(ours):
        assert is_deferred(ours) and not is_deferred(another)
    with apply(nn.Sequential(nn.Identity(), another)):  # wrapped
        assert is_deferred(another) and not is_deferred(ours)


def test_several_patches() -> None:
    """The last one that fits counts, and they end in any order."""
    model, another = KINDS["llama"].make(), KINDS["llama"].make()
    everything, held = apply(), apply(model, linear=False)
    assert not is_deferred(model) and is_deferred(another)
    everything.undo()
    assert not is_deferred(another)
    with apply():
        assert is_deferred(model)
        held.undo()
        with everything:
            assert is_deferred(model)
        assert is_deferred(model)
    assert not is_deferred(model)


def test_a_forward_of_the_instance() -> None:
    """As Accelerate puts it there, with the class's that it found."""
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    model.forward = model.forward
    with apply():
        assert is_deferred(model)
        assert isinstance(model(batch["input_ids"], labels=batch["labels"]).logits, DeferredLogits)


def test_labels_by_place_and_a_forward_that_is_called() -> None:
    model, batch = KINDS["bert"].make(), KINDS["bert"].batch()
    between = list(inspect.signature(model.forward).parameters).index("labels") - 1
    arguments = (batch["input_ids"], *[None] * between, batch["labels"])
    with apply():
        for call in (model, model.forward):
            assert isinstance(call(*arguments).logits, DeferredLogits)
            assert type(call(*arguments[:-1]).logits) is Tensor


def test_who_replaces_ours_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, patch = KINDS["llama"].make(), apply()
    ours = LlamaForCausalLM.forward

    def another(self: Any, **kwargs: Any) -> Any:
        return ours(self, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(LlamaForCausalLM, "forward", another)
        assert is_deferred(model)
        patch.undo()
        assert LlamaForCausalLM.forward is another
        assert not is_deferred(model)
    LlamaForCausalLM.forward = ours.__wrapped__


def test_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("4.56.2", "6.0.0", "4.5"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(RuntimeError, match=f"4.57 and 5 of Transformers, not {version}"):
            apply()
    for version in ("4.57.0", "5.0.0rc1", "5.99.0.dev0"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        apply().undo()


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_C", None)
    with pytest.raises(RuntimeError, match="would change nothing"):
        apply()


class OtherLinear(nn.Linear):
    """Some quantised layer, say."""


class OddForCausalLM(LlamaForCausalLM):
    """Does more with its logits than others."""

    how = ""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        if self.how == "softmax":
            logits = self.lm_head(hidden).softmax(-1)
        else:
            logits = hidden @ self.lm_head.weight.T
        return transformers.modeling_outputs.CausalLMOutput(
            self.loss_function(logits, labels, len(self.lm_head.weight)), logits
        )


@pytest.mark.parametrize(
    "how,message",
    [
        ("softmax", r"takes softmax\(\) of its logits"),
        ("matmul", "does not call its output layer"),
        ("other", "output layer is a .*OtherLinear, not a torch.nn.Linear"),
        ("hooked", "something replaced its output layer's forward"),
        ("sharded", "its output layer's weight is sharded"),
        ("none", r"get_output_embeddings\(\) is None"),
    ],
)
def test_an_unknown_head(how: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is left alone, with the same result, and a warning, once."""
    model, batch = OddForCausalLM(KINDS["llama"].make().config), KINDS["llama"].batch()
    monkeypatch.setattr(OddForCausalLM, "how", how)
    if how in ("other", "hooked", "sharded", "none"):
        model = KINDS["llama"].make()
    head = model.lm_head
    if how == "other":
        model.lm_head = OtherLinear(head.in_features, head.out_features, bias=False)
    elif how == "hooked":
        head.forward = MethodType(type(head).forward, head)
    elif how == "sharded":
        head.weight.ds_id = 0
    elif how == "none":
        monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    theirs = step(model, batch)
    with apply():
        with pytest.warns(UserWarning, match=message):
            ours = step(model, batch)
        agree(ours, theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(model, batch)
    if how in ("other", "hooked", "none"):
        with pytest.raises(ValueError, match=message):
            apply(model)


def test_other_tasks() -> None:
    """A classifier has no output layer of ours, and nothing is said about it."""
    config = transformers.LlamaConfig(**DECODER, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config)
    batch = {**KINDS["llama"].batch(), "labels": torch.tensor([0, 2])}
    with apply():
        assert not is_deferred(model, **batch)
        with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
            apply(model)


def test_no_model() -> None:
    for model in (nn.Linear(2, 2), "llama"):
        with pytest.raises(TypeError, match="must hold a model of Transformers"):
            apply(model)  # type: ignore[arg-type]


def test_an_error_in_the_forward() -> None:
    """Leaves nothing behind."""
    model = KINDS["llama"].make()
    with apply():
        with pytest.raises(IndexError):
            model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 5000]]))
        assert "forward" not in vars(model.lm_head)
        assert is_deferred(model)


def test_import() -> None:
    """Neither fastdiv nor the module imports Transformers."""
    code = "import sys, fastdiv.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
