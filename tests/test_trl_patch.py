"""How TRL's functions are replaced, and put back: every name, every order, every refusal."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastdiv.integrations.trl.patch as integration
from fastdiv._engine import backend
from fastdiv.integrations.trl import losses
from fastdiv.integrations.trl.patch import JSD
from helpers.trl_functions import CLASSES, THEIRS, WITH_JSD, given_to, trainers, trl, utils

# Modules that take the functions by name, in this version or another.
USERS = [
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
    "trl.experimental.cpo.cpo_trainer",
    "trl.experimental.orpo.orpo_trainer",
    "trl.experimental.sdft.loss_utils",
    "trl.experimental.sdpo.loss_utils",
    "trl.experimental.tpo.tpo_trainer",
    "trl.experimental.xpo.xpo_trainer",
]
GKD = WITH_JSD[0]


def load(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError):
            return False
    return True


LOADED = [name for name in USERS if load(name)]


def references() -> dict[tuple[str, str], Callable[..., Any]]:
    """What stands wherever TRL has one of the functions: by module or class, and name."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "trl" and not module_name.startswith("trl.kernels"):
            for name in (*THEIRS, JSD):
                if name in vars(module):
                    found[module_name, name] = vars(module)[name]
    for name, trainer in trainers.items():
        if JSD in vars(trainer):
            found[name, JSD] = getattr(trainer, JSD)
    return found


@pytest.fixture(autouse=True)
def reversed_by_all() -> Iterator[None]:
    def theirs() -> bool:
        known = list(THEIRS.values())
        return all(function in known for function in references().values())

    assert theirs() and not integration.TrlPatch.standing
    yield
    assert theirs() and not integration.TrlPatch.standing


def test_every_reference_is_replaced() -> None:
    before = references()
    modules = {module for module, _ in before}
    assert len(before) >= len(THEIRS) + 4 and len(modules) >= 5, before
    with integration.apply():
        during = references()
        assert during.keys() == before.keys()
        for place, function in during.items():
            assert function is not before[place] and function.__wrapped__ is before[place], place
    assert references() == before


def test_a_module_that_is_loaded_later() -> None:
    """It takes ours; they are taken from it, too."""
    name = next(name for name in LOADED if "selective_log_softmax" in vars(sys.modules[name]))
    kept = sys.modules.pop(name)
    try:
        with integration.apply():
            assert load(name)
            later = vars(sys.modules[name])
            assert later["selective_log_softmax"] is utils.selective_log_softmax
            assert later["selective_log_softmax"] is not THEIRS["selective_log_softmax"]
        assert later["selective_log_softmax"] is THEIRS["selective_log_softmax"]
    finally:
        sys.modules[name] = kept


def test_they_look_like_trls() -> None:
    with integration.apply():
        for name, theirs in THEIRS.items():
            ours = given_to(name)
            assert inspect.signature(ours) == inspect.signature(theirs)
            assert (ours.__doc__, ours.__qualname__) == (theirs.__doc__, theirs.__qualname__)
        assert isinstance(vars(trainers["GKDTrainer"])[JSD], staticmethod)


def test_reversal() -> None:
    first = integration.apply()
    function = given_to(GKD)
    second = integration.apply()
    assert given_to(GKD) is function is not THEIRS[GKD]  # patched twice is wrapped once
    first.undo()
    first.undo()
    assert given_to(GKD) is function
    with second as entered:
        assert entered is second and given_to(GKD) is function
    assert given_to(GKD) is THEIRS[GKD]
    with second:  # once more
        assert given_to(GKD) is function
    with pytest.raises(ZeroDivisionError), integration.apply(), integration.apply():
        raise ZeroDivisionError


def test_who_kept_ours_gets_trls_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    called, entropy = [], losses.entropy
    monkeypatch.setattr(losses, "entropy", lambda x: called.append(x) or entropy(x))
    x = torch.randn(3, CLASSES)
    with integration.apply():
        called.clear()
        kept = utils.entropy_from_logits
        kept(x)
    assert called
    called.clear()
    assert kept(x).equal(THEIRS["entropy_from_logits"](x)) and not called


def test_who_replaced_ours_stays() -> None:
    @functools.wraps(THEIRS["entropy_from_logits"])  # who looks like TRL's is still another
    def another(*args: Any) -> Any:
        return ours(*args)

    patch = integration.apply()
    ours, name = utils.entropy_from_logits, "entropy_from_logits"
    x = torch.randn(3, CLASSES)
    try:
        utils.entropy_from_logits = another
        patch.undo()
        assert utils.entropy_from_logits is another and another(x).equal(THEIRS[name](x))
        with pytest.raises(
            RuntimeError, match=f"TRL's entropy_from_logits is not TRL's.* {__name__}; undo"
        ):
            integration.apply()
    finally:
        utils.entropy_from_logits = THEIRS[name]


