"""The public function that patches TRL, its handle, and the search for what it replaces."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from ..handle import Patch, require_kernels
from . import hidden, losses
from .original import (
    DIVERGENCE,
    ENTROPY,
    JSD,
    LOG_PROB,
    Function,
    call_of,
    same_values,
    signature_of,
)

UTILS = "trl.trainer.utils"
LATER = "selective_log_softmax_and_entropy"  # not in TRL 1.12
FUNCTIONS = ("selective_log_softmax", ENTROPY, LATER)
# Functions of hidden states.  Those before TRL 1.16 run on a GPU only, or have other arguments.
CHUNKED = "trl.kernels.chunked_logprob"
ON_CPU = "_forward_tile"
HIDDEN = ((CHUNKED, LOG_PROB), ("trl.trainer.distillation_trainer", DIVERGENCE))
# JSD is a static method of these classes, by module, in some version.
GKD = (
    ("trl.experimental.gkd.gkd_trainer", "GKDTrainer"),
    ("trl.trainer.gkd_trainer", "GKDTrainer"),
)
OTHERS = (
    ("trl.experimental.gold.gold_trainer", "GOLDTrainer"),
    ("trl.experimental.distillation.distillation_trainer", "DistillationTrainer"),
    ("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer"),
)

FUSED: dict[str, Function] = {
    JSD: losses.generalized_jsd_loss,
    "selective_log_softmax": losses.selective_log_softmax,
    ENTROPY: losses.entropy_from_logits,
    LATER: losses.selective_log_softmax_and_entropy,
    LOG_PROB: hidden.chunked_log_prob,
    DIVERGENCE: hidden.chunked_divergence_loss,
}

_replacements: dict[Function, Function] = {}  # by TRL's original


def apply() -> TrlPatch:
    r"""Run TRL's losses on fastdiv: log-probabilities, entropies, and divergences of distillation.

    The patch lasts until it is undone, or for a ``with`` block.  It holds in all modules of TRL,
    also in those loaded later:

    * ``trl.kernels.ChunkedLogProbFunction``, through which SFT, GRPO, RLOO, DPO and KTO of TRL 1.16
      stream hidden states, runs on :func:`fastdiv.linear_log_prob`,
      :func:`fastdiv.linear_log_prob_and_entropy` or :func:`fastdiv.linear_cross_entropy`;
    * ``_chunked_divergence_loss`` of its ``DistillationTrainer`` on :func:`fastdiv.linear_js_div`;
    * ``generalized_jsd_loss`` of ``GKDTrainer``, ``GOLDTrainer``, ``IWOPDTrainer`` and, in older
      versions, ``DistillationTrainer`` on :func:`fastdiv.js_div`;
    * ``trl.trainer.utils.selective_log_softmax`` on :func:`fastdiv.log_prob`, of one class a token
      or several (an index ``[..., K]``);
    * ``entropy_from_logits`` on :func:`fastdiv.entropy`;
    * ``selective_log_softmax_and_entropy`` on :func:`fastdiv.log_prob_and_entropy`.

    Functions that this version of TRL does not have are left out.  Arguments and the dtype of the
    result are TRL's.  Values differ by rounding, because TRL computes half precision in half
    precision.  They also differ where fastdiv's are better: classes at :math:`-\infty` give no NaN,
    and masked tokens may hold anything.

    Every other call runs on TRL, and so does every call with bad arguments, which raises TRL's
    error.  These calls are TRL's: ``reduction="none"``, whose result is as large as the logits;
    probabilities (``logits_are_probs``), which need not add up to 1; the ``top_k`` of a
    distribution; log Σ p², which WPO needs; means of capped logits, which DPO and KTO log;
    distillation with capped logits; weights of ZeRO-3; devices without kernels; subclasses of
    tensors.  Under ``fastdiv.backend("reference")`` all calls are.

    Code of your own that imported one of these functions by name before the patch keeps TRL's.

    Returns:
        A handle.  Its ``functions`` are the names of what is replaced.  Its ``undo()``, or leaving
        a ``with`` block of it, undoes this patch.  With several patches, TRL gets its functions
        back when the last one is undone, in any order.

    Raises:
        ImportError: if TRL is not installed.
        RuntimeError: if TRL's functions are not those fastdiv knows, because this version has
            others or another library replaced them; or if the kernels are not built.  Nothing is
            changed then.

    Example:
        >>> import fastdiv.integrations.trl  # doctest: +SKIP
        >>> fastdiv.integrations.trl.apply()  # doctest: +SKIP
        >>> trainer = trl.experimental.gkd.GKDTrainer(...)  # doctest: +SKIP

    Source: ``trl/trainer/utils.py``, ``trl.kernels.chunked_logprob`` and
    ``trl/experimental/gkd/gkd_trainer.py``; Agarwal et al., *On-Policy Distillation of Language
    Models* (GKD, 2024).
    """
    return TrlPatch()


class TrlPatch(Patch):
    """The handle that ``apply()`` returns."""

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions of this version of TRL that are replaced, by module and name."""
        replaced = _replacements if self in self.standing else ()
        return tuple(sorted(f"{f.__module__}.{f.__qualname__}" for f in replaced))

    @classmethod
    def _install(cls) -> None:
        require_kernels("fastdiv.integrations.trl.apply()")
        known = {*_replacements, *_replacements.values()}
        new = [(name, original) for name, original in _find() if original not in known]
        for name, original in new:
            _check(name, original)
        _replacements.update({original: _replacement(original) for _, original in new})
        _exchange(_replacements)

    @classmethod
    def _restore(cls) -> None:
        # Also in modules that were loaded meanwhile, and imported replacements by name.
        _exchange({replacement: original for original, replacement in _replacements.items()})


