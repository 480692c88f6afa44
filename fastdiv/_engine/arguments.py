"""Checks of the arguments of public functions, and tensors of any shape as rows."""

from __future__ import annotations

import math
import operator
import os
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..reference import value_dtype
from ..reference.choices import DivergenceReduction, Reduction, TargetType, check_choice
from .backend import use_kernel
from .recording import of_constant_size
from .symbolic import is_true, log, same_shape, term
from .torch_private import func_is_active, is_fake

PLAIN = {Tensor, Parameter}  # torch's own types, which have no rules of their own
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.int64, torch.int32, torch.uint8)
TARGET_TYPES = get_args(TargetType)
REDUCTIONS, DIVERGENCE_REDUCTIONS = get_args(Reduction), get_args(DivergenceReduction)
NUMBERS = (float, int, torch.SymFloat, torch.SymInt)
NO_LABEL_IGNORED = -(2**63)  # an ignore_index that no label equals


def check_tensor(v: Tensor, name: str) -> None:
    """Check for a dense tensor that is not quantized."""
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(v).__name__}")
    if v.is_nested:
        raise TypeError(
            f"{name} must be a dense Tensor, got a nested one of layout {v.layout}: pass its "
            "values(), or torch.nested.to_padded_tensor() of it with padding that is ignored"
        )
    if v.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense Tensor, got layout {v.layout}: call to_dense()")
    if v.is_quantized:
        raise TypeError(f"{name} must not be quantized, got {v.dtype}: call dequantize()")


def check_logits(x: Tensor, name: str = "input") -> None:
    """Check for a dense tensor in a floating dtype that the kernels support."""
    check_tensor(x, name)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be of dtype float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")


def are_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether these are torch's own strided tensors on one device; only x is required."""
    return x is not None and all(
        type(v) in PLAIN and v.layout is torch.strided and not v.is_nested and v.device == x.device
        for v in (x, *others)
        if v is not None
    )


def class_dim(x: Tensor, dim: int) -> int:
    """Return ``dim`` counted from 0; check that there are classes along it."""
    dims = x.dim()
    if not -dims <= dim < dims:
        raise IndexError(f"dim {dim} is out of range for input of shape {tuple(x.shape)}")
    dim %= dims
    if x.size(dim) == 0:
        raise ValueError(f"input of shape {tuple(x.shape)} has no classes along dim {dim}")
    return dim


def check_reduction(reduction: str, pointwise: bool = False) -> None:
    """Check the reduction; ``"pointwise"`` is for losses that are a sum over the classes."""
    check_choice(reduction, DIVERGENCE_REDUCTIONS if pointwise else REDUCTIONS, "reduction")


def check_target_type(value: str | None, name: str = "target_type") -> str:
    """Check the word for what rows of the target hold."""
    check_choice(value, TARGET_TYPES, name)
    assert value is not None
    return value


def is_number(value: Any) -> bool:
    """Return whether this is a Python int or float; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: float, name: str) -> float:
    """Check for one real number that requires no gradient."""
    if type(value) in NUMBERS:
        return value
    if isinstance(value, Tensor) and wants_gradient(value):
        raise ValueError(f"{name} gets no gradient: pass {name}.detach(), or a Python number")
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        raise ValueError(f"{name} must be one number, got {type(value).__name__} of shape {shape}")
    kind = str(getattr(value, "dtype", type(value).__name__))
    if kind in ("bool", "torch.bool") or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def wants_gradient(v: Tensor) -> bool:
    """Return whether this tensor is differentiated, in reverse or in forward mode."""
    if v.requires_grad or torch.compiler.is_compiling():
        return v.requires_grad
    return forward_ad.unpack_dual(v).tangent is not None


def check_positive(value: float, name: str) -> float:
    """Check for a positive finite number."""
    value = number(value, name)
    if not (0 < value < math.inf):
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return float(value)


def scale_of(temperature: float) -> float:
    """Return the factor of logits at this temperature, after a check."""
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        raise ValueError(
            f"temperature must be one number, got Tensor of shape {tuple(temperature.shape)}: only "
            "losses of whole rows of logits take one for each row"
        )
    return 1.0 / term(check_positive(temperature, "temperature"))


def scales(x: Tensor, dim: int, temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """Return the factor of all logits, or 1 and one for each row of x if they are in a tensor.

    The bits do not depend on which of both it is.  A temperature that is not positive and finite
    raises on a CPU.  Elsewhere it makes its rows NaN.
    """
    if not isinstance(temperature, Tensor):
        return scale_of(temperature), None
    check_tensor(temperature, "temperature")
    if temperature.dtype not in FLOATS:
        raise TypeError(
            "temperature must be a number or a Tensor of dtype float32, bfloat16, float16 or "
            f"float64, got {temperature.dtype}"
        )
    rows = row_shape(x, dim)
    if not (one := is_true(temperature.numel() == 1)):
        if not same_shape(temperature.shape, rows):
            raise ValueError(
                "temperature must be one number, or have the shape of input without its class "
                f"dimension {dim}, {rows}, got {tuple(temperature.shape)}"
            )
        same_device(x, temperature, "temperature")
    if values_may_be_read(temperature):
        check_temperatures(temperature)
    t = temperature.to(x.device, torch.float64)
    scale = torch.where((t > 0) & (t < math.inf), 1 / t, math.nan).to(value_dtype(x.dtype))
    scale = scale.reshape(1).expand(row_count(x, dim)) if one else scale.reshape(-1)
    return 1.0, scale.contiguous()


def check_temperatures(v: Tensor) -> None:
    """Raise ValueError for a temperature that is not positive and finite."""
    wrong = ~((v > 0) & (v < math.inf))  # so is a NaN
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        where = f" at {list(place)}" if place else ""
        raise ValueError(
            f"temperature must be a positive finite number, got {float(v[place])}{where}"
        )


def cap_of(softcap: float | None) -> float:
    """Return the cap of a spec, which is 0 without one, after a check."""
    return 0.0 if softcap is None else check_positive(softcap, "softcap")


def check_finite(value: float, name: str) -> float:
    """Check for a finite number."""
    value = number(value, name)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_share(value: float, name: str) -> float:
    """Check for a number in [0, 1]."""
    value = number(value, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
    return float(value)


def log_of_base(base: float | None) -> float | Tensor:
    """Return the logarithm of the base, which converts nats; 1 for None."""
    if base is None:
        return 1.0
    base = check_positive(base, "base")
    if base == 1.0:
        raise ValueError("base must not be 1")
    return log(base)


def check_ignored(ignore_index: int, name: str = "ignore_index") -> int:
    """Check for an integer, in or out of the range of the classes."""
    if type(ignore_index) in (int, torch.SymInt):
        return ignore_index
    try:
        if not isinstance(ignore_index, bool):
            return operator.index(ignore_index)
    except TypeError:
        pass
    raise TypeError(
        f"{name} must be an int, got {ignore_index!r}: to ignore no label, pass a number out of "
        "range, such as -100"
    )


def same_device(x: Tensor, other: Tensor, name: str) -> None:
    """Check that both are on one device."""
    if other.device != x.device:
        raise RuntimeError(f"{name} is on {other.device}, but input is on {x.device}")


def as_rows(x: Tensor, dim: int) -> Tensor:
    """Return a matrix with the classes last and contiguous, as a view if possible."""
    x = of_constant_size(x, dim)
    if dim != 1 or x.dim() != 2:
        x = x.movedim(dim, -1)
        x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1 and x.size(1) != 1:
        x = x.contiguous()
    return x


def same_dtype(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to their promoted dtype, which sets the dtype of the loss and its weights."""
    if x.dtype is target.dtype:
        return x, target
    dtype = torch.promote_types(x.dtype, target.dtype)
    return x.to(dtype), target.to(dtype)


