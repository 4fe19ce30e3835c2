"""What a sampler is worth: the rows of a run's table."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteScheduler
from discrete_schedulers.evaluation import NgramJudge, generative_perplexity, sampler_nll_bound, unigram_entropy
from discrete_schedulers.training.data import batches, generators
from discrete_schedulers.training.run import JUDGED, OPENED, sample


def measure(
    pipe: DiscreteDiffusionPipeline,
    name: str,
    scheduler: DiscreteScheduler,
    steps: int,
    heldout: Tensor,
    judge: NgramJudge | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One row of the table: NLL bound on held-out data, entropy of samples, perplexity under the judge."""
    pipe.scheduler = scheduler
    bounds = [
        sampler_nll_bound(
            pipe.denoiser,
            scheduler,
            heldout[part.start : part.stop],
            steps,
            generators(args.seed, OPENED, part),
            len(part),
        )
        for part in batches(len(heldout), args.train_batch_size)
    ]
    samples = sample(pipe, JUDGED, range(args.num_eval_samples), heldout.shape[1], steps, args)
    row: dict[str, Any] = {"sampler": name, "steps": steps, "nll": torch.cat(bounds).mean().item()}
    row["entropy"] = unigram_entropy(samples).mean().item()
    if judge is not None:
        row["perplexity"] = generative_perplexity(pipe.tokenizer.batch_decode(samples, skip_special_tokens=True), judge)
    return row
