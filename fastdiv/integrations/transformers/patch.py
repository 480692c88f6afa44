"""The public function that patches Transformers."""

from __future__ import annotations

import torch
from torch import nn

from .library import TransformersPatch


def apply(
    model: nn.Module | None = None,
    linear: bool = True,
    logits_dtype: torch.dtype | None = None,
) -> TransformersPatch:
    """Train language models of Transformers on :func:`fastdiv.linear_cross_entropy`.

    The patch lasts until it is undone, or for a ``with`` block.  While it does, training steps of
    causal, masked and sequence-to-sequence language models never hold their logits, if they are
    given labels.  The model's own code runs unchanged, and with it whatever it does to logits and
    labels: scaling, capping, shifting, ``num_items_in_batch``, tied weights, LoRA.  Its output
    layer returns logits that are not computed yet, and their cross entropy is fastdiv's, wherever
    it is called.  The Trainer's label smoothing is such a call, too.

    The ``outputs.logits`` of such a step are computed when they are first used, with their
    gradient.  Once an optimizer has changed the weights, they raise ``RuntimeError`` instead.
    Without labels, in ``model.eval()`` and under ``torch.no_grad()``, logits are returned as usual,
    and their loss is :func:`fastdiv.cross_entropy`.

    A model trains as before if it does more with its logits, or if fastdiv does not know its output
    layer.  A warning says so, once per class.  Models inside ``torch.compile``, ``torch.export`` or
    ``torch.func`` train as before, too, without a warning.  Under ``nn.DataParallel`` logits are
    held.

    Args:
        model: The only model to patch, possibly wrapped (PEFT, DDP).  None patches all models, also
            those made later.
        linear: False holds the logits in training, too.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are, in every call with labels.  ``outputs.logits`` are float32 then.

    Returns:
        A handle.  Its ``undo()``, or leaving a ``with`` block of it, undoes this patch.  Several
        patches may be active at once and be undone in any order; the newest that fits a model
        counts.

    Raises:
        ImportError: if Transformers is not installed.
        RuntimeError: if fastdiv does not know this version (it knows 4.57 and 5), or the kernels
            are not built.
        TypeError: if ``model`` holds no model of Transformers.
        ValueError: if ``model`` has no output layer, or one that fastdiv does not know; or
            if ``logits_dtype`` is neither None nor ``torch.float32``.

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
    return TransformersPatch(model, linear, logits_dtype)
