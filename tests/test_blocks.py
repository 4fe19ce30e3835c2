"""Attention by blocks: what is run, what is kept, and who may sample from such a network.

The references know no cache: the network on all tokens with a mask written pair by pair, and loops over blocks written
after the published samplers (SDAR, Fast-dLLM v2), with transformers' own cache handled by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MASK, WORDS, randomised, seeded, tiny_model, tiny_pipeline
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from discrete_schedulers import (
    AncestralScheduler,
    ConfidenceScheduler,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    EntropyBoundScheduler,
    MaskGITScheduler,
    PathPlanningScheduler,
    PCSamplerScheduler,
    SpreadScheduler,
    ThresholdScheduler,
)
from discrete_schedulers.blocks import BlockCache
from discrete_schedulers.denoisers import NetworkDenoiser

V, BLOCK = len(WORDS), 4
FACTS = {"vocab_size": V, "mask_token_id": MASK, "attention": "block_causal", "block_size": BLOCK}


def causal(model_type: str) -> nn.Module:
    """transformers' own class, tiny, that sees both ways."""
    config = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config, is_causal=False, use_cache=False))
    randomised(model, seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ddit": lambda: tiny_model(time_conditioning=False),
    "llama": lambda: causal("llama"),
    "qwen2": lambda: causal("qwen2"),
    "qwen3": lambda: causal("qwen3"),
}
SPLIT = {"ddit": {"split_head": True}, "llama": {}, "qwen2": {"shift": 1}, "qwen3": {}}


def mask_of(length: int, block_size: int = BLOCK) -> Tensor:
    """0 where a position is seen, very negative elsewhere, (1, 1, L, L)."""
    mask = torch.zeros(1, 1, length, length)
    for q, k in itertools.product(range(length), repeat=2):
        mask[..., q, k] = 0.0 if k // block_size <= q // block_size else -1e9
    return mask


def plain(model: nn.Module, ids: Tensor, shift: int) -> Tensor:
    """Logits (B, L, V) for each position: all tokens are run."""
    with torch.no_grad():
        logits = model(ids, attention_mask=mask_of(ids.shape[1])).logits
    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if shift else logits
    return logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)


def count_tokens(model: nn.Module) -> list[tuple[int, int]]:
    """A list that grows by the shape (B, W) of the ids in each call."""
    counted: list[tuple[int, int]] = []

    def count(module: nn.Module, inputs: tuple, named: dict) -> None:
        counted.append(tuple(inputs[0].shape))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return counted


def started(batch: int, length: int, prompts: list[int]) -> Tensor:
    """Rows that begin with known tokens, masks behind."""
    x = torch.randint(2, MASK, (batch, length), generator=seeded(1))
    return torch.where(torch.arange(length) < torch.tensor(prompts)[:, None], x, MASK)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_logits_are_those_of_all_tokens(name: str, cached: bool) -> None:
    """In every call of runs whose rows have prompts of their own lengths, open as many tokens as they like, and end one after
    the other; the last block is shorter. Networks: with split head, shifted logits, grouped keys."""
    model, length = NETWORKS[name](), 18
    facts = FACTS | SPLIT[name] | {"cache": BlockCache(DynamicCache) if cached else None}
    denoiser = NetworkDenoiser(model, **facts)
    scheduler = ThresholdScheduler(vocab_size=V, mask_token_id=MASK, threshold=0.35, block_length=BLOCK)
    scheduler.set_timesteps(18)
    x, sizes = started(4, length, [0, 3, 4, 13]), set()
    for index, t in enumerate(scheduler.timesteps):
        where = scheduler.positions(t, x)
        rows = denoiser(x, t, where)
        torch.testing.assert_close(rows.logits, plain(model, x, facts.get("shift", 0))[where], rtol=0, atol=1e-5)
        sizes.add(int(where.any(1).sum()))
        x = scheduler.step(rows, t, x, generator=seeded(index)).prev_sample
    assert (x != MASK).all()
    assert len(sizes) > 2, "rows should end at different calls"


