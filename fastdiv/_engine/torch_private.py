"""All private names of torch that fastdiv uses, each with its reason and a fallback.

Torch may move or rename them in any release.  Where one is missing, fastdiv still imports and its
results stay right; it only takes more time or memory.  ``tests/test_torch_private.py`` removes each
name in turn, and lists the few private names that other files may use.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])


def _find(module: str, name: str) -> Any:
    """Return the object of this name, or None where this torch has none."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def constant(function: F) -> F:
    """Mark a function that the compiler calls while tracing, and whose result is a constant.

    This does what ``torch.compiler.assume_constant_result`` does, without importing Dynamo, which
    takes a second.  If torch changes the mark, the compiler breaks the graph at the function.
    """
    if "torch._dynamo" in sys.modules:
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# --- transforms -------------------------------------------------------------------------------

_func_is_active = _find("torch._C", "_are_functorch_transforms_active")
_counts_levels = _find("torch.autograd.forward_ad", "_current_level") is not None


def func_is_active() -> bool:
    """Return whether a ``torch.func`` transform is active, so that tensors may have no values.

    There is no public function for it.  Without the private one we assume a transform: every result
    is right under one, at the price of time and memory.
    """
    return True if _func_is_active is None else torch._C._are_functorch_transforms_active()


def is_transformed() -> bool:
    """Return whether a ``torch.func`` transform or forward-mode differentiation is active."""
    if _counts_levels:
        return func_is_active() or forward_ad._current_level >= 0
    return func_is_active() or _is_in_dual_level()


@constant
def _is_in_dual_level() -> bool:
    try:
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:  # no level exists
        return False
    return True


_batched = [
    _find("torch._C._functorch", name) for name in ("is_batchedtensor", "is_legacy_batchedtensor")
]


def is_batched(v: Tensor) -> bool:
    """Return whether ``vmap`` made a batch of this tensor.

    A gradient may be a batch even though no transform is active.

    Without the private functions, a tensor without a data pointer is taken for a batch.
    """
    if None not in _batched:
        return any(test(v) for test in _batched)
    try:
        v.data_ptr()
    except RuntimeError:
        return True
    return False


# A tensor that a finished transform left behind must be unwrapped before C++ sees it.
_unwrap = _find("torch._C._functorch", "unwrap_if_dead")
unwrap_if_dead: Callable[[Tensor], Tensor] = _unwrap or (lambda v: v)


_wraps = _find("torch._C._functorch", "is_functorch_wrapped_tensor")
_unwrapped = _find("torch._C._functorch", "get_unwrapped")


