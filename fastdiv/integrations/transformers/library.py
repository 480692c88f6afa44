"""The patch of Transformers: its handle, and the replacements that it makes."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._engine.torch_private import is_jit_traced, is_transformed
from ..._linear.dtypes import check_logits_dtype
from ..handle import Patch, require_kernels
from . import forward as model_forward
from .logits import DeferredLogits, HeldLogits

# True if the Trainer took the labels away, to smooth them in a loss of its own.
_smoothing: ContextVar[bool] = ContextVar("fastdiv_smoothing", default=False)


class TransformersPatch(Patch):
    """The handle that ``apply()`` returns."""

    def __init__(
        self, model: nn.Module | None, linear: bool, logits_dtype: torch.dtype | None
    ) -> None:
        _check_version()
        check_logits_dtype(logits_dtype)
        found = None if model is None else _find_model(model)
        if found is not None:
            model_forward.output_layers(found)
        self._model = None if found is None else weakref.ref(found)
        self.linear = linear
        self.logits_dtype = logits_dtype
        super().__init__()

    def fits(self, model: nn.Module) -> bool:
        """Tell whether this patch is for this model."""
        return self._model is None or self._model() is model

    @classmethod
    def _install(cls) -> None:
        from transformers import PreTrainedModel
        from transformers.trainer import Trainer
        from transformers.trainer_pt_utils import LabelSmoother

        # Models are called, which runs the forward of their class.  But some wrappers (PEFT) call
        # the forward itself, and Accelerate gives an instance a forward of its own.
        cls.replace(PreTrainedModel, "__call__", lambda original: _with_labels(original, None))
        cls.replace(PreTrainedModel, "__init_subclass__", _init_subclass)
        for model_class in _subclasses(PreTrainedModel):
            _replace_forward(model_class)
        cls.replace(Trainer, "compute_loss", _compute_loss)
        cls.replace(LabelSmoother, "__call__", _label_smoother)


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


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _init_subclass(original: Any) -> Any:
    """Make the replacement that patches classes defined while a patch is active."""

    def init_subclass(cls: type[Any], /, **kwargs: Any) -> None:
        original.__func__(cls, **kwargs)
        if TransformersPatch.standing:
            _replace_forward(cls)

    return classmethod(init_subclass)


def _replace_forward(cls: type) -> None:
    """Replace the forward of a class, or the one that it inherits."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    if _place_of_labels(vars(owner)["forward"]) is not None:
        TransformersPatch.replace(
            owner, "forward", lambda original: _with_labels(original, original)
        )


@cache
def _place_of_labels(forward: Callable[..., Any]) -> int | None:
    """Return the position of ``labels`` among the arguments, or None if there are none."""
    names = list(inspect.signature(forward).parameters)[1:]  # without self
    return names.index("labels") if "labels" in names else None


def _with_labels(
    original: Callable[..., Any], signature: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Make the replacement of a model's method; given labels, its losses are fastdiv's.

    Args:
        original: The method.
        signature: A forward with the same arguments.  None means ``__call__``, which leaves the
            work to the forward, unless the instance has a forward of its own.
    """

    @wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        elsewhere = signature is None and "forward" not in vars(self)
        compiling = torch.compiler.is_compiling()
        watched = is_jit_traced() or is_transformed()
        if compiling or elsewhere or model_forward.is_running() or watched:
            return original(self, *args, **kwargs)
        place = _place_of_labels(signature or type(self).forward)
        labels = kwargs.get("labels")
        if place is not None and len(args) > place:
            labels = args[place]
        patch = next((p for p in reversed(TransformersPatch.standing) if p.fits(self)), None)
        if patch is None or (labels is None and not _smoothing.get()):
            return original(self, *args, **kwargs)
        call = partial(original, self)
        how = (patch.linear, patch.logits_dtype, _smoothing.get())
        return model_forward.run(self, call, *how, *args, **kwargs)

    return method


def _compute_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the Trainer's replacement, which records that the Trainer smooths the labels."""

    @wraps(original)
    def compute_loss(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.label_smoother is None or self.compute_loss_func or "labels" not in inputs:
            return original(self, model, inputs, *args, **kwargs)
        token = _smoothing.set(True)
        try:
            result = original(self, model, inputs, *args, **kwargs)
        finally:
            _smoothing.reset(token)
        if isinstance(result, tuple):  # with the outputs
            return result[0], model_forward.with_plain_logits(result[1])
        return result

    return compute_loss


def _label_smoother(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the replacement that takes the same loss by a cross entropy of deferred logits."""

    @wraps(original)
    def smoothed(self: Any, output: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = output["logits"] if isinstance(output, dict) else output[0]
        if isinstance(logits, (DeferredLogits, HeldLogits)):
            return _smoothed_loss(self, logits, labels, *args, **kwargs)
        return original(self, output, labels, *args, **kwargs)

    return smoothed


def _smoothed_loss(
    smoother: Any,
    logits: Tensor,
    labels: Tensor,
    shift_labels: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    if shift_labels:
        logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:]
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        labels.reshape(-1),
        ignore_index=smoother.ignore_index,
        label_smoothing=smoother.epsilon,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
