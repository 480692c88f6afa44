"""TRL's losses on our kernels."""

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
from . import losses
from .original import Function, same_values

UTILS = "trl.trainer.utils"
LATER = "selective_log_softmax_and_entropy"  # not in TRL 1.12
FUNCTIONS = ("selective_log_softmax", "entropy_from_logits", LATER)
JSD = "generalized_jsd_loss"  # a static method; below who has it, or had it in older versions
GKD = (
    ("trl.experimental.gkd.gkd_trainer", "GKDTrainer"),
    ("trl.trainer.gkd_trainer", "GKDTrainer"),
)
OTHERS = (
    ("trl.experimental.gold.gold_trainer", "GOLDTrainer"),
    ("trl.experimental.distillation.distillation_trainer", "DistillationTrainer"),
    ("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer"),
)

_ours: dict[Function, Function] = {}  # by the function of TRL's that each stands for


def apply() -> TrlPatch:
    r"""Has TRL's losses run on fastdiv: GKD's generalized JSD, and log-probabilities and entropies.

    From now on, or inside a ``with`` block, in all modules of TRL, loaded before or after:

    * ``generalized_jsd_loss`` of ``GKDTrainer``, ``GOLDTrainer``, ``DistillationTrainer`` and
      ``IWOPDTrainer`` runs on :func:`fastdiv.js_div`;
    * ``trl.trainer.utils.selective_log_softmax`` on :func:`fastdiv.log_prob`, of one class a token
      or several (an index ``[..., K]``);
    * ``entropy_from_logits`` on :func:`fastdiv.entropy`;
    * ``selective_log_softmax_and_entropy`` on :func:`fastdiv.log_prob_and_entropy`;

    each so far as this version of TRL has it, with TRL's arguments, and with the dtype of TRL's
    result.  Values differ by rounding: TRL computes halves in halves; and where fastdiv's are
    better: classes at :math:`-\infty` give no NaN, and masked tokens may hold anything.

    Every other call is TRL's, and so is every error of bad arguments: ``reduction="none"``, where
    the result is as large as the logits; probabilities (``logits_are_probs``), which need not add
    up to 1; the ``top_k`` of a distribution; devices without kernels, and all of them under
    ``fastdiv.backend("reference")``; subclasses of tensors.

    What took these functions from TRL by name (``from trl.trainer.utils import ...`` in a program
    of your own) before this, keeps TRL's.

    Returns:
        A handle whose ``undo()`` undoes this patch, as does leaving a ``with`` block of it.  With
        several patches TRL has its functions back when the last is undone, in whatever order.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL's functions are not those we know, since this version has others, or
            another library replaced them; or the kernels are not built.  Nothing is changed then.

    Example:
        >>> import fastdiv.integrations.trl  # doctest: +SKIP
        >>> fastdiv.integrations.trl.apply()  # doctest: +SKIP
        >>> trainer = trl.experimental.gkd.GKDTrainer(...)  # doctest: +SKIP

    Source: ``trl/trainer/utils.py`` and ``trl/experimental/gkd/gkd_trainer.py``; Agarwal et al.,
    *On-Policy Distillation of Language Models* (GKD, 2024).
    """
    return TrlPatch()


class TrlPatch(Patch):
    """What ``apply()`` returns."""

    @classmethod
    def _install(cls) -> None:
        require_kernels("fastdiv.integrations.trl.apply()")
        known = {*_ours, *_ours.values()}
        new = [(name, theirs) for name, theirs in _find() if theirs not in known]
        for name, theirs in new:
            _check(name, theirs)
        _ours.update({theirs: _disguise(theirs) for _, theirs in new})
        _exchange(_ours)

    @classmethod
    def _restore(cls) -> None:
        _exchange({ours: theirs for theirs, ours in _ours.items()})


def _find() -> Iterator[tuple[str, Function]]:
    """Every function there is to replace and what it is called, after its module is loaded."""
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


def _trainer(module: str, name: str) -> type | None:
    """A class that has a loss of its own; None if this version does not, or it can't be loaded."""
    try:
        with warnings.catch_warnings():  # of what is experimental, which the user may never touch
            warnings.simplefilter("ignore")
            trainer = getattr(import_module(module), name, None)
    except (ImportError, RuntimeError):  # for want of a package: nobody can use it
        return None
    return trainer if trainer is not None and JSD in vars(trainer) else None


def _check(name: str, theirs: Function) -> None:
    """Raises, if what TRL has under this name is not the function that we know."""
    module, made_in = str(getattr(theirs, "__module__", None)), getattr(theirs, "__globals__", {})
    if not module.startswith("trl.") or made_in is not vars(sys.modules[module]):
        raise RuntimeError(
            f"fastdiv.integrations.trl.apply(): TRL's {name} is not TRL's, but {theirs!r} of "
            f"{made_in.get('__name__', module)}; undo what replaced it first"
        )
    where, ours = f"{module}.{theirs.__qualname__}", getattr(losses, name)
    signature = inspect.signature(theirs)
    arguments = [(p.name, p.default) for p in signature.parameters.values()]
    known = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
    if arguments != [argument for argument in known if argument in arguments]:
        raise _unknown(f"has {where}{signature}")
    if not same_values(theirs, ours):
        raise _unknown(f"has another formula in {where}")


def _unknown(what: str) -> RuntimeError:
    version = import_module("trl").__version__
    return RuntimeError(
        f"fastdiv.integrations.trl.apply() does not know TRL {version}, which {what}; call "
        "the functions of fastdiv yourself"
    )


def _disguise(theirs: Function) -> Function:
    """Ours, with the name, documentation and signature of TRL's."""
    ours, signature = getattr(losses, theirs.__name__), inspect.signature(theirs)

    @wraps(theirs)
    def patched(*args: Any, **given: Any) -> Any:
        if TrlPatch.standing:  # else somebody kept ours beyond the end
            try:
                arguments = signature.bind(*args, **given).arguments
            except TypeError:  # TRL's function says so in its own words
                return theirs(*args, **given)
            value = ours(theirs, **arguments)
            if value is not None:
                return value
        return theirs(*args, **given)

    return patched


def _exchange(new: dict[Function, Function]) -> None:
    """Puts functions in the place of others, wherever TRL has these."""
    by_id = {id(old): function for old, function in new.items()}
    for holder in _holders():
        for name, value in list(vars(holder).items()):
            static = isinstance(value, staticmethod)
            function = by_id.get(id(value.__func__ if static else value))
            if function is not None:
                setattr(holder, name, staticmethod(function) if static else function)


def _holders() -> Iterator[ModuleType | type]:
    """TRL's modules that are loaded, and their classes with a loss of their own."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and module is not None:
            yield module
            for value in list(vars(module).values()):
                if isinstance(value, type) and JSD in vars(value):
                    yield value
