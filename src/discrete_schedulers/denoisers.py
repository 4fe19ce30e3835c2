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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from discrete_schedulers.blocks import BlockCache, run_by_blocks
from discrete_schedulers.processes import NoiseSchedule, UniformProcess, as_time, check_tokens, survival
from discrete_schedulers.sampling import RowLogits

CHOICES = {
    "process": ("absorbing", "uniform"),
    "parametrization": ("x0", "score", "leave_one_out"),
    "shift": (0, 1),
    "shift_first": ("keep", "copy"),
    "time_input": ("sigma", "t", "steps_left", None),
    "revealed_logits": ("none", "leave_one_out", "shadow"),
    "attention": ("full", "block_causal"),
}

# torch numbers hooks without a lock: two threads could get one number, and one hook would be lost
HOOKS = threading.Lock()


class Denoiser(Protocol):
    """What the pipeline, the information curve and the trainer call."""

    @property
    def vocab_size(self) -> int:
        """Width V of the state space."""
        ...

    @property
    def mask_token_id(self) -> int | None:
        """The mask's id; `None` for the uniform process."""
        ...

    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: None = None, **conditions: Any) -> Tensor: ...
    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor, **conditions: Any) -> RowLogits: ...
    def __call__(
        self, x_t: Tensor, t: Tensor | float, positions: Tensor | None = None, **conditions: Any
    ) -> Tensor | RowLogits:
        """Logits of p(x_0 | x_t): (B, L, V), or those of the chosen `positions`, bool (B, L), only."""
        ...

    def calls_at(self, t: Tensor | float) -> int:
        """Calls of the network in one call at time t."""
        ...


