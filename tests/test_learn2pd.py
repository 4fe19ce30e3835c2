"""Learn2PD: the filter by its formula, its labels by hand, and what it saves on joints that can be enumerated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import as_denoiser, random_denoiser
from scheduler_cases import FILTER
from torch import Tensor
from toys import MASK, VOCAB, Toy

from discrete_schedulers import Learn2PDScheduler
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.schedulers.scheduling_learn2pd import filter_log_odds
from discrete_schedulers.training.learn2pd import Decoded, decode_one_by_one, fit_filter

FACTS: dict[str, Any] = {"vocab_size": VOCAB, "mask_token_id": MASK, "temperature": 0.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(confidence: list[float]) -> list[float]:
    """f of one block of four with `FILTER`, in plain Python."""
    rows = zip(FILTER["hidden_weight"], FILTER["hidden_bias"], strict=True)
    hidden = [max(0.0, sum(w * c for w, c in zip(row, confidence, strict=True)) + b) for row, b in rows]
    rows = zip(FILTER["output_weight"], FILTER["output_bias"], strict=True)
    odds = [sum(w * h for w, h in zip(row, hidden, strict=True)) + b for row, b in rows]
    return [1 / (1 + math.exp(-x)) for x in odds]


def logits_of(confidence: list[float]) -> Tensor:
    """Rows whose most probable token is 0, with the given probability."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p, torch.zeros_like(p)], dim=-1).log()[None]


def test_the_filter_opens_what_it_holds_for_final() -> None:
    x = torch.tensor([[MASK, 1, MASK, MASK, MASK, MASK, MASK]])  # the second block has one position that is not there
    confidence = [0.9, 0.6, 0.7, 0.55, 0.8, 0.95, 0.65]
    scheduler = Learn2PDScheduler(**FACTS, filter=FILTER, threshold=0.5, block_length=4, grid="uniform")
    scheduler.set_timesteps(100)
    f = by_hand([0.9, 1.0, 0.7, 0.55])
    found = scheduler.final_probability(torch.tensor([[0.9, 1.0, 0.7, 0.55, 1.0, 1.0, 1.0]], dtype=torch.float64))[0]
    assert found.tolist() == pytest.approx(f + by_hand([1.0] * 4)[:3], abs=1e-12)
    moved = scheduler.step(logits_of(confidence), 0, x).prev_sample[0]
    expected = [i for i in (0, 2, 3) if f[i] > 0.5] or [max((0, 2, 3), key=lambda i: f[i])]
    assert (moved != x[0]).nonzero()[:, 0].tolist() == expected
    assert 0 < len(expected) < 3
    strict = Learn2PDScheduler(**FACTS, filter=FILTER, threshold=1.0, block_length=4)
    strict.set_timesteps(100)
    best = max((0, 2, 3), key=lambda i: confidence[i])
    assert (strict.step(logits_of(confidence), 0, x).prev_sample[0] != x[0]).nonzero()[:, 0].tolist() == [best]


def test_without_a_filter_confidence_decides() -> None:
    scheduler = Learn2PDScheduler(**FACTS, threshold=0.75)
    scheduler.set_timesteps(100)
    x = torch.full((1, 4), MASK)
    moved = scheduler.step(logits_of([0.9, 0.6, 0.8, 0.55]), 0, x).prev_sample[0]
    assert moved.tolist() == [0, MASK, 0, MASK]
    even = Learn2PDScheduler(**FACTS, threshold=0.5)
    even.set_timesteps(100)
    moved = even.step(logits_of([0.5, 0.75, 0.5, 0.5]), 0, x).prev_sample[0]
    assert (moved != MASK).tolist() == [False, True, False, False]  # more than the threshold, not as much


