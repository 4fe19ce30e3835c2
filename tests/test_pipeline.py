"""The pipeline: what it samples, what it keeps, what it calls, and how it is saved, loaded and moved."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import PipelineCallback
from scheduler_cases import CASES
from tiny import LENGTH, MASK, WORDS, seeded, tiny_model, tiny_pipeline, tiny_tokenizer
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    EulerScheduler,
    LatentModel,
    LSDScheduler,
    NetworkDenoiser,
    TauLeapingScheduler,
)

FACTS = {"vocab_size": len(WORDS), "mask_token_id": MASK}
UNIFORM = {"vocab_size": len(WORDS), "process": "uniform"}
SCHEDULERS = {
    "counts": AncestralScheduler(**FACTS),
    "bernoulli": AncestralScheduler(**FACTS, unmasking="bernoulli"),
    "spread": AncestralScheduler(**FACTS, order="spread"),
    "euler": EulerScheduler(**FACTS),
    "tau": TauLeapingScheduler(**FACTS),
    "lsd": LSDScheduler(**FACTS),
    "lsd, log-score": LSDScheduler(**FACTS, scale="log_score"),
    "uniform": AncestralScheduler(**UNIFORM),
    "uniform, euler": EulerScheduler(**UNIFORM),
}


def pipeline_of(name: str) -> DiscreteDiffusionPipeline:
    scheduler = SCHEDULERS[name]
    return tiny_pipeline(type(scheduler).from_config(scheduler.config))


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


class Calls:
    """Counts the forward calls of a network and the rows in them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows: list[int] = []
        model.register_forward_pre_hook(lambda module, inputs: self.rows.append(len(inputs[0])))

    @property
    def number(self) -> int:
        return len(self.rows)


# What it samples


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_steps_and_calls(name: str, steps: int) -> None:
    pipe = pipeline_of(name)
    calls = Calls(pipe.model)
    output = pipe(num_samples=2, length=LENGTH, num_inference_steps=steps, generator=seeded())
    assert output.sequences.shape == (2, LENGTH)
    assert output.sequences.dtype == torch.int64
    if "uniform" not in name:
        assert (output.sequences != MASK).all()
    assert output.num_model_calls == calls.number
    assert pipe.num_timesteps == steps
    # A step in which no position moves needs no call. With "counts" each opens one while there are fewer steps than tokens.
    if name == "lsd, log-score":
        assert calls.number == steps
    elif "uniform" in name:  # a token may jump more than once
        assert min(steps, 7) <= calls.number <= steps
    elif name == "counts":
        assert min(steps, LENGTH) <= calls.number <= steps
    else:
        assert 1 <= calls.number <= min(steps, 2 * LENGTH)
    assert all(1 <= rows <= 2 for rows in calls.rows)


def test_rows_that_do_not_move_are_not_run() -> None:
    pipe = pipeline_of("bernoulli")
    calls = Calls(pipe.model)
    output = pipe(num_samples=6, length=3, num_inference_steps=20, generator=seeded())
    assert output.num_model_calls == calls.number <= 18
    assert sum(calls.rows) <= 18  # each of 18 masks opens once


@pytest.mark.parametrize("name", ["counts", "bernoulli", "uniform"])
def test_loop_is_positions_network_step(name: str) -> None:
    """The same draws with logits of all positions, written out."""
    pipe = pipeline_of(name)
    sequences = pipe(num_samples=3, length=LENGTH, num_inference_steps=5, generator=seeded(4)).sequences
    scheduler, generator = pipe.scheduler, seeded(4)
    scheduler.set_timesteps(5)
    x = scheduler.sample_prior((3, LENGTH), generator)
    for t in scheduler.timesteps:
        sigma = -torch.log(1 - (1 - 1e-3) * t).float().expand(3)
        with torch.no_grad():
            logits = pipe.model(x, sigma).logits
        x = scheduler.step(logits, t, x, generator=generator).prev_sample
    assert torch.equal(sequences, x)


