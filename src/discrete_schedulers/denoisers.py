r"""Any network as a denoiser: one function from (x_t, t) to the logits of p(x_0 | x_t).

What checkpoints do differently is settled here, so that schedulers see one currency: raw logits, log-scores (SEDD), the
leave-one-out law (DUO, UDLM), logits shifted by one (Dream), missing or padded columns, tokens that are never drawn, and
the time input. Conversions, with K states and survival alpha (Lou et al. 2024; Gourevitch et al. 2026, arXiv 2605.22765):

    absorbing score        p_0(v) proportional to s(v) at a mask
    uniform score          l(v) = (s(v) / sum_u s(u) - (1 - alpha) / K) / alpha
    leave-one-out          log p_0(v) = log l(v) + 1[v = x_t] log(1 + K alpha / (1 - alpha)) + const
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from discrete_schedulers.blocks import BlockCache, run_by_blocks
from discrete_schedulers.processes import NoiseSchedule, UniformProcess, as_time, survival
from discrete_schedulers.sampling import RowLogits

CHOICES = {
    "process": ("absorbing", "uniform"),
    "parametrization": ("x0", "score", "leave_one_out"),
    "shift": (0, 1),
    "shift_first": ("keep", "copy"),
    "time_input": ("sigma", "t", None),
    "revealed_logits": ("none", "leave_one_out", "shadow"),
    "attention": ("full", "block_causal"),
}


class Denoiser(Protocol):
    """What the pipeline, the information curve and the trainer call."""

    vocab_size: int
    mask_token_id: int | None

    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: None = None) -> Tensor: ...
    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor) -> RowLogits: ...
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor | None = None) -> Tensor | RowLogits:
        """Logits of p(x_0 | x_t): (B, L, V), or those of the chosen `positions`, bool (B, L), only."""
        ...


@dataclass
class NetworkDenoiser:
    """A network and the facts about it.

    Args:
        model (`torch.nn.Module`): Called with ids (B, L) and, with `time_input`, a float32 tensor (B,); returns logits, a
            tuple that starts with them, or an object with `.logits`.
        vocab_size (`int`): Width V of the state space, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        parametrization (`str`, defaults to `"x0"`): What the network returns: logits of the clean token (`"x0"`), a log-score
            (`"score"`), or logits of the leave-one-out law (`"leave_one_out"`, uniform process).
        shift (`int`, defaults to 0): 1 where the logits at i - 1 predict position i.
        shift_first (`str`, defaults to `"keep"`): With `shift`, position 0 keeps its own logits (`"keep"`, Dream) or its
            token (`"copy"`, DiffuGPT).
        time_input (`str`, *optional*): `"sigma"` (total noise), `"t"`, or `None` for a network without time.
        noise_schedule (`str`, defaults to `"loglinear"`): Turns t into sigma and alpha.
        suppress_token_ids (`tuple[int, ...]`): Ids that are never drawn, beside the mask.
        frozen_token_ids (`tuple[int, ...]`): Ids that are never noised (start, end, padding).
        split_head (`bool`, defaults to `False`): The network takes `positions`, bool (B, L), and then returns logits (R, V)
            of these positions only, in row-major order.
        revealed_logits (`str`, defaults to `"none"`): What the logits at revealed positions are, absorbing process: nothing of
            use (`"none"`: a network that sees the token copies it, or was not trained there), the law of the token given all
            others (`"leave_one_out"`: a hollow network), or an estimate of that law by shadow masks (`"shadow"`, see
            `raw_with_shadows`),
            for networks that take `attention_mask`, bool (1, 1, K, K), and `position_ids` (1, K).
        attention (`str`, defaults to `"full"`): `"block_causal"`: a position sees its own block and those before it, see
            `blocks.py`. The network has to take `attention_mask`, bool (1, 1, W, K), and `position_ids` (1, W).
        block_size (`int`, *optional*): Positions of a block, with `attention="block_causal"`.
        max_length (`int`, *optional*): Longest sequence the network takes.
        grid_shape (`tuple[int, int]`, *optional*): (height, width) where tokens form an image.
        codebook_size (`int`, *optional*): Number of ids that decode, for image models.
        call_arguments (`dict`): Passed to the network in every call, the same for all rows of a batch.
        cache (`BlockCache`, *optional*): With `attention="block_causal"`: keeps keys and values between the calls of one run,
            for networks that take `past_key_values` of transformers.

    Raises:
        ValueError: If a fact is not allowed, or the facts contradict each other.
    """

    model: nn.Module
    vocab_size: int
    mask_token_id: int | None = None
    process: Literal["absorbing", "uniform"] = "absorbing"
    parametrization: Literal["x0", "score", "leave_one_out"] = "x0"
    shift: int = 0
    shift_first: Literal["keep", "copy"] = "keep"
    time_input: Literal["sigma", "t"] | None = None
    noise_schedule: NoiseSchedule = "loglinear"
    suppress_token_ids: tuple[int, ...] = ()
    frozen_token_ids: tuple[int, ...] = ()
    split_head: bool = False
    revealed_logits: Literal["none", "leave_one_out", "shadow"] = "none"
    attention: Literal["full", "block_causal"] = "full"
    block_size: int | None = None
    max_length: int | None = None
    grid_shape: tuple[int, int] | None = None
    codebook_size: int | None = None
    call_arguments: dict[str, Any] = field(default_factory=dict)
    cache: BlockCache | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")
        if self.process == "absorbing" and self.mask_token_id is None:
            raise ValueError("`mask_token_id` is missing: an absorbing process needs the id of the mask")
        if self.process == "absorbing" and self.parametrization == "leave_one_out":
            raise ValueError("`parametrization='leave_one_out'` is for the uniform process")
        if self.process == "uniform" and self.shift and self.shift_first == "copy":
            raise ValueError(
                "`shift_first='copy'` is for the absorbing process: a token that is not masked is certain there"
            )
        if self.process == "uniform" and self.revealed_logits != "none":
            raise ValueError(f"`revealed_logits={self.revealed_logits!r}` is for the absorbing process")
        if self.shift and self.revealed_logits == "shadow":
            raise ValueError("`revealed_logits='shadow'` needs `shift` 0: a shadow stands at its own position")
        self.check_attention()
        survives = survival(torch.tensor(1.0, dtype=torch.float64), self.noise_schedule) > 0
        if not survives and self.time_input == "sigma":
            raise ValueError(f"`time_input='sigma'` is infinite at t = 1 for `noise_schedule={self.noise_schedule!r}`")
        if not survives and self.process == "uniform" and self.parametrization == "score":
            raise ValueError(
                f"with `noise_schedule={self.noise_schedule!r}` a uniform score says nothing of x_0 at t = 1"
            )
        ids = [*self.suppress_token_ids, *self.frozen_token_ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"`suppress_token_ids` and `frozen_token_ids` must lie in [0, {self.vocab_size}), got {ids}"
            )

    def check_attention(self) -> None:
        """Raises `ValueError` if what is said of the attention contradicts itself or the rest."""
        if self.attention == "full" and (self.block_size is not None or self.cache is not None):
            name = "block_size" if self.block_size is not None else "cache"
            raise ValueError(f"`{name}` is for `attention='block_causal'`, but `attention` is 'full'")
        if self.attention == "full":
            return
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(
                f"`block_size` is {self.block_size!r}; `attention='block_causal'` needs a number of at least 1"
            )
        if self.revealed_logits == "shadow":
            raise ValueError(
                "`revealed_logits='shadow'` is for `attention='full'`: shadows stand behind the last block"
            )
        if self.cache is not None and self.time_conditioned:
            raise ValueError("`cache` is for networks without time: keys and values of another time do not hold")

    @property
    def time_conditioned(self) -> bool:
        """Whether the same tokens at another time give other logits."""
        return self.time_input is not None

    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: None = None, **conditions: Any) -> Tensor: ...
    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor, **conditions: Any) -> RowLogits: ...
    def __call__(
        self, x_t: Tensor, t: Tensor | float, positions: Tensor | None = None, **conditions: Any
    ) -> Tensor | RowLogits:
        """Logits of p(x_0 | x_t).

        Args:
            x_t (`torch.Tensor` of shape `(B, L)`): Tokens now, int64.
            t (`float` or `torch.Tensor` of shape `(B,)`): Time in (0, 1].
            positions (`torch.Tensor` of shape `(B, L)`, *optional*): Bool; where logits are wanted. The network then runs
                on the rows of the batch that have any, and its head at these positions only.
            **conditions: Passed to the network; tensors have the batch first.

        Returns:
            `torch.Tensor` of shape `(B, L, V)`, or [`RowLogits`]: `-inf` at ids that are never drawn.

        Raises:
            ValueError: If the ids or their number are not what the network takes.
        """
        if positions is None:
            return self.clean_logits(self.raw(x_t, t, **conditions), x_t, t)
        active = positions.any(1)
        if not active.any():
            return RowLogits(torch.empty(0, self.vocab_size, device=x_t.device), positions)
        if self.cache is not None:
            if self.process == "absorbing":  # a row that is done does not come back
                active = active | self.is_masked(x_t).any(1)
            self.cache.follow(active)
        some = {k: v[active] if isinstance(v, Tensor) else v for k, v in conditions.items()}
        t_some = t[active] if isinstance(t, Tensor) and t.dim() == 1 else t
        x_some, wanted = x_t[active], positions[active]
        if self.attention == "block_causal":
            return RowLogits(self.block_logits(x_some, t_some, wanted, **some), positions)
        if self.split_head and self.shift == 0 and self.process == "absorbing":
            return RowLogits(self.restrict(self.raw(x_some, t_some, wanted, positions=wanted, **some)), positions)
        dense = self.clean_logits(self.raw(x_some, t_some, wanted, **some), x_some, t_some)
        return RowLogits(dense[wanted], positions)

    def block_logits(self, x_t: Tensor, t: Tensor | float, wanted: Tensor, **conditions: Any) -> Tensor:
        """Logits (R, V) at the `wanted` positions, bool (B, L), of a network whose attention goes by blocks."""
        self.check(x_t)
        columns = wanted.any(0).nonzero()
        first, last = int(columns[0]), int(columns[-1]) + 1
        if self.split_head and self.shift == 0 and self.process == "absorbing":
            return self.restrict(self.raw_by_blocks(x_t, t, first, last, positions=wanted, **conditions))
        begin = max(first - self.shift, 0)  # the logits of a position may stand in the block before
        raw = self.raw_by_blocks(x_t, t, begin, last, **conditions)
        logits = self.clean_logits(raw, x_t[:, begin:last], t)[:, first - begin :]
        return logits[wanted[:, first:last]]

    def raw_by_blocks(self, x_t: Tensor, t: Tensor | float, first: int, last: int, **conditions: Any) -> Tensor:
        """The network's output from the position `first` to `last` - 1, see `run_by_blocks`."""
        assert self.block_size is not None
        times = self.time_arguments(x_t, t)

        def network(ids: Tensor, **arguments: Any) -> Tensor:
            return logits_of(self.model(ids, *times, **self.call_arguments, **arguments))

        return run_by_blocks(network, x_t, first, last, self.block_size, conditions, self.cache)

    def log_p_0(self, x_t: Tensor, t: Tensor | float, **conditions: Any) -> Tensor:
        """Normalised log p(x_0 | x_t), shape (B, L, V), float32 or wider; a token that is not masked predicts itself."""
        asked = None if self.process == "uniform" else self.is_masked(x_t)
        logits = self.clean_logits(self.raw(x_t, t, asked, **conditions), x_t, t)
        log_p_0 = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        if self.process == "uniform":
            return log_p_0
        itself = torch.full_like(log_p_0, -math.inf).scatter(-1, x_t[..., None], 0.0)
        return torch.where(self.is_masked(x_t)[..., None], log_p_0, itself)

    def log_score(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """log of the concrete score p_t(x_t with v) / p_t(x_t), shape (B, L, V), float64.

        Absorbing: log p_0(v) + log(alpha / (1 - alpha)) at a mask, `-inf` elsewhere but 0 at the token itself.
        """
        log_p_0 = self.log_p_0(x_t, t).double()
        if self.process == "uniform":
            return UniformProcess(self.vocab_size, self.noise_schedule).score(x_t, log_p_0.exp(), t).log()
        alpha = survival(as_time(t, x_t.device), self.noise_schedule)
        log_odds = alpha.log() - (1 - alpha).log()
        log_score = torch.where(self.is_masked(x_t)[..., None], log_p_0 + log_odds, -math.inf)
        return log_score.scatter(-1, x_t[..., None], 0.0)

    def raw(self, x_t: Tensor, t: Tensor | float, asked: Tensor | None = None, **conditions: Any) -> Tensor:
        """One call of the network; its output as it is, (B, L, width), or (R, width) where `conditions` have `positions`.

        Args:
            x_t (`torch.Tensor` of shape `(B, L)`): Tokens now, int64.
            t (`float` or `torch.Tensor` of shape `(B,)`): Time in (0, 1].
            asked (`torch.Tensor` of shape `(B, L)`, *optional*): Bool; the positions whose output will be read. `None`: all.
            **conditions: Passed to the network.
        """
        self.check(x_t)
        if self.revealed_logits == "shadow":
            revealed = ~self.is_masked(x_t) if asked is None else asked & ~self.is_masked(x_t)
            if revealed.any():
                return self.raw_with_shadows(x_t, t, revealed, **conditions)
        if self.attention == "block_causal":
            return self.raw_by_blocks(x_t, t, 0, x_t.shape[1], **conditions)
        return logits_of(self.model(x_t, *self.time_arguments(x_t, t), **self.call_arguments, **conditions))

    def raw_with_shadows(self, x_t: Tensor, t: Tensor | float, revealed: Tensor, **conditions: Any) -> Tensor:
        """As `raw`, with the output of shadows at the `revealed` positions, bool (B, L), in one call.

        A shadow is a mask that is appended to the sequence with the position id of a revealed token. It sees the sequence but
        for this token, and nothing else sees it. With one layer its output is that of the network with the position masked.
        With more it is an estimate: the others have seen the token that the shadow must not see, and pass it on.
        """
        assert self.mask_token_id is not None
        length, columns = x_t.shape[1], revealed.any(0).nonzero().squeeze(1)  # (S,)
        extended = torch.cat([x_t, torch.full_like(x_t[:, columns], self.mask_token_id)], dim=1)  # (B, L + S)
        place = torch.cat([torch.arange(length, device=x_t.device), columns])
        is_real = torch.arange(len(place), device=x_t.device) < length
        sees = torch.where(is_real[:, None], is_real, is_real & (place[:, None] != place))  # (L + S, L + S)
        sees |= torch.eye(len(place), dtype=torch.bool, device=x_t.device)
        conditions = conditions | {"attention_mask": sees[None, None], "position_ids": place[None]}
        wanted = conditions.pop("positions", None)
        if wanted is not None:
            conditions["positions"] = torch.cat([wanted & ~revealed, revealed[:, columns]], dim=1)
        output = logits_of(self.model(extended, *self.time_arguments(x_t, t), **self.call_arguments, **conditions))
        if wanted is None:
            raw = output[:, :length].clone()
            raw[:, columns] = torch.where(revealed[:, columns, None], output[:, length:], raw[:, columns])
            return raw
        number = torch.zeros_like(extended).masked_scatter(  # the place of each position among the rows of the output
            conditions["positions"], torch.arange(len(output), device=x_t.device)
        )
        number[:, columns] = torch.where(revealed[:, columns], number[:, length:], number[:, columns])
        return output[number[:, :length][wanted]]

    def is_masked(self, x_t: Tensor) -> Tensor:
        """Where the tokens are the mask, bool, of the shape of `x_t`; absorbing process."""
        assert self.mask_token_id is not None
        return x_t == self.mask_token_id

    def time_arguments(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, ...]:
        """The network's time input, float32 (B,), or nothing."""
        if self.time_input is None:
            return ()
        t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).expand(len(x_t))
        value = t if self.time_input == "t" else -torch.log(survival(t, self.noise_schedule))
        return (value.float(),)

    def check(self, x_t: Tensor) -> None:
        """Raises `ValueError` if the ids or their number are not what the network takes."""
        if x_t.dim() != 2 or x_t.dtype != torch.int64:
            raise ValueError(f"`x_t` is {x_t.dtype} of shape {tuple(x_t.shape)}; it must be int64 (B, L)")
        if self.max_length is not None and x_t.shape[1] > self.max_length:
            raise ValueError(f"`x_t` has length {x_t.shape[1]}; this model takes at most {self.max_length}")
        if x_t.numel() and not 0 <= int(x_t.min()) <= int(x_t.max()) < self.vocab_size:
            raise ValueError(f"`x_t` has ids from {x_t.min()} to {x_t.max()}; allowed are 0 to {self.vocab_size - 1}")

    def clean_logits(self, raw: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """The network's output as logits of p(x_0 | x_t), (B, L, V)."""
        raw = self.widen(raw)
        if self.shift:
            first = raw[:, :1]
            if self.shift_first == "copy":
                itself = torch.full_like(first, -math.inf).scatter(-1, x_t[:, :1, None], 0.0)
                first = torch.where(self.is_masked(x_t[:, :1])[..., None], first, itself)
            raw = torch.cat([first, raw[:, :-1]], dim=1)
        if self.process == "absorbing" or self.parametrization == "x0":
            return self.restrict(raw)
        process = UniformProcess(self.vocab_size, self.noise_schedule)
        alpha = process.alpha(t).to(x_t.device)
        log_one_out = raw.double()
        if self.parametrization == "score":
            # The score of the token itself is 1 by definition; networks return anything there.
            share = log_one_out.scatter(-1, x_t[..., None], 0.0).softmax(-1)
            share = (share - (1 - alpha) / self.vocab_size) / alpha
            log_one_out = share.clamp(min=1e-300).log()  # an inexact score may ask for less than nothing
        gain = torch.log1p(self.vocab_size * alpha / (1 - alpha)).expand(x_t.shape[0], 1, 1)
        return self.restrict(log_one_out.scatter_add(-1, x_t[..., None], gain.expand(-1, x_t.shape[1], 1)))

    def widen(self, raw: Tensor) -> Tensor:
        """Logits of width V: padded columns of the network cut off, columns that it does not have `-inf`."""
        if raw.shape[-1] < self.vocab_size:
            raw = torch.nn.functional.pad(raw, (0, self.vocab_size - raw.shape[-1]), value=-math.inf)
        return raw[..., : self.vocab_size]

    def restrict(self, raw: Tensor) -> Tensor:
        """Logits of width V with `-inf` at the mask and at ids that are never drawn."""
        logits = self.widen(raw)
        never = [*self.suppress_token_ids] + ([] if self.mask_token_id is None else [self.mask_token_id])
        if not never:
            return logits
        return logits.index_fill(-1, torch.tensor(never, device=logits.device), -math.inf)


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returns: a tensor, a tuple that starts with it, or an object with `.logits`."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits
