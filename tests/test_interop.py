"""Both ways with diffusers: our schedulers in its installed pipelines, its schedulers in ours, with tiny random models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionGemmaPipeline, DiffusionPipeline, LLaDA2Pipeline
from tiny import LENGTH, MASK, WORDS, randomised, seeded, tiny_model, tiny_pipeline
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from discrete_schedulers import (
    AncestralScheduler,
    BlockRefinementAdapter,
    DiscreteDDIMScheduler,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    EulerScheduler,
    ForeignScheduler,
    GibbsCorrectorScheduler,
    PsiScheduler,
    RemaskingScheduler,
    TauLeapingScheduler,
)

V = len(WORDS)


def watched(scheduler: Any) -> list[SimpleNamespace]:
    """The calls of `scheduler.step` from now on; its signature, which diffusers reads, stays."""
    calls: list[SimpleNamespace] = []
    original = scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
        call = SimpleNamespace(**named | {"sample": named["sample"].clone()})  # the pipelines write into it
        call.output = output = original(*args, **kwargs)
        calls.append(call)
        return output

    scheduler.step = step
    return calls


# Ours in DiffusionGemmaPipeline

CANVAS = 8


class Processor:
    """Three tokens for whatever prompt."""

    eos_token_id = None

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[3, 4, 5]])}

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        return [" ".join(WORDS[token] for token in row.tolist()) for row in sequences]


@pytest.fixture(scope="module")
def gemma() -> DiffusionGemmaForBlockDiffusion:
    """Two layers, random weights."""
    text = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    text |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "max_position_embeddings": 64,
        "sliding_window": 16,
    }
    text |= {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    vision = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "position_embedding_size": 16}
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
        boi_token_id=V - 1,
        eoi_token_id=V - 2,
        image_token_id=V - 3,
    )
    torch.manual_seed(0)
    return DiffusionGemmaForBlockDiffusion(config).eval()


def gemma_pipeline(model: DiffusionGemmaForBlockDiffusion) -> DiffusionGemmaPipeline:
    pipe = DiffusionGemmaPipeline(model=model, scheduler=diffusers.DiscreteDDIMScheduler(), processor=Processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "scheduler",
    [
        AncestralScheduler(V, process="uniform"),
        AncestralScheduler(V, process="uniform", temperature=0.5, top_p=0.9),
        DiscreteDDIMScheduler(V),
        PsiScheduler(V),
        EulerScheduler(V, process="uniform"),
        TauLeapingScheduler(V, process="uniform"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_ours_in_diffusion_gemma(gemma: DiffusionGemmaForBlockDiffusion, scheduler: DiscreteScheduler) -> None:
    """By a swap in one line: two canvases of five steps, the tokens those of our steps by hand on the same logits."""
    pipe = gemma_pipeline(gemma)
    pipe.scheduler = scheduler
    calls = watched(scheduler)
    arguments = {"prompt": "x", "gen_length": 2 * CANVAS, "num_inference_steps": 5, "confidence_threshold": None}
    output = pipe(**arguments, generator=seeded(1))
    assert [call.timestep for call in calls] == [*range(5)] * 2
    generator = seeded(1)
    by_hand = type(scheduler).from_config(scheduler.config)
    by_hand.set_timesteps(5)
    canvases = []
    for canvas_calls in (calls[:5], calls[5:]):
        x = torch.randint(0, V, (1, CANVAS), generator=generator)
        for index, call in enumerate(canvas_calls):
            assert torch.equal(call.sample, x)
            x = by_hand.step(call.model_output, index, x, generator=generator).prev_sample
        canvases.append(x)
    assert torch.equal(output.sequences, torch.cat(canvases, 1))
    assert output.texts == Processor().batch_decode(output.sequences)


def test_adaptive_stopping_of_diffusion_gemma(gemma: DiffusionGemmaForBlockDiffusion) -> None:
    """It reads `pred_logits`: a network that is sure of itself is asked twice for each canvas."""
    pipe = gemma_pipeline(gemma)
    pipe.scheduler = AncestralScheduler(V, process="uniform")
    wanted = torch.randint(0, V, (1, CANVAS), generator=seeded(5))

    def sure(model: Any, arguments: Any, output: Any) -> Any:
        output.logits = 50.0 * torch.nn.functional.one_hot(wanted, V).float()
        return output

    hook = gemma.register_forward_hook(sure)
    calls = watched(pipe.scheduler)
    output = pipe(prompt="x", gen_length=2 * CANVAS, num_inference_steps=9, generator=seeded())
    hook.remove()
    assert [call.timestep for call in calls] == [0, 1, 0, 1]
    assert torch.equal(output.sequences, torch.cat([wanted, wanted], 1))


@pytest.mark.parametrize(("num_inference_steps", "made"), [(5, 5), (6, 5), (1, 1)])
def test_several_calls_in_a_step_in_diffusion_gemma(
    gemma: DiffusionGemmaForBlockDiffusion, num_inference_steps: int, made: int
) -> None:
    """The adapter takes as many steps as fit into the calls: the last one made is a step to clean tokens."""
    pipe = gemma_pipeline(gemma)
    scheduler = GibbsCorrectorScheduler(V, selection="lowest_margin")
    calls = watched(scheduler)
    pipe.scheduler = BlockRefinementAdapter(scheduler)
    output = pipe(
        prompt="x",
        gen_length=2 * CANVAS,
        num_inference_steps=num_inference_steps,
        confidence_threshold=None,
        generator=seeded(),
    )
    assert [call.timestep for call in calls] == [*range(made)] * 2
    assert len(scheduler.times) == made // 2 + 2
    last = [calls[made - 1].output.prev_sample, calls[-1].output.prev_sample]
    assert torch.equal(output.sequences, torch.cat(last, 1))


# Ours in LLaDA2Pipeline

BLOCK = 6


@pytest.fixture(scope="module")
def bert() -> BertForMaskedLM:
    """Two layers, random weights; takes the ids, `attention_mask` and `position_ids`, as that pipeline calls its model."""
    config = BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return randomised(BertForMaskedLM(config))


def llada_pipeline(model: BertForMaskedLM, scheduler: DiscreteScheduler | Any) -> LLaDA2Pipeline:
    pipe = LLaDA2Pipeline(model=model, scheduler=diffusers.BlockRefinementScheduler())
    pipe.scheduler = BlockRefinementAdapter(scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def llada_arguments(**changes: Any) -> dict[str, Any]:
    """A prompt of four tokens, half a block, and eleven to generate: three blocks, the last one not full."""
    prompt = torch.tensor([[2, 4, 7, 10], [3, 5, 8, 11]])
    arguments = {"input_ids": prompt, "gen_length": 11, "block_length": BLOCK, "num_inference_steps": 3}
    return arguments | {"mask_token_id": MASK, "output_type": "seq", "generator": seeded(2)} | changes


MASKED: list[Callable[[], DiscreteScheduler]] = [
    lambda: AncestralScheduler(V, MASK),
    lambda: AncestralScheduler(V, MASK, order="spread", temperature=0.5),
    lambda: EulerScheduler(V, MASK),
    lambda: RemaskingScheduler(V, MASK),
]


@pytest.mark.parametrize("build", MASKED, ids=["counts", "spread", "euler", "remasking"])
def test_ours_in_llada2(bert: BertForMaskedLM, build: Callable[[], DiscreteScheduler]) -> None:
    pipe = llada_pipeline(bert, build())
    seen: list[Tensor] = []

    def note(pipe: Any, step: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(kwargs["block_x"].clone())
        return kwargs

    arguments = llada_arguments(callback_on_step_end=note)
    prompt = arguments["input_ids"]
    output = pipe(**arguments)
    assert output.sequences.shape == (2, 11)
    assert (output.sequences != MASK).all()
    assert ((output.sequences >= 0) & (output.sequences < V)).all()
    for x in seen:
        assert torch.equal(x[:, :4], prompt)
        assert (x[:, :-BLOCK] != MASK).all()  # blocks before this one are done
    assert torch.equal(seen[-1][:, 4:15], output.sequences)

    by_hand, generator = build(), seeded(2)
    x = torch.full((2, 3 * BLOCK), MASK)
    x[:, :4] = prompt
    attention = (torch.arange(3 * BLOCK) < 15).long().expand(2, -1)
    num_calls = 0
    for end in (BLOCK, 2 * BLOCK, 3 * BLOCK):
        by_hand.set_timesteps(3)
        given = torch.arange(end - BLOCK, end) < 4
        for index in range(len(by_hand.timesteps)):
            with torch.no_grad():
                logits = bert(x[:, :end], attention_mask=attention[:, :end]).logits[:, -BLOCK:]
            block = x[:, end - BLOCK : end]
            after = by_hand.step(logits, index, block, generator=generator).prev_sample
            x[:, end - BLOCK : end] = torch.where(given, block, after)
            num_calls += 1
            if not by_hand.revises_tokens and (x[:, end - BLOCK : end] != MASK).all():
                break
    assert torch.equal(output.sequences, x[:, 4:15])
    assert len(seen) == num_calls


def test_llada2_stops_when_no_mask_is_left(bert: BertForMaskedLM) -> None:
    """Diffusers' own scheduler needs a call more for each block, to see that nothing is left."""
    pipe = llada_pipeline(bert, AncestralScheduler(V, MASK))
    calls = watched(pipe.scheduler)
    pipe(**llada_arguments(num_inference_steps=9))
    assert len(calls) < 3 * 9
    for block, call in enumerate(calls):
        opened = call.output.transfer_index
        assert (call.sample[opened] == MASK).all()
        assert not call.output.editing_transfer_index.any()
        assert (call.sample == MASK).any(), block
        expected = call.model_output.softmax(-1).gather(-1, call.output.prev_sample[..., None])[..., 0]
        torch.testing.assert_close(call.output.sampled_probs, expected)


