"""The divergences as modules of :mod:`fastdiv.nn`, and by their names."""

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
    """Options that every divergence has; ``shown`` names those of its function, in order."""

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
        """The options."""
        shown = {**self._options(), "scale_by_temperature": self.scale_by_temperature}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class _DivergenceLoss(_Divergence):
    """A divergence from a target of the shape of the logits."""

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
        """The divergence of these logits from the target."""
        function = FUNCTIONS[self.function]
        return self._scaled(function(input, target, token_weight=token_weight, **self._options()))


class KLDivLoss(_DivergenceLoss):
    """Module form of :func:`fastdiv.kl_div`: KL(p || q) with q from the input.

    Args:
        target_type: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        dim: Dimension of the classes.
        reduction: As for the function.
        temperature: :math:`T`.
        scale_by_temperature: Multiply the value by T squared, which keeps the size of the gradient
            about the same for every temperature (Hinton et al., 2015).
        inplace_backward: Write the gradient over the logits.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.KLDivLoss(target_type="probs")
        >>> kl(torch.zeros(1, 3), torch.tensor([[9 / 25, 12 / 25, 4 / 25]]))
        tensor(0.0853)
    """

    function = "kl_div"


class ReverseKLDivLoss(_DivergenceLoss):
    """Module form of :func:`fastdiv.reverse_kl_div`: KL(q || p); arguments of :class:`KLDivLoss`.

    Example:
        >>> import torch, fastdiv
        >>> kl = fastdiv.nn.ReverseKLDivLoss(target_type="probs")
        >>> kl(torch.zeros(1, 3), torch.tensor([[9 / 25, 12 / 25, 4 / 25]]))
        tensor(0.0975)
    """

    function = "reverse_kl_div"


class JSDivLoss(_DivergenceLoss):
    """Module form of :func:`fastdiv.js_div`; arguments of :class:`KLDivLoss`, and ``beta``.

    Example:
        >>> import torch, fastdiv
        >>> js = fastdiv.nn.JSDivLoss(target_type="logits", beta=0.5)
        >>> js(torch.tensor([[0.0, torch.inf * -1]]), torch.tensor([[-torch.inf, 0.0]]))  # ln 2
        tensor(0.6931)
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
    """Module form of :func:`fastdiv.skew_kl_div`.

    It has the arguments of :class:`KLDivLoss`, and ``skew`` and ``reverse``.

    Example:
        >>> import torch, fastdiv
        >>> skew = fastdiv.nn.SkewKLDivLoss(target_type="probs", skew=0.5)
        >>> skew(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 1.0]]))  # ln 2
        tensor(0.6931)
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
    """Module form of :func:`fastdiv.alpha_div`; arguments of :class:`KLDivLoss`, and ``alpha``.

    Example:
        >>> import torch, fastdiv
        >>> half_chi_squared = fastdiv.nn.AlphaDivLoss(target_type="probs", alpha=2)
        >>> half_chi_squared(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))
        tensor(0.3200)
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
    """Module form of :func:`fastdiv.renyi_div`; arguments of :class:`KLDivLoss`, and ``alpha``.

    Example:
        >>> import torch, fastdiv
        >>> renyi = fastdiv.nn.RenyiDivLoss(target_type="probs", alpha=2)
        >>> renyi(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))  # ln 1.64
        tensor(0.4947)
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
    """Module form of :func:`fastdiv.tv_distance`; arguments of :class:`KLDivLoss`.

    Example:
        >>> import torch, fastdiv
        >>> tv = fastdiv.nn.TVDistanceLoss(target_type="probs")
        >>> tv(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))
        tensor(0.4000)
    """

    function = "tv_distance"


class HellingerDistanceLoss(_DivergenceLoss):
    """Module form of :func:`fastdiv.hellinger_distance`; arguments of :class:`KLDivLoss`.

    Example:
        >>> import torch, fastdiv
        >>> hellinger = fastdiv.nn.HellingerDistanceLoss(target_type="probs")
        >>> hellinger(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))  # 1 - sqrt 0.8
        tensor(0.1056)
    """

    function = "hellinger_distance"


class TopKKLDivLoss(_Divergence):
    """Module form of :func:`fastdiv.topk_kl_div`.

    Args:
        values_type: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        missing: ``"ignore"``, ``"renormalize"`` or ``"uniform"``.
        dim: Dimension of the classes.
        reduction: As for the function.
        temperature: :math:`T`.
        scale_by_temperature: Multiply the value by T squared, see :class:`fastdiv.nn.KLDivLoss`.
        inplace_backward: Write the gradient over the logits.

    Example:
        >>> import torch, fastdiv
        >>> loss = fastdiv.nn.TopKKLDivLoss(values_type="logits")
        >>> loss(torch.zeros(1, 4), torch.zeros(1, 2), torch.tensor([[3, 0]]))  # ln 4 - ln 2
        tensor(0.6931)
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
        """The divergence of these logits from the teacher."""
        value = topk_kl_div(
            input,
            values,
            indices,
            token_weight=token_weight,
            inplace_backward=self.inplace_backward,
            **self._options(),
        )
        return self._scaled(value)
