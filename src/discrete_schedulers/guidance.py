"""Classifier-free guidance: two branches of one network combined in raw logits, and how the scale grows with time."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from discrete_schedulers.denoisers import AroundDenoiser, NetworkDenoiser
from discrete_schedulers.sampling import RowLogits

GuidanceScale: TypeAlias = float | Callable[[float], float]
GuidanceSchedule: TypeAlias = Literal["constant", "linear", "cosine"]


def check_scale(guidance_scale: Any) -> None:
    """Raises `ValueError` if this is neither a finite number nor a function."""
    if callable(guidance_scale) or (isinstance(guidance_scale, numbers.Real) and math.isfinite(guidance_scale)):
        return
    raise ValueError(f"`guidance_scale` is {guidance_scale!r}; it must be a finite number, or a function of t")


@dataclass
class GuidedDenoiser(AroundDenoiser):
    r"""Classifier-free guidance: a conditional and an unconditional branch of one network, combined in raw logits.

        logits = u + s (c - u)          p_0(v) proportional to p(v | x_t, y)^s p(v | x_t)^(1 - s)

    With s = 1 there is no guidance, the unconditional branch is not run, and only `conditions` are of use. Other sources
    write w = s - 1 (LLaDA, MaskGIT). For networks that are exact, p(v | x_t, y) / p(v | x_t) is proportional to
    p(y | x_0^i = v, x_t) at each position i, hence

        p_0^i(v) proportional to p(x_0^i = v | x_t) p(y | x_0^i = v, x_t)^s

    the posterior of a classifier that is trusted s times. This holds for logits of p_0 and of the leave-one-out law alike:
    the factor between the two is the same in both branches and drops out.

    Schiff et al. 2024 (arXiv 2412.10193, D-CFG) and Nisonoff et al. 2024 (arXiv 2406.01572) guide the law of x_s, and in the
    limit of small steps the rates, in place of p_0. In a step to time 0 both are the same. Before, with absorbing noise their
    token law, given that a mask opens, is the one above, but the chance that it opens grows with
    sum_v p(v | x_t, y)^s p(v | x_t)^(1 - s). With uniform noise they raise the noised laws m(v) = alpha_s l(v) +
    (1 - alpha_s) / K to the powers s and 1 - s, here it is l itself, the leave-one-out law. No l has a noised law below
    (1 - alpha_s) / K, but theirs can fall below: it then has no clean law behind it, ours always has.
    A network of uniform scores (`parametrization="score"`) has its scores combined, as Nisonoff et al. do.

    Args:
        denoiser (`NetworkDenoiser`): The network and its facts.
        guidance_scale (`float` or `Callable`): s, or a function of the time t in (0, 1], see `guidance_schedule`.
        conditions (`dict`): Passed to the network in the conditional branch; tensors have the batch first.
        negative_conditions (`dict`): Passed in the unconditional branch, in their place.
        negative_ids (`torch.Tensor` of shape `(B, L)`, *optional*): Tokens that stand in the unconditional branch, -1 where
            those of x_t do: masks in the place of a prompt, or a negative prompt.

    Raises:
        ValueError: If s is not 1 and the branches do not differ, or the scale or the ids are not what they must be.
    """

    denoiser: NetworkDenoiser
    guidance_scale: GuidanceScale
    conditions: dict[str, Any] = field(default_factory=dict)
    negative_conditions: dict[str, Any] = field(default_factory=dict)
    negative_ids: Tensor | None = None

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale)
        is_guided = callable(self.guidance_scale) or self.guidance_scale != 1
        if is_guided and not self.negative_conditions and self.negative_ids is None:
            raise ValueError(
                "guidance needs an unconditional branch that differs: pass `negative_conditions` or `negative_ids`"
            )
        if is_guided and self.denoiser.cache is not None:
            raise ValueError("`denoiser` has a cache, which is for one branch: guidance goes without")
        ids = self.negative_ids
        if ids is None:
            return
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise ValueError(f"`negative_ids` is {ids.dtype} of shape {tuple(ids.shape)}; it must be int64 (B, L)")
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(
                f"`negative_ids` has ids from {ids.min()} to {ids.max()}; allowed are -1 to {self.vocab_size - 1}"
            )

    @property
    def time_conditioned(self) -> bool:
        """Whether the same tokens at another time give other logits."""
        return self.denoiser.time_conditioned or callable(self.guidance_scale)

    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: None = None, **conditions: Any) -> Tensor: ...
    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor, **conditions: Any) -> RowLogits: ...
    def __call__(
        self, x_t: Tensor, t: Tensor | float, positions: Tensor | None = None, **conditions: Any
    ) -> Tensor | RowLogits:
        """Guided logits of p(x_0 | x_t). As [`NetworkDenoiser`]; `conditions` of the call go to both branches."""
        if self.negative_ids is not None and self.negative_ids.shape != x_t.shape:
            raise ValueError(
                f"`negative_ids` is of shape {tuple(self.negative_ids.shape)}, but `x_t` is {tuple(x_t.shape)}"
            )
        branches = {"positive": self.conditions, "negative": self.negative_conditions, "ids": self.negative_ids}
        return self.denoiser.logits_from(self.raw, x_t, t, positions, branches=branches, **conditions)

    def calls_at(self, t: Tensor | float) -> int:
        """Calls of the network in one call at time t: two, also where they are one doubled batch, and one with s = 1."""
        return 1 + bool((self.scale_at(t) != 1).any())

    def scale_at(self, t: Tensor | float) -> Tensor:
        """s at the times t, float64 of the shape of t."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if not callable(self.guidance_scale):
            return torch.full_like(t, self.guidance_scale)
        scales = [float(self.guidance_scale(float(one))) for one in t.reshape(-1)]
        if not all(map(math.isfinite, scales)):
            raise ValueError(f"`guidance_scale` gives {scales} at t = {t.tolist()}; it must give finite numbers")
        return torch.tensor(scales, dtype=torch.float64, device=t.device).reshape(t.shape)

    def raw(
        self,
        x_t: Tensor,
        t: Tensor | float,
        asked: Tensor | None = None,
        *,
        branches: dict[str, Any],
        **conditions: Any,
    ) -> Tensor:
        """The output of the network, guided; as [`NetworkDenoiser.raw`].

        Both branches are one call with twice the rows where they pass the same names with the same shapes, else two calls.
        """
        scale = self.scale_at(t)
        positive, negative = conditions | branches["positive"], conditions | branches["negative"]
        if bool((scale == 1).all()):
            return self.denoiser.raw(x_t, t, asked, **positive)
        ids = branches["ids"]
        x_negative = x_t if ids is None else torch.where(ids.to(x_t.device) < 0, x_t, ids.to(x_t.device))
        if can_join(positive, negative):
            both = {name: joined(positive[name], negative[name]) for name in positive}
            twice = t if not isinstance(t, Tensor) or t.dim() == 0 else torch.cat([t, t])
            asked_twice = None if asked is None else torch.cat([asked, asked])
            output = self.denoiser.raw(torch.cat([x_t, x_negative]), twice, asked_twice, **both)
            c, u = output.chunk(2)
        else:
            c = self.denoiser.raw(x_t, t, asked, **positive)
            u = self.denoiser.raw(x_negative, t, asked, **negative)
        c, u = (branch.to(torch.promote_types(branch.dtype, torch.float32)) for branch in (c, u))
        scale = scale.to(c)
        if scale.dim() == 1:  # one for each row of the batch
            wanted = conditions.get("positions")
            scale = scale[:, None, None] if wanted is None else scale[wanted.nonzero()[:, 0], None]
        return torch.where(torch.isinf(c) | torch.isinf(u), c, u + scale * (c - u))  # -inf in both has no difference


