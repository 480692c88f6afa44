r"""Kullback-Leibler divergences, and the function that computes every divergence.

:math:`q = \mathrm{softmax}(x / T)` is the distribution of the input (the student) and :math:`p`
that of the target (the teacher).
"""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss
from .._engine.dtensor import dispatch_dtensor
from .._engine.in_place import check_in_place
from .._engine.masks import mask_rows
from .._engine.remember import remember_checks
from ..reference import Spec
from ..reference.choices import DivergenceReduction, TargetType


def divergence_of_rows(
    loss: str,
    input: Tensor,
    target: Tensor,
    *,
    target_type: str,
    dim: int,
    reduction: str,
    temperature: float | Tensor,
    token_weight: Tensor | None,
    class_mask: Tensor | None,
    inplace_backward: bool,
    param: float = 0.0,
) -> Tensor:
    """Check the arguments that all divergences have, and compute the one called ``loss``."""
    arguments.check_logits(input)
    arguments.check_logits(target, "target")
    arguments.check_target_type(target_type)
    dim = arguments.class_dim(input, dim)
    arguments.check_reduction(reduction, pointwise=True)
    given = (input, target)
    input, target = arguments.same_dtype(input, target)
    row_weight = None if token_weight is None else arguments.token_weights(input, dim, token_weight)
    x, t = arguments.same_rows(input, target, dim)
    mask = mask_rows(input, dim, class_mask)
    number, scale = arguments.scales(input, dim, temperature)
    if inplace_backward:
        check_in_place(
            given[0],
            target=given[1],
            token_weight=token_weight,
            class_mask=class_mask,
            temperature=temperature if isinstance(temperature, Tensor) else None,
        )
    spec = Spec(
        loss=loss,
        target_type=target_type,
        reduction=reduction,
        batch=input.shape[0],
        scale=number,
        param=param,
        inplace=inplace_backward,
    )
    value = row_loss(spec, x, t, row_weight=row_weight, scale=scale, mask=mask)
    if reduction == "pointwise":
        moved = input.movedim(dim, -1)
        return value.reshape(moved.shape).movedim(-1, dim)
    return arguments.as_input(value, input, dim) if reduction == "none" else value


def js_loss(beta: float) -> tuple[str, float]:
    """Return the name of the loss for this beta, and beta after its check."""
    beta = arguments.check_share(beta, "beta")
    # A dictionary would make the compiler take every beta for a constant.
    return "kl_div" if beta == 0 else "reverse_kl_div" if beta == 1 else "js_div", beta


@remember_checks
@dispatch_dtensor
def kl_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the Kullback-Leibler divergence of the input's distribution from the target's.

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_c p_c \,(\log p_c - \log q_c)

    This is ``F.kl_div(F.log_softmax(input, dim), target)`` in one pass, with
    :math:`q = \mathrm{softmax}(x / T)` of the input and :math:`p` of the target.  A class at
    :math:`-\infty` on both sides adds nothing.  Teacher mass where the student has none gives
    :math:`+\infty` with a finite gradient.  Between two rows of logits the value is never negative,
    and stays accurate next to 0.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: The teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets a
            gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The divergence in nats, float32 (float64 if input or target is).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.kl_div(x, t, target_type="logits")
        tensor(0.0389)
        >>> fastdiv.kl_div(x, t.softmax(-1), target_type="probs", reduction="pointwise")
        tensor([[-0.0635,  0.0116,  0.1097, -0.0190]])

    Source: :func:`torch.nn.functional.kl_div`; Kullback and Leibler, *On Information and
    Sufficiency* (1951); as a distillation loss: Hinton et al. (2015).
    """
    return divergence_of_rows(
        "kl_div",
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        inplace_backward=inplace_backward,
    )


@remember_checks
@dispatch_dtensor
def reverse_kl_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the Kullback-Leibler divergence of the target's distribution from the input's.

    .. math:: \mathrm{KL}(q \,\|\, p) = \sum_c q_c \,(\log q_c - \log p_c)

    This is the mode-seeking direction: student mass where the teacher has none costs
    :math:`+\infty`.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: The teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets a
            gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The divergence in nats, float32 (float64 if input or target is).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.reverse_kl_div(x, t, target_type="logits")
        tensor(0.0390)

    Source: Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models* (2024).
    """
    return divergence_of_rows(
        "reverse_kl_div",
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        inplace_backward=inplace_backward,
    )


