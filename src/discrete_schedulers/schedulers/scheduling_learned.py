r"""The learned scheduler: ancestral steps with a few learned floats for each step budget, which cost no model call.

In step k from t to s, with r = (alpha_s - alpha_t) / (1 - alpha_t) and p the network's law at a position,

    rho = remask_k min(1, (1 - alpha_s) / alpha_t)                                 token -> mask
    u   = min(1, rate_k (r + rho alpha_t / (1 - alpha_t)))                         mask opens; 1 in the last step
    u_i = sigmoid(logit u + gate_a_k + gate_b_k logit max_v p_i(v))                with a gate, at position i
    q   = (p (p / p_0)^contrast_k)^inverse_temperature_k / Z                       its token, of the nucleus top_p_k of q

`coefficients[N]` holds any of these blocks; those that are not there change nothing:

    times (N + 1) or counts (N)    the grid, with `grid="learned"`: its times, or how many positions open in each step
    rate, contrast, inverse_temperature, top_p, gate_a, gate_b, remask (N each)    the numbers above
    order (L)                      a priority of each position, the highest opens first, equal ones in random order
    mixture_weight (K)             log-weights w of a latent z of each row and step (their softmax is its law), and
    mixture_shift (K L (V - 1))    what it adds to the logits: position i opens to a token of q_i exp(shift_z,i) / Z

    no blocks                      AncestralScheduler                  inverse_temperature    its `temperature`, for each step
    times                          JYS, optimal and Beta schedules     top_p                  its `top_p`, for each step
    counts                         optimal grid of a spread order      remask                 ReMDM, Psi, DDIM on masks
    rate, rate and times           LSD, LSD+ (`scale="score"`)         order                  any fixed permutation

These are equalities of laws. LSD's `rate` is this one where the Euler step is the ancestral one (log-linear and linear
noise, Bernoulli); with other noise it is Phi (t - s) hazard(t) / r. LSD's `"log_score"` is an inverse temperature and a
rate that depends on the row, which no float of a step can say. A gate of 0 is none; u_i = sigmoid(a + b logit max p), which
no longer knows the grid, has gate_a = a - logit r.

A contrast is with p_0 = exp(`token_prior`), the law of a token where nothing is known: it strengthens what the context says of
a token and leaves a law alone that is p_0. A temperature also makes rare tokens rarer, everywhere.

With `unmasking="counts"` the nearest integer to sum_i u_i masks open. `order` says which; with a gate and no order
they are drawn one after another with weights u_i / (1 - u_i). Temperature and top-p leave u_i alone.

Exact in law for one token per step with grid, rate, order and gate, none of which sees the token that it opens. A contrast,
an inverse temperature or a nucleus is not: they pay where several tokens open in one step. Uniform noise has times,
inverse_temperature and top_p (of the leave-one-out law).

A mixture is the one block that can draw dependent tokens in one call: given z they are independent, so `transition`, the law of
each position on its own, averages over z, and `components` has all. Shifts have a float for each component, position and token
but the mask, in this order: for small vocabularies and one length. Larger ones want z inside the network:
with `network_latent` it is drawn here, so that a generator makes samples of such a network reproducible too.

Sources: time grids: JYS (arXiv 2410.07761), Beta schedules (2509.13866); rates: LSD (2509.19962); remasking: ReMDM
(2503.00307); gate: the linear form of a learned unmasking policy (2512.09106) that sees the largest probability; mixture: Di4C
(2410.08709) with the network frozen; contrast: guidance of a masked model by its own context (2410.18514, where a prompt is
masked; here everything is, and no call is made for it).
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import LEAST_TIME, AbsorbingProcess, NoiseSchedule, UniformProcess
from discrete_schedulers.sampling import (
    Generators,
    RowLogits,
    bernoulli_subset,
    categorical,
    draw_tokens,
    gumbels,
    spread_subset,
    top_subset,
    uniforms,
)
from discrete_schedulers.schedulers.learned_utils import (
    STEP_BLOCKS,
    Mixture,
    gate_log_odds,
    gated,
    learned_law,
    learned_mixture,
    mixture_of,
    open_probability,
    remask_probability,
    sharpened,
    tilted,
    times_from_counts,
)
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    FactorisedScheduler,
    Grid,
    Order,
    ProcessName,
    Unmasking,
)

MIXTURE_BLOCKS = ("mixture_weight", "mixture_shift")
BLOCKS = ("times", "counts", *STEP_BLOCKS, "order", *MIXTURE_BLOCKS)
UNIFORM_BLOCKS = ("times", "inverse_temperature", "top_p")


class LearnedScheduler(FactorisedScheduler):
    """Ancestral steps with learned coefficients. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"learned"` takes the blocks `"times"` or `"counts"` of the budget.
        unmasking (`str`, defaults to `"counts"`): Absorbing only. `"counts"` opens a fixed number of positions in each step,
            `"bernoulli"` each position on its own.
        order (`str`, defaults to `"random"`): Which positions a count takes: `"random"`, or `"spread"`: far from what is known
            and from each other. A block `"order"` takes the place of `"random"`.
        grid_shape (`list[int]`, *optional*): (height, width) for `order="spread"` on images.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1]. A block `"top_p"` takes
            its place.
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"rate": [...], "remask": [...]}}`, any of
            the blocks above. Those of other schedulers are not read.
        learned_for (`dict`, *optional*): What they were learned for: base model, revision, vocabulary, method, metrics.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
        network_latent (`bool`, defaults to `False`): Tell the network `latent` (B,), a uniform number for each row, anew in
            each call: for networks that are mixtures themselves, [`LatentModel`].
        token_prior (`list[float]`, *optional*): Log-probability of each of the V tokens where nothing is known, for the block
            `"contrast"`: the model's own with everything masked. What is said of the mask is not read.
    """

    revises_tokens = True  # with remasking
    grid_blocks = ("times", "counts")

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        unmasking: Unmasking = "counts",
        order: Order = "random",
        grid_shape: list[int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
        network_latent: bool = False,
        token_prior: list[float] | None = None,
    ) -> None:
        self.prepare()
        self.revises_tokens = self.is_learned("remask")
        prior = self.config.token_prior
        if prior is not None and not (len(prior) == vocab_size and all(map(math.isfinite, prior))):
            raise ValueError(
                f"`token_prior` has {len(prior)} log-probabilities, {sum(map(math.isfinite, prior))} of them finite; it must "
                f"have a finite one for each of the {vocab_size} tokens, the mask included"
            )
        for budget, blocks in (self.config.coefficients or {}).items():
            self.check_blocks(f"`coefficients` for {budget} steps:", blocks)

    def check_blocks(self, where: str, blocks: dict[str, list[float]]) -> None:
        """Raises `ValueError` if a block has values that are not allowed, or does not go with the config."""
        for name in set(blocks) & set(BLOCKS):
            if self.config.process == "uniform" and name not in UNIFORM_BLOCKS:
                raise ValueError(f"{where} '{name}' is for masks; with uniform noise allowed are {UNIFORM_BLOCKS}")
        if not all(value >= 0 for value in blocks.get("rate", [])):
            raise ValueError(f"{where} 'rate' multiplies a probability, it cannot be negative: {blocks['rate']}")
        if not all(value >= 0 for value in blocks.get("contrast", [])):
            raise ValueError(f"{where} 'contrast' strengthens, it cannot be negative: {blocks['contrast']}")
        if "contrast" in blocks and self.config.token_prior is None:
            raise ValueError(
                f"{where} 'contrast' needs `token_prior`: the log-probability of each token where nothing is known"
            )
        if not all(0 <= value <= 1 for value in blocks.get("remask", [])):
            raise ValueError(f"{where} 'remask' must have fractions of the maximum, in [0, 1], not {blocks['remask']}")
        if not all(0 < value <= 1 for value in blocks.get("top_p", [])):
            raise ValueError(f"{where} 'top_p' has masses of most probable tokens, in (0, 1], not {blocks['top_p']}")
        for name in ("inverse_temperature", "counts"):
            if not all(value > 0 for value in blocks.get(name, [])):
                raise ValueError(f"{where} '{name}' must be positive, not {blocks[name]}")
        if "order" in blocks and (self.config.unmasking != "counts" or self.config.order != "random"):
            raise ValueError(f"{where} 'order' needs `unmasking='counts'` and `order='random'`")
        if len(set(blocks) & set(MIXTURE_BLOCKS)) == 1:
            raise ValueError(
                f"{where} a mixture is 'mixture_weight' and 'mixture_shift', not one of them: both are needed"
            )
        if "mixture_weight" in blocks:
            self.mixture_of(blocks)

    def mixture_of(self, blocks: dict[str, list[float]]) -> Mixture:
        """The mixture of a budget that has one."""
        weight, shift = (torch.tensor(blocks[name], dtype=torch.float64) for name in MIXTURE_BLOCKS)
        return mixture_of(weight, shift, self.config.vocab_size, self.absorbing_process.mask_token_id)

    def blocks(self, num_inference_steps: int) -> dict[str, list[float]]:
        """What was learned for a step budget; nothing where there are no coefficients at all.

        Raises:
            ValueError: If only other budgets were learned.
        """
        return self.budget(num_inference_steps) if self.config.coefficients else {}

    def time_grid(self, num_inference_steps: int) -> Tensor:
        """As in [`DiscreteScheduler`], and from counts.

        Raises:
            ValueError: If the budget has blocks but none of this class, two grids, or one that the config does not ask for.
        """
        blocks, where = self.blocks(num_inference_steps), f"coefficients for {num_inference_steps} steps have"
        if blocks and not set(blocks) & set(BLOCKS):
            raise ValueError(f"{where} no block of {type(self).__name__}; they have: {sorted(blocks)}")
        grids = [name for name in self.grid_blocks if name in blocks]
        if grids and self.config.grid != "learned":
            raise ValueError(
                f"{where} '{grids[0]}', which `grid='learned'` reads, but `grid` is {self.config.grid!r}; they must go together"
            )
        if len(grids) == 2:
            raise ValueError(f"{where} 'times' and 'counts': a grid must be one of them")
        if grids != ["counts"]:
            return super().time_grid(num_inference_steps)
        times = times_from_counts(self.noise_process, torch.tensor(blocks["counts"], dtype=torch.float64))
        if not (times.diff() < 0).all() or times[-2] < LEAST_TIME:
            raise ValueError(
                f"{where} 'counts' that give times {times.tolist()}, which must fall strictly, to 0 from {LEAST_TIME:.1g} "
                "or more"
            )
        return times

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """As in [`DiscreteScheduler`]; also whether the budget has a gate or a mixture."""
        super().set_grid(times, device)
        blocks = (self.config.coefficients or {}).get(str(len(times) - 1), {})
        self.chooses_by_logits = "gate_a" in blocks or "gate_b" in blocks
        self.mixture = self.mixture_of(blocks) if "mixture_weight" in blocks else None
        self.draws_latent = self.mixture is not None or self.config.network_latent
        self.prior = None  # (V,), where the budget has a contrast
        if "contrast" in blocks and self.config.token_prior is not None:
            self.prior = torch.tensor(self.config.token_prior, dtype=torch.float64, device=device)

    def step_coefficients(self, index: int) -> dict[str, Tensor]:
        """The numbers of a step, by the names of `STEP_BLOCKS`."""
        blocks = self.blocks(len(self.times) - 1)
        return {name: torch.tensor(blocks[name][index], dtype=torch.float64) for name in STEP_BLOCKS if name in blocks}

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """`learned_law` of the step, see [`FactorisedScheduler.transition`]. With `unmasking="counts"` this is the law of each
        position when each opens on its own, while positions of a row exclude each other; with a mixture, the mean over it."""
        if self.mixture is not None:
            log_weights, law = self.components(model_output, timestep, sample)
            return torch.einsum("k,kblv->blv", log_weights.exp().to(law.device), law)
        index, config = self.step_index(timestep), self.config
        t, s = self.times[index], self.times[index + 1]
        coefficients = self.step_coefficients(index)
        return learned_law(
            self.noise_process, model_output, sample, t, s, coefficients, config.temperature, config.top_p, self.prior
        )

    def components(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Log-weights (K,) of the latent, and the law of x_s in each component, (K, B, L, V): the law of a row is their
        mixture, not the product of `transition`. Arguments as there.

        Raises:
            ValueError: If the budget has no mixture, or one for another length.
        """
        index, config = self.step_index(timestep), self.config
        if self.mixture is None:
            raise ValueError(f"coefficients for {len(self.times) - 1} steps have no 'mixture_weight'")
        law = learned_mixture(
            self.absorbing_process,
            model_output,
            sample,
            self.times[index],
            self.times[index + 1],
            self.step_coefficients(index),
            self.mixture,
            config.temperature,
            config.top_p,
            self.prior,
        )
        return self.mixture.log_weights, law

    def is_shaped(self, index: int) -> bool:
        """Whether the call `index` draws from another law than the network's own."""
        own = {"contrast", "inverse_temperature", "top_p"} & self.blocks(len(self.times) - 1).keys()
        return super().is_shaped(index) or self.mixture is not None or bool(own)

    def shaped_logits(self, logits: Tensor, index: int, sample: Tensor) -> Tensor:
        """Logits of q, see [`DiscreteScheduler.shaped_logits`]; with a mixture, of its mean, and of all positions only."""
        shaped = self.sharpened_logits(logits, index, sample)
        if self.mixture is None:
            return shaped
        each = tilted(shaped.double(), sample, self.mixture).log_softmax(-1)  # (K, B, L, V)
        return (self.mixture.log_weights.to(each.device)[:, None, None, None] + each).logsumexp(0)

    def sharpened_logits(self, logits: Tensor, index: int, sample: Tensor) -> Tensor:
        """Logits of q, before a mixture tilts them. Arguments as in `shaped_logits`."""
        t, coefficients, config = self.times[index], self.step_coefficients(index), self.config
        return sharpened(
            self.noise_process, logits, sample, t, coefficients, config.temperature, config.top_p, self.prior
        )

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """Those of `UniformProcess.posterior_jumps`. See [`DiscreteScheduler.jump_intensities`]."""
        if not isinstance(self.noise_process, UniformProcess):
            return None
        return self.noise_process.posterior_jumps(self.times[index], self.times[index + 1])

    def open_probability(self, index: int) -> float:
        """u: P(a mask opens in this step), before a gate. Absorbing process."""
        t, s = self.times[index], self.times[index + 1]
        return float(open_probability(self.absorbing_process, t, s, self.step_coefficients(index)))

    def model_inputs(
        self,
        timestep: int | float | Tensor,
        sample: Tensor,
        frozen: Tensor | None = None,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """`latent` (B,) of this call with `network_latent`, else nothing. See [`DiscreteScheduler.model_inputs`]."""
        return {"latent": uniforms((len(sample),), generator, sample.device)} if self.config.network_latent else {}

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that open in this step, all masks where a gate chooses among them, or tokens that may jump. See
        [`DiscreteScheduler.positions`]."""
        index = self.step_index(timestep)
        if not isinstance(self.noise_process, AbsorbingProcess):
            return self.jump_positions(index, sample, generator)
        if self.chooses_by_logits:
            return sample == self.config.mask_token_id
        return self.opening(sample, self.open_probability(index), generator)

    def opening(
        self, sample: Tensor, opens: float | Tensor, generator: Generators, log_odds: Tensor | None = None
    ) -> Tensor:
        """Masks that open, bool (B, L), where each should with the probability `opens`, one for all or (B, L) with the gate's
        `log_odds` (B, L)."""
        priorities = self.blocks(len(self.times) - 1).get("order")
        if log_odds is None and priorities is None:
            return self.open_masks(sample, float(opens), generator, self.config.unmasking, self.config.order)
        is_masked = sample == self.config.mask_token_id
        if self.config.unmasking == "bernoulli":
            return bernoulli_subset(is_masked, opens, generator)
        due = (is_masked * opens).sum(1) if log_odds is not None else is_masked.sum(1, dtype=torch.float64) * opens
        count = self.whole_counts(due, generator)  # (B,)
        if self.config.order == "spread":
            grid_shape = self.config.grid_shape
            return spread_subset(is_masked, count, generator, None if grid_shape is None else tuple(grid_shape))
        score = gumbels(tuple(sample.shape), generator, sample.device)
        if priorities is None:
            return top_subset(is_masked, count, score if log_odds is None else score + log_odds)
        if len(priorities) != sample.shape[1]:
            raise ValueError(
                f"'order' has {len(priorities)} priorities, but `sample` has {sample.shape[1]} positions: they must be equal"
            )
        by_chance = score.argsort(1).argsort(1).double() / sample.shape[1]  # in [0, 1)
        rank = torch.tensor(priorities, dtype=torch.float64, device=sample.device).unique(return_inverse=True)[1]
        return top_subset(is_masked, count, rank + by_chance)

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens at the chosen masks, or at those that the gate lets open, and a mask for each token that falls.

        Raises:
            ValueError: If there is a gate and the rows are not those of all masks.
        """
        if not isinstance(self.noise_process, AbsorbingProcess):
            return super().move_rows(rows, index, sample, generator)
        coefficients = self.step_coefficients(index)
        if self.chooses_by_logits:
            is_masked = sample == self.config.mask_token_id
            if not torch.equal(rows.positions, is_masked):
                raise ValueError("`model_output.positions` must be all masks: there is a gate to choose among them")
            log_odds = gate_log_odds(rows.logits, self.config.mask_token_id, coefficients)  # (R,)
            log_odds = torch.zeros(sample.shape, dtype=torch.float64, device=sample.device).masked_scatter(
                is_masked, log_odds
            )
            opens = gated(torch.tensor(self.open_probability(index), dtype=torch.float64), log_odds)
            chosen = self.opening(sample, opens, generator, log_odds)
            rows = rows.among(chosen)
        if self.mixture is None:
            moved = super().move_rows(rows, index, sample, generator)
        else:
            moved = self.move_rows_together(rows, self.mixture, index, sample, generator)
        t, s = self.times[index], self.times[index + 1]
        falls = float(remask_probability(self.absorbing_process, t, s, coefficients))
        if falls == 0:  # no draw: the samples are those of ancestral steps
            return moved
        is_token = sample != self.config.mask_token_id
        return moved.masked_fill(bernoulli_subset(is_token, falls, generator), self.config.mask_token_id)

    def move_rows_together(
        self, rows: RowLogits, mixture: Mixture, index: int, sample: Tensor, generator: Generators
    ) -> Tensor:
        """`sample` with a token at each of the chosen positions, from one component for each row."""
        latent = categorical(
            mixture.log_weights.to(sample.device).expand(len(sample), -1),
            uniforms((len(sample),), generator, sample.device),
        )
        shift = tilted(torch.zeros(1, 1, dtype=torch.float64, device=sample.device), sample, mixture)  # (K, 1, L, V)
        logits = self.sharpened_logits(rows.logits, index, sample[rows.positions])
        logits = logits.double() + shift[latent, 0][rows.positions]
        return sample.masked_scatter(rows.positions, draw_tokens(RowLogits(logits, rows.positions), generator))
