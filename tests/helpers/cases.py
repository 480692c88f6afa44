"""The table that drives the suite: every loss with its options, and the inputs it is tried on.

A new loss is one line in LOSSES.  Truth is the reference in float64; `eager` is what a user of
torch would write, in the dtype of the logits; where a bound fails, its error is reported.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv
from fastdiv.reference import topk
from helpers.programs import DIVERGENCE_POLICIES

Eager = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A public function with options.  ``target`` says what its second argument is."""

    name: str
    target: str  # "labels", "logits", "log_probs", "probs" or "none"
    eager: Eager  # rows of the plain loss from (log q, target), target as log p for divergences
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}-{self.target}" + (f"[{options}]" if options else "")

    @property
    def divergence(self) -> bool:
        dense = self.name != "cross_entropy" and not self.name.startswith("topk_")
        return dense and self.target in ("logits", "log_probs", "probs")

    @property
    def per_row(self) -> dict[str, str]:
        """The options for one value a row."""
        return {} if self.name.startswith("log_prob") else {"reduction": "none"}

    @property
    def soft(self) -> bool:
        """Whether the target is a matrix of numbers, which may have a gradient."""
        return self.target not in ("labels", "none")

    def call(self, x: Tensor, t: Tensor | None, **options: Any) -> Tensor:
        """The public function; ``t`` is the target as ``make_target`` made it."""
        options = {**self.options, **options}
        function = getattr(fastdiv, self.name)
        if self.divergence:
            options["target_type"] = self.target
        value = function(x, **options) if t is None else function(x, t, **options)
        return torch.stack(value) if isinstance(value, tuple) else value

    def make_target(self, x: Tensor, logits: Tensor) -> Tensor | None:
        """The target of this case from teacher logits of the shape of x."""
        if self.target == "none":
            return None
        if self.target == "labels":
            return logits.argmax(-1)
        if self.target == "logits":
            return logits
        p = logits.double().softmax(-1)
        return (p.log() if self.target == "log_probs" else p).to(x.dtype)

    def of_target(self, dt: Tensor, t: Tensor) -> Tensor:
        """The gradient of the target ``t``, from the one that the private op returns."""
        return dt

    def truth(self, x: Tensor, t: Tensor | None, **options: Any) -> Tensor:
        """The reference in float64."""
        t = t.double() if t is not None and t.is_floating_point() else t
        with fastdiv.backend("reference"):
            return self.call(x.double(), t, **options)

    def eager_rows(self, x: Tensor, t: Tensor | None) -> Tensor:
        """What torch gives for the rows, in the dtype of x."""
        temperature = self.options.get("temperature", 1.0)
        if cap := self.options.get("softcap"):
            x = cap * torch.tanh(x / cap)
        x = x / temperature
        if self.divergence:
            assert t is not None
            t = {
                "logits": lambda: torch.log_softmax(t / temperature, -1),
                "log_probs": lambda: t,
                "probs": t.log,
            }[self.target]()
        return self.eager(x, t)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TopKCase(Case):
    """A loss of the largest entries of a dense target, which stands in the table as others'.

    At most five, and fewer than there are classes where there are several.  ``eager`` is what a
    class adds, from log q and log p.
    """

    @staticmethod
    def largest(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        count = min(5, max(1, t.shape[dim] - 1))
        # Not topk(), which resolves ties in another way on a GPU.
        values, indices = t.sort(dim=dim, descending=True, stable=True)
        return values.narrow(dim, 0, count), indices.narrow(dim, 0, count)

    def call(self, x: Tensor, t: Tensor | None, **options: Any) -> Tensor:
        assert t is not None
        options = {**self.options, **options}
        values, indices = self.largest(t, options.get("dim", -1))
        function = getattr(fastdiv, self.name)
        return function(x, values, indices, values_type=self.target, **options)

    def of_target(self, dt: Tensor, t: Tensor) -> Tensor:
        _, indices = self.largest(t, -1)
        return torch.zeros_like(t).scatter(-1, indices, dt)

    def eager_rows(self, x: Tensor, t: Tensor | None) -> Tensor:
        assert t is not None
        temperature, missing = self.options.get("temperature", 1.0), self.options.get("missing")
        values, indices = self.largest(t, -1)
        if self.target == "logits":
            values = torch.log_softmax(values / temperature, -1)
        log_p = values.log() if self.target == "probs" else values
        if missing == "renormalize":
            log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)
        lq = torch.log_softmax(x / temperature, -1)
        others = x.shape[-1] - indices.shape[-1]
        value = self.eager(lq.gather(-1, indices), log_p).sum(-1)
        if missing not in ("tail", "uniform") or not others or self.target == "logits":
            return value
        # Of a rest of 0 the gradient would be NaN.
        log_rest = (1 - log_p.exp().sum(-1)).clamp(min=1e-30).log()
        if missing == "tail":
            # The sum is at least that of one class: of none, the gradient would be NaN.
            tail = lq.scatter(-1, indices, -torch.inf).logsumexp(-1)
            return value + self.eager(tail, log_rest)
        mean = lq.scatter(-1, indices, 0.0).sum(-1) / others
        return value + log_rest.exp() * (log_rest - math.log(others) - mean)