def same_rows(x: Tensor, target: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return input and target as matrices, after a check of shape and device."""
    if not same_shape(target.shape, x.shape):
        raise ValueError(
            f"target must have the shape of input, {tuple(x.shape)}, got {tuple(target.shape)}"
        )
    same_device(x, target, "target")
    return as_rows(x, dim), as_rows(target, dim)


def row_count(x: Tensor, dim: int) -> int:
    """Return the number of rows."""
    return math.prod(row_shape(x, dim))


def row_shape(x: Tensor, dim: int) -> tuple[int, ...]:
    """Return the shape without the classes."""
    return (*x.shape[:dim], *x.shape[dim + 1 :])


def as_input(value: Tensor, x: Tensor, dim: int) -> Tensor:
    """Reshape one value per row to the shape of input without its classes."""
    return value if x.dim() == 2 else value.reshape(row_shape(x, dim))


def row_vector(x: Tensor, dim: int, v: Tensor, name: str) -> Tensor:
    """Return a tensor with one entry per row of x as a contiguous vector."""
    if not same_shape(v.shape, row_shape(x, dim)):
        raise ValueError(
            f"{name} must have the shape of input without its class dimension {dim}, "
            f"{row_shape(x, dim)}, got {tuple(v.shape)}"
        )
    same_device(x, v, name)
    return v if v.dim() == 1 and v.is_contiguous() else v.reshape(-1).contiguous()


def weight_vector(x: Tensor, v: Tensor, name: str) -> Tensor:
    """Check a weight, which gets no gradient, and cast it to the dtype of the loss."""
    check_tensor(v, name)
    if not (v.is_floating_point() or v.dtype in LABELS or v.dtype == torch.bool):
        raise TypeError(f"{name} must be a real Tensor, got {v.dtype}")
    if wants_gradient(v):
        raise ValueError(
            f"{name} gets no gradient: detach it, or use reduction='none' and multiply the result"
        )
    return v.to(value_dtype(x.dtype))


def token_weights(x: Tensor, dim: int, v: Tensor | None) -> Tensor | None:
    """Check the weights of the rows."""
    if v is None:
        return None
    return row_vector(x, dim, weight_vector(x, v, "token_weight"), "token_weight")


def class_weights(x: Tensor, classes: int, v: Tensor | None) -> Tensor | None:
    """Check the weights of the classes."""
    if v is None:
        return None
    v = weight_vector(x, v, "weight")
    if v.shape != (classes,):
        raise ValueError(
            f"weight must have shape ({classes},), one for each class, got {tuple(v.shape)}"
        )
    same_device(x, v, "weight")
    return v.contiguous()


def check_label_type(y: Tensor, name: str) -> None:
    """Check for a dense tensor of class indices."""
    check_tensor(y, name)
    if y.dtype not in LABELS:
        raise TypeError(f"{name} must hold int64, int32 or uint8 class indices, got {y.dtype}")


def labels(x: Tensor, dim: int, y: Tensor, name: str, ignore_index: int | None) -> Tensor:
    """Check class indices, and return them as an int64 vector.

    The CPU kernels check the range.  Elsewhere a label out of range makes its row NaN.  With
    ``FASTDIV_CHECK=1`` it raises, at the price of a synchronisation.
    """
    check_label_type(y, name)
    y = row_vector(x, dim, y, name)
    if y.dtype is not torch.int64:
        y = y.to(torch.int64)
    checked_by_kernel = x.is_cpu and use_kernel(x)
    if not checked_by_kernel and values_may_be_read(x):
        check_labels(y, x.shape[dim], name, ignore_index)
    return y


def values_may_be_read(v: Tensor) -> bool:
    """Return whether values exist and may be read: on the CPU, or with ``FASTDIV_CHECK=1``."""
    return values_exist(v) and (v.is_cpu or os.environ.get("FASTDIV_CHECK") == "1")


def values_exist(v: Tensor) -> bool:
    """Return whether values exist: not in compiled or transformed code, nor in fake tensors."""
    if torch.compiler.is_compiling() or func_is_active() or v.is_meta:
        return False
    return not is_fake(v.detach())  # under FakeTensorMode, a real tensor's alias is fake


def out_of_range(y: Tensor, classes: int) -> Tensor:
    """Return a mask of the indices out of range."""
    return (y < 0) | (y >= classes)


def check_labels(y: Tensor, classes: int, name: str, ignore_index: int | None) -> None:
    """Raise IndexError for a label out of range."""
    wrong = out_of_range(y, classes)
    if ignore_index is not None:
        wrong &= y != ignore_index
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        ignored = "" if ignore_index is None else f" (ignore_index is {ignore_index})"
        raise IndexError(f"{name}[{i}] is {int(y[i])}, out of range for {classes} classes{ignored}")