def test_samples_follow_the_model() -> None:
    """One step from all masks: every position is an independent draw from the network's law. Chi-square over 4000 rows."""
    pipe = tiny_pipeline()
    rows = 4000
    drawn = pipe(num_samples=rows, length=2, num_inference_steps=1, generator=seeded()).sequences
    with torch.no_grad():
        logits = pipe.model(torch.full((1, 2), MASK), torch.tensor([6.907755])).logits[0, :, :MASK].double()
    for position in range(2):
        expected = rows * logits[position].softmax(-1)
        counts = torch.bincount(drawn[:, position], minlength=MASK).double()
        often = expected >= 5
        observed = torch.cat([counts[often], counts[~often].sum()[None]])
        wanted = torch.cat([expected[often], expected[~often].sum()[None]])
        chi2 = ((observed - wanted) ** 2 / wanted).sum()
        freedom = len(wanted) - 1
        assert (chi2 - freedom) / (2 * freedom) ** 0.5 < 4.5


def test_length_and_num_samples() -> None:
    pipe = tiny_pipeline()
    assert pipe(num_inference_steps=1).sequences.shape == (1, 32)  # the model's longest
    assert pipe(num_inference_steps=1, num_samples=3, length=1).sequences.shape == (3, 1)
    assert pipe(["the cat", "it"], num_inference_steps=1, num_samples=3, length=5).sequences.shape == (6, 5)


def test_prompts_are_kept() -> None:
    pipe = tiny_pipeline()
    prompts = ["the old cat", "it", ""]
    output = pipe(prompts, num_samples=2, length=LENGTH, num_inference_steps=4, generator=seeded())
    for row, prompt in enumerate(["the old cat", "the old cat", "it", "it", "", ""]):
        assert output.sequences[row, : len(prompt.split())].tolist() == ids(prompt)
        assert output.texts[row].startswith(prompt)
    assert (output.sequences != MASK).all()
    assert len({tuple(row) for row in output.sequences.tolist()}) == 6
    single = pipe("the old cat", length=LENGTH, num_inference_steps=4, generator=seeded()).sequences
    assert single[0, :3].tolist() == ids("the old cat")


def test_prompt_steers_the_samples() -> None:
    pipe, steps = tiny_pipeline(), {"num_inference_steps": 1, "num_samples": 300, "length": 4}
    frequencies = [
        torch.bincount(pipe(prompt, generator=seeded(), **steps).sequences[:, -1], minlength=MASK) / 300
        for prompt in ("the cat", "big bird")
    ]
    assert (frequencies[0] - frequencies[1]).abs().sum() > 0.3


def test_mask_in_a_prompt_is_filled_in() -> None:
    sequences = tiny_pipeline()("the [MASK] cat", length=6, num_inference_steps=3, generator=seeded()).sequences
    assert sequences[0, [0, 2]].tolist() == ids("the cat")
    assert (sequences != MASK).all()


@pytest.mark.parametrize("form", ["text", "texts", "ids", "ids, -1"])
def test_infilling(form: str) -> None:
    pipe = tiny_pipeline()
    texts = ["the [MASK] cat [MASK] [MASK] mat", "[MASK] dog ran on [MASK] tree"]
    template: Any = texts
    if form == "text":
        texts = template = texts[0]
        texts = [texts]
    elif form.startswith("ids"):
        template = torch.tensor([ids(text) for text in texts])
        template = template.masked_fill(template == MASK, -1) if form == "ids, -1" else template
    output = pipe(template=template, num_samples=2, num_inference_steps=3, generator=seeded())
    known = torch.tensor([ids(text) for text in texts]).repeat_interleave(2, 0)
    assert output.sequences.shape == known.shape
    assert torch.equal(output.sequences[known != MASK], known[known != MASK])
    assert (output.sequences != MASK).all()


def test_nothing_to_fill_in_needs_no_call() -> None:
    template = torch.tensor([ids("the cat sat")])
    output = tiny_pipeline()(template=template, num_inference_steps=3)
    assert torch.equal(output.sequences, template)
    assert output.num_model_calls == 0


