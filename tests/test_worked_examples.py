"""Worked examples from teaching notes on entropy and divergences, to their printed digits."""

from __future__ import annotations

import math

import pytest
import scipy.spatial.distance
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["auto", "reference"], indirect=True),  # some have no kernel
]

DIGITS = 0.5e-4 + 1e-7  # four digits after the point are printed

X_ONE_HOT = [
    (
        [
            [0.3286, 0.4247, 1.5101, -0.4628, -0.6365],
            [-0.1079, -0.6032, -1.1911, -0.1564, 0.9218],
            [1.5526, -0.2029, 0.7564, -2.0878, -1.1310],
        ],
        [0, 2, 0],
        1.7296,
    ),
    (
        [
            [-0.2886, -1.1185, -0.3406, -0.2233, -1.4214],
            [0.7044, -0.1608, 1.4654, 1.3905, 0.5196],
            [-0.8406, 1.6600, 1.9194, 0.8524, 0.8311],
        ],
        [2, 4, 1],
        1.5334,
    ),
]
X, T = torch.tensor([[-0.1, 0.2, -0.4, 0.3]]), torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
A, B = [0.1, 0.2, 0.7], [0.2, 0.3, 0.5]


def printed(actual: Tensor | float, *digits: float) -> None:
    values = torch.as_tensor(actual).flatten().tolist()
    assert values == pytest.approx(list(digits), abs=DIGITS)


def exactly(actual: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-7
    )


# --- identities ---


def distributions() -> tuple[Tensor, Tensor]:
    return torch.randn(50, 9, dtype=torch.float64), torch.randn(50, 9, dtype=torch.float64)


def test_entropy_and_cross_entropy() -> None:
    x, t = distributions()
    p = t.softmax(-1)
    h = fastdiv.entropy(t)
    hpq = fastdiv.cross_entropy(x, p, reduction="none")
    kl = fastdiv.kl_div(x, t, target_type="logits", reduction="none")
    assert (h >= 0).all() and (hpq >= h).all() and (kl > 0).all()
    exactly(fastdiv.cross_entropy(t, p, reduction="none"), h)
    exactly(kl, hpq - h)
    assert (fastdiv.kl_div(t, t, target_type="logits", reduction="none") == 0).all()
    # Not symmetric, neither of them.
    assert (hpq - fastdiv.cross_entropy(t, x.softmax(-1), reduction="none")).abs().min() > 1e-6
    assert (kl - fastdiv.kl_div(t, x, target_type="logits", reduction="none")).abs().min() > 1e-6
    exactly(kl, fastdiv.reverse_kl_div(t, x, target_type="logits", reduction="none"))


@pytest.mark.parametrize(("x", "y", "value"), X_ONE_HOT)
def test_one_hot_kl_is_the_cross_entropy(x: list, y: list, value: float) -> None:
    logits, labels = torch.tensor(x), torch.tensor(y)
    one_hot = F.one_hot(labels, 5).float()
    ways = [
        fastdiv.kl_div(logits, one_hot, target_type="probs"),
        fastdiv.cross_entropy(logits, labels),
        fastdiv.cross_entropy(logits, one_hot),
    ]
    for way in ways:
        printed(way, value)
        exactly(way, ways[0])
    exactly(ways[0], F.kl_div(logits.log_softmax(-1), one_hot, reduction="batchmean"))
    exactly(ways[1], F.cross_entropy(logits, labels))
    exactly(ways[2], F.cross_entropy(logits, one_hot))
    # Of a one-hot distribution nothing is unknown.
    assert (fastdiv.entropy(one_hot.log()) == 0).all()


def test_log_softmax_of_the_first_draw() -> None:
    x = torch.tensor(X_ONE_HOT[0][0])
    printed(fastdiv.log_prob(x, torch.zeros(3, dtype=torch.int64)), -1.8236, -1.7406, -0.5414)


