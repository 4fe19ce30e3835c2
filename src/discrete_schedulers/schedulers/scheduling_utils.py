r"""What every scheduler of the library shares: the contract, the time grids, the checks, and one `step`.

`step` asks the scheduler which positions it wants to read (`positions`) and hands it their logits (`move_rows`), or all of
them (`move_all`) where it wants no choice. Most schedulers are [`FactorisedScheduler`]s: given the positions that move,
each token has its own law. They say two things. `transition` is the law of x_s given x_t, as a pure function; `positions`
names the positions that move before the network has run, or is `None` where that needs the logits. Drawing at the named
positions from the clean law, or everywhere from the transition law, is then the same law.

Times are float64 in (0, 1], decreasing from 1, one for each model call; the grid behind them ends at exactly 0.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import numbers
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import BaseOutput
from torch import Tensor

from discrete_schedulers.bundled import bundled_folder, is_bundled
from discrete_schedulers.information import InformationCurve, optimal_times
from discrete_schedulers.patience import out_of_reach, patiently
from discrete_schedulers.processes import (
    LEAST_TIME,
    AbsorbingProcess,
    Process,
    UniformProcess,
    check_tokens,
    indicator,
)
from discrete_schedulers.sampling import (
    Generators,
    RowLogits,
    bernoulli_subset,
    check_finite,
    draw_from_law,
    draw_others,
    draw_states,
    draw_tokens,
    on_host,
    spread_subset,
    uniform_subset,
    uniforms,
)

ProcessName: TypeAlias = Literal["absorbing", "uniform"]
Grid: TypeAlias = Literal["uniform", "cosine", "optimal", "learned"]
Unmasking: TypeAlias = Literal["counts", "bernoulli"]
Order: TypeAlias = Literal["random", "spread"]
Selection: TypeAlias = Literal["random", "lowest_margin", "lowest_max_probability", "lowest_current_probability"]
Tempered: TypeAlias = Literal["leave_one_out", "denoiser"]
Coefficients: TypeAlias = dict[str, dict[str, list[float]]]

CHOICES = {
    "process": ("absorbing", "uniform"),
    "noise_schedule": ("loglinear", "linear", "cosine", "geometric"),
    "grid": ("uniform", "cosine", "optimal", "learned"),
    "unmasking": ("counts", "bernoulli"),
    "order": ("random", "spread"),
    "draw": ("exact", "one_stage_float32", "one_stage_1e-6"),
    "scale": ("score", "log_score"),
    "jumps": ("first", "reject"),
    "hazard": ("exact", "frozen"),
    "rounding": ("up", "down"),
    "strength": ("cap", "rescale", "psi", "forward_backward", "loop", "learned"),
    "density": ("schedule", "beta"),
    "tempered": ("leave_one_out", "denoiser"),
    "event_share": ("grid", "equal", "learned"),
    "selection": ("random", "lowest_margin", "lowest_max_probability", "lowest_current_probability"),
    "rule": ("threshold", "factor"),
    "proxy": ("entropy", "confidence", "margin"),
    "pattern": ("farthest", "dilated", "van_der_corput", "halton"),
    "score": ("confidence", "margin", "entropy", "random"),
    "score_law": ("model", "tempered"),
    "mask_schedule": ("cosine", "linear", "square", "cubic", "root", "log", "exp", "grid"),
}
# what an annotation of a constructor's argument says of its value
KINDS: dict[str, tuple[type, str]] = {
    "int": (numbers.Integral, "an integer"),
    "float": (numbers.Real, "a finite number"),
    "bool": (bool, "True or False"),
}
ALLOWED: dict[str, Callable[[float], bool]] = {  # values of a knob; that they are finite is checked before
    "numbers of at least 0": lambda value: value >= 0,
    "positive numbers": lambda value: value > 0,
    "numbers in [0, 1]": lambda value: 0 <= value <= 1,
    "numbers in (0, 1)": lambda value: 0 < value < 1,
    "numbers in (0, 1]": lambda value: 0 < value <= 1,
}
# learned blocks whose length is not that of the steps: a float for each position, component, or token at each position
OTHER_LENGTHS = ("order", "mixture_weight", "mixture_shift")
# all learned blocks of all schedulers: another one is of a newer version, or misspelt
BLOCKS = tuple(
    "times counts events scale rate contrast inverse_temperature top_p gate_a gate_b remask order mixture_weight mixture_shift "
    "accept_threshold choice_temperature corrector_step divergence_free entropy_bound factor kappa kl_threshold "
    "remask_mass remask_threshold score_temperature selection_temperature sigma_share stochasticity theta threshold".split()
)


@dataclass
class DiscreteSchedulerOutput(BaseOutput):
    """Output of a scheduler's `step`.

    Args:
        prev_sample (`torch.Tensor` of shape `(B, L)`): Tokens x_s at the next, less noisy time, int64.
        pred_original_sample (`torch.Tensor` of shape `(B, L)`, *optional*): Most probable clean tokens, int64. `None` where
            only chosen rows were read; `pred_logits` has it where all logits were passed.
        pred_logits (`torch.Tensor` of shape `(B, L, V)`, *optional*): Logits of the clean law that was drawn from, after
            temperature and top-p. Where these are 1 it is `model_output` itself, whose mask column is not read. `None` where
            only chosen rows were passed.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    pred_logits: Tensor | None = None