def _divergence(terms: Eager) -> Eager:
    return lambda x, lp: terms(torch.log_softmax(x, -1), lp).sum(-1)


def _kl_terms(lq: Tensor, lp: Tensor) -> Tensor:
    return lp.exp() * (lp - lq)


def _reverse_kl_terms(lq: Tensor, lp: Tensor) -> Tensor:
    return lq.exp() * (lq - lp)


def _js_terms(beta: float) -> Eager:
    def terms(lq: Tensor, lp: Tensor) -> Tensor:
        lm = (beta * lp.exp() + (1 - beta) * lq.exp()).log()
        return beta * lp.exp() * (lp - lm) + (1 - beta) * lq.exp() * (lq - lm)

    return terms


def _js(beta: float) -> Eager:
    return _divergence(_js_terms(beta))


def _skew(skew: float, reverse: bool = False) -> Eager:
    def terms(lq: Tensor, lp: Tensor) -> Tensor:
        of, other = (lq, lp) if reverse else (lp, lq)
        return of.exp() * (of - (skew * of.exp() + (1 - skew) * other.exp()).log())

    return _divergence(terms)


def _alpha(alpha: float) -> Eager:
    def rows(x: Tensor, lp: Tensor) -> Tensor:
        powers = alpha * lp + (1 - alpha) * torch.log_softmax(x, -1)
        return (powers.exp().sum(-1) - 1) / (alpha * (alpha - 1))

    return rows


def _renyi(alpha: float) -> Eager:
    def rows(x: Tensor, lp: Tensor) -> Tensor:
        powers = alpha * lp + (1 - alpha) * torch.log_softmax(x, -1)
        return torch.logsumexp(powers, -1) / (alpha - 1)

    return rows


def _cross_entropy(**options: Any) -> Eager:
    def rows(x: Tensor, y: Tensor) -> Tensor:
        z_loss = options.get("z_loss", 0.0)
        smoothing = {k: v for k, v in options.items() if k == "label_smoothing"}
        value = F.cross_entropy(x, y, reduction="none", **smoothing)
        return value + z_loss * torch.logsumexp(x, -1) ** 2 if z_loss else value

    return rows


def _others(epsilon: float) -> Eager:
    """WeNet's smoothing: epsilon over the classes that are not the label."""

    def rows(x: Tensor, y: Tensor) -> Tensor:
        lq, c = torch.log_softmax(x, -1), x.shape[-1]
        p = torch.full_like(lq, epsilon / (c - 1)).scatter(-1, y.unsqueeze(-1), 1 - epsilon)
        return -(p * lq).sum(-1)

    return rows


def _entropy(x: Tensor, _: Any = None) -> Tensor:
    lq = torch.log_softmax(x, -1)
    return -(lq.exp() * lq).sum(-1)