@remember_checks
@dispatch_dtensor
def js_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    beta: float = 0.5,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the generalised Jensen-Shannon divergence of input and target.

    .. math::
        \mathrm{JS}_\beta = \beta\,\mathrm{KL}(p \,\|\, m) + (1 - \beta)\,\mathrm{KL}(q \,\|\, m),
        \qquad m = \beta\,p + (1 - \beta)\,q

    ``beta=0.5`` is the symmetric one, in [0, ln 2].  ``beta=0`` and ``beta=1`` are
    :math:`\mathrm{KL}(p \| q)` and :math:`\mathrm{KL}(q \| p)`, as GKD defines them.  The formula
    itself tends to 0 there, so the value jumps at the two ends.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: The teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets a
            gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        beta: :math:`\beta` in [0, 1], the share of the target in the mixture.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The divergence in nats, float32 (float64 if input or target is).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.js_div(x, t, target_type="logits")
        tensor(0.0097)

    Source: Agarwal et al., *On-Policy Distillation of Language Models* (GKD, 2024); Lin,
    *Divergence Measures Based on the Shannon Entropy* (1991).
    """
    loss, beta = js_loss(beta)
    return divergence_of_rows(
        loss,
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        inplace_backward=inplace_backward,
        param=beta,
    )


@remember_checks
@dispatch_dtensor
def skew_kl_div(
    input: Tensor,
    target: Tensor,
    *,
    target_type: TargetType,
    skew: float = 0.1,
    reverse: bool = False,
    dim: int = -1,
    reduction: DivergenceReduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the Kullback-Leibler divergence from a mixture of both distributions.

    .. math::
        \mathrm{KL}(p \,\|\, \lambda p + (1 - \lambda) q), \qquad
        \text{reversed: } \mathrm{KL}(q \,\|\, \lambda q + (1 - \lambda) p)

    The value is in :math:`[0, -\ln\lambda]`, since the mixture has mass in every class; the
    gradient is bounded, too.  ``skew=0`` is :func:`kl_div` or :func:`reverse_kl_div`, the limits
    where these are finite.  ``skew=1`` is 0.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: The teacher's rows, of the shape of ``input`` and any of its dtypes.  It gets a
            gradient if it requires one.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        skew: :math:`\lambda` in [0, 1], the share of the first distribution in the mixture.
        reverse: Compute the reversed divergence.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  The value is
            not multiplied by :math:`T^2`; the modules of :mod:`fastdiv.nn` have a flag for that.
            A tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The divergence in nats, float32 (float64 if input or target is).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[-0.1, 0.2, -0.4, 0.3]])
        >>> t = torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
        >>> fastdiv.skew_kl_div(x, t, target_type="logits")
        tensor(0.0314)
        >>> fastdiv.skew_kl_div(x, t, target_type="logits", reverse=True)
        tensor(0.0314)

    Source: Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*
    (2024); Lee, *Measures of Distributional Similarity* (1999).
    """
    skew = arguments.check_share(skew, "skew")
    loss = ("reverse_" if reverse else "") + ("skew_kl_div" if skew != 0 else "kl_div")
    return divergence_of_rows(
        loss,
        input,
        target,
        target_type=target_type,
        dim=dim,
        reduction=reduction,
        temperature=temperature,
        token_weight=token_weight,
        class_mask=class_mask,
        inplace_backward=inplace_backward,
        param=skew,
    )
