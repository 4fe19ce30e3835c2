"""What pipelines share: the loop between a network and a scheduler, and the checks that they fit each other.

    for t in timesteps:
        more   = model_inputs(t, x)           what the method tells its network beside x and t: for most, nothing
        where  = positions(t, x)              which positions move, if that can be said before the network runs
        logits = denoiser(x, t, where, more)  at these positions only
        x      = step(logits, t, x)           known tokens put back

The loop never asks which scheduler or network it has.
"""

from __future__ import annotations

import json
import numbers
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor
from transformers import PreTrainedModel

from discrete_schedulers.bundled import is_bundled
from discrete_schedulers.denoisers import Denoiser, NetworkDenoiser
from discrete_schedulers.guidance import GuidanceScale, GuidanceSchedule, check_scale
from discrete_schedulers.guidance import guidance_schedule as scale_over_time
from discrete_schedulers.interop import FOREIGN, ForeignScheduler
from discrete_schedulers.models import DDiTModel, HollowTransformerModel, LatentModel
from discrete_schedulers.models.diffusion_gemma import PromptAndCanvas, canvas_length
from discrete_schedulers.models.loading import check_repo_id, longest_sequence, read_config
from discrete_schedulers.patience import check_download, patiently
from discrete_schedulers.processes import check_tokens
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers import DiscreteScheduler, RDLMScheduler

LIBRARIES = ("diffusers", "discrete_schedulers", "transformers")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
SCHEDULER_FACTS = ("vocab_size", "mask_token_id", "process", "noise_schedule")  # of the model, in a scheduler's config
StepCallback: TypeAlias = Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None


def require_ours(scheduler: Any) -> None:
    """Raises `ValueError` for a scheduler that this library's contract does not hold for."""
    if isinstance(scheduler, DiscreteScheduler):
        return
    kind = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
    found = f"a {kind}"
    if isinstance(scheduler, str):
        found = f"the text {scheduler!r}"
    elif isinstance(scheduler, type):
        found = f"the class {kind}, not an object of it"
    elif isinstance(scheduler, RDLMScheduler):
        found = f"a {kind}, whose states are no tokens and which is for RDLMPipeline"
    raise ValueError(
        f"`scheduler` is {found}; it must be one of discrete_schedulers' own, such as AncestralScheduler.from_config("
        "pipe.scheduler.config), or of diffusers' for tokens as ForeignScheduler(...): "
        + ", ".join(sorted({foreign.__name__ for foreign in FOREIGN}))
    )


def for_this_model(scheduler: Any, facts: Any) -> Any:
    """A scheduler; one of diffusers' for tokens as a [`ForeignScheduler`], where `facts` say enough of the model."""
    if isinstance(scheduler, tuple(FOREIGN)) and isinstance(facts, Mapping) and {*SCHEDULER_FACTS} <= {*facts}:
        return ForeignScheduler(scheduler, **{key: facts[key] for key in SCHEDULER_FACTS})
    return scheduler


def no_object(name: str, value: str) -> ValueError:
    """What to say of a component that is given by its name."""
    return ValueError(f"`{name}` is the text {value!r}; it must be the object, which its from_pretrained loads")


def check_network(model: Any, facts: Any) -> None:
    """Raises `ValueError` if this is no network, or `facts` are not arguments of [`NetworkDenoiser`] or `None`."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"`model` is {model!r}; it must be a torch.nn.Module (`from_pretrained` loads one by its name)"
        )
    check_facts(facts)


def check_facts(facts: Any) -> None:
    """Raises `ValueError` if these are not arguments of [`NetworkDenoiser`], or `None`."""
    known = {field.name for field in fields(NetworkDenoiser)} - {"model", "cache"}
    unknown = sorted(set(facts) - known) if isinstance(facts, Mapping) else [repr(facts)] if facts is not None else []
    if unknown:
        raise ValueError(
            f"`denoiser` has {', '.join(unknown)}; it must be a dict with any of: {', '.join(sorted(known))}"
        )


def name_of(pretrained_model_name_or_path: Any) -> str:
    """The name of a folder or repository.

    Raises:
        ValueError: If it is neither a text nor a path, or a folder that is not there and cannot be a repository.
    """
    name = pretrained_model_name_or_path
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(f"`pretrained_model_name_or_path` is {name!r}; it must be a folder, a Hub id or a bundled id")
    if not Path(name).is_dir() and not is_bundled(str(name)):
        check_repo_id(str(name))
    return str(name)


def as_dtype(dtype: Any) -> torch.dtype | None:
    """A dtype, also by its name.

    Raises:
        ValueError: If there is no such floating dtype.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f"`torch_dtype` is {dtype!r}; allowed: torch.float32, torch.bfloat16, torch.float16, ..., or None")


