"""Plots the loss of a trainer_log.jsonl."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas

from ..run_folder import checkpoint_step, list_checkpoints, replace
from .log_file import LogLine


def plot_run(lines: list[LogLine], output_dir: Path) -> None:
    """Write training_loss.png, and with `stage: dpo` training_rewards_accuracies.png, as LLaMA-Factory names them."""
    plot_loss(lines, output_dir / "training_loss.png")
    plot_loss(lines, output_dir / "training_rewards_accuracies.png", "rewards/accuracies")


def plot_loss(lines: list[LogLine], picture: Path, name: str = "loss") -> None:
    """Draw a figure of the log, raw and smoothed, with eval points, learning rate and checkpoints, if it has a value.

    `picture`: a .png in the run's folder, whose name is the title and whose checkpoints are marked.
    """
    train = [(line["current_steps"], line[name], line["lr"]) for line in lines if name in line and "lr" in line]
    if not train:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed only to plot
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, losses, rates = zip(*train, strict=True)
    few = len(steps) < 30  # a smoothed curve would hide the points
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel=name, title=picture.resolve().parent.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate_axes = axes.twinx()
    rate_axes.plot(steps, rates, color="tab:green", linewidth=1, alpha=0.6, label="learning rate")
    rate_axes.set_ylabel("learning rate", color="tab:green")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.plot(
        steps, losses, color="tab:blue", linewidth=1, alpha=1 if few else 0.4, label=name, marker="." if few else ""
    )
    if not few:
        axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label=f"{name}, smoothed")
    names = sorted({k for line in lines for k in line if k.startswith("eval_") and k.endswith(f"_{name}")})
    colors = itertools.cycle(("tab:orange", "tab:purple", "tab:brown", "tab:olive"))
    for metric in names:
        evals = [(line["current_steps"], line[metric]) for line in lines if metric in line]
        color = "tab:red" if metric == f"eval_{name}" else next(colors)
        line = "o-" if len(evals) > 2 else "o"  # two points, such as the first and the last, are no curve
        axes.plot(*zip(*evals, strict=True), line, color=color, markersize=4, label=metric.replace("_", " "))
    for i, folder in enumerate(list_checkpoints(picture.parent)):
        axes.axvline(
            checkpoint_step(folder), color="grey", linewidth=0.8, linestyle=":", label="checkpoint" if i == 0 else None
        )
    handles, labels = axes.get_legend_handles_labels()
    more_handles, more_labels = rate_axes.get_legend_handles_labels()
    figure.legend(handles + more_handles, labels + more_labels, loc="outside lower center", ncols=4, frameon=False)
    axes.set_zorder(rate_axes.get_zorder() + 1)
    axes.patch.set_visible(False)
    unfinished = picture.with_name(picture.name + ".tmp")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a folder with a Chinese name
        figure.savefig(unfinished, format="png")
    replace(unfinished, picture)


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of two moving averages over about 5 % of the values, one from each end: one alone would lag."""
    curve = pandas.Series(values, dtype=float)
    alpha = 1 / max(len(curve) / 20, 1)
    smoothed: list[float] = ((curve.ewm(alpha=alpha).mean() + curve[::-1].ewm(alpha=alpha).mean()) / 2).tolist()
    return smoothed
