"""One picture of a run: how latencies are distributed, and what came when."""

from pathlib import Path
from typing import TYPE_CHECKING

from gfxlm.cli.traffic.report import Report, percentile
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PALE, _LINE, _ACCENT = "#1f2933", "#7b8794", "#2563eb", "#d97706"
_MARKED = (50, 95, 99)
# Of the graph over time: no wider than these seconds, where that makes neither too few nor too many.
_BIN, _FEWEST_BINS, _MOST_BINS = 0.25, 12, 60


def check(path: Path) -> None:
    """Raise UserError, before anything is measured, where there is nothing to draw with or no such kind of file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UserError("--plot: matplotlib is not installed; pip install 'gfxlm[plot]'") from error
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise UserError(f"--plot: {path}: expected a name that ends in one of .{', .'.join(kinds)}")


def plot(report: Report, path: Path) -> None:
    """Write the picture; its format follows from the file's name."""
    # Without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    load = report.load
    figure = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
    speed = report.per_second(report.output_tokens)
    figure.suptitle(
        f"{report.model}    {len(report.answered)} requests, "
        f"{load.input_tokens} tokens in, {load.output_tokens} out    {speed:.0f} output tok/s",
        x=0.01,
        ha="left",
        color=_INK,
        fontsize=13,
        fontweight="bold",
    )
    axes = figure.subplots(2, 2)
    times = report.times()
    _distribution(axes[0][0], times["ttft"], "arrival to first token")
    _distribution(axes[0][1], times["itl"], "from a piece of text to the next")
    _distribution(axes[1][0], times["e2el"], "arrival to last token")
    _over_time(axes[1][1], report)
    figure.savefig(path, dpi=150)


def _distribution(axes: "Axes", seconds: list[float], title: str) -> None:
    """The share of values below each value, with percentiles marked; the last hundredth may lie beyond the edge."""
    _plain(axes, title)
    if not seconds:
        return
    ordered = sorted(seconds)
    unit, factor = ("s", 1.0) if percentile(ordered, 50) >= 1 else ("ms", 1e3)
    values = [factor * value for value in ordered]
    marked = {f"p{percent}": percentile(values, percent) for percent in _MARKED}
    right = min(1.05 * values[-1], 1.5 * marked["p99"])
    shares = [(rank + 1) / len(values) for rank in range(len(values))]
    axes.step([0.0, values[0], *values], [0.0, 0.0, *shares], where="post", color=_LINE, linewidth=2, clip_on=True)
    for percent, value in zip(_MARKED, marked.values(), strict=True):
        axes.plot([value], [percent / 100], "o", color=_ACCENT, markersize=6)
    digits = 0 if marked["p50"] >= 100 else 1 if marked["p50"] >= 10 else 2
    lines = [f"{name:<4}{value:>8.{digits}f} {unit}" for name, value in (marked | {"max": values[-1]}).items()]
    # One of these corners is empty.
    late = marked["p50"] > right / 2
    axes.text(
        *((0.03, 0.95) if late else (0.97, 0.07)),
        "\n".join(lines),
        ha="left" if late else "right",
        va="top" if late else "bottom",
        transform=axes.transAxes,
        color=_INK,
        fontsize=10,
        family="monospace",
    )
    axes.set_xlabel(unit, color=_PALE)
    axes.set_ylim(0, 1.04)
    axes.set_xlim(0, right)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _over_time(axes: "Axes", report: Report) -> None:
    """Output tokens a second, and how many requests are under way."""
    _plain(axes, "output tok/s, and requests under way (dashed)")
    if not report.duration:
        return
    bins = max(_FEWEST_BINS, min(_MOST_BINS, int(report.duration / _BIN)))
    width = report.duration / bins
    counts = [0.0] * bins
    for sample in report.answered:
        for moment in sample.pieces:
            counts[min(bins - 1, int(moment / width))] += sample.output_tokens / len(sample.pieces)
    middles = [(number + 0.5) * width for number in range(bins)]
    speeds = [count / width for count in counts]
    axes.fill_between(middles, speeds, step="mid", color=_LINE, alpha=0.15, linewidth=0)
    axes.step(middles, speeds, where="mid", color=_LINE, linewidth=2)
    axes.set_xlabel("s", color=_PALE)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, report.duration)
    under_way = axes.twinx()
    running = [sum(s.arrival <= moment < s.end for s in report.samples) for moment in middles]
    under_way.step(middles, running, where="mid", color=_ACCENT, linewidth=1.2, linestyle="--")
    under_way.set_ylim(0, 1.15 * max(running, default=1) or 1)
    under_way.tick_params(colors=_ACCENT, length=0)
    under_way.spines[:].set_visible(False)


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.tick_params(colors=_PALE, length=0)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
