"""All reported numbers, in one command:

    python benchmarks/run.py                  # everything, some hours; a killed run goes on
    python benchmarks/run.py joints table     # some parts: joints, tiny-text, tiny-image, molecules, antiberty, steps, costs,
                                              # distillation, learned-text, learned-image
    python benchmarks/run.py steps table --again    # what is complete, too: times of a quieter machine
    python benchmarks/run.py --quick          # tiny settings, to see that it runs; results in runs/benchmarks-quick

Each part writes benchmarks/results/<part>.json; `table` writes the tables of README.md and benchmarks/RESULTS.md from these
files (of another folder: its tables.md). A part that is complete, with the same settings, versions and weights, is not run
again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
from headlines import HEADLINES
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
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md")


def made_tables(folder: Path) -> dict[str, str]:
    """All tables, by name, that the results in the folder are enough for."""
    paths = {part: folder / f"{part}.json" for part in TABLES}
    contents = {part: json.loads(path.read_text()) for part, path in paths.items() if path.is_file()}
    found = {part: TABLES[part](content) for part, content in contents.items()}
    for name, (parts, table) in HEADLINES.items():
        if all(part in contents for part in parts):
            found[name] = table(*[contents[part] for part in parts])
    return found


def write_tables(folder: Path, pages: Sequence[Path]) -> None:
    """Put the tables of all results in the folder between their markers, which stand in one of the pages each.

    Raises:
        ValueError: If a table has a place in none of the pages, or in more than one.
    """
    texts = {page: page.read_text() for page in pages}
    for name, table in made_tables(folder).items():
        places = [page for page, text in texts.items() if f"<!-- results:{name} -->" in text]
        if len(places) != 1:
            named = " and ".join(page.name for page in places or pages)
            raise ValueError(f"the table {name!r} must have one place; it has {len(places)} in {named}")
        texts[places[0]] = put_into(texts[places[0]], name, table)
        print(f"table: {name} in {places[0].name}")
    for page, text in texts.items():
        write(page, text)


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
    args = parser.parse_intermixed_args(argv)
    wrong = set(args.parts) - {*PARTS, "table"}
    if wrong:
        parser.error(f"unknown part {sorted(wrong)}; allowed: {', '.join([*PARTS, 'table'])}")
    if args.again and not set(args.parts) & {*PARTS}:
        parser.error("--again needs the parts that are to be run anew")
    folder = (args.output_dir or (ROOT / "runs" / "benchmarks-quick" if args.quick else RESULTS)).resolve()
    is_published = folder == RESULTS and not args.quick
    pages = PAGES if is_published else (folder / "tables.md",)
    for part, run in PARTS.items():
        if part in args.parts or not args.parts:
            if args.again:
                (folder / f"{part}.json").unlink(missing_ok=True)
            run(folder, args.seeds, args.quick)
    if "table" in args.parts or not args.parts:
        if not is_published:
            names = [*TABLES, *HEADLINES]
            write(pages[0], "".join(f"<!-- results:{name} -->\n<!-- /results:{name} -->\n" for name in names))
        write_tables(folder, pages)
        if is_published:
            write_card(folder, CARD)


if __name__ == "__main__":
    main()
