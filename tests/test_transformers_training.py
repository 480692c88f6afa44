"""Trainer, PEFT and wrappers of Transformers on linear cross entropy."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

from fastdiv.integrations.transformers import apply, formula
from fastdiv.integrations.transformers import logits as logits_module
from helpers.selection import nightly_but
from helpers.transformers_models import CLASSES, KINDS, WIDTH, Sizes, agree, step

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.cpu_only("the models are made on the CPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # Transformers' and PEFT's of each other
]


def train(path: Path, name: str, compute_loss: Any = None, **options: Any) -> dict[str, Tensor]:
    """What two steps of the Trainer, of two batches each, make of a model, and an evaluation."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    kind = KINDS[name]
    model, batch = kind.make(), kind.batch()
    if not kind.shifts and kind.name != "BertForMaskedLM":  # the Trainer may take the labels away
        batch["decoder_input_ids"] = batch["labels"].clamp(min=1)
    rows = [{k: v[i % 2].roll(i, -1) for k, v in batch.items()} for i in range(8)]
    for i, row in enumerate(rows):  # so that no two batches count as many tokens
        row["labels"][: 2 * i] = -100
    arguments = TrainingArguments(
        str(path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model, arguments, default_data_collator, rows, rows, compute_loss_func=compute_loss
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    predicted = trainer.predict(rows[:3])
    logits = predicted.predictions
    return {
        "loss": torch.tensor([*losses, predicted.metrics["test_loss"]]),
        "logits": torch.as_tensor(logits[0] if isinstance(logits, tuple) else logits),
        **{k: v.detach() for k, v in model.named_parameters()},
    }


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of linear cross entropies; nobody may look at logits meanwhile."""
    found: list[Tensor] = []

    def spy(*args: Any, **options: Any) -> Tensor:
        found.append(linear_cross_entropy(*args, **options))
        return found[-1]

    linear_cross_entropy = formula.linear_cross_entropy
    monkeypatch.setattr(formula, "linear_cross_entropy", spy)
    monkeypatch.delattr(logits_module.DeferredLogits, "held")
    return found


@pytest.mark.parametrize(
    ("name", "smoothing"),
    nightly_but(
        [("llama", 0.2), ("t5", 0.0), ("bert", 0.0)],  # whose labels are shifted in three ways
        product(["llama", "gemma2", "t5", "bert", "whisper"], [0.0, 0.2]),
    ),
)
def test_trainer(name: str, smoothing: float, tmp_path: Path, losses: list[Tensor]) -> None:
    pytest.importorskip("accelerate")
    results = [train(tmp_path, name, label_smoothing_factor=smoothing)]
    for linear in (True, False):
        with apply(linear=linear):
            results.append(train(tmp_path, name, label_smoothing_factor=smoothing))
        assert len(losses) == 4  # of the first of the two
    theirs, *ours = results
    for result in ours:
        agree(result, theirs, 5e-5)


def test_trainer_with_mixed_precision(tmp_path: Path, losses: list[Tensor]) -> None:
    """Accelerate wraps the forward, and takes its outputs to float32."""
    pytest.importorskip("accelerate")
    theirs = train(tmp_path, "llama", bf16=True)
    with apply():
        ours = train(tmp_path, "llama", bf16=True)
    assert len(losses) == 4
    agree(ours, theirs, 0.02)


def test_a_loss_for_the_trainer(tmp_path: Path, losses: list[Tensor]) -> None:
    """It gets logits as usual, since the model gets no labels."""
    pytest.importorskip("accelerate")

    def squares(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        assert type(outputs.logits) is Tensor
        return outputs.logits.square().mean()

    theirs = train(tmp_path, "llama", squares)
    with apply():
        agree(train(tmp_path, "llama", squares), theirs, 1e-6)
    assert not losses


ADAPTERS = {
    "a layer of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "lora with bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "lora with dropout": {"target_modules": ["lm_head"], "lora_dropout": 0.5},
    "other layers": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_peft(name: str, adapter: dict[str, Any], dtype: torch.dtype) -> None:
    """Its layers at the output: a second head, or a product of low rank that is added."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **adapter)
    model = peft.get_peft_model(KINDS[name].make(tie_word_embeddings=False).to(dtype), config)
    batch = KINDS[name].batch()

    def seeded() -> dict[str, Tensor]:
        torch.manual_seed(2)
        return step(model, batch)

    theirs = seeded()
    for patch in (apply(), apply(model)):
        with patch, Sizes() as sizes:
            agree(seeded(), theirs, 5e-6 if dtype is torch.float32 else 0.05)
        assert "fastdiv::_linear_forward" in sizes.ours
        assert sizes.largest <= CLASSES * (WIDTH + 4)
    with apply(), model.disable_adapter():
        assert isinstance(model(**batch).logits, logits_module.DeferredLogits)


def test_an_adapter_that_needs_the_logits() -> None:
    """DoRA rescales them by class."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, use_dora=True, target_modules=["lm_head"]
    )
    model, batch = peft.get_peft_model(KINDS["llama"].make(), config), KINDS["llama"].batch()
    theirs = step(model, batch)
    with apply(), pytest.warns(UserWarning, match="of its logits"):
        agree(step(model, batch), theirs, 5e-6)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel(options: dict[str, bool], gloo: None) -> None:
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    theirs = {k if k == "loss" else f"module.{k}": v for k, v in step(model, batch).items()}
    parallel = DistributedDataParallel(model, **options)
    for patch in (apply(), apply(parallel)):
        with patch, Sizes() as sizes:
            agree(step(parallel, batch), theirs)
        assert "fastdiv::_linear_forward" in sizes.ours


@pytest.mark.parametrize("whole", [True, False])
def test_fully_sharded_weights(whole: bool, gloo: None) -> None:
    """Of the whole model they are there while it runs, of a layer while that does."""
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    theirs = step(model, batch)
    if not whole:
        fully_shard(model.lm_head)
    fully_shard(model)
    trouble = nullcontext() if whole else pytest.warns(UserWarning, match="is a .*FSDPLinear")
    with apply(), Sizes() as sizes, trouble:
        ours = step(model, batch)
    agree({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in ours.items()}, theirs)
    assert ("fastdiv::_linear_forward" in sizes.ours) == whole


def test_accelerate() -> None:
    """A model that was prepared before, and so has a forward of its own."""
    accelerate = pytest.importorskip("accelerate")
    batch = KINDS["llama"].batch()
    accelerate.state.AcceleratorState._reset_state(True)  # that of the Trainers above
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(KINDS["llama"].make())
    accelerate.state.AcceleratorState._reset_state(True)
    theirs = step(model, batch)
    with apply(), Sizes() as sizes:
        agree(step(model, batch), theirs, 0.02)
        assert model(**batch).logits.dtype is torch.float32
    assert sizes.largest == CLASSES * WIDTH


def test_data_parallel_replicas() -> None:
    """Which gather their outputs, so that logits are held."""
    model, batch = KINDS["llama"].make(), KINDS["llama"].batch()
    model._is_replica = True
    with apply():
        assert type(model(**batch).logits) is Tensor


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_encoder_decoder_of_two_models() -> None:
    """Whose logits are the output of the decoder, a model itself."""
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    parts = [BertConfig(**KINDS["bert"].options) for _ in range(2)]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model, batch = EncoderDecoderModel(config), KINDS["bert"].batch()
    theirs = step(model, batch)
    with apply(), Sizes() as sizes:
        agree(step(model, batch), theirs)
    assert "fastdiv::_linear_forward" in sizes.ours
