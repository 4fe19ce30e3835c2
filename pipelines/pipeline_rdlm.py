"""The pipeline of RDLM: a network that reads points of a sphere, a geodesic random walk, and tokens at its end.

X = start
for t in timesteps:  X = step(model(X, t), t, X)
tokens = corners nearest to X
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from discrete_schedulers.pipelines.pipeline_base import check_count, check_device, returned_latents
from discrete_schedulers.pipelines.pipeline_discrete_diffusion import DiscreteDiffusionPipelineOutput
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers import RDLMScheduler


class RDLMPipeline(DiffusionPipeline):
    """Sample token sequences from a diffusion on the sphere. Unconditional: the network was not shown known tokens.

    Args:
        model (`torch.nn.Module`): From points (B, L, V) and times (B,) to an output with `logits` (B, L, V), its config with
            `vocab_size` and perhaps `max_length`, such as [`SphereTransformerModel`].
        scheduler (`RDLMScheduler`): The walk.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For texts.

    Raises:
        ValueError: If the scheduler is another one.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, model: torch.nn.Module, scheduler: RDLMScheduler, tokenizer: Any = None) -> None:
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in diffusers.

        Raises:
            ValueError: If a scheduler is another one than an [`RDLMScheduler`].
        """
        if name == "scheduler" and not isinstance(value, RDLMScheduler):
            raise ValueError(f"`scheduler` is a {type(value).__name__}; this pipeline needs an RDLMScheduler")
        super().__setattr__(name, value)

    @torch.no_grad()
    def __call__(
        self,
        *,
        num_samples: int = 1,
        length: int | None = None,
        num_inference_steps: int = 64,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["text", "pt", "np", "latent"] = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DiscreteDiffusionPipelineOutput | tuple:
        """Sample.

        Args:
            num_samples (`int`, defaults to 1): Samples B.
            length (`int`, *optional*): Tokens L of a sample. Defaults to the model's longest.
            num_inference_steps (`int`, defaults to 64): Steps, and calls of the network.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One, or one per sample: then a sample does
                not depend on its batch.
            latents (`torch.Tensor` of shape `(B, L, V)`, *optional*): Points to start from instead of the prior's.
            output_type (`str`, defaults to `"text"`): `"text"` decodes as well; `"np"` returns a NumPy array; `"latent"`
                the points (B, L, V) in the place of the tokens.
            return_dict (`bool`, defaults to `True`): Return [`DiscreteDiffusionPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `f(pipe, step, timestep, kwargs)` after each step; may
                return `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Names passed to it, of `["latents"]`.

        Returns:
            [`DiscreteDiffusionPipelineOutput`] or `tuple`: `sequences`, `texts`, `num_model_calls`.

        Raises:
            ValueError: If an argument is not allowed.
        """
        check_device(self._execution_device)
        x = self.prepare_latents(num_samples, length, latents, generator)
        names = callback_on_step_end_tensor_inputs or self._callback_tensor_inputs
        if output_type not in ("text", "pt", "np", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; allowed: 'text', 'pt', 'np', 'latent'")
        if not set(names) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {names}; allowed: {self._callback_tensor_inputs}"
            )
        self.scheduler.set_timesteps(num_inference_steps)
        dtype = next((parameter.dtype for parameter in self.model.parameters()), x.dtype)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                logits = self.model(x.to(dtype), t.to(x.device).expand(len(x))).logits
                x = self.scheduler.step(logits, t, x, generator=generator).prev_sample
                if callback_on_step_end is not None:
                    x = returned_latents(callback_on_step_end(self, i, t, dict.fromkeys(names, x)), x)
                progress_bar.update()
        self.maybe_free_model_hooks()
        tokens = self.scheduler.tokens(x)
        texts = None
        if output_type == "text" and self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(tokens)
        sequences = {"latent": x, "np": tokens.cpu().numpy()}.get(output_type, tokens)
        output = DiscreteDiffusionPipelineOutput(sequences, texts, len(self.scheduler.timesteps))
        return output if return_dict else (output.sequences, output.texts, output.num_model_calls)

    def prepare_latents(
        self, num_samples: int, length: int | None, latents: Tensor | None, generator: Generators
    ) -> Tensor:
        """Points to start from, (B, L, V).

        Raises:
            ValueError: If sizes do not fit the model or each other.
        """
        width, longest = self.scheduler.config.vocab_size, getattr(self.model.config, "max_length", None)
        if self.model.config.vocab_size != width:
            raise ValueError(f"`scheduler` has vocab_size {width}, but the model has {self.model.config.vocab_size}")
        if latents is not None:
            num_samples, length = latents.shape[0], latents.shape[1]
            if latents.dim() != 3 or latents.shape[-1] != width or not latents.is_floating_point():
                raise ValueError(
                    f"`latents` is {latents.dtype} of shape {tuple(latents.shape)}; it must be floating, (B, L, {width})"
                )
        length = longest if length is None else length
        if length is None:
            raise ValueError("`length` is required: this model does not say how long its sequences are")
        check_count("num_samples", num_samples)
        check_count("length", length, longest)
        if isinstance(generator, list) and len(generator) != num_samples:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but {num_samples} samples are wanted: one each"
            )
        if latents is not None:
            return latents.to(self._execution_device)
        return self.scheduler.sample_prior((num_samples, length), generator, self._execution_device)