def test_llada2_stops_at_the_end_of_text(bert: BertForMaskedLM) -> None:
    """A row that has its end of text (here: its first token) is left alone; the run ends when all rows have theirs."""
    pipe = llada_pipeline(bert, AncestralScheduler(V, MASK))
    for seed in range(50):
        full = pipe(**llada_arguments(generator=seeded(seed))).sequences
        end = int(full[0, 0])
        if end not in full[1]:
            break
    sequences = pipe(**llada_arguments(generator=seeded(seed), eos_token_id=end)).sequences
    assert sequences[0, 0] == end
    assert (sequences[0, 2:] == MASK).all()
    assert torch.equal(sequences[1], full[1])
    calls = watched(pipe.scheduler)
    alone = llada_arguments(input_ids=torch.tensor([[2, 4, 7, 10]]), num_inference_steps=9)
    for seed in range(5):
        end = int(pipe(**alone | {"generator": seeded(seed)}).sequences[0, 0])
        pipe(**alone | {"generator": seeded(seed), "eos_token_id": end})
        last = calls[-1].output
        assert last.transfer_index[0, 4]  # nothing was asked for after it
        assert last.sampled_tokens[0, 4] == end


def test_remasked_tokens_are_edits(bert: BertForMaskedLM) -> None:
    pipe = llada_pipeline(bert, RemaskingScheduler(V, MASK, strength="rescale", eta=0.9))
    calls = watched(pipe.scheduler)
    pipe(**llada_arguments(num_inference_steps=6))
    edited = [call.output.editing_transfer_index for call in calls]
    assert any(edit.any() for edit in edited)
    for call, edit in zip(calls, edited, strict=True):
        assert (call.sample[edit] != MASK).all()
        assert (call.sample[call.output.transfer_index] == MASK).all()
        assert not (edit & call.prompt_mask).any()
        assert torch.equal(call.output.prev_sample != call.sample, edit | call.output.transfer_index)


