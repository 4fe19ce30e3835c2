r"""Learn sampler coefficients on the law of the *last samples*, by score-function gradients and a density ratio.

A sampler with coefficients c draws a path x_1 -> ... -> x_0 with step laws K_k and a frozen network; its output has the law
q_c. With p the law of the data (or of a teacher's samples) and r = log(q_c / p), for every f-divergence D

    grad_c D(q_c, p) = E_path[ w(r(x_0)) grad_c log P_c(path) ],     log P_c(path) = sum_k log K_k(x_s | x_t)
    w = r                            KL(q_c || p)      "reverse_kl"
    w = -exp(-r)                     KL(p || q_c)      "forward_kl"
    w = (log 2 + log sigmoid(r)) / 2 JS(p, q_c)        "js"

w is the derivative of D in q_c(x), up to constants, which a baseline removes: w_b minus the mean of the *other* rows is
unbiased. Neither the network nor the draws are differentiated. A calibrated network is already optimal for path-wise forward
KL (the ELBO), whatever the temperature could gain; only a marginal divergence sees that gain.

The ratio is exact on enumerable joints; elsewhere `LogisticRatio` learns it from samples of both sides. The estimator is
right and the learned ratio is the bottleneck: so iterates are averaged, floats are clipped, and the best candidate is kept
by a held-out two-sample statistic.

Sources: score-function (REINFORCE) gradient, Williams 1992; the same for few-step students, DiDi-Instruct (arXiv 2509.25035);
ratio by classification, Sugiyama et al. 2012. Sums in float64.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import Generators, categorical, draw_states, uniforms
from discrete_schedulers.schedulers.learned_utils import (
    STEP_BLOCKS,
    learned_law,
    learned_mixture,
    mixture_of,
    times_from_counts,
)

LOWEST = -1e30  # a logit of probability 0 that can be multiplied
Coefficients: TypeAlias = dict[str, Tensor]  # named blocks of floats, float64
Divergence = Literal["reverse_kl", "forward_kl", "js"]
Bounds: TypeAlias = Mapping[str, tuple[float, float]]  # where the floats of a block may lie
Features: TypeAlias = Callable[[Tensor], Tensor]  # tokens (B, L) -> (B, F), float64


class StepLaw(NamedTuple):
    """Law of x_s given x_t: a mixture of K products over positions, a fresh component for each row and step.

    Args:
        log_weights (`torch.Tensor` of shape `(K,)`): Log-probabilities of the components.
        law (`torch.Tensor` of shape `(K, B, L, V)`): Law of each position in each component.
    """

    log_weights: Tensor
    law: Tensor


# (coefficients, step index, logits of p(x_0 | x_t) (B, L, V), x_t (B, L)) -> law of x_s, differentiable in the coefficients
Kernel: TypeAlias = Callable[[Coefficients, int, Tensor, Tensor], StepLaw]
Denoise: TypeAlias = Callable[[Tensor, Tensor | float], Tensor]  # (x_t, t) -> logits (B, L, V)
LogRatio: TypeAlias = Callable[[Coefficients, Tensor], Tensor]  # (coefficients, x_0 (B, L)) -> log(q_c / p), (B,)


def factorised(law: Tensor) -> StepLaw:
    """A product law (B, L, V), as `transition` of a factorised scheduler gives it, as a mixture of one."""
    return StepLaw(law.new_zeros(1), law[None])


def learned_kernel(process: AbsorbingProcess, times: Tensor, prior: Tensor | None = None) -> Kernel:
    """The step law of `LearnedScheduler(unmasking="bernoulli")`: coefficients are the blocks of a budget as tensors, by their
    names in the config, any of them but `times` and `order`. What is learned goes into the config as it is.

    Args:
        process (`AbsorbingProcess`): The forward process.
        times (`torch.Tensor` of shape `(N + 1,)`): The grid, where there is no block `counts`.
        prior (`torch.Tensor` of shape `(V,)`, *optional*): `token_prior`, for the block `contrast`.
    """

    def kernel(coefficients: Coefficients, index: int, logits: Tensor, x_t: Tensor) -> StepLaw:
        grid = times_from_counts(process, coefficients["counts"]) if "counts" in coefficients else times
        step = {name: coefficients[name][index] for name in STEP_BLOCKS if name in coefficients}
        if "mixture_weight" not in coefficients:
            return factorised(learned_law(process, logits, x_t, grid[index], grid[index + 1], step, prior=prior))
        weight, shift = coefficients["mixture_weight"], coefficients["mixture_shift"]
        mixture = mixture_of(weight, shift, process.vocab_size, process.mask_token_id)
        law = learned_mixture(process, logits, x_t, grid[index], grid[index + 1], step, mixture, prior=prior)
        return StepLaw(mixture.log_weights, law)

    return kernel


# Paths


def step_log_prob(step: StepLaw, x_s: Tensor) -> Tensor:
    """log K(x_s | x_t) = log sum_k w_k prod_i law_k(x_s^i), (B,).

    Args:
        step (`StepLaw`): Of B rows.
        x_s (`torch.Tensor` of shape `(B, L)`): Where the rows went.
    """
    place = x_s[None, ..., None].expand(len(step.law), -1, -1, 1)
    taken = step.law.gather(-1, place)[..., 0]  # (K, B, L)
    return (step.log_weights[:, None] + taken.log().sum(-1)).logsumexp(0)


def draw_step(step: StepLaw, generator: Generators) -> Tensor:
    """x_s of each row, (B, L): first the component, then every position."""
    rows = step.law.shape[1]
    u = uniforms((rows,), generator, step.law.device)
    component = categorical(step.log_weights.expand(rows, -1), u)
    return draw_states(step.law[component, torch.arange(rows, device=u.device)], generator)


@torch.no_grad()
def sample_paths(
    kernel: Kernel,
    coefficients: Coefficients,
    denoiser: Denoise,
    start: Tensor,
    times: Tensor,
    generator: Generators,
) -> Tensor:
    """Draw B paths.

    Args:
        kernel (`Callable`): The sampler.
        coefficients (`dict`): Its floats.
        denoiser (`Callable`): The frozen network.
        start (`torch.Tensor` of shape `(B, L)`): First states.
        times (`torch.Tensor` of shape `(N,)`): What the network is told before each step.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.

    Returns:
        `torch.Tensor` of shape `(N + 1, B, L)`: States, int64, first to last.
    """
    states = [start]
    for k, t in enumerate(times):
        step = kernel(coefficients, k, denoiser(states[-1], t), states[-1])
        states.append(draw_step(step, generator))
    return torch.stack(states)


def path_log_prob(
    kernel: Kernel, coefficients: Coefficients, denoiser: Denoise, paths: Tensor, times: Tensor
) -> Tensor:
    """sum_k log K_k(x_s | x_t) of each path, (B,), differentiable in the coefficients.

    Args:
        kernel (`Callable`): The sampler.
        coefficients (`dict`): Its floats.
        denoiser (`Callable`): The frozen network; it is called again at the states of the paths, without gradient.
        paths (`torch.Tensor` of shape `(N + 1, B, L)`): From `sample_paths`.
        times (`torch.Tensor` of shape `(N,)`): As there.
    """
    total = torch.zeros(paths.shape[1], dtype=torch.float64, device=paths.device)
    for k, t in enumerate(times):
        with torch.no_grad():  # -inf logits (masks, known tokens) times a float would have the gradient 0 * inf
            logits = denoiser(paths[k], t).clamp(min=LOWEST)
        total = total + step_log_prob(kernel(coefficients, k, logits, paths[k]), paths[k + 1])
    return total


# The gradient


def divergence_weights(log_ratio: Tensor, divergence: Divergence) -> Tensor:
    """w(r), the derivative of the divergence in q(x) up to a constant; see the head of the file.

    Args:
        log_ratio (`torch.Tensor` of shape `(B,)`): r = log(q / p) at samples of q.
        divergence (`str`): `"reverse_kl"`, `"forward_kl"` or `"js"`.

    Raises:
        ValueError: For another divergence.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return -(-log_ratio).exp()
    if divergence == "js":
        return (math.log(2) + logsigmoid(log_ratio)) / 2
    raise ValueError(f"`divergence` is {divergence!r}; allowed are 'reverse_kl', 'forward_kl' and 'js'")


