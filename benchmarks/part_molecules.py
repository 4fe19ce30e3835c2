"""Samplers on tiny-molecule: what examples/molecules.py measures, with its table and its picture."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import molecules

table = molecules.markdown


def run(folder: Path, seeds: list[int], quick: bool) -> None:
    """Run the example; `quick` with a few molecules at two budgets. Seeds are 0, 1, ..., as many as are named."""
    if find_spec("rdkit") is None:
        print("molecules: skipped, RDKit is not installed (extra `molecules`)")
        return
    given = ["--output_dir", str(folder), "--seeds", str(len(seeds))]
    molecules.main(given + (["--steps", "4", "8", "--num_samples", "10"] if quick else []))