def inside_transforms(v: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of ``torch.func``; ``v`` if we cannot unwrap it."""
    if _wraps is not None and _unwrapped is not None:
        while _wraps(v):
            v = _unwrapped(v)
    return v


def light_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` for calls under no transform, on tensors unwrapped if dead.

    Up to torch 2.13, ``torch.autograd.Function.apply`` binds arguments and unwraps tensors in
    Python, and then calls the ``apply`` of its base class.  That takes 8 of the 90 us of a small
    loss.  Newer versions do it in C++.  Without the base's ``apply`` we call the whole.
    """
    base = getattr(super(torch.autograd.Function, function), "apply", None)
    return function.apply if base is None or _unwrap is None else base


# --- fake tensors, views, tracing and modes ---------------------------------------------------

_FakeTensor = _find("torch._subclasses.fake_tensor", "FakeTensor")


def is_fake(v: Tensor) -> bool:
    """Return whether a tensor has a shape but no values; without the class, by its name."""
    return type(v).__name__ == "FakeTensor" if _FakeTensor is None else isinstance(v, _FakeTensor)


# Arrays have values under FakeTensorMode, too.  Without the private name they count as fake.
without_fake_mode: Callable[[], AbstractContextManager[Any]] = (
    _find("torch._subclasses.fake_tensor", "unset_fake_temporarily") or nullcontext
)


def viewed(v: Tensor) -> Tensor | None:
    """Return the tensor that this one is a view of; None if it is not a view, or unknown."""
    return getattr(v, "_base", None)


def is_jit_traced() -> bool:
    """Return whether ``torch.jit.trace`` records, by a documented function without a stub."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


_has_exporting_flag = _find("torch.compiler", "_is_exporting_flag") is not None


def is_exporting() -> bool:
    """Return whether ``torch.export`` is tracing.

    We read the flag itself, since to the compiler of torch 2.11 ``torch.compiler.is_exporting()``
    is always true.  Without the flag we call that function.
    """
    return (
        torch.compiler._is_exporting_flag if _has_exporting_flag else torch.compiler.is_exporting()
    )


_modes = _find("torch.overrides", "_get_current_function_mode_stack")
_some_mode = _find("torch._C", "_is_torch_function_mode_enabled")
_DeviceContext = _find("torch.utils._device", "DeviceContext")


def function_mode_watches() -> bool:
    """Return whether a ``__torch_function__`` mode may depend on which functions are called.

    The mode of a default device does not: it acts on functions that create tensors.  Without the
    private names we assume that there is such a mode; torch's own function is then called.
    """
    if _modes is None or _some_mode is None or _DeviceContext is None:
        return True
    if not torch._C._is_torch_function_mode_enabled():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return not all(isinstance(mode, _DeviceContext) for mode in modes)


def dispatch_modes() -> list[Any]:
    """Return the active ``__torch_dispatch__`` modes; an empty list if unknown."""
    stack = _find("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack")
    return [] if stack is None else stack()


def parse_to(*args: Any, **options: Any) -> tuple[Any, Any] | None:
    """Return the device and dtype that ``Tensor.to`` would convert to; None if unknown."""
    parse = _find("torch._C._nn", "_parse_to")
    return None if parse is None else tuple(parse(*args, **options)[:2])


def _tree_map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Do what torch's function does for tuples, lists and dictionaries."""
    if isinstance(tree, dict):
        return {key: _tree_map_only(kind, function, value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_tree_map_only(kind, function, value) for value in tree)
    return function(tree) if isinstance(tree, kind) else tree


tree_map_only: Callable[..., Any] = _find("torch.utils._pytree", "tree_map_only") or _tree_map_only


def fill_names_of_dynamo() -> None:
    """Make Dynamo look up now, once for all, the functions that it does not trace into.

    Without the private function, Dynamo may look them up while one of them is replaced.  It then
    traces into the replacement.
    """
    fill = _find("torch._dynamo.trace_rules", "get_torch_obj_rule_map")
    if fill is not None:
        fill()


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: torch.nn.Module) -> list[list[Any]] | None:
    """Return the hooks of a module before its forward, after it, and of its backward.

    Hooks are registered by public functions, but no public function lists them.  None means
    unknown.
    """
    kinds = [getattr(module, kind, None) for kind in _HOOKS]
    if any(kind is None for kind in kinds):
        return None
    before, after, *backward = (list(kind.values()) for kind in kinds if kind is not None)
    return [before, after, [hook for kind in backward for hook in kind]]


# --- weights sharded over data-parallel ranks --------------------------------------------------


class FullyShardedWeight(NamedTuple):
    """Hold what ``fully_shard`` knows of a parameter, and what gathering it takes."""

    parameter: Any  # a DTensor, the leaf whose gradient the optimizer reads
    dim: int  # which dimension is sharded
    shape: torch.Size  # on this rank, once it is gathered; tensor-parallel ranks have parts of it
    device: torch.device  # where it is used; the shard may be on the CPU
    shards: Any  # the process group over which it is sharded; None for one that is replicated
    replicas: Any  # the process group whose ranks have the same shard, or None
    param_dtype: torch.dtype | None  # of the gathered weight; None for its own
    reduce_dtype: torch.dtype | None  # in which gradients are added; None for that of the gradient
    cast_inputs: bool  # whether the module would cast what it is called with to ``param_dtype``
    divisor: float  # of the sum of the ranks' gradients
    mesh: Any  # the data-parallel mesh
    transformed: bool  # whether the shard has all-gather extensions, such as fp8's


# Modules that ``fully_shard`` was called on, with weak references to its state.  The parameter has
# no public sign, and none that leads to the policies.
_states = _find("torch.distributed._composable_state", "_module_state_mapping")


def fully_sharded(weight: Tensor) -> FullyShardedWeight | None:
    """Return what ``fully_shard`` knows of a parameter that is sharded now; None if it is not its.

    Without the private names every weight counts as unknown.  The callers then take it for one of
    a tensor-parallel layer, and compare hidden states between the ranks, which raises an error.
    """
    try:
        for group, known in _records() if _states else ():
            if _is_sharded_form(known, weight):
                return _described(group, known, weight)
    except AttributeError:  # a torch that keeps other records
        return None
    return None


@constant
def may_be_fully_sharded(shape: tuple[int, ...], groups: tuple[str, ...]) -> bool:
    """Return whether ``fully_shard`` has a parameter of this shape, on a mesh of these groups.

    The compiler cannot look for the parameter itself.

    Args:
        shape: The shape of the whole parameter.
        groups: The names of the process groups of its mesh, one for each dimension.
    """
    try:
        sharded = [known.sharded_param for _, known in _records()] if _states else []
        meshes = [v.device_mesh for v in sharded if tuple(v.shape) == shape]
    except AttributeError:
        return False
    return any(tuple(g.group_name for g in m.get_all_groups()) == groups for m in meshes)


# Compiled code cannot walk weak references, not even between its graphs.
_disable: Callable[[F], F] = _find("torch._compile", "_disable_dynamo") or (
    lambda function: function
)


@_disable
def _records() -> list[tuple[Any, Any]]:
    """Return all parameters of ``fully_shard``, each with its group."""
    states = {id(state): state for ref in list(_states.values()) if (state := ref()) is not None}
    records = []
    for state in states.values():
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before torch 2.12 a state has one group, or none
            groups = [group for group in [getattr(state, "_fsdp_param_group", None)] if group]
        records += [(group, known) for group in groups for known in group.fsdp_params]
    return records


def _is_sharded_form(known: Any, weight: Tensor) -> bool:
    if weight is known.sharded_param or _is_parted(known, weight):
        return True
    # A state dict may have put another parameter into the module since.
    home = known._module_info
    registered = getattr(home.module, home.param_name, None)
    return weight is registered and weight is not getattr(known, "_unsharded_param", None)


def _is_parted(known: Any, weight: Tensor) -> bool:
    """Return whether this is a shard over fewer ranks, for the time from forward to backward."""
    return weight is getattr(known, "_sharded_post_forward_param", None)


def _described(group: Any, known: Any, weight: Tensor) -> FullyShardedWeight:
    info, policy = known.mesh_info, group.mp_policy
    shards = getattr(info, "shard_process_group", None)
    replicas = getattr(info, "replicate_process_group", None)
    ranks = math.prod(g.size() for g in (shards, replicas) if g is not None)
    # A shard over fewer ranks is no leaf of the optimizer.
    parameter: Any = known.sharded_param if _is_parted(known, weight) else weight
    return FullyShardedWeight(
        parameter=parameter,
        dim=known.fsdp_placement.dim,
        shape=known._orig_size,
        device=group.device,
        shards=shards,
        replicas=replicas,
        param_dtype=policy.param_dtype,
        reduce_dtype=policy.reduce_dtype,
        cast_inputs=policy.cast_forward_inputs and policy.param_dtype is not None,
        divisor=group.gradient_divide_factor or ranks,
        mesh=info.mesh,
        transformed=hasattr(parameter._local_tensor, "fsdp_pre_all_gather"),
    )


# --- processors -------------------------------------------------------------------------------


def multiplies(half: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices in this half precision; False if unknown."""
    name = "_is_amx_fp16_supported" if half == torch.float16 else "_is_avx512_bf16_supported"
    supported = _find("torch.cpu", name)
    return supported is not None and bool(supported())


def _find_onednn_linear() -> Any:
    schema = (
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
        "str? algorithm) -> Tensor Y"
    )
    try:
        op = torch.ops.mkldnn._linear_pointwise
        known = torch.backends.mkldnn.is_available() and str(op.default._schema) == schema
    except AttributeError:
        return None
    return op if known else None


# ``F.linear`` in oneDNN, or None.  It takes a fifth less time than BLAS for few rows and many
# classes.  Torch calls it only for lower precisions; this operation, made for its compiler, always
# does.  It adds one product after the other, so BLAS is more accurate for sums over the classes.
onednn_linear = _find_onednn_linear()
