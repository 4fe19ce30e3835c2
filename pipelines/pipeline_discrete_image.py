"""The pipeline for images made of tokens: classes, prompts and pictures in, the loop of `pipeline_base.py`, pictures out."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput
from torch import Tensor

from discrete_schedulers.bundled import bundled_folder, is_bundled
from discrete_schedulers.denoisers import NetworkDenoiser
from discrete_schedulers.guidance import GuidanceScale, GuidanceSchedule, GuidedDenoiser
from discrete_schedulers.models.image_checkpoints import (
    HALTON_REPOSITORY,
    load_halton,
    load_text_to_image,
    text_to_image_class,
)
from discrete_schedulers.models.loading import first_file, read_config
from discrete_schedulers.pipelines.images import (
    decode,
    encode,
    pictures,
    pixels_of,
    pixels_per_token,
    tokens_to_paint,
)
from discrete_schedulers.pipelines.pipeline_base import (
    HUB_ARGUMENTS,
    DiscretePipeline,
    StepCallback,
    as_dtype,
    check_count,
    check_network,
    class_ids,
    for_this_model,
    name_of,
    network_facts,
    one_device,
    require_ours,
    with_dtypes,
)
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers import DiscreteScheduler, MaskGITScheduler, SpreadScheduler
from discrete_schedulers.schedulers.scheduling_utils import check_grid_shape

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def refuse_texts(name: str, index: dict[str, Any]) -> None:
    """Raises `ValueError` if this model_index.json is of a pipeline for texts."""
    kind = index.get("_class_name")
    if kind == "DiscreteDiffusionPipeline":
        raise ValueError(f"{name!r} is of {kind}, for texts: load it with {kind}.from_pretrained")


@dataclass
class DiscreteImagePipelineOutput(BaseOutput):
    """Output of [`DiscreteImagePipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Pictures; arrays (B, H, W, C) and tensors (B, C, H, W)
            with values in [0, 1]; with `output_type="latent"` token ids (B, h, w).
        sequences (`torch.Tensor` of shape `(B, L)`): Token ids, row by row, L = h w.
        num_model_calls (`int`): Calls of the network that were made; with guidance two in each step.
    """

    images: Any
    sequences: Tensor | None = None
    num_model_calls: int = 0


class DiscreteImagePipeline(DiscretePipeline):
    """Sample images from a discrete diffusion model over the tokens of an image tokenizer.

    Args:
        model (`torch.nn.Module`): The network. With `num_classes` in its config it takes `class_labels` (B,), where the number
            of classes stands for "any"; with a text encoder `encoder_hidden_states` (B, T, C), `pooled_text_emb` (B, C) and
            `micro_conds` (B, 5), as diffusers' `UVit2DModel` does.
        scheduler (`DiscreteScheduler`): Any scheduler of this library, or one of diffusers' for tokens. Where its config has no
            `grid_shape`, that of the model is put in: orders in two dimensions need no other help.
        decoder (`torch.nn.Module`): diffusers' `VQModel`, or a module with `encode` and `decode` between pixels in [0, 1] and
            ids (B, h, w), and `config.patch_size`, such as [`PatchCodebook`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For prompts.
        text_encoder (`torch.nn.Module`, *optional*): transformers' `CLIPTextModelWithProjection`.
        denoiser (`dict`, *optional*): Facts about the network: the arguments of [`NetworkDenoiser`] that differ from what the
            scheduler's config and the network's class say. `grid_shape` is required.
        signed_pixels (`bool`, defaults to `False`): The decoder's pixels lie in [-1, 1], not in [0, 1].

    Example:

    ```python
    from discrete_schedulers import DiscreteImagePipeline, SpreadScheduler

    pipe = DiscreteImagePipeline.from_pretrained("discrete-schedulers/tiny-image")
    pipe.scheduler = SpreadScheduler.from_config(pipe.scheduler.config, pattern="halton")
    pipe(class_labels=[3, 7], guidance_scale=2.0, num_inference_steps=16).images[0].save("three.png")
    ```

    Raises:
        ValueError: If the scheduler is not one of this library, or the model does not say its grid.
    """

    model_cpu_offload_seq = "text_encoder->model->decoder"
    _optional_components = ["tokenizer", "text_encoder"]

    def __init__(
        self,
        model: torch.nn.Module,
        scheduler: DiscreteScheduler,
        decoder: torch.nn.Module,
        tokenizer: Any = None,
        text_encoder: Any = None,
        denoiser: dict[str, Any] | None = None,
        signed_pixels: bool = False,
    ) -> None:
        super().__init__()
        scheduler = for_this_model(scheduler, denoiser)
        require_ours(scheduler)
        check_network(model, denoiser)
        facts = network_facts(model, scheduler) | dict(denoiser or {})
        if facts.get("grid_shape") is None:
            raise ValueError("`denoiser` has no `grid_shape`: (height, width) of an image in tokens")
        facts["grid_shape"] = check_grid_shape(facts["grid_shape"])
        if not isinstance(decoder, torch.nn.Module):
            raise ValueError(f"`decoder` is {decoder!r}; it must be a VQModel, or a module with `encode` and `decode`")
        self.register_to_config(denoiser=facts, signed_pixels=signed_pixels)
        self.register_modules(
            model=model, scheduler=scheduler, decoder=decoder, tokenizer=tokenizer, text_encoder=text_encoder
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """As in [`DiscretePipeline`], and a scheduler is told the grid of the model, unless it has one."""
        if name == "scheduler" and isinstance(value, DiscreteScheduler) and value.config.get("grid_shape") is None:
            value.register_to_config(grid_shape=list(self.config.denoiser["grid_shape"]))
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, weight_name: str | None = None, **kwargs: Any
    ) -> DiscreteImagePipeline:
        """Load a pipeline from a folder, the Hub, or this package.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder written by `save_pretrained`, a Hub id, or the bundled
                id `"discrete-schedulers/tiny-image"`, which needs no network. Repositories of aMUSEd (`amused/amused-256`),
                Meissonic (`MeissonFlow/Meissonic`) and Halton-MaskGIT (`llvictorll/Halton-MaskGIT`) are read as they were
                published.
            weight_name (`str`, *optional*): Which file of a Halton-MaskGIT repository, such as `"ImageNet_256_tiny.pth"`.
            **kwargs: As in `diffusers.DiffusionPipeline.from_pretrained`; for repositories that are not of this pipeline these:
                `scheduler`, `denoiser` (facts that differ), `torch_dtype` or `dtype`, `device_map` (one device), `revision`,
                `token`, `cache_dir`, `force_download`, `local_files_only`; aMUSEd and Meissonic: `variant`; Halton-MaskGIT:
                `decoder` (a module, or the folder, file or repository of LlamaGen's `vq_ds16_c2i.pt`).

        Raises:
            ValueError: If a bundled id is not one of this package's, or a repository is of no known family or does not fit it.
            OSError: As `huggingface_hub` raises it: no such repository, no access, no connection.
        """
        name, kwargs = name_of(pretrained_model_name_or_path), with_dtypes(kwargs)
        if not is_bundled(name):
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            index = first_file(name, ("model_index.json",), hub)
            held = {} if index is None else read_config(index)
            refuse_texts(name, held)
            if held.get("_class_name") not in (cls.__name__, "DiscreteImagePipeline"):
                return cls.from_published(name, held, weight_name, **kwargs)
            assert index is not None
            return cls.from_saved(name, index, **kwargs)
        with bundled_folder(name) as folder:
            refuse_texts(name, read_config(Path(folder) / "model_index.json"))
            pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=name)
        return pipe

    @classmethod
    def from_published(
        cls, name: str, index: dict[str, Any], weight_name: str | None, **kwargs: Any
    ) -> DiscreteImagePipeline:
        """Load a repository of somebody else's pipeline, with this model_index.json or none. Arguments as in
        `from_pretrained`."""
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        dtype = kwargs.pop("torch_dtype", None)
        dtype = as_dtype(kwargs.pop("dtype", dtype))
        device = one_device(name, kwargs.pop("device_map", None))
        scheduler, facts = kwargs.pop("scheduler", None), kwargs.pop("denoiser", None)
        network_class = text_to_image_class(name, index, hub)
        if network_class is not None:
            parts = load_text_to_image(name, network_class, dtype, kwargs.pop("variant", None), hub)
        elif not index and (weight_name is not None or name.lower() == HALTON_REPOSITORY.lower()):
            parts = load_halton(name, weight_name, kwargs.pop("decoder", None), dtype, hub)
        else:
            held = f"a model_index.json of {index.get('_class_name')}" if index else "no model_index.json"
            raise ValueError(
                f"{name!r} has {held}; known are this pipeline's own, those of aMUSEd and Meissonic, and Halton-MaskGIT's "
                "files, which `weight_name` names"
            )
        if kwargs:
            raise ValueError(f"`{min(kwargs)}` is not an argument for {name!r}, which is not of this pipeline")
        facts = parts.facts | dict(facts or {})
        if scheduler is None:
            states = {"vocab_size": facts["vocab_size"], "mask_token_id": facts["mask_token_id"]}
            if network_class is not None:
                scheduler = MaskGITScheduler(**states, choice_temperature=2.0)
            else:
                scheduler = SpreadScheduler(**states, pattern="halton", grid="cosine", grid_shape=facts["grid_shape"])
        pipe = cls(
            parts.model, scheduler, parts.decoder, parts.tokenizer, parts.text_encoder, facts, parts.signed_pixels
        )
        pipe.register_to_config(_name_or_path=name)
        return pipe.to(device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 16,
        guidance_scale: GuidanceScale = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        micro_conditioning_aesthetic_score: float = 6.0,
        micro_conditioning_crop_coord: tuple[int, int] = (0, 0),
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DiscreteImagePipelineOutput | tuple:
        """Sample.

        Args:
            prompt (`str` or `list[str]`, *optional*): What the images show, for a model with a text encoder.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance leads away from. Defaults to the empty text.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): Classes of the images, for a model with classes;
                without them it samples from all.
            num_images_per_prompt (`int`, defaults to 1): Images for each prompt, class or picture.
            height (`int`, *optional*): In pixels; another one than the model's own where it reads the grid (`grid_input`).
            width (`int`, *optional*): Likewise.
            num_inference_steps (`int`, defaults to 16): Steps.
            guidance_scale (`float` or `Callable`, defaults to 1.0): s in u + s (c - u), with the raw logits with (c) and
                without (u) the class or prompt, or a function of time; 1 is no guidance. aMUSEd is published with 10,
                Meissonic with 9, Halton-MaskGIT with 1.5 to 3.
            guidance_schedule (`str`, defaults to `"constant"`): `"linear"` and `"cosine"` let the scale grow from 1 to
                `guidance_scale` while time goes from 1 to 0, see `guidance_schedule`.
            image (picture or pictures, *optional*): To paint in: PIL, arrays (P, H, W, C) or tensors (P, C, H, W) in [0, 1].
                Brought to `height` and `width`.
            mask_image (picture or pictures, *optional*): White where to paint. A token stays as the picture has it where none
                of its pixels is white. To paint beyond the border, give a picture with the border in it, and white there.
            micro_conditioning_aesthetic_score (`float`, defaults to 6.0): How beautiful the image is to be; aMUSEd and
                Meissonic are told this beside the text, and
            micro_conditioning_crop_coord (`tuple[int, int]`, defaults to `(0, 0)`): the corner (x, y) of the crop that it is
                to look like.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One, or one per image: then an image does
                not depend on its batch.
            latents (`torch.Tensor` of shape `(B, L)`, *optional*): Tokens to start from instead of the prior.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for token ids.
            return_dict (`bool`, defaults to `True`): Return [`DiscreteImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `f(pipe, step, timestep, kwargs)` after each step; may
                return `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Names passed to it, of `["latents"]`.

        Returns:
            [`DiscreteImagePipelineOutput`] or `tuple`: `images`, `sequences`, `num_model_calls`.

        Raises:
            ValueError: If an argument is not allowed.
        """
        tensor_inputs = self.tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_scheduler()
        self.check_latents(latents)
        self.check_inputs(prompt, negative_prompt, class_labels, num_images_per_prompt, output_type)
        self.take_guidance(guidance_scale, guidance_schedule)
        self.check_numbers(num_inference_steps, micro_conditioning_aesthetic_score, *micro_conditioning_crop_coord)
        grid = self.prepare_grid(height, width)
        known = self.prepare_known(image, mask_image, grid)  # (P, L)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        labels = self.prepare_labels(class_labels)
        negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
        counts = {len(given) for given in (prompts, negatives, labels, known) if given is not None} - {1}
        if len(counts) > 1 or 0 in counts:
            raise ValueError(
                f"'prompts', 'classes' and 'pictures' are {sorted(counts)} in number; allowed: one, or all as many"
            )
        batch = max(counts, default=1) * num_images_per_prompt

        positive, negative = {}, {}
        if prompts is not None:
            extra = (grid, *micro_conditioning_crop_coord, micro_conditioning_aesthetic_score)
            positive = self.text_conditions(prompts, batch, *extra)
            negative = self.text_conditions(negatives, batch, *extra)
        elif labels is not None and self.num_classes is not None:
            positive = {"class_labels": rows(labels, batch)}
            negative = {"class_labels": torch.full_like(positive["class_labels"], self.num_classes)}
        guidance = (guidance_scale, guidance_schedule)
        denoiser = self.denoiser_for(grid, num_inference_steps, positive, negative, *guidance)
        latents, frozen = self.prepare_latents(rows(known, batch), latents, generator, self._execution_device)
        latents, num_model_calls = self.denoise(
            denoiser, latents, frozen, num_inference_steps, generator, callback_on_step_end, tensor_inputs
        )
        images: Any = latents.view(-1, *grid)
        if output_type != "latent":
            images = pictures(decode(self.decoder, images, self.config.signed_pixels), output_type)
        self.maybe_free_model_hooks()
        output = DiscreteImagePipelineOutput(images, latents, num_model_calls)
        return output if return_dict else (output.images, output.sequences, output.num_model_calls)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        class_labels: int | list[int] | Tensor | None,
        num_images_per_prompt: int,
        output_type: str,
    ) -> None:
        """Raises `ValueError` if arguments of the call do not fit each other or the model."""
        has_text = self.tokenizer is not None and self.text_encoder is not None
        if has_text and prompt is None:
            raise ValueError("`prompt` is required: this model is conditioned on text")
        if not has_text and (prompt is not None or negative_prompt is not None):
            raise ValueError(
                "`prompt` or `negative_prompt` is given, but this pipeline has no tokenizer and text encoder"
            )
        if class_labels is not None and self.num_classes is None:
            raise ValueError("`class_labels` is given, but this model has no classes (`num_classes` in its config)")
        check_count("num_images_per_prompt", num_images_per_prompt)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; allowed: {', '.join(map(repr, OUTPUT_TYPES))}")

    def check_numbers(self, num_inference_steps: int, aesthetic_score: float, *crop: float) -> None:
        """Raises `ValueError` if a number of the call is not allowed: before text is encoded, which takes long."""
        self.scheduler.set_timesteps(num_inference_steps)
        given: dict[str, Sequence[float]] = {"micro_conditioning_aesthetic_score": [aesthetic_score]}
        for name, values in (given | {"micro_conditioning_crop_coord": crop}).items():
            if not all(isinstance(value, numbers.Real) and math.isfinite(value) for value in values):
                raise ValueError(f"`{name}` is {values}; allowed are finite numbers")
        if len(crop) != 2:
            raise ValueError(f"`micro_conditioning_crop_coord` is {crop}; it must be two numbers, the corner (x, y)")

    def prepare_grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Rows and columns of tokens; a scheduler with a grid follows it."""
        facts, size = self.config.denoiser, pixels_per_token(self.decoder)
        for name, given in (("height", height), ("width", width)):
            if given is not None and (not isinstance(given, int) or given < size or given % size):
                raise ValueError(f"`{name}` is {given!r}; it must be a multiple of {size}, the pixels of a token")
        grid = [
            given // size if given else own for given, own in zip((height, width), facts["grid_shape"], strict=True)
        ]
        if grid != list(facts["grid_shape"]) and not facts.get("grid_input"):
            own = " x ".join(str(size * side) for side in facts["grid_shape"])
            raise ValueError(
                f"`height` and `width` are {height} and {width}; this model makes images of {own} pixels only: leave "
                "them out, or they must be these"
            )
        if self.scheduler.config.get("grid_shape") is not None and list(self.scheduler.config.grid_shape) != grid:
            self.scheduler.register_to_config(grid_shape=grid)
        return grid[0], grid[1]

    def prepare_known(
        self, image: PipelineImageInput | None, mask_image: PipelineImageInput | None, grid: tuple[int, int]
    ) -> Tensor:
        """What is known of the images: ids (P, L), -1 where to paint."""
        if (image is None) != (mask_image is None):
            missing = "`mask_image`" if mask_image is None else "`image`"
            raise ValueError(f"{missing} is missing: `image` says what is there, `mask_image` where to paint")
        if image is None:
            return torch.full((1, grid[0] * grid[1]), -1, dtype=torch.int64)
        size = pixels_per_token(self.decoder)
        pixels = pixels_of(image, size * grid[0], size * grid[1])
        ids = encode(self.decoder, pixels.to(self._execution_device), self.config.signed_pixels)  # (P, h, w)
        painted = tokens_to_paint(mask_image, *grid).to(ids.device)
        if len(painted) != len(ids) and 1 not in (len(painted), len(ids)):
            raise ValueError(f"`mask_image` has {len(painted)} masks for {len(ids)} pictures; allowed: one, or as many")
        return torch.where(painted, -1, ids).flatten(1)

    def prepare_labels(self, class_labels: int | list[int] | Tensor | None) -> Tensor | None:
        """Class of each image, int64 (P,); "any" where none is given. `None` for a model without classes."""
        if self.num_classes is None:
            return None
        if class_labels is None:
            return torch.tensor([self.num_classes], device=self._execution_device)
        labels = class_ids(class_labels).to(self._execution_device)
        if labels.is_floating_point() or (
            len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
        ):
            raise ValueError(f"`class_labels` is {class_labels}; allowed are integers from 0 to {self.num_classes - 1}")
        return labels.long()

    def text_conditions(
        self,
        prompts: list[str],
        batch: int,
        grid: tuple[int, int],
        left: float,
        top: float,
        aesthetic_score: float,
    ) -> dict[str, Tensor]:
        """What a text-conditional network is told: CLIP's last hidden states but one, its projection, and the image's
        (width, height, left, top, score), in the order in which aMUSEd was trained."""
        size = pixels_per_token(self.decoder)
        longest = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        ids = self.tokenizer(
            prompts, return_tensors="pt", padding="max_length", truncation=True, max_length=longest
        ).input_ids
        output = self.text_encoder(ids.to(self._execution_device), output_hidden_states=True)
        hidden, pooled = output.hidden_states[-2], output.text_embeds  # (P, T, C), (P, C')
        micro = [float(value) for value in (size * grid[1], size * grid[0], left, top, aesthetic_score)]
        return {
            "encoder_hidden_states": rows(hidden, batch),
            "pooled_text_emb": rows(pooled, batch),
            "micro_conds": torch.tensor([micro], device=hidden.device, dtype=hidden.dtype).expand(batch, -1),
        }

    def denoiser_for(
        self,
        grid: tuple[int, int],
        num_steps: int,
        positive: dict[str, Tensor],
        negative: dict[str, Tensor],
        guidance_scale: GuidanceScale,
        schedule: GuidanceSchedule,
    ) -> NetworkDenoiser | GuidedDenoiser:
        """The network with its conditions, for images of this grid in this many steps."""
        self.take_guidance(guidance_scale, schedule)
        denoiser = NetworkDenoiser(self.model, **(self.config.denoiser | {"grid_shape": grid, "num_steps": num_steps}))
        if positive:
            # asked in each step: a callback may change the scale
            return GuidedDenoiser(denoiser, self.guidance_at, positive, negative)
        if callable(guidance_scale) or guidance_scale != 1:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but this model has neither classes nor text: it must be 1"
            )
        return denoiser


def rows(values: Tensor, batch: int) -> Tensor:
    """One row for each image of the batch: each value as often as the next."""
    return values.repeat_interleave(batch // len(values), 0)
