"""`distill.py` on models of images and on uniform noise: what the statistic sees of pictures, held against scipy and numbers
worked by hand, and whole runs on networks with random weights."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from PIL import Image
from scipy.fft import dctn
from test_distill import FINISHED, do_not_draw, interrupt, launch
from test_image_pipeline import CLASSES, FACTS, GRID, LENGTH, MASK, shades, tiny_network, tiny_vq
from tiny import WORDS, tiny_model, tiny_pipeline
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    DiscreteImagePipeline,
    DiscreteScheduler,
    LearnedScheduler,
)
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.training import distill
from discrete_schedulers.training.data import load_pictures, middle_of, tokens_of
from discrete_schedulers.training.features import (
    IMAGE_FEATURES,
    LOWEST,
    fluency,
    image_features,
    picture_features,
    token_prior,
    without,
)
from discrete_schedulers.training.frozen import FrozenImages, is_image_model, without_class
from discrete_schedulers.training.measuring import distance_to
from discrete_schedulers.training.run import Run

HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]  # pixels
PICTURES = 150  # of each class
SMALL = ["--num_inference_steps", "2", "4", "--num_eval_samples", "44", "--train_batch_size", "32"]
FEW = ["--max_data_samples", "48", "--num_samples", "24", "--num_epochs", "2"]
METHODS = {
    "search": ["--method", "search", *FEW],
    "search guided": ["--method", "search", *FEW, "--guidance_scale", "2.0", "--plan", "even"],
    "optimal_grid": ["--method", "optimal_grid", "--max_data_samples", "6"],
    "optimal_grid spread": ["--method", "optimal_grid", "--max_data_samples", "6", "--order", "spread"],
    "lsd": ["--method", "lsd", "--num_samples", "6", "--teacher_steps", "8"],
    "jys": ["--method", "jys", "--num_samples", "4"],
    "beta": ["--method", "beta", "--max_data_samples", "6"],
    "marginal": ["--method", "marginal", "--num_samples", "24", "--max_data_samples", "48", "--num_epochs", "2"],
    "order": ["--method", "order", "--num_samples", "6", "--num_epochs", "4"],
    "learn2pd": ["--method", "learn2pd", "--num_samples", "4", "--num_epochs", "3"],
    "search alone": ["--method", "search", "--num_samples", "46", "--num_epochs", "2"],
}
FAST = ["search", "search guided", "optimal_grid", "optimal_grid spread"]


# What the statistic sees


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 12), (3, 28, 28), (3, 64, 48)])
def test_layout_texture_and_colour(channels: int, height: int, width: int) -> None:
    pixels = torch.rand(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    found = picture_features(pixels)
    assert found.shape == (3, IMAGE_FEATURES - 5)
    for row, picture in zip(found.tolist(), pixels.double().numpy(), strict=True):
        cosines = dctn(picture.mean(0), norm="ortho")
        lowest = [cosines[place] / math.sqrt(height * width) for place in LOWEST]
        assert lowest[0] == pytest.approx(picture.mean())
        frequency = np.maximum(np.arange(height)[:, None] / height, np.arange(width)[None] / width)
        texture = []
        for low, high in ((0.5, 1), (0.25, 0.5), (0.125, 0.25), (0.0625, 0.125)):
            energy = cosines[(frequency >= low) & (frequency < high)] ** 2
            texture.append(math.log((energy.mean() if energy.size else 0) + 1 / (12 * 255**2)))
        colour = [0.0, 0.0]
        if channels == 3:
            red, green, blue = picture.mean((1, 2))
            colour = [red - green, red + green - 2 * blue]
        assert row == pytest.approx([*lowest, *(value**2 for value in lowest), *texture, *colour], abs=1e-9)


def test_large_pictures_are_averaged_down() -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(picture_features(large), picture_features(pixels), atol=1e-9, rtol=0)


class Telling:
    """A denoiser that gives the true token the probability 0.8 where all four neighbours are known, and else 0.4; with a class
    0.1 more where it is 1."""

    vocab_size, mask_token_id = 3, 2

    def __init__(self, x: Tensor, width: int) -> None:
        self.x, self.width = x, width

    def __call__(self, x_t: Tensor, t: float, positions: Tensor, class_labels: Tensor | None = None) -> RowLogits:
        assert t == 0.5
        known = (x_t != self.mask_token_id).view(len(x_t), -1, self.width)
        padded = torch.nn.functional.pad(known, (1, 1, 1, 1), value=True)
        around = padded[:, 1:-1, 2:] & padded[:, 1:-1, :-2] & padded[:, 2:, 1:-1] & padded[:, :-2, 1:-1]
        p = torch.where(around.flatten(1), 0.8, 0.4)
        if class_labels is not None:
            p = p + 0.1 * class_labels[:, None]
        law = torch.stack([1 - p, p], dim=-1)
        law = torch.where(self.x[: len(x_t), :, None] == 1, law, law.flip(-1))
        logits = torch.cat([law, torch.full_like(law[..., :1], 0.5)], dim=-1).log()
        return RowLogits(logits[positions], positions)


def test_the_halves_of_an_image_are_a_chessboard() -> None:
    """Every hidden token has all neighbours; with stripes, as in texts, it would have none above and below."""
    x = torch.randint(0, 2, (2, 24), generator=torch.Generator().manual_seed(0))
    found = fluency(Telling(x, 6), x, width=6)
    torch.testing.assert_close(found, torch.full((2, 2), math.log(0.8)).double(), atol=1e-6, rtol=0)
    stripes = fluency(Telling(x, 6), x)
    torch.testing.assert_close(stripes, torch.full((2, 2), math.log(0.4)).double(), atol=1e-6, rtol=0)
    classes = torch.tensor([0, 1])
    told = fluency(Telling(x, 6), x, width=6, classes=classes)
    torch.testing.assert_close(told, torch.tensor([[0.8] * 2, [0.9] * 2]).log().double(), atol=1e-6, rtol=0)


def test_features_do_not_depend_on_the_batch() -> None:
    pipe = tiny_images()
    frozen = FrozenImages(pipe, LENGTH, [], 1.0)
    x = torch.randint(0, MASK, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, 0, 1])
    each = [frozen.features([], 1)(row[None], one[None]) for row, one in zip(x, classes, strict=True)]
    together = image_features(frozen.denoiser, frozen.pixels, GRID[1], 4)(x, classes)
    torch.testing.assert_close(torch.cat(each), together, atol=1e-5, rtol=0)
    assert frozen.features([], 4)(x[:0]).shape == (0, IMAGE_FEATURES)
    assert not torch.allclose(together[:, -5:], frozen.features([], 4)(x)[:, -5:])  # told no class


def uniform_texts(length: int) -> DiscreteDiffusionPipeline:
    scheduler = AncestralScheduler(len(WORDS), process="uniform")
    return tiny_pipeline(scheduler, model=tiny_model(max_length=length))


def test_noise_in_the_place_of_masks() -> None:
    """Uniform noise: the same tokens in all rows, at hidden places only; the prior is the mean law given random tokens."""
    denoiser = uniform_texts(8).denoiser
    x = torch.zeros(2, 8, dtype=torch.int64)
    hidden = torch.arange(8).expand(2, 8) % 2 == 0
    found = without(denoiser, x, hidden)
    assert torch.equal(found[0], found[1])
    assert (found[~hidden] == 0).all()
    assert found[hidden].unique().numel() > 1
    drawn = torch.randint(denoiser.vocab_size, (16, 8), generator=torch.Generator().manual_seed(0))
    law = denoiser(drawn, 1.0).double().softmax(-1).mean((0, 1))
    assert token_prior(denoiser, 8) == pytest.approx(law.log().tolist(), abs=6e-5)


# Whole runs


def tiny_images(num_classes: int | None = CLASSES, decoder: Any = None) -> DiscreteImagePipeline:
    pipe = DiscreteImagePipeline(
        tiny_network(num_classes), AncestralScheduler(**FACTS), decoder or shades(), denoiser={"grid_shape": GRID}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and pictures."""
    folder = tmp_path_factory.mktemp("images")
    tiny_images().save_pretrained(folder / "model")
    write_pictures(folder / "pictures", PICTURES)
    return folder


