"""The frozen model of a run of `distill.py`, of texts or of images: how it is loaded, sampled, asked and looked at.

Methods see tokens alone. What they ask the network of data is asked without a class or a prompt; samples are drawn with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteImagePipeline
from discrete_schedulers.bundled import bundled_folder, is_bundled
from discrete_schedulers.denoisers import AroundDenoiser, Denoiser
from discrete_schedulers.models.loading import first_file, read_config
from discrete_schedulers.pipelines.images import decode
from discrete_schedulers.pipelines.pipeline_base import name_of
from discrete_schedulers.pipelines.pipeline_discrete_diffusion import IMAGE_PIPELINES
from discrete_schedulers.training.features import IMAGE_FEATURES, Features, image_features, text_features

BUCKETS = 8  # tokens and pairs of texts in the statistic that judges: it needs more samples than features
TEXT_FEATURES = 2 * BUCKETS + 5
JUDGED_FEATURES = max(TEXT_FEATURES, IMAGE_FEATURES)  # more samples than this are enough for either
AESTHETIC_SCORE = 6.0  # that text-to-image networks are told, as the pipeline's default


@dataclass
class Unconditional(AroundDenoiser):
    """A network that is told, where nobody says otherwise, no class and no prompt.

    Args:
        denoiser (`Denoiser`): The network.
        nothing (`Callable`): Tokens (B, L) to what it is told of them then, tensors with B rows.
    """

    denoiser: Denoiser
    nothing: Callable[[Tensor], dict[str, Tensor]]

    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Any = None, **conditions: Any) -> Any:
        return self.denoiser(x_t, t, positions, **(self.nothing(x_t) | conditions))


@dataclass
class FrozenTexts:
    """A model of texts.

    Args:
        pipe (`DiscreteDiffusionPipeline`): On its device.
        length (`int`): Tokens L of a sequence.
    """

    pipe: DiscreteDiffusionPipeline
    length: int
    noun = "text"
    num_features = TEXT_FEATURES

    @cached_property
    def denoiser(self) -> Denoiser:
        """The network, told no class."""
        return without_class(self.pipe)

    def example(self, steps: int) -> str:
        """A call of the pipeline, as a model card shows it."""
        return f"print(pipe(num_samples=4, num_inference_steps={steps}).texts)"

    def draw(self, numbers: range, steps: int, generator: list[torch.Generator]) -> tuple[Tensor, int]:
        """Samples with these numbers, int64 (n, L), and the calls of the network."""
        shape: dict[str, Any] = {"num_samples": len(numbers), "length": self.length, "num_inference_steps": steps}
        sequences, _, calls = self.pipe(**shape, generator=generator, output_type="pt", return_dict=False)
        return sequences, calls

    def classes_of(self, numbers: range) -> Tensor | None:
        """The classes of samples with these numbers, where they are told."""
        return None

    def features(self, prior: list[float], batch_size: int, buckets: int = BUCKETS) -> Features:
        """What the statistic of a search sees."""
        return text_features(self.denoiser, prior, buckets, batch_size)


@dataclass
class FrozenImages:
    """A model of images. Sample number i is of class i modulo their number, or of that prompt.

    Args:
        pipe (`DiscreteImagePipeline`): On its device.
        length (`int`): Tokens L of an image.
        prompts (`list[str]`): What samples show, for a model with a text encoder.
        guidance_scale (`float`): Of samples.
    """

    pipe: DiscreteImagePipeline
    length: int
    prompts: list[str]
    guidance_scale: float
    noun = "images"
    num_features = IMAGE_FEATURES

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.pipe.config.denoiser["grid_shape"]
        return height, width

    @cached_property
    def denoiser(self) -> Denoiser:
        """The network, told no class and the empty prompt."""
        if self.pipe.text_encoder is None:
            return without_class(self.pipe)
        with torch.no_grad():
            told = self.pipe.text_conditions([""], 1, self.grid, 0.0, 0.0, AESTHETIC_SCORE)
        return Unconditional(
            self.pipe.denoiser, lambda x: {name: value.expand(len(x), *value.shape[1:]) for name, value in told.items()}
        )

    def example(self, steps: int) -> str:
        """A call of the pipeline, as a model card shows it."""
        told = [repr(self.prompts[0])] if self.prompts else []
        if self.pipe.num_classes is not None:
            told.append("class_labels=[0]")
        if self.guidance_scale != 1:
            told.append(f"guidance_scale={self.guidance_scale}")
        return f'pipe({", ".join([*told, f"num_inference_steps={steps}"])}).images[0].save("sample.png")'

    def draw(self, numbers: range, steps: int, generator: list[torch.Generator]) -> tuple[Tensor, int]:
        """Samples with these numbers, int64 (n, L), and the calls of the network."""
        told: dict[str, Any] = {"num_images_per_prompt": len(numbers)}
        classes = self.classes_of(numbers)
        if self.prompts:
            told = {"prompt": [self.prompts[number % len(self.prompts)] for number in numbers]}
        elif classes is not None:
            told = {"class_labels": classes}
        _, sequences, calls = self.pipe(
            **told,
            num_inference_steps=steps,
            guidance_scale=self.guidance_scale,
            generator=generator,
            output_type="latent",
            return_dict=False,
        )
        return sequences, calls

    def classes_of(self, numbers: range) -> Tensor | None:
        """The classes of samples with these numbers, where the model has classes."""
        if self.pipe.num_classes is None:
            return None
        return torch.tensor([number % self.pipe.num_classes for number in numbers])

    def pixels(self, x: Tensor) -> Tensor:
        """Tokens (n, L) to pixels (n, C, H, W) in [0, 1]."""
        return decode(self.pipe.decoder, x.view(-1, *self.grid), self.pipe.config.signed_pixels)

    def features(self, prior: list[float], batch_size: int, buckets: int = BUCKETS) -> Features:
        """What the statistic of a search sees; `prior` and `buckets` are for texts."""
        return image_features(self.denoiser, self.pixels, self.grid[1], batch_size)


Frozen = FrozenTexts | FrozenImages


def without_class(pipe: DiscreteDiffusionPipeline | DiscreteImagePipeline) -> Denoiser:
    """The network of a pipeline, told "any class" where it has classes."""
    count = pipe.num_classes
    if count is None:
        return pipe.denoiser
    return Unconditional(pipe.denoiser, lambda x: {"class_labels": x.new_full((len(x),), count)})


def is_image_model(name: str, revision: str | None) -> bool:
    """Whether a folder, repository or bundled model is of [`DiscreteImagePipeline`], or of one that it reads."""
    name = name_of(name)
    if is_bundled(name):
        with bundled_folder(name) as folder:
            index = read_config(Path(folder) / "model_index.json")
    else:
        found = first_file(name, ("model_index.json",), {} if revision is None else {"revision": revision})
        index = {} if found is None else read_config(found)
    return index.get("_class_name") in IMAGE_PIPELINES or "decoder" in index or "vqvae" in index
