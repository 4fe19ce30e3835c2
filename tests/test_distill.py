"""The main job: what it leaves behind, what it refuses, and that kills, processes and batches change nothing.

In process on a transformer with random weights; as real processes (marked slow) with `accelerate launch`, SIGKILL, and
the loopback Hub.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from hub import LoopbackHub
from huggingface_hub import ModelCard
from PIL import Image
from scipy.optimize import minimize_scalar
from tiny import MASK, WORDS, tiny_model, tiny_pipeline
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    DDiTModel,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    InformationCurve,
    LearnedScheduler,
    LSDScheduler,
    UniformProcess,
    information_curve,
    optimal_times,
)
from discrete_schedulers.information import schedule_gain
from discrete_schedulers.training import data, distill
from discrete_schedulers.training.hub import Facts, write_card
from discrete_schedulers.training.objectives import CoupledRoll, draw_noise, perturbed_start
from discrete_schedulers.training.pictures import draw_block, pyplot
from discrete_schedulers.training.run import Run

ROOT = Path(__file__).parents[1]
LENGTH, BUDGETS, SAMPLES = 8, [2, 4], 13
SMALL = ["--num_inference_steps", "2", "4", "--num_samples", "13", "--num_eval_samples", "10"]
TEACHER = ["--teacher_steps", "32"]
METHODS = {
    "lsd": TEACHER,
    "lsd l2": [*TEACHER, "--objective", "l2"],
    "lsd softmax": [*TEACHER, "--objective", "softmax_kl"],
    "lsd relaxed": [*TEACHER, "--objective", "l2", "--relaxed", "--hamming_share", "0.25"],
    "lsd sgd": [*TEACHER, "--objective", "l2", "--solver", "sgd", "--learning_rate", "0.05"],
    "lsd log-score sgd": [*TEACHER, "--scale", "log_score", "--solver", "sgd", "--num_epochs", "3"],
    "lsd_plus": [*TEACHER, "--method", "lsd_plus"],
    "lsd_plus repaired": [*TEACHER, "--method", "lsd_plus", "--repaired"],
    "optimal_grid": ["--method", "optimal_grid"],
    "optimal_grid text": ["--method", "optimal_grid"],
    "lsd text": [*TEACHER, "--objective", "l2"],
    "marginal text": ["--method", "marginal", "--num_samples", "24", "--num_epochs", "3", "--buckets", "4"],
}
PLOTTED = ["lsd l2", "lsd_plus repaired", "optimal_grid text"]  # drawing takes half of such a small run's time
FINISHED = ["README.md", "coefficients.png", "metrics.json", "plot.png", "scheduler_config.json"]


def save_model(folder: Path) -> None:
    """A pipeline whose network reads its context and has clear but not certain preferences."""
    model = tiny_model(max_length=LENGTH, cond_dim=None)
    with torch.no_grad():
        model.output_layer.linear.weight.mul_(0.4)
    tiny_pipeline(model=model).save_pretrained(folder)


def write_texts(path: Path, lines: int = 60) -> Path:
    words = random.Random(0)
    path.write_text("\n".join(" ".join(words.choices(WORDS[2:-1], k=20)) for _ in range(lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text file."""
    folder = tmp_path_factory.mktemp("distill")
    save_model(folder / "model")
    write_texts(folder / "texts.txt")
    return folder


@pytest.fixture(scope="module")
def finished(work: Path) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Metrics and folder of a method's finished run; each is run once."""
    runs: dict[str, tuple[dict[str, Any], Path]] = {}

    def run(name: str) -> tuple[dict[str, Any], Path]:
        if name not in runs:
            folder = work / name.replace(" ", "_")
            texts = ["--train_file", str(work / "texts.txt")] if name.endswith("text") else []
            with pytest.MonkeyPatch.context() as patch:
                if name not in PLOTTED:
                    do_not_draw(patch)
                runs[name] = distill.main([*arguments(work, folder), *METHODS[name], *texts]), folder
        return runs[name]

    return run


def do_not_draw(patch: pytest.MonkeyPatch) -> None:
    for name in ("write_plot", "write_coefficients_plot"):
        patch.setattr(distill, name, lambda path, *what: path.write_bytes(b""))


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_draw(monkeypatch)


def arguments(work: Path, folder: Path) -> list[str]:
    return ["--pretrained_model_name_or_path", str(work / "model"), "--output_dir", str(folder), *SMALL]


def load(name: str, folder: Path) -> DiscreteScheduler:
    classes = {"optimal_grid": AncestralScheduler, "marginal": LearnedScheduler}
    return classes.get(name.split()[0], LSDScheduler).from_pretrained(folder)


def flat(coefficients: dict[str, dict[str, list[float]]]) -> list[float]:
    return [value for blocks in coefficients.values() for values in blocks.values() for value in values]


# What it leaves behind