def write_pictures(folder: Path, count: int) -> None:
    """So many in a folder for each class: the higher, the brighter."""
    numbers = np.random.default_rng(0)
    for number in range(CLASSES):
        (folder / str(number)).mkdir(parents=True)
        for i in range(count):
            grey = numbers.integers(60 * number, 60 * number + 100, (HEIGHT, WIDTH + 4)).astype(np.uint8)
            Image.fromarray(grey).save(folder / str(number) / f"{i}.png")


def given(work: Path, folder: Path, name: str) -> list[str]:
    """Arguments of a run; `alone` is without pictures."""
    data = ["--train_data_dir", str(work / "pictures"), "--class_column", "label"]
    model = ["--pretrained_model_name_or_path", str(work / "model"), "--output_dir", str(folder)]
    return [*model, *([] if "alone" in name else data), *SMALL, *METHODS[name]]


@pytest.fixture(scope="module")
def finished(work: Path) -> Callable[[str], tuple[dict[str, Any], Path]]:
    runs: dict[str, tuple[dict[str, Any], Path]] = {}

    def run(name: str) -> tuple[dict[str, Any], Path]:
        if name not in runs:
            folder = work / name.replace(" ", "_")
            with pytest.MonkeyPatch.context() as patch:
                if name != "search":
                    do_not_draw(patch)
                runs[name] = distill.main(given(work, folder, name)), folder
        return runs[name]

    return run


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in METHODS])
def test_what_a_run_leaves_behind(finished: Callable, work: Path, name: str) -> None:
    metrics, folder = finished(name)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == FINISHED
    scheduler = DiscreteScheduler.from_pretrained(folder)
    pipe = DiscreteImagePipeline.from_pretrained(work / "model")
    pipe.scheduler = scheduler
    images = pipe(class_labels=[0, 1], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, HEIGHT, WIDTH, 1)
    assert list(scheduler.config.grid_shape) == list(GRID)
    assert metrics["data"] == ("the model's own many-step samples" if "alone" in name else "held-out images")
    rows = [row for row in metrics["table"] if row["sampler"] == METHODS[name][1]]
    assert all(0 < row["calls"] <= row["steps"] * (2 if "guided" in name else 1) for row in rows)
    assert all(math.isfinite(row["statistic"]) for row in rows)
    assert [0 < row.get("nll", -1) < 10 for row in rows] == [name != "learn2pd"] * 2  # whose choices see the logits
    if name == "search":
        assert scheduler.config.order in ("spread", "random")
        assert all(sum(blocks["counts"]) == LENGTH for blocks in metrics["coefficients"].values())
        text = ModelCard.load(folder / "README.md").text
        assert "DiscreteImagePipeline.from_pretrained" in text
        assert "pipe(class_labels=[0], num_inference_steps=4).images[0]" in text
        assert "statistic: how far" in text


