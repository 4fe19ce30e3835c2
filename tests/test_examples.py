"""The examples, run as a user would run them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_image_pipeline import pipeline

from discrete_schedulers import AncestralScheduler, DiscreteScheduler, LSDScheduler

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    known = {"compare_schedulers", "demo", "distill_own_data", "generate", "image_grid", "molecules", "sample"}
    known |= {"train_from_energy", "train_rdlm"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == known


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
    counts = ["--num_samples", "4", "--num_eval_samples", "4", "--max_data_samples", "8"]
    table = load("demo").main(["--output_dir", str(tmp_path), *counts])
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
def test_distill_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of one's own to a scheduler that loads; the second run, as for a push, learns nothing again."""
    example = load("distill_own_data")
    texts = example.write_stand_in(tmp_path)
    arguments = ["--train_file", str(texts), "--output_dir", str(tmp_path / "out"), "--num_inference_steps", "2"]
    arguments += ["--num_samples", "8", "--num_epochs", "4", "--num_eval_samples", "4", "--eval_temperatures", "1"]
    metrics = example.main([*arguments, "--max_data_samples", "8"])
    assert {row["sampler"] for row in metrics["table"]} == {"bernoulli", "counts", "counts, spread", "order"}
    printed = capsys.readouterr().out
    assert printed.count("2 steps: {") == 1
    assert "uploads it without learning again" in printed
    scheduler = DiscreteScheduler.from_pretrained(tmp_path / "out")
    assert len(scheduler.config.coefficients["2"]["order"]) == 64
    for name in ("plot.png", "coefficients.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert example.main([*arguments, "--max_data_samples", "8"]) == metrics
    assert "2 steps: {" not in capsys.readouterr().out


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


GENERATE = [
    "--num_samples",
    "22",
    "--shard_size",
    "4",
    "--batch_size",
    "3",
    "--length",
    "24",
    "--num_inference_steps",
    "4",
]


def samples_in(folder: Path) -> list[dict]:
    """The rows of all shards, in order of their numbers."""
    rows = [
        row for path in folder.glob("samples-*.parquet") for row in Dataset.from_parquet(str(path), keep_in_memory=True)
    ]
    return sorted(rows, key=lambda row: row["number"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What one process makes without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    load("generate").main([*GENERATE, "--output_dir", str(folder)])
    assert len(list(folder.glob("*.parquet"))) == 6
    return samples_in(folder)


def test_generate(whole: list[dict], tmp_path: Path) -> None:
    """Every sample once, all different; missing shards are made again, others are not; other settings are refused."""
    assert [row["number"] for row in whole] == list(range(22))
    assert len({tuple(row["ids"]) for row in whole}) == 22
    assert all(len(row["ids"]) == 24 and row["text"] for row in whole)
    example, arguments = load("generate"), [*GENERATE, "--output_dir", str(tmp_path)]
    example.main(arguments)
    paths = sorted(tmp_path.glob("*.parquet"))
    paths[2].unlink()
    (tmp_path / f".{paths[2].name}.tmp").write_text("what a killed run leaves")
    before = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
    example.main(arguments)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert samples_in(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths] + ["settings.json"]
    with pytest.raises(ValueError, match="has samples of other settings: seed"):
        example.main([*arguments, "--seed", "1"])


def test_generate_with_a_bundled_scheduler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example, bundled = load("generate"), "discrete-schedulers/tiny-text"
    arguments = ["--scheduler", bundled, "--scheduler_subfolder", "learned", "--num_inference_steps", "8"]
    pipe = example.load_pipeline(example.parse_args([*arguments, "--output_dir", str(tmp_path)]))
    assert "8" in pipe.scheduler.config.coefficients
    with pytest.raises(SystemExit):
        example.parse_args(arguments[2:])
    assert "--scheduler_subfolder needs --scheduler" in capsys.readouterr().err


def test_generate_seeds() -> None:
    """Different numbers have different seeds, also where torch reads 32 bits of them; runs have different ones."""
    example = load("generate")
    first = [example.generator_of(0, number).initial_seed() for number in range(2000)]
    assert len({seed % 2**32 for seed in first}) == 2000
    assert not set(first) & {example.generator_of(1, number).initial_seed() for number in range(2000)}


@pytest.mark.slow
def test_generate_with_two_processes_that_are_killed(whole: list[dict], tmp_path: Path) -> None:
    """SIGKILL to both after the first shard; two go on; the samples are those of one process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    given = [str(EXAMPLES / "generate.py"), *GENERATE, "--output_dir", str(tmp_path / "samples")]

    def start() -> subprocess.Popen:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = ["--main_process_port", str(probe.getsockname()[1])]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*command, *port, *given], env=environment, stdout=pipe, stderr=pipe, start_new_session=True
        )

    process = start()
    while not list((tmp_path / "samples").glob("*.parquet")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    made = len(list((tmp_path / "samples").glob("*.parquet")))
    assert made >= 1
    process = start()
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]
    assert samples_in(tmp_path / "samples") == whole
    lines = printed.decode().splitlines()
    assert len([line for line in lines if "samples-" in line]) == 6 - made
    if made <= 4:
        assert {line.split(":")[0] for line in lines if "samples-" in line} == {"process 0", "process 1"}


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
