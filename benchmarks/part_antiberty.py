"""Part `antiberty`: a published masked language model of antibodies that nobody here trained (package `antiberty` 0.1.3, MIT).

A BERT with a masked-LM head *is* a denoiser for the absorbing process: [CLS], 120 masks, [SEP], special tokens never drawn.
No antibody corpus is at hand, so data are the model's own samples of 120 steps, one token at a time: the bound of a sampler on
these says how far it is from the model's own many-step law. The perplexity of samples is under that law too: exp of the
model's bound with one random token per step, estimated at stratified levels. The optimal grid comes from the teacher's
samples. The network runs in bfloat16.

Perplexities are compared at the entropy of the amino-acid trigrams of all samples of a seed: that of single amino acids in a
sequence hardly moves with the temperature, since samplers that repeat themselves do so across sequences.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import language
import torch
from store import Store, summary
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from discrete_schedulers import AncestralScheduler, DiscreteDiffusionPipeline
from discrete_schedulers.evaluation import distinct_n, unigram_entropy

CLS, SEP, MASK, VOCAB = 2, 3, 4, 25
SPECIAL = [0, 1, 2, 3]  # [PAD], [UNK], [CLS], [SEP]
LETTERS = ".....ACDEFGHIKLMNPQRSTVWY"
FULL = {
    "length": 120,
    "budgets": [4, 8, 16, 32, 64],
    "heldout_sequences": 12,
    "curve_levels": 40,
    "samples": 8,  # for each seed, sampler, budget and temperature
    "sample_budgets": [4, 8, 16, 32, 64],
    "sweep_budgets": [8],
    "temperatures": [1.0, 0.85, 0.7],
    "judge_levels": 4,
    "teacher_steps": 1024,
    "learning_samples": 8,
}
QUICK = FULL | {
    "budgets": [4, 8],
    "length": 24,
    "heldout_sequences": 2,
    "curve_levels": 4,
    "samples": 2,
    "sample_budgets": [4],
    "temperatures": [1.3, 1.0, 0.4],
    "judge_levels": 2,
    "teacher_steps": 16,
    "learning_samples": 2,
}


def is_installed() -> bool:
    """Whether the package is there, with its weights (later versions have none)."""
    return find_spec("antiberty") is not None and (weights_folder() / "pytorch_model.bin").is_file()


def weights_folder() -> Path:
    """Where the package keeps the model; none of its code runs."""
    return Path(find_spec("antiberty").submodule_search_locations[0]) / "trained_models" / "AntiBERTy_md_smooth"


def load_pipeline() -> DiscreteDiffusionPipeline:
    """AntiBERTy with an ancestral scheduler, no tokenizer; templates are ids."""
    model = BertForMaskedLM(BertConfig(**json.loads((weights_folder() / "config.json").read_text())))
    state = torch.load(weights_folder() / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing, _ = model.load_state_dict(state, strict=False)  # the rest: heads for species, chain and graft
    if missing:
        raise ValueError(f"the weights of AntiBERTy lack {missing}")
    scheduler = AncestralScheduler(vocab_size=VOCAB, mask_token_id=MASK)
    pipe = DiscreteDiffusionPipeline(model.eval(), scheduler, None, {"suppress_token_ids": SPECIAL, "max_length": 512})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def template(length: int) -> Tensor:
    """[CLS], free places, [SEP], int64 (1, length + 2)."""
    return torch.tensor([[CLS, *[-1] * length, SEP]])


def letters(samples: Tensor) -> list[str]:
    """Amino acids of token ids (n, L)."""
    return ["".join(LETTERS[i] for i in row) for row in samples.tolist()]


def ids(sequences: list[str]) -> Tensor:
    """Token ids (n, L) of amino acids."""
    return torch.tensor([[LETTERS.index(letter) for letter in row] for row in sequences])


def pooled_entropy(samples: Tensor, n: int) -> float:
    """Entropy of the histogram of all n-grams of a set of sequences (B, L), in nats. Compare sets of one size only."""
    ngrams = samples.unfold(1, n, 1).reshape(-1, n)
    counts = torch.unique(ngrams, dim=0, return_counts=True)[1].double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def any_order_nll(denoiser: Any, data: Tensor, num_levels: int, generator: torch.Generator) -> float:
    """Mean over i = 0..L-1 of the cross-entropy of a masked token when i random others are known, nats per token.

    With one token per step in random order this is the bound of `sampler_nll_bound`; here at `num_levels` stratified i.

    Args:
        denoiser (`Callable`): `denoiser(x_t, t, positions)` -> `RowLogits`.
        data (`torch.Tensor` of shape `(n, L)`): Sequences.
        num_levels (`int`): Levels for each sequence.
        generator (`torch.Generator`): For levels and places.
    """
    count, length = data.shape
    total = 0.0
    for level in range(num_levels):
        share = (level + torch.rand(count, 1, generator=generator)) / num_levels
        revealed = (share * length).long().clamp(max=length - 1)  # float32 may round up to L
        rank = torch.rand(count, length, generator=generator).argsort(1).argsort(1)
        is_masked = rank >= revealed
        rows = denoiser(data.masked_fill(is_masked, MASK), 1.0, is_masked).logits
        nats = -rows.double().log_softmax(-1).gather(1, data[is_masked][:, None])[:, 0]
        sums = torch.zeros(count, length, dtype=torch.float64).masked_scatter(is_masked, nats).sum(1)
        total += float((sums / is_masked.sum(1)).mean())
    return total / num_levels


def run(folder: Path, seeds: list[int], quick: bool) -> Store | None:
    """Compute what is missing of results/antiberty.json."""
    if not is_installed():
        print("antiberty: skipped, the package is missing (pip install --no-deps antiberty==0.1.3)")
        return None
    settings = {"seeds": seeds, "model": "antiberty==0.1.3", "precision": "bfloat16"} | (QUICK if quick else FULL)
    store = Store(folder, "antiberty", settings)
    if store.complete:
        return store
    pipe = load_pipeline().to(torch.bfloat16)
    pipe.model.requires_grad_(False)
    length = settings["length"]

    def score(samples: Tensor, seed: int, steps: int, temperature: float) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "entropy": float(unigram_entropy(samples).mean()),
            "perplexity": math.exp(any_order_nll(subject.denoiser, samples, settings["judge_levels"], generator)),
            "trigram_entropy": pooled_entropy(samples, 3),
            "distinct_3": distinct_n(samples, 3),
        }

    subject = language.Subject("antiberty", pipe, template(length), score, "trigram_entropy")
    one_by_one = AncestralScheduler(**subject.base)
    for seed in seeds:
        if store.get("data", str(seed)) is None:
            print(f"antiberty: data, one token a step, seed {seed}", flush=True)
            store.put(letters(subject.sample(one_by_one, length, seed, settings["samples"])), "data", str(seed))
    data = [ids(store.get("data", str(seed))) for seed in seeds]
    if store.get("reference") is None:
        real = [score(samples, seed, length, 1.0) for samples, seed in zip(data, seeds, strict=True)]
        store.put({name: summary([item[name] for item in real]) for name in real[0]}, "reference")
    heldout = torch.cat(data)[: settings["heldout_sequences"]]
    language.run(subject, store, heldout)
    store.finish()
    return store