def test_the_numbers_are_those_of_the_pictures(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held out is every tenth picture; each is cut to its middle, and goes through the codebook with its class."""
    seen: dict[str, Any] = {}

    def stop(run: Any) -> None:
        seen["run"] = run
        raise KeyboardInterrupt

    monkeypatch.setitem(distill.METHODS, "optimal_grid", stop)
    with pytest.raises(KeyboardInterrupt):
        distill.main([*given(work, tmp_path / "o", "optimal_grid"), "--max_data_samples", "10000"])
    run = seen["run"]
    count = CLASSES * PICTURES
    places = [i for i in range(count) if i % 10 != 9]
    assert run.classes.tolist() == [i // PICTURES for i in places]
    files = [path for number in range(CLASSES) for path in sorted((work / "pictures" / str(number)).iterdir(), key=str)]
    for row in (0, 30, len(places) - 1):
        grey = np.array(Image.open(files[places[row]]))[:, 2:-2] / 255
        means = grey.reshape(GRID[0], 2, GRID[1], 2).transpose(0, 2, 1, 3)  # patches; a code is a patch of one grey
        greys = np.linspace(0, 1, MASK)
        expected = ((means[..., None] - greys) ** 2).sum((2, 3)).argmin(-1)
        assert run.fit[row].view(GRID).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["search", pytest.param("search alone", marks=pytest.mark.slow)])
def test_stopped_and_resumed(
    finished: Callable, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    metrics, _ = finished(name)
    do_not_draw(monkeypatch)
    again = [*given(work, tmp_path, name), "--resume_from_checkpoint", "latest"]
    for saves in (1, 2, 100):
        with monkeypatch.context() as patch:
            interrupt(patch, saves)
            try:
                resumed = distill.main(again)
                break
            except KeyboardInterrupt:
                continue
    changed = {"base_model"}
    assert {k: v for k, v in resumed.items() if k not in changed} == {
        k: v for k, v in metrics.items() if k not in changed
    }


def test_drawn_data_are_counted_once(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while the samples to measure on are drawn: those to fit on are drawn again, and count once."""
    seen: list[int] = []

    def stop(run: Run) -> None:
        seen.append(run.state["evaluations"])
        raise KeyboardInterrupt

    def asked_to_stop(run: Run, purpose: int, numbers: range, steps: int) -> tuple[Tensor, Tensor]:
        if numbers.start == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return samples(run, purpose, numbers, steps)

    samples = Run.samples
    monkeypatch.setitem(distill.METHODS, "optimal_grid", stop)
    given = ["--pretrained_model_name_or_path", str(work / "model"), "--output_dir", str(tmp_path / "out")]
    given += ["--method", "optimal_grid", "--num_samples", "3", "--num_eval_samples", "2"]
    given += ["--resume_from_checkpoint", "latest"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "samples", asked_to_stop)
        with pytest.raises(SystemExit):
            distill.main(given)
    assert list((tmp_path / "out").glob("checkpoint-*"))
    with pytest.raises(KeyboardInterrupt):
        distill.main(given)
    assert seen == [3 * LENGTH]  # one token a call


def test_every_sixteen_numbers_are_kept_whatever_they_are_of() -> None:
    accelerator: Any = SimpleNamespace(num_processes=1, device="cpu", reduce=lambda own, how: own)
    saved: list[int] = []
    frozen: Any = None
    args: Any = None
    run = Run(
        args,
        accelerator,
        frozen,
        {},
        None,
        {"evaluations": 0},
        {},
        lambda _: saved.append(len(run.state["numbers"])),
        {},
    )
    for number in range(35):
        assert run.numbers(f"plan {number}")(lambda number=number: [number]) == [number]
    assert saved == [16, 32]
    assert run.numbers("plan 3")(lambda: [-1.0]) == [3]  # remembered


@pytest.mark.slow
def test_two_processes_learn_the_same(finished: Callable, work: Path, tmp_path: Path) -> None:
    metrics, _ = finished("search")
    launch(given(work, tmp_path / "two", "search"), 2, tmp_path)
    other = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert other["coefficients"] == metrics["coefficients"]
    assert other["sequence_evaluations"] == metrics["sequence_evaluations"]
    for row, expected in zip(other["table"], metrics["table"], strict=True):
        assert row.pop("sampler") == expected["sampler"]
        assert row == pytest.approx({name: value for name, value in expected.items() if name != "sampler"}, rel=1e-4)


def test_the_network_is_told_no_class_or_the_empty_prompt() -> None:
    pipe = tiny_images()
    x = torch.randint(0, MASK, (2, LENGTH), generator=torch.Generator().manual_seed(0)).index_fill(
        1, torch.arange(6), MASK
    )
    plain = pipe.denoiser(x, 0.5, class_labels=torch.full((2,), CLASSES))
    torch.testing.assert_close(without_class(pipe)(x, 0.5), plain)
    told = pipe.denoiser(x, 0.5, class_labels=torch.tensor([0, 1]))
    torch.testing.assert_close(without_class(pipe)(x, 0.5, class_labels=torch.tensor([0, 1])), told)
    assert (plain - told)[..., :MASK].abs().max() > 1e-3
    unconditional = tiny_images(None)
    assert FrozenImages(unconditional, LENGTH, [], 1.0).classes_of(range(3)) is None
    assert FrozenImages(unconditional, LENGTH, [], 1.0).draw(range(2), 2, numbered(2))[0].shape == (2, LENGTH)
    frozen = FrozenImages(pipe, LENGTH, [], 1.0)
    x, calls = frozen.draw(range(4, 6), 2, numbered(2))  # classes 1 and 2
    own = pipe(class_labels=[1, 2], num_inference_steps=2, generator=numbered(2), output_type="latent").sequences
    assert torch.equal(x, own)
    assert calls == 2


def numbered(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


# Uniform noise


UNIFORM = ["--method", "search", "--plan", "even", "--blocks", "grid", "temperature_line", "--num_samples", "48"]
UNIFORM += [
    "--num_epochs",
    "2",
    "--num_inference_steps",
    "2",
    "4",
    "--num_eval_samples",
    "8",
    "--max_data_samples",
    "48",
]


def test_search_on_uniform_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_draw(monkeypatch)
    uniform_texts(6).save_pretrained(tmp_path / "model")
    model = ["--pretrained_model_name_or_path", str(tmp_path / "model")]
    metrics = distill.main([*model, *UNIFORM, "--output_dir", str(tmp_path / "out")])
    scheduler = LearnedScheduler.from_pretrained(tmp_path / "out")
    assert scheduler.config.process == "uniform"
    for steps, blocks in metrics["coefficients"].items():
        assert {name: len(values) for name, values in blocks.items()} == {
            "inverse_temperature": int(steps),
            "times": int(steps) + 1,
        }
    assert all("nll" not in row for row in metrics["table"])
    assert [row["sampler"] for row in metrics["table"]] == ["ancestral", "search"] * 2
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.scheduler = scheduler
    assert pipe(num_samples=2, num_inference_steps=4, output_type="pt").sequences.shape == (2, 6)


# Bad input


def test_uniform_noise_has_no_masks_to_plan(tmp_path: Path) -> None:
    uniform_texts(6).save_pretrained(tmp_path / "model")
    model = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    search = ["--method", "search"]
    even = [*search, "--plan", "even"]
    for wrong in (["--method", "optimal_grid"], search, even, [*even, "--blocks", "grid", "--order", "random"]):
        with pytest.raises(ValueError, match=r"has uniform noise.* --plan even --blocks inverse_temperature") as error:
            distill.main([*model, *wrong])
        assert "contrast" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--train_file", "texts"], "`--train_file` is for models of texts; .* is one of images"),
        (["--sequence_length", "8"], "`--sequence_length` is for models of texts"),
        (["--prompt_file", "texts"], "`--prompt_file` is for a model with a text encoder"),
        (["--train_data_dir", "pictures", "--image_column", "photo"], "`--image_column` is 'photo'; the dataset has"),
        (["--train_data_dir", "pictures", "--class_column", "kind"], "`--class_column` is 'kind'; the dataset has"),
        (
            ["--train_data_dir", "pictures", "--image_column", "label"],
            "`--image_column` 'label' has int; it must be pic",
        ),
        (["--train_data_dir", "four", "--class_column", "label"], "'label' has 3; allowed are integers from 0 to 2"),
        (["--sequence_length", "1"], "`--sequence_length` is for models of texts"),
    ],
)
def test_arguments_that_are_not_for_this_model(work: Path, tmp_path: Path, change: list[str], told: str) -> None:
    (tmp_path / "texts").write_text("one\ntwo\n")
    for number in range(4):
        (tmp_path / "four" / str(number)).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "four" / str(number) / f"{i}.png")
    paths = {"texts": tmp_path / "texts", "pictures": work / "pictures", "four": tmp_path / "four"}
    model = ["--pretrained_model_name_or_path", str(work / "model"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=told):
        distill.main([*model, "--method", "optimal_grid", *(str(paths.get(one, one)) for one in change)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--train_data_dir", "nowhere"], "--train_data_dir nowhere is not a folder"),
        (
            ["--train_data_dir", ".", "--train_file", __file__],
            "--train_data_dir goes with neither --dataset_name nor --train_file",
        ),
        (["--class_column", "label"], "--class_column needs --dataset_name or --train_data_dir"),
        (["--prompt_file", "nowhere"], "--prompt_file nowhere is not a file"),
        (["--method", "beta", "--order", "best"], "--order best is for --method search with --plan best"),
        (
            ["--method", "search", "--plan", "even", "--order", "best"],
            "--order best is for --method search with --plan best",
        ),
        (["--method", "search", "--guidance_scale", "nan"], "--guidance_scale is nan; it must be finite"),
        (["--method", "lsd", "--guidance_scale", "2"], "--guidance_scale is for --method search"),
    ],
)
def test_arguments_that_contradict_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], told: str
) -> None:
    with pytest.raises(SystemExit):
        distill.parse_args(["--pretrained_model_name_or_path", "m", "--output_dir", str(tmp_path / "out"), *change])
    assert told in capsys.readouterr().err