def _log_prob(x: Tensor, y: Tensor) -> Tensor:
    return torch.log_softmax(x, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


_kl = _divergence(_kl_terms)
_reverse_kl = _divergence(_reverse_kl_terms)
_tv = _divergence(lambda lq, lp: (lp.exp() - lq.exp()).abs() / 2)
_hellinger = _divergence(lambda lq, lp: (lp.exp().sqrt() - lq.exp().sqrt()) ** 2 / 2)

DIVERGENCES: list[tuple[str, Eager, dict[str, Any]]] = [
    ("kl_div", _kl, {}),
    ("reverse_kl_div", _reverse_kl, {}),
    ("js_div", _js(0.5), {}),
    ("js_div", _js(0.1), {"beta": 0.1}),
    ("skew_kl_div", _skew(0.1), {}),
    ("skew_kl_div", _skew(0.5, reverse=True), {"skew": 0.5, "reverse": True}),
    ("alpha_div", _alpha(0.3), {"alpha": 0.3}),
    ("alpha_div", _alpha(2.0), {"alpha": 2.0}),
    ("renyi_div", _renyi(0.5), {"alpha": 0.5}),
    ("renyi_div", _renyi(2.0), {"alpha": 2.0}),
    ("tv_distance", _tv, {}),
    ("hellinger_distance", _hellinger, {}),
]

PUBLIC_LOSSES = [
    name
    for name in fastdiv.__all__
    if inspect.isfunction(getattr(fastdiv, name))
    and name not in ("backend", "build_info", "patch_torch", "warm_gradients")
]

LOSSES: list[Case] = [
    Case("cross_entropy", "labels", _cross_entropy()),
    Case("cross_entropy", "labels", _cross_entropy(label_smoothing=0.1), {"label_smoothing": 0.1}),
    Case("cross_entropy", "labels", _others(0.1), {"label_smoothing": 0.1, "smoothing": "others"}),
    Case("cross_entropy", "labels", _cross_entropy(z_loss=1e-3), {"z_loss": 1e-3}),
    Case("cross_entropy", "labels", _cross_entropy(), {"softcap": 20.0}),
    Case("cross_entropy", "labels", _cross_entropy(), {"temperature": 2.5}),
    Case("cross_entropy", "probs", _cross_entropy()),
    Case("cross_entropy", "probs", _cross_entropy(label_smoothing=0.1), {"label_smoothing": 0.1}),
    Case("entropy", "none", _entropy),
    Case("entropy", "none", _entropy, {"temperature": 0.5}),
    Case("log_prob", "labels", _log_prob),
    Case(
        "log_prob_and_entropy",
        "labels",
        lambda x, y: torch.stack([_log_prob(x, y), _entropy(x)]),
    ),
    *[
        Case(name, target, eager, options)
        for name, eager, options in DIVERGENCES
        for target in ("logits", "log_probs", "probs")
    ],
    Case("kl_div", "logits", _kl, {"temperature": 2.0}),
    Case("js_div", "logits", _js(0.5), {"temperature": 2.0}),
    *[
        TopKCase("topk_kl_div", target, _kl_terms, options)
        for target, options in (
            ("logits", {}),
            ("log_probs", {}),
            ("probs", {}),
            ("logits", {"temperature": 2.0}),
            ("probs", {"missing": "renormalize"}),
            ("log_probs", {"missing": "uniform"}),
            ("probs", {"missing": "uniform"}),
            ("log_probs", {"missing": "tail"}),
            ("probs", {"missing": "tail"}),
        )
    ],
    *[
        TopKCase(name, target, terms, options)
        for name, terms, target, options in (
            ("topk_reverse_kl_div", _reverse_kl_terms, "logits", {}),
            ("topk_reverse_kl_div", _reverse_kl_terms, "log_probs", {"missing": "tail"}),
            ("topk_reverse_kl_div", _reverse_kl_terms, "probs", {"missing": "renormalize"}),
            ("topk_js_div", _js_terms(0.5), "logits", {}),
            ("topk_js_div", _js_terms(0.1), "log_probs", {"missing": "tail", "beta": 0.1}),
            ("topk_js_div", _js_terms(0.5), "probs", {"missing": "renormalize"}),
        )
    ],
]


def _kernel(case: Case) -> tuple[str, str]:
    """Return what tells the kernel of a case from others: for divergences not the options.

    For a top-k teacher it is what the kernel says of the other classes.
    """
    if isinstance(case, TopKCase):
        return case.name, topk.rest_of(case.options.get("missing", "ignore"), case.target)
    if case.divergence:
        return DIVERGENCE_POLICIES[case.name], case.target
    return str(case), case.target


# One case of each kernel, for what does not depend on the formula: strides, threads, dead rows.
KERNELS: list[Case] = list({_kernel(case): case for case in reversed(LOSSES)}.values())[::-1]

# One case of each kind, for a compiler, to which a loss is a number: a label, one that is smoothed,
# a soft target, two rows, two outputs, a teacher of k classes.
KINDS: list[Case] = [
    next(case for case in LOSSES if str(case) == name)
    for name in (
        "cross_entropy-labels",
        "cross_entropy-labels[label_smoothing=0.1]",
        "cross_entropy-probs",
        "kl_div-logits",
        "log_prob_and_entropy-labels",
        "topk_kl_div-logits",
    )
]

# 1 and 7: less than a vector; 511, 512, 513: the tile; 4099: prime; 8191, 8192, 8193: the segment;
# 32000 and 128256: vocabularies.  Rows: 1, 3 (split by columns), more than threads.
SHAPES = [
    (1, 1),
    (3, 7),
    (5, 511),
    (4, 512),
    (4, 513),
    (7, 4099),
    (3, 8191),
    (1, 8192),
    (2, 8193),
    (9, 32000),
    (1, 128256),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


TARGET_TYPES = ["logits", "log_probs", "probs"]


def as_type(logits: Tensor, target_type: str) -> Tensor:
    """Return teacher logits as a target of this type, in their dtype."""
    return {
        "logits": lambda: logits,
        "log_probs": lambda: logits.log_softmax(-1),
        "probs": lambda: logits.softmax(-1),
    }[target_type]()


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits."""
    generator = torch.Generator().manual_seed(seed)
    x = randn(shape, generator=generator, dtype=torch.float64) * scale
    t = randn(shape, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype), t.to(dtype)


def randn(*shape: Any, **options: Any) -> Tensor:
    """``torch.randn`` with a generator of the CPU: the same numbers on every device."""
    return torch.randn(*shape, **options, device="cpu").to(torch.get_default_device())


def rand(*shape: Any, **options: Any) -> Tensor:
    """``torch.rand``, likewise."""
    return torch.rand(*shape, **options, device="cpu").to(torch.get_default_device())


# The classes of fastdiv.nn by the name of their function: KLDivLoss is that of kl_div.
MODULES = {name.removesuffix("Loss").lower(): name for name in fastdiv.nn.__all__}


def module_of(function: str) -> Any:
    """Return the class of fastdiv.nn that computes a function, or None."""
    name = MODULES.get(function.replace("_", ""))
    return None if name is None else getattr(fastdiv.nn, name)
