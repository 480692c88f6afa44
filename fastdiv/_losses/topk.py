"""Divergences from a teacher that is known at k classes only."""

from __future__ import annotations

from torch import Tensor

from .._engine import arguments
from .._engine.backend import use_kernel
from .._engine.dtensor import dispatch_dtensor
from .._engine.in_place import check_in_place
from .._engine.masks import mask_rows
from ..reference.choices import KLMissing, Missing, Reduction, TargetType
from .divergence import js_loss
from .topk_rows import (
    TopKLoss,
    check_indices,
    check_shapes,
    check_teacher,
    loss_of_named,
    make_loss,
    named_of_logits,
)


def _of_logits(
    loss: TopKLoss,
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    dim: int,
    temperature: float | Tensor,
    token_weight: Tensor | None,
    class_mask: Tensor | None,
    inplace_backward: bool,
) -> Tensor:
    """Check the tensors of a loss of logits, and compute it."""
    arguments.check_logits(input)
    check_teacher(values, indices)
    dim = arguments.class_dim(input, dim)
    row_weight = arguments.token_weights(input, dim, token_weight)
    check_shapes(input, input.shape[dim], values, indices, dim)
    mask, scales = mask_rows(input, dim, class_mask), arguments.scales(input, dim, temperature)
    if inplace_backward:
        others = {"values": values, "indices": indices, "token_weight": token_weight}
        check_in_place(input, **others, class_mask=class_mask)
    x, v, y = (arguments.as_rows(tensor, dim) for tensor in (input, values, indices))
    classes = x.shape[1]
    if not (x.is_cpu and use_kernel(x)):  # the kernels of a CPU check the indices
        check_indices(y, classes, row_weight)
    named = named_of_logits(loss, x, y, row_weight, scales, mask, inplace_backward)
    value = loss_of_named(
        loss, named, v, y, row_weight, scales, classes=classes, batch=input.shape[0], dtype=x.dtype
    )
    return arguments.as_input(value, input, dim) if loss.reduction == "none" else value


