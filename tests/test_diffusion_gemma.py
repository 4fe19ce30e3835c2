"""DiffusionGemma in our pipeline, held against transformers' class and diffusers' pipeline, with tiny random weights."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionGemmaPipeline
from safetensors.torch import load_file, save_file
from tiny import WORDS, randomised, seeded, tiny_tokenizer
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDDIMScheduler,
    DiscreteDiffusionPipeline,
    RowLogits,
    UniformEntropyBoundScheduler,
)
from discrete_schedulers.models.checkpoints import find_family
from discrete_schedulers.models.diffusion_gemma import PromptAndCanvas

V, CANVAS, PROMPT, WINDOW = len(WORDS), 8, 6, 4  # the prompt is longer than what a sliding layer keeps


def tiny_gemma() -> DiffusionGemmaForBlockDiffusion:
    """Two layers, random weights and layer scalars, those of the encoder others than those of the decoder."""
    text = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    text |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    text |= {"sliding_window": WINDOW, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32}
    vision = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "position_embedding_size": 16}
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS)
    config.boi_token_id, config.eoi_token_id, config.image_token_id = V - 1, V - 2, V - 3
    model = DiffusionGemmaForBlockDiffusion(config)
    randomised(model)
    model.tie_weights()
    with torch.no_grad():
        for number, (name, buffer) in enumerate(model.named_buffers()):
            if name.endswith("layer_scalar"):
                buffer.fill_(0.6 + 0.01 * number)
    return model


@pytest.fixture(scope="module")
def gemma() -> DiffusionGemmaForBlockDiffusion:
    return tiny_gemma()


@pytest.fixture(scope="module")
def folder(gemma: DiffusionGemmaForBlockDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes it, with a tokenizer."""
    path = tmp_path_factory.mktemp("gemma")
    gemma.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[UNK]"})
    tokenizer.chat_template = "{% for m in messages %}the {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> DiscreteDiffusionPipeline:
    pipe = DiscreteDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def template(rows: int, prompt: int = PROMPT, seed: int = 3) -> Tensor:
    """A prompt for each row, and a canvas to write."""
    ids = torch.randint(2, V - 1, (rows, prompt), generator=seeded(seed))
    return torch.cat([ids, torch.full((rows, CANVAS), -1)], 1)


def reference(model: Any, prompt: Tensor, canvas: Tensor, before: Tensor | None) -> Tensor:
    """transformers' own class on a prompt, a canvas and the last logits, from nothing."""
    with torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        arguments = {"past_key_values": cache, "decoder_input_ids": canvas, "self_conditioning_logits": before}
        return model(input_ids=prompt, **arguments).logits


def canvases(rows: int, calls: int) -> list[Tensor]:
    return [torch.randint(0, V, (rows, CANVAS), generator=seeded(10 + i)) for i in range(calls)]


@torch.no_grad()
def test_logits_are_those_of_transformers(gemma: DiffusionGemmaForBlockDiffusion) -> None:
    known = template(2)
    run, before = PromptAndCanvas(gemma, known), None
    for call, canvas in enumerate(canvases(2, 3)):
        logits = run(torch.cat([known[:, :PROMPT], canvas], 1))
        expected = reference(gemma, known[:, :PROMPT], canvas, before)
        assert (logits[:, :PROMPT] == 0).all()
        torch.testing.assert_close(logits[:, PROMPT:], expected, rtol=0, atol=1e-5)
        if call:  # the last prediction is seen
            assert (expected - reference(gemma, known[:, :PROMPT], canvas, None)).abs().max() > 0.01
        before = expected


@torch.no_grad()
def test_rows_of_a_batch_are_the_rows_alone(gemma: DiffusionGemmaForBlockDiffusion) -> None:
    """Prompts and canvases of unequal lengths, calls of some rows only, and a row whose first call comes later."""
    sizes = [(6, 8), (2, 8), (9, 5)]
    known = torch.zeros(3, 14, dtype=torch.int64)
    for row, (prompt, width) in zip(known, sizes, strict=True):
        row[:prompt] = torch.randint(2, V - 1, (prompt,), generator=seeded(prompt))
        row[prompt : prompt + width] = -1
    is_padding = torch.arange(14) >= torch.tensor([sum(size) for size in sizes])[:, None]
    run, alone = PromptAndCanvas(gemma, known, is_padding), [None, None, None]
    for call, called in enumerate(([0, 1], [0, 1, 2], [1, 2], [2, 0, 1])):
        x = torch.where(known < 0, torch.randint(0, V, known.shape, generator=seeded(call)), known)
        logits = run(x[called], torch.tensor(called))
        for row, got in zip(called, logits, strict=True):
            prompt, width = sizes[row]
            here = slice(prompt, prompt + width)
            expected = reference(gemma, x[row : row + 1, :prompt], x[row : row + 1, here], alone[row])
            torch.testing.assert_close(got[here], expected[0], rtol=0, atol=2e-4)
            alone[row] = expected
            assert (got[:prompt] == 0).all()
            assert (got[prompt + width :] == 0).all()


