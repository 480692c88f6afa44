"""torch's own cross entropy on our kernels."""

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

_disguised: Callable[..., Tensor] | None = None


def patch_torch() -> TorchPatch:
    """Has ``torch.nn.functional.cross_entropy`` and ``torch.nn.CrossEntropyLoss`` run on fastdiv.

    From now on, or inside a ``with`` block; in the whole process, compiled code included.  A call
    runs on :func:`fastdiv.cross_entropy` if there is a kernel and both libraries mean the same:
    logits of float32, bfloat16, float16 or float64, int64 labels or probabilities, any options,
    class weights in the dtype of the result.  That is the dtype of torch's, under autocast, too.

    Every other call is torch's, and so is every error of bad arguments: other dtypes, devices
    without kernels, ``size_average`` and ``reduce``, class weights that require a gradient or meet
    a ``torch.func`` transform, subclasses of tensors, ``__torch_function__`` modes, ``torch.jit``
    and ``torch.export``.  Under ``fastdiv.backend("reference")`` all of them are.

    Values differ by rounding, and where fastdiv's are better: ignored rows may hold NaN.  On a GPU
    a label that is no class makes its row NaN.  A call with a few short rows takes some tens of
    microseconds longer than torch's.

    Torch's function stays where it was taken before (``from torch.nn.functional import
    cross_entropy``), in scripted modules and exported programs, and in a ``CrossEntropyLoss`` that
    is made inside of compiled code.

    Returns:
        A handle whose ``undo()`` undoes this patch, as does leaving a ``with`` block of it.  With
        several patches torch has its function back when the last is undone, in whatever order.

    Raises:
        RuntimeError: torch's function is not what we know, since this version of torch changed its
            arguments or another library replaced it; or the kernels are not built.

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
    """What ``patch_torch()`` returns."""

    @classmethod
    def _install(cls) -> None:
        if F.cross_entropy is not _disguised:
            _replace(F.cross_entropy)
        cross_entropy.on = True

    @classmethod
    def _restore(cls) -> None:
        cross_entropy.on = False  # ours, if somebody kept it, is torch's again
        if F.cross_entropy is _disguised:
            F.cross_entropy = cross_entropy.torchs


def _replace(found: Callable[..., Tensor]) -> None:
    """Puts ours in the place of torch's, if torch's is what we take it for."""
    global _disguised
    if getattr(found, "__globals__", None) is not vars(F):
        raise RuntimeError(
            "fastdiv.patch_torch(): torch.nn.functional.cross_entropy is not torch's, but "
            f"{found!r} of {getattr(found, '__module__', None)}; undo what replaced it first"
        )
    theirs, known = _arguments(found), _arguments(cross_entropy.cross_entropy)
    if theirs != known:
        raise RuntimeError(
            f"fastdiv.patch_torch() does not know torch.nn.functional.cross_entropy{theirs} of "
            f"torch {torch.__version__}, only cross_entropy{known}; use fastdiv.cross_entropy"
        )
    require_kernels("fastdiv.patch_torch()")
    # The compiler looks up by name, once, what it need not trace into: that must be torch's.  (The
    # import takes a second, but is not ours alone: an optimizer does the same.)
    fill_names_of_dynamo()
    cross_entropy.torchs, _disguised = found, _disguise(found)
    F.cross_entropy = _disguised


def _arguments(function: Callable[..., Any]) -> str:
    """The signature without types."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _disguise(torchs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Ours, with the name, documentation and signature of torch's."""

    @wraps(torchs)
    def patched(*args: Any, **kwargs: Any) -> Tensor:
        return cross_entropy.cross_entropy(*args, **kwargs)

    patched.__prepare_scriptable__ = lambda: torchs  # type: ignore[attr-defined]  # torch.jit.script
    return patched
