"""Markdown tables of the results: nothing in a table is typed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import learned
import part_distillation
import part_learned_image
import part_learned_text
import part_molecules
from part_tiny_image import SAMPLERS as IMAGE_SAMPLERS
from samplers import SAMPLERS
from store import summary


def cell(item: dict[str, Any] | None, digits: int) -> str:
    """Mean ± standard error, `–` where there is nothing; no decimals from 1,000 on."""
    if item is None:
        return "–"
    digits = digits if item["mean"] < 1000 else 0
    text = f"{item['mean']:.{digits}f}"
    return text if item["standard_error"] is None else f"{text} ± {item['standard_error']:.{digits}f}"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers stand on the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_sampler(head: list[str], columns: list[Any], entry: Callable[[str, Any], str], first: list[list[str]]) -> str:
    """One line for each sampler of the list, after the lines `first`."""
    return grid(head, first + [[s.label, *[entry(s.name, column) for column in columns]] for s in SAMPLERS])


def folded(title: str, parts: list[str]) -> str:
    """Tables that a reader opens on demand."""
    return "\n\n".join([f"<details><summary>{title}</summary>", *parts, "</details>"])


def seeds_of(content: dict[str, Any]) -> str:
    return f"{len(content['settings']['seeds'])} seeds, mean ± standard error"


def joints(content: dict[str, Any]) -> str:
    """Exact KL for each joint and budget, and the best of the temperature sweep at 4 steps."""
    settings = content["settings"]
    budgets = [str(n) for n in settings["budgets"]]
    parts = []
    for name, joint in content["joints"].items():
        num_tokens, length = settings["joints"][name]
        parts.append(
            f"**{name}** ({length} positions, {num_tokens} tokens, entropy {joint['entropy']:.3f} nats): KL(data ‖ sampler) in "
            f"nats, exact; ± only where coefficients are learned ({seeds_of(content)}).\n\n"
            + by_sampler(
                ["steps", *budgets],
                budgets,
                lambda sampler, n, rows=joint["rows"]: cell(rows[sampler][n]["kl"], 4),
                [],
            )
        )
    steps = "4" if 4 in settings["sweep_budgets"] else str(settings["sweep_budgets"][0])

    def tuned(sampler: str, name: str) -> str:
        row = content["joints"][name]["rows"][sampler][steps]
        return f"{row['kl']['mean']:.4f} → {row['best_kl']['mean']:.4f} at {row['best_temperature']}"

    names = list(content["joints"])
    swept = ", ".join(map(str, settings["temperatures"]))
    parts.append(
        f"**{steps} steps with one global temperature** (of {swept}): KL at 1 → at the best.\n\n"
        + by_sampler(["sampler", *names], names, tuned, [])
    )
    first, *others, last = parts
    return "\n\n".join([first, last, *([folded("The other joints", others)] if others else [])])


def bound(content: dict[str, Any], data: str) -> str:
    """NLL bounds by budget, and what is gained on the first sampler, seed by seed: their orders are the same."""
    budgets = [str(n) for n in content["settings"]["budgets"]]
    rows, at = content["rows"], "8" if "8" in budgets else budgets[0]

    def entry(sampler: str, n: str) -> str:
        if n != "gain":
            return cell(rows[sampler][n]["nll"], 4)
        pairs = zip(rows[SAMPLERS[0].name][at]["nll"]["values"], rows[sampler][at]["nll"]["values"], strict=True)
        return cell(summary([first - own for first, own in pairs]), 4)

    return (
        f"**NLL bound on {data}**, nats per token ({seeds_of(content)}); last column: gain on the first line at {at} steps, "
        "seed by seed.\n\n" + by_sampler(["steps", *budgets, f"gain at {at}"], [*budgets, "gain"], entry, [])
    )


def of_samples(
    content: dict[str, Any], title: str, metrics: list[tuple[str, int]], budgets: list[int], real: str
) -> str:
    """Metrics of samples at temperature 1 by budget, several in one cell, and real data in the first line."""

    def entry(metrics_by_name: dict[str, Any]) -> str:
        return " / ".join(cell(metrics_by_name.get(name), digits) for name, digits in metrics)

    def at(sampler: str, n: str) -> str:
        return entry(content["rows"][sampler][n]["samples"]["1.0"])

    columns = [str(n) for n in budgets]
    first = [[real, *[entry(content["reference"])] * len(columns)]]
    return f"{title}\n\n" + by_sampler(["steps", *columns], columns, at, first)


def at_one_entropy(content: dict[str, Any], judge: str, metric: str) -> str:
    """Perplexity of samples and the temperature that gives the entropy of real data."""
    columns = list(content["matched_entropy"])
    found = {n: item["entropy"] for n, item in content["matched_entropy"].items()}
    named = ", ".join(f"{e:.3f} nats at {n} steps" for n, e in found.items())

    def entry(sampler: str, n: str) -> str:
        row = content["matched_entropy"][n]["rows"].get(sampler)
        return "–" if row is None else f"{cell(row['perplexity'], 2)} (T {row['temperature']:.2f})"

    real = content["reference"][metric]["mean"]
    swept = ", ".join(map(str, content["settings"]["temperatures"]))
    title = (
        f"**{judge} at one {metric.replace('_', ' ')}**: {named} (real data: {real:.3f}). In brackets the temperature "
        f"that gives it, interpolated between {swept}; – where none does."
    )
    return f"{title}\n\n" + by_sampler(["steps", *columns], columns, entry, [])


def tiny_text(content: dict[str, Any]) -> str:
    """Bound, judges, diversity, and perplexity at one entropy."""
    settings = content["settings"]
    windows = settings["heldout_windows"]
    parts = [
        of_samples(
            content,
            f"**4-gram perplexity / unigram entropy** of {settings['samples']} samples a seed, temperature 1.",
            [("perplexity", 1), ("entropy", 3)],
            settings["sample_budgets"],
            "held-out text",
        )
    ]
    if settings["smollm2"] and all(n in settings["sample_budgets"] for n in settings["smollm2_budgets"]):
        title = f"**SmolLM2-135M perplexity** of {settings['smollm2_samples']} samples a seed, temperature 1."
        parts.append(
            of_samples(content, title, [("smollm2_perplexity", 1)], settings["smollm2_budgets"], "held-out text")
        )
    parts.append(
        of_samples(
            content,
            "**distinct-2 / repetition-4** of the same samples, temperature 1.",
            [("distinct_2", 3), ("repetition_4", 4)],
            settings["sample_budgets"],
            "held-out text",
        )
    )
    return "\n\n".join(
        [
            bound(content, f"{windows} held-out windows"),
            "The same windows for all; with other windows all bounds would move together, by "
            f"± {content['data_error']:.3f}.",
            at_one_entropy(content, "4-gram perplexity", "entropy"),
            folded("Samples at temperature 1: perplexity under both judges, entropy, diversity", parts),
        ]
    )


def antiberty(content: dict[str, Any]) -> str:
    """Bound, perplexity under the model's own many-step law, diversity, and perplexity at one entropy."""
    settings = content["settings"]
    length = settings["length"]
    real = f"{length} steps, one token each"
    title = (
        f"**Perplexity under the model's own {length}-step law / unigram entropy** of {settings['samples']} samples a "
        "seed."
    )
    return "\n\n".join(
        [
            bound(content, f"{settings['heldout_sequences']} of the model's own {length}-step samples"),
            at_one_entropy(content, f"Perplexity under the model's own {length}-step law", "trigram_entropy"),
            folded(
                "Samples at temperature 1: perplexity, entropy, diversity",
                [
                    of_samples(content, title, [("perplexity", 2), ("entropy", 3)], settings["sample_budgets"], real),
                    of_samples(
                        content,
                        "**trigram entropy / distinct-3** of each seed's samples together.",
                        [("trigram_entropy", 3), ("distinct_3", 3)],
                        settings["sample_budgets"],
                        real,
                    ),
                ],
            ),
        ]
    )


