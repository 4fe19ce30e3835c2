"""Schedulers on molecules, where RDKit says exactly what a sample is worth: a table, a picture, and their numbers.

    pip install -e ".[molecules]"
    python examples/molecules.py --output_dir molecule_results

The bundled `tiny-molecule` writes SMILES strings. For each sampler and number of steps: the share of strings that are molecules
(validity), of these the share of different ones (uniqueness), of those the share that the training data do not have (novelty),
with standard errors over seeds. A sampler can buy validity with diversity, so `new` multiplies the three (what share of the
samples is a molecule of its own that is new), and a second table has the internal diversity and the mean number of tokens.
A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import discrete_schedulers as ds
from discrete_schedulers.evaluation import mean_and_error
from discrete_schedulers.molecules import canonical_smiles, molecule_metrics

MODEL = "tiny-molecule"
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "counts, random order": ("AncestralScheduler", {}),
    "counts, temperature 0.8": ("AncestralScheduler", {"temperature": 0.8}),
    "counts, temperature 0.6": ("AncestralScheduler", {"temperature": 0.6}),
    "counts, spread order": ("AncestralScheduler", {"order": "spread"}),
    "confidence": ("ConfidenceScheduler", {}),
    "confidence, blocks of 6": ("ConfidenceScheduler", {"block_length": 6}),
    "entropy bound": ("EntropyBoundScheduler", {}),
    "MaskGIT": ("MaskGITScheduler", {}),
    "ReMDM rescale": ("RemaskingScheduler", {"strength": "rescale"}),
    "path planning (P2)": ("PathPlanningScheduler", {}),
}
METRICS = ("validity", "uniqueness", "novelty", "new", "internal_diversity", "tokens", "calls")


def asset(name: str) -> bytes:
    """A file of the bundled model."""
    return (files("discrete_schedulers") / "assets" / MODEL / name).read_bytes()


def read_split(name: str) -> list[str]:
    """Molecules of the bundled corpus."""
    return lzma.decompress(asset(f"corpus/{name}.txt.xz")).decode().splitlines()


def judge(texts: list[str], tokens: torch.Tensor, end: int, calls: int, known: list[str]) -> dict[str, float | None]:
    """One number for each of `METRICS`; `None` where there is none because no string is valid."""
    numbers = molecule_metrics(texts, known)
    different = {smiles for smiles in map(canonical_smiles, texts) if smiles is not None}
    novelty = 0.0 if math.isnan(numbers["novelty"]) else numbers["novelty"]
    numbers |= {"new": len(different) * novelty / len(texts)}
    numbers |= {"tokens": float((tokens != end).sum(1).double().mean()), "calls": float(calls)}
    return {name: None if math.isnan(numbers[name]) else numbers[name] for name in METRICS}


def measure(
    pipe: ds.DiscreteDiffusionPipeline, known: list[str], steps: int, seeds: int, samples: int
) -> dict[str, list[float | None]]:
    """One value of each metric for each seed, by the pipeline's own scheduler."""
    rows = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        output = pipe(num_samples=samples, num_inference_steps=steps, generator=generator)
        end = pipe.tokenizer.eos_token_id
        rows.append(judge(output.texts, output.sequences, end, output.num_model_calls, known))
    return {name: [row[name] for row in rows] for name in METRICS}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("molecule_results"),
        help="For table, picture and numbers. Default: %(default)s.",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[4, 8, 16, 32],
        help="Numbers of steps to compare at. Default: %(default)s.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="How many. Default: %(default)s.")
    parser.add_argument("--num_samples", type=int, default=60, help="Molecules for each seed.")
    parser.add_argument(
        "--samplers",
        nargs="+",
        choices=list(SAMPLERS),
        default=list(SAMPLERS),
        metavar="NAME",
        help="Some of the table's lines; all by default.",
    )
    args = parser.parse_args(argv)
    canonical_smiles("C")  # says at once if RDKit is not there
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe = ds.DiscreteDiffusionPipeline.from_pretrained(f"discrete-schedulers/{MODEL}")
    pipe.set_progress_bar_config(disable=True)
    base, known = pipe.scheduler.config, read_split("train")
    path = args.output_dir / "molecules.json"
    weights = hashlib.sha256(asset("model/diffusion_pytorch_model.safetensors")).hexdigest()[:16]
    settings = {"model": MODEL, "weights": weights, "rdkit": version("rdkit")}
    settings |= {"seeds": args.seeds, "num_samples": args.num_samples}
    results: dict[str, Any] = {"settings": settings, "rows": {}}
    if path.is_file() and json.loads(path.read_text())["settings"] == settings:
        results = json.loads(path.read_text())

    print(f"{len(known):,} training molecules are read once, to say what is new: half a minute on one core", flush=True)
    if "data" not in results:
        held_out = read_split("test")[: args.num_samples * args.seeds]
        ids = pipe.tokenizer(held_out, padding=True, return_tensors="pt")["input_ids"]
        parts = [slice(seed, None, args.seeds) for seed in range(args.seeds)]
        rows = [judge(held_out[part], ids[part], pipe.tokenizer.eos_token_id, 0, known) for part in parts]
        results["data"] = {name: [row[name] for row in rows] for name in METRICS}
    for name in args.samplers:
        cls, knobs = SAMPLERS[name]
        pipe.scheduler = getattr(ds, cls).from_config(base, **knobs)
        for steps in args.steps:
            row = results["rows"].setdefault(name, {})
            if str(steps) not in row:
                row[str(steps)] = measure(pipe, known, steps, args.seeds, args.num_samples)
                write_text(path, json.dumps(results, indent=1) + "\n")
                print(
                    f"{name}, {steps} steps: {cell(row[str(steps)], 'validity', 'uniqueness', 'novelty')}", flush=True
                )

    table = markdown(results)
    write_text(args.output_dir / "molecules.md", table + "\n")
    draw(args.output_dir / "molecules.png", pipe, base, args.samplers, max(args.steps))
    print(f"\n{table}\n\nTables, picture and numbers are in {args.output_dir}/")
    return results