def _find() -> Iterator[tuple[str, Function]]:
    """Yield the name and the function of everything to replace, after loading its module."""
    utils = vars(import_module(UTILS))
    for name in FUNCTIONS:
        if name in utils:
            yield name, utils[name]
        elif name != LATER:
            raise _unknown(f"has no {UTILS}.{name}")
    trainers = [trainer for where in GKD if (trainer := _trainer(*where))]
    if not trainers:
        raise _unknown(f"has no GKDTrainer.{JSD}, or none that can be loaded")
    trainers += [trainer for where in OTHERS if (trainer := _trainer(*where))]
    for trainer in trainers:
        yield JSD, getattr(trainer, JSD)
    if _loaded(CHUNKED, ON_CPU) is not None:
        for module, name in HIDDEN:
            if (function := _loaded(module, name)) is not None:
                yield name, function


def _loaded(module: str, name: str) -> Any:
    """Return a name of a module; None if it has none, or the module cannot be loaded."""
    try:
        with warnings.catch_warnings():  # about experimental classes that the user may never use
            warnings.simplefilter("ignore")
            return getattr(import_module(module), name, None)
    except (ImportError, RuntimeError):  # a package is missing, so nobody can use it
        return None


def _trainer(module: str, name: str) -> type | None:
    """Return a class with a loss of its own; None if there is none, or it cannot be loaded."""
    trainer: type | None = _loaded(module, name)
    return trainer if trainer is not None and JSD in vars(trainer) else None


def _check(name: str, original: Function) -> None:
    """Raise if TRL's function of this name is not the one that fastdiv knows."""
    module = str(getattr(original, "__module__", None))
    code = getattr(original, "forward", original)  # that of an autograd function
    made_in = getattr(code, "__globals__", {})
    if not module.startswith("trl.") or made_in is not vars(sys.modules[module]):
        raise RuntimeError(
            f"fastdiv.integrations.trl.apply(): TRL's {name} is not TRL's, but {original!r} of "
            f"{made_in.get('__name__', module)}; undo what replaced it first"
        )
    where, replacement = f"{module}.{original.__qualname__}", FUSED[name]
    signature = signature_of(original)
    arguments = [(p.name, p.default) for p in signature.parameters.values()]
    known = [(p.name, p.default) for p in inspect.signature(replacement).parameters.values()]
    if arguments != [argument for argument in known if argument in arguments]:
        raise _unknown(f"has {where}{signature}")
    if not same_values(original, replacement):
        raise _unknown(f"has another formula in {where}")


def _unknown(what: str) -> RuntimeError:
    version = import_module("trl").__version__
    return RuntimeError(
        f"fastdiv.integrations.trl.apply() does not know TRL {version}, which {what}; call "
        "the functions of fastdiv yourself"
    )


def _replacement(original: Function) -> Function:
    """Make the replacement, with the name, documentation and signature of the original."""
    fused, signature, call = FUSED[original.__name__], signature_of(original), call_of(original)

    def replacement(*args: Any, **given: Any) -> Any:
        if TrlPatch.standing:  # else somebody kept the replacement after the patch was undone
            try:
                arguments = signature.bind(*args, **given).arguments
            except TypeError:  # the original raises its own error
                return call(*args, **given)
            value = fused(original, **arguments)
            if value is not None:
                return value
        return call(*args, **given)

    if not isinstance(original, type):
        return wraps(original)(replacement)
    # TRL calls ``apply`` of an autograd function, which is all that this class has.
    alike = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {"__wrapped__": original, "apply": staticmethod(replacement)}
    return type(original.__name__, (), alike | members)


def _exchange(new: dict[Function, Function]) -> None:
    """Put functions in the place of others, wherever TRL holds these."""
    by_id = {id(old): function for old, function in new.items()}
    for holder in _holders():
        for name, value in list(vars(holder).items()):
            static = isinstance(value, staticmethod)
            function = by_id.get(id(value.__func__ if static else value))
            if function is not None:
                setattr(holder, name, staticmethod(function) if static else function)


def _holders() -> Iterator[ModuleType | type]:
    """Yield TRL's loaded modules, and their classes with a loss of their own."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and module is not None:
            yield module
            for value in list(vars(module).values()):
                if isinstance(value, type) and JSD in vars(value):
                    yield value