def test_thresholds_of_each_step_and_the_config(tmp_path: Path) -> None:
    coefficients = {"2": {"threshold": [0.99, 0.2]}}
    scheduler = Learn2PDScheduler(**FACTS, filter=FILTER, coefficients=coefficients)
    scheduler.save_pretrained(tmp_path)
    loaded = Learn2PDScheduler.from_pretrained(tmp_path)
    assert (loaded.config.filter, loaded.config.coefficients) == (FILTER, coefficients)
    assert loaded.layers is not None
    assert all(torch.equal(layer, scheduler.layers[name]) for name, layer in loaded.layers.items())
    with pytest.raises(ValueError, match="`num_inference_steps` 3; learned budgets: 2"):
        loaded.set_timesteps(3)
    loaded.set_timesteps(2)
    x = torch.full((1, 5), MASK)
    with pytest.raises(ValueError, match="`filter` is for 4 positions, but `sample` has 5: pass `block_length=4`"):
        loaded.step(random_denoiser(VOCAB)(x, 1.0), 0, x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": {"hidden_bias": [0.0]}}, r"`filter` has \['hidden_bias'\]; it needs"),
        ({"filter": FILTER | {"output_bias": [0.0] * 3}}, r"has hidden_weight of shape \(3, 4\); \(3, 3\) is needed"),
        ({"filter": FILTER | {"hidden_bias": [0.0, math.nan, 0.0]}}, "all finite"),
        ({"filter": FILTER, "block_length": 8}, "is for blocks of 4 positions, but `block_length` is 8"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Learn2PDScheduler(**FACTS | changes)


# Learning


def test_labels_by_hand() -> None:
    """Two tokens that are equal: p(0) = 0.6 alone, certain once one is known; a third that changes its mind."""

    def denoiser(x: Tensor, t: float) -> Tensor:
        p = torch.tensor([0.6, 0.6, 0.55], dtype=torch.float64).expand(len(x), -1).clone()
        p[x[:, 0] == 0, 1] = 0.99
        p[x[:, 0] == 0, 2] = 0.2
        p[x[:, 0] == 0, 0] = 0.1  # what is said of known tokens is not read
        return torch.stack([p, 1 - p, torch.zeros_like(p)], dim=-1).log()

    decoded = decode_one_by_one(as_denoiser(denoiser), torch.full((1, 3), MASK), MASK)
    torch.testing.assert_close(
        decoded.confidence, torch.tensor([[0.6, 0.6, 0.55], [1.0, 0.99, 0.8], [1.0, 1.0, 0.8]]).double()
    )
    assert decoded.is_final.tolist() == [[True, True, False], [False, True, True], [False, False, True]]
    assert decoded.is_masked.tolist() == [[True, True, True], [False, True, True], [False, False, True]]
    with pytest.raises(ValueError, match="`block_length` is 4, which does not divide the 6 positions"):
        decode_one_by_one(as_denoiser(denoiser), torch.full((2, 6), MASK), MASK, 4)


def test_labels_are_of_the_block_that_the_scheduler_asks_about() -> None:
    """Each state once, its first block with masks: what is said of later blocks the scheduler never sees, nor is the network
    asked. One row begins with four known tokens, and is done earlier."""
    network, asked = random_denoiser(VOCAB), []

    def denoiser(x: Tensor, t: float, positions: Tensor) -> RowLogits:
        asked.append(positions.tolist())
        return network(x, t, positions)

    start = torch.full((2, 6), MASK)
    start[1, 1:5] = torch.tensor([0, 1, 0, 0])
    decoded = decode_one_by_one(denoiser, start, MASK, 3)
    assert decoded.is_masked.sum(1).tolist() == [
        3,
        1,
        2,
        1,
        1,
        3,
        2,
        1,
    ]  # of both rows, call by call, while they have masks
    scheduler, x = Learn2PDScheduler(**FACTS, threshold=1.0, block_length=3), start
    scheduler.set_timesteps(100)
    for index, places in enumerate(asked):
        chosen = scheduler.positions(index, x)
        assert chosen.tolist() == places
        x = scheduler.step(network(x, 0.5, chosen), index, x).prev_sample
    assert not (x == MASK).any()


def test_the_filter_learns_the_share_of_final_predictions() -> None:
    """Labels with P(final) = sigmoid(4 c_i - 3 c_j), j the other position: the filter finds it from labels alone."""
    confidence = torch.rand(20_000, 2, generator=seeded(1), dtype=torch.float64)
    chance = torch.sigmoid(4 * confidence - 3 * confidence.flip(1))
    final = torch.rand(20_000, 2, generator=seeded(2), dtype=torch.float64) < chance
    decoded = Decoded(confidence, final, torch.ones_like(final))
    floats = fit_filter(decoded, 8, 400, seeded(3))
    found = filter_log_odds({k: torch.tensor(v).double() for k, v in floats.items()}, confidence).sigmoid()
    assert float((found - chance).abs().mean()) < 0.03
    with pytest.raises(ValueError, match="`decoded` has no masked position"):
        fit_filter(decoded._replace(is_masked=torch.zeros_like(final)), 8, 1, seeded())


def test_published_size() -> None:
    decoded = Decoded(*(torch.ones(4, 32, dtype=dtype) for dtype in (torch.float64, torch.bool, torch.bool)))
    floats = fit_filter(decoded, 32, 1, seeded())
    assert sum(torch.tensor(layer).numel() for layer in floats.values()) == 2112


@pytest.mark.slow
def test_fewer_calls_to_nearly_the_same_tokens() -> None:
    """A ring of 8 with prompts of 2 tokens. One-by-one decoding makes 6 calls; the filter keeps nearly all of its tokens at
    fewer than 2, and more of them than any constant threshold on the confidence itself that is as fast. (Not everywhere: on
    the random joint a threshold tuned as finely is as good.)"""
    toy, generator = Toy("ising", 8), seeded(4)
    prompts = torch.full((2000, 8), MASK)
    rows = toy.joint.states[torch.multinomial(toy.joint.p, 2000, replacement=True, generator=generator)]
    known = torch.rand(2000, 8, generator=generator).argsort(1)[:, :2]
    prompts = prompts.scatter(1, known, rows.gather(1, known))
    fit, heldout = prompts.split(1000)
    floats = fit_filter(decode_one_by_one(toy.denoiser, fit, MASK), 32, 1200, seeded(5))

    def decode(**kwargs: Any) -> tuple[Tensor, float]:
        scheduler, x, calls = Learn2PDScheduler(**FACTS | kwargs), heldout, 0
        scheduler.set_timesteps(8)
        for t in scheduler.timesteps:
            chosen = scheduler.positions(t, x)
            calls += int(chosen.any(1).sum())
            x = scheduler.step(RowLogits(toy.denoiser(x, t)[chosen], chosen), t, x).prev_sample
        return x, calls / len(x)

    slow, slow_calls = decode(threshold=1.0)
    fast, fast_calls = decode(filter=floats, threshold=0.9)
    kept = float((fast == slow).double().mean())
    assert slow_calls == 6
    assert fast_calls < 2
    assert kept > 0.96  # 0.962 to 0.973 over three seeds
    for threshold in (0.55, 0.6, 0.65, 0.7, 0.75, 0.8):
        plain, calls = decode(threshold=threshold)
        assert calls > fast_calls or float((plain == slow).double().mean()) < kept
