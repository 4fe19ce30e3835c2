"""The examples, run as a user would run them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

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
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"demo", "sample"}


def test_sample() -> None:
    texts = load("sample").main(num_inference_steps=2)
    assert set(texts) == {"unconditional", "Euler", "prompt", "infilling"}
    assert texts["prompt"][0].startswith("The king said to")
    assert texts["infilling"][0].startswith("In the beginning God created the")
    assert texts["unconditional"] != texts["Euler"]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """The main job, small: three methods at three budgets beside three baselines, and schedulers that load."""
    table = load("demo").main(["--output_dir", str(tmp_path), "--num_samples", "4", "--num_eval_samples", "4"])
    cells = {(row["sampler"], row["steps"]) for row in table}
    names = {"bernoulli", "counts", "counts, spread", "lsd", "lsd, log-score", "optimal grid"}
    assert cells == {(name, steps) for name in names for steps in (4, 8, 16)}
    assert len(table) == len(cells)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "calls:" in (tmp_path / "texts.txt").read_text()
    assert set(LSDScheduler.from_pretrained(tmp_path / "lsd").config.coefficients) == {"4", "8", "16"}
    assert LSDScheduler.from_pretrained(tmp_path / "lsd_log_score").config.scale == "log_score"
    optimal = AncestralScheduler.from_pretrained(tmp_path / "optimal_grid")
    optimal.set_timesteps(11)
    assert len(optimal.timesteps) == 11