def cell(row: dict[str, list[float | None]], *metrics: str) -> str:
    """Means, with their standard errors where there are several seeds; `–` where a seed has no number."""
    parts = []
    for name in metrics:
        values, digits = [value for value in row[name] if value is not None], 1 if name in ("tokens", "calls") else 2
        if len(values) < len(row[name]):
            parts.append("–")
        elif len(values) == 1:
            parts.append(f"{values[0]:.{digits}f}")
        else:
            mean, error = mean_and_error(values)
            parts.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
    return " / ".join(parts)


def markdown(results: dict[str, Any]) -> str:
    """Two tables, a line for each sampler and a column for each number of steps; the data first."""
    steps = list(dict.fromkeys(n for row in results["rows"].values() for n in row))

    def grid(*metrics: str) -> str:
        lines = ["| steps | " + " | ".join(steps) + " |", "| --- |" + " ---: |" * len(steps)]
        lines.append("| held-out molecules |" + f" {cell(results['data'], *metrics)} |" * len(steps))
        for name, row in results["rows"].items():
            lines.append(f"| {name} | " + " | ".join(cell(row[n], *metrics) if n in row else "–" for n in steps) + " |")
        return "\n".join(lines)

    settings = results["settings"]
    return (
        f"**Validity / uniqueness / novelty** of {settings['num_samples']} samples a seed, {settings['seeds']} seeds, mean ± "
        f"standard error (RDKit {settings['rdkit']}).\n\n{grid('validity', 'uniqueness', 'novelty')}\n\n"
        "**New** (share of the samples that are valid, different and not in the training data) **/ internal diversity / tokens "
        f"of a molecule.**\n\n{grid('new', 'internal_diversity', 'tokens')}"
    )


def draw(path: Path, pipe: ds.DiscreteDiffusionPipeline, base: Any, names: list[str], steps: int) -> None:
    """A row of molecules for each sampler that wrote any: its first valid ones of seed 0."""
    from rdkit import Chem
    from rdkit.Chem import Draw

    columns, molecules, legends = 6, [], []
    for name in names:
        cls, knobs = SAMPLERS[name]
        pipe.scheduler = getattr(ds, cls).from_config(base, **knobs)
        generator = torch.Generator().manual_seed(0)
        texts = pipe(num_samples=8 * columns, num_inference_steps=steps, generator=generator).texts
        valid = [smiles for smiles in map(canonical_smiles, texts) if smiles is not None][:columns]
        row = [Chem.MolFromSmiles(smiles) for smiles in valid]
        if row:  # RDKit writes no legend where there is no molecule
            molecules += row + [None] * (columns - len(row))
            legends += [f"{name}, {steps} steps", *[""] * (columns - 1)]
    image = Draw.MolsToGridImage(
        molecules or [None], molsPerRow=columns, subImgSize=(200, 150), legends=legends or ["none"]
    )
    temporary = path.with_name(f".{path.name}")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def write_text(path: Path, content: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
