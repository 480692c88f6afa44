r"""Every loss of rows in plain torch operations: specification, fallback and oracle of the tests.

The tensors are those of :class:`Rows`.  The reference defines these conventions, and the kernels
follow them:

* A class without mass adds nothing: :math:`0 \cdot \infty = 0`, in values and gradients.
* An infinite term (mass of one distribution where the other has none) makes the value infinite.
  It is otherwise a constant, and gives no gradient to the mass that multiplies it.  The same holds
  for infinite powers of the alpha divergences; the finite powers give the gradient.
* A probability target of exactly 0 gets no gradient from a divergence.
* A row that does not count (``ignore_index``, ``row_weight`` 0) is 0, whatever it holds.

Its derivatives of any order are torch's own, so the kernels use it for second derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import DIVERGENCES, FINALIZE, log_of, masked_product
from .masks import unpacked
from .spec import Rows, Spec, Stats, value_dtype
from .topk import REST, are_classes, named_log_probs

OF_CLASSES = {"log_prob", *REST}  # losses that have a value for each of k classes


def times_scale(spec: Spec, x: Tensor, scale: Tensor | None) -> Tensor:
    """Divide rows by their temperatures; an infinite logit gives a temperature no gradient."""
    if scale is None:
        return x * spec.scale
    scale, infinite = scale.unsqueeze(-1), torch.isinf(x)
    return torch.where(infinite, x * scale.detach(), torch.where(infinite, 0.0, x) * scale)


def scaled_logits(spec: Spec, x: Tensor, scale: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the logits after soft capping, masking and division by the temperature."""
    if spec.softcap:
        x = spec.softcap * torch.tanh(x / spec.softcap)
    if mask is not None:
        x = torch.where(mask, x, -torch.inf)
    return times_scale(spec, x, scale)


# --- divergences -------------------------------------------------------------------------------


def divergence(spec: Spec, lq: Tensor, t: Tensor, scale: Tensor | None) -> Tensor:
    """Compute the divergence of rows with log-probabilities ``lq``, or all its terms."""
    if spec.target_type == "logits":
        lp = torch.log_softmax(times_scale(spec, t, scale), -1)
        p = lp.exp()
    elif spec.target_type == "log_probs":
        lp, p = t, t.exp()
    else:
        p = torch.where(t == 0, t.detach(), t)
        lp = log_of(p)
    terms = DIVERGENCES[spec.loss](lq, lp, lq.exp(), p, spec.param)
    if spec.reduction == "pointwise":
        return terms
    return FINALIZE[spec.loss](terms, spec.param) if spec.loss in FINALIZE else terms.sum(-1)


# --- losses of one row of logits --------------------------------------------------------------


def entropy(lq: Tensor) -> Tensor:
    """Compute H(q) = -sum q log q."""
    return -masked_product(lq.exp(), lq).sum(-1)


def expected(r: Tensor, lq: Tensor) -> Tensor:
    """Compute ``r log q`` for a target that does not depend on q, linear in r also at 0."""
    infinite = torch.isinf(lq)
    finite = r * torch.where(infinite, 0.0, lq)
    return torch.where(infinite, masked_product(r.detach(), lq), finite)


