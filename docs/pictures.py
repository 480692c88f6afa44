"""Draw the pictures of these pages: `python docs/pictures.py`.

The first picture shows measurements that are committed in benchmarks/results.  The others show
what fastdiv computes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiv

HERE = Path(__file__).parent / "pictures"
MEASURED = Path(__file__).parent.parent / "benchmarks/results/amd-epyc-avx512-2-threads.json"
Divergence = Callable[[Tensor, Tensor], Tensor]

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastdiv",
}


def of_rows(function: Callable[..., Tensor], **options: float) -> Divergence:
    """Return a function that computes the divergence of every row from logits."""
    return partial(function, target_type="logits", reduction="none", **options)


FAMILY = {
    "kl_div": of_rows(fastdiv.kl_div),
    "reverse_kl_div": of_rows(fastdiv.reverse_kl_div),
    "js_div": of_rows(fastdiv.js_div),
    "skew_kl_div, λ = 0.1": of_rows(fastdiv.skew_kl_div),
    "alpha_div, α = 0.3": of_rows(fastdiv.alpha_div, alpha=0.3),
    "alpha_div, α = 2": of_rows(fastdiv.alpha_div, alpha=2.0),
    "renyi_div, α = 2": of_rows(fastdiv.renyi_div, alpha=2.0),
    "tv_distance": of_rows(fastdiv.tv_distance),
    "hellinger_distance": of_rows(fastdiv.hellinger_distance),
}


# Only the light picture has a background: it also serves where a page cannot choose.
LIGHT = {
    "text": "#1f2328",
    "faint": "#6e7781",
    "fused": "#1a8f4c",
    "compile": "#8c7bd6",
    "eager": "#b4bac1",
}
DARK = {
    "text": "#e6edf3",
    "faint": "#8b949e",
    "fused": "#3fc27a",
    "compile": "#a293ea",
    "eager": "#6e7681",
}
VARIANTS = {"fused": "fastdiv", "compile": "torch.compile", "eager": "eager torch"}
FOUR_LOSSES = {
    "cross_entropy": "cross entropy",
    "kl_div": "KL divergence",
    "js_div": "JS divergence",
    "entropy": "entropy",
}


def bars(
    axis: plt.Axes, values: list[dict[str, float]], unit: str, title: str, colors: dict[str, str]
) -> None:
    """Draw a group of labelled horizontal bars for each loss; the first group names the bars."""
    for row, by_variant in enumerate(values):
        shown = [variant for variant in VARIANTS if variant in by_variant]
        for i, variant in enumerate(shown):
            value, ours = by_variant[variant], variant == "fused"
            y = row + 0.26 * (i - (len(shown) - 1) / 2)
            axis.barh(y, value, height=0.22, color=colors[variant])
            label = f"{value:.0f} {unit}" if value > 2 else f"{value:.1f} {unit}"
            axis.annotate(
                label if row else f"{label}  {VARIANTS[variant]}",
                (value, y),
                xytext=(4, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=9,
                fontweight="bold" if ours else "normal",
                color=colors["fused" if ours else "text"],
            )
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=colors["text"], pad=10)
    axis.set(xlim=(0, 1.2 * max(max(v.values()) for v in values)), xticks=[])
    axis.grid(False)
    axis.spines["bottom"].set_visible(False)
    axis.spines["left"].set_color(colors["faint"])
    axis.tick_params(axis="y", length=0, pad=8, labelcolor=colors["text"], labelsize=10)


def time_and_memory(colors: dict[str, str] = LIGHT) -> plt.Figure:
    """Draw the measured time and memory of four losses beside eager torch and torch.compile."""
    of_shape = {
        r["loss"]: r
        for r in json.loads(MEASURED.read_text())["results"]
        if (r["dtype"], r["rows"], r["classes"]) == ("f32", 512, 32000)
    }
    results = [of_shape[loss] for loss in FOUR_LOSSES]
    times = [{k: v["median"] for k, v in r["training_ms"].items()} for r in results]
    memory = [{k: v / 1e6 for k, v in r["extra_bytes"].items()} for r in results]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.3), sharey=True)
    figure.patch.set_alpha(0 if colors is DARK else 1)
    bars(left, times, "ms", "Time, forward and backward", colors)
    bars(right, memory, "MB", "Extra memory", colors)
    for axis in (left, right):
        axis.patch.set_alpha(0)
    left.set_yticks(range(len(results)), FOUR_LOSSES.values())
    left.invert_yaxis()
    figure.supxlabel(
        "512 × 32000 logits in float32; two AVX2 cores of an AMD EPYC, torch 2.13. Extra memory:\n"
        "beyond logits, target and gradient.",
        fontsize=8,
        color=colors["faint"],
    )
    return figure


def time_and_memory_dark() -> plt.Figure:
    """Draw the same for pages with a dark background."""
    return time_and_memory(DARK)


def two_classes() -> plt.Figure:
    """Value and gradient over the student's logit; the teacher's is 2."""
    logit = torch.linspace(-6, 8, 141, dtype=torch.float64)
    x = torch.stack([logit, torch.zeros_like(logit)], dim=-1).requires_grad_()
    t = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand_as(x)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
    for name, divergence in FAMILY.items():
        value = divergence(x, t)
        slope = torch.autograd.grad(value.sum(), x)[0][:, 0]
        for axis, y in zip(axes, (value, slope), strict=True):
            axis.plot(logit, y.detach(), label=name, linewidth=1.6)
    for axis, title, limits in zip(
        axes, ("value", "gradient of the logit"), ((-0.05, 2.5), (-1.2, 0.6)), strict=True
    ):
        axis.set(title=title, xlabel="the student's logit", xlim=(-6, 8), ylim=limits)
        axis.axvline(2, color="#888888", linewidth=0.8, linestyle=":")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def fit_from(
    start: float, divergence: Divergence, places: Tensor, teacher: Tensor
) -> tuple[float, Tensor]:
    """Fit a Gaussian that begins at ``start``; return its divergence and its log-density."""
    mean = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    log_deviation = torch.zeros_like(mean, requires_grad=True)
    optimizer = torch.optim.LBFGS([mean, log_deviation], max_iter=30, line_search_fn="strong_wolfe")

    def student() -> Tensor:
        return -(((places - mean) / log_deviation.exp()) ** 2)[None] / 2

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = divergence(student(), teacher).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return loss().item(), student().detach()


def fit() -> plt.Figure:
    """Draw a Gaussian student of a teacher with two bumps."""
    places = torch.linspace(-6, 6, 161, dtype=torch.float64)
    bumps = [(0.6, -2.0, 0.7), (0.4, 2.3, 0.6)]
    density = sum(w * torch.exp(-(((places - m) / s) ** 2) / 2) / s for w, m, s in bumps)
    teacher = torch.as_tensor(density).log()[None]
    fits = {
        "KL(p‖q)": of_rows(fastdiv.kl_div),
        "α = ½": of_rows(fastdiv.alpha_div, alpha=0.5),
        "JS, β = 0.1": of_rows(fastdiv.js_div, beta=0.1),
        "JS, β = 0.9": of_rows(fastdiv.js_div, beta=0.9),
        "KL(q‖p)": of_rows(fastdiv.reverse_kl_div),
    }
    figure, axes = plt.subplots(1, len(fits), figsize=(9, 2.3), sharey=True)
    for axis, (name, divergence) in zip(axes, fits.items(), strict=True):
        ends = [fit_from(start, divergence, places, teacher) for start in (-2.0, 0.5)]
        _, student = min(ends, key=lambda end: end[0])
        p, q = teacher.softmax(-1)[0], student.softmax(-1)[0]
        axis.fill_between(places, p, color="#d0d0d0", label="teacher")
        axis.plot(places, q, color="#1b7837", label="student")
        axis.set(title=name, xlim=(-6, 6), yticks=[], xticks=[])
        axis.grid(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def near_zero() -> plt.Figure:
    """Error of a float32 KL, of every row, over its true value."""
    generator = torch.Generator().manual_seed(0)
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    points: dict[str, list[Tensor]] = {"log_softmax, then F.kl_div": [], "fastdiv.kl_div": []}
    truths = []
    for apart in torch.logspace(0.3, -4, 15):
        x = 50 + torch.randn(8, 32000, generator=generator)
        t = x + apart * torch.randn(8, 32000, generator=generator)
        truth = FAMILY["kl_div"](x.double(), t.double())
        log_q, log_p = x.log_softmax(-1), t.log_softmax(-1)
        usual = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        truths.append(truth)
        for kept, value in zip(points.values(), (usual, FAMILY["kl_div"](x, t)), strict=True):
            kept.append((value / truth - 1).abs().clamp_min(1e-8))
    for (name, kept), color in zip(points.items(), ("#888888", "#1b7837"), strict=True):
        axis.scatter(torch.cat(truths), torch.cat(kept), s=9, color=color, label=name)
    axis.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
    axis.text(1e-2, 1.4, "no digit is right", color="#555555")
    axis.set(xscale="log", yscale="log", xlabel="KL(p‖q), in double", ylabel="relative error")
    axis.legend()
    return figure


def main(folder: Path = HERE) -> None:
    """Write every picture as SVG into ``folder``."""
    with plt.rc_context(STYLE):
        for draw in (time_and_memory, time_and_memory_dark, two_classes, fit, near_zero):
            figure = draw()
            figure.set_layout_engine("constrained")
            file = folder / f"{draw.__name__}.svg"
            figure.savefig(file, metadata={"Date": None})
            plt.close(figure)
            # A browser takes its own font.  Matplotlib's, which is wider, has set the layout.
            file.write_text(file.read_text().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