class AroundDenoiser:
    """What a denoiser that asks another one has of it. Abstract: `__call__` is missing."""

    denoiser: Denoiser

    @property
    def vocab_size(self) -> int:
        """Width V of the state space."""
        return self.denoiser.vocab_size

    @property
    def mask_token_id(self) -> int | None:
        """The mask's id; `None` for the uniform process."""
        return self.denoiser.mask_token_id

    def calls_at(self, t: Tensor | float) -> int:
        """Calls of the network in one call at time t."""
        return self.denoiser.calls_at(t)


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
        time_input (`str`, *optional*): `"sigma"` (total noise), `"t"`, `"steps_left"` (N t - 1 in a run of N steps: Meissonic),
            or `None` for a network without time.
        noise_schedule (`str`, defaults to `"loglinear"`): Turns t into sigma and alpha.
        suppress_token_ids (`tuple[int, ...]`): Ids that are never drawn, beside the mask.
        frozen_token_ids (`tuple[int, ...]`): Ids that are never noised (start, end, padding).
        split_head (`bool`, defaults to `False`): The network takes `positions`, bool (B, L), and then returns logits (R, V)
            of these positions only, in row-major order.
        head (`str`, *optional*): For a network that does not: the name of the submodule that makes logits of hidden states
            (B, L, H), each position by itself (`"lm_head"`, `"cls"`). It is then run at the wanted positions only, as (R, H)
            (with `grid_input` instead of (B, H, height, width), as (1, H, R, 1)), by a hook that is there during the call,
            for the thread that calls.
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
        grid_input (`bool`, defaults to `False`): The network takes ids (B, height, width) of `grid_shape`, and returns logits
            (B, width of the logits, height, width), channels first.
        num_steps (`int`, *optional*): Steps N of the run, for `time_input="steps_left"`.
        call_arguments (`dict`): Passed to the network in every call, the same for all rows of a batch. Conditions of a call
            with the same names take their place.
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
    time_input: Literal["sigma", "t", "steps_left"] | None = None
    noise_schedule: NoiseSchedule = "loglinear"
    suppress_token_ids: tuple[int, ...] = ()
    frozen_token_ids: tuple[int, ...] = ()
    split_head: bool = False
    head: str | None = None
    revealed_logits: Literal["none", "leave_one_out", "shadow"] = "none"
    attention: Literal["full", "block_causal"] = "full"
    block_size: int | None = None
    max_length: int | None = None
    grid_shape: tuple[int, int] | None = None
    codebook_size: int | None = None
    grid_input: bool = False
    num_steps: int | None = None
    call_arguments: dict[str, Any] = field(default_factory=dict)
    cache: BlockCache | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")
        if self.process == "absorbing" and self.mask_token_id is None:
            raise ValueError("`mask_token_id` is missing: an absorbing process needs the id of the mask")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"`mask_token_id` is {self.mask_token_id}; it must lie in [0, {self.vocab_size})")
        if self.process == "absorbing" and self.parametrization == "leave_one_out":
            raise ValueError("`parametrization='leave_one_out'` is for the uniform process")
        if self.process == "uniform" and self.shift and self.shift_first == "copy":
            raise ValueError(
                "`shift_first='copy'` is for the absorbing process: a token that is not masked is certain there"
            )
        if self.process == "uniform" and self.revealed_logits != "none":
            raise ValueError(f"`revealed_logits={self.revealed_logits!r}` is for the absorbing process")
        if self.head is not None:
            self.head = self.find_head(self.head)
        if self.head is not None and self.split_head:
            raise ValueError(
                "`head` and `split_head` cannot both be given: the network splits its head itself, or is made to"
            )
        if self.shift and self.revealed_logits == "shadow":
            raise ValueError("`revealed_logits='shadow'` needs `shift` 0: a shadow stands at its own position")
        if self.grid_input and (self.grid_shape is None or self.split_head or self.revealed_logits != "none"):
            raise ValueError("`grid_input` needs `grid_shape`, and neither `split_head` nor `revealed_logits`")
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

    def find_head(self, name: str) -> str:
        """The full name of a submodule, also of a network inside another one: an adapter, or data parallelism.

        Raises:
            ValueError: If there is none.
        """
        try:
            self.model.get_submodule(name)
        except AttributeError as error:
            found = [full for full, _ in self.model.named_modules() if full.endswith(f".{name}")]
            if not found:
                network = type(self.model).__name__
                raise ValueError(f"`head` is {name!r}; {network} has no submodule of this name") from error
            return min(found, key=lambda full: full.count("."))
        return name

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
        return self.logits_from(self.raw, x_t, t, positions, **conditions)

    def logits_from(
        self, raw: Callable[..., Tensor], x_t: Tensor, t: Tensor | float, positions: Tensor | None, **conditions: Any
    ) -> Tensor | RowLogits:
        """As a call, with `raw` in the place of the network: a function with the arguments and the output of `self.raw`."""
        if positions is None:
            return self.clean_logits(raw(x_t, t, **conditions), x_t, t)
        if positions.dtype != torch.bool or positions.shape != x_t.shape:
            raise ValueError(
                f"`positions` is {positions.dtype} of shape {tuple(positions.shape)}; it must be bool of "
                f"shape {tuple(x_t.shape)}"
            )
        active = positions.any(1)
        if not active.any():
            return RowLogits(torch.empty(0, self.vocab_size, device=x_t.device), positions)
        if self.cache is not None:
            if self.process == "absorbing":  # a row that is done does not come back
                active = active | self.is_masked(x_t).any(1)
            self.cache.follow(active)
        some = {name: rows_of(value, active) for name, value in conditions.items()}
        t_some = t[active] if isinstance(t, Tensor) and t.dim() == 1 else t
        x_some, wanted = x_t[active], positions[active]
        if self.attention == "block_causal":
            return RowLogits(self.block_logits(raw, x_some, t_some, wanted, **some), positions)
        if self.can_split(x_some, wanted):
            return RowLogits(self.restrict(self.raw_rows(raw, x_some, t_some, wanted, **some)), positions)
        dense = self.clean_logits(raw(x_some, t_some, wanted, **some), x_some, t_some)
        return RowLogits(dense[wanted], positions)

    def calls_at(self, t: Tensor | float) -> int:
        """Calls of the network in one call at time t."""
        return 1

    def block_logits(
        self, raw: Callable[..., Tensor], x_t: Tensor, t: Tensor | float, wanted: Tensor, **conditions: Any
    ) -> Tensor:
        """Logits (R, V) at the `wanted` positions, bool (B, L), of a network whose attention goes by blocks."""
        self.check(x_t)
        columns = wanted.any(0).nonzero()
        first, last = int(columns[0]), int(columns[-1]) + 1
        if self.split_head and self.shift == 0 and self.process == "absorbing":
            return self.restrict(raw(x_t, t, wanted, window=(first, last), positions=wanted, **conditions))
        begin = max(first - self.shift, 0)  # the logits of a position may stand in the block before
        output = raw(x_t, t, wanted, window=(begin, last), **conditions)
        logits = self.clean_logits(output, x_t[:, begin:last], t)[:, first - begin :]
        return logits[wanted[:, first:last]]

    def raw_by_blocks(self, x_t: Tensor, t: Tensor | float, first: int, last: int, **conditions: Any) -> Tensor:
        """The network's output from the position `first` to `last` - 1, see `run_by_blocks`."""
        assert self.block_size is not None
        times = self.time_arguments(x_t, t)

        def network(ids: Tensor, **arguments: Any) -> Tensor:
            return logits_of(self.model(ids, *times, **(self.call_arguments | arguments)))

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
            **conditions: Passed to the network. With attention by blocks `window` is not: the first position that is asked
                for and one after the last; the output is that of these positions.
        """
        self.check(x_t)
        if self.revealed_logits == "shadow":
            revealed = ~self.is_masked(x_t) if asked is None else asked & ~self.is_masked(x_t)
            if revealed.any():
                return self.raw_with_shadows(x_t, t, revealed, **conditions)
        if self.attention == "block_causal":
            return self.raw_by_blocks(x_t, t, *conditions.pop("window", (0, x_t.shape[1])), **conditions)
        time, told = self.time_arguments(x_t, t), self.call_arguments | conditions
        ids = x_t
        if self.grid_input:
            assert self.grid_shape is not None
            ids = x_t.view(-1, *self.grid_shape)
        if self.head is None or "positions" not in told:
            output = logits_of(self.model(ids, *time, **told))
            return output.flatten(2).mT if self.grid_input else output
        with head_at(self.model.get_submodule(self.head), told.pop("positions"), self.grid_input):
            output = logits_of(self.model(ids, *time, **told))
        return output[0, :, :, 0].mT if self.grid_input else output

    def can_split(self, x_t: Tensor, wanted: Tensor) -> bool:
        """Whether the head can run at the wanted positions only, bool (B, L)."""
        if self.process == "uniform" and self.parametrization != "x0":
            return False  # what a row means depends on the time of its sample
        if self.split_head or self.head is None:
            return self.split_head
        return self.revealed_logits != "shadow" or not bool((wanted & ~self.is_masked(x_t)).any())

    def raw_rows(
        self, raw: Callable[..., Tensor], x_t: Tensor, t: Tensor | float, wanted: Tensor, **conditions: Any
    ) -> Tensor:
        """As `raw`, at the wanted positions, bool (B, L), with a head that runs there only: (R, width)."""
        asked = wanted
        if self.shift:  # the position before speaks, and the first one for itself
            asked = torch.cat([wanted[:, 1:], torch.zeros_like(wanted[:, :1])], dim=1)
            asked[:, 0] |= wanted[:, 0]
        output = raw(x_t, t, asked, positions=asked, **conditions)
        if not self.shift:
            return output
        sample, place = wanted.nonzero(as_tuple=True)
        number = (asked.flatten().cumsum(0) - 1).view(asked.shape)  # the row of each position that was asked
        rows = self.widen(output[number[sample, (place - 1).clamp(min=0)]])
        if self.shift_first == "copy":
            itself = torch.full_like(rows, -math.inf).scatter(-1, x_t[wanted][:, None], 0.0)
            rows = torch.where(((place == 0) & ~self.is_masked(x_t[wanted]))[:, None], itself, rows)
        return rows

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
        mask = sees[None, None]  # (1, 1, L + S, L + S)
        if "attention_mask" in conditions:  # (B, L), 0 at padding
            is_token = conditions["attention_mask"].bool()
            mask = mask & torch.cat([is_token, is_token[:, columns]], dim=1)[:, None, None]
        conditions = conditions | {"attention_mask": mask, "position_ids": place[None]}
        wanted = conditions.pop("positions", None)
        if wanted is not None:
            conditions["positions"] = torch.cat([wanted & ~revealed, revealed[:, columns]], dim=1)
        output = logits_of(self.model(extended, *self.time_arguments(x_t, t), **(self.call_arguments | conditions)))
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
        t = as_time(t, x_t.device)
        if t.numel() not in (1, len(x_t)):
            raise ValueError(f"`t` has {t.numel()} times; it must be one, or one for each of {len(x_t)} rows")
        t = t.reshape(-1).expand(len(x_t))
        if self.time_input == "steps_left":
            if self.num_steps is None:
                raise ValueError("`num_steps` is missing: this network is told how many steps are left")
            return ((self.num_steps * t - 1).clamp(min=0).float(),)
        value = t if self.time_input == "t" else -torch.log(survival(t, self.noise_schedule))
        return (value.float(),)

    def check(self, x_t: Tensor) -> None:
        """Raises `ValueError` if the ids or their number are not what the network takes."""
        check_tokens("x_t", x_t, self.vocab_size)
        if self.grid_input and self.grid_shape is not None and x_t.shape[1] != self.grid_shape[0] * self.grid_shape[1]:
            raise ValueError(f"`x_t` has length {x_t.shape[1]}; `grid_shape` is {tuple(self.grid_shape)}")
        if self.max_length is not None and x_t.shape[1] > self.max_length:
            raise ValueError(f"`x_t` has length {x_t.shape[1]}; this model takes at most {self.max_length}")

    def clean_logits(self, raw: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """The network's output as logits of p(x_0 | x_t), (B, L, V).

        Raises:
            ValueError: If it is not (B, L, width).
        """
        if raw.dim() != 3 or raw.shape[:2] != x_t.shape:
            raise ValueError(
                f"`model` returned logits of shape {tuple(raw.shape)} for tokens of shape {tuple(x_t.shape)}; they must be "
                "(B, L, V)"
            )
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


@contextmanager
def head_at(head: nn.Module, positions: Tensor, is_grid: bool = False) -> Iterator[None]:
    """As long as it is open the module gets hidden states (B, L, H) at these positions only, bool (B, L), as (R, H); of a grid
    (B, H, height, width) they become (1, H, R, 1). Other threads that call it meanwhile get theirs as they are."""
    owner = threading.get_ident()

    def gather(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != owner:
            return arguments
        hidden, *others = arguments
        hidden = hidden.flatten(2).mT if is_grid else hidden
        if hidden.shape[:-1] != positions.shape:
            shapes = tuple(hidden.shape), tuple(positions.shape)
            raise ValueError(
                f"`head` gets a tensor of shape {shapes[0]}; hidden states of {shapes[1]} positions are needed"
            )
        rows = hidden[positions.to(hidden.device)]
        return rows.mT[None, :, :, None] if is_grid else rows, *others

    with HOOKS:
        handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        with HOOKS:
            handle.remove()


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returns: a tensor, a tuple that starts with it, or an object with `.logits`.

    Raises:
        ValueError: If it is none of these.
    """
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"`model` returned a {type(output).__name__}; it must return logits (B, L, V): a tensor, a tuple that starts with "
            "it, or an object with `.logits`"
        )
    return logits


def rows_of(value: Any, active: Tensor) -> Any:
    """The active rows of a condition: of a tensor, or of the tensors in a dictionary; anything else as it is."""
    if isinstance(value, dict):
        return {name: rows_of(entry, active) for name, entry in value.items()}
    return value[active] if isinstance(value, Tensor) else value