@dispatch_dtensor
def topk_kl_div(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    values_type: TargetType,
    missing: KLMissing = "ignore",
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the KL divergence of the input from a teacher that is known at :math:`k` classes.

    .. math::
        \mathrm{KL}_K(p \,\|\, q) = \sum_{c \in K} p_c \,(\log p_c - \log q_c), \qquad
        q = \mathrm{softmax}(x / T)

    64 stored log-probabilities and indices per token take a few hundred bytes, where a row of
    logits takes many thousand.  :math:`q` is normalised over all :math:`C` classes.  ``missing``
    says what is done with the teacher's mass outside of :math:`K`,
    :math:`\rho = \max(0, 1 - \sum_K p)`:

    * ``"ignore"``: nothing.  The sum above may be negative where :math:`\rho > 0`.
    * ``"renormalize"``: the sum above is taken with :math:`p_c / \sum_K p` for :math:`p_c`.  It is
      NaN for a teacher without mass.
    * ``"tail"``: the other classes are one bucket.  With the student's mass in it,
      :math:`\sigma = 1 - \sum_K q`, the sum gets the term
      :math:`\rho \,(\log \rho - \log \sigma)`.  It is then a true divergence of :math:`k + 1`
      buckets: never negative, 0 only where they agree, and accurate next to 0.
    * ``"uniform"``: the other classes share the mass evenly, which adds
      :math:`\sum_{c \notin K} p_0 (\log p_0 - \log q_c)` with :math:`p_0 = \rho / (C - k)`.

    A sum over :math:`K` alone can be made smaller by raising all its :math:`q_c`, so trainers clamp
    it at 0 or clip its terms, and a clamped row has no gradient.  ``"tail"`` needs no clamp: a row
    that gives :math:`K` too much mass is pulled back.

    The logits are read once in the forward and once in the backward.  All else has the size of
    ``values``, and is computed in float64.

    A class with :math:`p_c = 0` adds nothing, nor does padding, and a row of padding alone is 0.
    Teacher mass where the student has none gives :math:`+\infty` with a finite gradient.  Where
    rounding makes :math:`\sum_K p` exceed 1, or where :math:`K` is all classes,
    ``"tail"`` leaves the excess out of the value.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        values: The teacher at the :math:`k` classes, of the shape of ``input`` but with :math:`k`
            for :math:`C`, and any of its dtypes.  They get a gradient if they require one.
        indices: The :math:`k` classes (int64, int32, int16, uint8), of the shape of ``values``; in
            any order, but each at most once per row.  -1 is padding: no class, whatever its value.
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature, so :math:`\rho = 0`), ``"log_probs"`` or ``"probs"`` (which are used as
            they are).
        missing: ``"ignore"``, ``"renormalize"``, ``"tail"`` or ``"uniform"``, see above.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the input, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`.  Or its bits: uint8 of shape
            ``(..., ceil(C / 8))`` for classes on the last dimension, where class :math:`c` is bit
            ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The divergence in nats, float32 (float64 for float64 input).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.  A class is twice in a row (on a CPU;
            elsewhere the row is NaN).
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN), or
            ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.zeros(1, 4)
        >>> p, classes = torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]])
        >>> fastdiv.topk_kl_div(x, p, classes, values_type="probs")
        tensor(0.4013)
        >>> fastdiv.topk_kl_div(x, p, classes, values_type="probs", missing="tail")
        tensor(0.2180)

    Source: :func:`fastdiv.kl_div` of the dense teacher that each policy stands for; on what a
    teacher of k classes leaves out: Anshumann et al., *Sparse Logit Sampling* (2025).
    """
    loss = make_loss(
        "topk_kl_div",
        "kl_div",
        values_type=values_type,
        missing=missing,
        reduction=reduction,
    )
    tensors = (input, values, indices)
    return _of_logits(loss, *tensors, dim, temperature, token_weight, class_mask, inplace_backward)


@dispatch_dtensor
def topk_reverse_kl_div(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    values_type: TargetType,
    missing: Missing = "ignore",
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the reverse KL divergence from a teacher that is known at :math:`k` classes.

    .. math::
        \mathrm{KL}_K(q \,\|\, p) = \sum_{c \in K} q_c \,(\log q_c - \log p_c), \qquad
        q = \mathrm{softmax}(x / T)

    This is the mode-seeking direction: student mass where the teacher has none costs
    :math:`+\infty`.  :math:`q` is normalised over all :math:`C` classes.  ``missing`` says what is
    done outside of the :math:`k` classes :math:`K`, where the teacher has the mass
    :math:`\rho = \max(0, 1 - \sum_K p)` and the student :math:`\sigma = 1 - \sum_K q`:

    * ``"ignore"``: nothing.  The sum above may be negative.
    * ``"renormalize"``: the sum above is taken with :math:`p_c / \sum_K p` for :math:`p_c`.
    * ``"tail"``: the sum gets the term :math:`\sigma \,(\log \sigma - \log \rho)`.  It is then a
      true divergence of :math:`k + 1` buckets, never negative.  It needs ``"log_probs"`` or
      ``"probs"``: logits leave :math:`\rho = 0`, so that any :math:`\sigma > 0` costs
      :math:`+\infty`.

    Padding adds nothing, and a row of padding alone is 0.  Infinite values have a finite gradient.
    Beyond the passes over the logits, all is computed in float64 and has the size of ``values``.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        values: The teacher at the :math:`k` classes, of the shape of ``input`` but with :math:`k`
            for :math:`C`, and any of its dtypes.  They get a gradient if they require one.
        indices: The :math:`k` classes (int64, int32, int16, uint8), of the shape of ``values``; in
            any order, but each at most once per row.  -1 is padding: no class, whatever its value.
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature, so :math:`\rho = 0`), ``"log_probs"`` or ``"probs"`` (which are used as
            they are).
        missing: ``"ignore"``, ``"renormalize"`` or ``"tail"``, see :func:`fastdiv.topk_kl_div`.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the input, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`.  Or its bits: uint8 of shape
            ``(..., ceil(C / 8))`` for classes on the last dimension, where class :math:`c` is bit
            ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The divergence in nats, float32 (float64 for float64 input).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.  A class is twice in a row (on a CPU;
            elsewhere the row is NaN).
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN), or
            ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.zeros(1, 4)
        >>> p, classes = torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]])
        >>> fastdiv.topk_reverse_kl_div(x, p, classes, values_type="probs", missing="tail")
        tensor(0.2393)

    Source: :func:`fastdiv.reverse_kl_div` of the buckets; Gu et al., *MiniLLM: Knowledge
    Distillation of Large Language Models* (2024).
    """
    loss = make_loss(
        "topk_reverse_kl_div",
        "reverse_kl_div",
        values_type=values_type,
        missing=missing,
        reduction=reduction,
    )
    tensors = (input, values, indices)
    return _of_logits(loss, *tensors, dim, temperature, token_weight, class_mask, inplace_backward)


@dispatch_dtensor
def topk_js_div(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    values_type: TargetType,
    beta: float = 0.5,
    missing: Missing = "ignore",
    dim: int = -1,
    reduction: Reduction = "batchmean",
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Compute the Jensen-Shannon divergence from a teacher that is known at :math:`k` classes.

    .. math::
        \mathrm{JS}_K = \sum_{c \in K} \beta\, p_c \log \frac{p_c}{m_c} +
        (1 - \beta)\, q_c \log \frac{q_c}{m_c}, \qquad m = \beta\,p + (1 - \beta)\,q

    ``beta=0`` and ``beta=1`` are :func:`fastdiv.topk_kl_div` and
    :func:`fastdiv.topk_reverse_kl_div`, as in :func:`fastdiv.js_div`.
    :math:`q = \mathrm{softmax}(x / T)` is normalised over all :math:`C` classes.  ``missing`` says
    what is done outside of the :math:`k` classes :math:`K`, where the teacher has the mass
    :math:`\rho = \max(0, 1 - \sum_K p)` and the student :math:`\sigma = 1 - \sum_K q`:

    * ``"ignore"``: nothing.  The sum above may be negative.
    * ``"renormalize"``: the sum above is taken with :math:`p_c / \sum_K p` for :math:`p_c`.
    * ``"tail"``: the sum gets the term of one more class, of the masses :math:`\rho` and
      :math:`\sigma`.  It is then a true divergence of :math:`k + 1` buckets, never negative, and
      finite for every :math:`\beta` between 0 and 1.

    Padding adds nothing, and a row of padding alone is 0.  Beyond the passes over the logits, all
    is computed in float64 and has the size of ``values``.

    Args:
        input: Logits of any shape and strides, with the :math:`C` classes on ``dim``; float32,
            bfloat16, float16 or float64.
        values: The teacher at the :math:`k` classes, of the shape of ``input`` but with :math:`k`
            for :math:`C`, and any of its dtypes.  They get a gradient if they require one.
        indices: The :math:`k` classes (int64, int32, int16, uint8), of the shape of ``values``; in
            any order, but each at most once per row.  -1 is padding: no class, whatever its value.
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature, so :math:`\rho = 0`), ``"log_probs"`` or ``"probs"`` (which are used as
            they are).
        beta: :math:`\beta` in [0, 1], the share of the target in the mixture.
        missing: ``"ignore"``, ``"renormalize"`` or ``"tail"``, see :func:`fastdiv.topk_kl_div`.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the input, and ``values`` if they are logits.  A
            tensor holds one number, or one for each row, and gets a gradient if it requires one.
        token_weight: Weights of the rows, of the shape of ``input`` without ``dim``.  They multiply
            the loss and, in a mean, the denominator.  Rows of weight 0 do not count, whatever they
            hold.
        class_mask: True for the classes that take part: bool, broadcastable to ``input``, or of
            shape ``(C,)``.  The others are as if at :math:`-\infty`.  Or its bits: uint8 of shape
            ``(..., ceil(C / 8))`` for classes on the last dimension, where class :math:`c` is bit
            ``c % 8`` of byte ``c // 8``.
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Returns:
        The divergence in nats, float32 (float64 for float64 input).

    Raises:
        TypeError: A tensor has an unsupported dtype or layout, or an option is not a number.
        ValueError: Shapes do not match, an option is out of range, a weight or an option requires a
            gradient, or the logits may not be overwritten.  A class is twice in a row (on a CPU;
            elsewhere the row is NaN).
        IndexError: An index is not in ``[-1, C)`` (on a CPU; elsewhere its row is NaN), or
            ``input`` has no dimension ``dim``.
        RuntimeError: Tensors are on different devices.

    Example:
        >>> import torch, fastdiv
        >>> x = torch.zeros(1, 4)
        >>> p, classes = torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]])
        >>> fastdiv.topk_js_div(x, p, classes, values_type="probs", missing="tail")
        tensor(0.0556)

    Source: :func:`fastdiv.js_div` of the buckets; Agarwal et al., *On-Policy Distillation of
    Language Models* (GKD, 2024).
    """
    kind, beta = js_loss(beta)
    loss = make_loss(
        "topk_js_div",
        kind,
        values_type=values_type,
        missing=missing,
        reduction=reduction,
        beta=beta,
    )
    tensors = (input, values, indices)
    return _of_logits(loss, *tensors, dim, temperature, token_weight, class_mask, inplace_backward)
