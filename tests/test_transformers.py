"""Transformers on linear cross entropy, beside the library that was not patched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM

import fastdiv
from fastdiv.integrations.transformers import TransformersPatch, apply
from fastdiv.integrations.transformers import forward as model_forward
from fastdiv.integrations.transformers import logits as logits_module
from helpers.transformers_models import CLASSES, KINDS, WIDTH, Sizes, agree, step

pytestmark = pytest.mark.cpu_only("the models are made on the CPU")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Several would wait for each other longer than these models compute."""
    torch.set_num_threads(1)


@every_kind
def test_a_training_step(kind: Any) -> None:
    model, batch = kind.make(), kind.batch()
    theirs = step(model, batch)
    with apply(), Sizes() as sizes:
        ours = step(model, batch)
    agree(ours, theirs)
    # The gradient of the weight is the largest tensor there is: fewer classes than tokens' width.
    assert sizes.largest == CLASSES * WIDTH
    assert sizes.ours == {"fastdiv::_linear_forward"}
    agree(step(model, batch), theirs, 0)


@pytest.mark.parametrize("name", ["bert", "t5", "whisper"])
def test_double_precision(name: str) -> None:
    """Of models that do not take their logits to float32."""
    model, batch = KINDS[name].make().double(), KINDS[name].batch(torch.float64)
    theirs = step(model, batch)
    with apply():
        agree(step(model, batch), theirs, 1e-12)