def test_uniform_process_keeps_the_prompt() -> None:
    pipe, seen = pipeline_of("uniform"), []

    def look(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        seen.append(kwargs["latents"].clone())
        return kwargs

    prompts = ["the old cat", "it"]
    output = pipe(prompts, length=LENGTH, num_inference_steps=8, generator=seeded(), callback_on_step_end=look)
    assert len(seen) == 8
    for latents in [*seen, output.sequences]:
        assert latents[0, :3].tolist() == ids("the old cat")
        assert latents[1, :1].tolist() == ids("it")
    assert (seen[0] != seen[-1]).any()
    template = torch.tensor([[-1, 3, -1, 5]])
    filled = pipe(template=template, num_samples=20, num_inference_steps=4, generator=seeded()).sequences
    assert (filled[:, [1, 3]] == torch.tensor([3, 5])).all()
    assert len(filled[:, 0].unique()) > 1
    assert (filled >= 0).all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    pipe = pipeline_of(name)
    together = pipe(num_samples=3, length=LENGTH, num_inference_steps=4, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        alone = pipe(length=LENGTH, num_inference_steps=4, generator=[seeded(i)]).sequences
        assert torch.equal(alone[0], together.sequences[i])
        assert torch.equal(pipe(length=LENGTH, num_inference_steps=4, generator=seeded(i)).sequences, alone)
    assert len({tuple(row) for row in together.sequences.tolist()}) == 3


def test_latents() -> None:
    pipe = tiny_pipeline()
    latents = torch.full((2, 5), MASK)
    latents[:, 2] = 7
    start = latents.clone()
    output = pipe(latents=latents, num_samples=2, num_inference_steps=3, generator=seeded()).sequences
    assert (output[:, 2] == 7).all()  # a token in the absorbing process stays
    assert (output != MASK).all()
    assert torch.equal(latents, start)


# What comes out


def test_output_types() -> None:
    pipe, arguments = tiny_pipeline(), {"length": 6, "num_inference_steps": 2}
    text = pipe(**arguments, generator=seeded())
    assert text.texts == [" ".join(WORDS[i] for i in text.sequences[0] if WORDS[i] not in ("[PAD]", "[UNK]"))]
    for output_type in ("pt", "latent"):
        output = pipe(**arguments, generator=seeded(), output_type=output_type)
        assert torch.equal(output.sequences, text.sequences)
        assert output.texts is None
    array = pipe(**arguments, generator=seeded(), output_type="np").sequences
    assert isinstance(array, np.ndarray)
    assert array.tolist() == text.sequences.tolist()
    assert pipe(**arguments, generator=seeded(), return_dict=False)[1:] == (text.texts, text.num_model_calls)
    assert torch.equal(pipe(**arguments, generator=seeded(), return_dict=False)[0], text.sequences)


def test_without_tokenizer() -> None:
    pipe = tiny_pipeline(tokenizer=None)
    output = pipe(length=6, num_inference_steps=2, generator=seeded())
    assert output.texts is None
    expected = tiny_pipeline()(length=6, num_inference_steps=2, generator=seeded()).sequences
    assert torch.equal(output.sequences, expected)


# Callbacks and progress


def test_callback_sees_every_step() -> None:
    pipe, seen = tiny_pipeline(), []

    def look(*arguments: Any) -> dict:
        seen.append(arguments)
        return {}

    output = pipe(length=8, num_inference_steps=4, generator=seeded(), callback_on_step_end=look)
    assert [step for _, step, _, _ in seen] == [0, 1, 2, 3]
    assert [float(t) for _, _, t, _ in seen] == [1.0, 0.75, 0.5, 0.25]
    assert all(who is pipe and set(kwargs) == {"latents"} for who, _, _, kwargs in seen)
    assert [int((kwargs["latents"] == MASK).sum()) for *_, kwargs in seen] == [6, 4, 2, 0]
    assert torch.equal(seen[-1][-1]["latents"], output.sequences)


def test_callback_changes_the_sample() -> None:
    def remask(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        return {"latents": torch.full_like(kwargs["latents"], 5 if step == 1 else MASK)}

    output = tiny_pipeline()(length=6, num_inference_steps=2, generator=seeded(), callback_on_step_end=remask)
    assert (output.sequences == 5).all()
    opened = []

    def mask_half(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        opened.append(int((kwargs["latents"] != MASK).sum()))
        return {"latents": torch.full_like(kwargs["latents"], MASK)} if step == 0 else {}

    tiny_pipeline()(length=6, num_inference_steps=2, generator=seeded(), callback_on_step_end=mask_half)
    assert opened == [3, 6]  # the second step started again from six masks


def test_callback_objects() -> None:
    class Freeze(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
            return {"latents": torch.full_like(kwargs["latents"], step)}

    callback = Freeze(cutoff_step_ratio=None, cutoff_step_index=1)
    output = tiny_pipeline()(length=6, num_inference_steps=3, callback_on_step_end=callback)
    assert (output.sequences == 2).all()


def test_progress_bar(capsys: pytest.CaptureFixture) -> None:
    pipe = tiny_pipeline()
    pipe(length=6, num_inference_steps=3)
    assert capsys.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False, desc="sampling")
    pipe(length=6, num_inference_steps=3)
    assert "sampling: 100%" in (written := capsys.readouterr().err)
    assert "3/3" in written


# Save, load, swap, move


def test_save_and_load(tmp_path: Path, warnings_of_diffusers: Callable[[], list[str]]) -> None:
    coefficients = {"4": {"scale": [0.1, 1 / 3, 2.5, 1.0]}}
    pipe = tiny_pipeline(LSDScheduler(**FACTS, coefficients=coefficients), denoiser={"suppress_token_ids": [0, 1]})
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DiscreteDiffusionPipeline"
    assert index["scheduler"] == ["discrete_schedulers", "LSDScheduler"]
    assert index["model"] == ["discrete_schedulers", "DDiTModel"]
    assert index["tokenizer"][0] == "transformers"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = DiscreteDiffusionPipeline.from_pretrained(tmp_path)
    assert warnings_of_diffusers() == []
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is LSDScheduler
    assert loaded.scheduler.config.coefficients == coefficients
    assert loaded.config.denoiser == pipe.config.denoiser
    assert loaded.config.denoiser["suppress_token_ids"] == [0, 1]
    arguments = {"prompt": "the cat", "length": LENGTH, "num_inference_steps": 4, "num_samples": 5}
    output = pipe(generator=seeded(), **arguments)
    again = loaded(generator=seeded(), **arguments)
    assert torch.equal(output.sequences, again.sequences)
    assert output.texts == again.texts
    assert not torch.isin(output.sequences, torch.tensor([0, 1])).any()


def test_load_with_another_scheduler(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    other = EulerScheduler(**FACTS, temperature=0.5)
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "pipe", scheduler=other)
    assert pipe.scheduler is other
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["discrete_schedulers", "EulerScheduler"]


SWAPPED = {case.cls: None for case in CASES if case.is_absorbing and not case.cls.needs_revealed_logits}


@pytest.mark.parametrize("target", SWAPPED)
def test_swap_in_one_line(
    target: type[DiscreteScheduler], tmp_path: Path, warnings_of_diffusers: Callable[[], list[str]]
) -> None:
    pipe = tiny_pipeline(AncestralScheduler(**FACTS, temperature=0.7, grid="cosine"))
    pipe.scheduler = target.from_config(pipe.scheduler.config)
    assert warnings_of_diffusers() == []
    assert type(pipe.scheduler) is target
    assert (pipe.scheduler.config.temperature, pipe.scheduler.config.grid) == (0.7, "cosine")
    pipe(length=6, num_inference_steps=3)
    target(**FACTS, top_p=0.9).save_pretrained(tmp_path / "learned")
    pipe.scheduler = target.from_pretrained(tmp_path / "learned")
    assert pipe.scheduler.config.top_p == 0.9
    pipe(length=6, num_inference_steps=3)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["discrete_schedulers", target.__name__]


def test_bundled_ids() -> None:
    with pytest.raises(ValueError, match="'discrete-schedulers/no-such-model' is not bundled; bundled:"):
        DiscreteDiffusionPipeline.from_pretrained("discrete-schedulers/no-such-model")


def test_dtype_leaves_the_grid_alone() -> None:
    times, scale = [1.0, 0.7, 1 / 3, 0.0], [0.1, 1 / 3, 1.0]
    pipe = tiny_pipeline(LSDScheduler(**FACTS, grid="learned", coefficients={"3": {"scale": scale, "times": times}}))
    assert pipe.to(torch.bfloat16) is pipe
    assert pipe.model.dtype == torch.bfloat16
    pipe(length=6, num_inference_steps=3)
    assert pipe.scheduler.timesteps.dtype == torch.float64
    assert pipe.scheduler.times.tolist() == times
    assert pipe.scheduler.config.coefficients["3"]["scale"] == scale
    assert pipe.to("cpu") is pipe


def test_cpu_offload_goes_through_the_hooks() -> None:
    expected = tiny_pipeline()(length=6, num_inference_steps=3, generator=seeded()).sequences
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    hook, calls = pipe.model._hf_hook, []
    before = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: calls.append(module) or before(module, *args, **kwargs)
    output = pipe(length=6, num_inference_steps=3, generator=seeded())
    assert torch.equal(output.sequences, expected)
    assert len(calls) == output.num_model_calls == 3  # the hook brings the weights in: every call must pass it


# Networks in a wrapper


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """As `torch.compile` hands it back; what it does stays what it was, see `set_stance`."""
    return torch.compile(model, backend="eager")


def with_latent(embedding: str) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """With an adapter that adds nothing yet."""
    return lambda model: LatentModel(model, embedding, 32)


@pytest.mark.parametrize(
    "wrap", [compiled, with_latent("vocab_embed"), lambda m: compiled(with_latent("vocab_embed")(m))]
)
def test_a_wrapper_hides_nothing_of_a_network(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """Neither that it has classes, nor that it takes `attention_mask`, nor what its class says of itself."""
    calls: list[dict[str, Any]] = [
        {"class_labels": [0, 2], "guidance_scale": 2.0, "length": 6},
        {"prompt": ["the cat", "a dog sat on"], "max_new_tokens": 3},
    ]
    with torch.compiler.set_stance("force_eager"):
        for call in calls:
            pipe = tiny_pipeline(model=tiny_model(num_classes=3))
            call |= {"num_inference_steps": 2}
            expected, facts = pipe(**call, generator=seeded()), pipe.config.denoiser
            pipe.model = wrap(pipe.model)
            assert torch.equal(pipe(**call, generator=seeded()).sequences, expected.sequences)
            assert tiny_pipeline(model=wrap(tiny_model(num_classes=3))).config.denoiser == facts


@pytest.mark.parametrize("wrap", [compiled, with_latent("bert.embeddings")])
def test_the_head_of_a_network_in_a_wrapper(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    config = BertConfig(vocab_size=25, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    scheduler, facts = AncestralScheduler(vocab_size=25, mask_token_id=4), {"head": "cls"}
    model, heads = BertForMaskedLM(config).eval(), []
    model.cls.register_forward_hook(lambda module, inputs, output: heads.append(len(output)))
    sequences = []
    with torch.compiler.set_stance("force_eager"):
        for network in (model, wrap(model)):
            pipe = DiscreteDiffusionPipeline(network, scheduler, denoiser=facts)
            pipe.set_progress_bar_config(disable=True)
            sequences.append(pipe(length=8, num_inference_steps=4, generator=seeded()).sequences)
        assert torch.equal(*sequences)
        assert heads == [2] * 8  # rows, not batches
        with pytest.raises(ValueError, match=r"`head` is 'lm_head'; .* has no submodule of this name"):
            NetworkDenoiser(wrap(model), 25, 4, head="lm_head")


# A network of transformers


def test_masked_language_model(tmp_path: Path) -> None:
    """AntiBERTy's shape: a BERT with start and end tokens, special ids that are never drawn, and no time."""
    vocab, start, end, mask, special = 25, 2, 3, 4, [0, 1, 2, 3]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    scheduler = AncestralScheduler(vocab_size=vocab, mask_token_id=mask)
    facts = {"suppress_token_ids": special, "frozen_token_ids": [start, end], "max_length": 40}
    pipe = DiscreteDiffusionPipeline(BertForMaskedLM(config).eval(), scheduler, denoiser=facts)
    pipe.set_progress_bar_config(disable=True)
    template = torch.tensor([[start, *[mask] * 18, end]])
    output = pipe(template=template, num_samples=40, num_inference_steps=6, generator=seeded())
    assert (output.sequences[:, 0] == start).all()
    assert (output.sequences[:, -1] == end).all()
    inner = output.sequences[:, 1:-1]
    assert not torch.isin(inner, torch.tensor([*special, mask])).any()
    assert len(inner.unique()) == 20  # all 20 amino acids
    assert output.num_model_calls == 6
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["model"] == ["transformers", "BertForMaskedLM"]
    loaded = DiscreteDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(template=template, num_samples=40, num_inference_steps=6, generator=seeded())
    assert torch.equal(output.sequences, again.sequences)
    with pytest.raises(ValueError, match="41 tokens; this model takes at most 40"):
        pipe(template=torch.full((1, 41), mask))


# Errors and warnings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "the", "template": "the [MASK]"}, "`prompt` and `template` cannot both be given"),
        ({"template": "the [MASK]", "length": 2}, "`length` and `template` cannot both be given"),
        ({"num_samples": 0}, "`num_samples` is 0; it must be an integer of at least 1"),
        ({"num_samples": 1.5}, "`num_samples` is 1.5"),
        ({"length": 0}, "`length` is 0; allowed are 1 to 32"),
        ({"length": 33}, "`length` is 33; allowed are 1 to 32"),
        ({"output_type": "pil"}, "`output_type` is 'pil'; allowed: 'text', 'pt', 'np', 'latent'"),
        (
            {"callback_on_step_end_tensor_inputs": ["logits"]},
            r"`callback_on_step_end_tensor_inputs` has \['logits'\]; allowed: \['latents'\]",
        ),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_samples": 3, "generator": [seeded()]}, "`generator` is a list of 1, but 3 samples are wanted"),
        ({"prompt": "the old cat", "length": 3}, "`prompt` has 3 tokens; `length` 3 leaves nothing"),
        ({"template": "the cat"}, "`template` has a text without mask tokens"),
        ({"template": ["the [MASK]", "[MASK]"]}, r"`template` has texts of \[1, 2\] tokens"),
        ({"template": " ".join(["[MASK]"] * 33)}, "would have 33 tokens; this model takes at most 32"),
        ({"template": torch.zeros(3, dtype=torch.int64)}, r"`template` is torch.int64 of shape \(3,\)"),
        ({"template": torch.zeros(1, 3)}, "`template` is torch.float32"),
        ({"template": torch.full((1, 3), len(WORDS))}, "`template` has ids from 22 to 22; allowed are -1 to 21"),
        ({"template": torch.full((1, 3), -2)}, "`template` has ids from -2 to -2"),
        ({"latents": torch.zeros(2, 4, dtype=torch.int64)}, r"it must be int64 of shape \(1, 4\)"),
        ({"latents": torch.zeros(1, 4)}, "`latents` is torch.float32"),
        ({"latents": torch.zeros(1, 4, dtype=torch.int64), "length": 5}, r"it must be int64 of shape \(1, 5\)"),
    ],
)
def test_arguments_that_are_not_allowed(arguments: dict, message: str) -> None:
    pipe = tiny_pipeline()
    calls = Calls(pipe.model)
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
    assert calls.number == 0


def test_text_needs_a_tokenizer() -> None:
    pipe = tiny_pipeline(tokenizer=None)
    for arguments in ({"prompt": "the"}, {"template": "the [MASK]"}, {"template": ["the [MASK]"]}):
        with pytest.raises(ValueError, match="this pipeline has no tokenizer"):
            pipe(**arguments)


def test_text_template_needs_a_mask() -> None:
    with pytest.raises(ValueError, match="`template` needs a mask token, which a uniform process does not have"):
        pipeline_of("uniform")(template="the cat")


def test_length_must_be_known() -> None:
    pipe = tiny_pipeline(denoiser={"max_length": None})
    with pytest.raises(ValueError, match="`length` is required"):
        pipe()
    assert pipe(length=40, num_inference_steps=1).sequences.shape == (1, 40)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (AncestralScheduler(vocab_size=30, mask_token_id=MASK), "vocab_size 30, but the model has 22"),
        (AncestralScheduler(vocab_size=22, mask_token_id=3), "mask_token_id 3, but the model has 21"),
        (AncestralScheduler(**UNIFORM), "mask_token_id None, but the model has 21"),
        (
            AncestralScheduler(**FACTS, noise_schedule="cosine"),
            "noise_schedule 'cosine', but the model has 'loglinear'",
        ),
    ],
    ids=["vocabulary", "mask", "process", "noise"],
)
def test_scheduler_that_does_not_fit(scheduler: Any, message: str) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe(length=4, num_inference_steps=1)


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("mps"))
    with pytest.raises(ValueError, match="`pipe` is on 'mps', which has no float64"):
        pipe(length=4, num_inference_steps=1)


def test_a_scheduler_of_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="`scheduler` is a DDIMScheduler"):
        tiny_pipeline().scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="`scheduler` is a DDIMScheduler"):
        DiscreteDiffusionPipeline(tiny_model(), DDIMScheduler())