def test_adapter_is_saved_with_its_scheduler(bert: BertForMaskedLM, tmp_path: Path) -> None:
    scheduler = AncestralScheduler(V, MASK, grid="learned", coefficients={"3": {"times": [1, 0.4, 0.1, 0]}})
    pipe = llada_pipeline(bert, scheduler)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is LLaDA2Pipeline
    assert type(loaded.scheduler) is BlockRefinementAdapter
    assert type(loaded.scheduler.scheduler) is AncestralScheduler
    assert loaded.scheduler.scheduler.config.coefficients == scheduler.config.coefficients
    assert torch.equal(pipe(**llada_arguments()).sequences, loaded(**llada_arguments()).sequences)
    without = llada_arguments(block_length=None)  # the adapter's own, one block
    assert pipe(**without).sequences.shape == (2, 11)


def test_adapter_refuses(bert: BertForMaskedLM) -> None:
    with pytest.raises(ValueError, match="`scheduler` is a DDIMScheduler; it must be one of discrete_schedulers"):
        BlockRefinementAdapter(diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match=f"`mask_token_id` is {MASK}, but `scheduler` has {MASK - 1}"):
        llada_pipeline(bert, AncestralScheduler(V, MASK - 1))(**llada_arguments())
    with pytest.raises(ValueError, match="`mask_token_id` is 21, but `scheduler` has None"):
        llada_pipeline(bert, AncestralScheduler(V, process="uniform"))(**llada_arguments())