def test_jensen_shannon_is_the_mean_of_two_kl_and_bounded() -> None:
    x, t = distributions()
    p, q = t.softmax(-1), x.softmax(-1)
    m = (p + q) / 2
    js = fastdiv.js_div(x, t, target_type="logits", reduction="none")
    half = [fastdiv.kl_div(m.log(), v, target_type="probs", reduction="none") / 2 for v in (p, q)]
    exactly(js, half[0] + half[1])
    exactly(js, fastdiv.js_div(t, x, target_type="logits", reduction="none"))
    assert (js >= 0).all() and (js <= math.log(2)).all()
    apart = fastdiv.js_div(
        torch.tensor([0.0, -torch.inf]),
        torch.tensor([0.0, 1.0]),
        target_type="probs",
        dim=0,
        reduction="none",
    )
    exactly(apart, math.log(2))  # 1 in base 2
    bits = fastdiv.stats.js_div(p, q, base=2, axis=-1)
    exactly(bits, js / math.log(2))
    assert (bits >= 0).all() and (bits <= 1).all()
    assert fastdiv.stats.js_div([1, 0], [0, 1], base=2) == 1


def test_information_content() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    each = torch.stack([-fastdiv.log_prob(p.log()[None], torch.tensor([i])) for i in range(4)])
    bits = each.flatten() / math.log(2)
    exactly(bits, torch.tensor([1.0, 2.0, 3.0, 3.0]))
    exactly(fastdiv.entropy(p.log(), base=2), (p * bits).sum())  # its expectation
    certain = torch.tensor([[0.0, -torch.inf]])
    assert fastdiv.log_prob(certain, torch.tensor([0])) == 0
    # Additive for independent events, and so is the entropy.
    joint = (p[:, None] * p[None, :]).flatten()
    exactly(fastdiv.entropy(joint.log()), 2 * fastdiv.entropy(p.log()))
    content = fastdiv.stats.information_content
    exactly(content(p, base=2), bits)
    exactly(content(joint, base=2), (bits[:, None] + bits[None, :]).flatten())
    assert content([1.0]) == 0


# --- numbers ---


def test_kl_of_ninths_and_thirds() -> None:
    p = torch.tensor([[9 / 25, 12 / 25, 4 / 25]])
    for x in (torch.zeros(1, 3), torch.full((1, 3), 1 / 3).log()):
        printed(fastdiv.kl_div(x, p, target_type="probs"), 0.0853)
    exactly(
        fastdiv.kl_div(torch.zeros(1, 3), p, target_type="probs"),
        torch.nn.KLDivLoss(reduction="batchmean")(torch.full((1, 3), 1 / 3).log(), p),
    )


def test_pointwise_kl() -> None:
    for kind, t in (
        ("logits", T),
        ("log_probs", T.log_softmax(-1)),
        ("probs", T.softmax(-1)),
    ):
        pointwise = fastdiv.kl_div(X, t, target_type=kind, reduction="pointwise")
        printed(pointwise, -0.0635, 0.0116, 0.1097, -0.0190)
        printed(pointwise.mean(), 0.0097)
        printed(fastdiv.kl_div(X, t, target_type=kind, reduction="sum"), 0.0389)


def test_softmax_and_its_log() -> None:
    index = torch.arange(4)
    log_q = fastdiv.log_prob(X.expand(4, 4), index)
    log_p = fastdiv.log_prob(T.expand(4, 4), index)
    printed(log_q, -1.5222, -1.2222, -1.8222, -1.1222)
    printed(log_q.exp(), 0.2182, 0.2946, 0.1617, 0.3255)
    printed(log_p, -1.9842, -1.1842, -1.3842, -1.1842)
    printed(log_p.exp(), 0.1375, 0.3060, 0.2505, 0.3060)


def test_cross_entropy_less_entropy_is_kl() -> None:
    hpq, h = fastdiv.cross_entropy(X, T.softmax(-1)), fastdiv.entropy(T)
    printed(hpq, 1.3832)
    printed(h, 1.3443)
    printed(hpq - h, 0.0389)
    printed(fastdiv.kl_div(X, T, target_type="logits"), 0.0389)


def test_three_numbers_against_scipy() -> None:
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (A, B))
    bits = math.log(2)
    for p, q, pv, qv in ((a, b, A, B), (b, a, B, A)):
        exactly(fastdiv.entropy(p.log(), base=2), scipy.stats.entropy(pv, base=2))
        options = {"target_type": "probs", "reduction": "sum"}
        want = scipy.stats.entropy(pv, qv, base=2)
        exactly(fastdiv.kl_div(q.log(), p, **options) / bits, want)
        exactly(fastdiv.reverse_kl_div(p.log(), q, **options) / bits, want)
        distance = scipy.spatial.distance.jensenshannon(pv, qv, base=2)
        exactly(fastdiv.js_div(q.log(), p, **options) / bits, distance**2)
        exactly(fastdiv.stats.entropy(p, base=2), scipy.stats.entropy(pv, base=2))
        exactly(fastdiv.stats.kl_div(p, q, base=2), want)
        exactly(fastdiv.stats.js_div(p, q, base=2), distance**2)
        exactly(fastdiv.stats.jensenshannon(p, q, base=2), distance)


