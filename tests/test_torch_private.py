"""Private names of torch: in one module, with fallbacks that give the same results."""

import ast
import importlib
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import fastdiv
from fastdiv._engine import torch_private

PACKAGE = Path(fastdiv.__file__).parent
MODULE = Path(torch_private.__file__)

# Names that other files may use, with the reason.
ALLOWED = {
    # The collectives that the compiler can trace.  DTensor rests on these ops and on this look-up.
    ("distributed/world.py", "torch.ops._c10d_functional"),
    ("distributed/world.py", "distributed_c10d._resolve_process_group"),
    # The protocol of tensor subclasses.  Torch's notes on extending it use these very names, and
    # only the integration of Transformers imports the file.
    ("integrations/transformers/logits.py", "Tensor._make_wrapper_subclass"),
    ("integrations/transformers/logits.py", "torch._C.DisableTorchFunctionSubclass"),
    ("integrations/transformers/logits.py", "_version"),
    # It has an underscore, but torch documents it.
    ("_engine/symbolic.py", "torch._check"),
    # Only the benchmark on a GPU calls it.
    ("_bench/timing.py", "torch.cuda._sleep"),
}
OF_TENSORS = {"_version", "_base", "_is_view", "_device_types", "_dynamo_marked_constant"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def dotted(node):
    """The parts of ``a.b.c``; none where it is not only names."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def private_names(source):
    tree = ast.parse(source)
    of_torch, found = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(a.name, a.asname) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(f"{node.module}.{a.name}", a.asname or a.name) for a in node.names]
        else:
            continue
        for name, alias in names:
            first, *rest = name.split(".")
            if first == "torch":
                of_torch.add(alias or "torch")
                if any(map(is_private, rest)):
                    found.add(name)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in attributes}
    for node in attributes:
        parts = dotted(node)
        if node.attr in OF_TENSORS:
            found.add(node.attr)
        elif id(node) not in inner and parts and parts[0] in of_torch:
            if any(map(is_private, parts)):
                found.add(".".join(parts))
    return {name for name in found if not name.startswith("torch.ops.fastdiv.")}


def test_the_search_finds_every_form():
    source = """
import torch._inductor
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode_stack as modes
from torch.autograd import forward_ad
from .torch_private import is_fake
dist._x.y
forward_ad._current_level
torch._C._nn
v._version
torch.ops.fastdiv._row_forward
torch.__version__
"""
    assert private_names(source) == {
        "torch._inductor",
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch.overrides._get_current_function_mode_stack",
        "dist._x.y",
        "forward_ad._current_level",
        "torch._C._nn",
        "_version",
    }


def test_no_other_file_uses_private_names():
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        if path != MODULE
        for name in private_names(path.read_text())
    }
    assert found == ALLOWED


def without(*hidden):
    """The module as it would be with a torch that lacks these names, or these whole modules."""
    assert all("." in name for name in hidden)

    def import_module(name):
        if name in hidden:
            raise ImportError(name)
        module = importlib.import_module(name)
        return SimpleNamespace(
            **{k: v for k, v in vars(module).items() if f"{name}.{k}" not in hidden}
        )

    module = module_from_spec(spec_from_file_location("blinded", MODULE))
    source = MODULE.read_text()
    line = "from importlib import import_module\n"
    assert source.count(line) == 1
    module.import_module = import_module
    exec(compile(source.replace(line, "\n"), str(MODULE), "exec"), vars(module))
    return module


@pytest.fixture(params=["name", "module"])
def lack(request):
    """Hides a name, or the module that has it."""

    def hide(*names):
        if request.param == "module":
            names = {name.rpartition(".")[0] for name in names}
        return without(*names)

    return hide


def test_every_name_is_there():
    """With the torch at hand no fallback is needed; a release that moves a name is noticed."""
    for name, value in vars(torch_private).items():
        if name.startswith("_") and not name.startswith("__"):
            assert value is not None, name
    assert None not in torch_private._batched
    assert (torch_private.onednn_linear is None) != torch.backends.mkldnn.is_available()
    assert importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map


def test_func_is_active(lack):
    blind = lack("torch._C._are_functorch_transforms_active")
    assert blind.func_is_active() and blind.is_transformed()
    assert not torch_private.func_is_active() and not torch_private.is_transformed()
    seen = []

    def look(v):
        seen.append((torch_private.func_is_active(), torch_private.is_transformed()))
        return v.sum()

    torch.func.grad(look)(torch.ones(3))
    torch.vmap(look)(torch.ones(3, 2))
    assert seen == [(True, True)] * 2


def test_dual_levels(lack):
    for module in (torch_private, lack("torch.autograd.forward_ad._current_level")):
        assert not module.is_transformed()
        with forward_ad.dual_level():
            assert module.is_transformed() and not module.func_is_active()
        assert not module.is_transformed()


@pytest.mark.parametrize("name", ["is_batchedtensor", "is_legacy_batchedtensor"])
def test_is_batched(lack, name):
    for module in (torch_private, lack(f"torch._C._functorch.{name}")):
        assert not module.is_batched(torch.ones(3))
        seen = []

        def look(v, module=module, seen=seen):
            seen.append(module.is_batched(v))
            return v

        torch.vmap(look)(torch.ones(3))
        x = torch.ones(3, requires_grad=True)
        y = x * 2
        y.register_hook(look)
        torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
        assert seen == [True, True]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return 2 * v

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_light_apply(lack):
    blind = lack("torch._C._functorch.unwrap_if_dead")
    assert blind.light_apply(Double) == Double.apply
    # In torch 2.14 it is C++ already.
    in_python = isinstance(vars(torch.autograd.Function)["apply"], classmethod)
    assert (torch_private.light_apply(Double) != Double.apply) == in_python
    for module in (torch_private, blind):
        kept = []
        torch.func.grad(lambda v, kept=kept: kept.append(v) or v.sum())(torch.ones(2))
        x = torch.ones(2, requires_grad=True)
        apply = module.light_apply(Double)
        apply(module.unwrap_if_dead(x)).sum().backward()
        assert x.grad.tolist() == [2, 2]
        assert apply(module.unwrap_if_dead(kept[0])).tolist() == [2, 2]


def test_light_apply_of_another_class(monkeypatch):
    """Where the base class of ``Function`` has no ``apply``, it is the public one."""

    class Alone:
        apply = "public"

    monkeypatch.setattr(torch.autograd, "Function", Alone)
    assert torch_private.light_apply(type("Derived", (Alone,), {})) == "public"


def test_is_fake(lack):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for module in (torch_private, lack("torch._subclasses.fake_tensor.FakeTensor")):
        assert not module.is_fake(torch.ones(2))
        with FakeTensorMode():
            assert module.is_fake(torch.ones(2))


def test_is_exporting(lack):
    for module in (torch_private, lack("torch.compiler._is_exporting_flag")):
        assert not module.is_exporting()
        seen = []

        class Look(torch.nn.Module):
            def forward(self, v, seen=seen, module=module):
                seen.append(module.is_exporting())
                return v * 2

        torch.export.export(Look(), (torch.ones(2),), strict=False)
        assert seen and all(seen)


@pytest.mark.parametrize(
    "name",
    [
        "torch.overrides._get_current_function_mode_stack",
        "torch._C._is_torch_function_mode_enabled",
        "torch.utils._device.DeviceContext",
    ],
)
def test_function_mode_watches(lack, name):
    assert lack(name).function_mode_watches()
    assert not torch_private.function_mode_watches()
    with torch.device("cpu"):
        assert not torch_private.function_mode_watches()
        with torch.overrides.BaseTorchFunctionMode():
            assert torch_private.function_mode_watches()


def test_parse_to(lack):
    assert lack("torch._C._nn._parse_to").parse_to(torch.float64) is None
    assert torch_private.parse_to("cpu", torch.float64) == (torch.device("cpu"), torch.float64)
    assert torch_private.parse_to(dtype=torch.float64) == (None, torch.float64)


def test_tree_map_only(lack):
    tree = {"a": [1, "b", (2.0, 3)], "c": None}
    for module in (torch_private, lack("torch.utils._pytree.tree_map_only")):
        assert module.tree_map_only(int, str, tree) == {"a": ["1", "b", (2.0, "3")], "c": None}


def test_fill_names_of_dynamo(lack):
    for module in (torch_private, lack("torch._dynamo.trace_rules.get_torch_obj_rule_map")):
        module.fill_names_of_dynamo()


def test_hooks_of():
    layer = torch.nn.Linear(2, 3)
    assert torch_private.hooks_of(layer) == [[], [], []]

    def hook(*_): ...

    layer.register_forward_pre_hook(hook)
    layer.register_full_backward_pre_hook(hook)
    layer.register_full_backward_hook(hook)
    assert torch_private.hooks_of(layer) == [[hook], [], [hook, hook]]
    vars(layer).pop("_forward_hooks")  # a torch that calls them something else
    assert torch_private.hooks_of(layer) is None


def test_fully_sharded(lack, gloo):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    other = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    assert torch_private.fully_sharded(other) is None
    layer = torch.nn.Linear(2, 3)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(layer, mesh=mesh, mp_policy=policy)
    known = torch_private.fully_sharded(layer.weight)
    assert known.parameter is layer.weight and known.shape == (3, 2) and known.dim == 0
    assert (known.param_dtype, known.reduce_dtype) == (torch.bfloat16, None)
    assert known.cast_inputs and known.divisor == 1 and known.mesh == mesh
    assert torch_private.fully_sharded(layer.bias).shape == (3,)
    of_mesh = (mesh.get_group().group_name,)
    assert torch_private.may_be_fully_sharded((3, 2), of_mesh)
    assert not torch_private.may_be_fully_sharded((4, 2), of_mesh)
    assert not torch_private.may_be_fully_sharded((3, 2), ("another",))
    blind = lack("torch.distributed._composable_state._module_state_mapping")
    for module, weight in ((torch_private, other), (blind, layer.weight)):
        assert module.fully_sharded(weight) is None
    assert not blind.may_be_fully_sharded((3, 2), of_mesh)


@pytest.mark.parametrize("record", ["fsdp_params", "mp_policy"])
def test_fully_sharded_with_other_records(record, gloo, monkeypatch):
    """A torch that keeps something else of its parameters: the weight counts as unknown."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = fully_shard(torch.nn.Linear(2, 3), mesh=init_device_mesh("cpu", (1,)))
    ((group, _), *_) = [r for r in torch_private._records() if r[1].sharded_param is layer.weight]
    monkeypatch.delattr(group, record)
    assert torch_private.fully_sharded(layer.weight) is None


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_multiplies(lack, half):
    name = "_is_amx_fp16_supported" if half == torch.float16 else "_is_avx512_bf16_supported"
    assert torch_private.multiplies(half) == getattr(torch.cpu, name)()
    assert lack(f"torch.cpu.{name}").multiplies(half) is False


def test_constant_is_what_torch_marks():
    def ours():
        return 1

    def torchs():
        return 1

    torch.compiler.assume_constant_result(torchs)
    torch_private.constant(ours)
    assert vars(ours) == vars(torchs)
    code = f"import sys; sys.path[:0] = {[str(MODULE.parent)]!r}\n" + (
        "import torch, torch_private\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "def f(): pass\n"
        "torch_private.constant(f)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "print(vars(f))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == str(vars(torchs)), output.stderr


# All of the package without any private name: same values, derivatives and transforms.
PROGRAM = """
import importlib
import torch

original = importlib.import_module
names = {names!r}


def import_module(name, package=None):
    if package is None and name in {{n.rpartition(".")[0] for n in names}}:
        raise ImportError(name)
    return original(name, package)


importlib.import_module = import_module
import fastdiv
from fastdiv._engine import torch_private
importlib.import_module = original
assert torch_private._unwrap is None and torch_private.func_is_active()

torch.manual_seed(0)
x, t, v = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
y = torch.tensor([0, 4, -100])
hidden, weight = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True)


def results(cross_entropy):
    yield from torch.autograd.grad(cross_entropy(x, y), x)
    value = fastdiv.kl_div(x, t, target_type="logits", reduction="batchmean")
    gradients = torch.autograd.grad(value, (x, t), create_graph=True)
    yield value, *gradients
    yield torch.autograd.grad((gradients[0] * v).sum(), (x, t))
    yield torch.func.vmap(lambda a: fastdiv.entropy(a, reduction="none"))(x)
    yield torch.func.jvp(lambda a: fastdiv.kl_div(a, t, target_type="logits"), (x,), (v,))
    rows = fastdiv.entropy(x, reduction="none")
    yield torch.autograd.grad(rows, x, torch.eye(3, dtype=torch.float64), is_grads_batched=True)
    yield torch.autograd.grad(fastdiv.linear_cross_entropy(hidden, weight, y), (hidden, weight))


got = list(results(fastdiv.cross_entropy))
with fastdiv.backend("reference"):
    expected = list(results(fastdiv.cross_entropy))
torch.testing.assert_close(got, expected)
with fastdiv.patch_torch():
    torch.testing.assert_close(next(results(torch.nn.functional.cross_entropy)), expected[0])
print("same")
"""


def test_the_package_without_any_of_them():
    names = (
        "torch._C._are_functorch_transforms_active",
        "torch.autograd.forward_ad._current_level",
        "torch._C._functorch.unwrap_if_dead",
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch.compiler._is_exporting_flag",
        "torch.overrides._get_current_function_mode_stack",
        "torch.utils._device.DeviceContext",
        "torch.utils._pytree.tree_map_only",
        "torch._C._nn._parse_to",
        "torch.distributed._composable_state._module_state_mapping",
        "torch._compile._disable_dynamo",
    )
    command = [sys.executable, "-c", PROGRAM.format(names=names)]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.stdout == "same\n", output.stderr