# Theirs in DiscreteDiffusionPipeline


def our_pipeline(process: str) -> DiscreteDiffusionPipeline:
    mask_token_id = MASK if process == "absorbing" else None
    return tiny_pipeline(AncestralScheduler(V, mask_token_id, process=process))


FOREIGN: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {  # process, scheduler, arguments of its `step`
    "amused": ("absorbing", lambda: diffusers.AmusedScheduler(MASK), {}),
    "amused-linear": ("absorbing", lambda: diffusers.AmusedScheduler(MASK, masking_schedule="linear"), {}),
    "block-refinement": (
        "absorbing",
        lambda: diffusers.BlockRefinementScheduler(threshold=0.5),
        {"mask_token_id": MASK, "temperature": 1.0, "top_p": 1.0},
    ),
    "block-refinement-uniform": ("uniform", diffusers.BlockRefinementScheduler, {"temperature": 1.0, "top_p": 1.0}),
    "discrete-ddim": ("uniform", diffusers.DiscreteDDIMScheduler, {"temperature": 1.0}),
    "entropy-bound": ("uniform", lambda: diffusers.EntropyBoundScheduler(entropy_bound=2.0), {}),
}
every_foreign = pytest.mark.parametrize("name", FOREIGN)


def template(process: str) -> Tensor:
    """A third of the tokens known."""
    known = torch.randint(0, MASK, (2, LENGTH), generator=seeded(8))
    known[:, torch.arange(LENGTH) % 3 > 0] = -1
    return known


@every_foreign
@pytest.mark.parametrize("num_steps", [1, 4])
def test_theirs_in_our_pipeline(name: str, num_steps: int) -> None:
    """Assigned as they are; the tokens are those of their steps by hand, with the same draws."""
    process, build, arguments = FOREIGN[name]
    pipe = our_pipeline(process)
    pipe.scheduler = build()
    assert type(pipe.scheduler) is ForeignScheduler
    known = template(process)
    start = pipe.scheduler.sample_prior((2, LENGTH), seeded(3))
    output = pipe(template=known, latents=start, num_inference_steps=num_steps, generator=seeded(4), output_type="pt")
    assert output.num_model_calls == num_steps
    assert torch.equal(output.sequences[known >= 0], known[known >= 0])
    assert ((output.sequences >= 0) & (output.sequences < V)).all()
    if process == "absorbing":
        assert (output.sequences != MASK).all()

    theirs, generator = build(), seeded(4)
    if isinstance(theirs, diffusers.BlockRefinementScheduler):
        theirs.set_timesteps(num_steps, block_length=LENGTH)
    else:
        theirs.set_timesteps(num_steps)
    names = theirs.timesteps.tolist() if isinstance(theirs, diffusers.AmusedScheduler) else range(num_steps)
    x = torch.where(known >= 0, known, start)
    for index, timestep in enumerate(names):
        with torch.no_grad():
            logits = pipe.denoiser(x, pipe.scheduler.timesteps[index])
        x = theirs.step(logits, timestep, x, generator=generator, **arguments).prev_sample
        x = torch.where(known >= 0, known, x)
    assert torch.equal(output.sequences, x)


