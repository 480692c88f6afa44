"""Walks through the identities of entropy, cross entropy and divergence, with numbers.

    python examples/identities.py

Every line is computed with fastdiv, with torch and, from probabilities, with SciPy. If the columns
do not show the same digits, the script exits with 1. In the code, `q` is the softmax of logits `x`,
and `p` the softmax of logits `t`.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from scipy.stats import entropy

import fastdiv
from fastdiv import stats

Value = torch.Tensor | np.ndarray | float
Line = tuple[str, Value, Value | None, Value | None]  # name; by fastdiv, torch, SciPy

X, T = torch.tensor([[-0.1, 0.2, -0.4, 0.3]]), torch.tensor([[-0.7, 0.1, -0.1, 0.1]])
Q, P = X.softmax(-1), T.softmax(-1)
A, B = [0.1, 0.2, 0.7], [0.2, 0.3, 0.5]

DRAWS = torch.tensor(
    [
        [0.3286, 0.4247, 1.5101, -0.4628, -0.6365],
        [-0.1079, -0.6032, -1.1911, -0.1564, 0.9218],
        [1.5526, -0.2029, 0.7564, -2.0878, -1.1310],
    ]
)
LABELS = torch.tensor([0, 2, 0])


def of_two_rows_of_logits() -> list[Line]:
    log_q, log_p = X.log_softmax(-1), T.log_softmax(-1)
    classes = torch.arange(4)
    log_prob = fastdiv.log_prob(X.expand(4, 4), classes)
    cross_entropy, torch_cross_entropy = fastdiv.cross_entropy(X, P), F.cross_entropy(X, P)
    h, torch_h = fastdiv.entropy(T), -(P * log_p).sum()
    pointwise = fastdiv.kl_div(X, T, target_type="logits", reduction="pointwise")
    torch_pointwise = F.kl_div(log_q, P, reduction="none")
    q, p = (softmax(v[0].double().numpy()) for v in (X, T))
    h_p, kl_pq = entropy(p), entropy(p, q)
    return [
        ("q = softmax(x)", log_prob.exp(), Q, q),
        ("log q", log_prob, log_q, np.log(q)),
        ("log p", fastdiv.log_prob(T.expand(4, 4), classes), log_p, np.log(p)),
        ("H(p, q) = −Σ p log q", cross_entropy, torch_cross_entropy, h_p + kl_pq),
        ("H(p) = −Σ p log p", h, torch_h, h_p),
        ("H(p, p) = H(p)", fastdiv.cross_entropy(T, P), F.cross_entropy(T, P), h_p),
        ("H(p, q) − H(p)", cross_entropy - h, torch_cross_entropy - torch_h, kl_pq),
        ("  = KL(p‖q)", fastdiv.kl_div(X, T, target_type="logits"),
         F.kl_div(log_q, P, reduction="batchmean"), kl_pq),
        ("  ≠ KL(q‖p)", fastdiv.reverse_kl_div(X, T, target_type="logits"),
         F.kl_div(log_p, Q, reduction="batchmean"), entropy(q, p)),
        ("KL(p‖p) = 0", fastdiv.kl_div(T, T, target_type="logits"),
         F.kl_div(log_p, P, reduction="batchmean"), entropy(p, p)),
        ("terms of KL(p‖q)", pointwise, torch_pointwise, rel_entr(p, q)),
        ("  their mean", pointwise.mean(), torch_pointwise.mean(), rel_entr(p, q).mean()),
    ]  # fmt: skip


def of_labels() -> list[Line]:
    one_hot = F.one_hot(LABELS, 5).float()
    divergence = F.kl_div(DRAWS.log_softmax(-1), one_hot, reduction="batchmean")
    q = softmax(DRAWS.double().numpy(), axis=-1)
    x, y = torch.tensor([[-0.5, 0.3, 1.2]]), torch.tensor([2])
    return [
        ("H(one-hot) = 0", stats.entropy(one_hot[0]), None, entropy([1, 0, 0, 0, 0])),
        ("KL(one-hot‖q)", fastdiv.kl_div(DRAWS, one_hot, target_type="probs"), divergence,
         entropy(one_hot.numpy(), q, axis=-1).mean()),
        ("  = H(one-hot, q)", fastdiv.cross_entropy(DRAWS, one_hot),
         F.cross_entropy(DRAWS, one_hot), None),
        ("  = CE of the labels", fastdiv.cross_entropy(DRAWS, LABELS),
         F.cross_entropy(DRAWS, LABELS), -np.log(q[range(3), LABELS.numpy()]).mean()),
        ("−log softmax(x) at y", -fastdiv.log_prob(x, y), -x.softmax(-1).log()[:, 2],
         -np.log(softmax([-0.5, 0.3, 1.2])[2])),
        ("  = CE of x and y", fastdiv.cross_entropy(x, y),
         F.nll_loss(x.log_softmax(-1), y), None),
    ]  # fmt: skip


def of_probabilities() -> list[Line]:
    a, b = torch.tensor(A), torch.tensor(B)
    m, bits = (a + b) / 2, np.log(2)

    def kl_div(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return F.kl_div(q.log(), p, reduction="sum") / bits

    halves = (kl_div(a, m) + kl_div(b, m)) / 2
    distance = jensenshannon(A, B, base=2)
    joint = stats.information_content(np.outer(A, B), base=2, axis=None)
    return [
        ("I(a) = −log a", stats.information_content(A, base=2), -a.log2(), -np.log2(A)),
        ("H(a), the mean of I(a)", stats.entropy(A, base=2), -(a * a.log2()).sum(),
         entropy(A, base=2)),
        ("KL(a‖b)", stats.kl_div(A, B, base=2), kl_div(a, b), entropy(A, B, base=2)),
        ("KL(b‖a)", stats.kl_div(B, A, base=2), kl_div(b, a), entropy(B, A, base=2)),
        ("JS = ½KL(a‖m) + ½KL(b‖m)", stats.js_div(A, B, base=2), halves, distance**2),
        ("  = JS(b, a)", stats.js_div(B, A, base=2), None, jensenshannon(B, A, base=2) ** 2),
        ("√JS, a metric", stats.jensenshannon(A, B, base=2), halves.sqrt(), distance),
        ("JS((1, 0), (0, 1))", stats.js_div([1, 0], [0, 1], base=2), None,
         jensenshannon([1, 0], [0, 1], base=2) ** 2),
        ("I(a₁ and b₂), independent", joint[0, 1], None, -np.log2(A[0]) - np.log2(B[1])),
    ]  # fmt: skip


def of_smoothed_labels(smoothing: float = 0.1) -> list[Line]:
    """Compute WeNet's loss of a batch of two; the second has one label and one of padding."""
    x, y = DRAWS[[0, 1, 2, 0]].unflatten(0, (2, 2)), torch.tensor([[0, 2], [4, -1]])
    kept = y != -1
    true = torch.full_like(x[kept], smoothing / 4)
    true.scatter_(-1, y[kept].unsqueeze(-1), 1 - smoothing)
    total = F.kl_div(x[kept].log_softmax(-1), true, reduction="sum")
    expected = entropy(true.numpy(), softmax(x[kept].numpy(), axis=-1), axis=-1).sum()
    loss = fastdiv.nn.LabelSmoothingLoss
    return [
        ("divided by the batch size", loss(5, -1, smoothing)(x, y), total / 2, expected / 2),
        ("by the labels", loss(5, -1, smoothing, True)(x, y), total / 3, expected / 3),
    ]


