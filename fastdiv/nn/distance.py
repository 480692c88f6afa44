"""The modules of total variation and of the Hellinger distance."""

from __future__ import annotations

from .base import DivergenceModule


class TVDistanceLoss(DivergenceModule):
    """Total variation distance from a target, as a module.

    It calls :func:`fastdiv.tv_distance`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  A tensor holds
            one number, or one for each row; it is learnt if it is a ``Parameter``.  With
            ``scale_by_temperature``, one for each row needs ``reduction="none"``.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``target``: the teacher's rows, of the shape of ``input`` and any of its dtypes.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``, or with ``"pointwise"`` one per term, of the shape of
          ``input``.

    Example:
        >>> import torch, fastdiv
        >>> tv = fastdiv.nn.TVDistanceLoss(target_type="probs")
        >>> tv(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))
        tensor(0.4000)

    Source: :func:`fastdiv.tv_distance`.
    """

    function = "tv_distance"


class HellingerDistanceLoss(DivergenceModule):
    """Squared Hellinger distance from a target, as a module.

    It calls :func:`fastdiv.hellinger_distance`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.  A tensor holds
            one number, or one for each row; it is learnt if it is a ``Parameter``.  With
            ``scale_by_temperature``, one for each row needs ``reduction="none"``.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``target``: the teacher's rows, of the shape of ``input`` and any of its dtypes.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * ``class_mask``: the classes that take part, as in the function; optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``, or with ``"pointwise"`` one per term, of the shape of
          ``input``.

    Example:
        >>> import torch, fastdiv
        >>> hellinger = fastdiv.nn.HellingerDistanceLoss(target_type="probs")
        >>> hellinger(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))  # 1 - sqrt 0.8
        tensor(0.1056)

    Source: :func:`fastdiv.hellinger_distance`.
    """

    function = "hellinger_distance"
