"""Make the corpus of `tiny-molecule` from the molecules of MOSES that the PyPI package `molsets` carries.

    pip install --no-deps molsets==0.3.1
    python -m discrete_schedulers.training.prepare_molecules --output_dir corpus

One molecule a line, as a SMILES string of at most `--max_tokens` tokens (a token is an atom, a bond, a bracket or a ring
number: `smiles_tokens`). The training split comes from MOSES' own training split; validation and test are drawn from its test
split, which no training sees; they stand in random order. Training molecules are sorted: neighbours then resemble each other,
which is what a compressor likes.

Source: Polykovskiy et al. 2020, Molecular Sets (MOSES), MIT licence; the molecules are a filtered part of ZINC.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import random
import re
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

SMILES_TOKEN = r"\[[^\]]+\]|Br|Cl|%[0-9]{2}|."  # a bracket atom, a two-letter atom and a two-digit ring number are one


def smiles_tokens(smiles: str) -> list[str]:
    """The tokens of a SMILES string, in order: `"ClC[nH]"` has the three tokens `Cl`, `C` and `[nH]`."""
    return re.findall(SMILES_TOKEN, smiles)


def read_moses(split: str) -> list[str]:
    """The SMILES strings of MOSES' split `"train"` or `"test"`, read from the package as data: none of its code runs."""
    package = find_spec("moses")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("molsets is not installed: pip install --no-deps molsets==0.3.1")
    path = Path(package.submodule_search_locations[0]) / "dataset" / "data" / f"{split}.csv.gz"
    return gzip.decompress(path.read_bytes()).decode().split()[1:]  # the first line is the column's name


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_tokens", type=int, default=30, help="Longer molecules are left out.")
    parser.add_argument("--heldout", type=int, default=2500, help="Molecules for validation, and as many for test.")
    args = parser.parse_args(argv)
    short = {s: [x for x in read_moses(s) if len(smiles_tokens(x)) <= args.max_tokens] for s in ("train", "test")}
    if len(short["test"]) < 2 * args.heldout:
        parser.error(f"--heldout is {args.heldout}, but only {len(short['test'])} test molecules are short enough")
    drawn = random.Random(0).sample(short["test"], 2 * args.heldout)
    lines = {"train": sorted(short["train"]), "validation": drawn[: args.heldout], "test": drawn[args.heldout :]}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "LICENSE").write_text(
        distribution("molsets").read_text("LICENSE") or ""
    )  # MIT: it goes with the data
    for split, molecules in lines.items():
        data = ("\n".join(molecules) + "\n").encode()
        (args.output_dir / f"{split}.txt.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        print(f"{split}: {len(molecules):,} molecules, {len(data):,} bytes")


if __name__ == "__main__":
    main()