def centred(weights: Tensor) -> Tensor:
    """w_b minus the mean of the other rows: a baseline that does not depend on row b, so that nothing is biased.

    Raises:
        ValueError: If there is only one row.
    """
    rows = len(weights)
    if rows < 2:
        raise ValueError(f"`weights` has {rows} row; the baseline of a row is the mean of the others: pass at least 2")
    return (weights - weights.mean()) * rows / (rows - 1)


def score_function_gradient(
    kernel: Kernel,
    coefficients: Coefficients,
    denoiser: Denoise,
    paths: Tensor,
    times: Tensor,
    weights: Tensor,
    batch_size: int = 512,
) -> Coefficients:
    """Unbiased gradient of the divergence: mean_b (w_b - mean of the others) grad_c log P_c(path_b).

    Args:
        kernel (`Callable`): The sampler.
        coefficients (`dict`): The floats that drew the paths.
        denoiser (`Callable`): The frozen network.
        paths (`torch.Tensor` of shape `(N + 1, B, L)`): From `sample_paths`, B >= 2.
        times (`torch.Tensor` of shape `(N,)`): As there.
        weights (`torch.Tensor` of shape `(B,)`): `divergence_weights` at the last samples.
        batch_size (`int`, defaults to 512): Rows whose logits are held at a time. It does not change the result.

    Returns:
        `dict`: A gradient for each block of the coefficients.

    Raises:
        ValueError: If there is one path only, a path that cannot be drawn, or a gradient that is not finite.
    """
    leaves = {name: block.detach().clone().requires_grad_() for name, block in coefficients.items()}
    used = [block for block in leaves.values() if block.numel() > 0]
    total = [torch.zeros_like(block) for block in used]
    share = centred(weights) / len(weights)
    for rows in torch.arange(len(weights), device=paths.device).split(batch_size):
        log_prob = path_log_prob(kernel, leaves, denoiser, paths[:, rows], times)
        if not log_prob.isfinite().all():
            raise ValueError("`paths` has a path of probability 0 under `coefficients`: pass those that drew it")
        for block, gradient in zip(total, torch.autograd.grad((share[rows] * log_prob).sum(), used), strict=True):
            block += gradient
    if not all(bool(block.isfinite().all()) for block in total):
        raise ValueError("the gradient is not finite: `kernel` has an infinite slope at these `coefficients`")
    found = iter(total)
    return {name: next(found) if block.numel() > 0 else torch.zeros_like(block) for name, block in leaves.items()}


