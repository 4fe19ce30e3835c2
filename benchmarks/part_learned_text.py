"""Part `learned-text`: what learned floats are worth on the bundled text model. See `learned`.

Real text are all windows of the validation and test splits. Of each seed's samples:

    statistic    that of the search, on this real text, in nats
    classifier   accuracy of a logistic classifier that tells samples from real text, on folds it has not seen: 0.5 is best.
                 It sees other hashes and the frozen network's hidden states, averaged over the sequence
    perplexity   under the word 4-gram judge

LSD+ has the coefficients of part `tiny-text`, which has to be there.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import learned
import torch
from part_tiny_text import MODEL, fingerprint, read_split
from store import Store
from torch import Tensor

import discrete_schedulers as ds
from discrete_schedulers.evaluation import NgramJudge, generative_perplexity
from discrete_schedulers.training.data import pack
from discrete_schedulers.training.features import text_features, token_prior
from discrete_schedulers.training.marginal import ngram_features, two_sample_statistic

FULL = {
    "budgets": [4, 8, 16],
    "reference_budgets": [32, 64],  # of the plain sampler; 64 opens one token in a call
    "samples": 256,  # for each seed
    "calibration_samples": 128,
    "curve_sequences": 96,
    "data_sequences": 512,  # to search on, and as many to choose on
    "search_samples": 128,
    "first_search": 35,  # candidates for the first budget; the others start where the one before ended
    "next_search": 21,
}
QUICK = FULL | {
    "budgets": [4],
    "reference_budgets": [8],
    "samples": 24,
    "calibration_samples": 8,
    "curve_sequences": 4,
    "data_sequences": 32,
    "search_samples": 24,
    "first_search": 7,
}


METRICS = {
    "statistic": ("Two-sample statistic against held-out text, nats (0 is best)", 2),
    "perplexity": ("Perplexity under the 4-gram judge, at the entropy of real text", 0),
    "classifier": ("Accuracy of a classifier of samples against real text (0.5 is best)", 3),
}


class Text:
    """The bundled text model, see [`learned.Subject`]."""

    def __init__(self) -> None:
        self.pipe = ds.DiscreteDiffusionPipeline.from_pretrained(MODEL, dtype=torch.bfloat16)
        self.pipe.set_progress_bar_config(disable=True)
        self.network, self.denoiser = self.pipe.model.requires_grad_(False), self.pipe.denoiser
        facts = self.pipe.config.denoiser
        self.base = {name: facts[name] for name in ("vocab_size", "mask_token_id")}
        self.curve = self.pipe.scheduler.config.information_curve
        packed = partial(pack, tokenizer=self.pipe.tokenizer, length=facts["max_length"], limit=10**6)
        train = read_split("train")
        self.train = packed(train)
        self.real = torch.cat([packed(read_split(name)) for name in ("validation", "test")])
        self.entropy = learned.mean_entropy(self.real)
        self.judge = NgramJudge(train)
        self.shipped = ds.LearnedScheduler.from_pretrained(MODEL, subfolder="learned")
        self.prior = token_prior(self.denoiser, facts["max_length"])
        self.classes, self.orders = None, ("spread",)
        self.features = text_features(self.denoiser, self.prior, learned.BUCKETS, learned.BATCH)
        self.real_features, self.real_seen = self.features(self.real), self.seen(self.real)

    def draw(self, scheduler: ds.DiscreteScheduler, steps: int, numbers: list[int]) -> Tensor:
        self.pipe.scheduler = scheduler
        parts = []
        for start in range(0, len(numbers), learned.BATCH):
            generator = [torch.Generator().manual_seed(number) for number in numbers[start : start + learned.BATCH]]
            shape = {"num_samples": len(generator), "length": self.train.shape[1], "num_inference_steps": steps}
            parts.append(self.pipe(**shape, generator=generator, output_type="pt").sequences)
        return torch.cat(parts)

    def seen(self, x: Tensor) -> Tensor:
        """What the classifier sees of sequences, (n, F)."""
        hidden: list[Tensor] = []
        hook = self.network.output_layer.register_forward_pre_hook(
            lambda module, inputs: hidden.append(inputs[0].double().mean(1))
        )
        for part in x.split(learned.BATCH):
            first = torch.zeros_like(part, dtype=torch.bool)
            first[:, 0] = True  # logits of one place, for nothing
            self.denoiser(part, 0.5, first)
        hook.remove()
        return torch.cat([ngram_features(x, 2, 32), torch.cat(hidden)], dim=1)

    def score(self, x: Tensor, seed: int) -> dict[str, float]:
        texts = self.pipe.tokenizer.batch_decode(x, skip_special_tokens=True)
        return {
            "statistic": two_sample_statistic(self.features(x), self.real_features),
            "classifier": learned.classifier_accuracy(self.seen(x), self.real_seen, seed),
            "perplexity": generative_perplexity(texts, self.judge),
        }


@torch.no_grad()
def run(folder: Path, seeds: list[int], quick: bool) -> Store | None:
    """Compute what is missing of results/learned-text.json."""
    source = folder / "tiny-text.json"
    if not source.is_file():
        print("learned-text: skipped, it takes the coefficients of LSD+ from part tiny-text")
        return None
    settings: dict[str, Any] = {"seeds": seeds, "model": MODEL, "weights": fingerprint(), "precision": "bfloat16"}
    store = Store(folder, "learned-text", settings | (QUICK if quick else FULL))
    if not store.complete:
        text, known = Text(), json.loads(source.read_text())["coefficients"]
        store.put({"entropy": text.entropy, "sequences": len(text.real)}, "real")
        learned.run(text, store, [known[str(seed)]["lsd-plus-repaired"] for seed in seeds])
    return store
