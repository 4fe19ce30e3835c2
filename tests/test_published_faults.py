"""Six faults that were published of diffusers' LLaDA2Pipeline (its issue 13598, mended in pull request 13698), one test each:
our pipeline has none of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_edges import bert_with_head
from tiny import MASK, WORDS, seeded, tiny_pipeline
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    BlockRefinementAdapter,
    ConfidenceScheduler,
    DiscreteDiffusionPipeline,
    RemaskingScheduler,
)

FACTS = {"vocab_size": len(WORDS), "mask_token_id": MASK}


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def noted(pipe: DiscreteDiffusionPipeline, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The sequences of a run, and the tokens after each of its steps."""
    seen: list[Tensor] = []

    def look(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        seen.append(kwargs["latents"].clone())
        return {}

    return pipe(**arguments, callback_on_step_end=look).sequences, seen


def test_1_padding_of_shorter_prompts_is_hidden() -> None:
    """There the tokenizer's padding mask was dropped, and short prompts of a batch read padding."""
    prompts, arguments = ["the old red cat sat on", "it", "a dog"], {"max_new_tokens": 4, "num_inference_steps": 4}
    for pipe in (tiny_pipeline(), bert_with_head()):
        pipe.scheduler = ConfidenceScheduler(**FACTS, temperature=0)  # no draws: a row is a function of what it sees
        batch = pipe(prompts, **arguments).sequences
        for row, prompt in enumerate(prompts):
            alone = pipe(prompt, **arguments).sequences[0]
            assert torch.equal(batch[row, : len(alone)], alone)


@pytest.mark.parametrize("block_length", [2, 3, 4, 6, 12])
def test_2_the_length_of_blocks_that_is_asked_for_is_taken(block_length: int) -> None:
    """There the `block_length` of a call did not reach the scheduler. Here it is the scheduler's own, and the only one."""
    pipe = tiny_pipeline()
    pipe.scheduler = ConfidenceScheduler.from_config(pipe.scheduler.config, block_length=block_length)
    _, seen = noted(pipe, length=12, num_inference_steps=12, num_samples=3, generator=seeded())
    assert len(seen) == 12
    finished = set()
    for latents in seen:
        for row in latents == MASK:
            blocks = [int(block.sum()) for block in row.split(block_length)]
            assert sum(0 < left < block_length for left in blocks) <= 1
            assert blocks == sorted(blocks)  # finished, the one that is open, those that nothing has touched
            finished.add(sum(left == 0 for left in blocks))
    assert finished == set(range(12 // block_length + 1)) - ({0} if block_length == 1 else set())
    with pytest.raises(TypeError, match="block_length"):
        pipe(length=12, block_length=block_length)
    # and in their pipeline, which tells it: the adapter's block is the block that it gets, whatever was said
    adapter = BlockRefinementAdapter(AncestralScheduler(**FACTS), block_length=32)
    adapter.set_timesteps(2, block_length=block_length)
    x = torch.full((1, block_length), MASK)
    for index in range(2):
        x = adapter.step(torch.zeros(*x.shape, len(WORDS)), index, x, mask_token_id=MASK).prev_sample
    assert x.shape == (1, block_length)
    assert (x != MASK).all()


def test_3_every_name_that_is_advertised_reaches_the_callback() -> None:
    """There some names were no variables of the loop: a KeyError in the first step."""
    for pipe in (tiny_pipeline(), bert_with_head()):
        for name in pipe._callback_tensor_inputs:
            told = []

            def look(pipe: Any, step: int, t: Tensor, kwargs: dict, told: list = told) -> dict:
                told.append(set(kwargs))
                return kwargs

            arguments = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": [name]}
            pipe(length=6, num_inference_steps=3, **arguments)
            assert told == [{name}] * 3


def test_4_a_text_may_end_at_its_first_token() -> None:
    """There an end token at the first place that was written was not seen: the text went on behind it."""
    pipe, end = tiny_pipeline(), WORDS.index("then")
    template = torch.tensor([ids(f"the cat {rest}") for rest in ("then a dog", "a then dog", "a dog then", "a dog on")])

    def written(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        return {"latents": template}

    arguments = {"length": 5, "num_samples": 4, "num_inference_steps": 1, "eos_token_id": end}
    output = pipe("the cat", **arguments, callback_on_step_end=written)
    assert output.texts == ["the cat", "the cat a", "the cat a dog", "the cat a dog on"]
    assert torch.equal(output.sequences, template)
    # an end token in the prompt is the prompt's
    template[:, 1] = end
    output = pipe("the then", **arguments, callback_on_step_end=written)
    assert output.texts[0] == "the then"
    assert output.texts[3] == "the then a dog on"


@pytest.mark.parametrize(
    "scheduler", [AncestralScheduler(**FACTS), RemaskingScheduler(**FACTS)], ids=["masks", "remasks"]
)
def test_5_rows_that_are_finished_stay(scheduler: Any) -> None:
    """There a finished row was written over while others of its batch went on."""
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    full = ids("the old cat sat on a mat and")
    template = torch.tensor([full, [-1] * 8, [*full[:7], -1]])
    output, seen = noted(pipe, template=template, num_inference_steps=8, generator=seeded())
    for latents in [*seen, output]:
        assert latents[0].tolist() == full
        assert latents[2, :7].tolist() == full[:7]
    assert (output != MASK).all()
    if isinstance(scheduler, AncestralScheduler):  # nor does a token change once it is there
        for before, after in itertools.pairwise(seen):
            known = before != MASK
            assert torch.equal(after[known], before[known])
        assert len({int((latents[1] == MASK).sum()) for latents in seen}) == 8


def test_6_the_settings_of_the_progress_bar_are_left_alone(capsys: pytest.CaptureFixture) -> None:
    """There a call wrote its own settings into those of the pipeline."""
    for settings in ({"disable": True}, {"disable": False, "desc": "mine", "leave": False}):
        pipe = tiny_pipeline()
        pipe.set_progress_bar_config(**settings)
        for _ in range(2):
            pipe(length=6, num_inference_steps=3)
            assert pipe._progress_bar_config == settings
        assert ("mine" in capsys.readouterr().err) == ("desc" in settings)
