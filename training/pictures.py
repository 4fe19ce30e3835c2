"""The pictures of a finished run: what its sampler is worth, and what was learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from discrete_schedulers import DiscreteScheduler, Learn2PDScheduler
from discrete_schedulers.schedulers.scheduling_learn2pd import filter_log_odds
from discrete_schedulers.training.files import unwritten

PANELS = {  # columns of a table, and how a picture names them
    "matched_perplexity": "perplexity at the data's entropy",
    "statistic": "distance from the data (nats)",
    "nll": "NLL bound (nats per token)",
    "entropy": "entropy within a sample (nats)",
}


def write_plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Perplexity at equal entropy, NLL bound and entropy against model calls, where the rows have them; one line for each
    sampler.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    plt = pyplot()
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    columns = [key for key in PANELS if any(row.get(key) is not None for row in rows)]
    figure, axes = plt.subplots(
        1, len(columns), figsize=(5 * max(2, len(columns)), 4), layout="constrained", squeeze=False
    )
    steps = sorted({row["steps"] for row in rows})
    for axis, key in zip(axes[0], columns, strict=True):
        for number, name in enumerate(names):
            points = sorted(
                (row["calls"], row[key], row.get("matched_error")) for row in rows if is_point(row, name, key)
            )
            if points:
                calls, values, errors = zip(*points, strict=True)
                bars = list(errors) if key == "matched_perplexity" else None
                axis.errorbar(calls, values, bars, marker="o", capsize=3, label=name, color=f"C{number}")
        axis.set(xscale="log", xlabel="model calls", ylabel=PANELS[key])
        axis.set_xticks(steps, [str(n) for n in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if key == "matched_perplexity":
            axis.set_yscale("log")
            for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                formatter(lambda value, _: f"{value:g}")
    axes[0][-1].legend(fontsize=8)  # entropy, which all samplers have
    save(figure, path)


def is_point(row: dict[str, Any], name: str, key: str) -> bool:
    """Whether a row has this column of this sampler."""
    return row["sampler"] == name and row.get(key) is not None


def write_coefficients_plot(path: Path, scheduler: DiscreteScheduler, budgets: list[int]) -> None:
    """What a scheduler has learned: the masked share and each block of floats over the time of the run, from noise (1) to data
    (0), one line for each step budget; orders by position; of a filter, its answers.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    plt = pyplot()
    if isinstance(scheduler, Learn2PDScheduler):
        drawings: list[Callable[[Any], None]] = [lambda axis: draw_filter(axis, scheduler)]
    else:
        drawings = [lambda axis: draw_grids(axis, scheduler, budgets)]
        names = dict.fromkeys(name for blocks in (scheduler.config.coefficients or {}).values() for name in blocks)
        for name in names:
            if name == "order":
                drawings.append(lambda axis: draw_orders(axis, scheduler, budgets))
            elif name not in ("times", "counts"):
                drawings.append(partial(draw_block, scheduler=scheduler, budgets=budgets, name=name))
        if scheduler.config.grid == "optimal":
            drawings.append(lambda axis: draw_curve(axis, scheduler))
    figure, axes = plt.subplots(1, len(drawings), figsize=(5 * len(drawings), 4), layout="constrained", squeeze=False)
    for axis, draw in zip(axes[0], drawings, strict=True):
        axis.grid(alpha=0.3)
        draw(axis)
    save(figure, path)


def draw_grids(axis: Any, scheduler: DiscreteScheduler, budgets: list[int]) -> None:
    """Masked share after each step."""
    for steps in budgets:
        scheduler.set_timesteps(steps)
        survival = scheduler.noise_process.alpha(scheduler.times).flatten()
        share = (1 - survival) / (1 - survival[0])
        axis.plot([k / steps for k in range(steps + 1)], share.tolist(), marker=".", label=f"{steps} steps")
    axis.plot([0, 1], [1, 0], color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="share of the steps done", ylabel="masked share")
    axis.legend(fontsize=8)


def draw_block(axis: Any, scheduler: DiscreteScheduler, budgets: list[int], name: str) -> None:
    """A float of each step over the time at which the step begins."""
    for number, steps in enumerate(budgets):
        values = (scheduler.config.coefficients or {}).get(str(steps), {}).get(name)
        if values is not None:
            scheduler.set_timesteps(steps)
            line = {"marker": "o", "color": f"C{number}", "label": f"{steps} steps"}
            axis.plot(scheduler.times[:-1].tolist(), values, **line)
    axis.set(xlabel="time t of the step (1 is noise)", ylabel=name.replace("_", " "))
    low, high = axis.get_ylim()
    room = 0.02 * max(1.0, abs(low), abs(high))
    if high - low < room:  # equal numbers: their rounding is not to fill the picture
        axis.set_ylim((low + high - room) / 2, (low + high + room) / 2)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.invert_xaxis()
    axis.legend(fontsize=8)


def draw_orders(axis: Any, scheduler: DiscreteScheduler, budgets: list[int]) -> None:
    """When each position opens, as a share of the steps."""
    rows = []
    for steps in budgets:
        priority = torch.tensor(scheduler.config.coefficients[str(steps)]["order"])
        rows.append(((priority.max() - priority) / max(steps - 1, 1)).tolist())
    axis.grid(False)
    image = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axis.figure.colorbar(image, ax=axis, label="step in which it opens (0 first, 1 last)")
    axis.set_yticks(range(len(budgets)), [f"{steps} steps" for steps in budgets])
    axis.set(xlabel="position")


def draw_curve(axis: Any, scheduler: DiscreteScheduler) -> None:
    """The information curve that an optimal grid follows from."""
    curve = scheduler.config.information_curve
    axis.plot([1 - i / len(curve) for i in range(len(curve))], curve)
    axis.set(xlabel="masked share", ylabel="cross-entropy of a masked token (nats)")
    axis.invert_xaxis()


def draw_filter(axis: Any, scheduler: Learn2PDScheduler) -> None:
    """P(final) that the filter gives where a whole block has one confidence: mean, least and largest over the positions."""
    assert scheduler.layers is not None
    confidence = torch.linspace(0, 1, 101, dtype=torch.float64)
    width = len(scheduler.layers["output_bias"])
    f = filter_log_odds(scheduler.layers, confidence[:, None].expand(-1, width)).sigmoid()  # (101, w)
    axis.plot(confidence.tolist(), f.mean(1).tolist(), label="mean of the positions")
    axis.fill_between(confidence.tolist(), f.amin(1).tolist(), f.amax(1).tolist(), alpha=0.3, label="least to largest")
    axis.axhline(scheduler.config.threshold, color="black", linestyle="--", label="threshold")
    axis.set(xlabel="confidence of the whole block", ylabel="P(final) of the filter")
    axis.legend(fontsize=8)


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with unwritten(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot().close(figure)