TABLES = {
    "Two rows of logits, in nats": of_two_rows_of_logits,
    "Logits and labels, in nats": of_labels,
    "Probabilities a = (0.1, 0.2, 0.7), b = (0.2, 0.3, 0.5), in bits": of_probabilities,
    "KL from smoothed labels, in nats": of_smoothed_labels,
}


def digits(value: Value | None) -> str:
    """Write four decimals, two numbers per line; a dash if there is nothing to compare with."""
    if value is None:
        return "–"
    numbers = np.asarray(value, dtype=np.float64).round(4) + 0.0  # turns -0 into 0
    printed = [f"{number:.4f}" for number in numbers.flat]
    return "\n".join(" ".join(printed[i : i + 2]) for i in range(0, len(printed), 2))


def agree(cells: Sequence[str]) -> bool:
    return len(set(cells) - {"–"}) == 1


def main() -> int:
    """Return 0 if all columns show the same digits, else 1."""
    console, lines, wrong = Console(), 0, 0
    for title, function in TABLES.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        table.add_column("", min_width=26)
        for name in ("fastdiv", "torch", "SciPy"):
            table.add_column(name, justify="right", min_width=15)
        for what, *values in function():
            cells = [digits(value) for value in values]
            table.add_row(what, *cells, style="" if agree(cells) else "bold red")
            lines, wrong = lines + 1, wrong + (not agree(cells))
        console.print(table)
    console.print(
        f"{lines - wrong} of {lines} lines show the same digits", style="red" if wrong else "green"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
