"""The README: its code runs where the models are bundled, and names nothing that is not there; its links lead somewhere."""

from __future__ import annotations

import ast
import builtins
import json
import re
from pathlib import Path

import pytest

import discrete_schedulers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
WITHOUT_TABLES = re.sub(r"<!-- results:([\w-]+) -->.*?<!-- /results:\1 -->", "", README, flags=re.DOTALL)


def runs_offline(block: str) -> bool:
    """Whether all that it loads is bundled."""
    names = re.findall(r'from_pretrained\(\s*"([^"]+)"', block)
    return "from_pretrained(name)" not in block and all(name.startswith("discrete-schedulers/") for name in names)


def test_blocks_that_need_no_hub_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one session, as a reader would: each block may use what those before it have made."""
    pytest.importorskip("rdkit")
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    ran = [block for block in BLOCKS if runs_offline(block)]
    assert len(ran) >= 4
    for block in ran:
        exec(compile(block, "README.md", "exec"), session)
    assert (tmp_path / "three.png").is_file()
    assert len(session["painted"]) == 1  # type: ignore[arg-type]
    assert len(session["texts"]) == 8  # type: ignore[arg-type]


def test_names_in_all_blocks_exist() -> None:
    """What a block imports from this library is there; other names were made by it or a block before it, or are ours."""
    known = {*dir(builtins), *dir(discrete_schedulers)}
    for block in BLOCKS:
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "discrete_schedulers":
                assert {name.name for name in node.names} <= set(dir(discrete_schedulers))
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {name.asname or name.name for name in node.names}
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        assert {node.id for node in names} <= known, block


def test_schedulers_have_one_row_each() -> None:
    """The table of all schedulers: those of the library, and the first column of no other table has one that is not there."""
    table = WITHOUT_TABLES[WITHOUT_TABLES.index("| scheduler | source") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    ours = {name for name in dir(discrete_schedulers) if name.endswith("Scheduler")}
    assert sorted(rows) == sorted(ours - {"DiscreteScheduler", "ForeignScheduler"})
    theirs = {"AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler"}
    assert set(re.findall(r"\b\w+Scheduler\b", WITHOUT_TABLES)) <= ours | theirs


def test_links_and_files_exist() -> None:
    """Headings that are linked to, files that are linked to, and files named by their path."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", WITHOUT_TABLES):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).is_file(), target
    for path in re.findall(r"\b(?:examples|training|tests|benchmarks)/\w+\.(?:py|json)\b", WITHOUT_TABLES):
        assert (ROOT / path).is_file(), path


def mean_of(part: str, *keys: str) -> float:
    """A mean out of the results of a benchmark."""
    entry = json.loads((ROOT / "benchmarks" / "results" / f"{part}.json").read_text())["rows"]
    for key in keys:
        entry = entry[key]
    return sum(entry) / len(entry) if isinstance(entry, list) else entry["mean"]


LEARNED, PLAIN = ("learned", "4"), ("uniform", "64")
EIGHT = (("learned", "8"), ("spread-contrast", "8"), ("uniform", "8"), PLAIN)
NLL = (("spread", "4"), ("counts", "16"), ("spread", "8"), ("counts", "32"))
MOLECULES = ("confidence, blocks of 6", "counts, random order", "confidence")
CLAIMS = [
    (
        "is as good: {:.2f}, {:.2f} and {:.2f}",
        [("learned-text", "shipped", calls, "statistic") for calls in ("4", "8", "16")],
    ),
    (
        "two-sample statistic of {:.2f} and {:.2f} at 8 calls, random order {:.2f}, and {:.2f} with 64 calls",
        [("learned-text", name, calls, "statistic") for name, calls in EIGHT],
    ),
    (
        "Four learned calls ({:.2f}; perplexity {:.0f}) are nearer to held-out text than 64 calls of the plain sampler "
        "({:.2f}; {:.0f})",
        [("learned-text", *row, metric) for row in (LEARNED, PLAIN) for metric in ("statistic", "perplexity")],
    ),
    (
        "in {:.2f}, {:.2f} and {:.2f} of cases",
        [("learned-text", "learned", calls, "classifier") for calls in ("4", "8", "16")],
    ),
    (
        "Set by hand it has {:.2f}, {:.2f} and {:.2f} where counts, temperatures and it together, learned, have {:.2f}, {:.2f} "
        "and {:.2f}",
        [("learned-text", n, calls, "statistic") for n in ("spread-contrast", "learned") for calls in ("4", "8", "16")],
    ),
    (
        "a spread order at 4 calls (NLL {:.2f}) is level with random order at 16 ({:.2f}), at 8 calls ({:.2f}) with random "
        "order at 32 ({:.2f})",
        [("tiny-text", f"{name}-uniform", steps, "nll") for name, steps in NLL],
    ),
    (
        "antibodies at 4 calls: NLL {:.2f}, uniform grid {:.2f}",
        [("antiberty", f"counts-{grid}", "4", "nll") for grid in ("optimal", "uniform")],
    ),
    (
        "{:.2f} valid, random order {:.2f}; without blocks {:.2f}, but shorter molecules",
        [("molecules", name, "32", "validity") for name in MOLECULES],
    ),
    (
        "as recognisable as held-out images (0.950), without it 64 are not ({:.3f})",
        [("tiny-image", "counts", "64", "accuracy")],
    ),
]


@pytest.mark.parametrize(("sentence", "places"), CLAIMS)
def test_numbers_in_sentences_are_those_of_the_results(sentence: str, places: list[tuple[str, ...]]) -> None:
    """The sentence with the numbers of today's results stands in the README: measured again, it has to be read again."""
    assert sentence.format(*(mean_of(*place) for place in places)) in " ".join(WITHOUT_TABLES.split())