def with_dtypes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` with the dtypes that are named in them: diffusers would take float32 for a name."""
    named = {key: as_dtype(arguments[key]) for key in ("torch_dtype", "dtype") if isinstance(arguments.get(key), str)}
    return arguments | named


def check_index(cls: type[DiffusionPipeline], name: str, index: Path, given: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a model_index.json is not one of this pipeline: before anything it names is loaded or imported.

    Args:
        cls (`type`): The pipeline.
        name (`str`): Folder or repository.
        index (`Path`): Its model_index.json.
        given (`dict`): Components that are passed, and so not loaded.
    """
    held, own = read_config(index), [base.__name__ for base in cls.__mro__ if issubclass(base, DiscretePipeline)]
    if held.get("_class_name") not in own:
        raise ValueError(
            f"{index} is of {held.get('_class_name')!r}, and code of a repository is never run; it must be of {own[0]}"
        )
    parts, settings = cls._get_signature_keys(cls)
    for key, value in held.items():
        is_part = isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)
        if key.startswith("_") or key in given or key in settings or (key not in parts and not is_part):
            continue
        if key not in parts:
            raise ValueError(
                f"{index} has a part {key!r}, which this version does not know; known: {', '.join(sorted(parts))}"
            )
        if value == [None, None] and key in cls._optional_components:
            continue
        if value == [None, None]:
            raise ValueError(f"{index} has no {key!r}: diffusers could not save it with the pipeline; pass `{key}=...`")
        library = value[0].partition(".")[0] if is_part else None
        is_foreign = library not in sys.modules or library in sys.stdlib_module_names
        if not is_part or (library not in LIBRARIES and is_foreign):
            raise ValueError(
                f"{index} has {value!r} for {key!r}, and code of a repository is never run; it must be [library, class], "
                f"with a library of {', '.join(LIBRARIES)}"
            )
        if library == LIBRARIES[1] and not isinstance(getattr(sys.modules[library], value[1], None), type):
            raise ValueError(
                f"{index} has the class {value[1]!r} for {key!r}, which this version of {library} does not have"
            )
        if Path(name).is_dir() and not (Path(name) / key).is_dir():
            raise ValueError(
                f"{index} has a part {key!r}, but {name!r} lacks the folder of this name: download it again"
            )


@contextmanager
def named_json_errors(name: str) -> Iterator[None]:
    """What a file that is not JSON raises says of which model it is."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"a file of {name!r} is not JSON ({error}): delete it and download it again") from error


def check_count(name: str, value: Any, most: int | None = None) -> None:
    """Raises `ValueError` if a value is not an integer from 1 to `most`."""
    allowed = "it must be an integer of at least 1" if most is None else f"allowed are 1 to {most}"
    is_count = isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
    if not is_count or (most is not None and int(value) > most):
        raise ValueError(f"`{name}` is {value!r}; {allowed}")


def check_device(device: torch.device) -> None:
    """Raises `ValueError` if a device has no values, or no float64, which laws and draws are in."""
    if device.type == "meta":
        raise ValueError(
            "`pipe` is on 'meta', where weights have no values: it must be loaded anew, on 'cpu' or 'cuda'"
        )
    if device.type == "mps":
        raise ValueError("`pipe` is on 'mps', which has no float64: laws and draws need it. Move it to 'cpu' or 'cuda'")


def class_ids(class_labels: Any) -> Tensor:
    """One or more classes as a tensor (P,), whatever their range.

    Raises:
        ValueError: If these are not numbers.
    """
    try:
        return torch.as_tensor(class_labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`class_labels` is {class_labels!r}; allowed are an integer, or a list or tensor of them"
        ) from error


def returned_latents(returned: Any, latents: Tensor) -> Tensor:
    """What a callback returned for latents, or those that there were.

    Raises:
        ValueError: If it did not return a dictionary, or latents of another shape.
    """
    if not isinstance(returned, dict):
        raise ValueError(
            f"`callback_on_step_end` returned {returned!r}; it must return a dict: the one it got, or {{}}"
        )
    new = returned.pop("latents", latents)
    if not isinstance(new, Tensor) or new.shape != latents.shape:
        found = f"of shape {tuple(new.shape)}" if isinstance(new, Tensor) else repr(new)
        raise ValueError(f"`callback_on_step_end` returned latents {found}; they must keep {tuple(latents.shape)}")
    return new


def network_of(model: torch.nn.Module) -> torch.nn.Module:
    """The network itself, without what `torch.compile` and a [`LatentModel`] put around it."""
    inner = getattr(model, "_orig_mod", model)  # torch.compile's name for it
    return network_of(inner.model) if isinstance(inner, LatentModel) else inner


def network_facts(model: torch.nn.Module, scheduler: DiscreteScheduler) -> dict[str, Any]:
    """Arguments of [`NetworkDenoiser`] that the scheduler's config and the network's class say.

    Raises:
        ValueError: If a network of transformers cannot read all tokens of the scheduler.
    """
    facts, model = {name: scheduler.config[name] for name in SCHEDULER_FACTS}, network_of(model)
    if isinstance(model, PreTrainedModel):
        facts["max_length"] = longest_sequence(model)
        embedded = getattr(model.get_input_embeddings(), "num_embeddings", None)
        if embedded is not None and embedded < facts["vocab_size"]:
            raise ValueError(
                f"`scheduler` has vocab_size {facts['vocab_size']}, but the {type(model).__name__} reads {embedded} tokens: it "
                "must have as many, the mask included (model.resize_token_embeddings)"
            )
    if isinstance(model, DDiTModel):
        timed = model.config.cond_dim is not None and model.config.time_conditioning
        facts |= {
            "split_head": True,
            "max_length": model.config.max_length,
            "time_input": "sigma" if timed else None,
            "grid_shape": model.config.get("grid_shape"),
        }
    if isinstance(model, HollowTransformerModel):
        facts |= {
            "split_head": True,
            "max_length": model.config.max_length,
            "revealed_logits": "leave_one_out",
        }
    return facts


def one_device(name: str, device_map: Any) -> torch.device | str:
    """Where the weights of a repository go that is not one of our own; the CPU where nobody says.

    Raises:
        ValueError: If `device_map` is not one device.
    """
    if device_map in ("auto", "balanced", "sequential") or isinstance(device_map, dict):
        raise ValueError(
            f"`device_map` is {device_map!r}; for {name!r}, which is not of this pipeline, name one device"
        )
    return "cpu" if device_map is None else device_map


class DiscretePipeline(DiffusionPipeline):
    """Abstract: the components `model` and `scheduler`, the config `denoiser` (facts about the network), and the loop."""

    _callback_tensor_inputs = ["latents"]

    def __setattr__(self, name: str, value: Any) -> None:
        """As in diffusers, and one of its schedulers for tokens becomes a [`ForeignScheduler`] for this model.

        Raises:
            ValueError: If a scheduler is neither, or the name of a component is given in its place.
        """
        if name == "scheduler":
            value = for_this_model(value, self.config.get("denoiser"))
            require_ours(value)
        elif name == "model":
            check_network(value, None)
        elif isinstance(value, str) and name in self._get_signature_keys(type(self))[0]:
            raise no_object(name, value)
        super().__setattr__(name, value)

    def register_modules(self, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            ValueError: If the name of a component is given in its place.
        """
        for name, value in kwargs.items():
            if isinstance(value, str):
                raise no_object(name, value)
        super().register_modules(**kwargs)

    @classmethod
    def from_saved(cls, name: str, index: Path, **kwargs: Any) -> Any:
        """Load what `save_pretrained` has written, and keep what the model was called before: coefficients may be for that.

        Args:
            name (`str`): Folder or repository.
            index (`Path`): Its model_index.json.
            **kwargs: As in `diffusers.DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError: If model_index.json is not one of this pipeline, or a file is no JSON.
        """
        check_index(cls, name, index, kwargs)
        with named_json_errors(name):
            pipe = super().from_pretrained(name, **kwargs)
        held = read_config(index)
        pipe.register_to_config(_origin=held.get("_origin") or held.get("_name_or_path"))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """As in diffusers, which leaves networks behind whose class is not named in the constructor."""
        names = cls._get_signature_keys(cls)[0]
        networks = {
            name: part
            for name, part in pipeline.components.items()
            if name in names and isinstance(part, torch.nn.Module)
        }
        return super().from_pipe(pipeline, **(networks | kwargs))

    @classmethod
    def download(cls, pretrained_model_name: str | Path, **kwargs: Any) -> str:
        """As in diffusers; a Hub that is busy is asked again for some time, and files that came are held against their hashes.

        Raises:
            OSError: If the Hub refuses, cannot be reached or stays busy, or a file comes damaged again and again.
        """

        def once() -> str:
            began = time.time()
            folder = super(DiscretePipeline, cls).download(pretrained_model_name, **kwargs)
            for path in Path(folder).rglob("*"):
                if path.is_file():
                    check_download(path, began)
            return folder

        return patiently(once)

    @property
    def networks(self) -> list[torch.nn.Module]:
        """The components that have weights."""
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    @property
    def device(self) -> torch.device:
        """As in diffusers, which asks modules for a `device`; plain ones have none, but their tensors do."""
        if all(hasattr(network, "device") for network in self.networks):
            return super().device
        tensors = [tensor for network in self.networks for tensor in (*network.parameters(), *network.buffers())]
        places = [tensor.device for tensor in tensors] or [torch.device("cpu")]
        return next((place for place in places if place.type not in ("cpu", "meta")), places[0])

    @property
    def dtype(self) -> torch.dtype:
        """That of the first floating weight."""
        weights = [tensor for network in self.networks for tensor in network.parameters()]
        return next((tensor.dtype for tensor in weights if tensor.is_floating_point()), torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, which asks modules for a `dtype`: it is lent to plain ones, which have none."""
        plain = [network for network in self.networks if not hasattr(network, "dtype")]
        try:
            for network in plain:
                network.dtype = torch.float32  # type: ignore[assignment]
            return super().to(*args, **kwargs)
        finally:
            for network in plain:
                del network.dtype

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network as a function from (x_t, t) to logits of p(x_0 | x_t)."""
        network = self.model if canvas_length(self.model) is None else PromptAndCanvas(self.model)
        return NetworkDenoiser(network, **self.config.denoiser)

    @property
    def num_classes(self) -> int | None:
        """Classes of the network; their number is also the id of "any". `None`: it has none."""
        network = network_of(self.model)
        return network.config.get("num_classes") if isinstance(network, ConfigMixin) else None

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> GuidanceScale:
        """That of the last call; a callback changes it by `pipe._guidance_scale`, in a call of a text pipeline that began with
        guidance."""
        return self._guidance_scale

    def take_guidance(self, guidance_scale: GuidanceScale, guidance_schedule: GuidanceSchedule) -> None:
        """Keep the scale of a call and how it grows, for `guidance_at`.

        Raises:
            ValueError: If one is not allowed, or both say how the scale grows.
        """
        check_scale(guidance_scale)
        if guidance_schedule not in get_args(GuidanceSchedule):
            allowed = ", ".join(map(repr, get_args(GuidanceSchedule)))
            raise ValueError(
                f"`guidance_schedule` is {guidance_schedule!r}; allowed: {allowed}; a function of t is a `guidance_scale`"
            )
        if callable(guidance_scale) and guidance_schedule != "constant":
            raise ValueError(
                f"`guidance_scale` is a function of t and `guidance_schedule` is {guidance_schedule!r}: they cannot "
                "both say how the scale grows"
            )
        self._guidance_scale, self._guidance_schedule = guidance_scale, guidance_schedule

    def guidance_at(self, t: float) -> float:
        """The scale of the call at time t, as a callback has left it."""
        scale = self._guidance_scale
        return scale(t) if callable(scale) else scale_over_time(self._guidance_schedule, scale)(t)

    def denoise(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        frozen: Tensor,
        num_inference_steps: int,
        generator: Generators = None,
        callback_on_step_end: StepCallback = None,
        tensor_inputs: list[str] | None = None,
    ) -> tuple[Tensor, int]:
        """The loop.

        Args:
            denoiser (`Denoiser`): The network and its conditions.
            latents (`torch.Tensor` of shape `(B, L)`): Tokens to start from, int64.
            frozen (`torch.Tensor` of shape `(B, L)`): Bool; tokens that stay as they are.
            num_inference_steps (`int`): Steps.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of randomness.
            callback_on_step_end (`Callable`, *optional*): Called as `f(pipe, step, timestep, kwargs)` after each step.
            tensor_inputs (`list[str]`, *optional*): Names passed to it, of `["latents"]`.

        Returns:
            `tuple[torch.Tensor, int]`: Tokens (B, L), and the calls of the network that were made.
        """
        scheduler, template_ids = self.scheduler, latents.clone()
        scheduler.set_timesteps(num_inference_steps)
        self._num_timesteps, num_model_calls = len(scheduler.timesteps), 0

        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                conditions = scheduler.model_inputs(t, latents, frozen, generator)
                chosen = scheduler.positions(t, latents, generator)  # None: all of them
                model_output = denoiser(latents, t, chosen, **conditions)
                num_model_calls += denoiser.calls_at(t) if chosen is None or chosen.any() else 0
                latents = scheduler.step(model_output, t, latents, generator=generator).prev_sample
                latents = torch.where(frozen, template_ids, latents)
                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in tensor_inputs or self._callback_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    returned = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = returned_latents(returned, latents)
                    check_tokens("latents", latents, denoiser.vocab_size)
                progress_bar.update()
        return latents, num_model_calls

    def tensor_inputs(self, callback_on_step_end: StepCallback, names: list[str] | None) -> list[str]:
        """What a callback gets: the names it asks for itself, or these, or `["latents"]`.

        Raises:
            ValueError: If it cannot be called, or a name is none of these.
        """
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` is {callback_on_step_end!r}; it must be a function, or None")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            names = callback_on_step_end.tensor_inputs
        names = names or ["latents"]
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; allowed: {self._callback_tensor_inputs}"
            )
        return names

    def check_scheduler(self) -> None:
        """Raises `ValueError` if the scheduler does not fit the model or its device; warns where its coefficients are another
        model's."""
        require_ours(self.scheduler)
        check_device(self._execution_device)
        names = ["vocab_size", "mask_token_id", "process"]
        denoiser = self.denoiser
        if denoiser.time_conditioned or (denoiser.process == "uniform" and denoiser.parametrization != "x0"):
            names.append("noise_schedule")  # these read the noise level; the others see tokens only
        for name in names:
            if self.scheduler.config[name] != self.config.denoiser[name]:
                raise ValueError(
                    f"`scheduler` has {name} {self.scheduler.config[name]!r}, but the model has "
                    f"{self.config.denoiser[name]!r}: they must be equal"
                )
        if self.scheduler.needs_revealed_logits and denoiser.revealed_logits == "none":
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__}, which reads the law of each revealed token given the "
                "others; this model has none. Use a HollowTransformerModel, or estimate it with "
                "denoiser={'revealed_logits': 'shadow'} where the network takes `attention_mask` and `position_ids`"
            )
        learned_for, name = self.scheduler.config.get("learned_for"), self.config.get("_name_or_path")
        if learned_for and name and learned_for.get("base_model") not in (None, name, self.config.get("_origin")):
            warnings.warn(
                f"the scheduler's coefficients were learned for {learned_for['base_model']!r}, this model is {name!r}",
                stacklevel=4,
            )

    def check_latents(self, latents: Tensor | None) -> None:
        """Raises `ValueError` if `latents` are not `None` or one or more tokens of this model, int64 (B, L)."""
        if latents is None:
            return
        check_tokens("latents", latents, self.config.denoiser["vocab_size"])
        if latents.numel() == 0:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}; it must have one position at least")

    def prepare_latents(
        self, known: Tensor, latents: Tensor | None, generator: Generators, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Tokens to start from, int64 (B, L), and which of them stay as they are, bool (B, L); `known` has -1 where nothing
        is."""
        known = known.to(device)
        if isinstance(generator, list) and len(generator) != len(known):
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but {len(known)} samples are wanted: one each"
            )
        if latents is None:
            latents = self.scheduler.sample_prior(tuple(known.shape), generator, device)
        elif tuple(latents.shape) != tuple(known.shape):
            raise ValueError(
                f"`latents` is {latents.dtype} of shape {tuple(latents.shape)}; it must be int64 of shape {tuple(known.shape)}"
            )
        frozen = known >= 0
        return torch.where(frozen, known, latents.to(device)), frozen