# The optimisation


def descend(
    kernel: Kernel,
    coefficients: Coefficients,
    denoiser: Denoise,
    start: Tensor,
    times: Tensor,
    log_ratio: LogRatio,
    iterations: int,
    generator: Generators,
    bounds: Bounds,
    divergence: Divergence = "reverse_kl",
    learning_rate: float = 0.05,
    averaged: int = 100,
    batch_size: int = 512,
) -> Iterator[Coefficients]:
    """Adam on `score_function_gradient`, floats clipped to their bounds; yields the mean of the last iterates.

    Args:
        kernel (`Callable`): The sampler.
        coefficients (`dict`): Where to start.
        denoiser (`Callable`): The frozen network.
        start (`torch.Tensor` of shape `(B, L)`): First states of the B paths of an iteration.
        times (`torch.Tensor` of shape `(N,)`): What the network is told before each step.
        log_ratio (`Callable`): log(q_c / p) at samples of q_c: exact, or a `LogisticRatio`, which learns as it is called.
        iterations (`int`): Gradient steps.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of the paths.
        bounds (`dict`): Interval of each named block; a block that is not named has none.
        divergence (`str`, defaults to `"reverse_kl"`): What is minimised, see `divergence_weights`.
        learning_rate (`float`, defaults to 0.05): Of Adam; it falls to a tenth over the run, by a cosine.
        averaged (`int`, defaults to 100): Iterates in the mean.
        batch_size (`int`, defaults to 512): Rows whose logits are held at a time.

    Yields:
        `dict`: After each iteration, the mean of the last `averaged` iterates (of all, before there are so many).
    """
    current = {name: block.detach().clone() for name, block in coefficients.items()}
    optimizer = torch.optim.Adam([block for block in current.values() if block.numel() > 0], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=learning_rate / 10)
    latest: deque[Coefficients] = deque(maxlen=averaged)
    for _ in range(iterations):
        paths = sample_paths(kernel, current, denoiser, start, times, generator)
        weights = divergence_weights(log_ratio(current, paths[-1]), divergence)
        gradient = score_function_gradient(kernel, current, denoiser, paths, times, weights, batch_size)
        for name, block in current.items():
            block.grad = gradient[name]
        optimizer.step()
        schedule.step()
        for name, (low, high) in bounds.items():
            current[name].clamp_(low, high)
        latest.append({name: block.detach().clone() for name, block in current.items()})
        yield {name: torch.stack([one[name] for one in latest]).mean(0) for name in current}