def test_guidance_needs_something_to_guide_by(tmp_path: Path) -> None:
    tiny_images(None).save_pretrained(tmp_path / "model")
    args = loading(tmp_path / "model", "--method", "search", "--guidance_scale", "2")
    with pytest.raises(ValueError, match=r"`--guidance_scale` is 2.0; .* has neither classes nor a text encoder"):
        distill.load_model(args, Accelerator())


def loading(model: Path, *given: str) -> Any:
    return distill.parse_args(["--pretrained_model_name_or_path", str(model), "--output_dir", "out", *given])


def test_a_scale_of_zero_and_half_precision(tmp_path: Path) -> None:
    """No guidance is 1, and 0 leaves out the class; the network alone is in half precision."""
    tiny_images(decoder=tiny_vq()).save_pretrained(tmp_path / "model")
    args = loading(tmp_path / "model", "--method", "search", "--guidance_scale", "0", "--mixed_precision", "bf16")
    frozen = distill.load_model(args, Accelerator())
    assert isinstance(frozen, FrozenImages)
    assert frozen.guidance_scale == 0
    assert {value.dtype for value in frozen.pipe.model.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in frozen.pipe.decoder.parameters()} == {torch.float32}
    x, _ = frozen.draw(range(3), 2, numbered(3))
    assert frozen.pixels(x).dtype == torch.float32
    seen = frozen.features([], 2)(x, frozen.classes_of(range(3)))
    assert seen.shape == (3, IMAGE_FEATURES)
    assert seen.dtype == torch.float64
    assert seen.isfinite().all()
    plain = distill.load_model(loading(tmp_path / "model", "--method", "search"), Accelerator())
    assert isinstance(plain, FrozenImages)
    assert plain.guidance_scale == 1


# Pictures as they come


def reading(**changes: Any) -> Any:
    """Arguments of `load_pictures` and `tokens_of`."""
    none = dict.fromkeys(["train_data_dir", "dataset_name", "dataset_config", "class_column"])
    sizes = {"max_data_samples": 50, "num_eval_samples": 10, "train_batch_size": 4}
    return SimpleNamespace(**(none | sizes | {"image_column": "image"} | changes))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "could not be read as a folder of pictures"),
        ({"notes.txt": b"x"}, "could not be read as a folder of pictures"),
        ({"test/a.png": None, "test/b.png": None}, r"has the splits \['test'\]; it needs 'train'"),
        ({"a.png": None}, "none to measure on: ten or more are needed"),
        ({f"{i}.png": b"no picture" for i in range(12)}, "could not be read: cannot identify"),
    ],
)
def test_folders_without_enough_pictures(tmp_path: Path, files: dict[str, bytes | None], told: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if content is None:
            Image.new("L", (WIDTH, HEIGHT)).save(folder / name)
        else:
            (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        load_pictures(reading(train_data_dir=str(folder)), tiny_images())
    assert "dataset_name" not in str(error.value)


def split_of(pictures: list[Any], **columns: Any) -> Any:
    return datasets.Dataset.from_dict({"image": pictures} | columns).cast_column("image", datasets.Image())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (list("abcd"), "has 'a'; allowed are integers from 0 to 2"),
        ([0, None, 1, 2], "has None; allowed"),
        ([[0, 1]] * 4, r"has \[0, 1\]; allowed"),
        ([0.0, 1.0, 2.0, 0.0], "has 0.0; allowed"),
        ([0, 1, -1, 2], "has -1; allowed"),
    ],
)
def test_classes_that_are_none(values: list[Any], told: str) -> None:
    split = split_of([Image.new("L", (WIDTH, HEIGHT))] * 4, kind=values)
    with pytest.raises(ValueError, match=f"`--class_column` 'kind' {told}"):
        tokens_of(split, reading(class_column="kind"), tiny_images(), 4)
    with pytest.raises(ValueError, match=r"`--class_column` is 'kind'; this model has no classes"):
        tokens_of(split, reading(class_column="kind"), tiny_images(None), 4)


def test_classes_of_a_class_label() -> None:
    split = split_of([Image.new("L", (WIDTH, HEIGHT))] * 3, kind=["c", "a", "b"])
    split = split.cast_column("kind", datasets.ClassLabel(names=["a", "b", "c"]))
    _, classes = tokens_of(split, reading(class_column="kind"), tiny_images(), 3)
    assert classes is not None
    assert classes.tolist() == [2, 0, 1]
    assert classes.dtype == torch.int64
    switches = split_of([Image.new("L", (WIDTH, HEIGHT))] * 2, kind=[False, True])
    assert tokens_of(switches, reading(class_column="kind"), tiny_images(), 2)[1].dtype == torch.int64


def test_pictures_of_any_size_and_kind() -> None:
    """White is the last code, whatever the picture is made of."""
    grey = [Image.new("L", (WIDTH, HEIGHT), 255), Image.new("1", (7, 31), 1), Image.new("L", (1, 90), 255)]
    colour = [Image.new("RGB", (50, 9), "white"), Image.new("RGBA", (5, 5), "white"), Image.new("CMYK", (9, 9), 0)]
    palette = Image.new("RGB", (12, 40), "white").convert("P")
    x, classes = tokens_of(split_of([*grey, *colour, palette]), reading(), tiny_images(), 50)
    assert classes is None
    assert x.tolist() == [[MASK - 1] * LENGTH] * 7


