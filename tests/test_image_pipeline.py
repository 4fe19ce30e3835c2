"""The image pipeline: what it samples under classes and guidance, what it leaves alone when it paints, and what comes out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from tiny import randomised, seeded
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    DDiTModel,
    DiscreteImagePipeline,
    MaskGITScheduler,
    NetworkDenoiser,
    PatchCodebook,
    SpreadScheduler,
    guidance_schedule,
)
from discrete_schedulers.pipelines.images import decode, encode, pixels_of, tokens_to_paint

GRID, CODES, CLASSES = (4, 6), 12, 3
MASK, LENGTH = CODES, GRID[0] * GRID[1]
FACTS = {"vocab_size": CODES + 1, "mask_token_id": MASK}


def shades() -> PatchCodebook:
    """Each code is a 2 x 2 patch of one grey."""
    decoder = PatchCodebook(num_codes=CODES)
    decoder.codebook.copy_(torch.linspace(0, 1, CODES)[:, None, None, None])
    return decoder


def tiny_network(num_classes: int | None = CLASSES, seed: int = 0, **changes: Any) -> DDiTModel:
    model = DDiTModel(
        vocab_size=CODES + 1,
        hidden_size=32,
        num_blocks=2,
        num_heads=4,
        cond_dim=16,
        max_length=LENGTH,
        num_classes=num_classes,
        **changes,
    )
    return randomised(model, seed)


def tiny_vq(seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(**blocks, num_vq_embeddings=CODES, lookup_from_codebook=True, mid_block_add_attention=False).eval()


def pipeline(scheduler: Any = None, **changes: Any) -> DiscreteImagePipeline:
    components = {"model": tiny_network(), "scheduler": scheduler or AncestralScheduler(**FACTS), "decoder": shades()}
    pipe = DiscreteImagePipeline(**(components | {"denoiser": {"grid_shape": GRID}} | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Classes and guidance


def guided(pipe: DiscreteImagePipeline, x: Tensor, t: float, labels: Tensor, scale: float) -> Tensor:
    """u + s (c - u), written out: the last class is "any"."""
    sigma = torch.full((len(x),), -math.log(1 - (1 - 1e-3) * t))
    with torch.no_grad():
        c = pipe.model(x, sigma, class_labels=labels).logits
        u = pipe.model(x, sigma, class_labels=torch.full_like(labels, CLASSES)).logits
    return u + scale * (c - u)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_loop_with_guidance_written_out(schedule: str) -> None:
    pipe, steps, most = pipeline(), 5, 3.0
    arguments = {"guidance_scale": most, "guidance_schedule": schedule, "num_images_per_prompt": 2}
    output = pipe(class_labels=[2, 0], num_inference_steps=steps, generator=seeded(1), **arguments)
    labels, scheduler, generator = torch.tensor([2, 2, 0, 0]), pipe.scheduler, seeded(1)
    scheduler.set_timesteps(steps)
    x = scheduler.sample_prior((4, LENGTH), generator)
    for t in scheduler.timesteps.tolist():
        gone = 1 - t
        grown = {"constant": 1.0, "linear": gone, "cosine": (1 - math.cos(math.pi * gone)) / 2}[schedule]
        logits = guided(pipe, x, t, labels, 1 + (most - 1) * grown)
        x = scheduler.step(logits, t, x, generator=generator).prev_sample
    assert torch.equal(output.sequences, x)
    assert output.num_model_calls == 2 * steps - (schedule != "constant")  # at t = 1 the scale is 1: one branch


def test_a_function_is_its_schedule() -> None:
    """A scale that is a function of time, as text pipelines take it, gives what the name of its schedule gives."""
    arguments = {"class_labels": [2, 0], "num_inference_steps": 4}
    named = pipeline()(**arguments, guidance_scale=3.0, guidance_schedule="linear", generator=seeded(1))
    function = pipeline()(**arguments, guidance_scale=guidance_schedule("linear", 3.0), generator=seeded(1))
    assert torch.equal(named.sequences, function.sequences)
    assert named.num_model_calls == function.num_model_calls == 7


def test_a_callback_changes_the_guidance() -> None:
    """As in diffusers' pipelines. From scale 1 to 3 after the first step: one call, then two in each."""

    def more(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        pipe._guidance_scale = 3.0
        return {}

    pipe = pipeline()
    output = pipe(class_labels=1, num_inference_steps=4, generator=seeded(), callback_on_step_end=more)
    assert (output.num_model_calls, pipe.guidance_scale, pipe.num_timesteps) == (7, 3.0, 4)
    with pytest.raises(ValueError, match="`guidance_scale` is nan; it must be a finite number"):
        pipe(class_labels=1, guidance_scale=math.nan)


def test_without_a_class_it_samples_from_all() -> None:
    pipe = pipeline(AncestralScheduler(**FACTS, temperature=0.0))
    x, labels = torch.full((1, LENGTH), MASK), torch.tensor([CLASSES])
    for class_labels, label in ((None, CLASSES), (1, 1), (torch.tensor([1]), 1)):
        output = pipe(class_labels=class_labels, num_inference_steps=1, output_type="latent")
        best = guided(pipe, x, 1.0, torch.full_like(labels, label), 1.0)[..., :MASK].argmax(-1)
        assert torch.equal(output.sequences, best)
        assert output.num_model_calls == 1


def test_classes_differ() -> None:
    pipe = pipeline()
    drawn = [
        pipe(class_labels=y, num_images_per_prompt=200, num_inference_steps=1, generator=seeded()) for y in range(2)
    ]
    counts = [torch.bincount(one.sequences[:, 0], minlength=CODES) / 200 for one in drawn]
    assert (counts[0] - counts[1]).abs().sum() > 0.3


def test_network_without_classes() -> None:
    pipe = pipeline(model=tiny_network(None))
    assert pipe(num_inference_steps=2, generator=seeded()).sequences.shape == (1, LENGTH)
    with pytest.raises(ValueError, match="`class_labels` is given, but this model has no classes"):
        pipe(class_labels=1)
    with pytest.raises(ValueError, match=r"`guidance_scale` is 2\.0, but this model has neither classes nor text"):
        pipe(guidance_scale=2.0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    pipe = pipeline()
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.0}
    together = pipe(class_labels=[0, 1, 2], generator=[seeded(i) for i in range(3)], **arguments)
    for i in range(3):
        alone = pipe(class_labels=i, generator=[seeded(i)], **arguments)
        assert torch.equal(alone.sequences[0], together.sequences[i])


# Orders in two dimensions


@pytest.mark.parametrize("pattern", ["halton", "dilated", "farthest"])
def test_scheduler_knows_the_grid(pattern: str, tmp_path: Path) -> None:
    pipe = pipeline()
    assert pipe.scheduler.config.grid_shape == list(GRID)
    pipe.scheduler = SpreadScheduler.from_config(pipe.scheduler.config, pattern=pattern)
    sequences = pipe(class_labels=1, num_inference_steps=6, generator=seeded()).sequences
    by_hand = pipeline(SpreadScheduler(**FACTS, pattern=pattern, grid_shape=list(GRID)))
    assert torch.equal(by_hand(class_labels=1, num_inference_steps=6, generator=seeded()).sequences, sequences)
    by_line = pipeline()
    by_line.scheduler = SpreadScheduler(**FACTS, pattern="farthest")
    assert by_line.scheduler.config.grid_shape == list(GRID)


def test_grid_survives_schedulers_that_do_not_know_it() -> None:
    pipe = pipeline(MaskGITScheduler(**FACTS))
    pipe.scheduler = MaskGITScheduler.from_config(pipe.scheduler.config, choice_temperature=1.0)
    pipe.scheduler = SpreadScheduler.from_config(pipe.scheduler.config, pattern="halton")
    assert pipe.scheduler.config.grid_shape == list(GRID)


# Painting


def ids_of(pipe: DiscreteImagePipeline, picture: Any) -> Tensor:
    return encode(pipe.decoder, pixels_of(picture, 2 * GRID[0], 2 * GRID[1]), False)


def test_a_token_stays_where_none_of_its_pixels_is_painted() -> None:
    pipe = pipeline()
    ids = torch.randint(0, CODES, (1, *GRID), generator=seeded(5))
    picture = Image.fromarray((pipe.decoder.decode(ids)[0, 0] * 255).round().byte().numpy())
    assert torch.equal(ids_of(pipe, picture), ids)
    white = np.zeros((2 * GRID[0], 2 * GRID[1]), dtype=np.uint8)
    white[3, 4] = white[0, 0] = 255  # one pixel of the token (1, 2), one of (0, 0)
    white[6:, :] = 255  # the last row of tokens
    painted = torch.zeros(GRID, dtype=torch.bool)
    painted[1, 2] = painted[0, 0] = True
    painted[3] = True
    seen = []

    def look(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        seen.append(kwargs["latents"].view(-1, *GRID).clone())
        return {}

    output = pipe(
        image=picture,
        mask_image=Image.fromarray(white),
        class_labels=[0, 1],
        num_images_per_prompt=20,
        num_inference_steps=3,
        generator=seeded(),
        callback_on_step_end=look,
    )
    for latents in seen:
        assert (latents[:, ~painted] == ids[0][~painted]).all()
    latents = output.sequences.view(-1, *GRID)
    assert latents.shape == (40, *GRID)
    assert (latents != MASK).all()
    assert all(len(latents[:, y, x].unique()) > 1 for y, x in painted.nonzero())


def test_masks() -> None:
    expected = torch.tensor([[True, False, False], [False, False, True]])
    sheet = np.zeros((4, 6))
    sheet[1, 1] = sheet[2, 4] = 0.5
    for form in (sheet, sheet > 0, torch.tensor(sheet), torch.tensor(sheet)[None, None], (sheet * 4).astype(np.int64)):
        assert torch.equal(tokens_to_paint(form, 2, 3)[0], expected)
    twice = [Image.fromarray((sheet * 400).astype(np.uint8)), Image.fromarray(np.full((9, 9, 3), 255, dtype=np.uint8))]
    assert torch.equal(tokens_to_paint(twice, 2, 3), torch.stack([expected, torch.ones(2, 3, dtype=torch.bool)]))
    assert tokens_to_paint(np.eye(5), 3, 3).sum() == 7  # a pixel between tokens paints both
    with pytest.raises(ValueError, match=r"`mask_image` has shape \(3, 4, 4, 2\)"):
        tokens_to_paint(np.zeros((3, 4, 4, 2)), 2, 2)


def test_painting_with_conditions_of_the_rest() -> None:
    """With all tokens but one known, the last is drawn from the network's law given the others."""
    pipe, rows = pipeline(), 800
    ids = torch.randint(0, CODES, (1, *GRID), generator=seeded(6))
    sheet = np.zeros((8, 12))
    sheet[2, 2] = 1
    pixels = pipe.decoder.decode(ids)
    arguments = {"num_inference_steps": 1, "num_images_per_prompt": rows, "guidance_scale": 1.5}
    drawn = pipe(image=pixels, mask_image=sheet, class_labels=2, generator=seeded(), **arguments).sequences[:, 7]
    x = ids.view(1, -1).clone()
    x[0, 7] = MASK
    law = guided(pipe, x, 1.0, torch.tensor([2]), 1.5)[0, 7, :MASK].double().softmax(-1)
    expected, counts = rows * law, torch.bincount(drawn, minlength=CODES)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert expected.min() > 1
    assert (chi2 - (CODES - 1)) / (2 * (CODES - 1)) ** 0.5 < 4.5


# Pictures


def test_output_types() -> None:
    pipe, arguments = pipeline(), {"class_labels": [1, 2], "num_inference_steps": 2}
    latent = pipe(**arguments, generator=seeded(), output_type="latent")
    assert torch.equal(latent.images, latent.sequences.view(2, *GRID))
    pixels = pipe.decoder.decode(latent.images)
    as_pt = pipe(**arguments, generator=seeded(), output_type="pt").images
    assert torch.equal(as_pt, pixels)
    as_np = pipe(**arguments, generator=seeded(), output_type="np").images
    assert np.array_equal(as_np, pixels.permute(0, 2, 3, 1).numpy())
    as_pil = pipe(**arguments, generator=seeded()).images
    assert [(picture.mode, picture.size) for picture in as_pil] == [("L", (12, 8))] * 2
    assert np.array_equal(np.asarray(as_pil[1]), (pixels[1, 0] * 255).round().byte().numpy())
    images, sequences, calls = pipe(**arguments, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, pixels)
    assert torch.equal(sequences, latent.sequences)
    assert calls == 2


@pytest.mark.parametrize("lookup", [True, False])
def test_vq_model_of_diffusers(lookup: bool) -> None:
    """Encoder, nearest code, decoder: as its own forward pass, with pixels in [0, 1] or in [-1, 1]."""
    decoder = tiny_vq()
    with torch.no_grad():
        decoder.quantize.embedding.weight.normal_(generator=seeded())
        decoder.double()  # float32 rounds differently from one run to another
        images = torch.rand(2, 3, 8, 12, generator=seeded(1)).double()
        ids = encode(decoder, images, False)
        assert ids.shape == (2, *GRID)
        assert len(ids.unique()) > 3
        decoder.register_to_config(lookup_from_codebook=False)
        expected = decoder(images).sample
        expected_signed = decoder(2 * images - 1).sample
        decoder.register_to_config(lookup_from_codebook=lookup)
        assert torch.allclose(decode(decoder, ids, False), expected.clamp(0, 1).float(), atol=1e-6)
        signed = decode(decoder, encode(decoder, images, True), True)
        assert torch.allclose(signed, ((expected_signed + 1) / 2).clamp(0, 1).float(), atol=1e-6)
    assert float(signed.min()) + 0.2 < float(signed.max())
    with pytest.raises(ValueError, match="3 of 24 tokens have no code"):
        decode(decoder, ids[:1].flatten().index_fill(0, torch.tensor([0, 5, 9]), MASK).view(1, *GRID), False)


def test_save_and_load(tmp_path: Path) -> None:
    pipe = pipeline(decoder=tiny_vq(), signed_pixels=True)
    pipe.scheduler = SpreadScheduler.from_config(pipe.scheduler.config, pattern="halton")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DiscreteImagePipeline"
    assert index["decoder"] == ["diffusers", "VQModel"]
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["grid_shape"] == list(GRID)
    loaded = DiscreteImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.denoiser == pipe.config.denoiser
    assert loaded.config.signed_pixels is True
    arguments = {"class_labels": 1, "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    once, again = (one(generator=seeded(), **arguments) for one in (pipe, loaded))
    assert torch.equal(once.sequences, again.sequences)
    assert torch.equal(once.images, again.images)
    assert once.images.shape == (1, 3, 8, 12)


def test_offloaded_components_go_through_their_hooks() -> None:
    expected = pipeline(decoder=tiny_vq())(num_inference_steps=2, generator=seeded(), output_type="pt").images
    pipe = pipeline(decoder=tiny_vq())
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(num_inference_steps=2, generator=seeded(), output_type="pt").images, expected)


# Networks of a grid


def test_grid_input() -> None:
    """The network sees (B, h, w) and says logits with channels first, narrower than the states."""
    weight = torch.randn(CODES, CODES + 1, 3, 3, generator=seeded())

    class Sheet(torch.nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            one_hot = torch.nn.functional.one_hot(ids, CODES + 1).float().permute(0, 3, 1, 2)
            return torch.nn.functional.conv2d(one_hot, weight, padding=1)

    denoiser = NetworkDenoiser(Sheet(), **FACTS, grid_input=True, grid_shape=GRID)
    x = torch.randint(0, CODES + 1, (2, LENGTH), generator=seeded(1))
    logits = denoiser(x, 0.5)
    assert logits.shape == (2, LENGTH, CODES + 1)
    row, column = 2, 3  # inside: the sum over the nine neighbours, by hand
    sheet = x.view(2, *GRID)
    around = [(dy, dx) for dy in range(3) for dx in range(3)]
    by_hand = sum(weight[:, sheet[1, row + dy - 1, column + dx - 1], dy, dx] for dy, dx in around)
    assert torch.allclose(logits[1, row * GRID[1] + column, :CODES], by_hand, atol=1e-5)
    assert (logits[..., MASK] == -math.inf).all()
    with pytest.raises(ValueError, match="`x_t` has length 23; `grid_shape` is"):
        denoiser(x[:, :-1], 0.5)
    with pytest.raises(ValueError, match="`grid_input` needs `grid_shape`"):
        NetworkDenoiser(Sheet(), **FACTS, grid_input=True)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a cat"}, "`prompt` or `negative_prompt` is given, but this pipeline has no tokenizer"),
        ({"class_labels": 3}, "`class_labels` is 3; allowed are integers from 0 to 2"),
        ({"class_labels": [0.5]}, r"`class_labels` is \[0.5\]; allowed are integers"),
        ({"class_labels": torch.zeros(0, dtype=torch.int64)}, "allowed: one, or all as many"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
        ({"output_type": "text"}, "`output_type` is 'text'; allowed: 'pil', 'np', 'pt', 'latent'"),
        ({"guidance_schedule": "square"}, "`guidance_schedule` is 'square'; allowed: 'constant', 'linear', 'cosine'"),
        ({"height": 9}, "`height` is 9; it must be a multiple of 2"),
        ({"height": 10}, "this model makes images of 8 x 12 pixels only"),
        ({"image": np.zeros((1, 8, 12, 1))}, "`mask_image` is missing"),
        ({"mask_image": np.zeros((8, 12))}, "`image` is missing"),
        (
            {"image": np.full((1, 8, 12, 1), 255.0), "mask_image": np.ones((8, 12))},
            "`image` has values from 255 to 255",
        ),
        ({"image": np.zeros((3, 8, 12, 1)), "mask_image": np.ones((2, 8, 12))}, "has 2 masks for 3 pictures"),
        (
            {"image": np.zeros((3, 8, 12, 1)), "mask_image": np.ones((8, 12)), "class_labels": [0, 1]},
            r"\[2, 3\] in number; allowed: one, or all as many",
        ),
        ({"generator": [seeded()], "num_images_per_prompt": 2}, "`generator` is a list of 1, but 2 samples are wanted"),
        ({"latents": torch.zeros(1, 3, dtype=torch.int64)}, r"it must be int64 of shape \(1, 24\)"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "`callback_on_step_end_tensor_inputs` has"),
    ],
)
def test_arguments_that_are_not_allowed(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline()(**arguments)


def test_a_grid_is_required() -> None:
    with pytest.raises(ValueError, match="`denoiser` has no `grid_shape`"):
        pipeline(denoiser={})
    network = DDiTModel(CODES + 1, 32, 1, 4, 16, LENGTH, grid_shape=GRID)  # says it itself
    assert pipeline(denoiser={}, model=network).config.denoiser["grid_shape"] == list(GRID)
