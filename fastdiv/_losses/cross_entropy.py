"""The cross entropy of logits, and the check of its options."""

from __future__ import annotations

from typing import Literal, get_args, overload

from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss, row_loss_and_stats
from .._engine.dtensor import dispatch_dtensor
from .._engine.in_place import check_in_place
from .._engine.masks import mask_rows
from .._engine.recording import size_of
from .._engine.remember import remember_checks
from .._engine.symbolic import term
from ..reference import Spec, Stats
from ..reference.choices import Reduction, Smoothing, TokenWeight, check_choice

SMOOTHINGS, TOKEN_WEIGHTS = get_args(Smoothing), get_args(TokenWeight)


def smoothing_rates(label_smoothing: float, smoothing: str, classes: int) -> tuple[float, float]:
    """Return ``confidence`` and ``smoothing_per_class``.

    The smoothed target is ``confidence * p + smoothing_per_class``.  The documentation of
    ``cross_entropy`` calls them lambda and mu.
    """
    share = arguments.check_share(label_smoothing, "label_smoothing")
    epsilon = term(share)
    check_choice(smoothing, SMOOTHINGS, "smoothing")
    if smoothing == "all":
        return 1.0 - epsilon, epsilon / classes
    if classes == 1:
        if share:
            raise ValueError("smoothing='others' needs at least two classes, input has one")
        return 1.0, 0.0
    smoothing_per_class = epsilon / (classes - 1)
    return 1.0 - epsilon - smoothing_per_class, smoothing_per_class


def is_by_probability(token_weight: object, soft: bool) -> bool:
    """Return whether the probability of its label is the weight of a row, after a check."""
    if not isinstance(token_weight, str):
        return False
    check_choice(token_weight, TOKEN_WEIGHTS, "token_weight, if it is a word,")
    if soft:
        raise ValueError(
            "token_weight='probability' needs class indices as target, got probabilities"
        )
    return True


def cross_entropy_spec(
    target: Tensor,
    classes: int,
    *,
    batch: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    smoothing: str,
    temperature: float = 1.0,
    softcap: float | None,
    z_loss: float,
    token_weight: object = None,
    inplace: bool = False,
) -> Spec:
    """Check the options of a cross entropy; a floating target holds probabilities."""
    confidence, smoothing_per_class = smoothing_rates(label_smoothing, smoothing, classes)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    soft = target.is_floating_point()
    hard = "smoothed_cross_entropy" if label_smoothing else "cross_entropy"
    return Spec(
        loss="soft_cross_entropy" if soft else hard,
        target_type="probs" if soft else "none",
        reduction=reduction,
        batch=batch,
        ignore_index=ignore_index,
        scale=arguments.scale_of(temperature),
        softcap=arguments.cap_of(softcap),
        confidence=confidence,
        smoothing_per_class=smoothing_per_class,
        z_loss=arguments.check_finite(z_loss, "z_loss"),
        by_probability=is_by_probability(token_weight, soft),
        inplace=inplace,
    )


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "all",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | TokenWeight | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "all",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | TokenWeight | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: Literal[True],
) -> tuple[Tensor, Stats]: ...


