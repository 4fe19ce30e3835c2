"""The pipeline for text and any other tokens: prompts and templates in, the loop of `pipeline_base.py`, ids and texts out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import DynamicCache

from discrete_schedulers.blocks import BlockCache
from discrete_schedulers.bundled import bundled_folder, is_bundled
from discrete_schedulers.denoisers import Denoiser, NetworkDenoiser
from discrete_schedulers.guidance import GuidanceScale, GuidanceSchedule, GuidedDenoiser
from discrete_schedulers.interop import FOREIGN
from discrete_schedulers.models.checkpoints import denoiser_facts, end_token_ids, find_family
from discrete_schedulers.models.diffusion_gemma import PromptAndCanvas, canvas_length
from discrete_schedulers.models.loading import (
    build_network,
    first_file,
    load_tokenizer,
    load_weights,
    longest_sequence,
    number_of_states,
    placement,
    read_config,
    weight_paths,
)
from discrete_schedulers.pipelines.pipeline_base import (
    HUB_ARGUMENTS,
    SCHEDULER_FACTS,
    DiscretePipeline,
    StepCallback,
    as_dtype,
    check_count,
    check_facts,
    check_network,
    class_ids,
    for_this_model,
    name_of,
    network_facts,
    network_of,
    require_ours,
    with_dtypes,
)
from discrete_schedulers.pipelines.text import (
    Frame,
    Message,
    ProcessedDenoiser,
    chat_rows,
    end_ids,
    end_of_text,
    infill_template,
    negative_ids,
    prefix_frame,
    prompt_rows,
    special_ends,
    takes_argument,
    template_frame,
)
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers import AncestralScheduler, ConfidenceScheduler, DiscreteScheduler


def default_scheduler(facts: dict[str, Any]) -> DiscreteScheduler:
    """A scheduler for these facts of a network that draws from its own law: blocks are filled one after the other where its
    attention goes by blocks, and within them positions open in random order."""
    known = {name: facts[name] for name in SCHEDULER_FACTS}
    if facts.get("attention", "full") == "full":
        return AncestralScheduler(**known)
    return ConfidenceScheduler(**known, score="random", block_length=facts["block_size"])


IMAGE_PIPELINES = ("AmusedPipeline", "DiscreteImagePipeline")


@dataclass
class DiscreteDiffusionPipelineOutput(BaseOutput):
    """Output of [`DiscreteDiffusionPipeline`].

    Args:
        sequences (`torch.Tensor` or `np.ndarray` of shape `(B, L)`): Token ids, prompt included; padding behind shorter rows.
        texts (`list[str]`, *optional*): Decoded sequences up to their end token, with `output_type="text"` and a tokenizer:
            prompt and what was written, but for `messages` the reply alone.
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
        eos_token_id (`int` or `list[int]`, *optional*): Ids by which the model ends a text. `None`: texts fill their length.

    Example:

    ```python
    from discrete_schedulers import DiscreteDiffusionPipeline

    pipe = DiscreteDiffusionPipeline.from_pretrained("discrete-schedulers/tiny-text")
    print(pipe(num_samples=2, num_inference_steps=16).texts)
    ```

    Raises:
        ValueError: If the scheduler is not one of this library; diffusers' go in as [`ForeignScheduler`].
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["tokenizer"]

    def __init__(
        self,
        model: torch.nn.Module,
        scheduler: DiscreteScheduler,
        tokenizer: Any = None,
        denoiser: dict[str, Any] | None = None,
        eos_token_id: int | list[int] | None = None,
    ) -> None:
        super().__init__()
        scheduler = for_this_model(scheduler, denoiser)
        require_ours(scheduler)
        check_network(model, denoiser)
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)
        if canvas_length(model) is not None:  # diffusers would look for the class in its pipeline folder of that name
            self.register_to_config(model=("transformers", type(model).__name__))
        facts = network_facts(model, scheduler)
        self.register_to_config(denoiser=facts | dict(denoiser or {}), eos_token_id=eos_token_id)

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
                ids `"discrete-schedulers/tiny-text"` and `"discrete-schedulers/tiny-molecule"`, which need no network.
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
        name, kwargs = name_of(pretrained_model_name_or_path), with_dtypes(kwargs)
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
            kind = read_config(first).get("_class_name")
            if kind in IMAGE_PIPELINES:
                raise ValueError(
                    f"{name!r} is of {kind}, for images: load it with DiscreteImagePipeline.from_pretrained"
                )
            return cls.from_saved(name, first, **kwargs)
        with bundled_folder(name) as folder:
            kind = read_config(Path(folder) / "model_index.json").get("_class_name")
            if kind in IMAGE_PIPELINES:
                raise ValueError(
                    f"{name!r} is of {kind}, for images: load it with DiscreteImagePipeline.from_pretrained"
                )
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
        memory, folder = kwargs.pop("max_memory", None), kwargs.pop("offload_folder", None)
        unknown = kwargs.keys() - {"scheduler", "tokenizer", "denoiser"}
        if unknown:
            raise ValueError(f"`{min(unknown)}` is not an argument for {name!r}, which has no model_index.json")
        check_facts(kwargs.get("denoiser"))
        if kwargs.get("scheduler") is not None and not isinstance(kwargs["scheduler"], tuple(FOREIGN)):
            require_ours(kwargs["scheduler"])
        for key, value in declared.items():
            if key != "family" and (not isinstance(value, int) or (key == "shift" and value not in (0, 1))):
                raise ValueError(f"`{key}` is {value!r}; it must be {'0 or 1' if key == 'shift' else 'an id'}")
        dtype = as_dtype(dtype)
        row = find_family(name, config, declared.pop("family", None))
        network = build_network(row, config)
        tokenizer = kwargs["tokenizer"] if "tokenizer" in kwargs else load_tokenizer(row, name, hub)
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(
                row._replace(tokenizer=str(tokenizer), tokenizer_class="AutoTokenizer"), name, hub
            )
        said = dict(kwargs.get("denoiser") or {})
        block_size = said.get("block_size")
        facts = denoiser_facts(row, config, number_of_states(network), tokenizer, **declared, block_size=block_size)
        facts |= {"max_length": longest_sequence(network)} | said
        if row.mask == "config" and tokenizer is not None and tokenizer.mask_token is None:
            tokenizer.mask_token = tokenizer.convert_ids_to_tokens(facts["mask_token_id"])  # LLaDA's does not name it
        paths = weight_paths(name, hub)
        load_weights(network, paths, row, dtype, placement(network, device, dtype, paths, memory), folder)
        scheduler = kwargs.get("scheduler") or default_scheduler(facts)
        pipe = cls(network, scheduler, tokenizer, facts, end_token_ids(row, tokenizer))
        pipe.register_to_config(_name_or_path=name)
        return pipe

    def denoiser_of_a_run(self, use_cache: bool, frame: Frame) -> NetworkDenoiser:
        """`denoiser` with the state of one run: a cache, where one is exact; a prompt, where the network reads it apart."""
        denoiser = self.denoiser
        if canvas_length(self.model) is not None:
            device = self._execution_device
            denoiser.model = PromptAndCanvas(self.model, frame.known.to(device), frame.is_padding.to(device))
        if use_cache and denoiser.attention == "block_causal" and not denoiser.time_conditioned:
            denoiser.cache = BlockCache(DynamicCache)
        return denoiser

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        messages: list[Message] | list[list[Message]] | None = None,
        template: str | list[str] | Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        guidance_scale: GuidanceScale = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        num_samples: int = 1,
        length: int | None = None,
        max_new_tokens: int | None = None,
        num_inference_steps: int = 16,
        use_cache: bool = True,
        generator: Generators = None,
        latents: Tensor | None = None,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
        eos_token_id: int | list[int] | None = None,
        output_type: Literal["text", "pt", "np", "latent"] = "text",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DiscreteDiffusionPipelineOutput | tuple:
        """Sample.

        Args:
            prompt (`str` or `list[str]`, *optional*): Text that the samples begin with; a mask token in it is filled in.
            messages (`list[dict]` or `list[list[dict]]`, *optional*): One or more conversations, `{"role": "user", "content":
                "..."}`, through the tokenizer's chat template; the samples reply.
            template (`str`, `list[str]` or `torch.Tensor`, *optional*): What to fill in: text with the tokenizer's mask token
                at each position to fill, or ids (P, L) with the mask id, or -1, there. All of one length. Text gets start and
                end tokens where the model never noises its tokenizer's; ids are taken as they are.
            negative_prompt (`str` or `list[str]`, *optional*): What the unconditional branch sees in the place of the prompt,
                not longer than it; the rest, or without one all, are masks.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): For a model with classes: one for all, or one for
                each prompt or template; without these, `num_samples` for each. The model's number of classes, the
                default, means any.
            guidance_scale (`float` or `Callable`, defaults to 1.0): s in u + s (c - u), of raw logits, or a function of time;
                1 is off. See [`GuidedDenoiser`]. Guides by `class_labels` where they are given, and by what is known, the
                prompt or template, where they are not or there is a `negative_prompt`.
            guidance_schedule (`str`, defaults to `"constant"`): `"linear"` and `"cosine"` let the scale grow from 1 to
                `guidance_scale` while time goes from 1 to 0, see `guidance_schedule`.
            num_samples (`int`, defaults to 1): Samples for each prompt or template.
            length (`int`, *optional*): Tokens L of a sample, prompt and special tokens included. Defaults to the model's
                longest, and for DiffusionGemma to a canvas behind the prompt. Not with a template, which has its own.
            max_new_tokens (`int`, *optional*): Instead of `length`: tokens to write in each sample. Behind shorter prompts
                there is padding then, which needs a network that takes `attention_mask`.
            num_inference_steps (`int`, defaults to 16): Steps; most schedulers call the network once in each.
            use_cache (`bool`, defaults to `True`): Where the attention goes by blocks: keep keys and values of finished blocks
                and run equal prompts once, which changes nothing but time and memory. Not with guidance; elsewhere there is
                nothing to keep.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One, or one per sample: then a sample does
                not depend on its batch (its law never does; the draws are for the whole width, padding included).
            latents (`torch.Tensor` of shape `(B, L)`, *optional*): Tokens to start from instead of the prior.
            logits_processor (`Callable`, *optional*): A transformers `LogitsProcessorList`, or one processor. What it sees:
                [`~pipelines.text.ProcessedDenoiser`].
            eos_token_id (`int` or `list[int]`, *optional*): Texts are cut at the first of these that was written; an empty
                list: nowhere. Defaults to the pipeline's own. `sequences` are whole.
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
        self.check_latents(latents)
        self.check_inputs(prompt, messages, template, num_samples, length, max_new_tokens, output_type)
        end_ids(eos_token_id, None)
        labels = self.prepare_labels(class_labels)
        frame = self.prepare_frame(prompt, messages, template, labels, length, max_new_tokens, latents)
        self.check_blocks(frame, num_inference_steps)
        denoiser = self.prepare_denoiser(
            frame, labels, guidance_scale, negative_prompt, logits_processor, num_samples, use_cache, guidance_schedule
        )
        frame = frame.repeated(num_samples)
        latents, frozen = self.prepare_latents(frame.known, latents, generator, self._execution_device)
        latents, num_model_calls = self.denoise(
            denoiser, latents, frozen, num_inference_steps, generator, callback_on_step_end, tensor_inputs
        )
        self.maybe_free_model_hooks()
        sequences = latents.cpu().numpy() if output_type == "np" else latents
        texts = self.decode(latents, frame, eos_token_id, messages is not None) if output_type == "text" else None
        output = DiscreteDiffusionPipelineOutput(sequences, texts, num_model_calls)
        return output if return_dict else (output.sequences, output.texts, output.num_model_calls)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        messages: list | None,
        template: str | list[str] | Tensor | None,
        num_samples: int,
        length: int | None,
        max_new_tokens: int | None,
        output_type: str,
    ) -> None:
        """Raises `ValueError` if arguments of the call do not fit each other or the model."""
        texts = {"prompt": prompt, "messages": messages, "template": template}
        given = [f"`{name}`" for name, value in texts.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot both be given: each says what is known of the samples")
        sizes = {"length": length, "max_new_tokens": max_new_tokens}
        size = [f"`{name}`" for name, value in sizes.items() if value is not None]
        if len(size) > 1:
            raise ValueError(f"{' and '.join(size)} cannot both be given: prompt and all, or what is written")
        if size and template is not None:
            raise ValueError(f"{size[0]} and `template` cannot both be given: a template has its own length")
        if isinstance(template, Tensor):
            self.check_template(template)
        check_count("num_samples", num_samples)
        longest = self.config.denoiser.get("max_length")
        for name, value in sizes.items():
            if value is not None:
                check_count(name, value, longest)
        if output_type not in ("text", "pt", "np", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; allowed: 'text', 'pt', 'np', 'latent'")
        if self.tokenizer is None and (prompt is not None or isinstance(template, str | list)):
            raise ValueError(
                "`prompt` or `template` is text, but this pipeline has no tokenizer: pass ids as `template`"
            )
        self.check_masks(prompt, messages, template)

    def check_call(self, prompt: str | list[str] | None, length: int | None, num_inference_steps: int) -> None:
        """What a call with these arguments checks before its network runs; nothing is sampled.

        Args:
            prompt (`str` or `list[str]`, *optional*): As in a call.
            length (`int`, *optional*): As in a call.
            num_inference_steps (`int`): As in a call.

        Raises:
            ValueError: If an argument is not allowed.
        """
        self.check_scheduler()
        self.check_inputs(prompt, None, None, 1, length, None, "text")
        self.scheduler.set_timesteps(num_inference_steps)
        self.check_blocks(self.prepare_frame(prompt, None, None, None, length, None, None), num_inference_steps)

    def check_masks(self, *given: Any) -> None:
        """Raises `ValueError` if texts have the tokenizer's mask, and it is another token than the model's: it would be a word
        to the model. Tokenizers of models that were trained with a mask of their own may well have one."""
        mask, name = self.config.denoiser["mask_token_id"], getattr(self.tokenizer, "mask_token", None)
        if mask is None or name is None or not any(isinstance(one, str | list) and name in str(one) for one in given):
            return
        if self.tokenizer.mask_token_id != mask:
            raise ValueError(
                f"`tokenizer` has the mask token {name!r} at id {self.tokenizer.mask_token_id}, but the model's mask is "
                f"{mask}: it is another model's tokenizer, or set `pipe.tokenizer.mask_token`"
            )

    def check_blocks(self, frame: Frame, num_inference_steps: int) -> None:
        """Raises `ValueError` if the attention goes by blocks, and the scheduler or what is known does not."""
        size = self.config.denoiser.get("block_size")
        if size is None:
            return
        frozen, is_padding = frame.known >= 0, frame.is_padding
        has_free = torch.stack([(~block).any(1) for block in frozen.split(size, dim=1)], dim=1)  # (B, blocks)
        known = torch.stack([block.any(1) for block in (frozen & ~is_padding).split(size, dim=1)], dim=1)
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
        scheduler.set_timesteps(num_inference_steps)
        parts = frozen.split(scheduler.config["block_length"], dim=1)
        blocks = int(torch.stack([(~part).any(1) for part in parts]).sum(0).max())
        if blocks > len(scheduler.timesteps):
            raise ValueError(
                f"`num_inference_steps` is {scheduler.num_inference_steps}, but {blocks} blocks of "
                f"{scheduler.config['block_length']} are to be filled one after the other: at least a call each"
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

    def prepare_labels(self, class_labels: int | list[int] | Tensor | None) -> Tensor | None:
        """Classes, int64, one or more; `None` for a model without, or whose `call_arguments` name one.

        Raises:
            ValueError: If the model has no classes, or not these.
        """
        number = self.num_classes
        if class_labels is None:
            fixed = "class_labels" in self.config.denoiser.get("call_arguments", {})
            return None if number is None or fixed else torch.tensor([number])
        if number is None:
            raise ValueError("`class_labels` were passed, but this model has no classes")
        labels = class_ids(class_labels).cpu()
        if labels.is_floating_point():
            raise ValueError(f"`class_labels` is {class_labels}; allowed are integers from 0 to {number}")
        labels = labels.long()
        if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) <= number:
            raise ValueError(f"`class_labels` is {labels.tolist()}; allowed are 0 to {number}, the last one for any")
        return labels

    def prepare_frame(
        self,
        prompt: str | list[str] | None,
        messages: list | None,
        template: str | list[str] | Tensor | None,
        labels: Tensor | None,
        length: int | None,
        max_new_tokens: int | None,
        latents: Tensor | None,
    ) -> Frame:
        """What is known of each sample before `num_samples` multiplies them."""
        facts, tokenizer = self.config.denoiser, self.tokenizer
        mask, longest, frozen = facts["mask_token_id"], facts.get("max_length"), facts.get("frozen_token_ids", ())
        ends = special_ends(tokenizer, frozen)
        if length is None and latents is None and max_new_tokens is None:
            max_new_tokens = canvas_length(self.model)
        if max_new_tokens is None:
            length = length or (latents.shape[1] if latents is not None else longest)
        if isinstance(template, Tensor):
            frame = template_frame(template.cpu())
        elif template is not None:
            frame = template_frame(infill_template(tokenizer, template, mask, ends))
        elif length is None and max_new_tokens is None:
            raise ValueError("`length` is required: this model does not say how long its sequences are")
        else:
            rows: list[list[int]] = [[]] * (1 if labels is None else len(labels))
            if messages is not None:
                rows = chat_rows(tokenizer, messages)
            elif prompt is not None:
                rows = prompt_rows(tokenizer, prompt)
            specials = [] if tokenizer is None else [tokenizer.pad_token_id, tokenizer.eos_token_id]
            padding = next(i for i in [*specials, 0, 1] if i is not None and i != mask)
            frame = prefix_frame(rows, length, max_new_tokens, ends, padding)
        given = {"messages": messages, "prompt": prompt, "template": template, "latents": latents}
        source = next((name for name, value in given.items() if value is not None), "max_new_tokens")
        if longest is not None and frame.known.shape[1] > longest:
            raise ValueError(
                f"`{source}`: the samples would have {frame.known.shape[1]} tokens; this model takes at most {longest}"
            )
        if frame.known.numel() and int(frame.known.max()) >= facts["vocab_size"]:
            raise ValueError(
                f"`{source}` has the id {int(frame.known.max())}, but this model has ids up to {facts['vocab_size'] - 1}: its "
                "tokenizer is another model's"
            )
        if facts["process"] == "absorbing":
            frame.known = frame.known.masked_fill(frame.known == mask, -1)
        return frame

    def prepare_denoiser(
        self,
        frame: Frame,
        labels: Tensor | None,
        guidance_scale: GuidanceScale,
        negative_prompt: str | list[str] | None,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None,
        num_samples: int = 1,
        use_cache: bool = False,
        guidance_schedule: GuidanceSchedule = "constant",
    ) -> Denoiser:
        """The network with its conditions, one row for each sample: padding, classes, guidance, logits processors."""
        self.take_guidance(guidance_scale, guidance_schedule)
        facts, ids = self.config.denoiser, None
        is_guided = callable(guidance_scale) or guidance_scale != 1
        if negative_prompt is not None and not is_guided:
            raise ValueError("`negative_prompt` is for guidance: pass `guidance_scale`, which is 1 and so off")
        if is_guided and canvas_length(self.model) is not None:
            raise ValueError(
                f"`guidance_scale` must be 1 with a {type(self.model).__name__}: it keeps the prediction of one branch"
            )
        conditions = self.prepare_padding(frame)
        negative, is_labelled = dict(conditions), False
        number, count = self.num_classes, len(frame.known)
        if labels is not None and number is not None:
            if len(labels) not in (1, count):
                raise ValueError(
                    f"`class_labels` has {len(labels)} entries; it must have one, or one for each prompt or template, "
                    f"here {count}"
                )
            is_labelled = bool((labels != number).any())
            conditions["class_labels"] = labels.expand(count)
            negative["class_labels"] = torch.full((count,), number)
        if is_guided and (negative_prompt is not None or not is_labelled):
            rows = None if negative_prompt is None else prompt_rows(self.tokenizer, negative_prompt, "negative_prompt")
            ids = negative_ids(frame, rows, facts["mask_token_id"], facts.get("frozen_token_ids", ()))

        def batch(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(num_samples, 0).to(self._execution_device)

        samples = frame.repeated(num_samples)
        conditions = {name: batch(value) for name, value in conditions.items()}
        if canvas_length(self.model) is not None:
            conditions["row_ids"] = torch.arange(len(samples.known), device=self._execution_device)
        denoiser = GuidedDenoiser(
            self.denoiser_of_a_run(use_cache and not is_guided, samples),
            guidance_scale,
            conditions,
            {name: batch(value) for name, value in negative.items()},
            None if ids is None else batch(ids),
        )
        if is_guided:
            denoiser.guidance_scale = self.guidance_at  # asked in each step: a callback may change it
        return denoiser if logits_processor is None else ProcessedDenoiser(denoiser, logits_processor)

    def prepare_padding(self, frame: Frame) -> dict[str, Tensor]:
        """What hides the padding of a frame from the network: nothing where there is none.

        Raises:
            ValueError: If the network cannot be told.
        """
        if not frame.is_padding.any() or canvas_length(self.model) is not None:  # a canvas is run without it
            return {}
        network = network_of(self.model)
        if not takes_argument(network, "attention_mask"):
            raise ValueError(
                f"prompts of unequal lengths leave padding with `max_new_tokens`, and a {type(network).__name__} takes "
                "no `attention_mask` to hide it: pass `length` instead, or call once for each prompt"
            )
        return {"attention_mask": (~frame.is_padding).long()}

    def decode(
        self, sequences: Tensor, frame: Frame, eos_token_id: int | list[int] | None, is_reply: bool
    ) -> list[str] | None:
        """Texts of token ids (B, L) up to the first end token that was written, special tokens left out.

        Args:
            sequences (`torch.Tensor` of shape `(B, L)`): Token ids.
            frame (`Frame`): What was known of them.
            eos_token_id (`int` or `list[int]`, *optional*): Ids of end tokens; `None`: the pipeline's own.
            is_reply (`bool`): Leave the prompt out.
        """
        if self.tokenizer is None:
            return None
        ends = end_ids(eos_token_id, self.config.get("eos_token_id"))
        texts = []
        for ids, begin, length in zip(sequences.tolist(), frame.prompt_ends, frame.lengths, strict=True):
            end = end_of_text(ids[: int(length)], int(begin), ends)
            texts.append(ids[int(begin) if is_reply else 0 : end])
        return self.tokenizer.batch_decode(texts, skip_special_tokens=True)
