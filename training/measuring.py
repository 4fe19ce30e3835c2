r"""What a sampler is worth: the rows of a run's table.

Perplexity under a judge falls with the entropy of samples, so samplers are compared where both have the entropy of the data:
each is drawn from at several temperatures, and between the neighbours T < T' whose mean entropies enclose the data's,

    share = (H - H_T) / (H_T' - H_T),      log perplexity = (1 - share) log perplexity_T + share log perplexity_T'

is its perplexity at equal entropy, with the standard error of a bootstrap over the samples. A sampler that does not reach that
entropy within the temperatures has none.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteScheduler
from discrete_schedulers.evaluation import NgramJudge, perplexity, sampler_nll_bound, unigram_entropy
from discrete_schedulers.training.data import batches, generators
from discrete_schedulers.training.run import JUDGED, OPENED, draw

RESAMPLES = 200  # of the bootstrap


class Judged(NamedTuple):
    """Samples at a temperature as a judge reads them.

    Args:
        temperature (`float`): Times that of the sampler's config.
        entropy (`torch.Tensor` of shape `(n,)`): Of the tokens within each sample, nats.
        log_prob (`torch.Tensor` of shape `(n,)`): Under the judge.
        units (`torch.Tensor` of shape `(n,)`): What the judge counts.
    """

    temperature: float
    entropy: Tensor
    log_prob: Tensor
    units: Tensor

    def log_perplexity(self, rows: Tensor) -> float:
        """Of some of the samples."""
        return -float(self.log_prob[rows].sum() / self.units[rows].sum())


def measure(
    pipe: DiscreteDiffusionPipeline,
    name: str,
    scheduler: DiscreteScheduler,
    steps: int,
    heldout: Tensor,
    judge: NgramJudge | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One row of the table: NLL bound on held-out data where the sampler has one, model calls, entropy of samples; with a judge
    their perplexity, and that at equal entropy."""
    row: dict[str, Any] = {"sampler": name, "steps": steps}
    scheduler.set_timesteps(steps)
    if not (scheduler.chooses_by_logits or scheduler.revises_tokens or scheduler.draws_latent):
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
        bound = torch.cat(bounds).mean().item()
        if math.isfinite(bound):  # a nucleus may give a true token no probability
            row["nll"] = bound
    samples, row["calls"] = samples_of(pipe, scheduler, steps, heldout.shape[1], args)
    row["entropy"] = unigram_entropy(samples).mean().item()
    if judge is None:
        return row
    each = [judged(pipe, 1.0, samples, judge)]
    row["perplexity"] = perplexity(-each[0].log_prob, each[0].units)
    for temperature in args.eval_temperatures:
        if temperature != 1 and scheduler.config.temperature > 0:
            tempered = type(scheduler).from_config(
                scheduler.config, temperature=scheduler.config.temperature * temperature
            )
            drawn, _ = samples_of(pipe, tempered, steps, heldout.shape[1], args)
            each.append(judged(pipe, temperature, drawn, judge))
    if len(each) > 1:
        target = unigram_entropy(heldout).mean().item()
        row["matched_perplexity"], row["matched_error"] = at_entropy(each, target, args.seed)
    return row


def samples_of(
    pipe: DiscreteDiffusionPipeline, scheduler: DiscreteScheduler, steps: int, length: int, args: argparse.Namespace
) -> tuple[Tensor, float]:
    """The samples that are measured, int64 (n, L), and the mean number of model calls, the batch's for each of its samples."""
    pipe.scheduler = scheduler
    found = list(draw(pipe, JUDGED, range(args.num_eval_samples), length, steps, args))
    calls = sum(len(x) * calls for x, calls in found) / args.num_eval_samples
    return torch.cat([x for x, _ in found]), calls


def judged(pipe: DiscreteDiffusionPipeline, temperature: float, samples: Tensor, judge: NgramJudge) -> Judged:
    """What the judge says of each sample."""
    texts = pipe.tokenizer.batch_decode(samples, skip_special_tokens=True)
    log_probs, units = zip(*map(judge.log_prob, texts), strict=True)
    entropy = unigram_entropy(samples).cpu()
    return Judged(temperature, entropy, torch.tensor(log_probs, dtype=torch.float64), torch.tensor(units).double())


def at_entropy(each: list[Judged], target: float, seed: int) -> tuple[float | None, float | None]:
    """Perplexity at the target entropy and its standard error; `None` where the temperatures do not enclose it, in the samples
    or in more than a tenth of the resamples."""
    each = sorted(each, key=lambda one: one.temperature)
    count = len(each[0].entropy)
    found = interpolated(each, target, torch.arange(count))
    if found is None:
        return None, None
    generator = torch.Generator().manual_seed(seed)
    drawn = [interpolated(each, target, torch.randint(count, (count,), generator=generator)) for _ in range(RESAMPLES)]
    reached = torch.tensor([math.exp(one) for one in drawn if one is not None], dtype=torch.float64)
    if len(reached) < 0.9 * RESAMPLES:
        return None, None
    return math.exp(found), float(reached.std())


def interpolated(each: list[Judged], target: float, rows: Tensor) -> float | None:
    """Log-perplexity of some samples at the target entropy; the highest temperature where there are several. `None`: none."""
    means = [float(one.entropy[rows].mean()) for one in each]
    for (below, h), (above, h_next) in reversed(list(pairwise(zip(each, means, strict=True)))):
        if min(h, h_next) <= target <= max(h, h_next):
            share = (target - h) / (h_next - h) if h != h_next else 1.0
            return (1 - share) * below.log_perplexity(rows) + share * above.log_perplexity(rows)
    return None
