"""The modules of the divergences, and the functions of divergences by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .._engine.symbolic import term, times
from .._losses import alpha as _alpha
from .._losses import distance as _distance
from .._losses import divergence as _divergence
from .._losses.topk import topk_kl_div
from ..reference.choices import Divergence, DivergenceReduction, Missing, Reduction, TargetType

FUNCTIONS: dict[Divergence, Callable[..., Tensor]] = {
    "kl_div": _divergence.kl_div,
    "reverse_kl_div": _divergence.reverse_kl_div,
    "js_div": _divergence.js_div,
    "skew_kl_div": _divergence.skew_kl_div,
    "alpha_div": _alpha.alpha_div,
    "renyi_div": _alpha.renyi_div,
    "tv_distance": _distance.tv_distance,
    "hellinger_distance": _distance.hellinger_distance,
}


class _Divergence(nn.Module):
    """The options of every divergence; ``shown`` names those of its function, in order."""

    shown: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        dim: int,
        reduction: DivergenceReduction,
        temperature: float,
        scale_by_temperature: bool,
        inplace_backward: bool,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.reduction = reduction
        self.temperature = temperature
        self.scale_by_temperature = scale_by_temperature
        self.inplace_backward = inplace_backward

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.shown}

    def _scaled(self, value: Tensor) -> Tensor:
        return times(value, term(self.temperature) ** 2) if self.scale_by_temperature else value

    def extra_repr(self) -> str:
        """Return the options as text."""
        shown = {**self._options(), "scale_by_temperature": self.scale_by_temperature}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class _DivergenceLoss(_Divergence):
    """A divergence whose target has the shape of the logits."""

    function: ClassVar[Divergence]
    shown: ClassVar[tuple[str, ...]] = (
        "target_type",
        "dim",
        "reduction",
        "temperature",
        "inplace_backward",
    )

    def __init__(
        self,
        *,
        target_type: TargetType,
        dim: int = -1,
        reduction: DivergenceReduction = "batchmean",
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(dim, reduction, temperature, scale_by_temperature, inplace_backward)
        self.target_type = target_type

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        """Compute the divergence of these logits from the target."""
        function = FUNCTIONS[self.function]
        return self._scaled(function(input, target, token_weight=token_weight, **self._options()))


class KLDivLoss(_DivergenceLoss):
    """Kullback-Leibler divergence KL(p || q) from a target p, as a module.

    It calls :func:`fastdiv.kl_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.
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
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``, or with ``"pointwise"`` one per term, of the shape of
          ``input``.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.KLDivLoss(target_type="probs")
        >>> kl(torch.zeros(1, 3), torch.tensor([[9 / 25, 12 / 25, 4 / 25]]))
        tensor(0.0853)

    Source: :func:`fastdiv.kl_div`.
    """

    function = "kl_div"


class ReverseKLDivLoss(_DivergenceLoss):
    """Reverse Kullback-Leibler divergence KL(q || p) from a target p, as a module.

    It calls :func:`fastdiv.reverse_kl_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.
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
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``, or with ``"pointwise"`` one per term, of the shape of
          ``input``.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.ReverseKLDivLoss(target_type="probs")
        >>> kl(torch.zeros(1, 3), torch.tensor([[9 / 25, 12 / 25, 4 / 25]]))
        tensor(0.0975)

    Source: :func:`fastdiv.reverse_kl_div`.
    """

    function = "reverse_kl_div"


class JSDivLoss(_DivergenceLoss):
    r"""Generalised Jensen-Shannon divergence from a target, as a module.

    It calls :func:`fastdiv.js_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        beta: :math:`\beta` in [0, 1], the share of the target in the mixture.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.
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
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``, or with ``"pointwise"`` one per term, of the shape of
          ``input``.

    Example:
        >>> import torch, fastdiv
        >>> js = fastdiv.nn.JSDivLoss(target_type="logits", beta=0.5)
        >>> js(torch.tensor([[0.0, torch.inf * -1]]), torch.tensor([[-torch.inf, 0.0]]))  # ln 2
        tensor(0.6931)

    Source: :func:`fastdiv.js_div`.
    """

    function = "js_div"
    shown = (*_DivergenceLoss.shown, "beta")

    def __init__(
        self,
        *,
        target_type: TargetType,
        beta: float = 0.5,
        dim: int = -1,
        reduction: DivergenceReduction = "batchmean",
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            target_type=target_type,
            dim=dim,
            reduction=reduction,
            temperature=temperature,
            scale_by_temperature=scale_by_temperature,
            inplace_backward=inplace_backward,
        )
        self.beta = beta


class SkewKLDivLoss(_DivergenceLoss):
    r"""Skewed Kullback-Leibler divergence from a target, as a module.

    It calls :func:`fastdiv.skew_kl_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        skew: :math:`\lambda` in [0, 1], the share of the first distribution in the mixture.
        reverse: Compute the reversed divergence.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.
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
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``, or with ``"pointwise"`` one per term, of the shape of
          ``input``.

    Example:
        >>> import torch, fastdiv
        >>> skew = fastdiv.nn.SkewKLDivLoss(target_type="probs", skew=0.5)
        >>> skew(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 1.0]]))  # ln 2
        tensor(0.6931)

    Source: :func:`fastdiv.skew_kl_div`.
    """

    function = "skew_kl_div"
    shown = (*_DivergenceLoss.shown, "skew", "reverse")

    def __init__(
        self,
        *,
        target_type: TargetType,
        skew: float = 0.1,
        reverse: bool = False,
        dim: int = -1,
        reduction: DivergenceReduction = "batchmean",
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            target_type=target_type,
            dim=dim,
            reduction=reduction,
            temperature=temperature,
            scale_by_temperature=scale_by_temperature,
            inplace_backward=inplace_backward,
        )
        self.skew = skew
        self.reverse = reverse


class AlphaDivLoss(_DivergenceLoss):
    r"""Alpha divergence from a target, as a module.

    It calls :func:`fastdiv.alpha_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        alpha: :math:`\alpha`, any finite number.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.
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
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``, or with ``"pointwise"`` one per term, of the shape of
          ``input``.

    Example:
        >>> import torch, fastdiv
        >>> half_chi_squared = fastdiv.nn.AlphaDivLoss(target_type="probs", alpha=2)
        >>> half_chi_squared(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))
        tensor(0.3200)

    Source: :func:`fastdiv.alpha_div`.
    """

    function = "alpha_div"
    shown = (*_DivergenceLoss.shown, "alpha")

    def __init__(
        self,
        *,
        target_type: TargetType,
        alpha: float,
        dim: int = -1,
        reduction: DivergenceReduction = "batchmean",
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            target_type=target_type,
            dim=dim,
            reduction=reduction,
            temperature=temperature,
            scale_by_temperature=scale_by_temperature,
            inplace_backward=inplace_backward,
        )
        self.alpha = alpha


class RenyiDivLoss(_DivergenceLoss):
    r"""Rényi divergence from a target, as a module.

    It calls :func:`fastdiv.renyi_div`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        alpha: :math:`\alpha`, positive and finite.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides all logits, also those of the target.
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
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``.

    Example:
        >>> import torch, fastdiv
        >>> renyi = fastdiv.nn.RenyiDivLoss(target_type="probs", alpha=2)
        >>> renyi(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))  # ln 1.64
        tensor(0.4947)

    Source: :func:`fastdiv.renyi_div`.
    """

    function = "renyi_div"
    shown = (*_DivergenceLoss.shown, "alpha")

    def __init__(
        self,
        *,
        target_type: TargetType,
        alpha: float,
        dim: int = -1,
        reduction: Reduction = "batchmean",
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            target_type=target_type,
            dim=dim,
            reduction=reduction,
            temperature=temperature,
            scale_by_temperature=scale_by_temperature,
            inplace_backward=inplace_backward,
        )
        self.alpha = alpha


class TVDistanceLoss(_DivergenceLoss):
    """Total variation distance from a target, as a module.

    It calls :func:`fastdiv.tv_distance`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.
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


class HellingerDistanceLoss(_DivergenceLoss):
    """Squared Hellinger distance from a target, as a module.

    It calls :func:`fastdiv.hellinger_distance`, which has the formula and lists the errors.

    Args:
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            Probabilities are used as they are, normalised or not.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``), ``"batchmean"`` (sum / ``input.size(0)``) or
            ``"pointwise"`` (every term, of the shape of ``input``, as torch's ``"none"``).
        temperature: :math:`T`, which divides all logits, also those of the target.
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


class TopKKLDivLoss(_Divergence):
    """KL divergence from a teacher that is known at :math:`k` classes, as a module.

    It calls :func:`fastdiv.topk_kl_div`, which has the formula and lists the errors.

    Args:
        values_type: What ``values`` holds: ``"logits"`` (:math:`p` is their softmax at the same
            temperature), ``"log_probs"`` or ``"probs"`` (which are used as they are).
        missing: ``"ignore"``, ``"renormalize"`` or ``"uniform"``: what is done with the teacher's
            mass in other classes.
        dim: Dimension of the classes.
        reduction: ``"none"`` (one value per row), ``"sum"``, ``"mean"`` (over the rows that count,
            weighted by ``token_weight``) or ``"batchmean"`` (sum / ``input.size(0)``).
        temperature: :math:`T`, which divides the input, and ``values`` if they are logits.
        scale_by_temperature: Multiply the value by :math:`T^2`, which keeps the size of its
            gradient about the same for all temperatures (Hinton et al., 2015).
        inplace_backward: Write the gradient over the memory of the logits.  Autograd raises if
            another backward still needs them.  They must be neither a leaf of autograd's graph
            nor a view of one, and must not share memory with other arguments.  Under
            ``torch.compile`` a fresh gradient is used instead.

    Shape:
        * ``input``: logits of any shape and strides, with the :math:`C` classes on ``dim``;
          float32, bfloat16, float16 or float64.
        * ``values``: the teacher at the :math:`k` classes, of the shape of ``input`` but with
          :math:`k` for :math:`C`.
        * ``indices``: the :math:`k` classes (int64, int32, uint8), of the shape of ``values``.
        * ``token_weight``: weights of the rows, of the shape of ``input`` without ``dim``;
          optional.
        * Result: a scalar, or with ``reduction="none"`` one value per row, of the shape of
          ``input`` without ``dim``.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.TopKKLDivLoss(values_type="logits")
        >>> loss(torch.zeros(1, 4), torch.zeros(1, 2), torch.tensor([[3, 0]]))  # ln 4 - ln 2
        tensor(0.6931)

    Source: :func:`fastdiv.topk_kl_div`.
    """

    shown = ("values_type", "missing", "dim", "reduction", "temperature")

    def __init__(
        self,
        *,
        values_type: TargetType,
        missing: Missing = "ignore",
        dim: int = -1,
        reduction: Reduction = "batchmean",
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(dim, reduction, temperature, scale_by_temperature, inplace_backward)
        self.values_type = values_type
        self.missing = missing

    def forward(
        self, input: Tensor, values: Tensor, indices: Tensor, token_weight: Tensor | None = None
    ) -> Tensor:
        """Compute the divergence of these logits from the teacher."""
        value = topk_kl_div(
            input,
            values,
            indices,
            token_weight=token_weight,
            inplace_backward=self.inplace_backward,
            **self._options(),
        )
        return self._scaled(value)