class Verdict(NamedTuple):
    """How near a candidate's samples are to the data's.

    Args:
        statistic (`float`): A two-sample statistic, smaller is nearer.
        entropy_ratio (`float`): Entropy of the candidate's samples over that of the data.
    """

    statistic: float
    entropy_ratio: float


class Kept(NamedTuple):
    """The best of some candidates.

    Args:
        coefficients (`dict`): Of the best.
        verdict (`Verdict`): On it.
        admissible (`bool`): Whether its entropy is in the allowed range. If no candidate's was, the best is the one that
            comes nearest to the range, and should not be shipped.
    """

    coefficients: Coefficients
    verdict: Verdict
    admissible: bool


def keep_best(
    candidates: Iterable[Coefficients],
    judge: Callable[[Coefficients], Verdict],
    entropy_range: tuple[float, float] = (0.99, math.inf),
) -> Kept:
    """The candidate with the smallest statistic among those whose entropy is in the range.

    The range is one-sided by default. Sharpening is what flatters a sampler, and it lowers the entropy; while the optimum of
    the marginal KL may lie well above 1 (few steps cannot reproduce all correlations: 1.04 for two steps on the toys).

    Args:
        candidates (`Iterable[dict]`): The start among them, so that nothing is made worse.
        judge (`Callable`): On held-out data.
        entropy_range (`tuple[float, float]`, defaults to `(0.99, inf)`): Of `entropy_ratio`.

    Raises:
        ValueError: If there is no candidate.
    """
    low, high = entropy_range
    kept: tuple[float, float, Coefficients, Verdict] | None = None
    for candidate in candidates:
        verdict = judge(candidate)
        outside = max(low - verdict.entropy_ratio, verdict.entropy_ratio - high, 0.0)
        if kept is None or (outside, verdict.statistic) < kept[:2]:
            kept = outside, verdict.statistic, candidate, verdict
    if kept is None:
        raise ValueError("`candidates` is empty; pass at least the start")
    return Kept(kept[2], kept[3], kept[0] == 0)


# The ratio


def subset_features(x: Tensor, num_tokens: int, degree: int) -> Tensor:
    """Indicators of the tokens at every set of up to `degree` positions, (B, F), float64: for short rows.

    One token of each position (the last) is left out: with degree L the features span all functions of x.

    Args:
        x (`torch.Tensor` of shape `(B, L)`): Clean tokens, ids below `num_tokens`.
        num_tokens (`int`): S.
        degree (`int`): Largest number of positions in a product, at least 1.
    """
    single = one_hot(x, num_tokens)[..., :-1].double()  # (B, L, S - 1)
    parts = []
    for size in range(1, degree + 1):
        for chosen in itertools.combinations(range(x.shape[1]), size):
            product = single[:, chosen[0]]
            for i in chosen[1:]:
                product = (product[:, :, None] * single[:, i, None]).flatten(1)
            parts.append(product)
    return torch.cat(parts, dim=1)