@pytest.mark.parametrize("name", METHODS)
def test_scheduler_config(finished: Callable, work: Path, name: str) -> None:
    metrics, folder = finished(name)
    config = json.loads((folder / "scheduler_config.json").read_text())
    scheduler = load(name, folder)
    assert config["_class_name"] == type(scheduler).__name__
    learned_for = scheduler.config.learned_for
    assert learned_for["base_model"] == str(work / "model")
    assert (learned_for["vocab_size"], learned_for["method"]) == (len(WORDS), metrics["method"])
    assert learned_for["metrics"] == metrics["table"]

    pipe = DiscreteDiffusionPipeline.from_pretrained(work / "model")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    for steps in BUDGETS:
        output = pipe(num_samples=3, num_inference_steps=steps)
        assert output.sequences.shape == (3, LENGTH)
        assert (output.sequences != MASK).all()
    if name.startswith("optimal"):
        curve = InformationCurve.from_config(config["information_curve"])
        assert len(curve.values) == LENGTH
        for steps in (1, 3, 7, 64):
            scheduler.set_timesteps(steps)
            assert scheduler.times.tolist() == pytest.approx(optimal_times(curve, steps).tolist(), abs=1e-12)
        return
    assert config["coefficients"] == metrics["coefficients"]  # bit for bit
    if name.startswith("marginal"):
        assert (config["order"], config["unmasking"]) == ("spread", "counts")
        assert {n: len(b["inverse_temperature"]) for n, b in config["coefficients"].items()} == {"2": 2, "4": 4}
        return
    assert config["scale"] == ("log_score" if "softmax" in name or "log-score" in name else "score")
    for steps in BUDGETS:
        blocks = metrics["coefficients"][str(steps)]
        assert len(blocks["scale"]) == steps
        scheduler.set_timesteps(steps)
        times = blocks["times"] if name.startswith("lsd_plus") else [1 - k / steps for k in range(steps + 1)]
        assert scheduler.times.tolist() == pytest.approx(times, abs=1e-15)
        assert "times" not in blocks or len(blocks["times"]) == steps + 1
    with pytest.raises(ValueError, match="`num_inference_steps` 3; learned budgets: 2, 4"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="`vocab_size` 22"):
        LSDScheduler.from_config(scheduler.config, vocab_size=23, mask_token_id=22)


@pytest.mark.parametrize("name", ["lsd_plus repaired", "optimal_grid"])
def test_a_learned_scheduler_has_the_same_law(
    finished: Callable, work: Path, tmp_path: Path, name: str, no_plot: None
) -> None:
    """The same samples too, and so the same table."""
    plain, folder = finished(name)
    metrics = distill.main([*arguments(work, tmp_path), *METHODS[name], "--learned_scheduler"])
    assert metrics["table"] == plain["table"]
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["_class_name"] == "LearnedScheduler"
    assert "LearnedScheduler.from_pretrained" in (tmp_path / "README.md").read_text()
    ours, theirs = LearnedScheduler.from_pretrained(tmp_path), load(name, folder)
    for steps in BUDGETS:
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.times, theirs.times)
    if name.startswith("lsd"):
        renamed = {n: {"rate": b["scale"], "times": b["times"]} for n, b in plain["coefficients"].items()}
        assert config["coefficients"] == metrics["coefficients"] == renamed


@pytest.mark.parametrize("name", METHODS)
def test_metrics(finished: Callable, work: Path, name: str) -> None:
    metrics, folder = finished(name)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (metrics["base_model"], metrics["revision"]) == (str(work / "model"), None)
    assert metrics["budgets"] == BUDGETS
    assert metrics["data"] == ("held-out text" if name.endswith("text") else "the model's own many-step samples")
    samplers = ["bernoulli", "counts", "counts, spread", metrics["method"]]
    assert [(row["steps"], row["sampler"]) for row in metrics["table"]] == [(n, s) for n in BUDGETS for s in samplers]
    columns = {"sampler", "steps", "nll", "calls", "entropy"}
    columns |= {"perplexity", "matched_perplexity", "matched_error"} if name.endswith("text") else set()
    for row in metrics["table"]:
        assert set(row) == columns
        assert 0 < row["calls"] <= row["steps"]
        assert 0 < row["entropy"] <= math.log(LENGTH)
        assert 0 < row["nll"] < 20
    assert 0 < metrics["data_entropy"] <= math.log(LENGTH)
    assert metrics["sequence_evaluations"] > SAMPLES * LENGTH / 2
    told = metrics["arguments"]
    samples = 24 if name.startswith("marginal") else SAMPLES
    assert (told["num_samples"], told["seed"]) == (samples, 0)
    assert told.get("teacher_steps") == (32 if name.startswith("lsd") else None)
    assert ("buckets" in told) == name.startswith("marginal")  # what a method does not read is not told
    assert not {"hub_token", "push_to_hub", "output_dir"} & set(told)