def in_trl(source: str) -> Callable[..., Any]:
    """A function that looks as if TRL's module had it."""
    names = dict(vars(utils))
    exec(compile(source, "trl", "exec"), vars(utils))
    (name,) = vars(utils).keys() - names.keys()
    function = vars(utils).pop(name)
    function.__name__ = "entropy_from_logits"
    return function


@pytest.mark.parametrize(
    "source,says",
    [
        (
            "def later(logits, chunk_size=128, *, base=2): ...",
            r"does not know TRL .*later\(logits, chunk_size=128, \*, base=2\).*call the functions",
        ),
        ("def later(logits, chunk_size=64): ...", "does not know TRL .*chunk_size=64"),
        (
            "def later(logits, chunk_size=128): return logits.softmax(-1).amax(-1).log()",
            "does not know TRL .*another formula",
        ),
        ("def later(logits): return logits.softmax(-1)", "does not know TRL .*another formula"),
    ],
)
def test_an_unknown_version(monkeypatch: pytest.MonkeyPatch, source: str, says: str) -> None:
    with monkeypatch.context() as m:
        m.setattr(utils, "entropy_from_logits", in_trl(source))
        before = references()
        with pytest.raises(RuntimeError, match=says):
            integration.apply()
        assert references() == before and not integration.TrlPatch.standing


def test_a_version_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.delattr(utils, "selective_log_softmax")
        version = trl.__version__.replace(".", r"\.")
        with pytest.raises(RuntimeError, match=f"TRL {version}.*has no .*selective_log_softmax"):
            integration.apply()
    kept = vars(trainers["GKDTrainer"])[JSD]
    delattr(trainers["GKDTrainer"], JSD)
    try:
        with pytest.raises(RuntimeError, match="has no GKDTrainer.generalized_jsd_loss"):
            integration.apply()
    finally:
        setattr(trainers["GKDTrainer"], JSD, kept)


def test_an_older_version() -> None:
    """Whose batchmean of no token was NaN; from one without the options that came later."""
    theirs = in_trl(
        "def older(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0,"
        " reduction='batchmean'):\n"
        "    value = theirs(student_logits, teacher_logits, labels, beta, temperature, 'sum')\n"
        "    return value / (student_logits.shape[0] if labels is None"
        " else (labels != -100).sum()) if reduction == 'batchmean' else theirs("
        "student_logits, teacher_logits, labels, beta, temperature, reduction)"
    )
    vars(utils)["theirs"] = THEIRS[GKD]
    theirs.__name__ = JSD
    try:
        integration._check(JSD, theirs)
        x, t = torch.randn(2, 3, CLASSES, requires_grad=True), torch.randn(2, 3, CLASSES)
        value = losses.generalized_jsd_loss(theirs, x, t, torch.full((2, 3), -100))
        assert value is not None and value.isnan()
        value.backward()
        assert x.grad is not None and (x.grad == 0).all()
    finally:
        del vars(utils)["theirs"]


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_C", None)
    with pytest.raises(RuntimeError, match=r"trl.apply\(\) would change nothing.*_C could not"):
        integration.apply()


@pytest.mark.cpu_only("a process of its own")
def test_import_needs_no_trl() -> None:
    program = """
import sys, fastdiv.integrations.trl
assert not {"trl", "transformers", "datasets"} & sys.modules.keys()
sys.modules["trl"] = None
try:
    fastdiv.integrations.trl.apply()
except ImportError as error:
    assert "trl" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_in_one_graph() -> None:
    x = torch.randn(2, 3, CLASSES, requires_grad=True)
    t, y = torch.randn(2, 3, CLASSES), torch.randint(CLASSES, (2, 3))

    def loss(x: torch.Tensor) -> torch.Tensor:
        value = given_to(GKD)(x, t, y, 0.1) + utils.selective_log_softmax(x, y).sum()
        return value + utils.selective_log_softmax(x, y[..., None].expand(2, 3, 4)).sum()

    with integration.apply(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            got, expected = compiled(x), loss(x)
            torch.testing.assert_close(got, expected)
            for a, b in zip(*(torch.autograd.grad(v, x) for v in (got, expected)), strict=True):
                torch.testing.assert_close(a, b)