@remember_checks
@dispatch_dtensor
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "all",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | TokenWeight | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    r"""Compute the cross entropy between logits and class indices or probabilities, in nats.

    A drop-in for :func:`torch.nn.functional.cross_entropy`.  The loss of a row is

    .. math::
        \ell = \sum_c r_c\,(\mathrm{lse} - x_c) + z\,\omega\,\mathrm{lse}^2,
        \qquad r_c = w_c \bigl(\lambda\,p_c + \mu\bigr),
        \qquad \mathrm{lse} = \log \sum_c e^{x_c}.

    :math:`p` is the target distribution, 1 at the label of a class index.  :math:`x` are the logits
    after soft capping and division by the temperature.  Label smoothing :math:`\varepsilon` gives

    * ``smoothing="all"``, as in torch: :math:`\lambda = 1 - \varepsilon`,
      :math:`\mu = \varepsilon / C`;
    * ``smoothing="others"``, as in WeNet and ESPnet: :math:`\lambda = 1 - \varepsilon - \mu`,
      :math:`\mu = \varepsilon / (C - 1)`.

    With ``class_mask``, a label that is masked out has the loss :math:`+\infty` and a finite
    gradient.  Smoothing gives mass to the masked classes, too, which makes the loss
    :math:`+\infty`, unless ``weight`` is 0 for them.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        target: Class indices (int64, int32, uint8) of the shape of ``input`` without ``dim``, or
            probabilities (floating) of the shape of ``input``.
        weight: Weights :math:`w` of the classes, shape ``(C,)``; 1 by default.
        dim: Dimension of the classes; by default 1, as in torch, or 0 if ``input`` has one
            dimension.
        ignore_index: Rows with this label do not count: their loss and gradient are 0, whatever
            they hold.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight`` and the class weight of the label; NaN if no row counts) or
            ``"batchmean"`` (sum / ``input.size(0)``).
        label_smoothing: :math:`\varepsilon` in [0, 1].
        smoothing: ``"all"`` spreads :math:`\varepsilon` over all classes, ``"others"`` over all but
            the label.
        temperature: :math:`T`, which divides the logits.  A tensor holds one number, or one for
            each row, and gets a gradient if it requires one.
        softcap: Replace the logits by ``softcap * tanh(x / softcap)`` first; None for no cap.
        z_loss: :math:`z`, the factor of the squared log-sum-exp.  :math:`\omega` is the class
            weight of the label, and 1 for probabilities.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.  ``"probability"`` multiplies the loss of a row by the probability of its label,
            without a gradient through it; a mean still divides by the rows that count.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`, without mass in a target.  Or
            its bits: uint8 of shape ``(..., ceil(C / 8))`` for classes on the last dimension, where
            class :math:`c` is bit ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.
        return_stats: Also return :class:`fastdiv.Stats`: ``lse``, ``entropy``, ``argmax`` and
            ``log_prob`` of every row, without gradient.  ``log_prob`` is that of the label (0 where
            the row does not count), or :math:`\sum_c p_c \log q_c` for probabilities.

    Returns:
        The loss, float32 (float64 if input or target is); with ``return_stats`` a pair of the loss
        and the statistics.

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.
        IndexError: A label is neither in ``[0, C)`` nor ``ignore_index`` (on a CPU; elsewhere its
            row is NaN), or ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
        >>> y = torch.tensor([2, 0])
        >>> fastdiv.cross_entropy(x, y)
        tensor(0.7531)
        >>> loss, stats = fastdiv.cross_entropy(x, y, reduction="none", return_stats=True)
        >>> loss, stats.argmax
        (tensor([0.4076, 1.0986]), tensor([2, 0]))

    Source: :func:`torch.nn.functional.cross_entropy`; label smoothing: Szegedy et al., *Rethinking
    the Inception Architecture* (2016); z-loss: Chowdhery et al., *PaLM* (2022); soft capping:
    *Gemma 2* (2024); ``token_weight="probability"``: Wu et al., *On the Generalization of SFT: a
    Reinforcement Learning Perspective with Reward Rectification* (DFT, 2025).
    """
    arguments.check_logits(input)
    dim = arguments.class_dim(input, (1 if input.dim() > 1 else 0) if dim is None else dim)
    arguments.check_reduction(reduction)
    ignore_index = arguments.check_ignored(ignore_index)
    classes = size_of(input, dim)
    spec = cross_entropy_spec(
        target,
        classes,
        batch=input.shape[0],
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        smoothing=smoothing,
        softcap=softcap,
        z_loss=z_loss,
        token_weight=token_weight,
        inplace=inplace_backward,
    )
    given, soft = (input, target), target.is_floating_point()
    row_values = None if isinstance(token_weight, str) else token_weight
    if soft:
        arguments.check_logits(target, "target")
        input, target = arguments.same_dtype(input, target)
    class_weight = arguments.class_weights(input, classes, weight)
    row_weight = arguments.token_weights(input, dim, row_values)
    mask = mask_rows(input, dim, class_mask)
    number, scale = arguments.scales(input, dim, temperature)
    spec = spec._replace(scale=number)
    t = y = None
    if soft:
        x, t = arguments.same_rows(input, target, dim)
    else:
        x, y = (
            arguments.as_rows(input, dim),
            arguments.labels(input, dim, target, "target", ignore_index),
        )
    if inplace_backward:
        check_in_place(
            given[0],
            target=given[1],
            weight=weight,
            token_weight=row_values,
            class_mask=class_mask,
            temperature=temperature if isinstance(temperature, Tensor) else None,
        )
    rows = (spec, x, t, y, class_weight, row_weight)
    if return_stats:
        value, stats = row_loss_and_stats(*rows, scale=scale, mask=mask)
        stats = Stats(*(arguments.as_input(s, input, dim) for s in stats))
        return (arguments.as_input(value, input, dim) if reduction == "none" else value), stats
    value = row_loss(*rows, scale=scale, mask=mask)
    return arguments.as_input(value, input, dim) if reduction == "none" else value
