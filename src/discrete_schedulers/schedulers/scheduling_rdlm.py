r"""RDLM: language diffusion on a sphere, by a geodesic random walk of float states.

Each position has a point of the sphere of V states, driven by the mean bridge of its denoiser's law (sphere.py: the process):

    v   = share sum_k p(k | X_t) log_{X_t}(e_k) + sqrt(variance) z,      z normal in the tangent space at X_t
    X_s = exp_{X_t}(v)

    step_rule "euler":   share = beta_t / tau_t (t - s),     variance = beta_t (t - s)                  as published
    step_rule "bridge":  share = 1 - tau_s / tau_t,          variance = (tau_t - tau_s) tau_s / tau_t

The second is the exact step of a flat bridge to a known token: noise ends with the run, and one step is an ordinary case. Exact
with the denoiser of a bridge to every corner (`prior` "mask" or "uniform") as the number of steps grows.

It is no [`DiscreteScheduler`]: its states are not tokens. Of that contract it keeps time, `step`'s parameters, the one currency
(logits of p(x_0 | x_t), the mask's column not read) and generators by row.

Source: Jo and Hwang 2025 (RDLM, NeurIPS, arXiv 2502.11564) and its code's `sampling.py`, which stops at t = 1e-5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn.functional import one_hot

from discrete_schedulers.sampling import Generators, RowLogits, draw_tokens
from discrete_schedulers.schedulers.scheduling_utils import CheckedConfigMixin, call_named, number_of_steps
from discrete_schedulers.sphere import BetaSchedule, LogarithmBridge, Prior, exp_map, mean_log_map, normals, to_tangent

CHOICES = {"step_rule": ("bridge", "euler"), "last_step": ("draw", "walk")}


@dataclass
class RDLMSchedulerOutput(BaseOutput):
    """Output of `RDLMScheduler.step`.

    Args:
        prev_sample (`torch.Tensor` of shape `(B, L, V)`): Points X_s of the sphere at the next, less noisy time.
        pred_original_sample (`torch.Tensor` of shape `(B, L)`): Most probable clean tokens, int64.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class RDLMScheduler(SchedulerMixin, CheckedConfigMixin):
    """Geodesic random walk to the tokens' corners of a sphere.

    Args:
        vocab_size (`int`): States V, 2 or more, the mask included.
        mask_token_id (`int`, *optional*): The mask; `None`: there is none.
        prior (`str`, defaults to `"mask"`): The walk starts in the `"mask"`, or in the centre, 1 / sqrt(V) (`"uniform"`). With
            `"mixture"` in the centre; it is for a network trained on states of both, see [`LogarithmBridge`].
        beta_start (`float`, defaults to 1e-3): Noise per unit of time at t = 1.
        beta_end (`float`, defaults to 0.2): At t = 0.
        beta_schedule (`str`, defaults to `"geometric"`): Between them: `"geometric"`, `"linear"` or `"cosine"`.
        switch_time (`float`, defaults to 0.65): With `prior="mixture"`: bridges from the centre above it. For training only.
        step_rule (`str`, defaults to `"bridge"`): `"bridge"` or `"euler"`, as above.
        last_step (`str`, defaults to `"draw"`): What the last call does: `"draw"` tokens from the denoiser's law, or `"walk"`,
            after which tokens are the nearest corners, as published.
        temperature (`float`, defaults to 1.0): Divides the logits; positive.

    Raises:
        ValueError: If an argument is not allowed.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        prior: Prior = "mask",
        beta_start: float = 1e-3,
        beta_end: float = 0.2,
        beta_schedule: BetaSchedule = "geometric",
        switch_time: float = 0.65,
        step_rule: Literal["bridge", "euler"] = "bridge",
        last_step: Literal["draw", "walk"] = "draw",
        temperature: float = 1.0,
    ) -> None:
        for name, allowed in CHOICES.items():
            if self.config[name] not in allowed:
                raise ValueError(f"`{name}` is {self.config[name]!r}; allowed: {', '.join(map(repr, allowed))}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` is {temperature}; it must be a positive number")
        self.bridge = LogarithmBridge(
            vocab_size, mask_token_id, prior, beta_start, beta_end, beta_schedule, switch_time
        )
        # diffusers takes arguments that were passed by position for defaults, which `from_config` drops
        self.register_to_config(_use_default_values=[])
        self.times = torch.linspace(1, 0, 2, dtype=torch.float64)
        self.timesteps = self.times[:-1]
        self.num_inference_steps: int | None = None

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps`, one for each model call, and the grid behind it, `times` (N + 1,), from 1 to exactly 0, float64.

        Args:
            num_inference_steps (`int`): Number N of steps and of model calls, 1 or more.
            device (`torch.device`, *optional*): Where `timesteps` lives. `times` stays on the CPU.

        Raises:
            ValueError: If N is not a positive integer.
        """
        self.num_inference_steps = number_of_steps(num_inference_steps)
        self.times = torch.linspace(1, 0, self.num_inference_steps + 1, dtype=torch.float64)
        self.timesteps = self.times[:-1].to(device)

    def step_index(self, timestep: int | float | Tensor) -> int:
        """The place in `timesteps` that a time out of them, or an int index, names.

        Raises:
            ValueError: If it names none.
        """
        return call_named(timestep, self.times[:-1])

    def scale_model_input(self, sample: Tensor, timestep: int | float | Tensor | None = None) -> Tensor:
        """Returns `sample`: points of the sphere are not scaled."""
        return sample

    def sample_prior(
        self,
        shape: tuple[int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """States (B, L, V) at t = 1 for a `shape` (B, L): all in the same point; `generator` is not asked."""
        start = self.bridge.start_points(torch.ones((), dtype=torch.float64))
        return start.to(device, dtype).expand(*shape, -1).clone()

    def add_noise(
        self,
        original_samples: Tensor,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        *,
        generator: Generators = None,
    ) -> Tensor:
        """Draw X_t given clean tokens, from the law of the bridge's Riemannian normal.

        Args:
            original_samples (`torch.Tensor` of shape `(B, L)`): Clean tokens, int64.
            noise (`torch.Tensor`, *optional*): Not read; here for diffusers' sake.
            timesteps (`torch.Tensor` of shape `(B,)` or `(1,)`): Times in [0, 1].
            generator (`torch.Generator`, `list[torch.Generator]`, *optional*): Source of randomness.

        Returns:
            `torch.Tensor` of shape `(B, L, V)`: Points of the sphere, float64.

        Raises:
            ValueError: If `timesteps` is missing or outside [0, 1].
        """
        if timesteps is None or not ((timesteps >= 0) & (timesteps <= 1)).all():
            raise ValueError(f"`timesteps` is {timesteps}; times in [0, 1] are needed")
        t = timesteps.reshape(-1).double().to(original_samples.device).expand(len(original_samples))
        return self.bridge.add_noise(original_samples, t, generator)

    def walk(self, index: int) -> tuple[float, float]:
        """Share of the way to the tokens that the call `index` goes, and the variance of its noise."""
        t, s = self.times[index], self.times[index + 1]
        now, then = self.bridge.noise_left(t), self.bridge.noise_left(s)
        if self.config.step_rule == "bridge":
            return float(1 - then / now), float((now - then) * then / now)
        variance = self.bridge.beta(t) * (t - s)
        return float(variance / now), float(variance)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        *,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> RDLMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go from X_t to X_s, the next time of the grid.

        Args:
            model_output (`torch.Tensor` of shape `(B, L, V)`): Logits of p(x_0 | X_t); the mask's are not read.
            timestep (`float`, `int` or `torch.Tensor`): A time out of `timesteps`, or a step index.
            sample (`torch.Tensor` of shape `(B, L, V)`): Points X_t of the sphere, floating.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of randomness.
            return_dict (`bool`, defaults to `True`): Return [`RDLMSchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: If shapes or dtypes do not fit, or logits are NaN.
        """
        index, width = self.step_index(timestep), self.bridge.vocab_size
        if model_output.shape != sample.shape or sample.dim() != 3 or sample.shape[-1] != width:
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)} and `sample` {tuple(sample.shape)}; both must be "
                f"(B, L, {width})"
            )
        if not sample.is_floating_point():
            raise ValueError(f"`sample` is {sample.dtype}; points of the sphere are floating: see `sample_prior`")
        logits = model_output.double() / self.config.temperature
        if self.config.mask_token_id is not None:
            logits[..., self.config.mask_token_id] = -math.inf
        if logits.isnan().any():
            raise ValueError("`model_output` has NaN logits")
        if index == len(self.times) - 2 and self.config.last_step == "draw":
            tokens = draw_tokens(RowLogits.everywhere(logits), generator).view(sample.shape[:2])
            moved = one_hot(tokens, width).double()
        else:
            share, variance = self.walk(index)
            x = sample.double()
            noise = to_tangent(normals(tuple(x.shape), generator, x.device), x)
            moved = exp_map(x, share * mean_log_map(x, logits.softmax(-1)) + math.sqrt(variance) * noise)
        output = RDLMSchedulerOutput(moved.to(sample.dtype), logits.argmax(-1))
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def tokens(self, sample: Tensor) -> Tensor:
        """The tokens whose corners are nearest to points (..., V) of the sphere, int64, never the mask."""
        if self.config.mask_token_id is None:
            return sample.argmax(-1)
        mask = torch.tensor([self.config.mask_token_id], device=sample.device)
        return sample.index_fill(-1, mask, -math.inf).argmax(-1)