def test_finished_blocks_run_once() -> None:
    """16 positions, blocks of 4, two calls a block: 4, 4, then 8 (the finished block and the new one), 4, ... Without a cache
    all up to the current block; never what stands behind it."""
    scheduler = ConfidenceScheduler(vocab_size=V, mask_token_id=MASK, block_length=BLOCK)
    pipe = tiny_pipeline(scheduler, model=NETWORKS["ddit"](), denoiser={"attention": "block_causal", "block_size": 4})
    counted = count_tokens(pipe.model)
    arguments = {"num_samples": 3, "length": 16, "num_inference_steps": 8, "output_type": "pt"}
    with_cache = pipe(**arguments, generator=seeded(1)).sequences
    assert counted == [(3, 4), (3, 4), (3, 8), (3, 4), (3, 8), (3, 4), (3, 8), (3, 4)]
    counted.clear()
    without = pipe(**arguments, generator=seeded(1), use_cache=False).sequences
    assert counted == [(3, n) for n in (4, 4, 8, 8, 12, 12, 16, 16)]
    assert torch.equal(with_cache, without)
    counted.clear()
    template = torch.cat([with_cache[:1, :9], torch.full((1, 7), -1)], dim=1)  # the prompt: two blocks and a token
    pipe(template=template, num_inference_steps=4, output_type="pt", generator=seeded(1))
    assert counted == [(1, 12), (1, 4), (1, 8), (1, 4)]
    assert "cache" not in pipe.config.denoiser


@pytest.mark.parametrize("name", SPLIT)
def test_equal_prompts_are_run_once(name: str) -> None:
    """Five rows with two prompts of two blocks: two rows are run over the prompt, five over the block that is asked for; the
    logits are those without a cache. Other padding, or another condition of a row, is another prompt."""
    model = NETWORKS[name]()
    runs = count_tokens(model)
    facts = FACTS | SPLIT[name]
    x = started(5, 12, [9, 9, 9, 9, 9])
    x[[0, 2, 3], :9], x[[1, 4], :9] = x[0, :9].clone(), x[1, :9].clone()
    padding = torch.ones(5, 12, dtype=torch.int64)
    padding[3, 1] = 0
    cases: list[tuple[dict[str, Tensor], int]] = [({}, 2), ({"attention_mask": padding}, 3)]
    for conditions, leaders in cases:
        denoiser = NetworkDenoiser(model, **facts, cache=BlockCache(DynamicCache))
        expected = NetworkDenoiser(model, **facts)(x, 0.5, x == MASK, **conditions).logits
        runs.clear()
        found = denoiser(x, 0.5, x == MASK, **conditions).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert runs == [(leaders, 8), (5, 4)]
        assert not torch.equal(found[:3], found[3:6])  # two prompts
        after = x.masked_fill(torch.arange(12) == 9, 3)
        runs.clear()
        denoiser(after, 0.5, after == MASK, **conditions)
        assert runs == [(5, 4)]
    different = started(3, 12, [9, 9, 9])
    runs.clear()
    NetworkDenoiser(model, **facts, cache=BlockCache(DynamicCache))(different, 0.5, different == MASK)
    assert runs == [(3, 12)]


def test_shifted_logits_need_no_second_block() -> None:
    """The first position of a block is predicted in the block before, whose last output is kept."""
    model = causal("qwen2")
    scheduler = ConfidenceScheduler(vocab_size=V, mask_token_id=MASK, block_length=BLOCK)
    pipe = tiny_pipeline(scheduler, model=model, denoiser=FACTS | {"shift": 1})
    counted = count_tokens(model)
    pipe(num_samples=2, length=12, num_inference_steps=6, generator=seeded(1))
    assert counted == [(2, 4), (2, 4), (2, 8), (2, 4), (2, 8), (2, 4)]


