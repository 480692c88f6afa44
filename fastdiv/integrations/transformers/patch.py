"""Training of Hugging Face Transformers on our losses."""

from __future__ import annotations

import threading
import weakref

from torch import nn

from ..handle import require_kernels
from . import library
from .forward import output_layers

_lock = threading.RLock()


def apply(model: nn.Module | None = None, linear: bool = True) -> TransformersPatch:
    """Has Hugging Face Transformers train language models on :func:`fastdiv.linear_cross_entropy`.

    From now on, or inside a ``with`` block, a training step of a causal, masked or
    sequence-to-sequence language model that is given labels never holds its logits.  The model's
    own code runs as it is, and with it all that it does to logits and labels: scaling, capping,
    shifting, ``num_items_in_batch``, tied weights, LoRA.  Its output layer hands out logits that
    are not computed yet; their cross entropy, whoever asks for it, is ours.  The Trainer's label
    smoothing asks for it, too.

    ``outputs.logits`` of such a step compute themselves when they are used, with their gradient;
    once an optimizer has changed the weights they raise ``RuntimeError`` instead.  Without labels,
    in ``model.eval()`` and under ``torch.no_grad()`` logits are returned as usual, and a loss is
    :func:`fastdiv.cross_entropy` of them.

    A model that does more with its logits, or whose output layer we do not know, trains as before,
    and a warning says so, once for each class.  So do, without a warning, models inside
    ``torch.compile``, ``torch.export`` or ``torch.func``.  Under ``nn.DataParallel`` logits are
    held.

    Args:
        model: The only model to patch, wrapped as it may be (PEFT, DDP).  None patches all, those
            there are and those to come.
        linear: False holds the logits in training, too.

    Returns:
        A handle whose ``undo()`` undoes this patch, as does leaving a ``with`` block of it. Patches
        may stand together, and be undone in any order; the last one that fits a model counts.

    Raises:
        ImportError: Transformers is not installed.
        RuntimeError: this version of it is not one we know (4.57 and 5), or the kernels are not
            built.
        TypeError: ``model`` holds no model of Transformers.
        ValueError: ``model`` has no output layer, or one we do not know.

    Example:
        >>> import torch, fastdiv.integrations.transformers
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=100, n_positions=8, n_embd=8, n_layer=1, n_head=1)
        >>> model, text = GPT2LMHeadModel(config), torch.arange(6)[None]
        >>> with fastdiv.integrations.transformers.apply():
        ...     model(text, labels=text).loss.backward()
        >>> patch = fastdiv.integrations.transformers.apply(model)
        >>> patch.undo()
    """
    return TransformersPatch(model, linear)


class TransformersPatch:
    """What ``apply()`` returns."""

    def __init__(self, model: nn.Module | None, linear: bool) -> None:
        _check_version()
        found = None if model is None else _find_model(model)
        if found is not None:
            output_layers(found)
        self._model = None if found is None else weakref.ref(found)
        self.linear = linear
        self.__enter__()

    def __enter__(self) -> TransformersPatch:
        with _lock:
            if self not in library.standing:
                library.install()
                library.standing.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Takes this patch back; nothing happens the second time."""
        with _lock:
            if self in library.standing:
                library.standing.remove(self)
                if not library.standing:
                    library.restore()

    def fits(self, model: nn.Module) -> bool:
        """Whether this patch is for this model."""
        return self._model is None or self._model() is model


def _check_version() -> None:
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    if major != "5" and (major, minor) != ("4", "57"):
        raise RuntimeError(
            "fastdiv.integrations.transformers.apply() knows versions 4.57 and 5 of Transformers, "
            f"not {transformers.__version__}; use fastdiv.linear_cross_entropy"
        )
    require_kernels("fastdiv.integrations.transformers.apply()")


def _find_model(wrapped: nn.Module) -> nn.Module:
    from transformers import PreTrainedModel

    if isinstance(wrapped, nn.Module):
        for module in wrapped.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise TypeError(f"model must hold a model of Transformers, got {type(wrapped).__name__}")
