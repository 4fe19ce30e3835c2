r"""Both ways with diffusers: our schedulers in its pipelines for discrete diffusion, its schedulers in ours.

Our schedulers for uniform noise with one call in a step run in diffusers' `DiffusionGemmaPipeline` as they are:

    pipe.scheduler = AncestralScheduler(vocab_size=V, process="uniform")

Its `LLaDA2Pipeline` speaks to one scheduler, `BlockRefinementScheduler`, and asks it when a block is done. So do the methods
with several calls in a step need somebody who counts calls. [`BlockRefinementAdapter`] gives any of ours that interface. The
other way, [`ForeignScheduler`] gives diffusers' discrete schedulers the contract of this library. Nothing in diffusers is
changed, and both are saved and loaded as schedulers are.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler, ConfigMixin, DiscreteDDIMScheduler, SchedulerMixin
from diffusers import EntropyBoundScheduler as DiffusersEntropyBoundScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput
from torch import Tensor

from discrete_schedulers import schedulers
from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, RowLogits
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, DiscreteScheduler, Grid, ProcessName


def saved_form(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The config of a scheduler with the name of its class, without what diffusers keeps for itself."""
    public = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return {"_class_name": type(scheduler).__name__} | public


def rebuilt(saved: Any, library: Any) -> Any:
    """A scheduler from its saved form; a scheduler itself.

    Raises:
        ValueError: If the form names no scheduler of this library.
    """
    if not isinstance(saved, dict):
        return saved
    kind: Any = getattr(library, str(saved.get("_class_name")), None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not is_scheduler:
        raise ValueError(
            f"`scheduler` has the _class_name {saved.get('_class_name')!r}; it must be a scheduler of {library.__name__}"
        )
    return kind.from_config(saved)


class BlockRefinementAdapter(SchedulerMixin, ConfigMixin):
    """One of our schedulers with the interface of diffusers' `BlockRefinementScheduler`, for its `LLaDA2Pipeline` and
    `DiffusionGemmaPipeline`:

    ```python
    pipe.scheduler = BlockRefinementAdapter(AncestralScheduler(vocab_size=V, mask_token_id=m))
    ```

    Each block is a sample of its own: the first call of a block starts our scheduler anew. `num_inference_steps` counts
    model calls of a block, as it does there; a method with several calls in a step takes as many steps as fit in, and the
    block ends when they are done, or as soon as no mask is left that it could still open. Temperature and all other knobs
    are those of our scheduler's config: what the pipelines' own arguments say of them is not read.

    Args:
        scheduler (`DiscreteScheduler` or `dict`): The scheduler, or its config with `_class_name` as a saved adapter has it.
        block_length (`int`, defaults to 32): Tokens of a block where a call of the pipeline does not say.

    Raises:
        ValueError: If the scheduler is not one of this library, or reads more of a network than such a pipeline asks for.
    """

    order = 1
    check_eos_finished = staticmethod(BlockRefinementScheduler.check_eos_finished)

    @register_to_config
    def __init__(self, scheduler: DiscreteScheduler | dict[str, Any], block_length: int = 32) -> None:
        self.scheduler = rebuilt(scheduler, schedulers)
        if not isinstance(self.scheduler, DiscreteScheduler):
            raise ValueError(f"`scheduler` is a {type(scheduler).__name__}; it must be one of discrete_schedulers")
        if self.scheduler.needs_revealed_logits:
            name = type(self.scheduler).__name__
            raise ValueError(f"`scheduler` is a {name}, which reads logits that these pipelines do not ask for")
        self.register_to_config(scheduler=saved_form(self.scheduler))
        self.num_inference_steps: int | None = None
        self.num_steps: int | None = None
        self.timesteps = torch.arange(1)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        block_length: int | None = None,
    ) -> None:
        """Set what a block is denoised with.

        Args:
            num_inference_steps (`int`): Model calls for a block, at most.
            device (`torch.device`, *optional*): Where `timesteps` lives.
            block_length (`int`, *optional*): Not read: a block says itself how long it is.

        Raises:
            ValueError: If not even one step fits into the calls.
        """

        def calls(num_steps: int) -> int:
            return len(self.scheduler.call_times(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)))

        fitting = [n for n in range(1, num_inference_steps + 1) if calls(n) <= num_inference_steps]
        if not fitting:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}; one step of {type(self.scheduler).__name__} takes {calls(1)}"
            )
        self.num_inference_steps, self.num_steps = num_inference_steps, fitting[-1]
        self.timesteps = torch.arange(num_inference_steps, device=device)
        self.start_block()

    def start_block(self) -> None:
        """Make our scheduler ready for a new sample.

        Raises:
            ValueError: If `set_timesteps` was not called.
        """
        if self.num_steps is None:
            raise ValueError("`set_timesteps` has to be called before `step`")
        self.scheduler.set_timesteps(self.num_steps, self.timesteps.device)
        self.call, self.is_done = 0, False

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
        **ignored: Any,
    ) -> BlockRefinementSchedulerOutput | tuple:
        """The next call of our scheduler in this block.

        Args:
            model_output (`torch.Tensor` of shape `(B, L, V)`): Logits of log p(x_0 | x_t) for the block.
            timestep (`int` or `torch.Tensor`): 0 in the first call of a block, anything else later: calls are counted here.
            sample (`torch.Tensor` of shape `(B, L)`): Tokens of the block, int64.
            mask_token_id (`int`, *optional*): The mask's id that the pipeline uses; `None` for uniform noise.
            prompt_mask (`torch.Tensor` of shape `(L,)`, *optional*): Bool; positions that are given and stay.
            generator (`torch.Generator`, *optional*): Source of randomness.
            return_dict (`bool`, defaults to `True`): Return diffusers' `BlockRefinementSchedulerOutput` instead of a tuple.
            **ignored: Temperature, thresholds and what else the pipelines say: knobs of our scheduler's config.

        Returns:
            `BlockRefinementSchedulerOutput` or `tuple`: Opened positions are `transfer_index`, other changes
            `editing_transfer_index`.

        Raises:
            ValueError: If the pipeline's mask is not the scheduler's, or the method asks for inputs of the network that such
                a pipeline does not pass.
        """
        ours = self.scheduler
        if mask_token_id != ours.config.mask_token_id:
            raise ValueError(f"`mask_token_id` is {mask_token_id}, but `scheduler` has {ours.config.mask_token_id}")
        if int(timestep) == 0:
            self.start_block()
        given = torch.zeros_like(sample, dtype=torch.bool)
        if prompt_mask is not None:
            given |= prompt_mask.to(sample.device)
        after = sample
        if self.call < len(ours.timesteps):
            more = ours.model_inputs(self.call, sample, given, generator)
            if more:
                raise ValueError(f"`scheduler` is a {type(ours).__name__}; its network needs {sorted(more)}")
            after = ours.step(model_output, self.call, sample, generator=generator).prev_sample
            after = torch.where(given, sample, after)
        self.call += 1
        self.is_done = self.call >= len(ours.timesteps)
        changed, was_mask = after != sample, torch.zeros_like(sample, dtype=torch.bool)
        if mask_token_id is not None:
            was_mask = sample == mask_token_id
            self.is_done |= not ours.revises_tokens and not bool((after == mask_token_id).any())
        log_p = model_output.float().log_softmax(-1).gather(-1, after[..., None]).squeeze(-1)
        output = BlockRefinementSchedulerOutput(
            prev_sample=after,
            transfer_index=changed & was_mask,
            editing_transfer_index=changed & ~was_mask,
            sampled_tokens=after,
            sampled_probs=log_p.exp(),
            pred_logits=model_output,
        )
        return output if return_dict else tuple(output.values())

    def check_block_should_continue(self, *, finished: Tensor, **ignored: Any) -> bool:
        """Whether the block has calls left: not so where all rows (B,) are `finished`. The rest of what the pipeline says
        is known here."""
        return not (self.is_done or bool(finished.all()))


