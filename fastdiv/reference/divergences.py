"""The formulas of the divergences, in plain torch operations.

A divergence computes one term per class from log-probabilities and probabilities of both sides.
Its value is their sum, unless ``FINALIZE`` has another function.  ``losses`` says what masses of 0
and infinite terms are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def masked_product(mass: Tensor, factor: Tensor) -> Tensor:
    """Compute ``mass * factor``, where a mass of 0 gives value and gradient 0 for any factor."""
    empty = mass == 0
    return torch.where(empty, 0.0, mass * torch.where(empty, 0.0, factor))


def log_ratio_term(mass: Tensor, log_mass: Tensor, log_other: Tensor) -> Tensor:
    """Compute ``mass * (log_mass - log_other)``; if infinite, only ``log_other`` gets gradient."""
    infinite = (mass != 0) & torch.isinf(log_other)
    mass = torch.where(infinite, mass.detach(), mass)
    log_mass = torch.where(infinite, log_mass.detach(), log_mass)
    empty = mass == 0
    return masked_product(
        mass, torch.where(empty, 0.0, log_mass) - torch.where(empty, 0.0, log_other)
    )


def log_of(p: Tensor) -> Tensor:
    """Compute the logarithm, with ``log 0 = -inf`` and no gradient there."""
    empty = p == 0
    return torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1.0, p)))


def log_sum_exp(v: Tensor, dim: int) -> Tensor:
    """Compute ``log(sum(exp(v)))``, which compiles for sizes that depend on data, unlike torch's.

    The largest entry must be finite.
    """
    largest = v.detach().amax(dim, keepdim=True)
    return (v - largest).exp().sum(dim).log() + largest.squeeze(dim)


def log_mixture(lp: Tensor, lq: Tensor, share: float) -> Tensor:
    """Compute ``log(share p + (1 - share) q)``, also where a product underflows."""
    one = torch.ones((), dtype=torch.float64, device="cpu")  # a share may be a symbol
    log_share, log_rest = (one * share).log(), (one * (1 - share)).log()
    parts = torch.stack([lp + log_share, lq + log_rest])
    empty = torch.isinf(parts).all(0)
    return torch.where(empty, -torch.inf, log_sum_exp(torch.where(empty, 0.0, parts), 0))


def kl_div(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, _: float) -> Tensor:
    """Compute the terms of KL(p || q): ``p (log p - log q)``."""
    return log_ratio_term(p, lp, lq)


def reverse_kl_div(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, _: float) -> Tensor:
    """Compute the terms of KL(q || p): ``q (log q - log p)``."""
    return log_ratio_term(q, lq, lp)


def js_div(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, beta: float) -> Tensor:
    """Compute ``beta p log(p / m) + (1 - beta) q log(q / m)``, ``m = beta p + (1 - beta) q``."""
    lm = log_mixture(lp, lq, beta)
    return beta * log_ratio_term(p, lp, lm) + (1 - beta) * log_ratio_term(q, lq, lm)


def skew_kl_div(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, skew: float) -> Tensor:
    """Compute the terms of KL(p || m): ``p log(p / m)``, ``m = skew p + (1 - skew) q``."""
    return log_ratio_term(p, lp, log_mixture(lp, lq, skew))


def reverse_skew_kl_div(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, skew: float) -> Tensor:
    """Compute the terms of KL(q || m): ``q log(q / m)``, ``m = skew q + (1 - skew) p``."""
    return log_ratio_term(q, lq, log_mixture(lq, lp, skew))


def log_powers(
    lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``log w``, ``log(w / q)`` and ``w == inf`` for ``w = p^alpha q^(1 - alpha)``.

    Where ``w`` is infinite or 0, both logarithms are -inf and have no gradient.
    """
    one_sided = torch.isinf(lq + lp)  # one side has no mass; a NaN stays NaN
    log_ratio = torch.where(one_sided, 0.0, lp) - torch.where(one_sided, 0.0, lq)
    above_q = torch.where(one_sided, -torch.inf, alpha * log_ratio)
    log_w = torch.where(one_sided, -torch.inf, alpha * log_ratio + torch.where(one_sided, 0.0, lq))
    mass = q if alpha < 0 else p
    infinite = one_sided & (mass != 0)
    if 0 <= alpha <= 1:
        infinite = torch.zeros_like(infinite)
    return log_w, above_q, infinite


def alpha_div(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, alpha: float) -> Tensor:
    """Compute ``(w - q) / (alpha (alpha - 1))``, ``w = p^alpha q^(1 - alpha)``, sum q = 1."""
    log_w, above_q, infinite = log_powers(lq, lp, q, p, alpha)
    infinite = infinite | (log_w.exp() == torch.inf)
    log_w, above_q = (torch.where(infinite, -torch.inf, v) for v in (log_w, above_q))
    # Where w and q are close, w - q is the larger of them times an expm1 in [-1, 0]: nothing
    # overflows or cancels.  Elsewhere torch's derivative of expm1, expm1 + 1, would cancel.
    # No clamp: where p = q, its derivative at the bound is 1 or 0, depending on torch's version.
    w = log_w.exp()
    above = above_q > 0
    larger, smaller = torch.where(above, above_q, 0.0), torch.where(above, 0.0, above_q)
    close = torch.where(above, -w * torch.expm1(-larger), q * torch.expm1(smaller))
    excess = torch.where(above_q.abs() > 1, w - q, close)
    return (excess + torch.where(infinite, torch.inf, 0.0)) / (alpha * (alpha - 1))


def renyi_div(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, alpha: float) -> Tensor:
    """Compute ``log(p^alpha q^(1 - alpha))``; :func:`log_of_sum` gives the divergence."""
    log_w, _, infinite = log_powers(lq, lp, q, p, alpha)
    return torch.where(infinite, torch.inf, log_w)


def log_of_sum(log_w: Tensor, alpha: float) -> Tensor:
    """Compute ``log(sum w) / (alpha - 1)``; infinite ``w`` make it infinite without gradient."""
    infinite = log_w == torch.inf
    finite = torch.where(infinite, -torch.inf, log_w)
    empty = (finite == -torch.inf).all(-1)
    total = torch.logsumexp(torch.where(empty.unsqueeze(-1), 0.0, finite), -1)
    beyond = torch.where(infinite.any(-1), torch.inf, torch.where(empty, -torch.inf, 0.0))
    return (total + beyond) / (alpha - 1)


def tv_distance(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, _: float) -> Tensor:
    """Compute ``|p - q| / 2``."""
    difference = p - q
    # The slope of abs(), which torch gives as 0 for NaN, too.
    slope = torch.where(difference.isnan(), torch.nan, difference.sign())
    return slope * difference / 2


def hellinger_distance(lq: Tensor, lp: Tensor, q: Tensor, p: Tensor, _: float) -> Tensor:
    """Compute ``(sqrt p - sqrt q)^2 / 2`` from logarithms, since a root has no slope at 0."""
    return ((lp / 2).exp() - (lq / 2).exp()) ** 2 / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]] = {
    "kl_div": kl_div,
    "reverse_kl_div": reverse_kl_div,
    "js_div": js_div,
    "skew_kl_div": skew_kl_div,
    "reverse_skew_kl_div": reverse_skew_kl_div,
    "alpha_div": alpha_div,
    "renyi_div": renyi_div,
    "tv_distance": tv_distance,
    "hellinger_distance": hellinger_distance,
}

# The value from the terms and the parameter, where it is not the sum of the terms.
FINALIZE: dict[str, Callable[[Tensor, float], Tensor]] = {"renyi_div": log_of_sum}
