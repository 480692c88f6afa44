"""Divergences of the logits of a linear layer, computed a tile at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._engine import arguments
from .._engine.dtensor import dispatch_dtensor
from .._engine.masks import mask_rows
from .._losses.divergence import js_loss
from ..reference import Spec
from ..reference.choices import Accumulate, Reduction, TargetType
from .head import as_rows, check_target, checked_head, loss_of_head


def _linear_divergence(
    loss: str,
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, str | None, Tensor | None, Tensor | None],
    *,
    reduction: str,
    temperature: float | Tensor,
    token_weight: Tensor | None,
    class_mask: Tensor | None,
    chunk_size: int | None,
    accumulate: Accumulate | None,
    logits_dtype: torch.dtype | None,
    param: float = 0.0,
) -> Tensor:
    """Compute a loss of layers ``(input, weight, bias)`` and ``(target, type, weight, bias)``."""
    head = checked_head(*student)
    logits = head.logits
    arguments.check_reduction(reduction)
    target_type, target = check_teacher(logits, *teacher)
    dim = logits.dim() - 1
    number, scale = arguments.scales(logits, dim, temperature)
    spec = Spec(
        loss=loss,
        target_type=target_type,
        reduction=reduction,
        batch=logits.shape[0],
        scale=number,
        param=param,
    )
    value, _ = loss_of_head(
        spec,
        head,
        target,
        row_weight=arguments.token_weights(logits, dim, token_weight),
        scale=scale,
        mask=mask_rows(logits, dim, class_mask),
        chunk_size=chunk_size,
        accumulate=accumulate,
        logits_dtype=logits_dtype,
    )
    return value


def check_teacher(
    logits: Tensor,
    target: Tensor,
    target_type: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[str, tuple[Tensor, Tensor | None, Tensor | None]]:
    """Check the target; return its type, and its rows with the weight and bias of its layer."""
    if weight is None:
        if bias is not None:
            raise ValueError("target_linear_bias needs a target_linear_weight")
        target_type = arguments.check_target_type(target_type)
        check_target(logits, target)
        return target_type, (as_rows(target), None, None)
    if target_type not in (None, "logits"):
        raise ValueError(
            "target_type must be 'logits' or None if target_linear_weight is given, got "
            f"{target_type!r}"
        )
    head = checked_head(target, weight, bias, "target", "target_")
    check_target(logits, head.logits)
    return "logits", head.tensors


@dispatch_dtensor
def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    target_type: TargetType | None = None,
    target_linear_weight: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Compute the KL divergence of the logits of a linear layer, a tile at a time.

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_c p_c (\log p_c - \log q_c),
        \qquad q = \mathrm{softmax}\bigl((h\,W^\top + b) / T\bigr)

    This is :func:`fastdiv.kl_div` of ``F.linear(input, linear_weight, linear_bias)``, in memory for
    a part of the logits at a time.  With ``target_linear_weight`` the target holds the teacher's
    hidden states.  Its logits are not held either, and its width may differ.

    Args:
        input: Hidden states :math:`h`, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        linear_weight: Weight :math:`W` of the layer, shape ``(C, H)``, in the dtype of ``input``.
        target: The teacher's rows, shape ``(..., C)``, or with ``target_linear_weight`` its hidden
            states, shape ``(..., K)``.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.  Required
            unless it holds hidden states.
        target_linear_weight: The teacher's weight, shape ``(C, K)``, in the dtype of ``target``.
        target_linear_bias: The teacher's bias, shape ``(C,)``.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, shape ``(...)``.  They multiply the loss and, in a mean,
            the denominator.  Rows of weight 0 do not count, whatever they hold.  On a CPU their
            logits are not computed.
        class_mask: True for the classes that take part: bool, broadcastable to ``(..., C)``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))``, where class :math:`c` is bit ``c % 8``
            of byte ``c // 8``.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        accumulate: Which gradient is summed over the tiles.  ``"weight"`` takes chunks of rows and
            three matrix products, for any reduction but ``"none"``.  In half precision it holds a
            float32 sum of the weight's size, :math:`4 C H` bytes, until the backward.  ``"rows"``
            takes blocks of classes and four products, without that sum.  None takes ``"weight"``
            where it needs no such sum, or one of at most 1/24 of all logits and 32 MB (256 MB
            on a GPU); else ``"rows"``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.

    Returns:
        The divergence in nats, float32 (float64 if input or target is).  Hidden states, weights of
        layers, biases and target get a gradient if they require one.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, or a weight or an option
            requires a gradient.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.tensor([[1.0, 2.0]]), torch.eye(3, 2)
        >>> g, v = torch.tensor([[1.0]]), torch.tensor([[3.0], [1.0], [0.0]])
        >>> fastdiv.linear_kl_div(h, w, g, target_linear_weight=v)
        tensor(0.8112)

    Source: :func:`fastdiv.kl_div`.
    """
    student = (input, linear_weight, linear_bias)
    teacher = (target, target_type, target_linear_weight, target_linear_bias)
    return _linear_divergence(
        "kl_div",
        student,
        teacher,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        chunk_size=chunk_size,
        accumulate=accumulate,
        logits_dtype=logits_dtype,
    )


