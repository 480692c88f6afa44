"""``patch_torch()`` and its handle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._engine.torch_private import fill_names_of_dynamo
from ..handle import Patch, require_kernels
from . import cross_entropy


def patch_torch() -> TorchPatch:
    """Run ``torch.nn.functional.cross_entropy`` and ``torch.nn.CrossEntropyLoss`` on fastdiv.

    The patch lasts until it is undone, or for a ``with`` block.  It holds in the whole process,
    compiled code included.  A call runs on :func:`fastdiv.cross_entropy` if there is a kernel and
    both libraries mean the same: logits in float32, bfloat16, float16 or float64, int64 labels or
    probabilities, any options, class weights in the dtype of the result.  The result has the dtype
    of torch's, also under autocast.

    Every other call runs on torch, and so does every call with bad arguments, which raises torch's
    error.  These calls are torch's: other dtypes, devices without kernels, ``size_average`` and
    ``reduce``, class weights that require a gradient or meet a ``torch.func`` transform, subclasses
    of tensors, ``__torch_function__`` modes, ``torch.jit`` and ``torch.export``.  Under
    ``fastdiv.backend("reference")`` all calls are.

    Values differ by rounding.  They also differ where fastdiv's are better: ignored rows may hold
    NaN.  On a GPU a label out of range makes its row NaN.  A call with a few short rows takes some
    tens of microseconds longer than torch's.

    Three places keep torch's function: code that imported it before (``from torch.nn.functional
    import cross_entropy``), scripted modules and exported programs, and a ``CrossEntropyLoss`` made
    inside compiled code.

    Returns:
        A handle.  Its ``undo()``, or leaving a ``with`` block of it, undoes this patch.  With
        several patches, torch gets its function back when the last one is undone, in any order.

    Raises:
        RuntimeError: if torch's function is not the one fastdiv knows, because this version of
            torch changed its arguments or another library replaced it; or if the kernels are not
            built.

    Example:
        >>> import torch, fastdiv
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> with fastdiv.patch_torch():
        ...     print(f"{loss(torch.zeros(2, 4), torch.tensor([0, 3])):.4f}")
        1.3863
        >>> patch = fastdiv.patch_torch()
        >>> patch.undo()
    """
    return TorchPatch()


class TorchPatch(Patch):
    """The handle that ``patch_torch()`` returns."""

    @classmethod
    def _install(cls) -> None:
        cls.replace(F, "cross_entropy", _replacement)
        cross_entropy.on = True

    @classmethod
    def _restore(cls) -> None:
        cross_entropy.on = False  # a replacement that somebody kept is torch's function from here
        super()._restore()


def _replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the replacement, or raise if the original is not torch's function as fastdiv knows it.

    It has the original's name, documentation and signature.
    """
    if getattr(original, "__globals__", None) is not vars(F):
        raise RuntimeError(
            "fastdiv.patch_torch(): torch.nn.functional.cross_entropy is not torch's, but "
            f"{original!r} of {getattr(original, '__module__', None)}; undo what replaced it first"
        )
    found, known = _arguments(original), _arguments(cross_entropy.cross_entropy)
    if found != known:
        raise RuntimeError(
            f"fastdiv.patch_torch() does not know torch.nn.functional.cross_entropy{found} of "
            f"torch {torch.__version__}, only cross_entropy{known}; use fastdiv.cross_entropy"
        )
    require_kernels("fastdiv.patch_torch()")
    # The compiler lists once, by name, the functions that it need not trace into.  The original
    # must be listed, so the list is filled before the name changes.  (This imports the compiler,
    # which takes a second, as making an optimizer does.)
    fill_names_of_dynamo()
    cross_entropy.original = original

    @wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        return cross_entropy.cross_entropy(*args, **kwargs)

    for_jit: Any = replacement
    for_jit.__prepare_scriptable__ = lambda: original  # which torch.jit.script takes
    return replacement


def _arguments(function: Callable[..., Any]) -> str:
    """Return the signature without types."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))
