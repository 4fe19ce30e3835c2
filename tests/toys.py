"""Toys of exact truth for learned sampler coefficients: two joints of binary tokens, four families of coefficients, and the
exact law of the last sample, differentiable in the coefficients. Everything is float64.

Families, on a frozen exact denoiser p_0 with absorbing noise, N steps; the last step opens all:

    grid    u_k = sigmoid(open_k), k < N            the chance of a mask to open; the same as a time grid   N - 1 floats
    temp    q ~ p_0^tau_k, tau_k = exp(log_tau_k)                                                           N
    conf    u_k = sigmoid(open_k + gate_k logit(max_v p_0(v)))                                              N - 1
    mixK    q ~ p_0^tau exp(shift[lambda, i, v]) with weights softmax(weight), a fresh lambda for each row and step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from laws import Joint, all_states, exact_denoiser, state_index
from scipy.optimize import minimize
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.training.marginal import Coefficients, StepLaw

MASK, VOCAB = 2, 3


def toy_joint(name: str, length: int) -> Joint:
    """ising: log p = 1.5 #{d: x_d = x_{d+1}, on a ring} + 0.3 [x_0 = 0] + const; random: log p = 1.5 g + const, g standard
    normal of numpy's RandomState(0)."""
    x = all_states(2, length)
    if name == "ising":
        logits = 1.5 * (x == x.roll(-1, 1)).sum(1) + 0.3 * (x[:, 0] == 0)
    else:
        logits = torch.from_numpy(1.5 * np.random.RandomState(0).randn(2**length))
    return Joint(x, logits.double().softmax(0))


class Toy:
    """A joint, the table of its exact conditionals, and the exact law of a sampler.

    Args:
        name (`str`): `"ising"` or `"random"`.
        length (`int`): Positions.
    """

    def __init__(self, name: str, length: int) -> None:
        self.joint, self.length = toy_joint(name, length), length
        self.states = all_states(VOCAB, length)
        self.clean = state_index(self.joint.states, VOCAB)
        self.log_p_0 = exact_denoiser(self.joint, AbsorbingProcess(VOCAB, MASK))(self.states, 0.5)

    def denoiser(self, x_t: Tensor, t: Tensor | float, positions: Tensor | None = None) -> Any:
        """The exact denoiser as a table; with positions, bool (B, L), as [`RowLogits`]."""
        logits = self.log_p_0[state_index(x_t, VOCAB)]
        return logits if positions is None else RowLogits(logits[positions], positions)

    def final_law(self, coefficients: Coefficients, num_steps: int) -> Tensor:
        """Law of the last sample over the clean rows, (2^L,)."""
        law = torch.zeros(len(self.states), dtype=torch.float64)
        law[-1] = 1.0
        for k in range(num_steps):
            step = kernel(coefficients, k, self.log_p_0, self.states)
            factors = [step.law[:, :, i, self.states[:, i]] for i in range(self.length)]  # (K, S, S) each
            law = law @ (step.log_weights.exp()[:, None, None] * torch.stack(factors).prod(0)).sum(0)
        return law[self.clean]

    def kl(self, coefficients: Coefficients, num_steps: int) -> Tensor:
        """KL(data || sampler) in nats."""
        return (self.joint.p * (self.joint.p / self.final_law(coefficients, num_steps)).log()).sum()

    def reverse_kl(self, coefficients: Coefficients, num_steps: int) -> Tensor:
        """KL(sampler || data) in nats."""
        law = self.final_law(coefficients, num_steps)
        return (law * (law / self.joint.p).log()).sum()


