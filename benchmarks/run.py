"""All reported numbers, in one command:

    python benchmarks/run.py                  # everything, some hours; a killed run goes on
    python benchmarks/run.py joints table     # some parts: joints, tiny-text, tiny-image, molecules, antiberty, steps, costs,
                                              # distillation, learned-text, learned-image
    python benchmarks/run.py steps table --again    # what is complete, too: times of a quieter machine
    python benchmarks/run.py --quick          # tiny settings, to see that it runs; results in runs/benchmarks-quick

Each part writes benchmarks/results/<part>.json; `table` writes the README's tables from these files. A part that is complete,
with the same settings, versions and weights, is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import part_antiberty
import part_costs
import part_distillation
import part_joints
import part_learned_image
import part_learned_text
import part_molecules
import part_steps
import part_tiny_image
import part_tiny_text
from store import write
from tables import TABLES, put_into

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "joints": part_joints.run,
    "tiny-text": part_tiny_text.run,
    "antiberty": part_antiberty.run,
    "steps": part_steps.run,
    "tiny-image": part_tiny_image.run,
    "costs": part_costs.run,
    "molecules": part_molecules.run,
    "distillation": part_distillation.run,
    "learned-text": part_learned_text.run,
    "learned-image": part_learned_image.run,
}
CARD = ROOT / "src" / "discrete_schedulers" / "assets" / "tiny-image" / "README.md"  # has the part's table too


def write_tables(folder: Path, readme: Path) -> None:
    """Put the tables of all results in the folder between the markers of the README."""
    text = readme.read_text()
    for part, table in TABLES.items():
        path = folder / f"{part}.json"
        if path.is_file():
            text = put_into(text, part, table(json.loads(path.read_text())))
            print(f"table: {part}")
    write(readme, text)


def write_card(folder: Path, card: Path) -> None:
    """Put the table of tiny-image into the card of the model."""
    path = folder / "tiny-image.json"
    if path.is_file() and card.is_file():
        write(card, put_into(card.read_text(), "tiny-image", TABLES["tiny-image"](json.loads(path.read_text()))))


def main(argv: list[str] | None = None) -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join([*PARTS, 'table'])}; all by default")
    parser.add_argument("--quick", action="store_true", help="Tiny settings.")
    parser.add_argument("--again", action="store_true", help="Run the named parts anew, also where they are complete.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=None, help="Defaults to benchmarks/results.")
    parser.add_argument("--readme", type=Path, default=None, help="Defaults to README.md, or tables.md of a quick run.")
    args = parser.parse_intermixed_args(argv)
    wrong = set(args.parts) - {*PARTS, "table"}
    if wrong:
        parser.error(f"unknown part {sorted(wrong)}; allowed: {', '.join([*PARTS, 'table'])}")
    if args.again and not set(args.parts) & {*PARTS}:
        parser.error("--again needs the parts that are to be run anew")
    folder = args.output_dir or (ROOT / "runs" / "benchmarks-quick" if args.quick else ROOT / "benchmarks" / "results")
    readme = args.readme or (folder / "tables.md" if args.quick else ROOT / "README.md")
    for part, run in PARTS.items():
        if part in args.parts or not args.parts:
            if args.again:
                (folder / f"{part}.json").unlink(missing_ok=True)
            run(folder, args.seeds, args.quick)
    if "table" in args.parts or not args.parts:
        if args.quick and args.readme is None:
            write(readme, "".join(f"<!-- results:{part} -->\n<!-- /results:{part} -->\n" for part in TABLES))
        write_tables(folder, readme)
        if readme == ROOT / "README.md":
            write_card(folder, CARD)


if __name__ == "__main__":
    main()
