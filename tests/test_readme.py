"""The pages that users read: README's code runs where the models are bundled, and names nothing that is not there; links lead
somewhere; numbers in sentences are those of benchmarks/results."""

from __future__ import annotations

import ast
import builtins
import json
import math
import re
from pathlib import Path

import pytest

import discrete_schedulers
from discrete_schedulers.models.checkpoints import FAMILIES

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "MODELS.md", "benchmarks/RESULTS.md", "CONTRIBUTING.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README = PAGES["README.md"]
BLOCKS = [
    block
    for name in ("README.md", "MODELS.md")
    for block in re.findall(r"^```python\n(.*?)^```$", PAGES[name], flags=re.MULTILINE | re.DOTALL)
]
WITHOUT_TABLES = {
    name: re.sub(r"<!-- results:([\w-]+) -->.*?<!-- /results:\1 -->", "", text, flags=re.DOTALL)
    for name, text in PAGES.items()
}
SENTENCES = " ".join(" ".join(WITHOUT_TABLES[name].split()) for name in ("README.md", "benchmarks/RESULTS.md"))


def runs_offline(block: str) -> bool:
    """Whether all that it loads is bundled, or was saved by a block."""
    names = re.findall(r'from_pretrained\(\s*"([^"]+)"', re.sub("#.*", "", block))
    saved = re.findall(r'save_pretrained\("([^"]+)"', README)
    known = all(name.startswith("discrete-schedulers/") or name in saved for name in names)
    return "from_pretrained(name)" not in block and known


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
    """The table of all schedulers: those of the library, and no page names one that is not there."""
    table = README[README.index("| scheduler | source") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    ours = {name for name in dir(discrete_schedulers) if name.endswith("Scheduler")}
    assert sorted(rows) == sorted(ours - {"DiscreteScheduler", "ForeignScheduler"})
    theirs = {"AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler"}
    for name in ("README.md", "MODELS.md", "benchmarks/RESULTS.md"):
        assert set(re.findall(r"\b\w+Scheduler\b", WITHOUT_TABLES[name])) <= ours | theirs, name


def anchors_of(page: str) -> set[str]:
    """What the headings of a page are linked by."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    """Headings that are linked to, on this page or another, files that are linked to, and files named by their path."""
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", WITHOUT_TABLES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (folder / path).resolve() if path else ROOT / page
        assert linked.is_file(), target
        if anchor:
            assert anchor in anchors_of(linked.relative_to(ROOT).as_posix()), target
    for path in re.findall(r"\b(?:examples|training|tests|benchmarks)/\w+\.(?:py|json)\b", WITHOUT_TABLES[page]):
        assert (ROOT / path).is_file(), path


def test_results_are_found() -> None:
    """Each section of the results is in their contents, and README leads to it."""
    results = PAGES["benchmarks/RESULTS.md"]
    sections = anchors_of("benchmarks/RESULTS.md") - {"results"}
    assert set(re.findall(r"\(#([\w-]+)\)", results)) == sections
    assert sections - set(re.findall(r"\(benchmarks/RESULTS\.md#([\w-]+)\)", README)) == set()


def test_families_have_one_row_each() -> None:
    """The table of the Hub's models names the families of `models/checkpoints.py`, and README says how many rows it has."""
    table = PAGES["MODELS.md"][PAGES["MODELS.md"].index("| family |") :].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert f"{len(rows)} families" in README
    listed = {name for row in rows for name in row.split(", ")}
    known = {re.sub(r"^SDAR-b.*", "SDAR", family.name) for family in FAMILIES}
    assert known <= {re.sub(r"^SDAR-b.*", "SDAR", name) for name in listed}


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
    """The sentence with the numbers of today's results stands in README or RESULTS: measured again, it has to be read again."""
    assert sentence.format(*(mean_of(*place) for place in places)) in SENTENCES


def test_ranges_in_sentences_are_those_of_the_results() -> None:
    """From the least to the most of several results."""
    images = json.loads((ROOT / "benchmarks" / "results" / "tiny-image.json").read_text())["rows"]

    def accuracies(*names: str) -> tuple[float, float]:
        found = [images[name][steps]["accuracy"]["mean"] for name in names for steps in images[name]]
        return min(found), max(found)

    guided, plain = accuracies("counts-guided"), accuracies("counts", "counts-optimal", "halton", "remasking")
    sentence = "{:.2f} to {:.3f} of the digits are recognised, {:.2f} to {:.2f} without"
    assert sentence.format(*guided, *plain) in SENTENCES


def test_how_far_the_others_are_behind() -> None:
    """At every budget each sampler but the ablations of the learned one, in standard errors of the difference."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "learned-text.json").read_text())["rows"]
    others = [name for name in rows if not name.startswith(("learned", "shipped", "spread", "random-contrast"))]
    assert len(others) >= 8
    far = []
    for steps, own in rows["learned"].items():
        for row in (rows[name][steps]["statistic"] for name in others):
            error = math.hypot(own["statistic"]["standard_error"], row["standard_error"])
            far.append((row["mean"] - own["statistic"]["mean"]) / error)
    assert min(far) > 8
    assert "each sampler but our own ablations is more than eight standard errors behind" in SENTENCES


def test_speeds_in_sentences() -> None:
    """On both shapes: steps of a fixed plan, and steps that rank all masks."""
    path = ROOT / "benchmarks" / "results" / "steps.json"
    if not path.is_file():
        pytest.skip("steps.json has not been made: python benchmarks/run.py steps table")
    content = json.loads(path.read_text())
    for shape in content["settings"]["shapes"]:
        result = content["x".join(map(str, shape))]
        times = {name: result["reference"]["seconds"] / row["seconds"] for name, row in result["ours"].items()}
        fixed = ("ancestral, counts", "ancestral, bernoulli", "Euler", "tau-leaping", "LSD", "remasking")
        assert min(times[f"{name}; all"] for name in fixed) > 3000
        assert min(times[f"{name}; all"] for name in ("confidence", "threshold")) > 180
    assert "less than 1/3,000 of the time of the usual dense draw where the plan is fixed" in SENTENCES
    assert "about 1/200 or less where all masks are ranked by confidence" in SENTENCES


def test_costs_in_sentences() -> None:
    """What learning costs, and what a twentieth and a hundredth of the sequences lose."""
    content = json.loads((ROOT / "benchmarks" / "results" / "distillation.json").read_text())
    methods, fewer = content["methods"], content["fewer"]

    def bound(row: dict, steps: str) -> float:
        return row["nll"][steps]["mean"]

    assert f"in some {methods['floats']['seconds'] / 60:.0f} minutes of one core" in SENTENCES
    assert round(methods["optimal_grid"]["seconds"] / 60) == 1
    assert "it learns in about a minute" in SENTENCES
    twentieth = next(row for row in fewer.values() if row["evaluations"] == 3264)
    assert all(bound(twentieth, steps) < bound(methods["lsd"], steps) for steps in ("4", "8"))
    worse = bound(twentieth, "16") - bound(methods["lsd"], "16")
    assert f"at 16 one that is {worse:.4f} nats worse" in SENTENCES
    hundredth = next(row for row in fewer.values() if row["evaluations"] == 640)
    assert max(bound(hundredth, n) - bound(twentieth, n) for n in ("4", "8", "16")) < 0.006
    assert "on a hundredth it has lost less than 0.006" in SENTENCES