def ngram_features(x: Tensor, order: int, buckets: int) -> Tensor:
    """Counts of the n-grams of each length up to `order`, hashed to `buckets` each, over the square root of L, (B, F).

    Args:
        x (`torch.Tensor` of shape `(B, L)`): Clean tokens.
        order (`int`): Longest n-gram, 1 to L.
        buckets (`int`): Columns for each length. Unigrams are exact where there are no more tokens than this.
    """
    parts = []
    code = torch.zeros_like(x)
    for size in range(1, order + 1):
        code = code[:, : x.shape[1] - size + 1] * 48271 + x[:, size - 1 :]
        code = code % (2**31 - 1)
        place = code % buckets if size == 1 else (code ^ (code >> 13)) * 69621 % (2**31 - 1) % buckets
        counts = torch.zeros(len(x), buckets, dtype=torch.float64, device=x.device)
        parts.append(counts.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64)))
    return torch.cat(parts, dim=1) / math.sqrt(x.shape[1])


def fit_logistic(student: Tensor, teacher: Tensor, penalty: float, start: Tensor, newton_steps: int = 25) -> Tensor:
    """Weights of the classifier whose logit is log(q / p), student against teacher, by Newton's method.

        min_w  mean_student softplus(-z) + mean_teacher softplus(z) + penalty |w|^2 / 2,     z = w_0 + <w, features>

    Each side counts one half whatever its size, so that z estimates log(q / p) and not the log-odds. w_0 has no penalty.

    Args:
        student (`torch.Tensor` of shape `(n, F)`): Features of samples of q.
        teacher (`torch.Tensor` of shape `(m, F)`): Features of samples of p.
        penalty (`float`): Positive: two sides that can be told apart have no finite optimum without it.
        start (`torch.Tensor` of shape `(F + 1,)`): First weights, w_0 first.
        newton_steps (`int`, defaults to 25): At most. A step that does not lower the loss is halved.

    Returns:
        `torch.Tensor` of shape `(F + 1,)`: Float64.

    Raises:
        ValueError: If the penalty is not positive.
    """
    if not penalty > 0:
        raise ValueError(f"`penalty` is {penalty}; it must be positive")
    both = torch.cat([student, teacher]).double()
    both = torch.cat([both.new_ones(len(both), 1), both], dim=1)  # (n + m, F + 1)
    sign = torch.cat([both.new_ones(len(student)), -both.new_ones(len(teacher))])
    share = torch.cat([both.new_full((len(side),), 1 / len(side)) for side in (student, teacher)])
    ridge = both.new_full((both.shape[1],), penalty)
    ridge[0] = 0.0

    def loss(w: Tensor) -> float:
        return float(-(share * logsigmoid(sign * (both @ w))).sum() + (ridge * w * w).sum() / 2)

    weights, value = start.clone(), loss(start)
    for _ in range(newton_steps):
        chance = (both @ weights).sigmoid()
        gradient = both.T @ (share * (chance - (sign > 0).double())) + ridge * weights
        hessian = (both * (share * chance * (1 - chance))[:, None]).T @ both + torch.diag(ridge.clamp(min=1e-12))
        step = torch.linalg.solve(hessian, gradient)
        if float(gradient @ step) < 1e-14:
            break
        for halvings in range(30):
            tried = weights - step / 2**halvings
            after = loss(tried)
            if after < value:
                weights, value = tried, after
                break
        else:
            break
    return weights


class LogisticRatio:
    """log(q_c / p), learned as the student moves: a logistic regression on features, refitted at each call from where it
    stood, on the data's samples against the student's of this and the last calls.

    Args:
        teacher (`torch.Tensor` of shape `(m, L)`): Samples of the data or of a many-step teacher.
        features (`Callable`): Tokens (B, L) to (B, F), float64: `subset_features`, `ngram_features`, the frozen network's
            pooled features, or several side by side.
        penalty (`float`, defaults to 1e-3): On the weights of standardised features.
        memory (`int`, defaults to 4): Calls whose samples are kept, as if the student had not moved: less noise, some bias.
    """

    def __init__(self, teacher: Tensor, features: Features, penalty: float = 1e-3, memory: int = 4) -> None:
        raw = features(teacher)
        self.features, self.penalty = features, penalty
        self.mean, self.scale = raw.mean(0), raw.std(0).clamp(min=1e-6)
        self.teacher = (raw - self.mean) / self.scale  # (m, F)
        self.recent: deque[Tensor] = deque(maxlen=memory)
        self.weights = raw.new_zeros(raw.shape[1] + 1)

    def __call__(self, coefficients: Coefficients, x: Tensor) -> Tensor:
        """log(q / p) at the samples x, (B,), after learning from them."""
        own = (self.features(x) - self.mean) / self.scale
        self.recent.append(own)
        self.weights = fit_logistic(torch.cat(list(self.recent)), self.teacher, self.penalty, self.weights)
        return self.weights[0] + own @ self.weights[1:]