@pytest.mark.parametrize("name", PLOTTED)
def test_files(finished: Callable, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, folder = finished(name)
    names = sorted(path.name for path in folder.iterdir())
    checkpoints = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    assert names == sorted([*FINISHED, *checkpoints])
    assert len(checkpoints) == 1
    for picture in ("plot.png", "coefficients.png"):
        with Image.open(folder / picture) as plot:
            assert plot.format == "PNG"
            assert plot.size[0] > 800
            assert len(plot.convert("RGB").getcolors(1 << 20)) > 10  # something is drawn

    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None  # a folder is not a model id: the Hub would refuse the card
    assert card.data.library_name == "discrete_schedulers"
    assert {"discrete-diffusion", "diffusers", metrics["method"]} <= set(card.data.tags)
    assert f"`{metrics['base_model']}`" in card.text
    assert "- revision: `null`" in card.text
    for row in metrics["table"]:
        cells = f"{row['nll']:.3f} | {row['calls']:.3f} | {row['entropy']:.3f} |"
        assert f"| {row['sampler']} | {row['steps']} | {cells}" in card.text
    assert f"{metrics['sequence_evaluations']:,} sequence evaluations" in card.text
    monkeypatch.chdir(folder.parent)  # from where the folder's name finds it
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(snippet, {})


def test_card_names_a_base_model_of_the_hub(finished: Callable, tmp_path: Path) -> None:
    metrics, _ = finished("lsd")
    facts = Facts("accelerate launch training/distill.py", 1, "cpu", 1.0, 2.0, "DiscreteDiffusionPipeline", "print(1)")
    named = metrics | {"base_model": "kuleshov-group/mdlm-owt"}
    write_card(tmp_path / "README.md", "me/x", "LSDScheduler", named, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "kuleshov-group/mdlm-owt"
    assert "(https://huggingface.co/kuleshov-group/mdlm-owt)" in card.text
    assert 'LSDScheduler.from_pretrained("me/x")' in card.text


# What it learns


def test_generalised_kl_learns_nothing(finished: Callable) -> None:
    """The network is normalised: its factor is 1, and LSD is the Bernoulli sampler."""
    metrics, _ = finished("lsd")
    assert flat(metrics["coefficients"]) == pytest.approx([1.0] * 6, abs=1e-6)
    rows = {(row["sampler"], row["steps"]): row for row in metrics["table"]}
    for steps in BUDGETS:
        for key in ("nll", "entropy"):
            assert rows["lsd", steps][key] == pytest.approx(rows["bernoulli", steps][key], abs=0.02)


@pytest.mark.parametrize("name", ["lsd l2", "lsd softmax", "lsd relaxed"])
def test_factors_are_the_minimisers_along_the_student(finished: Callable, work: Path, name: str) -> None:
    """Teacher and student rolled here, and d minimised by brute force at each shared time."""
    metrics, folder = finished(name)
    pipe, noise = DiscreteDiffusionPipeline.from_pretrained(work / "model"), draw_noise(range(SAMPLES), LENGTH, seed=0)
    masks = torch.full((SAMPLES, LENGTH), MASK)
    teacher = LSDScheduler(vocab_size=len(WORDS), mask_token_id=MASK)
    teacher.set_timesteps(32)
    with torch.no_grad():
        roll, states = CoupledRoll(pipe.denoiser, teacher, noise, masks, 100), []
        for index in range(32):
            states.append(roll.state.clone())
            roll.step(index)
        start = masks
        if name == "lsd relaxed":
            unigram = torch.bincount(roll.state.flatten(), minlength=len(WORDS))
            start = perturbed_start(noise, MASK, 0.25, unigram)
            assert (start != MASK).sum(1).tolist() == [2] * SAMPLES
        for steps in BUDGETS:
            scheduler = load(name, folder)
            scheduler.set_timesteps(steps)
            student = CoupledRoll(pipe.denoiser, scheduler, noise, start, 100)
            for k in range(steps):
                teacher_x = states[k * 32 // steps]
                both = (student.state == MASK) & (teacher_x == MASK)
                own, star = (
                    pipe.denoiser(x, 0.5)[both][:, :MASK].double().softmax(-1) for x in (student.state, teacher_x)
                )

                def d(phi: float, p: torch.Tensor = own, q: torch.Tensor = star) -> float:
                    if "softmax" not in name:
                        return float(((q - phi * p) ** 2).sum())
                    return float((q * (q.log() - (phi * p.log()).log_softmax(-1))).sum())

                best = minimize_scalar(d, bounds=(0.2, 4), method="bounded", options={"xatol": 1e-9}).x
                assert metrics["coefficients"][str(steps)]["scale"][k] == pytest.approx(best, abs=1e-5), (steps, k)
                student.step(k)
    assert max(abs(phi - 1) for phi in flat(metrics["coefficients"])) > 0.01


def test_sgd_goes_towards_the_closed_form(finished: Callable) -> None:
    exact, steps = flat(finished("lsd l2")[0]["coefficients"]), flat(finished("lsd sgd")[0]["coefficients"])
    assert steps != exact
    for best, reached in zip(exact, steps, strict=True):
        assert abs(reached - best) < 0.5 * abs(1 - best) + 0.01  # the states move with the factors, so do the optima


def test_optimal_grid_is_that_of_the_models_curve(finished: Callable, work: Path) -> None:
    metrics, folder = finished("optimal_grid text")
    pipe = DiscreteDiffusionPipeline.from_pretrained(work / "model")
    lines = (work / "texts.txt").read_text().splitlines()
    fitted = [line for i, line in enumerate(lines) if i % 10 != 9]
    stream = torch.tensor(pipe.tokenizer(" ".join(fitted))["input_ids"])
    windows = stream.view(-1, LENGTH)[:256]
    assert len(windows) == 54 * 20 // LENGTH
    curve = information_curve(pipe.denoiser, windows, MASK, generator=torch.Generator().manual_seed(0))
    config = json.loads((folder / "scheduler_config.json").read_text())
    assert config["information_curve"] == pytest.approx(curve.to_config(), abs=1e-5)
    assert metrics["schedule_gain"] == pytest.approx(schedule_gain(curve), abs=1e-3)
    assert metrics["sequence_evaluations"] == 2 * len(windows) * LENGTH


@pytest.mark.parametrize("name", ["lsd l2", "lsd softmax", "optimal_grid", "optimal_grid text", "marginal text"])
@pytest.mark.usefixtures("no_plot")
def test_coefficients_do_not_depend_on_batches(finished: Callable, work: Path, tmp_path: Path, name: str) -> None:
    metrics, folder = finished(name)
    texts = ["--train_file", str(work / "texts.txt")] if name.endswith("text") else []
    other = distill.main([*arguments(work, tmp_path), *METHODS[name], *texts, "--train_batch_size", "5"])
    assert flat(other["coefficients"]) == pytest.approx(flat(metrics["coefficients"]), abs=1e-6)
    curves = [
        json.loads((run / "scheduler_config.json").read_text())["information_curve"] for run in (folder, tmp_path)
    ]
    if name.startswith("optimal"):
        assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    for row, same in zip(metrics["table"], other["table"], strict=True):  # draws belong to samples, not to batches
        assert row["nll"] == pytest.approx(same["nll"], abs=1e-4)
        assert row["entropy"] == pytest.approx(same["entropy"], abs=1e-6)
    assert other["sequence_evaluations"] == metrics["sequence_evaluations"]


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("name", ["lsd l2", "optimal_grid", "marginal text"])
def test_evaluations_are_counted(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every sequence that goes through the network until the coefficients are there, and none of those that measure."""
    rows: list[int] = []
    counting = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: rows.append(len(inputs[0])) if isinstance(module, DDiTModel) else None
    )
    measure, before_measuring = distill.measure, []

    def measure_later(*args: Any) -> None:
        before_measuring.append(sum(rows))
        measure(*args)

    monkeypatch.setattr(distill, "measure", measure_later)
    texts = ["--train_file", str(work / "texts.txt")] if name.endswith("text") else []
    metrics = distill.main([*arguments(work, tmp_path), *METHODS[name], *texts])
    counting.remove()
    drawn = 0 if name.endswith("text") else 10 * LENGTH  # samples to measure on, one token a call
    assert metrics["sequence_evaluations"] == before_measuring[0] - drawn > 0
    assert sum(rows) > before_measuring[0]


@pytest.mark.usefixtures("no_plot")
def test_seed_changes_the_result(finished: Callable, work: Path, tmp_path: Path) -> None:
    other = distill.main([*arguments(work, tmp_path), *METHODS["lsd l2"], "--seed", "1"])
    assert flat(other["coefficients"]) != pytest.approx(flat(finished("lsd l2")[0]["coefficients"]), abs=1e-4)


# What it refuses

REFUSED = {
    "--teacher_steps 30": r"--teacher_steps 30 is not a multiple of \[4, 8, 16\]",
    "--num_inference_steps 0 4": r"--num_inference_steps is \[0, 4\]",
    "--num_samples 0": "--num_samples is 0; it must be at least 1",
    "--checkpoints_total_limit 0": "--checkpoints_total_limit is 0",
    "--sequence_length 0": "--sequence_length is 0",
    "--learning_rate -1": "--learning_rate is -1.0; it must be positive",
    "--hamming_share 1.0": "--hamming_share is 1.0",
    "--repaired": "--repaired is for --method lsd_plus",
    "--hamming_share 0.1": "--hamming_share is for --relaxed",
    "--num_epochs 5": "--num_epochs is for --solver sgd, or lsd_plus without --repaired",
    "--method lsd_plus --repaired --learning_rate 0.1": "--learning_rate is for --solver sgd, or lsd_plus without",
    "--method optimal_grid --teacher_steps 64": "--teacher_steps is for --method lsd or lsd_plus",
    "--method beta --scale score": "--scale is for --method lsd or lsd_plus",
    "--method marginal --relaxed": "--relaxed is for --method lsd or lsd_plus",
    "--method jys --num_epochs 20": "--num_epochs is for --method lsd, lsd_plus, marginal, search, order or learn2pd",
    "--method search --learning_rate 0.1": "--learning_rate is for --method lsd, lsd_plus, marginal or learn2pd",
    "--method search --buckets 64": "--buckets is for --method marginal",
    "--method order --order random": "--order is for --method marginal, search, jys, beta or optimal_grid",
    "--hidden_units 32": "--hidden_units is for --method learn2pd",
    "--learned_scheduler --scale log_score": "--learned_scheduler has no such law",
    "--method lsd_plus --objective l2": "lsd_plus has generalised_kl",
    "--method lsd_plus --scale log_score": "lsd_plus has generalised_kl",
    "--scale log_score --objective l2": "--objective l2 is for --scale score, not log_score",
    "--scale score --objective softmax_kl": "--objective softmax_kl is for --scale log_score, not score",
    "--objective kl": "invalid choice: 'kl'",
    "--train_file nowhere.txt": "--train_file nowhere.txt is not a file",
    "--validation_file x.txt": "--validation_file needs --train_file",
    "--dataset_name x --train_file y.txt": "cannot both be given",
    "--dataset_config x": "--dataset_config needs --dataset_name",
    "--report_to wandb --hub_token x": "--report_to wandb would store --hub_token",
    "--push_to_hub --hub_model_id a/b/c": "--hub_model_id: .*a/b/c",
}


@pytest.mark.parametrize("extra", REFUSED)
def test_arguments_are_refused(extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path / "out"), *extra.split()]
    with pytest.raises(SystemExit) as refused:
        distill.parse_args(given)
    assert refused.value.code == 2
    assert re.search(REFUSED[extra], capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_defaults_of_the_paper(tmp_path: Path) -> None:
    given = ["--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path)]
    args = distill.parse_args([*given, "--num_inference_steps", "16", "4", "16"])
    assert (args.teacher_steps, args.num_samples, args.num_epochs, args.learning_rate) == (1024, 64, 20, 1e-3)
    assert (args.hamming_share, args.objective, args.scale, args.solver) == (
        0.05,
        "generalised_kl",
        "score",
        "closed_form",
    )
    assert args.num_inference_steps == [4, 16]
    assert distill.parse_args([*given, "--objective", "softmax_kl"]).scale == "log_score"
    assert distill.parse_args([*given, "--scale", "log_score"]).objective == "softmax_kl"


@pytest.mark.usefixtures("no_plot")
def test_models_and_data_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`--sequence_length` is 9; this model takes at most 8"):
        distill.main([*arguments(work, tmp_path), "--sequence_length", "9"])
    (tmp_path / "short.txt").write_text("the cat\nsat\n")
    with pytest.raises(ValueError, match="fewer than one sequence of `--sequence_length` 8"):
        distill.main([*arguments(work, tmp_path), "--train_file", str(tmp_path / "short.txt")])

    with pytest.raises(ValueError, match="a curve needs 2 sequences or more; there is 1"):
        distill.main([*arguments(work, tmp_path), "--method", "optimal_grid", "--num_samples", "1"])

    shutil.copytree(work / "model", tmp_path / "mute")
    shutil.rmtree(tmp_path / "mute" / "tokenizer")
    index = json.loads((tmp_path / "mute" / "model_index.json").read_text())
    (tmp_path / "mute" / "model_index.json").write_text(json.dumps(index | {"tokenizer": [None, None]}))
    mute = [*arguments(work, tmp_path / "out"), "--pretrained_model_name_or_path", str(tmp_path / "mute")]
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        distill.main([*mute, "--train_file", str(work / "texts.txt")])
    assert distill.main([*mute, *TEACHER, "--num_inference_steps", "2"])["table"]  # without texts it needs none

    scheduler = AncestralScheduler(vocab_size=len(WORDS), process="uniform")
    assert isinstance(scheduler.noise_process, UniformProcess)
    tiny_pipeline(scheduler).save_pretrained(tmp_path / "uniform")
    with pytest.raises(ValueError, match=r"`--pretrained_model_name_or_path` .* has uniform noise"):
        distill.main(
            [*arguments(work, tmp_path / "out2"), "--pretrained_model_name_or_path", str(tmp_path / "uniform")]
        )

    scheduler = AncestralScheduler(vocab_size=len(WORDS), mask_token_id=MASK, noise_schedule="cosine")
    tiny_pipeline(scheduler).save_pretrained(tmp_path / "cosine")
    cosine = [*arguments(work, tmp_path / "out3"), "--pretrained_model_name_or_path", str(tmp_path / "cosine")]
    with pytest.raises(ValueError, match="`--learned_scheduler` needs loglinear or linear noise here"):
        distill.main([*cosine, "--learned_scheduler"])


# Data


def texts_of(*extra: str) -> data.Texts | None:
    given = ["--pretrained_model_name_or_path", "x", "--output_dir", "out", *extra]
    return data.load_texts(distill.parse_args(given))


def test_texts(work: Path, tmp_path: Path) -> None:
    lines = (work / "texts.txt").read_text().splitlines()
    assert texts_of() is None
    alone = texts_of("--train_file", str(work / "texts.txt"))
    assert alone.heldout == lines[9::10]
    assert alone.fit == alone.judge == [line for i, line in enumerate(lines) if i % 10 != 9]
    (tmp_path / "validation.txt").write_text("the cat\na dog\n")
    named = texts_of("--train_file", str(work / "texts.txt"), "--validation_file", str(tmp_path / "validation.txt"))
    assert (named.fit, named.heldout, named.judge) == (lines, ["the cat", "a dog"], lines)

    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for split, rows in {"train": lines, "test": lines[:2]}.items():
        (dataset / f"{split}.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in rows))
    of_dataset = texts_of("--dataset_name", str(dataset), "--text_column", "body")
    assert (of_dataset.fit, of_dataset.heldout) == (lines, lines[:2])
    with pytest.raises(ValueError, match=r"`--text_column` is 'text'; the dataset has \['body'\]"):
        texts_of("--dataset_name", str(dataset))
    (dataset / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"dataset' has the splits \['test'\]; it needs 'train'"):
        texts_of("--dataset_name", str(dataset), "--text_column", "body")


def test_texts_of_the_bundled_model() -> None:
    """Fitted on validation, measured on test, judged by train: no split does two things."""
    texts = texts_of("--pretrained_model_name_or_path", "discrete-schedulers/tiny-text")
    assert len(texts.judge) > 10 * len(texts.fit)
    assert min(len(texts.fit), len(texts.heldout)) >= 30
    assert not set(texts.fit) & set(texts.heldout)
    assert not set(texts.judge) & {*texts.fit, *texts.heldout}


def test_pack(work: Path) -> None:
    tokenizer = DiscreteDiffusionPipeline.from_pretrained(work / "model").tokenizer
    texts = [" ".join(WORDS[2:12])] * 4  # 40 tokens
    windows = data.pack(texts, tokenizer, 8, 100)
    assert windows.flatten().tolist() == list(range(2, 12)) * 4
    assert torch.equal(data.pack(texts, tokenizer, 8, 3), windows[[0, 2, 4]])
    assert data.pack(texts, tokenizer, 9, 100).shape == (4, 9)


# Kills


def interrupt(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Stop the next run right after it has written so many checkpoints."""
    save, count = distill.save_checkpoint, 0

    def save_and_stop(*args: Any) -> None:
        nonlocal count
        save(*args)
        count += 1
        if count == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(distill, "save_checkpoint", save_and_stop)


@pytest.mark.parametrize(
    "name", ["lsd l2", "lsd softmax", "lsd relaxed", "lsd_plus repaired", "optimal_grid", "optimal_grid text"]
)
@pytest.mark.usefixtures("no_plot")
def test_stopped_at_any_checkpoint(
    finished: Callable, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped again and again, after one more checkpoint each time, the run ends where the uninterrupted one did."""
    metrics, folder = finished(name)
    texts = ["--train_file", str(work / "texts.txt")] if name.endswith("text") else []
    given = [*arguments(work, tmp_path), *METHODS[name], *texts, "--resume_from_checkpoint", "latest"]
    stops = 0
    for saves in (1, 1, 2, 1, 3, 2, 100):
        with monkeypatch.context() as patch:
            interrupt(patch, saves)
            try:
                resumed = distill.main(given)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops >= 4
    assert resumed == metrics
    for file in ("scheduler_config.json", "metrics.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


@pytest.fixture
def half(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """Arguments that resume a run stopped in the middle, and its checkpoint."""
    given = [*arguments(work, tmp_path), *METHODS["lsd l2"]]
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            distill.main(given)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    return [*given, "--resume_from_checkpoint", "latest"], checkpoint


@pytest.mark.usefixtures("no_plot")
def test_checkpoint_of_other_arguments_is_refused(half: tuple[list[str], Path]) -> None:
    given, checkpoint = half
    for extra, told in {
        "--seed 3": r"'seed': \(0, 3\)",
        "--objective generalised_kl": r"'objective': \('l2', 'generalised_kl'\)",
        "--num_inference_steps 2": r"'num_inference_steps': \(\[2, 4\], \[2\]\)",
        "--pretrained_model_name_or_path discrete-schedulers/tiny-text": "'pretrained_model_name_or_path'",
    }.items():
        with pytest.raises(ValueError, match=rf"{checkpoint.name} belongs to a run with other arguments .*{told}"):
            distill.main([*given, *extra.split()])
    with pytest.raises(ValueError, match=r"nowhere is not a folder; there are: \['.*checkpoint-5'\]"):
        distill.main([*given, "--resume_from_checkpoint", "nowhere"])


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", "sha256.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "gone"])
def test_damaged_checkpoint_is_refused(half: tuple[list[str], Path], file: str, damage: str) -> None:
    given, checkpoint = half
    content = bytearray((checkpoint / file).read_bytes())
    place = len(content) - 9  # in the last tensor's data, or a digit of the last number
    content[place] ^= 1
    (checkpoint / file).write_bytes(
        {"cut": content[: len(content) // 2], "changed": content, "empty": b""}.get(damage, b"")
    )
    if damage == "gone":
        (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=rf"{checkpoint.name} is damaged .*without `--resume_from_checkpoint`"):
        distill.main(given)


@pytest.mark.usefixtures("no_plot")
def test_half_written_checkpoint_is_passed_over(half: tuple[list[str], Path], finished: Callable) -> None:
    given, checkpoint = half
    (checkpoint.parent / ".checkpoint-6").mkdir()
    (checkpoint.parent / ".checkpoint-6" / "state.json").write_text('{"ident')
    (checkpoint.parent / "checkpoint-old").mkdir()  # not ours
    assert distill.main(given) == finished("lsd l2")[0]
    assert (checkpoint.parent / "checkpoint-old").is_dir()


@pytest.mark.usefixtures("no_plot")
def test_checkpoints_total_limit(work: Path, tmp_path: Path) -> None:
    distill.main([*arguments(work, tmp_path), *TEACHER, "--num_inference_steps", "2", "--checkpoints_total_limit", "3"])
    kept = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert len(kept) == 3
    assert kept == list(range(kept[0], kept[0] + 3))
    scheduler = LSDScheduler.from_pretrained(tmp_path / f"checkpoint-{kept[-1]}" / "scheduler")
    assert list(scheduler.config.coefficients) == ["2"]


# Real processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def launch(given: list[str], processes: int, cwd: Path) -> str:
    """`accelerate launch training/distill.py`, on the CPU; returns what it printed."""
    many = ["--multi_gpu", "--main_process_port", str(free_port())] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *many]
    command += [
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    done = subprocess.run(
        [*command, str(ROOT / "training" / "distill.py"), *given],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes"),
    [("lsd l2", 1), ("lsd l2", 2), ("lsd softmax", 2), ("lsd text", 2), ("optimal_grid", 2), ("marginal text", 2)],
)
def test_number_of_processes(finished: Callable, work: Path, tmp_path: Path, name: str, processes: int) -> None:
    metrics, folder = finished(name)
    texts = ["--train_file", str(work / "texts.txt")] if name.endswith("text") else []
    printed = launch([*arguments(work, tmp_path), *METHODS[name], *texts], processes, tmp_path)
    assert f"results: {tmp_path}" in printed
    assert printed.count("| counts | 2 |") == 1  # one process writes
    launched = json.loads((tmp_path / "metrics.json").read_text())
    assert flat(launched["coefficients"]) == pytest.approx(flat(metrics["coefficients"]), abs=1e-6)
    assert launched["sequence_evaluations"] == metrics["sequence_evaluations"]
    assert_same_table(launched["table"], metrics["table"])
    if name.startswith("optimal"):
        curves = [
            json.loads((run / "scheduler_config.json").read_text())["information_curve"] for run in (folder, tmp_path)
        ]
        assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir() if "checkpoint" not in path.name) == FINISHED


def assert_same_table(table: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Rows with the same numbers: another token in any sample would change them more."""
    for row, same in zip(table, other, strict=True):
        numbers, expected = ({k: v for k, v in one.items() if isinstance(v, float)} for one in (row, same))
        assert numbers == pytest.approx(expected, rel=1e-6)
        assert row == same | numbers  # names, and what was not measured


def measured_rows(argv: list[str]) -> None:
    """`distill.main`, with a file beside its folder that says how many sequences this process measured with."""
    rows: list[int] = []
    measure, folder = distill.measure, Path(argv[argv.index("--output_dir") + 1])

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(len(inputs[0]) if isinstance(module, DDiTModel) else 0)

    def counting(*args: Any) -> None:
        torch.nn.modules.module.register_module_forward_pre_hook(count)
        measure(*args)

    distill.measure = counting  # of a forked process
    distill.main(argv)
    (folder.parent / f"rows-{os.environ.get('RANK', 'alone')}").write_text(str(sum(rows)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsd l2", "optimal_grid text"])
def test_processes_share_what_is_measured(work: Path, tmp_path: Path, name: str) -> None:
    """Each has about half of the calls, and the numbers are those of one process; where no coefficients are in it, which may
    differ in their last digits, all that is made of samples is the same bit for bit."""
    texts = ["--train_file", str(work / "texts.txt")] if name.endswith("text") else []
    tables = []
    for start in (faults.run, faults.run_two):
        folder = tmp_path / start.__name__ / "out"
        given = [*arguments(work, folder), *METHODS[name], *texts, "--train_batch_size", "3"]
        ended = start(measured_rows, given, folder)
        assert ended.code == 0, ended.printed
        tables.append(json.loads((folder / "metrics.json").read_text())["table"])
    assert_same_table(*tables)
    plain = [[row | {"nll": 0} for row in table if row["sampler"] != name.split()[0]] for table in tables]
    assert plain[0] == plain[1]
    assert len(plain[0]) == 6
    whole = int((tmp_path / "run" / "rows-alone").read_text())
    halves = [int((tmp_path / "run_two" / f"rows-{rank}").read_text()) for rank in (0, 1)]
    assert sum(halves) == whole > 0
    assert max(halves) < 0.7 * whole


class Together:
    """Processes played by threads: what `Run` asks of an accelerator."""

    device = torch.device("cpu")

    def __init__(self, number: int, everyone: list[Any], barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes, self.everyone, self.barrier = number, len(everyone), everyone, barrier

    def gather(self, x: Tensor) -> Tensor:
        self.everyone[self.process_index] = x
        self.barrier.wait()
        found = torch.cat(self.everyone)
        self.barrier.wait()
        return found

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return self.gather(x[None]).sum(0)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (7, 3), (10, 16), (13, 2)])
def test_batches_go_round_the_processes(processes: int, count: int, size: int) -> None:
    """The result is that of one process, for processes without a batch too, and no batch is worked on twice."""
    asked: list[list[int]] = []

    def work(part: range) -> Tensor:
        asked.append(list(part))
        return torch.tensor([[i, len(part)] for i in part])

    def live(number: int) -> Tensor:
        args = argparse.Namespace(train_batch_size=size)
        own = Run(args, Together(number, everyone, barrier), None, {}, None, {}, {}, None, {})
        return own.by_batches(count, work, torch.empty(0, 2, dtype=torch.int64))

    everyone, barrier = [None] * processes, threading.Barrier(processes, timeout=60)
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(live, range(processes)))
    batches = data.batches(count, size)
    expected = torch.tensor([[i, len(part)] for part in batches for i in part])
    assert all(torch.equal(one, expected) for one in found)
    assert sorted(asked) == [list(part) for part in batches]


def written(folder: Path) -> int:
    """The number of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


@pytest.mark.slow
def test_killed_again_and_again(work: Path, tmp_path: Path) -> None:
    """SIGKILL while the teacher rolls, while factors are learned, and while samplers are measured."""
    given = [
        "--pretrained_model_name_or_path",
        str(work / "model"),
        "--num_inference_steps",
        "2",
        "4",
        "8",
        "--relaxed",
        "--hamming_share",
        "0.2",
    ]
    given += ["--objective", "l2", "--teacher_steps", "1024", "--num_samples", "64", "--num_eval_samples", "32"]
    given += ["--train_batch_size", "4", "--train_file", str(work / "texts.txt")]
    metrics = distill.main([*given, "--output_dir", str(tmp_path / "whole")])
    last = written(tmp_path / "whole")
    segments, learned = 8, 3
    assert last == segments + learned + 12

    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "training" / "distill.py"), *given, "--output_dir", str(folder)]
    command += ["--resume_from_checkpoint", "latest"]
    for moment in (2, segments + 1, segments + learned + 4):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while written(folder) < moment and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it had ended by itself"
        assert moment <= written(folder) < last
        assert not (folder / "scheduler_config.json").exists()
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=600)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    config = (folder / "scheduler_config.json").read_bytes()
    assert config == (tmp_path / "whole" / "scheduler_config.json").read_bytes()
    assert written(folder) == last


# The Hub

TRY = """
import json, sys, time
time.sleep = lambda seconds: None
from discrete_schedulers.training import data, distill
for given in json.loads(sys.argv[1]):
    try:
        distill.main(given)
        print("RESULT pushed")
    except RuntimeError as error:
        print("RESULT", str(error).replace("\\n", " "))
"""


@pytest.mark.slow
def test_over_the_hub(hub: LoopbackHub, finished: Callable, work: Path, tmp_path: Path) -> None:
    """A model from the Hub, its learned scheduler to the Hub, and both back again; failures in between lose nothing."""
    # The model goes up and comes back. An upload whose connection stays away: an error, and nothing half done
    code = """
import sys, time, torch
from pathlib import Path
from discrete_schedulers import DiscreteDiffusionPipeline
from discrete_schedulers.training.hub import create_repository, upload
time.sleep = lambda seconds: None
local = DiscreteDiffusionPipeline.from_pretrained(sys.argv[1])
local.push_to_hub("base")
pipe = DiscreteDiffusionPipeline.from_pretrained("tester/base")
texts = [p(num_samples=3, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).texts for p in (local, pipe)]
assert texts[0] == texts[1] and len(set(texts[0])) > 1
assert type(pipe.scheduler) is type(local.scheduler)
assert dict(pipe.config.denoiser) == dict(local.config.denoiser)
name = create_repository(Path(sys.argv[2]), "x", None)
try:
    upload(Path(sys.argv[2]), name, None)
except RuntimeError as error:
    print("RESULT", name, error)
"""
    _, done = finished("lsd")
    before = {name: (done / name).read_bytes() for name in FINISHED}
    hub.drop_next(100, matching="tester/x/preupload")
    printed = hub.python(code, work / "model", done)
    assert re.search(
        "^RESULT tester/x could not push to 'tester/x': .* Nothing is lost: the results are in", printed, re.M
    )
    assert [commit.title for commit in hub.repos["tester/x"].commits] == ["initial commit"]
    assert before == {name: (done / name).read_bytes() for name in FINISHED}
    assert "model/diffusion_pytorch_model.safetensors" in hub.repos["tester/base"].files

    # Connections that are dropped again and again, a refused token, and then it works
    folder = tmp_path / "results"
    given = ["--pretrained_model_name_or_path", "tester/base", "--output_dir", str(folder), *SMALL, *METHODS["lsd l2"]]
    given += ["--push_to_hub", "--hub_model_id", "learned"]
    again = [*given, "--resume_from_checkpoint", "latest"]
    hub.drop_next(5, matching="POST /api/repos/create")
    printed = hub.python(TRY, json.dumps([given, [*again, "--hub_token", "hf_wrong"], again]))
    dropped, refused, pushed = re.findall(r"^RESULT (.*)$", printed, re.MULTILINE)
    assert re.match("could not push to 'learned': .*disconnected", dropped, re.IGNORECASE)
    assert re.match("could not push to 'learned': .*401.*Invalid credentials", refused)
    for message in (dropped, refused):
        assert f"Nothing is lost: the results are in {folder}" in message
        assert "--resume_from_checkpoint latest" in message
    assert pushed == "pushed"
    assert printed.count("4 steps: {") == 1  # learned once
    assert "hf_wrong" not in "".join(path.read_text() for path in folder.glob("*.*") if path.suffix != ".png")

    repository = hub.repos["tester/learned"]
    assert [commit.title for commit in repository.commits] == ["initial commit", "Learned scheduler"]
    assert sorted(repository.files) == FINISHED
    for name, content in repository.files.items():
        assert content == (folder / name).read_bytes()
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.base_model == "tester/base"

    # Somebody else, with the card's own lines
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert 'from_pretrained("tester/learned")' in snippet
    code = "import json\n" + snippet + "\nprint('LEARNED', json.dumps(pipe.scheduler.config.coefficients))"
    coefficients = json.loads(re.search(r"LEARNED (.*)", hub.python(code, token=None))[1])
    assert coefficients == json.loads((folder / "metrics.json").read_text())["coefficients"]  # bit for bit


@pytest.mark.slow
def test_hub_out_of_reach(hub: LoopbackHub) -> None:
    code = """
import time
from pathlib import Path
from discrete_schedulers import DiscreteDiffusionPipeline, LSDScheduler
time.sleep = lambda seconds: None
from discrete_schedulers.training.hub import create_repository
def said(call, *arguments):
    try:
        call(*arguments)
    except (OSError, RuntimeError) as error:
        print(str(error).replace("\\n", " "))
said(DiscreteDiffusionPipeline.from_pretrained, "tester/x")
said(LSDScheduler.from_pretrained, "tester/x")
said(create_repository, Path("out"), "tester/x", None)
"""
    command = [sys.executable, "-c", code]
    closed = hub.environment() | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    done = subprocess.run(command, env=closed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pipeline, scheduler, push = done.stdout.splitlines()
    assert pipeline == (
        "the Hub cannot be reached, and model_index.json or config.json of 'tester/x' is not in the local cache"
    )
    assert scheduler == "the Hub cannot be reached, and the scheduler 'tester/x' is not in the local cache"
    assert re.match("could not push to 'tester/x': .*refused.*Nothing is lost", push)


def test_marginal_needs_sequences_to_judge_on(work: Path, tmp_path: Path) -> None:
    """Said before anything is learned."""
    given = [*arguments(work, tmp_path), *METHODS["marginal text"], "--train_file", str(work / "texts.txt")]
    with pytest.raises(ValueError, match="judges on half of 42 sequences; it needs more than 21 there"):
        distill.main([*given, "--max_data_samples", "42"])
    with pytest.raises(SystemExit):
        distill.main([*given, "--num_samples", "21"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsd", "lsd_plus", "optimal_grid"])
def test_main_job_on_the_bundled_model(tmp_path: Path, method: str) -> None:
    given = ["--pretrained_model_name_or_path", "discrete-schedulers/tiny-text", "--output_dir", str(tmp_path)]
    given += ["--num_samples", "8", "--num_eval_samples", "8", "--num_inference_steps", "4", "--max_data_samples", "8"]
    metrics = distill.main([*given, "--method", method, *(["--teacher_steps", "64"] if "lsd" in method else [])])
    assert sorted(path.name for path in tmp_path.iterdir() if "checkpoint" not in path.name) == FINISHED
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "discrete-schedulers/tiny-text"
    for row in metrics["table"]:
        assert 2 < row["nll"] < math.log(2048)  # better than a uniform guess, worse than knowing the text
        assert 2 < row["entropy"] <= math.log(64)
        assert 10 < row["perplexity"] < 1e8  # of bad texts: each new word pays for its spelling
    if method == "lsd":
        assert flat(metrics["coefficients"]) == pytest.approx([1.0] * 4, abs=1e-6)


def test_card_of_a_bundled_model_has_no_link(finished: Callable, tmp_path: Path) -> None:
    """It has no page of its own. And numbers from 1,000 on are read without decimals."""
    metrics, _ = finished("lsd")
    row = metrics["table"][0] | {"nll": 12345.678, "calls": 4.0}
    named = metrics | {"base_model": "discrete-schedulers/tiny-text", "table": [row]}
    write_card(
        tmp_path / "README.md",
        "me/x",
        "LSDScheduler",
        named,
        Facts("command", 1, "cpu", 1.0, 2.0, "DiscreteDiffusionPipeline", "print(1)"),
    )
    text = ModelCard.load(tmp_path / "README.md").text
    assert "`discrete-schedulers/tiny-text` (bundled with discrete_schedulers)" in text
    assert "huggingface.co" not in text
    assert "| 12,346 | 4.000 |" in text


def test_equal_coefficients_are_drawn_as_a_level_line() -> None:
    """Their rounding does not fill the picture, and the axis has the numbers themselves."""
    scale = [1.0, 1.0 - 1e-12, 1.0 + 1e-12, 1.0]
    scheduler = LSDScheduler(vocab_size=5, mask_token_id=4, coefficients={"4": {"scale": scale}})
    figure, axis = pyplot().subplots()
    draw_block(axis, scheduler, [4], "scale")
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(0.02)
    assert low < 1 < high
    figure.canvas.draw()
    assert axis.yaxis.get_offset_text().get_text() == ""
    pyplot().close(figure)