def kernel(coefficients: Coefficients, index: int, logits: Tensor, x_t: Tensor) -> StepLaw:
    """The step law of all families: a family that is not in `coefficients` does nothing."""
    is_masked = (x_t == MASK)[..., None]
    p_0 = logits.log_softmax(-1)[..., :MASK]  # (B, L, 2)
    p_0 = torch.where(is_masked, p_0, 0.0)  # known tokens have log 0, and 0 times infinity has no gradient
    q = p_0
    if "log_tau" in coefficients:
        q = coefficients["log_tau"][index].exp() * q
    q = q[None]
    log_weights = q.new_zeros(1)
    if "shift" in coefficients:
        q = q + coefficients["shift"][:, None]  # (K, B, L, 2)
        log_weights = coefficients["weight"].log_softmax(0)
    q = q.softmax(-1)
    if "open" in coefficients and index < len(coefficients["open"]):
        opening = coefficients["open"][index].expand(x_t.shape)
        if "gate" in coefficients:
            best = p_0.max(-1).values
            odds = torch.where(is_masked[..., 0], best - torch.log(-torch.expm1(best)), 0.0)
            opening = opening + coefficients["gate"][index] * odds
        opening = opening.sigmoid()
    else:
        opening = torch.ones(x_t.shape, dtype=torch.float64)
    opened = torch.cat([opening[..., None] * q, (1 - opening)[None, ..., None].expand(*q.shape[:-1], 1)], -1)
    stays = torch.nn.functional.one_hot(x_t, VOCAB).double()
    return StepLaw(log_weights, torch.where(is_masked, opened, stays))


def start_of(families: str, num_steps: int, length: int, seed: int = 0) -> Coefficients:
    """Where an optimisation starts: the uniform grid, temperature 1, no gate, and small random shifts.

    Args:
        families (`str`): `"grid"`, `"grid+temp"`, `"grid+temp+conf"`, `"grid+mix2"`, ...
        num_steps (`int`): N.
        length (`int`): Positions.
        seed (`int`): Of the shifts.
    """
    left = torch.arange(num_steps, 1, -1, dtype=torch.float64)  # u_k = 1 / (N - k)
    start = {"open": -(left - 1).log()}
    for family in families.split("+"):
        if family == "temp":
            start["log_tau"] = torch.zeros(num_steps, dtype=torch.float64)
        elif family == "conf":
            start["gate"] = torch.zeros(num_steps - 1, dtype=torch.float64)
        elif family.startswith("mix"):
            count, generator = int(family[3:]), torch.Generator().manual_seed(seed)
            start["shift"] = torch.randn(count, length, MASK, generator=generator, dtype=torch.float64)
            start["weight"] = torch.zeros(count, dtype=torch.float64)
    return start


def unflatten(vector: Tensor, like: Coefficients) -> Coefficients:
    """A vector as named blocks, in the order and shapes of `like`."""
    parts = vector.split([block.numel() for block in like.values()])
    return {name: part.view(block.shape) for (name, block), part in zip(like.items(), parts, strict=True)}


def minimise(
    loss: Callable[[Coefficients], Tensor], start: Coefficients, bound: float = 12.0
) -> tuple[Coefficients, float]:
    """L-BFGS with autodiff from one start; every float stays in [-bound, bound]."""

    def value_and_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
        vector = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        value = loss(unflatten(vector, start))
        (gradient,) = torch.autograd.grad(value, vector)
        return float(value.detach()), gradient.numpy()

    first = torch.cat([block.flatten() for block in start.values()]).numpy()
    options = {"maxiter": 3000, "maxfun": 5000, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(
        value_and_gradient, first, jac=True, method="L-BFGS-B", bounds=[(-bound, bound)] * len(first), options=options
    )
    return unflatten(torch.from_numpy(found.x), start), float(found.fun)


def all_paths(num_steps: int, length: int) -> Iterator[Tensor]:
    """Every trajectory from all masks to clean tokens, (N + 1, P, L): a step and a token for each position."""
    choices = torch.cartesian_prod(*[torch.arange(num_steps * MASK)] * length).view(-1, length)
    opens, tokens = choices // MASK, choices % MASK
    yield from (torch.where(opens < k, tokens, MASK) for k in range(num_steps + 1))