def test_cross_entropy_of_one_row_three_ways() -> None:
    x, y = torch.tensor([[-0.5, 0.3, 1.2]]), torch.tensor([2])
    log_softmax = x.log_softmax(-1)
    exactly(x.softmax(-1).log(), log_softmax)
    ours = fastdiv.cross_entropy(x, y)
    exactly(ours, -log_softmax[0, 2])
    exactly(ours, torch.nn.NLLLoss()(log_softmax, y))
    exactly(ours, torch.nn.CrossEntropyLoss()(x, y))
    exactly(fastdiv.nn.CrossEntropyLoss()(x, y), ours)


def test_the_same_numbers_from_probabilities() -> None:
    p, q = T[0].softmax(-1).double(), X[0].softmax(-1).double()
    printed(fastdiv.stats.cross_entropy(p, q), 1.3832)
    printed(fastdiv.stats.entropy(p), 1.3443)
    printed(fastdiv.stats.kl_div(p, q), 0.0389)
    printed(fastdiv.stats.kl_div([9 / 25, 12 / 25, 4 / 25], [1 / 3, 1 / 3, 1 / 3]), 0.0853)
    x, y, value = X_ONE_HOT[0]
    one_hot = F.one_hot(torch.tensor(y), 5)
    for function in (fastdiv.stats.kl_div, fastdiv.stats.cross_entropy):
        printed(function(one_hot, torch.tensor(x).softmax(-1), axis=-1).mean(), value)
    assert (fastdiv.stats.entropy(one_hot, axis=-1) == 0).all()


# --- torch's KLDivLoss, all its switches ---


@pytest.mark.filterwarnings("ignore:reduction. 'mean':UserWarning")
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
def test_switches_of_kl_div_loss(shape: tuple[int, ...], reduction: str, log_target: bool) -> None:
    x, t = torch.randn(shape), torch.randn(shape).log_softmax(-1)
    t = t if log_target else t.exp()
    theirs = torch.nn.KLDivLoss(reduction=reduction, log_target=log_target)(x.log_softmax(-1), t)
    options = {"target_type": "log_probs" if log_target else "probs"}
    if reduction in ("none", "mean"):  # of elements; our "none" and "mean" are of rows
        ours = fastdiv.kl_div(x, t, reduction="pointwise", **options)
        ours = ours.mean() if reduction == "mean" else ours
    else:
        ours = fastdiv.kl_div(x, t, reduction=reduction, **options)
    exactly(ours, theirs)


# --- WeNet's LabelSmoothingLoss ---


@pytest.mark.parametrize("normalize_length", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_at_the_size_of_wenet(smoothing: float, normalize_length: bool) -> None:
    batch, length, size = 16, 13, 4233
    x, y = torch.randn(batch, length, size), torch.randint(size, (batch, length))
    kept = torch.arange(length) < torch.randint(5, length + 1, (batch, 1))
    y[~kept] = -1
    true = torch.full_like(x, smoothing / (size - 1))
    true.scatter_(-1, y.clamp(0).unsqueeze(-1), 1 - smoothing)
    kl = scipy.stats.entropy(true[kept].double(), x[kept].double().softmax(-1), axis=-1).sum()
    loss = fastdiv.nn.LabelSmoothingLoss(size, -1, smoothing, normalize_length)
    exactly(loss(x, y), kl / (kept.sum().item() if normalize_length else batch))
    # A KL, not a cross entropy: the entropy of the true distribution is subtracted.
    hpq = fastdiv.cross_entropy(
        x, y, dim=-1, ignore_index=-1, label_smoothing=smoothing, smoothing="others"
    )
    h = scipy.stats.entropy([1 - smoothing] + [smoothing / (size - 1)] * (size - 1))
    exactly(hpq - h, kl / kept.sum().item())