def test_a_network_without_time_takes_any_noise_schedule() -> None:
    pipe = tiny_pipeline(model=tiny_model(cond_dim=None))
    pipe.scheduler = AncestralScheduler(**FACTS, noise_schedule="cosine")
    assert (pipe(length=4, num_inference_steps=2).sequences != MASK).all()


def test_coefficients_of_another_model(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    learned = {"coefficients": {"2": {"scale": [1.0, 1.0]}}}
    arguments = {"length": 4, "num_inference_steps": 2}
    pipe.scheduler = LSDScheduler(**FACTS, **learned, learned_for={"base_model": "someone/else"})
    with pytest.warns(UserWarning, match=f"learned for 'someone/else', this model is '{tmp_path}'") as caught:
        pipe(**arguments)
    assert [warning.filename for warning in caught] == [__file__]  # it names the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for learned_for in ({"base_model": str(tmp_path)}, {"method": "lsd"}, None):
            pipe.scheduler = LSDScheduler(**FACTS, **learned, learned_for=learned_for)
            pipe(**arguments)
        unnamed = tiny_pipeline(LSDScheduler(**FACTS, **learned, learned_for={"base_model": "someone/else"}))
        unnamed(**arguments)


def test_coefficients_move_with_their_model(tmp_path: Path) -> None:
    """A saved pipeline is the model it was: no warning in its copy, nor in that one's. Another model warns."""
    tiny_pipeline().save_pretrained(tmp_path / "base")
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "base")
    learned = {"coefficients": {"2": {"scale": [1.0, 1.0]}}, "learned_for": {"base_model": str(tmp_path / "base")}}
    pipe.scheduler = LSDScheduler(**FACTS, **learned)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("copy", "copy of the copy"):
            pipe.save_pretrained(tmp_path / name)
            pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / name)
            pipe.set_progress_bar_config(disable=True)
            pipe(length=4, num_inference_steps=2)
    tiny_pipeline(LSDScheduler(**FACTS, **learned)).save_pretrained(tmp_path / "other")
    other = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="learned for .*base', this model is"):
        other(length=4, num_inference_steps=2)