@torch.no_grad()
def test_the_cache_holds_for_what_it_has_seen_only() -> None:
    """A token far back, a condition, other rows, a shorter sequence: each time the logits are those of now."""
    model = tiny_model(time_conditioning=False, num_classes=5)
    denoiser = NetworkDenoiser(model, **FACTS, split_head=True, cache=BlockCache(DynamicCache))
    x = started(3, 16, [9, 9, 9])
    labels = torch.tensor([0, 1, 2])
    counted = count_tokens(model)
    changed = x.clone()
    changed[1, 5] = 2 + (x[1, 5] == 2)
    for ids, y, tokens in [
        (x, labels, (3, 16)),
        (x, labels, (3, 8)),
        (changed, labels, (3, 12)),
        (changed, labels.flip(0), (3, 16)),
        (changed[:2], labels[:2], (2, 16)),
        (changed[:2, :12], labels[:2], (2, 4)),
        (changed, labels, (3, 16)),
    ]:
        where = ids == MASK
        counted.clear()
        rows = denoiser(ids, 0.5, where, class_labels=y)
        assert counted == [tokens]
        logits = model(ids, class_labels=y, attention_mask=mask_of(ids.shape[1])).logits[where]
        torch.testing.assert_close(rows.logits[:, :MASK], logits[:, :MASK], rtol=0, atol=1e-5)