def steps(content: dict[str, Any]) -> str:
    """One step of each scheduler in units of one read, of the reference, and of diffusers' schedulers."""
    settings, parts = content["settings"], []
    for shape in settings["shapes"]:
        result = content["x".join(map(str, shape))]
        reference, theirs, ours = result["reference"]["seconds"], result["diffusers"], result["ours"]
        head = ["one step", "rows it needs", "time / one read of them", "reference / time", "extra memory"]
        head += [f"{name} / time" for name in theirs]
        rows = []
        for name, row in ours.items():
            sampler, given = name.split("; ")
            factors = [f"{item['seconds'] / row['seconds']:.1f}" for item in theirs.values()]
            rows.append(
                [
                    sampler if given == "all" else f"{sampler} (given these rows only)",
                    f"{row['rows']:.0f}",
                    f"{row['seconds'] / row['read_seconds']:.1f}",
                    f"{reference / row['seconds']:.0f}",
                    f"{100 * row['extra_memory']:.1f} %",
                    *factors,
                ]
            )
        memory = ", ".join(f"{name} {100 * item['extra_memory']:.0f} %" for name, item in theirs.items())
        parts.append(
            f"**B = {shape[0]}, L = {shape[1]}, V = {shape[2]}, N = {settings['steps']}**, half of the positions masked, "
            f"{settings['threads']} thread(s), medians. Extra memory in units of the logits; of diffusers' schedulers: "
            f"{memory}.\n\n" + grid(head, rows)
        )
    return "\n\n".join(parts)


