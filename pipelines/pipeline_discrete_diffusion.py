r"""The loop between a network and a scheduler, for text and any other tokens.

    x ~ prior, known tokens put in
    for t in timesteps:
        more   = model_inputs(t, x)           what the method tells its network beside x and t: for most, nothing
        where  = positions(t, x)              which positions move, if that can be said before the network runs
        logits = denoiser(x, t, where, more)  at these positions only
        x      = step(logits, t, x)           known tokens put back

The loop never asks which scheduler or network it has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import DynamicCache

from discrete_schedulers.blocks import BlockCache
from discrete_schedulers.denoisers import NetworkDenoiser
from discrete_schedulers.interop import FOREIGN, ForeignScheduler
from discrete_schedulers.models import DDiTModel, HollowTransformerModel
from discrete_schedulers.models.checkpoints import denoiser_facts, find_family
from discrete_schedulers.models.loading import (
    build_network,
    first_file,
    load_tokenizer,
    load_weights,
    longest_sequence,
    placement,
    read_config,
    weight_paths,
)
from discrete_schedulers.pipelines.text import infill_template, prefix_template
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers import AncestralScheduler, ConfidenceScheduler, DiscreteScheduler

BUNDLED = "discrete-schedulers/"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
SCHEDULER_FACTS = ("vocab_size", "mask_token_id", "process", "noise_schedule")  # of the model, in a scheduler's config


def require_ours(scheduler: Any) -> None:
    """Raises `ValueError` for a scheduler that this library's contract does not hold for."""
    if not isinstance(scheduler, DiscreteScheduler):
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}; this pipeline runs discrete_schedulers' own, and those of diffusers "
            "for tokens as ForeignScheduler(...)"
        )


def default_scheduler(facts: dict[str, Any]) -> DiscreteScheduler:
    """A scheduler for these facts of a network that draws from its own law: blocks are filled one after the other where its
    attention goes by blocks, and within them positions open in random order."""
    known = {name: facts[name] for name in SCHEDULER_FACTS}
    if facts.get("attention", "full") == "full":
        return AncestralScheduler(**known)
    return ConfidenceScheduler(**known, score="random", block_length=facts["block_size"])


@dataclass
class DiscreteDiffusionPipelineOutput(BaseOutput):
    """Output of [`DiscreteDiffusionPipeline`].

    Args:
        sequences (`torch.Tensor` or `np.ndarray` of shape `(B, L)`): Token ids.
        texts (`list[str]`, *optional*): Decoded sequences, with `output_type="text"` and a tokenizer.
        num_model_calls (`int`): Calls of the network that were made.
    """

    sequences: Tensor | np.ndarray
    texts: list[str] | None = None
    num_model_calls: int = 0