class LaterOutput(DiscreteSchedulerOutput):
    """The same, where what is as large as `model_output`, or takes another look at it, is worked out when it is first asked
    for: `partial`s take the place of such values until then."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = vars(self)[item.name]  # not asked for
            if value is not None:
                self[item.name] = value

    def __getattribute__(self, name: str) -> Any:
        if name in ("items", "values"):
            for key in self:
                getattr(self, key)
        value = super().__getattribute__(name)
        if isinstance(value, partial):
            value = value()
            setattr(self, name, value)
        return value


class CheckedConfigMixin(ConfigMixin, ABC):
    """diffusers' config, checked: for every scheduler of this library."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, which passes over an argument that the class does not have.

        Raises:
            ValueError: If there is such an argument.
        """
        if not return_unused_kwargs:
            unknown = sorted(
                name for name in kwargs if name not in kinds_of_arguments(cls) and not name.startswith("_")
            )
            if unknown:
                allowed = ", ".join(repr(name) for name in kinds_of_arguments(cls) if name != "self")
                raise ValueError(f"`{unknown[0]}` is no argument of {cls.__name__}; allowed: {allowed}")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """As in diffusers, and checked: the config is what all else relies on, so nothing enters it but numbers, lists and
        tables of the kinds that the constructor names, detached from the caller's. A value set after `__init__` survives
        `from_config`: diffusers keeps such a key on its list of defaults and drops it there.

        Raises:
            ValueError: If a value is of another kind.
        """
        kwargs |= checked_values(type(self), kwargs)
        if "_use_default_values" in kwargs:  # diffusers' order is that of a set: equal configs would differ
            kwargs["_use_default_values"] = sorted(kwargs["_use_default_values"])
        super().register_to_config(**kwargs)
        defaults = dict(self._internal_dict).get("_use_default_values")
        if defaults and "_use_default_values" not in kwargs:
            super().register_to_config(_use_default_values=[key for key in defaults if key not in kwargs])


def check_folder(name: str, folder: Path, subfolder: str | None) -> None:
    """Raises `OSError` if a model's folder has no scheduler_config.json there; says which of its subfolders have one."""
    if (folder / (subfolder or "") / SCHEDULER_CONFIG_NAME).is_file():
        return
    where = repr(name) if subfolder is None else f"the subfolder {subfolder!r} of {name!r}"
    held = sorted(path.parent.name for path in folder.glob(f"*/{SCHEDULER_CONFIG_NAME}"))
    hint = f"; pass `subfolder`: {' or '.join(map(repr, held))}" if held else ""
    raise OSError(f"no file named {SCHEDULER_CONFIG_NAME} in {where}{hint}")