@torch.no_grad()
def test_outputs_at_the_ends_of_blocks_are_those_of_now() -> None:
    """Shifted logits: a token far back changes while other positions are asked for, then the first of a block is asked for; and
    rows end while the next ones of a block are."""
    model = causal("qwen2")
    denoiser = NetworkDenoiser(model, **FACTS, shift=1, cache=BlockCache(DynamicCache))
    x = started(3, 16, [9, 9, 9])
    changed = x.clone()
    changed[:, 5] = 2 + (x[:, 5] == 2)
    for ids, begin in [(x, 9), (changed, 13), (changed, 12), (changed, 12)]:
        where = torch.arange(16).expand(3, -1) >= begin
        torch.testing.assert_close(denoiser(ids, 0.5, where).logits, plain(model, ids, 1)[where], rtol=0, atol=1e-5)
    done = changed.masked_fill(changed == MASK, 3)
    for rows in (1, 2):
        ids = torch.cat([done[:rows], changed[rows:]])
        where = (ids == MASK) & (torch.arange(16) >= 12)
        torch.testing.assert_close(denoiser(ids, 0.5, where).logits, plain(model, ids, 1)[where], rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_is_not_seen() -> None:
    """A mask (B, L) joins that of the blocks."""
    model, x = causal("qwen3"), started(2, 12, [5, 5])
    denoiser = NetworkDenoiser(model, **FACTS, cache=BlockCache(DynamicCache))
    padding = torch.ones(2, 12, dtype=torch.int64)
    padding[1, :3] = 0
    rows = denoiser(x, 0.5, x == MASK, attention_mask=padding, position_ids=(padding.cumsum(1) - 1).clamp(min=0))
    both = denoiser(x[1:, 3:], 0.5)  # where blocks of 4 would begin elsewhere
    assert both.shape == (1, 9, V)
    alone = mask_of(12)[..., 3:, 3:]
    logits = model(x[1:, 3:], attention_mask=alone).logits[0, 2:]
    torch.testing.assert_close(rows.logits[7:, :MASK], logits[:, :MASK], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(2, 1, 1, 12\).*must be \(B, L\)"):
        denoiser(x, 0.5, x == MASK, attention_mask=padding[:, None, None])


# ---- whole runs against published loops ------------------------------------------------------------------------------


@torch.no_grad()
def sdar_loop(model: nn.Module, x: Tensor, num_steps: int) -> Tensor:
    """A row decoded as SDAR does it, greedily: prompt blocks are stored, then each block in `num_steps` rounds of the most
    confident tokens on top of the stored ones, and stored when it is clean."""
    store, x, length = DynamicCache(), x.clone(), x.shape[1]
    for start in range(0, length, BLOCK):
        block = x[:, start : start + BLOCK]
        place = torch.arange(start, start + BLOCK)[None]
        masks = int((block == MASK).sum())
        counts = [masks // num_steps + (i < masks % num_steps) for i in range(num_steps)]
        for count in counts:
            if count == 0:
                continue
            logits = model(
                block, position_ids=place, past_key_values=store, attention_mask=torch.zeros(1, 1, 4, 1)
            ).logits
            store.crop(-BLOCK)
            law = logits[..., :MASK].softmax(-1)
            confidence = law.amax(-1).masked_fill(block != MASK, -1.0)
            for i in confidence[0].topk(count).indices:
                block[0, i] = law[0, i].argmax()
        model(block, position_ids=place, past_key_values=store, attention_mask=torch.zeros(1, 1, 4, 1))
    return x


def test_sdars_loop() -> None:
    model = causal("qwen3")
    scheduler = ConfidenceScheduler(vocab_size=V, mask_token_id=MASK, block_length=BLOCK, temperature=0.0)
    pipe = tiny_pipeline(scheduler, model=model, denoiser=FACTS)
    x = started(3, 16, [4, 4, 4])
    ours = pipe(template=x, num_inference_steps=6, output_type="pt").sequences
    for row in range(3):
        assert torch.equal(ours[row : row + 1], sdar_loop(model, x[row : row + 1], 2))
    assert len(set(ours[:, 4:].flatten().tolist())) > 3


@torch.no_grad()
def fast_dllm_loop(model: nn.Module, x: Tensor, threshold: float, small: int) -> Tensor:
    """A row decoded as Fast-dLLM v2 does it, greedily and without a cache: sub-blocks of a block from left to right, in each
    all tokens above the threshold and at least the best; logits shifted by one."""
    x = x.clone()
    for start in range(0, x.shape[1], small):
        while (x[:, start : start + small] == MASK).any():
            end = (start // BLOCK + 1) * BLOCK
            law = plain(model, x[:, :end], 1)[0, start : start + small].softmax(-1)
            confidence = law.amax(-1).masked_fill(x[0, start : start + small] != MASK, -1.0)
            accepted = confidence > threshold
            accepted[confidence.argmax()] = True
            x[0, start : start + small] = torch.where(accepted, law.argmax(-1), x[0, start : start + small])
    return x


@pytest.mark.parametrize("small", [2, 4])
def test_fast_dllms_loop(small: int) -> None:
    model = causal("qwen2")
    scheduler = ThresholdScheduler(vocab_size=V, mask_token_id=MASK, block_length=small, temperature=0.0, threshold=0.5)
    pipe = tiny_pipeline(scheduler, model=model, denoiser=FACTS | {"shift": 1})
    x = started(3, 16, [5, 2, 7])
    output = pipe(template=x, num_inference_steps=16, output_type="pt")
    for row in range(3):
        assert torch.equal(output.sequences[row : row + 1], fast_dllm_loop(model, x[row : row + 1], 0.5, small))
    assert output.num_model_calls < 14, "nothing was accepted in parallel"


@pytest.mark.parametrize(
    "scheduler",
    [
        ThresholdScheduler(vocab_size=V, mask_token_id=MASK, threshold=0.3, block_length=2),
        EntropyBoundScheduler(vocab_size=V, mask_token_id=MASK, block_length=4),
        PCSamplerScheduler(vocab_size=V, mask_token_id=MASK, block_length=4),
        SpreadScheduler(vocab_size=V, mask_token_id=MASK, block_length=4, pattern="dilated"),
        MaskGITScheduler(vocab_size=V, mask_token_id=MASK, block_length=4),
        ConfidenceScheduler(vocab_size=V, mask_token_id=MASK, block_length=1, score="random", grid="cosine"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_no_call_sees_an_unfinished_block_before(scheduler: DiscreteScheduler) -> None:
    """Every scheduler that goes by blocks: whatever is drawn, all earlier blocks are there. A sample does not depend on its
    batch, with the cache."""
    pipe = tiny_pipeline(scheduler, model=NETWORKS["ddit"](), denoiser={"attention": "block_causal", "block_size": 4})
    x, states = started(3, 15, [1, 2, 6]), []  # without any token all masks would be alike

    def watch(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        states.append(kwargs["latents"])
        return {}

    generators = [seeded(i) for i in range(3)]
    whole = pipe(template=x, num_inference_steps=15, generator=generators, callback_on_step_end=watch).sequences
    for before, after in itertools.pairwise([x, *states]):
        for row in range(3):
            for i in ((before[row] != after[row]).nonzero()).flatten().tolist():
                assert (before[row, : i // 4 * 4] != MASK).all()
    for row in range(3):
        alone = pipe(template=x[row : row + 1], num_inference_steps=15, generator=[seeded(row)]).sequences
        assert torch.equal(alone, whole[row : row + 1])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (
            AncestralScheduler,
            {},
            "`scheduler` is a AncestralScheduler with block_length None.*blocks of 4: each has to be",
        ),
        (ConfidenceScheduler, {}, "ConfidenceScheduler with block_length None"),
        (
            ConfidenceScheduler,
            {"block_length": 3},
            "`block_length` that divides 4, such as ConfidenceScheduler.from_config",
        ),
        (
            PathPlanningScheduler,
            {"block_length": 4},
            "PathPlanningScheduler with block_length 4.*does not revise tokens",
        ),
    ],
)
def test_schedulers_that_do_not_go_by_blocks(
    scheduler: type[DiscreteScheduler], arguments: dict[str, Any], message: str
) -> None:
    one = scheduler(vocab_size=V, mask_token_id=MASK, **arguments)
    pipe = tiny_pipeline(one, model=NETWORKS["ddit"](), denoiser={"attention": "block_causal", "block_size": 4})
    with pytest.raises(ValueError, match=message):
        pipe(length=8)
    assert pipe(length=4).sequences.shape == (1, 4)  # one block: any scheduler
    template = torch.tensor([[3, 4, 5, 6, 7, -1, -1, 8]])
    assert pipe(template=template, num_inference_steps=2).sequences[0, [0, 4, 7]].tolist() == [3, 7, 8]


def test_runs_that_cannot_go_by_blocks() -> None:
    scheduler = ConfidenceScheduler(vocab_size=V, mask_token_id=MASK, block_length=2)
    pipe = tiny_pipeline(scheduler, model=NETWORKS["ddit"](), denoiser={"attention": "block_causal", "block_size": 4})
    with pytest.raises(ValueError, match="`num_inference_steps` is 5, but 6 blocks of 2 are to be filled one after"):
        pipe(length=12, num_inference_steps=5)
    pipe(length=12, num_inference_steps=6)
    pipe(template=torch.tensor([[3, 4, 5, -1, -1, -1, -1]]), num_inference_steps=3)
    with pytest.raises(ValueError, match=r"tokens are known in a block after one that is to be filled.*blocks of 4"):
        pipe(template=torch.tensor([[3, -1, 5, 6, 7, 8]]))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"attention": "block_causal"}, "`block_size` is None; `attention='block_causal'` needs a number"),
        ({"attention": "block_causal", "block_size": 0}, "`block_size` is 0"),
        ({"block_size": 4}, "`block_size` is for `attention='block_causal'`"),
        ({"attention": "causal"}, "`attention` is 'causal'; allowed: 'full', 'block_causal'"),
        ({"cache": BlockCache(DynamicCache)}, "`cache` is for `attention='block_causal'`"),
        (FACTS | {"revealed_logits": "shadow"}, "shadows stand behind the last block"),
        (FACTS | {"time_input": "sigma", "cache": BlockCache(DynamicCache)}, "`cache` is for networks without time"),
    ],
)
def test_facts_that_contradict(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkDenoiser(tiny_model(), **{"vocab_size": V, "mask_token_id": MASK} | facts)


def test_networks_with_time_have_no_cache() -> None:
    """Keys and values of another time do not hold: every call runs all up to its block."""
    scheduler = ConfidenceScheduler(vocab_size=V, mask_token_id=MASK, block_length=4)
    pipe = tiny_pipeline(scheduler, denoiser={"attention": "block_causal", "block_size": 4})
    counted = count_tokens(pipe.model)
    pipe(length=8, num_inference_steps=4)
    assert counted == [(1, 4), (1, 4), (1, 8), (1, 8)]


def test_saved_and_loaded(tmp_path: Path) -> None:
    scheduler = ConfidenceScheduler(vocab_size=V, mask_token_id=MASK, block_length=4)
    pipe = tiny_pipeline(scheduler, model=NETWORKS["ddit"](), denoiser={"attention": "block_causal", "block_size": 4})
    arguments = {"length": 12, "num_inference_steps": 5, "output_type": "pt"}
    before = pipe(**arguments, generator=seeded(0)).sequences
    pipe.save_pretrained(tmp_path)
    loaded = DiscreteDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.denoiser.attention, loaded.denoiser.block_size) == ("block_causal", 4)
    assert torch.equal(loaded(**arguments, generator=seeded(0)).sequences, before)