def two_sample_statistic(a: Tensor, b: Tensor, ridge: float = 1e-3) -> float:
    """Half the squared distance of two feature means in their pooled covariance, without its bias: for laws that are near,
    the part of their KL in nats that the features see.

        (1/2) [ d' S^-1 d - tr(S^-1 (S_a / n + S_b / m)) ],     d = mean a - mean b,  S = (S_a + S_b) / 2 + ridge diag

    Args:
        a (`torch.Tensor` of shape `(n, F)`): Features of one side.
        b (`torch.Tensor` of shape `(m, F)`): Features of the other side.
        ridge (`float`, defaults to 1e-3): Share of each variance that is added to it.

    Returns:
        `float`: 0 in the mean for two samples of one law, hence also below 0. The covariance should be well known: with few
            more rows than features the statistic comes out too large.

    Raises:
        ValueError: If a side has no more rows than there are features.
    """
    if min(len(a), len(b)) <= a.shape[1]:
        raise ValueError(
            f"`a` and `b` have {len(a)} and {len(b)} rows and {a.shape[1]} features; allowed are more rows than features: "
            "draw more samples or take fewer buckets"
        )
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    pooled = (cov_a + cov_b) / 2
    pooled = pooled + torch.diag(ridge * pooled.diagonal().clamp(min=1e-9))
    noise = cov_a / len(a) + cov_b / len(b)
    return 0.5 * float(difference @ torch.linalg.solve(pooled, difference) - torch.linalg.solve(pooled, noise).trace())


def row_entropy(x: Tensor) -> float:
    """Entropy of the rows by their counts, in nats: for laws that can be enumerated; elsewhere use `unigram_entropy`."""
    counts = x.unique(dim=0, return_counts=True)[1].double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def two_sample_judge(
    kernel: Kernel,
    denoiser: Denoise,
    start: Tensor,
    times: Tensor,
    heldout: Tensor,
    features: Features,
    entropy: Callable[[Tensor], float],
    seed: int,
) -> Callable[[Coefficients], Verdict]:
    """A judge for `keep_best`: fresh samples against held-out data, with the same random numbers for every candidate.

    Args:
        kernel (`Callable`): The sampler.
        denoiser (`Callable`): The frozen network.
        start (`torch.Tensor` of shape `(B, L)`): First states of the samples drawn for a candidate.
        times (`torch.Tensor` of shape `(N,)`): What the network is told before each step.
        heldout (`torch.Tensor` of shape `(m, L)`): Data that the ratio has not seen.
        features (`Callable`): Tokens to features, for `two_sample_statistic`.
        entropy (`Callable`): Of a set of samples.
        seed (`int`): Of the samples.
    """

    def draw(coefficients: Coefficients, generator: torch.Generator) -> Tensor:
        return sample_paths(kernel, coefficients, denoiser, start, times, generator)[-1]

    return judge_of_draws(draw, heldout, features, entropy, seed)


def judge_of_draws(
    draw: Callable[[Coefficients, torch.Generator], Tensor],
    heldout: Tensor,
    features: Features,
    entropy: Callable[[Tensor], float],
    seed: int,
) -> Callable[[Coefficients], Verdict]:
    """`two_sample_judge` for any sampler, also those whose step law is not known: orders, thresholds, corrections.

    Args:
        draw (`Callable`): Floats and a generator to samples (B, L).
        heldout (`torch.Tensor` of shape `(m, L)`): Data that the ratio has not seen.
        features (`Callable`): Tokens to features, for `two_sample_statistic`.
        entropy (`Callable`): Of a set of samples.
        seed (`int`): Of the samples, the same for every candidate.
    """
    theirs, target = features(heldout), entropy(heldout)

    def judge(coefficients: Coefficients) -> Verdict:
        x = draw(coefficients, torch.Generator().manual_seed(seed))
        return Verdict(two_sample_statistic(features(x), theirs), entropy(x) / target)

    return judge