def step_of_head(model: Any, batch: Any, hidden: Tensor | None) -> dict[str, Tensor]:
    """A step whose backward ends at the output layer's input, which may be given from outside."""
    found: list[Tensor] = []

    def cut(head: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        states = given[0] if hidden is None else hidden.to(given[0].dtype)
        found.append(states.detach().requires_grad_())
        return (found[0],)

    hook = model.get_output_embeddings().register_forward_pre_hook(cut)
    results = step(model, batch)
    hook.remove()
    assert len(found) == 1 and found[0].grad is not None
    return {"hidden states": found[0].grad, "input": found[0].detach(), **results}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
@pytest.mark.parametrize("products", [True, False], ids=["halves", "floats"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bert"])
def test_half_precision(
    name: str, products: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast, and all of it in bfloat16: no farther from the truth than theirs is.

    The truth is that of the same hidden states in float64, so that nothing of the model's body is
    compared.  Both round the logits, their gradient and what the products come to, ours nothing
    else: what is left to chance is far below the 5 percent.
    """
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: products)
    kind = KINDS[name]
    model, batch = kind.make().to(dtype), kind.batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        theirs = step_of_head(model, batch, None)
        with apply(), Sizes() as sizes:
            ours = step_of_head(model, batch, None)
    assert "fastdiv::_linear_backward" in sizes.ours
    hidden = theirs.pop("input")
    assert torch.equal(hidden, ours.pop("input"))
    truth = step_of_head(kind.make().bfloat16().double(), batch, hidden.bfloat16())
    assert ours.keys() == theirs.keys() == truth.keys() - {"input"}
    for of, expected in theirs.items():
        assert ours[of].dtype == expected.dtype, of
        error, allowed = ((v.double() - truth[of]).norm().item() for v in (ours[of], expected))
        if of == "loss":  # a mean of roundings, of which either may be the luckier
            allowed = 2**-8 * truth[of].item()
        assert error <= 1.05 * allowed, f"{of}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("count", [30, torch.tensor(30)], ids=type)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_items_in_batch(name: str, count: int | Tensor) -> None:
    model, batch = KINDS[name].make(), {**KINDS[name].batch(), "num_items_in_batch": count}
    theirs = step(model, batch)
    with apply():
        agree(step(model, batch), theirs)


def test_labels_shifted_by_the_caller_and_other_arguments() -> None:
    kind = KINDS["llama"]
    model, batch = kind.make(), kind.batch()
    labels = batch["labels"]
    shifted = F.pad(labels, (0, 1), value=7)[:, 1:].clamp(min=7)
    for extra in (
        {"shift_labels": shifted, "ignore_index": 7},
        {"logits_to_keep": 9, "labels": labels[:, -9:]},
        {"return_dict": False},
        {"labels": torch.full_like(labels, -100), "num_items_in_batch": 5},
    ):
        given = {**batch, **extra}
        by_place = (lambda out: out[0]) if "return_dict" in extra else None
        theirs = step(model, given, by_place)
        with apply(), Sizes() as sizes:
            agree(step(model, given, by_place), theirs)
        assert sizes.largest == CLASSES * WIDTH


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bart"])
def test_logits_of_a_training_step(name: str) -> None:
    """They are there, and have a gradient, if somebody looks."""
    model, batch = KINDS[name].make(), KINDS[name].batch()
    expected = model(**batch).logits

    def of_both(outputs: Any) -> Tensor:
        return outputs.loss + outputs.logits.log_softmax(-1).square().mean()

    theirs = step(model, batch, of_both)
    with apply():
        outputs = model(**batch)
        logits = outputs.logits
        assert isinstance(logits, Tensor) and logits.requires_grad
        assert (logits.shape, logits.dtype, logits.device) == (
            expected.shape,
            expected.dtype,
            expected.device,
        )
        assert len(logits) == len(expected) and logits.dim() == 3
        torch.testing.assert_close(logits.detach(), expected.detach())
        torch.testing.assert_close(outputs.logits[0, 3, 5:9].detach(), expected[0, 3, 5:9].detach())
        assert torch.equal(model(**batch).logits.argmax(-1), expected.argmax(-1))
        agree(step(model, batch, of_both), theirs)


def test_logits_handed_to_a_kernel() -> None:
    """C++ that no Python sees, and an autograd.Function, get them with their gradient."""
    model, batch = KINDS["gemma2"].make(), KINDS["gemma2"].batch()

    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return (x * x).sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    def kl(outputs: Any) -> Tensor:
        teacher = torch.zeros(outputs.logits.shape)
        return fastdiv.kl_div(outputs.logits, teacher, target_type="logits")

    for loss_of in (lambda out: Squares.apply(out.logits), kl):
        theirs = step(model, batch, loss_of)
        with apply():
            agree(step(model, batch, loss_of), theirs)


def test_logits_in_place() -> None:
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()

    def masked(outputs: Any) -> Tensor:
        logits = outputs.logits
        logits *= 3
        logits[..., 5] = 0
        return outputs.logits.exp().sum()

    theirs = step(model, batch, masked)
    with apply():
        agree(step(model, batch, masked), theirs)


def test_logits_after_the_weights_changed() -> None:
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with apply():
        seen, late = (model(**batch) for _ in range(2))
        expected = seen.logits.detach().clone()
        late.loss.backward()
        optimizer.step()
        assert torch.equal(seen.logits, expected)
        with pytest.raises(RuntimeError, match="weights have changed"):
            late.logits.argmax(-1)


def test_a_loss_of_ones_own() -> None:
    """Whoever takes the cross entropy: rows selected, flattened, summed or not."""
    model, batch = KINDS["gemma2"].make(), KINDS["gemma2"].batch()
    labels, kept = batch["labels"], batch["labels"] % 3 > 0

    def of_kept_rows(outputs: Any) -> Tensor:
        return F.cross_entropy(outputs.logits[kept], labels[kept], label_smoothing=0.2)

    def of_rows(outputs: Any) -> Tensor:
        weight = torch.linspace(0, 1, CLASSES)
        logits = outputs.logits[:, :-1].reshape(-1, CLASSES)
        losses = nn.CrossEntropyLoss(weight, reduction="none")(logits, labels[:, 1:].flatten())
        return (losses * torch.linspace(0, 1, len(losses))).sum()

    def of_classes_in_the_middle(outputs: Any) -> Tensor:
        return F.cross_entropy(outputs.logits.mT, labels)

    def of_some_classes(outputs: Any) -> Tensor:
        return F.cross_entropy(outputs.logits[0, :, :7], labels[1] % 7)

    for loss_of, linear in (
        (of_kept_rows, True),
        (of_rows, True),
        (of_classes_in_the_middle, False),
        (of_some_classes, False),
    ):
        theirs = step(model, batch, loss_of)
        with apply(), Sizes() as sizes:
            agree(step(model, batch, loss_of), theirs)
        assert (sizes.largest == CLASSES * WIDTH) == linear


@every_kind
def test_evaluation(kind: Any) -> None:
    """Logits as usual, and their loss from ours."""
    model, batch = kind.make().eval(), kind.batch()
    for grad, training in ((True, False), (False, False), (False, True)):
        model.train(training)
        with torch.set_grad_enabled(grad):
            theirs = model(**batch)
            with apply(), Sizes() as sizes:
                ours = model(**batch)
        assert type(ours) is type(theirs) and type(ours.logits) is type(ours.loss) is Tensor
        assert torch.equal(ours.logits, theirs.logits)
        torch.testing.assert_close(ours.loss, theirs.loss)
        assert sizes.ours and "fastdiv::_linear_forward" not in sizes.ours


def test_without_labels() -> None:
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    del batch["labels"]
    with apply():
        assert type(model(**batch).logits) is Tensor
        assert model.eval().generate(batch["input_ids"], max_new_tokens=2).shape == (2, 26)


@every_kind
def test_held_logits(kind: Any) -> None:
    """linear=False changes the loss only."""
    model, batch = kind.make(), kind.batch()
    theirs = step(model, batch)
    with apply(linear=False), Sizes() as sizes:
        agree(step(model, batch), theirs)
        assert type(model(**batch).logits) is Tensor
    assert "fastdiv::_linear_forward" not in sizes.ours and len(sizes.ours) == 2
    assert sizes.largest > CLASSES * WIDTH


def test_gradient_checkpointing() -> None:
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    theirs = step(model, batch)
    for reentrant in (True, False):
        enable = getattr(model, "activation_checkpointing_enable", None)  # of late
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        with apply(), Sizes() as sizes:
            agree(step(model, batch), theirs)
        assert sizes.largest == CLASSES * WIDTH


def test_compiled_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    theirs = model(**batch).loss
    monkeypatch.setattr(model_forward, "run", None)
    with apply():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch).loss, theirs)


def test_copies() -> None:
    """A copy that is made while a patch stands is a model of its own."""
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    theirs = step(model, batch)
    with apply(model):
        twin = copy.deepcopy(model)
        model.lm_head.weight.data.zero_()
        agree(step(twin, batch), theirs)


def test_a_class_that_comes_later() -> None:
    with apply(), Sizes() as sizes:

        class Later(LlamaForCausalLM):
            def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
                return super().forward(input_ids, labels=labels)

        model = Later(KINDS["llama"].make().config)
        model(*KINDS["llama"].batch().values()).loss.backward()
    assert sizes.ours == {"fastdiv::_linear_forward"}
    assert not hasattr(Later.forward, "__wrapped__")


def test_every_operation_is_one_of_torchs() -> None:
    """A name that torch does not have would never be met."""
    for name in {*logits_module.OPERATIONS, *logits_module.WITH_OPTIONS, *logits_module.METADATA}:
        assert hasattr(Tensor, name) or hasattr(torch, name) or hasattr(F, name), name


@pytest.mark.parametrize("products", [True, False], ids=["halves", "floats"])
@pytest.mark.parametrize("how", ["deferred", "held", "evaluated", "smoothed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_float32_logits(
    name: str, dtype: torch.dtype, how: str, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer in half precision, also scaled and capped; the loss is near that of float64."""
    monkeypatch.setattr("fastdiv._linear.tiles.multiplies", lambda half: products)
    kind = KINDS[name]
    model, batch = kind.make().to(dtype), kind.batch()
    model.train(how != "evaluated")
    found = []

    def note(_: nn.Module, given: tuple[Tensor]) -> None:
        found.append(given[0].detach())

    model.get_output_embeddings().register_forward_pre_hook(note)
    options = {"logits_dtype": torch.float32, "linear": how != "held"}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        with apply(**options):
            output = model(**batch)
            loss, logits = output.loss, output.logits
            if how == "smoothed":  # by a cross entropy of the user's
                loss = F.cross_entropy(
                    logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(),
                    label_smoothing=0.1,
                )  # fmt: skip
            assert logits.dtype == torch.float32
    exact = kind.make().bfloat16().double().eval()
    head = exact.get_output_embeddings()
    head.register_forward_pre_hook(lambda *_: (found[0].bfloat16().double(),))
    truth = exact(**batch)
    expected = truth.loss
    if how == "smoothed":
        x, y = truth.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        expected = F.cross_entropy(x, y, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits.double(), truth.logits.double(), rtol=1e-5, atol=1e-5)


def test_the_dtype_of_logits_is_checked() -> None:
    with pytest.raises(ValueError, match="logits_dtype must be None or torch.float32, got"):
        apply(logits_dtype=torch.float16)
    assert not TransformersPatch.standing
