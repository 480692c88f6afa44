"""What is replaced in Transformers while a patch stands."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial, wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _forward
from ._logits import DeferredLogits, HeldLogits

if TYPE_CHECKING:
    from . import TransformersPatch

standing: list[TransformersPatch] = []  # the last one counts
_replaced: list[Replaced] = []
# Whether the Trainer took the labels away, to smooth them in a loss of its own.
_smoothing: ContextVar[bool] = ContextVar("fastdiv_smoothing", default=False)


class Replaced:
    """An attribute of a class or an instance that is ours for a while."""

    def __init__(self, owner: Any, name: str, ours: Any) -> None:
        self.owner, self.name, self.ours = weakref.ref(owner), name, ours
        self.theirs = vars(owner)[name]
        setattr(owner, name, ours)

    def stands(self) -> bool:
        owner = self.owner()
        return owner is not None and vars(owner).get(self.name) is self.ours

    def undo(self) -> None:
        """Who replaced ours meanwhile stays; ours, if he calls it, does nothing."""
        if self.stands():
            setattr(self.owner(), self.name, self.theirs)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    theirs = vars(owner)[name]
    if not any(r.ours is theirs for r in _replaced):
        _replaced.append(Replaced(owner, name, make(theirs)))


def install() -> None:
    """Replaces all that is not replaced already."""
    from transformers import PreTrainedModel
    from transformers.trainer import Trainer
    from transformers.trainer_pt_utils import LabelSmoother

    _replace(PreTrainedModel, "__init_subclass__", _init_subclass)
    _replace(Trainer, "compute_loss", _compute_loss)
    _replace(LabelSmoother, "__call__", _label_smoother)
    for cls in _subclasses(PreTrainedModel):
        _replace_forward(cls)
    for model in gc.get_objects():
        if issubclass(type(model), PreTrainedModel) and "forward" in vars(model):
            _replace(model, "forward", partial(_own_forward, model))  # Accelerate's


def restore() -> None:
    """Gives everything back."""
    while _replaced:
        _replaced.pop().undo()


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _init_subclass(theirs: Any) -> Any:
    """Classes to come."""

    def init_subclass(cls: type, **kwargs: Any) -> None:
        theirs.__func__(cls, **kwargs)
        if standing:
            _replace_forward(cls)

    return classmethod(init_subclass)


def _replace_forward(cls: type) -> None:
    """A class's own, or the one it inherits."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    if "labels" in inspect.signature(vars(owner)["forward"]).parameters:
        _replace(
            owner, "forward", lambda theirs: _labelled(theirs, theirs, partial(partial, theirs))
        )


def _own_forward(model: nn.Module, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Ours in place of an instance's; a method, which goes along with a copy of it."""
    if isinstance(theirs, MethodType):
        of_self, bound = theirs.__func__, partial(partial, theirs.__func__)
    else:
        of_self, bound = theirs, lambda _: theirs
    return MethodType(_labelled(type(model).forward, of_self, bound), model)


def _labelled(
    signature: Callable[..., Any],
    theirs: Callable[..., Any],
    bound: Callable[[nn.Module], Callable[..., Any]],
) -> Callable[..., Any]:
    """Ours in place of a forward: where there are labels, that with our losses."""
    names = list(inspect.signature(signature).parameters)
    place = names.index("labels") - 1 if "labels" in names else len(names)

    @wraps(theirs)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = bound(self)
        if torch.compiler.is_compiling() or _forward.is_running() or _transformed():
            return call(*args, **kwargs)
        smoothing = _smoothing.get()
        labels = args[place] if len(args) > place else kwargs.get("labels")
        patch = next((p for p in reversed(standing) if p.fits(self)), None)
        if patch is None or (labels is None and not smoothing):
            return call(*args, **kwargs)
        return _forward.run(self, call, patch.linear, smoothing, *args, **kwargs)

    return forward


def _transformed() -> bool:
    return torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()


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
            return result[0], _forward.with_plain_logits(result[1])
        return result

    return compute_loss


def _label_smoother(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss by a cross entropy, which does not look at the logits."""

    @wraps(theirs)
    def smoothed(
        self: Any,
        model_output: Any,
        labels: Tensor,
        shift_labels: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if not isinstance(logits, (DeferredLogits, HeldLogits)):
            if num_items_in_batch is not None:  # which version 4 does not know
                kwargs["num_items_in_batch"] = num_items_in_batch
            return theirs(self, model_output, labels, shift_labels, **kwargs)
        if shift_labels:
            logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:]
        loss = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            labels.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch

    return smoothed
