r"""What a sampler is worth: the rows of a run's table.

Perplexity under a judge falls with the entropy of samples, so samplers are compared where both have the entropy of the data:
each is drawn from at several temperatures, and between the neighbours T < T' whose mean entropies enclose the data's,

    share = (H - H_T) / (H_T' - H_T),      log perplexity = (1 - share) log perplexity_T + share log perplexity_T'

is its perplexity at equal entropy, with the standard error of a bootstrap over the samples. A sampler that does not reach that
entropy within the temperatures has none.

Calls of the network are shared by all processes, a batch each (`Run.by_batches`): the numbers are the same whatever their
number. The main process alone works out the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteImagePipeline, DiscreteScheduler
from discrete_schedulers.evaluation import NgramJudge, perplexity, sampler_nll_bound, unigram_entropy
from discrete_schedulers.training.data import generators
from discrete_schedulers.training.marginal import two_sample_statistic
from discrete_schedulers.training.method_marginal import shared_features
from discrete_schedulers.training.run import JUDGED, OPENED, Run

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


class Drawn(NamedTuple):
    """Samples of a sampler at a temperature.

    Args:
        temperature (`float`): Times that of the sampler's config.
        samples (`torch.Tensor` of shape `(n, L)`): int64.
        calls (`float`): Mean number of model calls, the batch's for each of its samples.
    """

    temperature: float
    samples: Tensor
    calls: float


def heldout_bound(run: Run, scheduler: DiscreteScheduler, steps: int, heldout: Tensor) -> float | None:
    """Mean NLL bound on held-out data (n, L), nats per token; `None` where the sampler has none. Processes share the work."""
    scheduler.set_timesteps(steps)
    if (
        run.base["process"] != "absorbing"
        or scheduler.chooses_by_logits
        or scheduler.revises_tokens
        or scheduler.draws_latent
    ):
        return None

    def work(part: range) -> Tensor:
        x_0, chances = heldout[part.start : part.stop], generators(run.args.seed, OPENED, part)
        return sampler_nll_bound(run.denoiser, scheduler, x_0, steps, chances, len(part))[:, None]

    run.pipe.scheduler = scheduler
    bound = run.by_batches(len(heldout), work, torch.empty(0, 1, dtype=torch.float64)).mean().item()
    return bound if math.isfinite(bound) else None  # a nucleus may give a true token no probability


def draw_samples(run: Run, scheduler: DiscreteScheduler, steps: int, temperatures: list[float]) -> list[Drawn]:
    """The samples that are measured: at the sampler's own temperature, then at these times that where it has one. The
    processes share the work, and have all samples."""
    found = []
    for temperature in [1.0, *(one for one in temperatures if one != 1 and scheduler.config.temperature > 0)]:
        run.pipe.scheduler = scheduler
        if temperature != 1:
            own = scheduler.config.temperature * temperature
            run.pipe.scheduler = type(scheduler).from_config(scheduler.config, temperature=own)
        samples, calls = run.samples(JUDGED, range(run.args.num_eval_samples), steps)
        found.append(Drawn(temperature, samples, calls.sum().item() / len(calls)))
    return found


def distance_to(run: Run, heldout: Tensor) -> Callable[[Tensor], float | None]:
    """How far the samples of a model of images, (n, L), are from held-out ones (m, L), by `two_sample_statistic` on what
    `image_features` sees; `None` for texts, which have a judge, and where there are not twice as many as features: their
    covariance would not be known. Processes share the work."""
    if run.frozen.noun != "images":
        return lambda samples: None
    count, least = min(len(heldout), run.args.num_eval_samples), 2 * run.frozen.num_features + 1
    if count < least:
        run.accelerator.print(
            f"no statistic in the table: it needs {least} held-out images and samples (`--num_eval_samples`), here are {count}"
        )
        return lambda samples: None
    features, numbers = shared_features(run, []), range(run.args.num_eval_samples)
    classes = None if run.heldout_classes is None else run.frozen.classes_of(numbers)
    target = features(heldout, run.heldout_classes)
    return lambda samples: two_sample_statistic(features(samples.to(heldout.device), classes), target)


def row_of(
    pipe: DiscreteDiffusionPipeline | DiscreteImagePipeline,
    bound: float | None,
    drawn: list[Drawn],
    heldout: Tensor,
    judge: NgramJudge | None,
    seed: int,
) -> dict[str, Any]:
    """A row of the table: NLL bound on held-out data where the sampler has one, model calls, entropy of samples; with a judge
    their perplexity, and that at equal entropy."""
    row: dict[str, Any] = {} if bound is None else {"nll": bound}
    row |= {"calls": drawn[0].calls, "entropy": unigram_entropy(drawn[0].samples).mean().item()}
    if judge is None:
        return row
    each = [judged(pipe, one.temperature, one.samples, judge) for one in drawn]
    row["perplexity"] = perplexity(-each[0].log_prob, each[0].units)
    if len(each) > 1:
        target = unigram_entropy(heldout).mean().item()
        row["matched_perplexity"], row["matched_error"] = at_entropy(each, target, seed)
    return row


def judged(
    pipe: DiscreteDiffusionPipeline | DiscreteImagePipeline, temperature: float, samples: Tensor, judge: NgramJudge
) -> Judged:
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
