"""Pure metric functions: what a set of samples, or the exact law of a sampler, is worth.

Three families, in the order in which to believe them:

1. distances between enumerated laws (`total_variation`, `kl_divergence`, `js_divergence`): exact, no samples;
2. likelihoods of held-out data (`perplexity`), in nats per unit;
3. scores of samples: `generative_perplexity` under a judge. It means nothing without `unigram_entropy`, `distinct_n`,
   `repetition` and `self_bleu` beside it: repetitive text beats real text on it (Zheng et al., arXiv 2409.02908).

All logarithms are natural. Shapes: B sequences of L token ids, integers (B, L). A number about a whole set is a
`float`; one number per sequence, or a distance (gradients flow through it), is a float64 tensor.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from discrete_schedulers.sampling import Generators, bernoulli_subset


def _ngram_ids(sequences: Tensor, n: int) -> Tensor:
    """Number the n-grams of `sequences` (B, L): int64 (B, L - n + 1), equal n-grams get equal ids."""
    if sequences.ndim != 2 or sequences.numel() == 0 or sequences.is_floating_point():
        shape = tuple(sequences.shape)
        raise ValueError(f"sequences must be non-empty integers of shape (B, L), got {sequences.dtype} {shape}.")
    if not 1 <= n <= sequences.shape[1]:
        raise ValueError(f"n must lie between 1 and the sequence length {sequences.shape[1]}, got {n}.")
    ngrams = sequences.unfold(1, n, 1)  # (B, L - n + 1, n)
    ids = torch.unique(ngrams.reshape(-1, n), dim=0, return_inverse=True)[1]
    return ids.view(ngrams.shape[:2])


def unigram_entropy(sequences: Tensor) -> Tensor:
    """Entropy of the token histogram of each sequence, the number to report beside a generative perplexity.

        H_b = - sum_k (L_k / L) log(L_k / L),   L_k = how often token k occurs in sequence b

    `sequences`: (B, L). Returns float64 (B,) in nats, from 0 (one token repeated) to log L (all tokens different).
    Source: Zheng et al. (arXiv 2409.02908).

    Raises:
        ValueError: `sequences` is empty or not integers of shape (B, L).
    """
    ids = _ngram_ids(sequences, 1)
    shares = [row.unique(return_counts=True)[1].double() / row.numel() for row in ids]
    return torch.stack([torch.special.entr(share).sum() for share in shares])


def distinct_n(sequences: Tensor, n: int) -> float:
    """Share of distinct n-grams among all n-grams of the set: diversity within and across sequences.

        distinct-n = |set of n-grams| / (B (L - n + 1))

    `sequences`: (B, L). Returns a share in (0, 1]. It falls as the set grows: compare sets of the same B and L only.
    Source: Li et al. (arXiv 1510.03055), who divide by the number of tokens instead, so that 1 is out of reach.

    Raises:
        ValueError: `sequences` is empty or not integers of shape (B, L), or `n` is not in 1 ... L.
    """
    ids = _ngram_ids(sequences, n)
    return ids.unique().numel() / ids.numel()


def repetition(sequences: Tensor, n: int = 4) -> float:
    """Share of n-grams that already occurred earlier in the same sequence, mean over sequences.

        seq-rep-n = mean_b [ 1 - |set of n-grams of b| / (L - n + 1) ]

    `sequences`: (B, L). Returns a share in [0, 1). Source: Welleck et al. (arXiv 1908.04319), where n = 4.

    Raises:
        ValueError: `sequences` is empty or not integers of shape (B, L), or `n` is not in 1 ... L.
    """
    ids = _ngram_ids(sequences, n).sort(dim=1).values
    is_repeated = ids[:, 1:] == ids[:, :-1]  # after sorting: all but the first of each kind
    return is_repeated.sum().item() / ids.numel()


def _list_of_texts(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, got one str: put it into a list.")
    texts = list(texts)
    if not texts:
        raise ValueError("texts must hold at least one text, got none.")
    return texts


def self_bleu(texts: Sequence[str], *, max_texts: int | None = None, tokenize: str = "13a") -> float:
    """Mean BLEU-4 of each text against all others as references: high means that the texts resemble each other.

    BLEU is sacrebleu's `sentence_bleu` (exponential smoothing, effective order). The cost is quadratic in the number of
    texts and the score rises with it: compare equal numbers only. Source: Zhu et al., Texygen (arXiv 1802.01886).

    Args:
        texts: at least two texts.
        max_texts: use only the first `max_texts` texts, as hypotheses and as references; None uses all.
        tokenize: sacrebleu's tokenizer: "13a" for words, "char" for strings without words, "none" to split at spaces.

    Returns:
        The score on sacrebleu's scale, 0 to 100.

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: fewer than two texts, or `max_texts` below 2.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("self_bleu needs sacrebleu: run `pip install sacrebleu`.") from error
    if max_texts is not None and max_texts < 2:
        raise ValueError(f"max_texts must be None or at least 2 (a text and a reference), got {max_texts}.")
    texts = _list_of_texts(texts)[:max_texts]
    if len(texts) < 2:
        raise ValueError(f"texts must hold at least 2 texts, got {len(texts)}.")
    others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
    bleus = [sacrebleu.sentence_bleu(*pair, tokenize=tokenize) for pair in zip(texts, others, strict=True)]
    return math.fsum(bleu.score for bleu in bleus) / len(bleus)