@every_foreign
def test_rows_of_theirs_with_generators_of_their_own(name: str) -> None:
    process, build, _ = FOREIGN[name]
    pipe = our_pipeline(process)
    pipe.scheduler = build()

    def sample(seeds: list[int]) -> Tensor:
        generator = [seeded(seed) for seed in seeds]
        arguments = {"length": LENGTH, "num_samples": len(seeds), "num_inference_steps": 3, "output_type": "pt"}
        return pipe(**arguments, generator=generator).sequences

    batch = sample([5, 6, 7])
    for row, seed in enumerate([5, 6, 7]):
        assert torch.equal(sample([seed])[0], batch[row])
    nothing = pipe(template=torch.zeros(0, LENGTH, dtype=torch.int64), num_inference_steps=3, generator=[])
    assert nothing.sequences.shape == (0, LENGTH)


@every_foreign
def test_theirs_are_saved_and_swapped(name: str, tmp_path: Path) -> None:
    process, build, _ = FOREIGN[name]
    pipe = our_pipeline(process)
    pipe.scheduler = build()
    arguments = {"length": LENGTH, "num_inference_steps": 3, "output_type": "pt"}
    pipe(length=LENGTH, num_inference_steps=5)  # leaves no trace
    before = pipe(**arguments, generator=seeded()).sequences
    pipe.save_pretrained(tmp_path)
    loaded = DiscreteDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is ForeignScheduler
    assert type(loaded.scheduler.theirs) is type(build())
    assert torch.equal(loaded(**arguments, generator=seeded()).sequences, before)
    loaded.scheduler = AncestralScheduler.from_config(loaded.scheduler.config)
    assert loaded(**arguments).sequences.shape == (1, LENGTH)


def test_temperature_of_theirs_is_our_knob() -> None:
    pipe = our_pipeline("uniform")
    pipe.scheduler = diffusers.DiscreteDDIMScheduler()
    pipe.scheduler = ForeignScheduler.from_config(pipe.scheduler.config, temperature=0.0)
    samples = pipe(length=LENGTH, num_samples=2, num_inference_steps=1, output_type="pt", generator=seeded()).sequences
    start = pipe.scheduler.sample_prior((2, LENGTH), seeded())
    with torch.no_grad():
        best = pipe.denoiser(start, 1.0).argmax(-1)
    assert torch.equal(samples, best)


