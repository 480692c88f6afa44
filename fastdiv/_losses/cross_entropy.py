"""Cross entropy from logits."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from .._engine import arguments
from .._engine.autograd import row_loss, row_loss_and_stats
from .._engine.dtensor import takes_dtensors
from .._engine.in_place import check_in_place
from .._engine.recording import size_of
from .._engine.symbolic import term
from ..reference import Spec, Stats


def smoothing_rates(label_smoothing: float, smoothing: str, classes: int) -> tuple[float, float]:
    """``(label, spread)`` such that the smoothed target is ``label * p + spread``."""
    share = arguments.check_share(label_smoothing, "label_smoothing")
    epsilon = term(share)
    if smoothing == "all":
        return 1.0 - epsilon, epsilon / classes
    if smoothing != "others":
        raise ValueError(f"smoothing must be 'all' or 'others', got {smoothing!r}")
    if classes == 1:
        if share:
            raise ValueError("smoothing='others' needs at least two classes, input has one")
        return 1.0, 0.0
    spread = epsilon / (classes - 1)
    return 1.0 - epsilon - spread, spread


def cross_entropy_spec(
    target: Tensor,
    classes: int,
    *,
    batch: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    smoothing: str,
    temperature: float,
    softcap: float | None,
    z_loss: float,
    inplace: bool = False,
) -> Spec:
    """The options of a cross entropy, checked; a floating target holds probabilities."""
    label, spread = smoothing_rates(label_smoothing, smoothing, classes)
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
        softcap=0.0 if softcap is None else arguments.check_positive(softcap, "softcap"),
        label=label,
        spread=spread,
        z_loss=arguments.check_finite(z_loss, "z_loss"),
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
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing: str = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
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
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing: str = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: Literal[True],
) -> tuple[Tensor, Stats]: ...


@takes_dtensors
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing: str = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    r"""Cross entropy between logits and class indices or class probabilities, in nats.

    A drop-in for :func:`torch.nn.functional.cross_entropy`.  With logits :math:`x`,
    :math:`\mathrm{lse} = \log \sum_c e^{x_c}` and the target distribution :math:`p` (1 at the label
    of a hard target), the loss of a row is

    .. math::
        \ell = \sum_c r_c\,(\mathrm{lse} - x_c) + z\,\omega\,\mathrm{lse}^2,
        \qquad r_c = w_c \bigl(\lambda\,p_c + \mu\bigr),

    where :math:`x` stands for the logits after soft capping and division by the temperature, and
    label smoothing :math:`\varepsilon` gives :math:`\lambda = 1 - \varepsilon`,
    :math:`\mu = \varepsilon / C` (``smoothing="all"``, as torch) or
    :math:`\lambda = 1 - \varepsilon - \mu`, :math:`\mu = \varepsilon / (C - 1)`
    (``smoothing="others"``, as WeNet and ESPnet: nothing extra on the label).

    Args:
        input: Logits of any shape with the :math:`C` classes on ``dim``; float32, bfloat16, float16
            or float64, strided as it comes.
        target: Class indices (int64, int32, uint8) of the shape of ``input`` without ``dim``, or
            probabilities (floating) of the shape of ``input``.
        weight: Weights :math:`w` of the classes, shape ``(C,)``; 1 by default.
        dim: Dimension of the classes; by default torch's, 1, or 0 for one-dimensional input.
        ignore_index: Rows with this label do not count: loss and gradient 0, whatever they hold.
        reduction: ``"none"`` (one value a row), ``"sum"``, ``"mean"`` (over the rows that count;
            with weights the weighted mean, as torch's; NaN if no row counts) or ``"batchmean"``
            (sum / ``input.size(0)``).
        label_smoothing: :math:`\varepsilon` in [0, 1].
        smoothing: ``"all"`` spreads over all classes, ``"others"`` over those but the label.
        temperature: Divides the logits.
        softcap: ``softcap * tanh(x / softcap)`` is applied before anything else.
        z_loss: :math:`z`, the factor of the squared log-sum-exp; :math:`\omega` is the class weight
            of the label, 1 for soft targets.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``; they multiply
            the loss and, in a mean, its denominator. Rows of weight 0 do not count.
        inplace_backward: The backward writes the gradient over the logits' own memory.  Autograd
            notices: whoever else needs the logits for a backward gets an error.  Under
            ``torch.compile`` a fresh gradient is used, which inductor places as it sees fit.  The
            logits may be no leaf of autograd's graph, nor a view of one, and no other argument may
            share their memory.
        return_stats: Also return a named tuple of ``lse``, ``entropy``, ``argmax`` and ``log_prob``
            (of the label, 0 where the row does not count; :math:`\sum p \log q` for soft targets)
            of every row, from the same pass, without gradient.

    Returns:
        The loss, float32 (float64 if input or target is), and the statistics if asked for.

    Raises:
        TypeError: a dtype that is not one of the above; a sparse, nested or quantized tensor; an
            option that is no number, a flag included.
        ValueError: shapes that do not fit, an option out of its range, a weight or an option that
            requires a gradient, logits that may not be overwritten.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (on CPU; elsewhere such
            a row is NaN), a dimension that ``input`` does not have.

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
    *Gemma 2* (2024).
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
        temperature=temperature,
        softcap=softcap,
        z_loss=z_loss,
        inplace=inplace_backward,
    )
    given, soft = (input, target), target.is_floating_point()
    if soft:
        arguments.check_logits(target, "target")
        input, target = arguments.same_dtype(input, target)
    class_weight = arguments.class_weights(input, classes, weight)
    row_weight = arguments.token_weights(input, dim, token_weight)
    t = y = None
    if soft:
        x, t = arguments.same_rows(input, target, dim)
    else:
        x, y = (
            arguments.as_rows(input, dim),
            arguments.labels(input, dim, target, "target", ignore_index),
        )
    if inplace_backward:
        check_in_place(given[0], target=given[1], weight=weight, token_weight=token_weight)
    if return_stats:
        value, stats = row_loss_and_stats(spec, x, t, y, class_weight, row_weight)
        stats = Stats(*(arguments.as_input(s, input, dim) for s in stats))
        return (arguments.as_input(value, input, dim) if reduction == "none" else value), stats
    value = row_loss(spec, x, t, y, class_weight, row_weight)
    return arguments.as_input(value, input, dim) if reduction == "none" else value