def _check_laws(p: Tensor, q: Tensor) -> None:
    if p.shape != q.shape:
        raise ValueError(f"p and q must have the same shape, got {tuple(p.shape)} and {tuple(q.shape)}.")
    for name, law in (("p", p), ("q", q)):
        if law.dtype != torch.float64:
            raise ValueError(f"{name} must be float64 (float32 hides small distances), got {law.dtype}.")
        if not bool((law >= 0).all()):
            raise ValueError(f"{name} must not be negative or NaN, got the smallest entry {law.min().item()}.")
        if abs(law.sum().item() - 1) > 1e-9:
            raise ValueError(f"{name} must sum to 1 within 1e-9, got the sum {law.sum().item()}.")


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Total variation distance of two enumerated laws: TV = 1/2 sum_x |p(x) - q(x)|, a scalar in [0, 1].

    `p`, `q`: float64 probabilities of all outcomes, in one and any shape, e.g. (V,) * L for a joint; each sums to 1.

    Raises:
        ValueError: the shapes differ, or a law is not float64, has a negative entry or does not sum to 1.
    """
    _check_laws(p, q)
    return (p - q).abs().sum() / 2


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) = sum_x p(x) log(p(x) / q(x)), a scalar in nats.

    0 log 0 = 0, and the result is inf if q(x) = 0 < p(x) for some x. `p`, `q`: as in `total_variation`.

    Raises:
        ValueError: the shapes differ, or a law is not float64, has a negative entry or does not sum to 1.
    """
    _check_laws(p, q)
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence JS = 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2: symmetric, in [0, log 2] nats.

    `p`, `q`: as in `total_variation`.

    Raises:
        ValueError: the shapes differ, or a law is not float64, has a negative entry or does not sum to 1.
    """
    _check_laws(p, q)
    middle = (p + q) / 2
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the normal laws with the moments of two sets of features: FID's formula.

        d^2 = |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x^1/2 S_y S_x^1/2)^1/2)

    with covariances over n - 1. It is biased upwards, the more the smaller the sets: compare sets of one size only, and
    with a floor, that of real data. What it means depends on the features.

    `x`: (n, d), `y`: (m, d), floating point. Returns a number >= 0, in squared units of the features.
    Source: Dowson and Landau 1982, eq. 4; Heusel et al. 2017 (FID).

    Raises:
        ValueError: the shapes are not (n, d) and (m, d) with n, m >= 2, or an entry is not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"x and y must have shapes (n, d) and (m, d) with n, m >= 2, got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y must be finite, got an infinite entry or NaN.")
    x, y = x.double(), y.double()
    s_x, s_y = torch.atleast_2d(torch.cov(x.T)), torch.atleast_2d(torch.cov(y.T))  # (d, d)
    values, vectors = torch.linalg.eigh(s_x)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Eigenvalues of a product of positive semi-definite matrices are not negative; rounding makes some that are
    shared = torch.linalg.eigvalsh(root @ s_y @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + s_x.trace() + s_y.trace() - 2 * shared
    return max(distance.item(), 0.0)


def perplexity(nats: Tensor, counts: Tensor) -> float:
    """Perplexity in which every unit weighs the same: exp(sum_b nats_b / sum_b counts_b).

    It is not the mean of the sequences' own perplexities, which one short bad sequence can rule.

    Args:
        nats: (B,) negative log-likelihood of each sequence, summed over its units; an inf makes the result inf.
        counts: (B,) number of units (tokens, words) of each sequence, 0 allowed.

    Raises:
        ValueError: the shapes differ, a count is negative, or all are 0.
    """
    if nats.shape != counts.shape:
        raise ValueError(f"nats and counts must have one shape, got {tuple(nats.shape)} and {tuple(counts.shape)}.")
    if bool((counts < 0).any()) or counts.sum() == 0:
        raise ValueError(f"counts must be non-negative with a positive sum, got {counts.tolist()}.")
    return (nats.double().sum() / counts.sum()).exp().item()


class Judge(Protocol):
    """Anything that gives a text a log-probability."""

    def log_prob(self, text: str) -> tuple[float, int]:
        """Total log-probability of the text in nats (at most 0), and the number of units it was summed over."""
        ...


def generative_perplexity(texts: Sequence[str], judge: Judge) -> float:
    """Perplexity of samples under a judge, per unit of the judge: exp(- sum of log_prob / sum of units).

    Low is not good by itself: show `unigram_entropy` beside it, and the same number for real text. Numbers of two
    judges, or in two kinds of units, cannot be compared. A text without units adds nothing: count empty ones apart.

    Raises:
        ValueError: `texts` is one str, or there is no text or no unit.
    """
    log_probs, counts = zip(*map(judge.log_prob, _list_of_texts(texts)), strict=True)
    return perplexity(-torch.tensor(log_probs, dtype=torch.float64), torch.tensor(counts))


class NgramJudge:
    """An in-domain judge: interpolated Witten-Bell n-gram model over words and punctuation marks.

    c(h, w) counts word w after history h, c(h) = sum_w c(h, w), T(h) is the number of different words seen after h, and
    h' is h without its oldest word (Witten and Bell 1991, method C; interpolated as in Chen and Goodman 1998):

        P(w | h) = [c(h, w) + T(h) P(w | h')] / [c(h) + T(h)],      P(w | h) = P(w | h') if h was never seen

    Below the empty history all mass belongs to <unk>, the class of words never seen; so the empty history gives it
    T / (N + T), the Witten-Bell estimate of meeting a new word after N words. P(. | h) sums to 1 over vocabulary and
    <unk>. A new word of l characters also pays for its spelling, uniformly over the K = (characters of the vocabulary)
    + 1 symbols and, after the first symbol, an end mark:

        P(spelling) = 1 / (K (K + 1)^l)         (sums to 1 over all l >= 1 and all spellings)

    The one extra symbol stands for all other characters, each of which pays 1 / 0x110000 more, its share of Unicode. So
    all words together have probability at most 1, and a model cannot win by inventing words.

    A text starts with the empty history and has no end mark, because samples are windows of a stream. Spacing is not
    seen. What was copied from the fitted text scores very well: fit on text that the model was not trained on, if any.

    Args:
        texts: texts to fit on, e.g. chapters; no n-gram crosses from one to the next.
        order: length of the longest n-gram; 4 looks at three words of history.

    Raises:
        ValueError: `order` is below 1, `texts` is one str, or there is no text or no word.
    """

    def __init__(self, texts: Iterable[str], order: int = 4) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}.")
        self.order = order
        self._counts: Counter[tuple[str, ...]] = Counter()  # (*h, w) -> c(h, w)
        for words in map(self.split, _list_of_texts(texts)):
            for n in range(1, order + 1):
                self._counts.update(zip(*(words[i:] for i in range(n)), strict=False))
        self._totals: Counter[tuple[str, ...]] = Counter()  # h -> c(h)
        self._types: Counter[tuple[str, ...]] = Counter()  # h -> T(h)
        for (*history, _), count in self._counts.items():
            self._totals[tuple(history)] += count
            self._types[tuple(history)] += 1
        self.vocabulary = frozenset(ngram[0] for ngram in self._counts if len(ngram) == 1)
        if not self.vocabulary:
            raise ValueError("texts must hold at least one word, got none.")
        self._characters = frozenset("".join(self.vocabulary))

    @staticmethod
    def split(text: str) -> list[str]:
        """Split a text into words (an apostrophe inside a word belongs to it) and single punctuation marks."""
        return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text)

    def probability(self, word: str, history: Sequence[str] = ()) -> float:
        """P(word | history), in (0, 1); for a word never seen, the probability of the whole class <unk>.

        `history` holds the words before, oldest first; only the last order - 1 matter.
        """
        probability = 0.0 if word in self.vocabulary else 1.0
        for length in range(len(history) + 1):
            suffix = tuple(history[len(history) - length :])
            if suffix not in self._totals:  # longer than order - 1, or never seen: then so is every longer one
                break
            total, types = self._totals[suffix], self._types[suffix]
            probability = (self._counts[(*suffix, word)] + types * probability) / (total + types)
        return probability

    def log_prob(self, text: str) -> tuple[float, int]:
        """Sum of log P(word | words before), with the spelling of new words, in nats; and the number of words."""
        words = self.split(text)
        log_prob = 0.0
        for i, word in enumerate(words):
            log_prob += math.log(self.probability(word, words[max(0, i - self.order + 1) : i]))
            if word not in self.vocabulary:
                log_prob += self._spelling_log_prob(word)
        return log_prob, len(words)

    def _spelling_log_prob(self, word: str) -> float:
        num_symbols = len(self._characters) + 1
        num_others = sum(character not in self._characters for character in word)
        return -(math.log(num_symbols) + len(word) * math.log(num_symbols + 1) + num_others * math.log(0x110000))


@dataclass(frozen=True)
class CausalLMJudge:
    """A causal language model of transformers as a judge; its unit is its token. One text at a time, so no padding.

        log_prob(text) = sum_i log p(token_i | bos, tokens before i)

    The log-softmax is float32. Load the model in float32 too: half precision shifts the perplexity.

    Args:
        model: gives `.logits` (1, L, V) for `input_ids` (1, L); in eval mode.
        tokenizer: the model's tokenizer; it is asked to add no special tokens.
        bos_token_id: token to put before each text. None: the first token of a text is given, not scored, as in
            transformers' own loss.
    """

    model: torch.nn.Module
    tokenizer: Any
    bos_token_id: int | None = None

    @torch.no_grad()
    def log_prob(self, text: str) -> tuple[float, int]:
        """Total log-probability in nats and the number of scored tokens; (0.0, 0) if no token can be scored.

        Raises:
            ValueError: the model is in training mode, or the text is longer than the tokenizer's `model_max_length`.
        """
        if self.model.training:
            raise ValueError("model must be in eval mode (dropout changes the score): call model.eval().")
        ids = [] if self.bos_token_id is None else [self.bos_token_id]
        ids = ids + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > self.tokenizer.model_max_length:
            raise ValueError(f"text must fit into {self.tokenizer.model_max_length} tokens, got {len(ids)}.")
        if len(ids) < 2:
            return 0.0, 0
        input_ids = torch.tensor([ids], device=next(self.model.parameters()).device)  # (1, L)
        log_p = self.model(input_ids=input_ids).logits[0, :-1].float().log_softmax(dim=-1)  # (L - 1, V)
        scores = log_p.gather(1, input_ids[0, 1:, None])  # (L - 1, 1)
        return scores.double().sum().item(), len(ids) - 1


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean m over n seeds and standard error of the mean, sqrt(sum (v - m)^2 / (n - 1)) / sqrt(n).

    Raises:
        ValueError: fewer than 2 values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"values must hold at least 2 numbers (one per seed) for an error bar, got {n}.")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


@torch.no_grad()
def sampler_nll_bound(
    denoiser: Callable[..., Any],
    scheduler: Any,
    data: Tensor,
    num_inference_steps: int,
    generator: Generators = None,
    batch_size: int = 64,
    frozen: Tensor | None = None,
) -> Tensor:
    """Bound on -log p(x_0) under the *sampler*, in nats per token, for an absorbing scheduler with its own grid and order.

    The data are masked and opened again as the scheduler would, with the true tokens in place of drawn ones:

        -log p(x_0) <= E sum_k sum_{i opened in step k} -log p_k(x_0^i | x_{t_k})                         (Jensen)

    with the expectation over the scheduler's choices of positions, which see the tokens known so far and never the one they
    open. Temperature, top-p and learned factors count: they are part of p_k.

    Args:
        denoiser (`Denoiser`): The network.
        scheduler (`DiscreteScheduler`): Absorbing.
        data (`torch.Tensor` of shape `(n, L)`): Held-out sequences, int64.
        num_inference_steps (`int`): Model calls N of the sampler.
        generator (`torch.Generator` or list, *optional*): For the choices of positions.
        batch_size (`int`, defaults to 64): Sequences in one call.
        frozen (`torch.Tensor` of shape `(L,)`, *optional*): Bool; positions whose tokens the sampler is given, such as a prompt
            or start and end tokens. The bound is then on -log p(the others | these), per token of the others.

    Returns:
        `torch.Tensor` of shape `(n,)`: One bound for each sequence, float64.

    Raises:
        ValueError: If masks are left after the last step, the scheduler has no mask, revises tokens or chooses positions by
            their logits, or `frozen` is not bool (L,) with an entry that is false.
    """
    mask = scheduler.config.mask_token_id
    if mask is None:
        raise ValueError("`scheduler` has no mask: this bound is for absorbing processes")
    if frozen is None:
        frozen = torch.zeros(data.shape[1], dtype=torch.bool, device=data.device)
    if frozen.shape != data.shape[1:] or frozen.dtype != torch.bool or frozen.all():
        raise ValueError(f"`frozen` must be bool {tuple(data.shape[1:])} and not all true, got {frozen.tolist()}")
    scheduler.set_timesteps(num_inference_steps)
    name = type(scheduler).__name__
    if scheduler.chooses_by_logits:
        raise ValueError(f"{name} chooses positions by their logits: `positions` does not say which ones it opens")
    if scheduler.revises_tokens:
        raise ValueError(f"{name} can revise tokens: this bound is for samplers that draw each of them once")
    bounds = []
    for x_0 in data.split(batch_size):
        x_t, total = torch.where(frozen, x_0, mask), torch.zeros(len(x_0), dtype=torch.float64, device=data.device)
        for index, t in enumerate(scheduler.timesteps):
            chosen = scheduler.positions(index, x_t, generator)
            if chosen is None:
                law = scheduler.transition(denoiser(x_t, t), index, x_t)
                opening = 1 - law[..., mask]
                chosen = bernoulli_subset(x_t == mask, opening, generator)
                nats = -(law[chosen].gather(-1, x_0[chosen][:, None])[:, 0].log() - opening[chosen].log())
            else:
                rows = scheduler.shaped_logits(denoiser(x_t, t, chosen).logits, index, x_t[chosen]).double()
                nats = -rows.log_softmax(-1).gather(-1, x_0[chosen][:, None])[:, 0]
            total += (
                torch.zeros(chosen.shape, dtype=torch.float64, device=data.device).masked_scatter(chosen, nats).sum(1)
            )
            x_t = torch.where(chosen, x_0, x_t)
        if (x_t == mask).any():
            raise ValueError("`scheduler` leaves masks after its last step")
        bounds.append(total / (~frozen).sum())
    return torch.cat(bounds)