def test_times_that_a_network_is_told() -> None:
    """aMUSEd's cosine schedule is on the cosine grid: its share of masks is the time, with linear noise."""
    for masking_schedule, grid in (("cosine", "cosine"), ("linear", "uniform")):
        theirs = diffusers.AmusedScheduler(MASK, masking_schedule=masking_schedule)
        scheduler = ForeignScheduler(theirs, V, MASK, noise_schedule="linear")
        ours = AncestralScheduler(V, MASK, noise_schedule="linear", grid=grid)
        scheduler.set_timesteps(4)
        ours.set_timesteps(4)
        assert torch.equal(scheduler.times, ours.times)
        theirs.set_timesteps(4)
        x = torch.full((1, 1000), MASK)
        for index in range(3):
            after = theirs.step(torch.zeros(1, 1000, V - 1), 3 - index, x, generator=seeded()).prev_sample
            assert float((after == MASK).double().mean()) == pytest.approx(float(scheduler.times[index + 1]), abs=0.002)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": diffusers.DDIMScheduler()}, "of diffusers' schedulers these are for tokens: BlockRefinement"),
        (
            {"scheduler": diffusers.EntropyBoundScheduler()},
            "`process` is 'absorbing'; diffusers' EntropyBoundScheduler",
        ),
        (
            {
                "scheduler": diffusers.EntropyBoundScheduler(),
                "process": "uniform",
                "mask_token_id": None,
                "temperature": 2.0,
            },
            "`temperature` is 2.0, but diffusers' EntropyBoundScheduler does not take it",
        ),
        (
            {"scheduler": diffusers.AmusedScheduler(MASK), "top_p": 0.5},
            "`top_p` is 0.5, but diffusers' AmusedScheduler",
        ),
        (
            {"scheduler": diffusers.AmusedScheduler(MASK - 1)},
            f"`mask_token_id` is {MASK}, but `scheduler` has {MASK - 1}",
        ),
        (
            {
                "scheduler": diffusers.DiscreteDDIMScheduler(corrector_steps=1),
                "process": "uniform",
                "mask_token_id": None,
            },
            "`scheduler` has `corrector_steps`: take GibbsCorrectorScheduler",
        ),
    ],
)
def test_foreign_schedulers_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForeignScheduler(**{"vocab_size": V, "mask_token_id": MASK} | arguments)


@pytest.mark.parametrize("name", [None, "Nobody", "hub_utils", "UNet2DModel"])
@pytest.mark.parametrize("build", [BlockRefinementAdapter, lambda form: ForeignScheduler(form, V, MASK)])
def test_forms_that_name_no_scheduler(build: Callable[[dict[str, Any]], Any], name: str | None) -> None:
    form = {"vocab_size": V} if name is None else {"_class_name": name}
    with pytest.raises(ValueError, match=f"`scheduler` has the _class_name {name!r}; it must be a scheduler of"):
        build(form)


def test_one_of_diffusers_is_wrapped_wherever_it_is_given(tmp_path: Path) -> None:
    """By the constructor that knows the model, by `from_pretrained`, and on the way back from the files."""
    pipe = our_pipeline("absorbing")
    theirs = diffusers.AmusedScheduler(MASK)
    pipe.save_pretrained(tmp_path)
    built = DiscreteDiffusionPipeline(pipe.model, theirs, denoiser=dict(pipe.config.denoiser))
    loaded = DiscreteDiffusionPipeline.from_pretrained(tmp_path, scheduler=theirs)
    pipe.scheduler = theirs
    pipe.scheduler.save_pretrained(tmp_path / "theirs")
    by_its_file = DiscreteScheduler.from_pretrained(tmp_path / "theirs")
    for scheduler in (built.scheduler, loaded.scheduler, by_its_file):
        assert type(scheduler) is ForeignScheduler
        known = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
        assert {key: scheduler.config[key] for key in known} == known


def test_a_pipeline_refuses_what_is_not_for_tokens() -> None:
    pipe = our_pipeline("absorbing")
    before = pipe.scheduler
    with pytest.raises(ValueError, match="`scheduler` is a DDIMScheduler; it must be one of discrete_schedulers' own"):
        pipe.scheduler = diffusers.DDIMScheduler()
    assert pipe.scheduler is before
    with pytest.raises(ValueError, match=r"of diffusers' for tokens as ForeignScheduler\(...\)"):
        DiscreteDiffusionPipeline(tiny_model(), diffusers.AmusedScheduler(MASK))
    with pytest.raises(ValueError, match="`process` is 'absorbing'; diffusers' DiscreteDDIMScheduler is for uniform"):
        pipe.scheduler = diffusers.DiscreteDDIMScheduler()