@dispatch_dtensor
def linear_reverse_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    target_type: TargetType | None = None,
    target_linear_weight: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Compute the reverse KL divergence of the logits of a linear layer, a tile at a time.

    .. math:: \mathrm{KL}(q \,\|\, p) = \sum_c q_c (\log q_c - \log p_c),
        \qquad q = \mathrm{softmax}\bigl((h\,W^\top + b) / T\bigr)

    This is :func:`fastdiv.reverse_kl_div` of ``F.linear(input, linear_weight, linear_bias)``, in
    memory for a part of the logits at a time.  With ``target_linear_weight`` the target holds the
    teacher's hidden states.  Its logits are not held either, and its width may differ.

    Args:
        input: Hidden states :math:`h`, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        linear_weight: Weight :math:`W` of the layer, shape ``(C, H)``, in the dtype of ``input``.
        target: The teacher's rows, shape ``(..., C)``, or with ``target_linear_weight`` its hidden
            states, shape ``(..., K)``.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.  Required
            unless it holds hidden states.
        target_linear_weight: The teacher's weight, shape ``(C, K)``, in the dtype of ``target``.
        target_linear_bias: The teacher's bias, shape ``(C,)``.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, shape ``(...)``.  They multiply the loss and, in a mean,
            the denominator.  Rows of weight 0 do not count, whatever they hold.  On a CPU their
            logits are not computed.
        class_mask: True for the classes that take part: bool, broadcastable to ``(..., C)``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))``, where class :math:`c` is bit ``c % 8``
            of byte ``c // 8``.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        accumulate: Which gradient is summed over the tiles.  ``"weight"`` takes chunks of rows and
            three matrix products, for any reduction but ``"none"``.  In half precision it holds a
            float32 sum of the weight's size, :math:`4 C H` bytes, until the backward.  ``"rows"``
            takes blocks of classes and four products, without that sum.  None takes ``"weight"``
            where it needs no such sum, or one of at most 1/24 of all logits and 32 MB (256 MB
            on a GPU); else ``"rows"``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.

    Returns:
        The divergence in nats, float32 (float64 if input or target is).  Hidden states, weights of
        layers, biases and target get a gradient if they require one.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, or a weight or an option
            requires a gradient.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.tensor([[1.0, 2.0]]), torch.eye(3, 2)
        >>> t = torch.tensor([[3.0, 1.0, 0.0]])
        >>> fastdiv.linear_reverse_kl_div(h, w, t, target_type="logits")
        tensor(0.9380)

    Source: :func:`fastdiv.reverse_kl_div`.
    """
    student = (input, linear_weight, linear_bias)
    teacher = (target, target_type, target_linear_weight, target_linear_bias)
    return _linear_divergence(
        "reverse_kl_div",
        student,
        teacher,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        chunk_size=chunk_size,
        accumulate=accumulate,
        logits_dtype=logits_dtype,
    )


@dispatch_dtensor
def linear_js_div(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    target_type: TargetType | None = None,
    beta: float = 0.5,
    target_linear_weight: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    chunk_size: int | None = None,
    accumulate: Accumulate | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Compute the Jensen-Shannon divergence of the logits of a linear layer, a tile at a time.

    .. math::
        \mathrm{JS}_\beta = \beta\,\mathrm{KL}(p \,\|\, m) + (1 - \beta)\,\mathrm{KL}(q \,\|\, m),
        \qquad m = \beta\,p + (1 - \beta)\,q

    This is :func:`fastdiv.js_div` of ``F.linear(input, linear_weight, linear_bias)``, in memory for
    a part of the logits at a time.  With ``target_linear_weight`` the target holds the teacher's
    hidden states.  Its logits are not held either, and its width may differ.

    Args:
        input: Hidden states :math:`h`, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        linear_weight: Weight :math:`W` of the layer, shape ``(C, H)``, in the dtype of ``input``.
        target: The teacher's rows, shape ``(..., C)``, or with ``target_linear_weight`` its hidden
            states, shape ``(..., K)``.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.  Required
            unless it holds hidden states.
        beta: :math:`\beta` in [0, 1], the share of the target in the mixture.
        target_linear_weight: The teacher's weight, shape ``(C, K)``, in the dtype of ``target``.
        target_linear_bias: The teacher's bias, shape ``(C,)``.
        linear_bias: Bias :math:`b` of the layer, shape ``(C,)``.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, shape ``(...)``.  They multiply the loss and, in a mean,
            the denominator.  Rows of weight 0 do not count, whatever they hold.  On a CPU their
            logits are not computed.
        class_mask: True for the classes that take part: bool, broadcastable to ``(..., C)``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))``, where class :math:`c` is bit ``c % 8``
            of byte ``c // 8``.
        chunk_size: Rows whose logits are held at a time; by default 256, or as many as take a tenth
            of the memory of all logits if those are more.
        accumulate: Which gradient is summed over the tiles.  ``"weight"`` takes chunks of rows and
            three matrix products, for any reduction but ``"none"``.  In half precision it holds a
            float32 sum of the weight's size, :math:`4 C H` bytes, until the backward.  ``"rows"``
            takes blocks of classes and four products, without that sum.  None takes ``"weight"``
            where it needs no such sum, or one of at most 1/24 of all logits and 32 MB (256 MB
            on a GPU); else ``"rows"``.
        logits_dtype: ``torch.float32`` keeps logits of layers in half precision as the float32 sums
            that they are.  Their gradient is rounded only for the products that follow.  None
            rounds logits to the dtype of the layer, where the device multiplies in it.

    Returns:
        The divergence in nats, float32 (float64 if input or target is).  Hidden states, weights of
        layers, biases and target get a gradient if they require one.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, the tensors of a layer differ in
            dtype, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, or a weight or an option
            requires a gradient.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> h, w = torch.tensor([[1.0, 2.0]]), torch.eye(3, 2)
        >>> t = torch.tensor([[3.0, 1.0, 0.0]])
        >>> fastdiv.linear_js_div(h, w, t, target_type="logits")
        tensor(0.1994)

    Source: :func:`fastdiv.js_div`.
    """
    loss, beta = js_loss(beta)
    student = (input, linear_weight, linear_bias)
    teacher = (target, target_type, target_linear_weight, target_linear_bias)
    return _linear_divergence(
        loss,
        student,
        teacher,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        chunk_size=chunk_size,
        accumulate=accumulate,
        logits_dtype=logits_dtype,
        param=beta,
    )