class DiscreteScheduler(SchedulerMixin, CheckedConfigMixin):
    """Abstract base. A concrete class has an `__init__` with `@register_to_config` that ends in `self.prepare()`, and
    `positions`, `move_rows` and `move_all`: or is a [`FactorisedScheduler`], which needs `positions` and `transition`.

    Class attributes:
        order (`int`): Model calls for each step, and order of convergence where that is declared.
        processes (`tuple[str, ...]`): The processes it is for.
        revises_tokens (`bool`): Whether a token that is not a mask may become another one, or a mask, in absorbing noise.
        chooses_by_logits (`bool`): Whether `positions` names those to choose from, and the logits decide which of them move.
        opens_by_chance (`bool`): Whether it has `open_probability`: P(a mask opens in a call), which no logits are needed for.
        needs_revealed_logits (`bool`): Whether it reads the law of revealed tokens given the others: see [`NetworkDenoiser`].
        draws_latent (`bool`): Whether the tokens of a step depend on each other through a latent of the row.
    """

    order = 1
    init_noise_sigma = 1.0  # discrete priors have no scale; diffusers' pipelines multiply by it
    processes: tuple[str, ...] = ("absorbing", "uniform")
    revises_tokens = False
    needs_revealed_logits = False
    chooses_by_logits = False
    draws_latent = False
    opens_by_chance = False
    grid_blocks: tuple[str, ...] = ("times",)  # of `coefficients`: those that can be its grid
    learned_block: str | None = None  # the block of `coefficients` without which a budget cannot be run
    learned_knobs: Mapping[str, str] = {}  # numbers of the constructor that can be learned for each step: see `ALLOWED`

    @classmethod
    def _get_compatibles(cls) -> list[type[DiscreteScheduler]]:
        # diffusers looks names up in its own package only
        library = vars(sys.modules["discrete_schedulers.schedulers"]).values()
        concrete = [c for c in library if isinstance(c, type) and issubclass(c, DiscreteScheduler)]
        return [c for c in concrete if not inspect.isabstract(c)]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, which passes over an argument that the class does not have. Of [`DiscreteScheduler`] itself, as its
        `from_pretrained`, it gives the class that the config names. A learned grid that only the other class has
        ([`LearnedScheduler`]'s counts) stays behind, and is there again on the way back.

        Raises:
            ValueError: If there is such an argument, or the config names no scheduler of this version.
        """
        if not inspect.isabstract(cls):
            if isinstance(config, Mapping) and config.get("_class_name") != cls.__name__ and "grid" not in kwargs:
                blocks = {name for budget in (config.get("coefficients") or {}).values() for name in budget}
                if "counts" in blocks and "times" not in blocks and config.get("grid") in ("learned", "uniform", None):
                    config = {**config, "grid": "learned" if "counts" in cls.grid_blocks else "uniform"}
            return super().from_config(config, return_unused_kwargs, **kwargs)
        kind = config.get("_class_name") if isinstance(config, Mapping) else None
        known = {c.__name__: c for c in cls.loadable()}
        if kind not in known:
            raise ValueError(f"`config` is of the class {kind!r}; known: {', '.join(sorted(known))}")
        return known[kind].from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def loadable(cls) -> list[type[DiscreteScheduler]]:
        """The classes that a scheduler_config.json may be of: all concrete ones, and the one around diffusers' schedulers."""
        return [*cls._get_compatibles(), sys.modules["discrete_schedulers"].ForeignScheduler]

    @property
    def compatibles(self) -> list[type[DiscreteScheduler]]:
        """The classes that `from_config` takes this scheduler's config for: those for its process."""
        return [cls for cls in self._get_compatibles() if self.config.process in cls.processes]

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, which says of a Hub that cannot be reached that the repository does not have the file, and loads the
        config of any class as one of this; also of a bundled model, by its name.

        Raises:
            OSError: If there is no config, or the Hub cannot be reached.
            ValueError: If it is not the config of a scheduler that this version has, or no such model is bundled.
        """
        name, load = str(pretrained_model_name_or_path), super().load_config
        if Path(name).is_dir():
            check_folder(name, Path(name), kwargs.get("subfolder"))
        try:
            if is_bundled(name):
                with bundled_folder(name) as folder:
                    check_folder(name, Path(folder), kwargs.get("subfolder"))
                    loaded = load(folder, *args, **kwargs)
            else:
                loaded = patiently(lambda: load(pretrained_model_name_or_path, *args, **kwargs))
            cls.check_loaded(name, loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded
        except OSError as error:
            if isinstance(error.__context__, FileNotFoundError):  # huggingface_hub: not reached, and not in its cache
                raise OSError(
                    f"the Hub {out_of_reach(error)}, and the scheduler {name!r} is not in the local cache"
                ) from error
            raise

    @classmethod
    def check_loaded(cls, name: str, config: Any) -> None:
        """Raises `ValueError` if this is no config, or that of a class which is not here: one of a newer version. Warns where
        learned floats are another class's, which may read none of them."""
        if not isinstance(config, Mapping):
            raise ValueError(f"scheduler_config.json of {name!r} holds {config!r}; it must be a JSON object")
        kind, known = config.get("_class_name", cls.__name__), sorted(c.__name__ for c in cls.loadable())
        if kind not in (*known, cls.__name__):
            raise ValueError(
                f"scheduler_config.json of {name!r} is of {kind!r}, which this version of discrete_schedulers does not have; "
                f"known: {', '.join(known)}"
            )
        if kind != cls.__name__ and not inspect.isabstract(cls) and config.get("coefficients"):
            warnings.warn(
                f"scheduler_config.json of {name!r} holds learned floats of {kind}, of which {cls.__name__} reads those that "
                "it has too, perhaps none; DiscreteScheduler.from_pretrained gives the class that was saved",
                stacklevel=5,  # the line that calls from_pretrained
            )

    def prepare(self) -> None:
        """Check that the values of the config fit each other, and set the state that `step` reads.

        Raises:
            ValueError: If a value is not allowed.
        """
        config = self.config
        for name, allowed in CHOICES.items():
            if name in config and config[name] not in allowed:
                raise ValueError(f"`{name}` is {config[name]!r}; allowed: {', '.join(map(repr, allowed))}")
        if config.temperature < 0:
            raise ValueError(f"`temperature` is {config.temperature}; it must be positive, or 0 for the best token")
        if not 0 < config.top_p <= 1:
            raise ValueError(f"`top_p` is {config.top_p}; allowed are numbers in (0, 1]")
        if config.process not in self.processes:
            known = ", ".join(map(repr, self.processes))
            raise ValueError(f"`process` is {config.process!r}; {type(self).__name__} is for {known}")
        self.noise_process: Process
        if config.process == "absorbing":
            self.noise_process = AbsorbingProcess(config.vocab_size, config.mask_token_id, config.noise_schedule)
        else:
            if config.mask_token_id is not None:
                raise ValueError("`mask_token_id` must be None for the uniform process: it has no mask")
            self.noise_process = UniformProcess(config.vocab_size, config.noise_schedule)
        # diffusers drops defaults in `from_config`, but some classes have another default process, and it takes arguments
        # that were passed by position for defaults too.
        self.register_to_config(
            vocab_size=config.vocab_size, mask_token_id=config.mask_token_id, process=config.process
        )
        for name, values in self.learned_knobs.items():
            check_knob(config, name, values)
        learned = (config.learned_for or {}).get("vocab_size", config.vocab_size)
        if learned != config.vocab_size:
            raise ValueError(
                f"`coefficients` were learned for `vocab_size` {learned}, but this scheduler has {config.vocab_size}: they "
                "must be equal"
            )
        if config.grid == "optimal" and config.process != "absorbing":
            raise ValueError(
                "`grid='optimal'` is for the absorbing process: an information curve counts revealed tokens"
            )
        if config.grid == "optimal" and config.information_curve is None:
            raise ValueError("`grid='optimal'` needs `information_curve`: see discrete_schedulers.information_curve")
        if config.grid == "learned" and config.coefficients is None:
            raise ValueError("`grid='learned'` needs `coefficients` with a block 'times' for each step budget")
        self.num_inference_steps: int | None = None
        self.set_grid(torch.linspace(1, 0, 2, dtype=torch.float64))

    # Time

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """Set the state that follows from the grid (N + 1,)."""
        self.times = times
        self.calls = self.call_times(times)  # on the CPU: `step_index` reads it without waiting for a device
        self.timesteps = self.calls.to(device)
        self.last_call: int | None = None  # tells the calls at one time apart
        self.openings: Tensor | None = None  # `open_probability` of each call, worked out when it is needed
        self.jumps: Tensor | None = None  # `jump_intensities` of each call, (calls, 3), likewise

    def call_times(self, times: Tensor) -> Tensor:
        """The time of each model call, in order, on a grid (N + 1,): one for each step. Methods with more calls say so."""
        return times[:-1]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps`, one for each model call, and the grid behind it, `times` (N + 1,), from 1 to exactly 0, float64.

        Args:
            num_inference_steps (`int`): Number N of steps, 1 or more; also of model calls, for methods with one in a step.
            device (`torch.device`, *optional*): Where `timesteps` lives. `times` stays on the CPU.

        Raises:
            ValueError: If N is not a positive integer, or no coefficients are known for it.
        """
        steps = number_of_steps(num_inference_steps)
        if self.learned_block is not None and self.config.coefficients is not None:
            self.learned(self.learned_block, steps)
        for name in self.learned_knobs:
            if self.is_learned(name):
                self.learned(name, steps)
        self.set_grid(self.time_grid(steps), device)
        self.num_inference_steps = steps
        if self.opens_by_chance and isinstance(self.noise_process, AbsorbingProcess):
            self.chance(0)
        elif isinstance(self.noise_process, UniformProcess):
            self.jumps_at(0)

    def time_grid(self, num_inference_steps: int) -> Tensor:
        """The grid of N + 1 times that the config asks for."""
        even = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        config, grid = self.config, self.config.grid
        if grid == "uniform":
            return even
        if grid == "cosine":  # MaskGIT, MD4: masked share cos(pi / 2 * k / N)
            times = torch.cos(math.pi / 2 * (1 - even))
            times[-1] = 0.0
            return times
        if grid == "optimal":
            masked_share = optimal_times(InformationCurve.from_config(config.information_curve), num_inference_steps)
            return self.noise_process.time_of_noise(masked_share)
        return torch.tensor(self.learned("times", num_inference_steps), dtype=torch.float64)

    def budget(self, num_inference_steps: int) -> dict[str, list[float]]:
        """The learned blocks of a step budget.

        Raises:
            ValueError: If there are none.
        """
        budgets = self.config.coefficients or {}
        blocks = budgets.get(str(num_inference_steps))
        if blocks is None:
            known = ", ".join(sorted(budgets, key=int)) or "none"
            raise ValueError(
                f"no coefficients for `num_inference_steps` {num_inference_steps}; learned budgets: {known}"
            )
        return blocks

    def learned(self, name: str, num_inference_steps: int) -> list[float]:
        """The learned block `name` of a step budget.

        Raises:
            ValueError: If there is none.
        """
        blocks = self.budget(num_inference_steps)
        if name not in blocks:
            raise ValueError(
                f"coefficients for {num_inference_steps} steps have no '{name}'; they have: {sorted(blocks)}. Those of another "
                "scheduler are left out by `coefficients=None`"
            )
        return blocks[name]

    def is_learned(self, name: str) -> bool:
        """Whether `coefficients` have a block `name` for any budget."""
        return any(name in blocks for blocks in (self.config.coefficients or {}).values())

    def per_step(self, name: str, index: int) -> float:
        """One of `learned_knobs` in the step `index`: learned, or else the constructor's number.

        Raises:
            ValueError: If it is learned for other budgets than this one.
        """
        return self.learned(name, len(self.times) - 1)[index] if self.is_learned(name) else self.config[name]

    def step_index(self, timestep: int | float | Tensor) -> int:
        """The place in `timesteps` that a time out of them, or an int index, names. A time that stands there several times
        names its calls in turn.

        Raises:
            ValueError: If it names none.
        """
        return call_named(timestep, self.calls, self.last_call)

    # diffusers' scheduler interface

    def scale_model_input(self, sample: Tensor, timestep: int | float | Tensor | None = None) -> Tensor:
        """Returns `sample`: tokens are not scaled."""
        return sample

    def sample_prior(
        self, shape: tuple[int, ...], generator: Generators = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Tokens at t = 1: all masks, or uniformly random ones, int64, of shape (B, L).

        Raises:
            ValueError: If `shape` is not two whole numbers.
        """
        sides = list(shape) if isinstance(shape, tuple | list) else []
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 0 for side in sides):
            raise ValueError(f"`shape` is {shape!r}; it must be (B, L), two integers of at least 0")
        return self.noise_process.prior(shape, generator, device)

    def add_noise(
        self,
        original_samples: Tensor,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        *,
        generator: Generators = None,
    ) -> Tensor:
        """Draw x_t ~ q(x_t | x_0).

        Args:
            original_samples (`torch.Tensor` of shape `(B, L)`): Clean tokens, int64.
            noise (`torch.Tensor` of shape `(B, L)`, *optional*): Int64 tokens of the prior to fall to. Drawn when `None`;
                a floating tensor is taken for diffusers' sake and not read, since tokens have no Gaussian noise.
            timesteps (`torch.Tensor` of shape `(B,)` or `(1,)`): Times in [0, 1], or int step indices.
            generator (`torch.Generator`, `list[torch.Generator]`, *optional*): Source of randomness.

        Returns:
            `torch.Tensor` of shape `(B, L)`: Noisy tokens, int64.

        Raises:
            ValueError: If `timesteps` is missing or outside [0, 1].
        """
        if timesteps is None:
            raise ValueError("`timesteps` is required: times in [0, 1], or step indices")
        t = timesteps.reshape(-1)
        if len(t) not in (1, len(original_samples)):
            raise ValueError(
                f"`timesteps` has {len(t)} entries; it must have one, or one for each of {len(original_samples)} rows"
            )
        if not t.is_floating_point():
            t = torch.stack([self.calls[self.step_index(index)] for index in t])
        t = t.double().to(original_samples.device).expand(len(original_samples))
        tokens = None if noise is None or noise.is_floating_point() else noise
        return self.noise_process.add_noise(original_samples, t, generator, tokens)

    @property
    def absorbing_process(self) -> AbsorbingProcess:
        """The process, for what only an absorbing one has.

        Raises:
            ValueError: If the process is uniform.
        """
        if not isinstance(self.noise_process, AbsorbingProcess):
            raise ValueError(f"{type(self).__name__} has the uniform process: there are no masks to open")
        return self.noise_process

    def goes_by_blocks(self, block_size: int) -> bool:
        """Whether blocks of this size are filled from left to right, each after all before it are finished and final: what a
        network needs whose attention goes by blocks. Holds for runs with at least as many calls as blocks of `block_length`."""
        block_length = self.config.get("block_length")
        return block_length is not None and block_size % block_length == 0 and not self.revises_tokens

    # The step

    def model_inputs(
        self,
        timestep: int | float | Tensor,
        sample: Tensor,
        frozen: Tensor | None = None,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """What the network of this method is told in a call beside tokens and time: keyword arguments, batch first. Nothing,
        but for methods whose state is more than tokens. Asked before `positions`.

        Args:
            timestep (`float`, `int` or `torch.Tensor`): A time out of `timesteps`, or an index.
            sample (`torch.Tensor` of shape `(B, L)`): Tokens x_t, int64.
            frozen (`torch.Tensor` of shape `(B, L)`, *optional*): Bool; tokens that are known and will be put back.
            generator (`torch.Generator`, `list[torch.Generator]`, *optional*): Source of randomness.
        """
        return {}

    @abstractmethod
    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """The positions whose logits `step` reads, bool (B, L), known before the network has run: those that move, or those
        to choose from. `None`: all of them.

        Args:
            timestep (`float`, `int` or `torch.Tensor`): A time out of `timesteps`, or an index.
            sample (`torch.Tensor` of shape `(B, L)`): Tokens x_t, int64.
            generator (`torch.Generator`, `list[torch.Generator]`, *optional*): Source of randomness.
        """

    @abstractmethod
    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """x_s, int64 (B, L), from the logits at `positions`, in the call `index`."""

    @abstractmethod
    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """x_s, int64 (B, L), from all logits (B, L, V), in the call `index`; where `positions` is `None`."""

    def step(
        self,
        model_output: Tensor | RowLogits,
        timestep: int | float | Tensor,
        sample: Tensor,
        *,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DiscreteSchedulerOutput | tuple:
        """Draw x_s given x_t.

        Args:
            model_output (`torch.Tensor` of shape `(B, L, V)`, or `RowLogits`): Logits of log p(x_0 | x_t), of all positions
                or of those that `positions` has named for this very step.
            timestep (`float`, `int` or `torch.Tensor`): A time out of `timesteps`, or a step index.
            sample (`torch.Tensor` of shape `(B, L)`): Tokens x_t, int64.
            generator (`torch.Generator`, `list[torch.Generator]`, *optional*): One for the batch, or one per row.
            return_dict (`bool`, defaults to `True`): Return [`DiscreteSchedulerOutput`] instead of a tuple.

        Returns:
            [`DiscreteSchedulerOutput`] or `tuple`: `prev_sample` first.

        Raises:
            ValueError: If shapes, ids or logits are not allowed.
        """
        self.check_step(model_output, sample)
        index = self.step_index(timestep)
        output = DiscreteSchedulerOutput(sample)
        if isinstance(model_output, RowLogits):
            prev_sample = self.move_rows(model_output, index, sample, generator)
        else:
            chosen = self.positions(timestep, sample, generator)
            output = self.guesses(model_output, index, sample, chosen is None)
            if chosen is None:
                prev_sample = self.move_all(model_output, index, sample, generator)
            else:
                prev_sample = self.move_rows(RowLogits.chosen(model_output, chosen), index, sample, generator)
        self.last_call = index
        output.prev_sample = prev_sample
        return output if return_dict else (output.prev_sample, output.pred_original_sample, output.pred_logits)

    def guesses(self, logits: Tensor, index: int, sample: Tensor, with_tokens: bool) -> DiscreteSchedulerOutput:
        """`pred_logits` and, `with_tokens`, `pred_original_sample` of the call `index`; `prev_sample` is `sample` still."""
        is_shaped = self.is_shaped(index)
        if torch.compiler.is_compiling() or not (is_shaped or with_tokens):
            shaped = self.shaped_logits(logits, index, sample) if is_shaped else logits
            return DiscreteSchedulerOutput(sample, self.best_tokens(shaped) if with_tokens else None, shaped)
        now = copy.copy(self)  # the next `set_timesteps` sets other times
        later: Any = partial(now.shaped_logits, logits, index, sample) if is_shaped else logits
        return LaterOutput(sample, partial(now.best_of, later) if with_tokens else None, later)

    def best_of(self, logits: Tensor | partial[Tensor]) -> Tensor:
        """`best_tokens` of logits, or of what makes them."""
        return self.best_tokens(logits() if isinstance(logits, partial) else logits)

    def check_step(self, model_output: Tensor | RowLogits, sample: Tensor) -> None:
        """Raises `ValueError` if the arguments of `step` do not fit each other or the config."""
        width = self.config.vocab_size
        check_tokens("sample", sample, width)
        logits = model_output.source if isinstance(model_output, RowLogits) else model_output
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(f"`model_output` is {kind}; it must be a tensor of floating-point logits")
        if isinstance(model_output, RowLogits):
            if model_output.positions.shape != sample.shape:
                shapes = tuple(model_output.positions.shape), tuple(sample.shape)
                raise ValueError(f"`model_output.positions` has shape {shapes[0]}, but `sample` has {shapes[1]}")
            number = int(model_output.positions.sum()) if on_host(sample) else len(model_output)
            shape: tuple[int, ...] = (len(model_output), model_output.source.shape[-1])
            expected: tuple[int, ...] = (number, width)
        else:
            shape, expected = tuple(model_output.shape), (*sample.shape, width)
        if shape != expected:
            raise ValueError(f"`model_output` has shape {shape}, but {expected} is needed: (..., vocab_size)")

    def clean_tokens(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """A token for each row, (R,), from the clean law that the call `index` draws from: see `shaped_logits`."""
        if not self.is_shaped(index):
            return draw_tokens(rows, generator, without=self.config.mask_token_id)
        tokens = rows.pick(sample)
        return draw_tokens(rows, generator, lambda logits, part: self.shaped_logits(logits, index, tokens[part]))

    def is_shaped(self, index: int) -> bool:
        """Whether the call `index` draws from another law than the network's own."""
        return self.config.temperature != 1 or self.config.top_p != 1

    def token_logits(self, logits: Tensor) -> Tensor:
        """Logits (..., V) of the clean law that is drawn from, after temperature and top-p: see the function of this name."""
        return token_logits(logits, self.config.mask_token_id, self.config.temperature, self.config.top_p)

    def shaped_logits(self, logits: Tensor, index: int, sample: Tensor) -> Tensor:
        """Logits of the clean law that the call `index` draws from: `token_logits`; with uniform noise temperature and top-p
        act on the leave-one-out law, and what x_t itself says stays as it is, unless the config has `tempered="denoiser"`.

        Args:
            logits (`torch.Tensor` of shape `(..., V)`): Logits of log p(x_0 | x_t), of all positions or of some.
            index (`int`): Place of the call in `timesteps`.
            sample (`torch.Tensor` of shape `(...)`): The token x_t of each of them.
        """
        process, config = self.noise_process, self.config
        itself = config.get("tempered", "leave_one_out") == "denoiser"
        if not self.is_shaped(index) or itself or not isinstance(process, UniformProcess):
            return self.token_logits(logits)
        own = own_logits(process, logits, sample, self.calls[index])
        return self.token_logits(logits.double() - own) + own

    def shaped_law(self, logits: Tensor, index: int, sample: Tensor) -> Tensor:
        """The law of `shaped_logits`, float64; arguments as there."""
        return self.shaped_logits(logits, index, sample).double().softmax(-1)

    def best_tokens(self, logits: Tensor) -> Tensor:
        """The most probable clean tokens, int64 (B, L), from logits (B, L, V)."""
        mask = self.config.mask_token_id
        rows = RowLogits.everywhere(logits).chunks(factor=None if mask is None else 1.0)
        best = [(some if mask is None else without_column_(some, mask)).argmax(-1) for _, some in rows]
        return torch.cat([logits.new_empty(0, dtype=torch.int64), *best]).view(logits.shape[:2])

    def clean_law(self, model_output: Tensor) -> Tensor:
        """Probabilities of the clean token that is drawn for a mask, shape (B, L, V), float64."""
        return self.token_logits(model_output).double().softmax(-1)

    def open_masks(
        self, sample: Tensor, probability: float | Tensor, generator: Generators, unmasking: Unmasking, order: Order
    ) -> Tensor:
        """Masked positions that open when each should with the given probability, bool (B, L).

        With `counts` their number is the nearest integer to what is due, probability * masks, so that it has no variance. Where
        less than half a position is due one opens with that chance: rounded down it would wait for the end of a run with
        more steps than positions. `order` says which ones open.
        """
        is_masked = sample == self.config.mask_token_id
        if unmasking == "bernoulli":
            return bernoulli_subset(is_masked, probability, generator)
        count = self.whole_counts(is_masked.sum(1, dtype=torch.float64) * probability, generator)  # (B,)
        if order == "spread":
            grid_shape = self.config.grid_shape
            return spread_subset(is_masked, count, generator, None if grid_shape is None else tuple(grid_shape))
        return uniform_subset(is_masked, count, generator)

    def open_probability(self, index: int) -> float:
        """P(a mask opens in the call `index`), where a class has it: `opens_by_chance`."""
        raise NotImplementedError(f"{type(self).__name__} opens masks by what the network says of them")

    def chance(self, index: int) -> Tensor:
        """`open_probability` of a call, as a float64 scalar from a table: reading it needs no work on the host, and a compiled
        `step` serves all calls."""
        if self.openings is None:
            chances = [self.open_probability(call) for call in range(len(self.calls))]
            self.openings = torch.tensor(chances, dtype=torch.float64)
        return self.openings[index]

    # Choose, then sample, uniform process

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """How a token is left in the call `index`, uniform process, where a class has it: the intensities of a jump to
        x_0 ~ p_0, and to one of the other V - 1 states at random, given x_0 != x_t; and of the latter given x_0 = x_t. `None`:
        the law is not of this form, or is not drawn exactly."""
        return None

    def jump_factor(self, index: int, total: Tensor) -> Tensor:
        """P(jump) / Lambda in the call `index`, for the mean Lambda of the intensities over x_0 ~ p_0. P(jump) must not fall
        with Lambda."""
        return torch.ones_like(total)

    def jumps_at(self, index: int) -> Tensor | None:
        """`jump_intensities` of a call, float64 (3,), from a table as in `chance`."""
        if self.jumps is None:
            found = [self.jump_intensities(call) for call in range(len(self.calls))]
            rows = [[float(value) for value in some] for some in found if some is not None]
            if len(rows) < len(found):
                return None
            self.jumps = torch.tensor(rows, dtype=torch.float64)
        return self.jumps[index]

    def jump_positions(self, index: int, sample: Tensor, generator: Generators) -> Tensor | None:
        """Positions that may jump in the call `index`, bool (B, L): each with the chance that it has where p_0 says that
        x_0 is not x_t, the largest there is. `None` without `jump_intensities`: all may."""
        jumps = self.jumps_at(index)
        if jumps is None:
            return None
        total = jumps[0] + jumps[1]
        everywhere = torch.ones_like(sample, dtype=torch.bool)
        return bernoulli_subset(everywhere, total * self.jump_factor(index, total), generator)

    def jump_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """`sample` after the jumps at the positions that may jump. With p = p_0(x_t), l(v) = p_0(v) / (1 - p) and intensities
        (a, b, c): Lambda = (1 - p) (a + b) + p c, and given a jump x_s ~ l with probability (1 - p) a / Lambda, or else
        any state but x_t.

        Raises:
            ValueError: If this class needs the logits of all positions at once.
        """
        jumps = self.jumps_at(index)
        if jumps is None:
            raise ValueError("`model_output` has logits of some positions only; this scheduler needs all of them")
        own = rows.pick(sample)
        u, coin = (rows.pick(uniforms(tuple(sample.shape), generator, sample.device)) for _ in range(2))

        def shaped(logits: Tensor, part: slice) -> Tensor:
            return self.shaped_logits(logits, index, own[part])

        drawn, others = draw_others(rows, u, own, shaped if self.is_shaped(index) else None)
        to_clean, at_random = jumps[0] * others, jumps[1] * others + jumps[2] * (1 - others)
        factor = self.jump_factor(index, to_clean + at_random)
        most = jumps[0] + jumps[1]
        coin = coin * (most * self.jump_factor(index, most))  # the position was chosen with this chance
        other = (u * (self.config.vocab_size - 1)).long()  # u is free where the token is not drawn with it
        moved = torch.where(coin < (to_clean + at_random) * factor, other + (other >= own).long(), own)
        return rows.put(torch.where(coin < to_clean * factor, drawn, moved), sample)

    def whole_counts(self, due: Tensor, generator: Generators) -> Tensor:
        """What is due (B,) as whole numbers, int64: the nearest ones, or 1 with the chance `due` where that is below 1/2."""
        coin = uniforms((len(due), 1), generator, due.device).squeeze(1)
        return torch.where(due < 0.5, (coin < due).double(), due.round()).long()


class FactorisedScheduler(DiscreteScheduler):
    """Abstract: a scheduler whose tokens have laws of their own, given which positions move."""

    @abstractmethod
    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """Law of x_s for each position, shape (B, L, V), float64; differentiable in the logits and coefficients.

        Args:
            model_output (`torch.Tensor` of shape `(B, L, V)`): Logits of log p(x_0 | x_t).
            timestep (`float`, `int` or `torch.Tensor`): A time out of `timesteps`, or an index.
            sample (`torch.Tensor` of shape `(B, L)`): Tokens x_t, int64.
        """

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """`sample` with a token drawn from the clean law at each of the chosen masks; with uniform noise after their jumps."""
        if isinstance(self.noise_process, UniformProcess):
            return self.jump_rows(rows, index, sample, generator)
        return rows.put(self.clean_tokens(rows, index, sample, generator), sample)

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """A state for each position, drawn from the transition law."""
        draw = self.config.get("draw", "exact")
        if draw != "exact":
            return draw_states(self.transition(logits, index, sample), generator, draw)
        tokens = sample.flatten()

        def law(some: Tensor, part: slice) -> Tensor:  # each position has a law of its own
            return self.transition(some[None], index, tokens[None, part])[0]

        return draw_from_law(logits, generator, law)


def number_of_steps(value: Any) -> int:
    """`num_inference_steps` as Python's own.

    Raises:
        ValueError: If it is not an integer of at least 1.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
        raise ValueError(f"`num_inference_steps` is {value!r}; it must be an integer of at least 1")
    return int(value)


def call_named(timestep: int | float | Tensor, calls: Tensor, last_call: int | None = None) -> int:
    """The place in `calls` (N,) that a time out of them, or an int index, names. A time that stands there several times names
    the first one after `last_call`.

    Raises:
        ValueError: If it names none.
    """
    value = timestep.item() if isinstance(timestep, Tensor) and timestep.numel() == 1 else timestep
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"`timestep` is {value!r}; it must be one time out of `timesteps`, or a step index")
    if isinstance(value, numbers.Integral):
        if 0 <= value < len(calls):
            return int(value)
        raise ValueError(f"`timestep` is step index {value}; allowed are 0 to {len(calls) - 1}")
    gap, nearest = (calls - value).abs().min(0)
    if not gap <= 1e-6:  # room for times that went through float32; NaN is no time
        held = f"{len(calls)} times from {float(calls[0])} to {float(calls[-1])}"
        raise ValueError(f"`timestep` is {value}, which is not in `timesteps`: {held}")
    same = (calls == calls[nearest]).nonzero().flatten().tolist()
    after = [index for index in same if last_call is not None and index > last_call]
    return after[0] if after else same[0]


def without_column_(logits: Tensor, column: int) -> Tensor:
    """Logits (..., V) with -inf in a column, in place."""
    logits.select(-1, column).fill_(-math.inf)
    return logits


def token_logits(logits: Tensor, mask_token_id: int | None, temperature: float, top_p: float) -> Tensor:
    """Logits (..., V) of the clean law that is drawn from: no mask, then temperature (0 keeps the most probable token, the
    first among equals), then top-p. A copy."""
    logits = logits.clone()
    if mask_token_id is not None:
        logits[..., mask_token_id] = -math.inf
    if temperature == 0:
        check_finite(logits.amax(-1))
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    if temperature != 1:
        # bfloat16 would round the quotient a second time, by a tenth of a nat at logits of 30
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return keep_top_p(logits, top_p) if top_p < 1 else logits


def own_logits(process: UniformProcess, logits: Tensor, sample: Tensor, t: Tensor | float) -> Tensor:
    """What x_t itself adds to the logits (..., V) of a uniform process: log(1 + V alpha_t / (1 - alpha_t)) at x_t, float64.
    Without it they are logits of the leave-one-out law."""
    gain = process.own_gain(t).log().to(logits.device)
    return torch.where(indicator(sample, logits.shape[-1]).bool(), gain, 0.0)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Logits (..., V) with -inf for all but the fewest most probable tokens that have a mass of at least `top_p`."""
    ranked, places = logits.double().softmax(-1).sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked  # mass above each token: the first always stays
    return logits.masked_fill(
        torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before >= top_p), -math.inf
    )


def euler_law(
    noise_process: Process, sample: Tensor, p_0: Tensor, t: Tensor, s: Tensor, scale: Tensor | float = 1.0
) -> Tensor:
    """Law of x_s, shape (B, L, V), after one Euler step of the reverse rate times `scale`:

        P(v) = (t - s) * scale * R_t(x_t -> v),  v != x_t,    P(x_t) = 1 - sum_v P(v)

    Where the jumps sum to more than 1 they are divided by their sum. The step to s = 0 draws from p_0 at every position that
    can still move, as the published samplers' final denoising call does.
    """
    if s == 0:
        return noise_process.posterior(sample, p_0, t, s)
    rate = noise_process.reverse_rate(sample, p_0, t)
    return jump_law(sample, (t - s) * scale * rate)


def euler_jumps(
    process: UniformProcess, t: Tensor, s: Tensor, scale: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(t - s) * scale times `UniformProcess.rate_jumps`; the step to s = 0 draws from p_0, as in `euler_law`."""
    if s == 0:
        return process.posterior_jumps(t, s)
    to_clean, at_random, at_random_own = ((t - s) * scale * rate for rate in process.rate_jumps(t))
    return to_clean, at_random, at_random_own


def jump_law(sample: Tensor, jumps: Tensor) -> Tensor:
    """Jump probabilities, shape (B, L, V) and 0 at `sample`, completed by the probability to stay."""
    total = jumps.sum(-1, keepdim=True)
    law = jumps / total.clamp(min=1.0)
    return law.scatter(-1, sample[..., None], (1 - total).clamp(min=0.0))


def leap_law(sample: Tensor, intensity: Tensor) -> Tensor:
    """Law of x_s, shape (B, L, V), where each jump v is a Poisson event with the given intensity, 0 at `sample`, and a position
    takes the first of its jumps: P(v) = (1 - e^-Lambda) lambda_v / Lambda with Lambda = sum_v lambda_v."""
    return jump_law(sample, intensity * jump_share(intensity.sum(-1, keepdim=True)))


def jump_share(total: Tensor) -> Tensor:
    """(1 - e^-Lambda) / Lambda for total intensities Lambda; 1 where nothing can jump."""
    positive = torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, -torch.expm1(-positive) / positive, 1.0)


EXAMPLE = {"2": {"times": [1.0, 0.6, 0.0]}}


def check_coefficients(coefficients: Coefficients) -> Coefficients:
    """A deep copy with string keys and finite float lists.

    Raises:
        ValueError: If a budget is not a positive integer, a block is not a list of finite numbers, or a grid is not strictly
            decreasing from 1 to 0.
    """
    if not isinstance(coefficients, Mapping):
        raise ValueError(f"`coefficients` is {coefficients!r}; it must be a dict of step budgets such as {EXAMPLE}")
    checked: Coefficients = {}
    for budget, blocks in coefficients.items():
        if not str(budget).isdecimal() or int(budget) < 1:
            raise ValueError(f"`coefficients` has budget {budget!r}; keys must be step budgets such as '8'")
        if not isinstance(blocks, Mapping):
            raise ValueError(
                f"`coefficients` for {budget} steps is {blocks!r}; it must be a dict such as {EXAMPLE['2']}"
            )
        where = f"`coefficients` for {budget} steps:"
        checked[str(budget)] = {name: as_floats(f"{where} '{name}'", values) for name, values in blocks.items()}
        for name, values in checked[str(budget)].items():
            if name not in BLOCKS:
                raise ValueError(
                    f"{where} no scheduler of this version knows a block '{name}'; known are {', '.join(BLOCKS)}. Take a newer "
                    "version of discrete_schedulers, or leave it out"
                )
            if not all(math.isfinite(v) for v in values):
                raise ValueError(
                    f"`coefficients` for {budget} steps: '{name}' has a value that is not finite: {values}; all must be"
                )
            length = int(budget) + (name == "times")
            if name in OTHER_LENGTHS:  # they go with the length of the sequence, which the config does not know
                length = max(len(values), 1)
            if len(values) != length:
                raise ValueError(
                    f"`coefficients` for {budget} steps: '{name}' has {len(values)} values, needs {length}"
                )
        times = checked[str(budget)].get("times")
        if times and not (times[0] == 1 and times[-1] == 0 and all(a > b for a, b in pairwise(times))):
            raise ValueError(f"`coefficients` for {budget} steps: 'times' must fall strictly from 1 to 0, not {times}")
        if times and times[-2] < LEAST_TIME:
            raise ValueError(
                f"`coefficients` for {budget} steps: 'times' has {times[-2]}; before the 0 at its end allowed are numbers from "
                f"{LEAST_TIME:.1g}"
            )
    return checked


def as_floats(name: str, values: Any) -> list[float]:
    """A list of numbers as floats.

    Raises:
        ValueError: If it is none.
    """
    try:
        if isinstance(values, str | Mapping) or any(isinstance(value, str) for value in values):
            raise TypeError
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {values!r}; it must be a list of numbers") from None


def checked_values(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor that are numbers, as Python's own (JSON does not know NumPy's), and its lists and tables as
    copies.

    Raises:
        ValueError: If one is not what its annotation says.
    """
    checked: dict[str, Any] = {}
    for name, (kind, is_optional) in kinds_of_arguments(cls).items():
        value: Any = values.get(name)
        if name not in values or (value is None and is_optional):
            continue
        if kind in KINDS:
            number, words = KINDS[kind]
            if value is inspect.Parameter.empty:
                raise ValueError(f"`{name}` is missing; it must be {words}")
            fits = isinstance(value, number) and isinstance(value, bool) == (kind == "bool")
            if not fits or not math.isfinite(value):
                raise ValueError(f"`{name}` is {value!r}; it must be {words}{' or None' if is_optional else ''}")
            checked[name] = int(value) if kind == "int" else float(value) if kind == "float" else value
        elif kind == "list[float]":
            checked[name] = as_floats(f"`{name}`", value)
        elif kind == "Coefficients":
            checked[name] = check_coefficients(value)
        elif name == "grid_shape":
            checked[name] = check_grid_shape(value)
        elif kind == "dict":
            if not isinstance(value, Mapping):
                raise ValueError(f"`{name}` is {value!r}; it must be a dict or None")
            checked[name] = copy.deepcopy(dict(value))
    return checked


@functools.cache
def kinds_of_arguments(cls: type) -> dict[str, tuple[str, bool]]:
    """The arguments of a class' constructor: what kind of value each is, and whether it may be `None` instead."""
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    found = {name: inspect.formatannotation(p.annotation).strip("'").partition(" | ") for name, p in parameters.items()}
    return {name: (kind, other == "None") for name, (kind, _, other) in found.items()}


def check_grid_shape(grid_shape: Any) -> list[int]:
    """(height, width) as a list.

    Raises:
        ValueError: If these are not two positive integers.
    """
    sides = list(grid_shape) if isinstance(grid_shape, list | tuple) else []
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"`grid_shape` is {grid_shape!r}; it must be [height, width], two positive integers, or None")
    return sides


def check_knob(config: Any, name: str, allowed: str) -> None:
    """Raises `ValueError` if the knob `name` is not what is `ALLOWED`, as a constant or in the coefficients."""
    if not ALLOWED[allowed](config[name]):
        raise ValueError(f"`{name}` is {config[name]}; allowed are {allowed}")
    for budget, blocks in (config.coefficients or {}).items():
        if not all(map(ALLOWED[allowed], blocks.get(name, []))):
            raise ValueError(f"`{name}` for {budget} steps is {blocks[name]}; allowed are {allowed}")


def check_corrections(config: Any) -> None:
    """Raises `ValueError` if the knobs that correctors of chosen positions share are not allowed."""
    if config.num_corrector_steps < 0:
        raise ValueError(f"`num_corrector_steps` is {config.num_corrector_steps}; it must be at least 0")
    if config.positions_per_correction < 1:
        raise ValueError(f"`positions_per_correction` is {config.positions_per_correction}; it must be at least 1")


def selection_confidence(log_law: Tensor, tokens: Tensor, selection: Selection) -> Tensor:
    """What a `selection` other than `"random"` compares, (...): the lowest are drawn anew.

    Args:
        log_law (`torch.Tensor` of shape `(..., V)`): Log-law of each position given all others.
        tokens (`torch.Tensor` of shape `(...)`): The tokens that are there.
        selection (`str`): `"lowest_margin"`, `"lowest_max_probability"` or `"lowest_current_probability"`.
    """
    if selection == "lowest_max_probability":
        return log_law.amax(-1)
    current = log_law.gather(-1, tokens[..., None]).squeeze(-1)
    if selection == "lowest_margin":
        return current - log_law.scatter(-1, tokens[..., None], -math.inf).amax(-1)
    return current
