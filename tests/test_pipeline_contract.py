"""What diffusers' pipeline tests ask for, in our own words, of three pipelines: text by our transformer, text by one of
transformers' whose head runs by a hook, images with classes, guidance and a VQ decoder. More on text alone stands in
`test_diffusers_contract.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scheduler_cases import CASES
from test_edges import bert_with_head
from test_image_pipeline import CODES, GRID, tiny_network, tiny_vq
from test_image_pipeline import pipeline as image_pipeline
from tiny import seeded, tiny_pipeline
from torch import Tensor

from discrete_schedulers import DiscreteImagePipeline, DiscreteScheduler


class Kind(NamedTuple):
    """A pipeline and how it is called."""

    name: str
    build: Callable[[], Any]
    arguments: dict[str, Any]
    batched: str  # the argument that makes a batch
    batch: list  # three entries for it
    number: str  # the argument that says how many samples of each

    def inputs(self, **changes: Any) -> dict[str, Any]:
        standard = self.arguments | {"num_inference_steps": 4, "output_type": "pt", "generator": seeded()}
        return standard | changes


def image() -> DiscreteImagePipeline:
    return image_pipeline(decoder=tiny_vq())


PROMPTS = ["the old cat", "the", "a big red bird flew under the old tree"]
TEXT = {"prompt": "the old cat", "length": 16}
KINDS = [
    Kind("text", tiny_pipeline, TEXT, "prompt", PROMPTS, "num_samples"),
    Kind("text with a head", bert_with_head, TEXT, "prompt", PROMPTS, "num_samples"),
    Kind(
        "image", image, {"class_labels": 1, "guidance_scale": 2.0}, "class_labels", [2, 0, 1], "num_images_per_prompt"
    ),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@kinds
def test_rows_of_a_batch_are_singles(kind: Kind) -> None:
    """Several of each entry, a generator for each row; all of an entry stand together. Pictures: up to float32's rounding."""
    pipe = kind.build()
    arguments = {kind.batched: kind.batch, kind.number: 2, "generator": [seeded(row) for row in range(6)]}
    output = pipe(**kind.inputs(**arguments))
    samples, sequences = output[0], output.sequences
    assert len(samples) == len(sequences) == 6
    for row in range(6):
        alone = pipe(**kind.inputs(**{kind.batched: kind.batch[row // 2], "generator": seeded(row)}))
        assert torch.equal(alone.sequences[0], sequences[row])
        torch.testing.assert_close(alone[0][0], samples[row], rtol=0, atol=1e-5)
    assert len({tuple(row) for row in sequences.tolist()}) == 6
    with pytest.raises(ValueError, match="`generator` is a list of 2, but 6 samples are wanted"):
        pipe(**kind.inputs(**arguments | {"generator": [seeded(), seeded()]}))


@kinds
def test_tuple_is_the_output(kind: Kind) -> None:
    pipe = kind.build()
    output, as_tuple = pipe(**kind.inputs()), pipe(**kind.inputs(), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert list(output.keys()) == [name for name, value in output.items() if value is not None]
    for one, other in zip(output.to_tuple(), [value for value in as_tuple if value is not None], strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@kinds
def test_callbacks_get_every_name_that_is_advertised(kind: Kind) -> None:
    pipe, seen = kind.build(), []
    latent = kind.inputs(output_type="latent")

    def look(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        assert all(isinstance(value, Tensor) for value in kwargs.values())
        seen.append((step, float(t), tuple(kwargs)))
        return kwargs

    advertised = pipe._callback_tensor_inputs
    for length in range(len(advertised) + 1):
        for names in itertools.combinations(advertised, length):
            seen.clear()
            pipe(**latent, callback_on_step_end=look, callback_on_step_end_tensor_inputs=list(names))
            assert [step for step, *_ in seen] == list(range(pipe.num_timesteps))
            assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
            assert {told for *_, told in seen} == {names or ("latents",)}

    def clear_at_the_end(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        last = step == pipe.num_timesteps - 1
        return {"latents": torch.zeros_like(kwargs["latents"])} if last else {}

    assert (pipe(**latent, callback_on_step_end=clear_at_the_end)[0] == 0).all()
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs` has \['model_output'\]"):
        pipe(**latent, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents", "model_output"])


@kinds
def test_save_and_load_in_every_combination(kind: Kind, tmp_path: Path) -> None:
    pipe = kind.build()
    expected = pipe(**kind.inputs())
    for safe, variant, shard in itertools.product((True, False), (None, "fp16"), ("10GB", "10KB")):
        folder = tmp_path / f"{safe} {variant} {shard}"
        pipe.save_pretrained(folder, safe_serialization=safe, variant=variant, max_shard_size=shard)
        names = [path.name for path in (folder / "model").iterdir() if path.suffix in (".safetensors", ".bin")]
        assert all((".fp16" in name) == (variant is not None) for name in names)
        assert (len(names) > 1) == (shard == "10KB")
        # diffusers finds several files of pickled weights only where it is told not to look for safetensors
        told = {"use_safetensors": False} if shard == "10KB" and not safe and kind.name != "text with a head" else {}
        loaded = quiet(type(pipe).from_pretrained(folder, variant=variant, **told))
        assert loaded.config.denoiser == pipe.config.denoiser
        output = loaded(**kind.inputs())
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output[0], expected[0])
    other = type(pipe).from_pretrained(folder, variant=variant, model=pipe.model, scheduler=pipe.scheduler, **told)
    assert other.model is pipe.model
    assert torch.equal(quiet(other)(**kind.inputs()).sequences, expected.sequences)
    again = type(pipe)(**pipe.components, denoiser=pipe.config.denoiser)
    assert torch.equal(quiet(again)(**kind.inputs()).sequences, expected.sequences)


@kinds
def test_optional_components(kind: Kind, tmp_path: Path) -> None:
    """Each may be missing, in memory and in a file."""
    pipe = kind.build()
    arguments = kind.inputs()
    arguments.pop("prompt", None)
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    expected = pipe(**arguments)[0]
    pipe.save_pretrained(tmp_path)
    loaded = quiet(type(pipe).from_pretrained(tmp_path))
    assert [getattr(loaded, name) for name in pipe._optional_components] == [None] * len(pipe._optional_components)
    assert torch.equal(loaded(**arguments | {"generator": seeded()})[0], expected)


@kinds
def test_devices_and_dtypes(kind: Kind, tmp_path: Path) -> None:
    pipe = kind.build()
    expected = pipe(**kind.inputs())
    assert pipe.to("cpu") is pipe
    assert pipe.device == torch.device("cpu")
    assert torch.equal(pipe(**kind.inputs())[0], expected[0])
    pipe.save_pretrained(tmp_path)
    modules = [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    assert "model" in modules
    loaded = quiet(type(pipe).from_pretrained(tmp_path, dtype=torch.bfloat16))
    for moved in (loaded, pipe.to(torch.bfloat16)):
        assert all(getattr(moved, name).dtype == torch.bfloat16 for name in modules)
        output = moved(**kind.inputs())
        assert output.sequences.dtype == torch.int64
        if kind.name == "image":
            assert output.images.dtype == torch.float32
            assert output.images.isfinite().all()
        assert moved.scheduler.times.dtype == torch.float64
    assert torch.equal(loaded(**kind.inputs()).sequences, pipe(**kind.inputs()).sequences)
    assert pipe.to(dtype=torch.float32, device="cpu").model.dtype == torch.float32
    assert all(parameter.is_meta for parameter in loaded.to("meta").model.parameters())


@kinds
def test_progress_bar(kind: Kind, capsys: pytest.CaptureFixture) -> None:
    pipe = kind.build()
    pipe(**kind.inputs())
    assert capsys.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    pipe(**kind.inputs())
    written = capsys.readouterr().err
    assert "drawing: 100%" in written
    assert f"{pipe.num_timesteps}/{pipe.num_timesteps}" in written


@kinds
@pytest.mark.parametrize("way", ["model", "group"])
def test_offload_on_the_cpu(kind: Kind, way: str) -> None:
    """The hooks bring weights in and out around every call; the samples are those without them. The third way, module by
    module, fails on a CPU in accelerate, also for diffusers' own pipelines."""
    expected = kind.build()(**kind.inputs())
    pipe = kind.build()
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
        assert hasattr(pipe.model, "_hf_hook")
    else:  # diffusers' VQModel does not take it
        arguments = {"offload_type": "leaf_level", "exclude_modules": ["decoder"]}
        pipe.enable_group_offload(onload_device=torch.device("cpu"), **arguments)
    for _ in range(2):
        assert torch.equal(pipe(**kind.inputs()).sequences, expected.sequences)


IMAGE_SCHEDULERS = {
    case.cls: None for case in CASES if "absorbing" in case.cls.processes and not case.cls.needs_revealed_logits
}


@pytest.mark.parametrize("cls", IMAGE_SCHEDULERS)
def test_every_scheduler_makes_images(cls: type[DiscreteScheduler], tmp_path: Path) -> None:
    """By a swap in one line; saved and loaded it makes the same ones."""
    pipe = image_pipeline(model=tiny_network(grid_shape=GRID))
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    arguments = {"class_labels": 2, "num_images_per_prompt": 2, "guidance_scale": 1.5, "num_inference_steps": 3}
    output = pipe(**arguments, generator=seeded(), output_type="latent")
    assert output.images.shape == (2, *GRID)
    assert ((output.sequences >= 0) & (output.sequences < CODES)).all()
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiscreteImagePipeline.from_pretrained(tmp_path))
    assert type(loaded.scheduler) is cls
    assert torch.equal(loaded(**arguments, generator=seeded(), output_type="latent").sequences, output.sequences)
