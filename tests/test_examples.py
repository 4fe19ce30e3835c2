"""The examples, run as a user would run them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from test_image_pipeline import pipeline

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
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"compare_schedulers", "demo", "image_grid", "sample"}


def test_sample() -> None:
    texts = load("sample").main(num_inference_steps=2)
    assert set(texts) == {"unconditional", "Euler", "prompt", "infilling"}
    assert texts["prompt"][0].startswith("The king said to")
    assert texts["infilling"][0].startswith("In the beginning God created the")
    assert texts["unconditional"] != texts["Euler"]


def test_image_grid(tmp_path: Path) -> None:
    """A grid for each scheduler at each number of steps, a row for each class; the same seed gives the same pictures."""
    pipeline().save_pretrained(tmp_path / "model")
    example = load("image_grid")
    arguments = ["--model", str(tmp_path / "model"), "--num_inference_steps", "2", "4", "--images_per_class", "2"]
    written = example.main([*arguments, "--output_dir", str(tmp_path / "a"), "--guidance_scale", "2"])
    assert set(written) == {f"{name}_{steps}" for name in example.SCHEDULERS for steps in (2, 4)}
    sizes = {Image.open(path).size for path in written.values()}
    assert sizes == {(2 * 2 * 12, 3 * 2 * 8)}  # two images of 12 x 8 pixels in a row, three classes, doubled
    pictures = {path.read_bytes() for path in written.values()}
    assert len(pictures) > len(written) // 2
    again = example.main([*arguments, "--output_dir", str(tmp_path / "b"), "--guidance_scale", "2"])
    assert {path.read_bytes() for path in again.values()} == pictures


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