def tiny_image(content: dict[str, Any]) -> str:
    """Accuracy of the classifier on samples, and the distances of their features and pixels from those of the data."""
    settings, reference = content["settings"], content["reference"]
    columns = [str(n) for n in settings["budgets"]]
    heldout = content["classifier"]["heldout_accuracy"]

    def table(metric: str, digits: int) -> str:
        lines = [["held-out images", *[cell(reference[metric], digits)] * len(columns)]]
        for name, sampler in IMAGE_SAMPLERS.items():
            lines.append([sampler.label, *[cell(content["rows"][name][n][metric], digits) for n in columns]])
        return grid(["steps", *columns], lines)

    size = f"{settings['samples']} samples a seed, {seeds_of(content)}"
    return "\n\n".join(
        [
            f"**Accuracy of a classifier on samples of a class** ({size}); on all held-out images it has {heldout:.3f}.",
            table("accuracy", 3),
            "**Frechet distance** of the classifier's features to those of the training images, the samples of all seeds.",
            table("frechet", 2),
            folded("Euclidean distance to the nearest training image (pixels in [0, 1])", [table("nearest", 2)]),
        ]
    )


def costs(content: dict[str, Any]) -> str:
    """Ratios of whole generation, exponents, and the import."""
    settings, run, package = content["settings"], content["generation"], content["package"]
    model, axes = settings["model"], list(settings["sizes"])
    others = {"dense": "all logits, the same draws", "one_stage": "all logits, dense one-stage draw in float64"}
    rows = [[label, f"{run[name] / run['rows']:.2f}"] for name, label in others.items()]
    growth = [[name, *[f"{item[axis]['exponent']:.2f}" for axis in axes]] for name, item in content["growth"].items()]
    return "\n\n".join(
        [
            f"**Whole generation**, {model['num_blocks']} blocks of {model['hidden_size']}, L = {model['max_length']}, "
            f"V = {model['vocab_size']}, N = {settings['steps']}, B = 1, {settings['threads']} thread(s): time / time with "
            "the head and the draws at chosen rows.",
            grid(["network and step", "ratio"], rows),
            "**Exponents** that the time of a step grows with (N: the time of a run, on logits that are given).",
            grid(["step", *axes], growth),
            f"`import discrete_schedulers` takes {package['ours'] / package['base']:.2f} times as long as importing torch and "
            f"diffusers' `ConfigMixin`; its files have {package['megabytes']:.1f} MB.",
        ]
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "joints": joints,
    "tiny-text": tiny_text,
    "antiberty": antiberty,
    "steps": steps,
    "tiny-image": tiny_image,
    "costs": costs,
    "molecules": part_molecules.table,
    "distillation": part_distillation.table,
    "learned-text": lambda content: learned.table(content, part_learned_text.METRICS, cell),
    "learned-image": lambda content: learned.table(content, part_learned_image.METRICS, cell),
}


def put_into(text: str, part: str, table: str) -> str:
    """The text with this table between the part's markers.

    Raises:
        ValueError: If the text does not have both markers once.
    """
    opening, closing = f"<!-- results:{part} -->", f"<!-- /results:{part} -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"the text must have {opening} and then {closing}, each once")
    before, rest = text.split(opening)
    return f"{before}{opening}\n{table}\n{closing}{rest.split(closing)[1]}"


def taken_from(text: str, part: str) -> str:
    """What stands between the part's markers."""
    return text.split(f"<!-- results:{part} -->\n")[1].split(f"\n<!-- /results:{part} -->")[0]
