"""Tiny models of Transformers, with what a training step gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Pytest imports this file for its doctests, also where the library is missing.
transformers = pytest.importorskip("transformers")

CLASSES, WIDTH, BATCH, LENGTH = 997, 32, 2, 24

DECODER = {
    "vocab_size": CLASSES,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER_DECODER = {
    "vocab_size": CLASSES,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": CLASSES,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
BERT = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}


@dataclass(frozen=True)
class Kind:
    """A class of models, and the options of its configuration."""

    name: str
    options: dict[str, Any]
    speech: bool = False

    @property
    def shifts(self) -> bool:
        return self.name.endswith(("CausalLM", "LMHeadModel"))

    def make(self, **options: Any) -> Any:
        torch.manual_seed(0)
        cls = getattr(transformers, self.name)
        model = cls(cls.config_class(**{**self.options, **options}))
        with torch.no_grad():  # biases begin at 0, and would not be missed
            for name, v in [*model.named_parameters(), *model.named_buffers()]:
                if "bias" in name and v.is_floating_point():
                    v.normal_()
        return model.train()

    def batch(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Labels with padding in front."""
        torch.manual_seed(1)
        tokens = torch.randint(3, CLASSES, (BATCH, LENGTH))
        labels = tokens.clone()
        labels[0, :5] = -100
        if self.speech:
            return {"input_features": torch.randn(BATCH, 8, 32).to(dtype), "labels": labels}
        return {"input_ids": tokens, "labels": labels}


KINDS = {
    "llama": Kind("LlamaForCausalLM", DECODER),
    "llama, tied": Kind("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "qwen2": Kind("Qwen2ForCausalLM", DECODER),
    "qwen3": Kind("Qwen3ForCausalLM", DECODER),
    "gemma2": Kind("Gemma2ForCausalLM", {**DECODER, "final_logit_softcapping": 0.5}),
    "granite": Kind("GraniteForCausalLM", {**DECODER, "logits_scaling": 7.0}),
    "cohere": Kind("CohereForCausalLM", {**DECODER, "logit_scale": 0.3}),
    "gpt2": Kind(
        "GPT2LMHeadModel",
        {"vocab_size": CLASSES, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    ),
    "t5": Kind("T5ForConditionalGeneration", T5),
    "t5, untied": Kind(
        "T5ForConditionalGeneration",
        {**T5, "tie_word_embeddings": False},
    ),
    "bart": Kind("BartForConditionalGeneration", ENCODER_DECODER),
    "bert": Kind(
        "BertForMaskedLM",
        {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "whisper": Kind(
        "WhisperForConditionalGeneration",
        {
            **ENCODER_DECODER,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
        },
        speech=True,
    ),
}


def step(
    model: nn.Module, batch: dict[str, Any], loss_of: Callable[[Any], Tensor] | None = None
) -> dict[str, Tensor]:
    """The loss of a training step, or what is made of its outputs, and every gradient."""
    model.zero_grad()
    outputs = model(**batch)
    loss = outputs.loss if loss_of is None else loss_of(outputs)
    loss.backward()
    gradients = {k: v.grad.clone() for k, v in model.named_parameters() if v.grad is not None}
    return {"loss": loss.detach(), **gradients}


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], precision: float = 2e-6) -> None:
    """Loss and gradients, each beside its largest entry, or a hundredth of the largest of all."""
    assert ours.keys() == theirs.keys() and len(ours) > 1
    largest = {name: v.abs().max().item() for name, v in theirs.items()}
    least = max(v for name, v in largest.items() if name != "loss") / 100
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max().item()
        assert ours[name].dtype == expected.dtype, name
        assert error <= precision * max(largest[name], least), (name, error, largest[name])


class Sizes(TorchDispatchMode):
    """The most float32 numbers in memory that an operation returned, and which of them are ours."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.ours = 0, set[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        tensors = [
            v for v in (out if isinstance(out, (list, tuple)) else [out]) if type(v) is Tensor
        ]
        self.largest = max([self.largest, *(v.untyped_storage().nbytes() // 4 for v in tensors)])
        if op.namespace == "fastdiv":
            self.ours.add(op.name())
        return out