def of_class(v: Tensor, y: Tensor) -> Tensor:
    """Return the entry of class y in every row."""
    return v.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def log_probs_of_classes(lq: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of k classes in every row; padding is 0, a wrong index makes NaN."""
    y = indices.to(torch.int64).clamp(0, lq.shape[-1] - 1)
    classes = are_classes(indices)
    wrong = (classes & (indices != y)).any(-1, keepdim=True)
    value = torch.where(classes, lq.gather(-1, y), 0.0)
    return torch.where(wrong, torch.nan, value)


def cross_entropy(
    spec: Spec,
    x: Tensor,
    lq: Tensor,
    t: Tensor | None,
    y: Tensor | None,
    class_weight: Tensor | None,
) -> Tensor:
    """Compute ``-sum r log q + z omega lse^2``.

    The smoothed target is ``r = class_weight (confidence p + smoothing_per_class)``.

    ``p`` is ``t``, or 1 at the class ``y``.  ``omega`` is the class weight of the label, and 1 for
    soft targets.
    """
    omega: Tensor | float = 1.0
    if t is not None:
        r = spec.confidence * t + spec.smoothing_per_class
        value = -expected(r if class_weight is None else r * class_weight, lq).sum(-1)
    else:
        assert y is not None
        omega = torch.ones_like(lq[..., 0]) if class_weight is None else class_weight[y]
        value = -expected(spec.confidence * omega, of_class(lq, y))
        if isinstance(spec.smoothing_per_class, Tensor) or spec.smoothing_per_class:
            r = torch.zeros_like(lq) + spec.smoothing_per_class
            value = value - expected(r if class_weight is None else r * class_weight, lq).sum(-1)
    if spec.z_loss:
        value = value + spec.z_loss * omega * torch.logsumexp(x, -1) ** 2
    if spec.by_probability:
        assert y is not None
        value = masked_product(of_class(lq, y).detach().exp(), value)
    return value


# --- rows and reductions ----------------------------------------------------------------------


def row_weights(
    ignore_index: int, x: Tensor, label: Tensor | None, row_weight: Tensor | None
) -> Tensor:
    """Return the weight of every row, 0 where it does not count."""
    dtype = value_dtype(x.dtype)
    weight = x.new_ones(x.shape[:-1], dtype=dtype) if row_weight is None else row_weight
    if label is None or label.dim() == x.dim():  # or label has the k classes of a teacher
        return weight
    return torch.where(label == ignore_index, 0.0, weight)


def mean_weights(
    ignore_index: int,
    x: Tensor,
    label: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
) -> Tensor:
    """Return the weight of every row in a mean, with the class weight of its label."""
    weight = row_weights(ignore_index, x, label, row_weight)
    if label is None or class_weight is None:
        return weight
    of_label = class_weight[label.clamp(0, x.shape[-1] - 1)]
    return torch.where(weight == 0, 0.0, weight * of_label)


def rows(spec: Spec, tensors: Rows) -> Tensor:
    """Compute the weighted value of every row.

    ``log_prob_and_entropy`` gives two rows of values, a loss of named classes k columns, and
    ``reduction="pointwise"`` all terms.  A label that is neither in ``[0, C)`` nor ``ignore_index``
    makes its row NaN.
    """
    x, t, scale, label, class_weight, row_weight, mask = tensors
    dtype = torch.float64 if spec.loss in REST else value_dtype(x.dtype)
    mask = None if mask is None else unpacked(mask, x.shape[-1])
    weight = row_weights(spec.ignore_index, x, label, row_weight)
    if spec.loss in OF_CLASSES:
        assert label is not None
        weight = torch.where(are_classes(label).any(-1), weight, 0.0)
    counts = (weight != 0).unsqueeze(-1)
    # The values of a row that does not count must not reach its gradient: 0 * NaN is NaN.
    x = torch.where(counts, x.to(dtype), 0.0)
    if scale is not None:
        scale = torch.where(counts.squeeze(-1), scale, 1.0)
    if t is not None:
        t = torch.where(counts, t.to(dtype), 0.0)
        if mask is not None:
            t = torch.where(mask, t, 0.0 if spec.target_type == "probs" else -torch.inf)
    x = scaled_logits(spec, x, scale, mask)
    lq = torch.log_softmax(x, -1)
    if spec.loss in DIVERGENCES:
        assert t is not None
        value = divergence(spec, lq, t, scale)
    elif spec.loss in OF_CLASSES:
        assert label is not None
        if spec.loss == "log_prob":
            value = log_probs_of_classes(lq, label)
        else:
            value = named_log_probs(lq, label, REST[spec.loss])
        return torch.where(counts, value, 0.0)
    elif spec.loss == "entropy":
        value = entropy(lq)
    elif label is None:
        value = cross_entropy(spec, x, lq, t, None, class_weight)
    else:
        y = label.clamp(0, x.shape[-1] - 1)
        if spec.loss == "log_prob_and_entropy":
            value = torch.stack([of_class(lq, y), entropy(lq)])
        else:
            value = cross_entropy(spec, x, lq, None, y, class_weight)
        value = torch.where(label == y, value, torch.nan)
    if spec.reduction == "pointwise":
        weight = weight.unsqueeze(-1)
    else:
        counts = counts.squeeze(-1)
    return torch.where(counts, value * weight, 0.0)


def loss(spec: Spec, *tensors: Tensor | None) -> Tensor:
    """Compute the reduced loss of the tensors of :class:`Rows`."""
    given = Rows(*tensors)  # type: ignore[arg-type]
    value = rows(spec, given)
    if spec.reduction in ("none", "pointwise"):
        return value
    total = value.sum()
    if spec.reduction == "mean":
        x, _, _, label, class_weight, row_weight, _ = given
        return total / mean_weights(spec.ignore_index, x, label, class_weight, row_weight).sum()
    return total / spec.batch if spec.reduction == "batchmean" else total


def stats(spec: Spec, tensors: Rows) -> Stats:
    """Compute log-sum-exp, entropy, argmax and log-probability of the target of every row.

    Rows that do not count have them, too, but for the log-probability, which is 0 for labels.
    """
    x, t, scale, label, _, row_weight, mask = tensors
    x = x.detach().to(value_dtype(x.dtype))
    mask = None if mask is None else unpacked(mask, x.shape[-1])
    x = scaled_logits(spec, x, None if scale is None else scale.detach(), mask)
    lq = torch.log_softmax(x, -1)
    if t is not None:
        p = t.detach().to(lq.dtype)
        log_prob = masked_product(p if mask is None else torch.where(mask, p, 0.0), lq).sum(-1)
    else:
        assert label is not None
        y = label.clamp(0, x.shape[-1] - 1)
        log_prob = of_class(lq, y)
        log_prob = torch.where(label == y, log_prob, torch.nan)
        weight = row_weights(spec.ignore_index, x, label, row_weight)
        log_prob = torch.where(weight == 0, 0.0, log_prob)
    return Stats(torch.logsumexp(x, -1), entropy(lq), x.argmax(-1), log_prob)