class Plain(torch.nn.Module):
    """A module of torch's and no more, without `device`, `dtype` and a config: each mask opens to the sum of the known ids."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.scale, self.form = torch.nn.Parameter(torch.tensor(50.0)), form

    def forward(self, ids: Tensor) -> Any:
        total = ids.masked_fill(ids == 4, 0).sum(1, keepdim=True).expand_as(ids) % 4
        return self.form(self.scale * torch.nn.functional.one_hot(total, 4))


@pytest.mark.parametrize("form", [lambda logits: logits, lambda logits: (logits, None)], ids=["tensor", "tuple"])
def test_any_module_is_a_network(form: Callable[[Tensor], Any]) -> None:
    pipe = DiscreteDiffusionPipeline(Plain(form), AncestralScheduler(5, 4))
    pipe.set_progress_bar_config(disable=True)
    template = torch.tensor([[1, 2, 4, 4, 4]])
    assert pipe(template=template, num_inference_steps=1).sequences.tolist() == [[1, 2, 3, 3, 3]]
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    pipe.to(torch.float64)
    assert (pipe.dtype, hasattr(pipe.model, "dtype")) == (torch.float64, False)
    assert pipe.to("meta").device == torch.device("meta")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda logits: None, "`model` returned a NoneType; it must return logits"),
        (lambda logits: {"logits": logits}, "`model` returned a dict; it must return logits"),
        (
            lambda logits: logits.mT,
            r"`model` returned logits of shape \(1, 4, 8\) for tokens of shape \(1, 8\); they must be",
        ),
        (lambda logits: logits[:, 0], r"`model` returned logits of shape \(1, 4\) for tokens"),
    ],
)
def test_what_a_network_returns_is_checked(form: Callable[[Tensor], Any], message: str) -> None:
    pipe = DiscreteDiffusionPipeline(Plain(form), AncestralScheduler(5, 4))
    with pytest.raises(ValueError, match=message):
        pipe(length=8, num_inference_steps=2)


def test_a_network_of_transformers_says_its_sizes() -> None:
    """Its longest sequence, as when it is loaded by its id, and whether it can read the mask."""
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=6,
    )
    pipe = DiscreteDiffusionPipeline(BertForMaskedLM(config), AncestralScheduler(9, 8))
    assert pipe(num_inference_steps=1).sequences.shape == (1, 6)
    with pytest.raises(ValueError, match="`length` is 7; allowed are 1 to 6"):
        pipe(length=7)
    with pytest.raises(ValueError, match="vocab_size 10, but the BertForMaskedLM reads 9 tokens: it must have as many"):
        DiscreteDiffusionPipeline(BertForMaskedLM(config), AncestralScheduler(10, 9))


def test_from_pipe_takes_the_network_along() -> None:
    pipe = tiny_pipeline()
    again = DiscreteDiffusionPipeline.from_pipe(pipe)
    assert again.model is pipe.model
    assert again.config.denoiser == pipe.config.denoiser


def test_a_device_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="`pipe` is on 'meta', where weights have no values: it must be loaded anew"):
        tiny_pipeline().to("meta")(length=4, num_inference_steps=2)


def test_step_budget_that_was_not_learned() -> None:
    pipe = tiny_pipeline(LSDScheduler(**FACTS, coefficients={"2": {"scale": [1.0, 1.0]}}))
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 3; learned budgets: 2"):
        pipe(length=4, num_inference_steps=3)


# Fresh processes


def run(code: str, folder: Path) -> str:
    """The output of a fresh Python process; what it prints to stderr where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,  # a question whether to trust remote code must not wait for an answer
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys
pipe = DiscreteDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
import torch
output = pipe("the cat", length=8, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
print(type(pipe.model).__module__, type(pipe.scheduler).__name__, output.sequences.tolist())
"""
ORDERS = {
    "ours alone": "from discrete_schedulers import DiscreteDiffusionPipeline",
    "diffusers before": "import diffusers.pipelines.pipeline_utils\nfrom discrete_schedulers import DiscreteDiffusionPipeline",
    "diffusers after": (
        "import discrete_schedulers\nfrom diffusers import DiffusionPipeline\n"
        "from discrete_schedulers.pipelines import DiscreteDiffusionPipeline"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_saved_pipeline_loads_in_a_fresh_process(order: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "discrete_schedulers",
        "AncestralScheduler",
    ]
    sequences = pipe("the cat", length=8, num_inference_steps=3, generator=seeded()).sequences.tolist()
    printed = run(ORDERS[order] + LOAD, tmp_path)
    assert printed == f"discrete_schedulers.models.ddit AncestralScheduler {sequences}\n"


@pytest.mark.slow
def test_registration_in_a_fresh_process(tmp_path: Path) -> None:
    """The table is amended once, whoever imports it and when, and nothing stays on the import path."""
    code = """
import sys
import discrete_schedulers
from discrete_schedulers import registration
waiting = lambda: sum(isinstance(finder, registration.TableFinder) for finder in sys.meta_path)
registration.register()
print(waiting(), registration.TABLE_MODULE in sys.modules)
from diffusers.pipelines import pipeline_loading_utils
print(waiting(), pipeline_loading_utils.LOADABLE_CLASSES["discrete_schedulers"])
del pipeline_loading_utils.LOADABLE_CLASSES["discrete_schedulers"]
registration.register()
registration.register()
print(waiting(), "discrete_schedulers" in pipeline_loading_utils.LOADABLE_CLASSES)
"""
    methods = ["save_pretrained", "from_pretrained"]
    table = {"ModelMixin": methods, "SchedulerMixin": methods}
    assert run(code, tmp_path) == f"1 False\n0 {table}\n0 True\n"


@pytest.mark.slow
def test_tokenizer_only_where_it_is_wanted(tmp_path: Path) -> None:
    """A pipeline saved without a tokenizer loads without one."""
    tiny_pipeline(tokenizer=None).save_pretrained(tmp_path)
    code = (
        f"{ORDERS['ours alone']}\nimport sys\nprint(DiscreteDiffusionPipeline.from_pretrained(sys.argv[1]).tokenizer)"
    )
    assert run(code, tmp_path) == "None\n"


def test_tokenizer_of_the_tests() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer("the [MASK] cat xyz", add_special_tokens=False)["input_ids"] == [2, MASK, 4, 1]
    assert tokenizer.decode([2, 4]) == "the cat"
