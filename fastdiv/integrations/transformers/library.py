"""What is replaced in Transformers while a patch stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._engine.torch_private import is_jit_traced, is_transformed
from . import forward as model_forward
from .logits import DeferredLogits, HeldLogits

if TYPE_CHECKING:
    from . import TransformersPatch

standing: list[TransformersPatch] = []  # the last one counts
_replaced: list[Replaced] = []
# Whether the Trainer took the labels away, to smooth them in a loss of its own.
_smoothing: ContextVar[bool] = ContextVar("fastdiv_smoothing", default=False)


class Replaced:
    """A class's attribute that is ours for a while; it may have inherited its own."""

    def __init__(self, owner: type, name: str, make: Callable[[Any], Any]) -> None:
        self._owner, self._name = owner, name
        self._theirs = vars(owner).get(name)
        self.ours = make(getattr(owner, name) if self._theirs is None else self._theirs)
        setattr(owner, name, self.ours)

    def undo(self) -> None:
        """Who replaced ours meanwhile stays; ours, if he calls it, does nothing."""
        if vars(self._owner).get(self._name) is not self.ours:
            return
        if self._theirs is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._theirs)


def _replace(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    found = vars(owner).get(name)
    if found is None or all(replaced.ours is not found for replaced in _replaced):
        _replaced.append(Replaced(owner, name, make))


def install() -> None:
    """Replaces all that is not replaced already."""
    from transformers import PreTrainedModel
    from transformers.trainer import Trainer
    from transformers.trainer_pt_utils import LabelSmoother

    # Models are called; but some wrappers of them (PEFT) call forward, and some instances have one
    # of their own, of which their class does not know (Accelerate).
    _replace(PreTrainedModel, "__call__", lambda theirs: _with_labels(theirs, None))
    _replace(PreTrainedModel, "__init_subclass__", _init_subclass)
    for cls in _subclasses(PreTrainedModel):
        _replace_forward(cls)
    _replace(Trainer, "compute_loss", _compute_loss)
    _replace(LabelSmoother, "__call__", _label_smoother)


def restore() -> None:
    """Gives everything back."""
    while _replaced:
        _replaced.pop().undo()


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _init_subclass(theirs: Any) -> Any:
    """Classes to come."""

    def init_subclass(cls: type[Any], /, **kwargs: Any) -> None:
        theirs.__func__(cls, **kwargs)
        if standing:
            _replace_forward(cls)

    return classmethod(init_subclass)


def _replace_forward(cls: type) -> None:
    """A class's own, or the one it inherits."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    if _place_of_labels(vars(owner)["forward"]) is not None:
        _replace(owner, "forward", lambda theirs: _with_labels(theirs, theirs))


@cache
def _place_of_labels(forward: Callable[..., Any]) -> int | None:
    """Among positional arguments; None where there are no labels."""
    names = list(inspect.signature(forward).parameters)[1:]  # without self
    return names.index("labels") if "labels" in names else None


def _with_labels(
    theirs: Callable[..., Any], signature: Callable[..., Any] | None
) -> Callable[..., Any]:
    """A model's method whose losses are ours if it is given labels.

    Args:
        theirs: The method.
        signature: A forward that takes the same; None for a call, which is left to the forward
            unless the model has one of its own.
    """

    @wraps(theirs)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        elsewhere = signature is None and "forward" not in vars(self)
        compiling = torch.compiler.is_compiling()
        watched = is_jit_traced() or is_transformed()
        if compiling or elsewhere or model_forward.is_running() or watched:
            return theirs(self, *args, **kwargs)
        place = _place_of_labels(signature or type(self).forward)
        labels = kwargs.get("labels")
        if place is not None and len(args) > place:
            labels = args[place]
        patch = next((p for p in reversed(standing) if p.fits(self)), None)
        if patch is None or (labels is None and not _smoothing.get()):
            return theirs(self, *args, **kwargs)
        call = partial(theirs, self)
        return model_forward.run(self, call, patch.linear, _smoothing.get(), *args, **kwargs)

    return method


def _compute_loss(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """The Trainer's, which takes the labels away from the model where it smoothes them."""

    @wraps(theirs)
    def compute_loss(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.label_smoother is None or self.compute_loss_func or "labels" not in inputs:
            return theirs(self, model, inputs, *args, **kwargs)
        token = _smoothing.set(True)
        try:
            result = theirs(self, model, inputs, *args, **kwargs)
        finally:
            _smoothing.reset(token)
        if isinstance(result, tuple):  # with the outputs
            return result[0], model_forward.with_plain_logits(result[1])
        return result

    return compute_loss


def _label_smoother(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss by a cross entropy, which does not look at the logits."""

    @wraps(theirs)
    def smoothed(self: Any, output: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = output["logits"] if isinstance(output, dict) else output[0]
        if isinstance(logits, (DeferredLogits, HeldLogits)):
            return _smoothed_loss(self, logits, labels, *args, **kwargs)
        return theirs(self, output, labels, *args, **kwargs)

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