class Calls(NamedTuple):
    """How a scheduler of diffusers is called.

    Args:
        processes (`tuple[str, ...]`): The noise that it is for.
        knobs (`tuple[str, ...]`): What of our config its `step` takes.
    """

    processes: tuple[str, ...]
    knobs: tuple[str, ...]


FOREIGN: dict[type, Calls] = {
    BlockRefinementScheduler: Calls(("absorbing", "uniform"), ("mask_token_id", "temperature", "top_p")),
    DiscreteDDIMScheduler: Calls(("uniform",), ("temperature",)),
    DiffusersEntropyBoundScheduler: Calls(("uniform",), ()),
    AmusedScheduler: Calls(("absorbing",), ()),
}


class ForeignScheduler(DiscreteScheduler):
    """A discrete scheduler of diffusers behind the contract of this library, so that it runs in our pipeline. Assigning one
    to a pipeline wraps it:

    ```python
    pipe.scheduler = diffusers.BlockRefinementScheduler(threshold=0.9)
    ```

    Their `step` does the work with their draws. The whole sample is one block. A list of generators runs the rows one by
    one. Not repaired: an `EntropyBoundScheduler` leaves random tokens where it has not accepted any in the last step, and an
    `AmusedScheduler` masks a token again in a row that has none to open.

    Args:
        scheduler (`SchedulerMixin` or `dict`): diffusers' `BlockRefinementScheduler`, `DiscreteDDIMScheduler` (without
            `corrector_steps`), `EntropyBoundScheduler` or `AmusedScheduler`; or its config with `_class_name`.
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): That of the network.
        grid (`str`, defaults to `"uniform"`): Times that the network is told. An `AmusedScheduler` says it itself, by its
            `masking_schedule`.
        temperature (`float`, defaults to 1.0): For those that take it in `step`. 0, the best token, is the default there.
        top_p (`float`, defaults to 1.0): For a `BlockRefinementScheduler`.
        coefficients (`dict`, *optional*): Learned floats by step budget: `"times"`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If the scheduler is not one of these, or a knob is set that it does not take.
    """

    revises_tokens = True

    @register_to_config
    def __init__(
        self,
        scheduler: SchedulerMixin | dict[str, Any],
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.theirs = rebuilt(scheduler, diffusers)
        kinds = [kind for kind in FOREIGN if isinstance(self.theirs, kind)]
        name = type(self.theirs).__name__
        if not kinds:
            known = ", ".join(kind.__name__ for kind in FOREIGN)
            raise ValueError(f"`scheduler` is a {name}; of diffusers' schedulers these are for tokens: {known}")
        self.form = FOREIGN[kinds[0]]
        if process not in self.form.processes:
            raise ValueError(f"`process` is {process!r}; diffusers' {name} is for {' and '.join(self.form.processes)}")
        for knob, value in (("temperature", temperature), ("top_p", top_p)):
            if value != 1 and knob not in self.form.knobs:
                raise ValueError(f"`{knob}` is {value}, but diffusers' {name} does not take it: it must be 1")
        if isinstance(self.theirs, DiscreteDDIMScheduler) and self.theirs.config.corrector_steps:
            raise ValueError("`scheduler` has `corrector_steps`: take GibbsCorrectorScheduler of discrete_schedulers")
        if isinstance(self.theirs, AmusedScheduler):
            if self.theirs.config.mask_token_id != mask_token_id:
                raise ValueError(
                    f"`mask_token_id` is {mask_token_id}, but `scheduler` has {self.theirs.config.mask_token_id}"
                )
            self.register_to_config(grid="cosine" if self.theirs.config.masking_schedule == "cosine" else "uniform")
        self.register_to_config(scheduler=saved_form(self.theirs))
        self.prepare()

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """As for every scheduler; theirs are made new for each sample, since some remember what they did."""
        super().set_grid(times, device)
        self.running: list[Any] = []  # one for the batch, or one for each row that has a generator of its own

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> None:
        """`None`: they read all logits. See [`DiscreteScheduler.positions`]."""

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Not possible: raises `ValueError`."""
        raise ValueError("`model_output` has chosen rows only; schedulers of diffusers need all logits")

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """What their `step` makes of the sample. See [`DiscreteScheduler.move_all`]."""
        if not isinstance(generator, list):
            return self.their_step(0, logits, index, sample, generator)
        if len(generator) != len(sample):
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but the batch has {len(sample)} rows: one per row"
            )
        moved = [self.their_step(b, logits[b, None], index, sample[b, None], generator[b]) for b in range(len(sample))]
        return torch.cat([sample[:0], *moved])

    def their_step(
        self, number: int, logits: Tensor, index: int, sample: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """`sample` after the step `index` of their scheduler of this number."""
        num_steps = len(self.timesteps)
        while len(self.running) <= number:
            theirs = copy.deepcopy(self.theirs)
            length = {"block_length": sample.shape[1]} if isinstance(theirs, BlockRefinementScheduler) else {}
            theirs.set_timesteps(num_steps, device=sample.device, **length)
            self.running.append(theirs)
        knobs = {name: self.config[name] for name in self.form.knobs}
        # aMUSEd's steps are named by what is left of them, the others' by their number
        name = num_steps - 1 - index if isinstance(self.theirs, AmusedScheduler) else index
        return self.running[number].step(logits, name, sample, generator=generator, **knobs).prev_sample
