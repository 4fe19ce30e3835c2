"""The pipeline for text and any other tokens: prompts and templates in, the loop of `pipeline_base.py`, ids and texts out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from discrete_schedulers.models.checkpoints import denoiser_facts, find_family
from discrete_schedulers.models.loading import (
    build_network,
    first_file,
    load_tokenizer,
    load_weights,
    longest_sequence,
    read_config,
    weight_paths,
)
from discrete_schedulers.pipelines.pipeline_base import (
    HUB_ARGUMENTS,
    SCHEDULER_FACTS,
    DiscretePipeline,
    StepCallback,
    bundled_folder,
    is_bundled,
    network_facts,
    require_ours,
)
from discrete_schedulers.pipelines.text import infill_template, prefix_template
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers import AncestralScheduler, DiscreteScheduler


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


class DiscreteDiffusionPipeline(DiscretePipeline):
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
        facts = network_facts(model, scheduler)
        self.register_to_config(denoiser=facts | dict(denoiser or {}))

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
                or `dtype` (default: that of the files), `device_map` (one device), `revision`, `token`, `cache_dir`,
                `force_download`, `local_files_only`.

        Raises:
            ValueError: If a bundled id is not one of this package's, the repository is of no known family, or its files do
                not fit the family.
            OSError: As `huggingface_hub` raises it: no such repository, no access, no connection.
        """
        name = str(pretrained_model_name_or_path)
        declared = {"family": family, "mask_token_id": mask_token_id, "shift": shift}
        declared = {key: value for key, value in declared.items() if value is not None}
        if not is_bundled(name):
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
        with bundled_folder(name) as folder:
            pipe = super().from_pretrained(folder, **kwargs)
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
        unknown = kwargs.keys() - {"scheduler", "tokenizer", "denoiser"}
        if unknown:
            raise ValueError(f"`{min(unknown)}` is not an argument for {name!r}, which has no model_index.json")
        if device in ("auto", "balanced", "sequential") or isinstance(device, dict):
            raise ValueError(
                f"`device_map` is {device!r}; for {name!r}, which has no model_index.json, name one device"
            )
        row = find_family(name, config, declared.pop("family", None))
        network = build_network(row, config)
        tokenizer = kwargs["tokenizer"] if "tokenizer" in kwargs else load_tokenizer(row, name, hub)
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(
                row._replace(tokenizer=str(tokenizer), tokenizer_class="AutoTokenizer"), name, hub
            )
        facts = denoiser_facts(row, config, network.config.vocab_size, tokenizer, **declared)
        facts |= {"max_length": longest_sequence(network)} | dict(kwargs.get("denoiser") or {})
        if row.mask == "config" and tokenizer is not None and tokenizer.mask_token is None:
            tokenizer.mask_token = tokenizer.convert_ids_to_tokens(facts["mask_token_id"])  # LLaDA's does not name it
        load_weights(network, weight_paths(name, hub), row, dtype, "cpu" if device is None else device)
        scheduler = kwargs.get("scheduler") or AncestralScheduler(**{fact: facts[fact] for fact in SCHEDULER_FACTS})
        pipe = cls(network, scheduler, tokenizer, facts)
        pipe.register_to_config(_name_or_path=name)
        return pipe

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        template: str | list[str] | Tensor | None = None,
        num_samples: int = 1,
        length: int | None = None,
        num_inference_steps: int = 16,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["text", "pt", "np", "latent"] = "text",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
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
        tensor_inputs = self.tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_scheduler()
        self.check_inputs(prompt, template, num_samples, length, output_type)
        known = self.prepare_template(prompt, template, num_samples, length, latents)
        latents, frozen = self.prepare_latents(known, latents, generator, self._execution_device)
        latents, num_model_calls = self.denoise(
            self.denoiser, latents, frozen, num_inference_steps, generator, callback_on_step_end, tensor_inputs
        )
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

    def decode(self, sequences: Tensor, output_type: str) -> list[str] | None:
        """Texts of token ids (B, L), special tokens left out."""
        if output_type != "text" or self.tokenizer is None:
            return None
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
