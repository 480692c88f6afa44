"""Public names: where they live, pickles of them, and that no order of imports breaks them."""

from __future__ import annotations

import inspect
import io
import pickle
import pickletools
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiv
import fastdiv.distributed
import fastdiv.integrations.transformers

pytestmark = pytest.mark.cpu_only("names and pickles")

PACKAGES = [
    fastdiv,
    fastdiv.nn,
    fastdiv.stats,
    fastdiv.distributed,
    fastdiv.integrations.transformers,
]
PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in PACKAGES
    for name in package.__all__
    if not isinstance(getattr(package, name), ModuleType)
}
# What the constructors of modules of fastdiv.nn ask for.
ARGUMENTS: dict[str, Any] = {
    "target_type": "logits",
    "values_type": "logits",
    "alpha": 0.5,
    "size": 4,
    "padding_idx": -1,
    "smoothing": 0.1,
    "in_features": 3,
    "num_classes": 4,
}


def modules() -> dict[str, torch.nn.Module]:
    """One of every class of fastdiv.nn."""

    def make(kind: type[torch.nn.Module]) -> torch.nn.Module:
        parameters = inspect.signature(kind).parameters.values()
        asked_for = {p.name for p in parameters if p.default is p.empty} & ARGUMENTS.keys()
        return kind(**{name: ARGUMENTS[name] for name in asked_for})

    made = {name: make(getattr(fastdiv.nn, name)) for name in fastdiv.nn.__all__}
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    return made | {"CrossEntropyLoss": fastdiv.nn.CrossEntropyLoss(weight)}


def stats() -> fastdiv.Stats:
    x, y = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([1])
    return fastdiv.cross_entropy(x, y, return_stats=True)[1]


@pytest.mark.parametrize("path", PUBLIC)
def test_home(path: str) -> None:
    """A pickle of a public function or class names the module that users import it from."""
    value, (home, _, name) = PUBLIC[path], path.rpartition(".")
    assert (value.__module__, value.__qualname__) == (home, name)
    assert pickle.loads(pickle.dumps(value)) is value
    typing.get_type_hints(value)  # the names in them are found


def private_names(pickled: bytes) -> set[str]:
    """Modules of ours that a pickle names and that are no home of anything."""
    strings = {
        str(argument).split()[0] for _, argument, _ in pickletools.genops(pickled) if argument
    }
    return {s for s in strings if s.startswith("fastdiv.")} - {p.__name__ for p in PACKAGES}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_name_no_file(protocol: int) -> None:
    assert not private_names(pickle.dumps([modules(), stats()], protocol))
    assert private_names(pickle.dumps(fastdiv.nn._set_home, protocol))  # one that does


LOAD = """
import sys, torch
assert "fastdiv" not in sys.modules
loaded, found = torch.load(sys.argv[1], weights_only=False)
import fastdiv
for name, module in loaded.items():
    assert type(module) is getattr(fastdiv.nn, name), name
    print(repr(type(module)))
    print(repr(module))
    print([(key, value.tolist()) for key, value in module.state_dict().items()])
assert type(found) is fastdiv.Stats
print(found)
"""


def test_modules_and_statistics_in_another_process(tmp_path: Path) -> None:
    file, ours, found = tmp_path / "modules.pt", modules(), stats()
    torch.save((ours, found), file)
    done = subprocess.run([sys.executable, "-c", LOAD, file], capture_output=True, text=True)
    expected = io.StringIO()
    for name, module in ours.items():
        print(f"<class 'fastdiv.nn.{name}'>", file=expected)
        print(repr(module), file=expected)
        print([(k, v.tolist()) for k, v in module.state_dict().items()], file=expected)
    print(found, file=expected)
    assert done.stdout == expected.getvalue(), done.stderr


def test_statistics_load_as_weights_only() -> None:
    """Where their class is allowed, under its public name."""
    file = io.BytesIO()
    torch.save(stats(), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"fastdiv\.Stats"):
        torch.load(file, weights_only=True)
    file.seek(0)
    with torch.serialization.safe_globals([fastdiv.Stats]):
        assert torch.load(file, weights_only=True) == stats()


# Everything that fastdiv.nn is made of is imported anew, after the package has bound its functions.
PARTS = ["nn"] + [f"nn.{path.stem}" for path in Path(fastdiv.nn.__file__).parent.glob("[!_]*.py")]
ORDERS = {
    "anew": f"""
for part in {PARTS}:
    del sys.modules["fastdiv." + part]
nn = importlib.import_module("fastdiv.nn")
""",
    "parts first": f"""
for part in {PARTS}:
    del sys.modules["fastdiv." + part]
for part in {PARTS[::-1]}:
    importlib.import_module("fastdiv." + part)
nn = importlib.import_module("fastdiv.nn")
""",
    "reloaded": """
nn = importlib.reload(fastdiv.nn)
""",
    "package reloaded": """
nn = importlib.reload(fastdiv).nn
""",
}
USE = """
x, y = torch.zeros(2, 4), torch.tensor([0, 3])
print(nn.CrossEntropyLoss()(x, y).item())
print(nn.EntropyLoss()(x).item())
print(nn.KLDivLoss(target_type="logits")(x, x + 1).item())
print(nn.LinearCrossEntropyLoss(4, 4)(x, y).item() > 0)
print(nn.LabelSmoothingLoss(4, -1, 0.1)(x[None], y[None]).item())
print({getattr(nn, name).__module__ for name in nn.__all__})
"""


# Every order in a process of its own, forked of one that has imported torch.
FORKS = """
import importlib, os, sys, torch, fastdiv
nn = fastdiv.nn
for order in {orders}:
    print(flush=True)
    if os.fork():
        assert os.wait()[1] == 0, order
    else:
        exec(order + {use!r})
        sys.stdout.flush()
        os._exit(0)
"""


def test_order_of_imports() -> None:
    """The modules work whether or not ``fastdiv.entropy`` is the function already."""
    code = FORKS.format(orders=["", *ORDERS.values()], use=USE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usual, *others = done.stdout.split("\n\n")
    for name, found in zip(ORDERS, others, strict=True):
        assert found.strip() == usual.strip() != "", name


def test_stats_is_a_tuple_of_tensors() -> None:
    assert fastdiv.Stats.__annotations__ == dict.fromkeys(fastdiv.Stats._fields, Tensor)