def can_join(positive: dict[str, Any], negative: dict[str, Any]) -> bool:
    """Whether the conditions of two branches fit in one batch: the same names, tensors of equal shape, other values equal."""
    if positive.keys() != negative.keys():
        return False
    for name, value in positive.items():
        other = negative[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if value.shape != other.shape or value.dtype != other.dtype:
                return False
        elif isinstance(value, Tensor) or isinstance(other, Tensor) or value != other:
            return False
    return True


def joined(value: Any, other: Any) -> Any:
    """Two batches of a condition as one."""
    return torch.cat([value, other]) if isinstance(value, Tensor) else value


def guidance_schedule(name: GuidanceSchedule, guidance_scale: float, start: float = 1.0) -> Callable[[float], float]:
    """A guidance scale that grows while noise goes: s(t) = start + (guidance_scale - start) g(t). Pipelines take the function
    as `guidance_scale`, or its name as `guidance_schedule` beside a number.

    Args:
        name (`str`): `"constant"`: g = 1; `"linear"`: g = 1 - t; `"cosine"`: g = (1 - cos(pi (1 - t))) / 2.
        guidance_scale (`float`): s at t = 0. The last call of a network is before that, at the last time of the grid.
        start (`float`, defaults to 1.0): s at t = 1; 1 is no guidance.

    Returns:
        `Callable[[float], float]`: The scale as a function of t.

    Raises:
        ValueError: If `name` is not allowed.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 - math.cos(math.pi * (1 - t))) / 2,
    }
    if name not in shapes:
        raise ValueError(f"`name` is {name!r}; allowed: {', '.join(map(repr, shapes))}")
    return lambda t: start + (guidance_scale - start) * shapes[name](t)
