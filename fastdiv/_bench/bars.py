"""Pictures of one shape: a group of bars for each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .canvas import STYLES, figure, legend
from .result import Result


def _title(results: Sequence[Result]) -> str:
    return f"of {results[0].shape[0]}×{results[0].shape[1]} logits, forward + backward"


def _bars(results: Sequence[Result], heights: Mapping[str, Any], label: str, title: str) -> Any:
    """A panel for each dtype, a group of bars for each loss, a bar for each variant."""
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    losses = list(dict.fromkeys(r.loss for r in results))
    picture = figure(1.3 + 0.105 * (len(heights) + 1) * len(losses))
    panels = picture.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for dtype, axes in zip(dtypes, panels, strict=True):
        by_loss = {r.loss: r for r in results if r.dtype == dtype}
        for i, (variant, height) in enumerate(heights.items()):
            bars = [
                (n, value)
                for n, loss in enumerate(losses)
                if loss in by_loss and (value := height(by_loss[loss])) is not None
            ]
            width = 1 / (len(heights) + 0.7)
            drawn = axes.barh(
                [n + (i - (len(heights) - 1) / 2) * width for n, _ in bars],
                [value for _, value in bars],
                height=0.92 * width,
                color=STYLES[variant][1],
                label=STYLES[variant][0],
            )
            axes.bar_label(drawn, labels=[_short(v) for _, v in bars], padding=2, fontsize=6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.01)
        axes.set_xlim(right=1.16 * axes.get_xlim()[1])
        axes.set(title=dtype, xlabel=label)
    panels[0].set_yticks(range(len(losses)), [loss.replace("_", " ") for loss in losses])
    panels[0].invert_yaxis()
    picture.suptitle(title, fontsize=11, fontweight="bold")
    legend(picture, panels)
    return picture


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def plot_times(results: Sequence[Result]) -> Any:
    """Milliseconds beside eager torch and torch.compile."""

    def height(variant: str) -> Any:
        return lambda r: 1e3 * r.training[variant].median if variant in r.training else None

    shown = [v for v in STYLES if any(v in r.training for r in results)]
    heights = {variant: height(variant) for variant in shown}
    return _bars(results, heights, "ms", f"Time {_title(results)}")


def plot_memory(results: Sequence[Result]) -> Any:
    """Memory beside eager torch."""

    def height(variant: str) -> Any:
        return lambda r: None if (v := r.extra_bytes.get(variant)) is None else v / 1e6

    shown = [v for v in STYLES if any(r.extra_bytes.get(v) is not None for r in results)]
    heights = {variant: height(variant) for variant in shown}
    label = "MB beyond logits, target and gradient"
    return _bars(results, heights, label, f"Memory {_title(results)}")