class DiscreteDiffusionPipeline(DiffusionPipeline):
    """Sample token sequences from a discrete diffusion model.

    Args:
        model (`torch.nn.Module`): The network.
        scheduler (`DiscreteScheduler`): Any scheduler of this library; swap it with
            `pipe.scheduler = X.from_config(pipe.scheduler.config)`, or for one of diffusers' for tokens.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For prompts and texts.
        denoiser (`dict`, *optional*): Facts about the network: the arguments of [`NetworkDenoiser`] that differ from what
            the scheduler's config and the config of a [`DDiTModel`] or [`HollowTransformerModel`] say.

    Example:

    ```python
    from discrete_schedulers import DiscreteDiffusionPipeline

    pipe = DiscreteDiffusionPipeline.from_pretrained("discrete-schedulers/tiny-text")
    print(pipe(num_samples=2, num_inference_steps=16).texts)
    ```

    Raises:
        ValueError: If the scheduler is not one of this library.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        model: torch.nn.Module,
        scheduler: DiscreteScheduler,
        tokenizer: Any = None,
        denoiser: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_ours(scheduler)
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)
        facts = {name: scheduler.config[name] for name in SCHEDULER_FACTS}
        if isinstance(model, DDiTModel):
            timed = model.config.cond_dim is not None and model.config.time_conditioning
            facts |= {
                "split_head": True,
                "max_length": model.config.max_length,
                "time_input": "sigma" if timed else None,
            }
        if isinstance(model, HollowTransformerModel):
            facts |= {
                "split_head": True,
                "max_length": model.config.max_length,
                "revealed_logits": "leave_one_out",
            }
        self.register_to_config(denoiser=facts | dict(denoiser or {}))

    def __setattr__(self, name: str, value: Any) -> None:
        """As in diffusers, and one of its schedulers for tokens becomes a [`ForeignScheduler`] for this model."""
        if name == "scheduler" and isinstance(value, tuple(FOREIGN)):
            facts = {key: self.config.denoiser[key] for key in SCHEDULER_FACTS}
            value = ForeignScheduler(value, **facts)
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        family: str | None = None,
        mask_token_id: int | None = None,
        shift: int | None = None,
        **kwargs: Any,
    ) -> DiscreteDiffusionPipeline:
        """Load a pipeline from a folder, the Hub, or this package.

        A repository without `model_index.json` is read by its family, see `models/checkpoints.py`: MDLM, LLaDA, BERT, ...

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder written by `save_pretrained`, a Hub id, or the bundled
                id `"discrete-schedulers/tiny-text"`, which needs no network.
            family (`str`, *optional*): The family of the weights, where the repository does not show it.
            mask_token_id (`int`, *optional*): The mask's id, instead of the family's.
            shift (`int`, *optional*): 1 where logits at i - 1 predict position i, instead of the family's.
            **kwargs: As in `diffusers.DiffusionPipeline.from_pretrained`; without `model_index.json` these: `scheduler`,
                `tokenizer` (an object, a folder or Hub id, or `None` for none), `denoiser` (facts that differ), `torch_dtype`
                or `dtype` (default: that of the files), `device_map` (a device, `"auto"` or another strategy of accelerate,
                or a dictionary of modules and devices), `max_memory`, `offload_folder`, `revision`, `token`, `cache_dir`,
                `force_download`, `local_files_only`.

        Raises:
            ValueError: If a bundled id is not one of this package's, the repository is of no known family, or its files do
                not fit the family.
            OSError: As `huggingface_hub` raises it: no such repository, no access, no connection.
        """
        name = str(pretrained_model_name_or_path)
        declared = {"family": family, "mask_token_id": mask_token_id, "shift": shift}
        declared = {key: value for key, value in declared.items() if value is not None}
        if not name.startswith(BUNDLED) or Path(name).is_dir():
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            first = first_file(name, ("model_index.json", "config.json"), hub)
            if first is None:
                raise ValueError(
                    f"{name!r} has neither model_index.json nor config.json; if a branch has them (SDTT), pass `revision`"
                )
            if first.name == "config.json":
                return cls.from_family(name, read_config(first), declared, **kwargs)
            if declared:
                raise ValueError(f"`{next(iter(declared))}` is not for {name!r}, whose model_index.json says it")
            return super().from_pretrained(name, **kwargs)
        assets = files("discrete_schedulers") / "assets"
        known = sorted(folder.name for folder in assets.iterdir() if (folder / "model_index.json").is_file())
        if name.removeprefix(BUNDLED) not in known:
            raise ValueError(f"{name!r} is not bundled; bundled: {', '.join(BUNDLED + folder for folder in known)}")
        with as_file(assets / name.removeprefix(BUNDLED)) as folder:
            pipe = super().from_pretrained(str(folder), **kwargs)
        pipe.register_to_config(_name_or_path=name)
        return pipe

    @classmethod
    def from_family(
        cls, name: str, config: dict[str, Any], declared: dict[str, Any], **kwargs: Any
    ) -> DiscreteDiffusionPipeline:
        """Load a repository that has a config.json and no `model_index.json`. Arguments as in `from_pretrained`."""
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        dtype, device = kwargs.pop("torch_dtype", None), kwargs.pop("device_map", None)
        dtype = kwargs.pop("dtype", dtype)
        memory, folder = kwargs.pop("max_memory", None), kwargs.pop("offload_folder", None)
        unknown = kwargs.keys() - {"scheduler", "tokenizer", "denoiser"}
        if unknown:
            raise ValueError(f"`{min(unknown)}` is not an argument for {name!r}, which has no model_index.json")
        row = find_family(name, config, declared.pop("family", None))
        network = build_network(row, config)
        tokenizer = kwargs["tokenizer"] if "tokenizer" in kwargs else load_tokenizer(row, name, hub)
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(
                row._replace(tokenizer=str(tokenizer), tokenizer_class="AutoTokenizer"), name, hub
            )
        said = dict(kwargs.get("denoiser") or {})
        block_size = said.get("block_size")
        facts = denoiser_facts(row, config, network.config.vocab_size, tokenizer, **declared, block_size=block_size)
        facts |= {"max_length": longest_sequence(network)} | said
        if row.mask == "config" and tokenizer is not None and tokenizer.mask_token is None:
            tokenizer.mask_token = tokenizer.convert_ids_to_tokens(facts["mask_token_id"])  # LLaDA's does not name it
        paths = weight_paths(name, hub)
        load_weights(network, paths, row, dtype, placement(network, device, dtype, paths, memory), folder)
        scheduler = kwargs.get("scheduler") or default_scheduler(facts)
        pipe = cls(network, scheduler, tokenizer, facts)
        pipe.register_to_config(_name_or_path=name)
        return pipe

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network as a function from (x_t, t) to logits of p(x_0 | x_t)."""
        return NetworkDenoiser(self.model, **self.config.denoiser)

    def denoiser_of_a_run(self, use_cache: bool) -> NetworkDenoiser:
        """`denoiser` with the state of one run: a cache, where one is exact."""
        denoiser = self.denoiser
        if use_cache and denoiser.attention == "block_causal" and not denoiser.time_conditioned:
            denoiser.cache = BlockCache(DynamicCache)
        return denoiser

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        template: str | list[str] | Tensor | None = None,
        num_samples: int = 1,
        length: int | None = None,
        num_inference_steps: int = 16,
        use_cache: bool = True,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["text", "pt", "np", "latent"] = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DiscreteDiffusionPipelineOutput | tuple:
        """Sample.

        Args:
            prompt (`str` or `list[str]`, *optional*): Text that the samples begin with; a mask token in it is filled in.
            template (`str`, `list[str]` or `torch.Tensor`, *optional*): What to fill in: text with the tokenizer's mask token
                at each position to fill, or ids (P, L) with the mask id, or -1, there. All of one length.
            num_samples (`int`, defaults to 1): Samples for each prompt or template.
            length (`int`, *optional*): Tokens L of a sample, prompt included. Defaults to the model's longest. Not with a
                template, which has its own.
            num_inference_steps (`int`, defaults to 16): Calls of the network.
            use_cache (`bool`, defaults to `True`): Where the attention goes by blocks: keep keys and values of finished blocks,
                which changes nothing but time and memory. Elsewhere there is nothing to keep.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One, or one per sample: then a sample does
                not depend on its batch.
            latents (`torch.Tensor` of shape `(B, L)`, *optional*): Tokens to start from instead of the prior.
            output_type (`str`, defaults to `"text"`): `"text"` decodes as well; `"np"` returns a NumPy array.
            return_dict (`bool`, defaults to `True`): Return [`DiscreteDiffusionPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `f(pipe, step, timestep, kwargs)` after each step; may
                return `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Names passed to it, of `["latents"]`.

        Returns:
            [`DiscreteDiffusionPipelineOutput`] or `tuple`: `sequences`, `texts`, `num_model_calls`.

        Raises:
            ValueError: If an argument is not allowed.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        self.check_scheduler()
        self.check_inputs(prompt, template, num_samples, length, output_type, tensor_inputs)
        device = self._execution_device
        denoiser, scheduler = self.denoiser_of_a_run(use_cache), self.scheduler

        known = self.prepare_template(prompt, template, num_samples, length, latents)
        latents, frozen = self.prepare_latents(known, latents, generator, device)
        template_ids = latents.clone()
        scheduler.set_timesteps(num_inference_steps)
        self.check_blocks(frozen)
        self._num_timesteps, num_model_calls = len(scheduler.timesteps), 0

        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                conditions = scheduler.model_inputs(t, latents, frozen, generator)
                chosen = scheduler.positions(t, latents, generator)  # None: all of them
                model_output = denoiser(latents, t, chosen, **conditions)
                num_model_calls += 1 if chosen is None else int(chosen.any())
                latents = scheduler.step(model_output, t, latents, generator=generator).prev_sample
                latents = torch.where(frozen, template_ids, latents)
                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    latents = callback_on_step_end(self, i, t, callback_kwargs).pop("latents", latents)
                progress_bar.update()

        self.maybe_free_model_hooks()
        sequences = latents.cpu().numpy() if output_type == "np" else latents
        output = DiscreteDiffusionPipelineOutput(sequences, self.decode(latents, output_type), num_model_calls)
        return output if return_dict else (output.sequences, output.texts, output.num_model_calls)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        template: str | list[str] | Tensor | None,
        num_samples: int,
        length: int | None,
        output_type: str,
        tensor_inputs: list[str],
    ) -> None:
        """Raises `ValueError` if arguments of the call do not fit each other or the model."""
        if prompt is not None and template is not None:
            raise ValueError("`prompt` and `template` cannot both be given: a template holds its own known tokens")
        if length is not None and template is not None:
            raise ValueError("`length` and `template` cannot both be given: a template has its own length")
        if isinstance(template, Tensor):
            self.check_template(template)
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"`num_samples` is {num_samples!r}; it must be an integer of at least 1")
        longest = self.config.denoiser.get("max_length")
        if length is not None and (length < 1 or (longest is not None and length > longest)):
            raise ValueError(f"`length` is {length}; allowed are 1 to {longest or 'any'}")
        if output_type not in ("text", "pt", "np", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; allowed: 'text', 'pt', 'np', 'latent'")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; allowed: {self._callback_tensor_inputs}"
            )
        if self.tokenizer is None and (prompt is not None or isinstance(template, str | list)):
            raise ValueError(
                "`prompt` or `template` is text, but this pipeline has no tokenizer: pass ids as `template`"
            )

    def check_template(self, template: Tensor) -> None:
        """Raises `ValueError` if a template of ids is not int64 (P, L) with ids from -1 to V - 1."""
        if template.dim() != 2 or template.dtype != torch.int64:
            raise ValueError(
                f"`template` is {template.dtype} of shape {tuple(template.shape)}; ids must be int64 (P, L)"
            )
        width = self.config.denoiser["vocab_size"]
        if template.numel() and not -1 <= int(template.min()) <= int(template.max()) < width:
            raise ValueError(
                f"`template` has ids from {template.min()} to {template.max()}; allowed are -1 to {width - 1}"
            )

    def check_scheduler(self) -> None:
        """Raises `ValueError` if the scheduler does not fit the model; warns where its coefficients are another model's."""
        require_ours(self.scheduler)
        names = ["vocab_size", "mask_token_id", "process"]
        denoiser = self.denoiser
        if denoiser.time_conditioned or (denoiser.process == "uniform" and denoiser.parametrization != "x0"):
            names.append("noise_schedule")  # these read the noise level; the others see tokens only
        for name in names:
            if self.scheduler.config[name] != self.config.denoiser[name]:
                raise ValueError(
                    f"`scheduler` has {name} {self.scheduler.config[name]!r}, but the model has {self.config.denoiser[name]!r}"
                )
        if self.scheduler.needs_revealed_logits and denoiser.revealed_logits == "none":
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__}, which reads the law of each revealed token given the "
                "others; this model has none. Use a HollowTransformerModel, or estimate it with "
                "denoiser={'revealed_logits': 'shadow'} where the network takes `attention_mask` and `position_ids`"
            )
        learned_for, name = self.scheduler.config.get("learned_for"), self.config.get("_name_or_path")
        if learned_for and name and learned_for.get("base_model") not in (None, name):
            warnings.warn(
                f"the scheduler's coefficients were learned for {learned_for['base_model']!r}, this model is {name!r}",
                stacklevel=4,
            )

    def check_blocks(self, frozen: Tensor) -> None:
        """Raises `ValueError` if the attention goes by blocks, and the scheduler or what is known (`frozen`, (B, L)) does not.
        Asked when the scheduler has its grid."""
        size = self.config.denoiser.get("block_size")
        if size is None:
            return
        has_free = torch.stack([(~block).any(1) for block in frozen.split(size, dim=1)], dim=1)  # (B, blocks)
        known = torch.stack([block.any(1) for block in frozen.split(size, dim=1)], dim=1)
        after_free = has_free.cumsum(1) - has_free.long() > 0
        if (known & after_free).any():
            raise ValueError(
                "tokens are known in a block after one that is to be filled: this model's attention goes by blocks of "
                f"{size}, and no block sees a later one"
            )
        if int(has_free.sum(1).max()) <= 1:
            return
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if not scheduler.goes_by_blocks(size):
            raise ValueError(
                f"`scheduler` is a {name} with block_length {scheduler.config.get('block_length')}, but this model's attention "
                f"goes by blocks of {size}: each has to be finished and final before the next one begins. Take one that does "
                f"not revise tokens with a `block_length` that divides {size}, such as ConfidenceScheduler.from_config("
                f"pipe.scheduler.config, block_length={size}), or fill no more than one block"
            )
        parts = frozen.split(scheduler.config["block_length"], dim=1)
        blocks = int(torch.stack([(~part).any(1) for part in parts]).sum(0).max())
        if blocks > len(scheduler.timesteps):
            raise ValueError(
                f"`num_inference_steps` is {scheduler.num_inference_steps}, but {blocks} blocks of "
                f"{scheduler.config['block_length']} are to be filled one after the other: at least a call each"
            )

    def prepare_template(
        self,
        prompt: str | list[str] | None,
        template: str | list[str] | Tensor | None,
        num_samples: int,
        length: int | None,
        latents: Tensor | None,
    ) -> Tensor:
        """What is known of each sample: ids (B, L), -1 where nothing is."""
        facts = self.config.denoiser
        length = length or (latents.shape[1] if latents is not None else facts.get("max_length"))
        if isinstance(template, Tensor):
            known = template
        elif template is not None:
            known = infill_template(self.tokenizer, template, facts["mask_token_id"])
        elif length is None:
            raise ValueError("`length` is required: this model does not say how long its sequences are")
        elif prompt is not None:
            known = prefix_template(self.tokenizer, prompt, length)
        else:
            known = torch.full((1, length), -1, dtype=torch.int64)
        longest = facts.get("max_length")
        if longest is not None and known.shape[1] > longest:
            raise ValueError(f"the samples would have {known.shape[1]} tokens; this model takes at most {longest}")
        if facts["process"] == "absorbing":
            known = known.masked_fill(known == facts["mask_token_id"], -1)
        return known.repeat_interleave(num_samples, 0)

    def prepare_latents(
        self, known: Tensor, latents: Tensor | None, generator: Generators, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Tokens to start from, int64 (B, L), and which of them stay as they are, bool (B, L)."""
        known = known.to(device)
        if isinstance(generator, list) and len(generator) != len(known):
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but {len(known)} samples are wanted: one each"
            )
        if latents is None:
            latents = self.scheduler.sample_prior(tuple(known.shape), generator, device)
        elif tuple(latents.shape) != tuple(known.shape) or latents.dtype != torch.int64:
            raise ValueError(
                f"`latents` is {latents.dtype} of shape {tuple(latents.shape)}; it must be int64 of shape {tuple(known.shape)}"
            )
        frozen = known >= 0
        return torch.where(frozen, known, latents.to(device)), frozen

    def decode(self, sequences: Tensor, output_type: str) -> list[str] | None:
        """Texts of token ids (B, L), special tokens left out."""
        if output_type != "text" or self.tokenizer is None:
            return None
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