def test_a_run_is_that_of_diffusers(gemma: DiffusionGemmaForBlockDiffusion, pipe: DiscreteDiffusionPipeline) -> None:
    """The same scheduler and draws: theirs steps the canvas, so that ours is made to draw for the canvas alone."""
    known = template(1)

    class Processor:
        eos_token_id = None

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> dict[str, Tensor]:
            return {"input_ids": known[:, :PROMPT]}

    arguments = {"vocab_size": V, "process": "uniform", "noise_schedule": "linear"}
    theirs = DiffusionGemmaPipeline(gemma, AncestralScheduler(**arguments), Processor())
    theirs.set_progress_bar_config(disable=True)
    output = theirs(
        "x", gen_length=CANVAS, num_inference_steps=6, confidence_threshold=None, generator=seeded(1), output_type="seq"
    )

    scheduler, generator = AncestralScheduler(**arguments), seeded(1)
    original, chosen = scheduler.step, scheduler.positions

    @functools.wraps(original)
    def step(model_output: RowLogits, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        rows = RowLogits(model_output.logits, model_output.positions[:, PROMPT:])
        moved = original(rows, timestep, sample[:, PROMPT:], **kwargs)
        moved.prev_sample = torch.cat([sample[:, :PROMPT], moved.prev_sample], 1)
        return moved

    def positions(timestep: Any, sample: Tensor, generator: Any = None) -> Tensor:
        return torch.cat([sample[:, :PROMPT] < 0, chosen(timestep, sample[:, PROMPT:], generator)], 1)

    scheduler.step, scheduler.positions = step, positions
    default, pipe.scheduler = pipe.scheduler, scheduler
    canvas = torch.randint(0, V, (1, CANVAS), generator=generator)
    latents = torch.cat([known[:, :PROMPT], canvas], 1)
    ours = pipe(template=known, latents=latents, num_inference_steps=6, generator=generator)
    pipe.scheduler = default
    assert ours.num_model_calls == 6
    assert torch.equal(ours.sequences[:, PROMPT:], output.sequences)
    assert torch.equal(ours.sequences[:, :PROMPT], known[:, :PROMPT])


@pytest.mark.parametrize("scheduler", [AncestralScheduler, DiscreteDDIMScheduler, UniformEntropyBoundScheduler])
def test_nothing_is_left_of_a_run(scheduler: Any, folder: Path, pipe: DiscreteDiffusionPipeline) -> None:
    """Runs after each other are fresh ones, and a sample with a generator of its own is that sample alone."""
    known = template(3)
    default, pipe.scheduler = pipe.scheduler, scheduler.from_config(pipe.scheduler.config)
    config = dict(pipe.config)

    def sample(rows: Tensor, seeds: list[int], on: DiscreteDiffusionPipeline = pipe) -> Tensor:
        generators = [seeded(seed) for seed in seeds]
        return on(template=rows, num_inference_steps=5, generator=generators, output_type="pt").sequences

    first = sample(known, [0, 1, 2])
    other = sample(template(3, seed=8), [3, 4, 5])
    assert not torch.equal(first, other)
    assert torch.equal(sample(known, [0, 1, 2]), first)
    for row in range(3):
        assert torch.equal(sample(known[row : row + 1], [row])[0], first[row])
    fresh = DiscreteDiffusionPipeline.from_pretrained(folder)
    fresh.set_progress_bar_config(disable=True)
    fresh.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert torch.equal(sample(known, [0, 1, 2], fresh), first)
    assert dict(pipe.config) == config
    pipe.scheduler = default


def test_texts(pipe: DiscreteDiffusionPipeline) -> None:
    """A canvas behind each prompt unless fewer tokens are asked for; prompts of unequal lengths; replies; known tokens."""
    output = pipe(["the cat sat on the mat", "a dog"], num_inference_steps=2, num_samples=2, eos_token_id=[])
    assert output.sequences.shape == (4, 6 + CANVAS)
    assert (output.sequences[2:, 2 + CANVAS :] == 0).all()
    assert all(text.startswith("the cat sat on the mat") for text in output.texts[:2])
    reply = pipe(messages=[{"role": "user", "content": "cat sat"}], max_new_tokens=3, num_inference_steps=2)
    assert reply.sequences.shape == (1, 3 + 3)
    known = template(2)
    known[:, PROMPT + 3] = torch.tensor([7, 8])
    assert pipe(template=known, num_inference_steps=2).sequences[:, PROMPT + 3].tolist() == [7, 8]


def test_loaded(
    gemma: DiffusionGemmaForBlockDiffusion, pipe: DiscreteDiffusionPipeline, folder: Path, tmp_path: Path
) -> None:
    """Facts, every parameter and saved buffer, dtype, and again from the folder that the pipeline writes."""
    assert find_family("google/diffusiongemma-26B-A4B-it", {"model_type": "diffusion_gemma"}).name == "DiffusionGemma"
    facts = pipe.config.denoiser
    names = ("vocab_size", "mask_token_id", "process", "parametrization", "shift", "noise_schedule", "max_length")
    assert [facts[name] for name in names] == [V, None, "uniform", "x0", 0, "linear", 64]
    assert pipe.scheduler.config["noise_schedule"] == "linear"
    assert isinstance(pipe.scheduler, AncestralScheduler)
    assert pipe.config.eos_token_id == [1]
    state = gemma.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in pipe.model.state_dict().items())
    half = DiscreteDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.model.state_dict().values()} == {torch.bfloat16}
    half.set_progress_bar_config(disable=True)
    native = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.bfloat16)
    known = template(1)
    with torch.no_grad():
        (canvas,) = canvases(1, 1)
        logits = PromptAndCanvas(half.model, known)(torch.cat([known[:, :PROMPT], canvas], 1))[:, PROMPT:]
    assert torch.equal(logits, reference(native, known[:, :PROMPT], canvas, None))
    assert half("the cat", num_inference_steps=2).sequences.shape == (1, 2 + CANVAS)
    pipe.save_pretrained(tmp_path)
    again = DiscreteDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    runs = [one("the cat", num_inference_steps=3, generator=seeded()).sequences for one in (pipe, again)]
    assert torch.equal(*runs)


