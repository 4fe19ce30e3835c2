"""The examples, run as a user would run them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from discrete_schedulers import AncestralScheduler, LSDScheduler

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"compare_schedulers", "demo", "molecules", "sample"}


def test_sample() -> None:
    texts = load("sample").main(num_inference_steps=2)
    assert set(texts) == {"unconditional", "Euler", "prompt", "infilling"}
    assert texts["prompt"][0].startswith("The king said to")
    assert texts["infilling"][0].startswith("In the beginning God created the")
    assert texts["unconditional"] != texts["Euler"]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """The main job, small: two methods at three budgets beside three baselines, and schedulers that load."""
    table = load("demo").main(["--output_dir", str(tmp_path), "--num_samples", "4", "--num_eval_samples", "4"])
    cells = {(row["sampler"], row["steps"]) for row in table}
    names = {"bernoulli", "counts", "counts, spread", "lsd", "optimal grid"}
    assert cells == {(name, steps) for name in names for steps in (4, 8, 16)}
    assert len(table) == len(cells)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "calls:" in (tmp_path / "texts.txt").read_text()
    assert set(LSDScheduler.from_pretrained(tmp_path / "lsd").config.coefficients) == {"4", "8", "16"}
    optimal = AncestralScheduler.from_pretrained(tmp_path / "optimal_grid")
    optimal.set_timesteps(11)
    assert len(optimal.timesteps) == 11


@pytest.mark.slow
def test_compare_schedulers(tmp_path: Path) -> None:
    """Every sampler at a small budget: no more calls than asked, and a second run reads what the first has written."""
    example = load("compare_schedulers")
    arguments = ["--output_dir", str(tmp_path), "--calls", "4", "--seeds", "2", "--num_samples", "2"]
    results = example.main(arguments)
    assert set(example.SAMPLERS) < set(results["rows"])
    for name, row in results["rows"].items():
        assert max(row["4"]["calls"]) <= 4, name
        assert min(row["4"]["perplexity"]) > 1, name
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in example.SAMPLERS)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    results["rows"]["fixed counts"]["4"]["perplexity"] = [7.0, 7.0]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert example.main(arguments)["rows"] == results["rows"]


def test_compare_schedulers_counts_calls() -> None:
    """Methods with two calls in a step make as many steps as fit."""
    example = load("compare_schedulers")
    ancestral = AncestralScheduler(vocab_size=5, mask_token_id=4)
    assert [example.steps_for(ancestral, calls) for calls in (1, 4, 32)] == [1, 4, 32]


@pytest.mark.slow
def test_molecules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sampler at one budget; a picture; and a second run reads what the first has written."""
    pytest.importorskip("rdkit", reason="the extra `molecules` is not installed")
    example = load("molecules")
    read = example.read_split
    monkeypatch.setattr(example, "read_split", lambda name: read(name)[::100])  # all of them take half a minute
    arguments = ["--output_dir", str(tmp_path), "--steps", "4", "--seeds", "2", "--num_samples", "12"]
    results = example.main(arguments)
    assert set(results["rows"]) == set(example.SAMPLERS)
    for name, row in results["rows"].items():
        numbers = row["4"]
        assert set(numbers) == set(example.METRICS)
        assert max(numbers["calls"]) <= 4, name
        assert all(0 <= value <= 1 for value in numbers["validity"] + numbers["new"])
        assert all(10 < value <= 30 for value in numbers["tokens"])
    assert results["data"]["validity"] == [1, 1]
    assert results["data"]["uniqueness"] == [1, 1]
    table = (tmp_path / "molecules.md").read_text()
    assert all(table.count(f"| {name} |") == 2 for name in example.SAMPLERS)
    assert (tmp_path / "molecules.png").read_bytes().startswith(b"\x89PNG")
    results["rows"]["confidence"]["4"]["validity"] = [0.125, 0.25]
    (tmp_path / "molecules.json").write_text(json.dumps(results))
    assert example.main(arguments)["rows"] == results["rows"]


def test_molecules_counts() -> None:
    """Of 5 strings 3 are molecules, 2 of them different, one of these known."""
    pytest.importorskip("rdkit", reason="the extra `molecules` is not installed")
    example = load("molecules")
    tokens = torch.tensor([[1, 1, 9], [1, 9, 9]])
    row = example.judge(["CO", "OC", "CN", "C1", "("], tokens, 9, 4, ["NC"])
    assert row["validity"] == 3 / 5
    assert row["uniqueness"] == pytest.approx(2 / 3)
    assert row["novelty"] == 1 / 2
    assert row["new"] == pytest.approx(1 / 5)
    assert row["tokens"] == 1.5
    nothing = example.judge(["C1", "("], tokens, 9, 4, ["NC"])
    assert nothing["validity"] == nothing["new"] == 0
    assert nothing["uniqueness"] is nothing["novelty"] is nothing["internal_diversity"] is None
    assert example.cell({"validity": [0.5, 0.7], "novelty": [None, 0.3]}, "validity", "novelty") == "0.60 ± 0.10 / –"