@pytest.mark.parametrize(
    ("wrong", "told"), [(None, "has NoneType; it must be pictures"), (Image.new("F", (WIDTH, HEIGHT)), "of mode 'F'")]
)
def test_the_picture_that_is_wrong_is_named(wrong: Any, told: str) -> None:
    pictures = [Image.new("L", (WIDTH, HEIGHT))] * 2
    split = [{"image": one} for one in (*pictures, wrong)]
    with pytest.raises(ValueError, match=f"`--image_column` 'image' has .*{told}|{told}"):
        tokens_of(Rows(split), reading(), tiny_images(), 3)


class Rows(list):
    """A split whose pictures are as they are given."""

    column_names = ("image",)

    def select(self, places: list[int]) -> Rows:
        return Rows(self[place] for place in places)

    def __getitem__(self, key: Any) -> Any:
        return {"image": [self[place]["image"] for place in key]} if isinstance(key, list) else super().__getitem__(key)


@pytest.mark.parametrize(
    ("size", "aspect", "expected"),
    [
        ((1, 100), 1.0, (1, 1)),
        ((100, 1), 1.0, (1, 1)),
        ((7, 10), 1.0, (7, 7)),
        ((10, 10), 1.5, (10, 7)),
        ((1, 9), 3, (1, 1)),
    ],
)
def test_the_middle_has_the_size_it_should(size: tuple[int, int], aspect: float, expected: tuple[int, int]) -> None:
    picture = Image.new("L", size)
    picture.putpixel(((size[0] - 1) // 2, (size[1] - 1) // 2), 255)
    middle = middle_of(picture, aspect)
    assert middle.size == expected
    assert middle.getextrema()[1] == 255


def test_pictures_are_not_for_a_model_of_texts(tmp_path: Path) -> None:
    tiny_pipeline(model=tiny_model(max_length=6)).save_pretrained(tmp_path / "model")
    model = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"`--train_data_dir` is for models of images; .* is one of texts"):
        distill.main([*model, "--method", "optimal_grid", "--train_data_dir", str(tmp_path)])


def test_what_is_a_model_of_images(work: Path, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "texts")
    assert is_image_model("discrete-schedulers/tiny-image", None)
    assert not is_image_model("discrete-schedulers/tiny-text", None)
    assert is_image_model(str(work / "model"), None)
    assert not is_image_model(str(tmp_path / "texts"), None)
    (tmp_path / "amused").mkdir()
    (tmp_path / "amused" / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}')
    assert is_image_model(str(tmp_path / "amused"), None)


def test_too_few_images_for_the_statistic_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_images()
    args = SimpleNamespace(num_eval_samples=42, train_batch_size=8)
    run: Any = SimpleNamespace(args=args, frozen=FrozenImages(pipe, LENGTH, [], 1.0), accelerator=Accelerator())
    heldout = torch.zeros(50, LENGTH, dtype=torch.int64)
    assert distance_to(run, heldout)(heldout) is None
    assert "it needs 43 held-out images and samples (`--num_eval_samples`), here are 42" in capsys.readouterr().out
