"""What the ranks of the distributed tests do; run by ``ranks.Ranks``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastdiv
import fastdiv.distributed as sharded
from helpers.cases import LOSSES, Case, make_inputs
from helpers.roundings import RESULTS, assert_rounded, evaluate, truth_and_scale

LABELS, PROBS = "labels", "probs"


def cross_entropy(target: str, **options: Any) -> Case:
    return Case("cross_entropy", target, lambda x, t: x, options)


# Every row of the suite's table that there is a sharded loss for, and what else may go wrong when
# classes, weights and labels are on different ranks.
CASES = [
    *(c for c in LOSSES if c.name in sharded.__all__),
    *(
        cross_entropy(target, **options)
        for target in (LABELS, PROBS)
        for options in (
            {"weight": True, "reduction": "mean"},
            {"weight": True, "label_smoothing": 0.2, "z_loss": 0.01, "reduction": "mean"},
            {"weight": True, "label_smoothing": 0.2, "smoothing": "others", "softcap": 5.0},
            {"token_weight": True, "reduction": "mean", "temperature": 0.7},
            {"reduction": "batchmean"},
            {"dim": 0, "reduction": "sum"},
        )
    ),
    cross_entropy(LABELS, ignored=True, label_smoothing=0.1, reduction="mean"),
    cross_entropy(LABELS, ignored=True, weight=True, reduction="mean"),
    Case("kl_div", "logits", lambda x, t: x, {"token_weight": True, "reduction": "mean"}),
    Case("js_div", "probs", lambda x, t: x, {"token_weight": True, "reduction": "mean"}),
    Case("entropy", "none", lambda x, t: x, {"base": 2.0, "reduction": "mean"}),
]
# The merge of shards adds roundings to those of a kernel, and the reference has torch's sums.
MORE = 2.0
SIZES = {2: (1, 90), 3: (60, 1, 30), 4: (7, 44, 1, 39)}


def classes_of(rank: int, sizes: tuple[int, ...]) -> slice:
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def size_of(group: Any) -> int:
    return dist.get_world_size(group)


def digest(*tensors: Tensor) -> str:
    """Of their bits."""
    parts = (v.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for v in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def arguments(case: Case, x: Tensor, logits: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    """Target and options of a case, of whole rows."""
    t, options = case.make_target(x, logits), dict(case.options)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = torch.arange(len(x))
    if options.pop("weight", False):
        options["weight"] = torch.rand(x.shape[1], dtype=torch.float64).to(dtype)
    if options.pop("token_weight", False):
        options["token_weight"] = (rows % 3).to(dtype)
    if options.pop("ignored", False):
        assert t is not None
        t[rows % 4 == 1] = -100
    if not case.name.startswith("log_prob"):
        options.setdefault("reduction", "none")
    if case.divergence:
        options["target_type"] = case.target
    return t, options


def call(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Tensor]:
    """The loss of rows; where ``dim`` is 0, of their transpose."""
    turned = options.get("dim") == 0

    def loss(x: Tensor, t: Tensor | None) -> Tensor:
        if turned:
            x, t = (v if v is None or v.dim() < 2 else v.t() for v in (x, t))
        value = function(x, **options) if t is None else function(x, t, **options)
        return torch.stack(value) if isinstance(value, tuple) else value

    return loss


def of_shard(options: dict[str, Any], mine: slice, group: Any) -> dict[str, Any]:
    cut = {k: v[mine] if k == "weight" else v for k, v in options.items()}
    return {**cut, "group": group}


def compare(group: Any, rank: int, dtype: torch.dtype, backend: str = "native") -> list[str]:
    """All cases against float64, by the accept rule that the kernels of whole rows obey.

    A failure reports the error of these kernels where that rule reports eager torch's.
    """
    sizes, found = SIZES[size_of(group)], []
    mine = classes_of(rank, sizes)
    for number, case in enumerate(CASES):
        x, logits = make_inputs((48, sum(sizes)), dtype, seed=number)
        t, options = arguments(case, x, logits)
        soft = t is not None and t.is_floating_point()
        in_double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        with fastdiv.backend("reference"):
            whole = call(getattr(fastdiv, case.name), in_double)
            truth, scale = truth_and_scale(whole, x, t, case)
        with fastdiv.backend(backend):
            whole = evaluate(call(getattr(fastdiv, case.name), options), x, t)
            loss = call(getattr(sharded, case.name), of_shard(options, mine, group))
            ours = evaluate(loss, x[:, mine], t[:, mine] if soft else t)
        check(case, mine, ours, whole, truth, scale)
        found.append(f"{case}: {digest(ours[0])}")
    return found


def check(
    case: Case,
    mine: slice,
    ours: list[Tensor],
    whole: list[Tensor],
    truth: list[Tensor],
    scale: list[Tensor],
) -> None:
    """A shard's results against truth."""
    for what, a, b in zip(RESULTS, ours, whole, strict=False):
        assert a.dtype == b.dtype, (str(case), what, a.dtype)

    def of_mine(results: list[Tensor]) -> list[Tensor]:
        return [v[:, mine] if i else v.reshape(-1, *v.shape[1:]) for i, v in enumerate(results)]

    whole, truth, scale = map(of_mine, (whole, truth, scale))
    ours = [v if i else v.reshape(-1, *v.shape[1:]) for i, v in enumerate(ours)]
    for what, a, b in zip(RESULTS, ours, truth, strict=False):
        assert a.shape == b.shape, (str(case), what, a.shape)
    results = list(zip(ours, truth, scale, strict=True))
    assert_rounded(case.name, f"of {case}", results, lambda: whole, MORE)
