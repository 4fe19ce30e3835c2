"""The README's three small tables: a few rows of what stands in full in RESULTS.md, out of the same files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from learned import LABELS
from samplers import SAMPLERS
from tables import cell, grid

MATCHED = ("learned", "shipped", "spread-contrast", "spread", "optimal", "uniform", "confidence")
BOUNDS = ("bernoulli-uniform", "counts-uniform", "counts-optimal", "spread-uniform", "lsd-score-l2", "lsd-plus-literal")
STEPS = ("ancestral, counts", "remasking", "confidence", "entropy bound", "ancestral, uniform noise")


def matched(text: dict[str, Any]) -> str:
    """Statistic and perplexity at the entropy of real text: learned, by hand, plain."""
    settings, rows = text["settings"], text["rows"]
    budgets, references = ([str(n) for n in settings[key]] for key in ("budgets", "reference_budgets"))

    def entry(name: str, steps: str) -> str:
        row = rows[name][steps]
        return f"{cell(row['statistic'], 2)} / {row['perplexity']['mean']:.0f}"

    lines = [[LABELS[name], *[entry(name, n) for n in budgets]] for name in MATCHED if name in rows]
    last = references[-1]
    lines.append([f"random order, {last} calls", *[entry("uniform", last)] * len(budgets)])
    return (
        "**tiny-text at the entropy of real text**: two-sample statistic against held-out text, nats (0 is best) / perplexity "
        f"under a 4-gram judge; {len(settings['seeds'])} seeds, mean ± standard error.\n\n"
        + grid(["calls", *budgets], lines)
    )


def bounds(text: dict[str, Any], antibodies: dict[str, Any]) -> str:
    """NLL bounds of a few samplers on both models, at the first three budgets."""
    subjects = {"tiny-text": text, "AntiBERTy": antibodies}
    columns = [(name, str(n)) for name, content in subjects.items() for n in content["settings"]["budgets"][:3]]
    labels = {sampler.name: sampler.label for sampler in SAMPLERS}

    def entry(sampler: str, subject: str, steps: str) -> str:
        return cell(subjects[subject]["rows"][sampler][steps]["nll"], 2)

    lines = [[labels[name], *[entry(name, *column) for column in columns]] for name in BOUNDS]
    return (
        "**NLL bound on held-out data**, nats per token (lower is better); mean ± standard error over the seeds.\n\n"
        + grid(["steps", *[f"{name}, {n}" for name, n in columns]], lines)
    )


def speed(steps: dict[str, Any]) -> str:
    """Time of the dense reference over that of a step, and its extra memory."""
    settings = steps["settings"]

    def entry(name: str, shape: list[int]) -> str:
        result = steps["x".join(map(str, shape))]
        row = result["ours"][f"{name}; all"]
        return f"{result['reference']['seconds'] / row['seconds']:.0f} / {100 * row['extra_memory']:.1f} %"

    shapes = settings["shapes"]
    lines = [[name, *[entry(name, shape) for shape in shapes]] for name in STEPS]
    return (
        f"**One step of {settings['steps']}, without the network**: time of the usual dense draw / time, and extra memory in "
        "units of the logits.\n\n"
        + grid(["step", *[f"B = {b}, L = {length}, V = {v}" for b, length, v in shapes]], lines)
    )


# name to the parts that a table is made of, and the function that makes it of these
HEADLINES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "headline-text": (("learned-text",), matched),
    "headline-bounds": (("tiny-text", "antiberty"), bounds),
    "headline-speed": (("steps",), speed),
}