def test_errors(pipe: DiscreteDiffusionPipeline, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a prompt of at least one token"):
        pipe(num_inference_steps=2)
    with pytest.raises(
        ValueError, match=r"9 tokens are to be written .* canvas of this model has 8: call with `max_new_"
    ):
        pipe("the cat", length=11)
    with pytest.raises(ValueError, match=r"`template` has a row with nothing to write"):
        pipe(template=torch.tensor([[3, 4, -1], [3, 4, 5]]))
    with pytest.raises(
        ValueError, match=r"`guidance_scale` must be 1 with a Diff.*: it keeps the prediction of one branch"
    ):
        pipe("the cat", guidance_scale=2.0, negative_prompt="a dog")
    with pytest.raises(ValueError, match=r"a DiffusionGemmaForBlockDiffusion has no logits of ids alone"):
        pipe.denoiser(torch.tensor([[3, 4, 5]]), 0.5)
    on_disk = {"model.encoder": "disk", "model.decoder": "cpu", "lm_head": "cpu"}
    with pytest.raises(
        ValueError, match=r"`device_map` puts modules on disk whose parameters encoder and decoder share"
    ):
        DiscreteDiffusionPipeline.from_pretrained(folder, device_map=on_disk, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"`device_map` is 'auto', but accelerate does not find a split"):
        DiscreteDiffusionPipeline.from_pretrained(folder, device_map="auto", max_memory={"cpu": 60000})
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    key = "model.encoder.language_model.layers.1.layer_scalar"
    state = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if name != key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"do not fit family 'DiffusionGemma' .* missing: {re.escape(key)}"):
        DiscreteDiffusionPipeline.from_pretrained(tmp_path)
