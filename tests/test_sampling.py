"""Every random draw of the library: its law, its edges, and that a row does not depend on its batch."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import chi_square_z, spread_subset_law, torus_gap
from scipy.stats import binom, norm
from torch import Tensor

from discrete_schedulers import AncestralScheduler, RowLogits, sampling
from discrete_schedulers.sampling import (
    bernoulli_subset,
    categorical,
    draw_others,
    draw_states,
    draw_tokens,
    invert,
    nearest_on_ring,
    one_stage,
    runs,
    spread_subset,
    top_subset,
    torus_distance,
    uniform_subset,
    uniforms,
    weigh,
)

TOKENS = 50257  # GPT-2's
GRID = 2.0**-24  # float32 uniforms are its multiples
LAST_U = 1 - 2.0**-53  # the largest float64 uniform
quick = settings(max_examples=60, deadline=None, derandomize=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zipf(exponent: float = 1.0, num_tokens: int = TOKENS) -> Tensor:
    weights = torch.arange(1, num_tokens + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def entropy(law: Tensor) -> float:
    return -float(torch.xlogy(law, law).sum())


def subset_counts(subsets: Tensor, allowed: list[frozenset[int]]) -> Tensor:
    """How often each allowed subset is among the rows of a bool tensor (B, L); any other one is an error."""
    place = {subset: i for i, subset in enumerate(allowed)}
    rows = [place[frozenset(row.nonzero().flatten().tolist())] for row in subsets]
    return torch.bincount(torch.tensor(rows), minlength=len(allowed))


def test_chunks_are_scaled_alike_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RowLogits.everywhere(torch.randn(2, 3, 5, generator=seeded()))
    eager = torch.cat([some.clone() for _, some in rows.chunks(None, 2.0)])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(torch.cat([some for _, some in rows.chunks(None, 2.0)]), eager)
    assert torch.equal(eager, 2 * rows.logits)


# Uniforms


def test_uniforms_have_53_bits() -> None:
    u = uniforms((1000, 4), seeded(), "cpu")
    assert u.dtype == torch.float64
    assert ((u >= 0) & (u < 1)).all()
    assert (u * 2**53 % 2 == 1).double().mean() > 0.4  # the last of 53 bits is random
    assert uniforms((2, 2), seeded(), "cpu", torch.float32).dtype == torch.float32


def test_a_list_of_generators_needs_one_for_each_row() -> None:
    with pytest.raises(ValueError, match="`generator` is a list of 2, but the batch has 3 rows"):
        uniforms((3, 4), [seeded(), seeded()], "cpu")
    with pytest.raises(ValueError, match=r"`generator` is .* it must be a torch\.Generator, a list"):
        uniforms((2, 4), [seeded(), 7], "cpu")


def test_no_generator_is_torchs_own() -> None:
    torch.manual_seed(7)
    first = uniforms((2, 3), None, "cpu")
    torch.manual_seed(7)
    assert torch.equal(first, uniforms((2, 3), None, "cpu"))


def test_gumbels_are_finite_at_the_end_of_u(monkeypatch: pytest.MonkeyPatch) -> None:
    """u = 0 counts as the middle of its cell: -log(54 log 2)."""
    monkeypatch.setattr(sampling, "uniforms", lambda shape, *_: torch.zeros(shape, dtype=torch.float64))
    assert sampling.gumbels((1, 1), None, "cpu").item() == pytest.approx(-math.log(54 * math.log(2)), rel=1e-14)


# Categorical: the law


@pytest.mark.parametrize("num_draws", [6_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_tokens_of_an_ancestral_step_follow_a_zipf_law(num_draws: int) -> None:
    """What a step from t to s draws at the masks that it opens, when it opens 1 of 1024 (reference: Zheng et al. 2024)."""
    law = torch.cat([zipf(), torch.zeros(1, dtype=torch.float64)])  # the mask comes last
    scheduler = AncestralScheduler(vocab_size=TOKENS + 1, mask_token_id=TOKENS, unmasking="bernoulli")
    scheduler.set_timesteps(1024)
    masks, logits, generator = torch.full((16, 1024), TOKENS), law.log(), seeded(1)
    counts, num_masks = torch.zeros(TOKENS + 1, dtype=torch.int64), 0
    while counts.sum() < num_draws:
        positions = scheduler.positions(0, masks, generator)
        rows = RowLogits(logits.expand(int(positions.sum()), -1), positions)
        x_s = scheduler.step(rows, 0, masks, generator=generator).prev_sample
        assert torch.equal(x_s != TOKENS, positions)
        counts += torch.bincount(x_s[positions], minlength=TOKENS + 1)
        num_masks += masks.numel()
    assert chi_square_z(counts, law) < 4.5
    opened, rate = int(counts.sum()), 1 / 1024
    assert abs(opened - num_masks * rate) < 4.5 * math.sqrt(num_masks * rate)

    # -log p of the drawn tokens has the entropy as its mean, and the histogram's own entropy is what n draws give
    surprise = -law[:-1].log()
    spread = math.sqrt(float(law[:-1] @ (surprise - entropy(law)) ** 2) / opened)
    assert abs(float(surprise @ counts[:-1].double()) / opened - entropy(law)) < 4.5 * spread
    # by Poisson counts: the expected entropy of a histogram of n draws
    few = torch.arange(1, opened + 1, dtype=torch.float64)[:400]
    mean = law[:-1, None] * opened
    rare = mean[:, 0] < 150
    weight = torch.exp(few * mean[rare].log() - mean[rare] - torch.lgamma(few + 1))
    expected = float((weight * -torch.xlogy(few / opened, few / opened)).sum())
    common = law[:-1][~rare]
    expected += entropy(common) - float(((1 - common) / (2 * opened)).sum())  # second order in 1 / n
    assert abs(entropy(counts / opened) - expected) < max(0.02, 3 * spread)  # 0.02 nats with 100,000 draws


def test_entropy_of_the_inversion_is_that_of_the_law() -> None:
    """Evenly spaced uniforms show the law of the inversion with an error of 1 / n instead of 1 / sqrt(n)."""
    law, num_draws = zipf(), 4096
    u = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    drawn = torch.cat([categorical(law.log().expand(64, -1), part) for part in u.split(64)])
    assert abs(float(-law[drawn].log().mean()) - entropy(law)) < 0.002


def test_every_token_owns_an_interval_of_its_probability() -> None:
    """The law of the inversion is exact: token v is drawn for u in [P(< v), P(<= v)), to 1e-12."""
    law = zipf()
    tokens = torch.cat([torch.arange(40), torch.arange(1000, TOKENS, 900), torch.tensor([TOKENS - 2, TOKENS - 1])])
    upper = law.cumsum(0)[tokens]
    lower = upper - law[tokens]
    logits = law.log().expand(len(tokens), -1)
    assert torch.equal(categorical(logits, lower + 1e-12), tokens)
    assert torch.equal(categorical(logits, upper - 1e-12), tokens)


def test_categorical_small_law_by_chi_square() -> None:
    law = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.0499, 0.0001], dtype=torch.float64)
    drawn = categorical(law.log().expand(200_000, -1), torch.rand(200_000, generator=seeded(2), dtype=torch.float64))
    assert chi_square_z(torch.bincount(drawn, minlength=6), law) < 4.5


def interval_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """P(token) by the inversion itself, for each row its token: bisection finds the first u that draws it, and the last."""
    ends = []
    for end in (tokens, tokens + 1):
        low, high = torch.zeros(len(tokens), dtype=torch.float64), torch.ones(len(tokens), dtype=torch.float64)
        for _ in range(53):
            middle = (low + high) / 2
            is_below = categorical(logits, middle) < end
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        ends.append(high)
    return ends[1] - ends[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_states", [200, 6001])
def test_law_of_the_inversion_in_single_precision(num_states: int, dtype: torch.dtype) -> None:
    """Each token's probability, to 4e-6 of itself, that of these logits in float64: also of tokens with p = 1e-9."""
    logits = (torch.randn(num_states, generator=seeded(), dtype=torch.float64) * 4).to(dtype)
    logits[7] = -math.inf
    law = logits.double().softmax(0)
    rare = law.argsort()[[5, 20, num_states // 4, num_states // 2, -3, -2, -1]]
    tokens = torch.cat([rare, torch.arange(120, 136), torch.tensor([0, num_states - 2, num_states - 1])])
    found = interval_of(logits.expand(len(tokens), -1), tokens)
    assert law[tokens].min() < 1e-6
    # 2^-50: u itself has steps of 2^-53, and bisection ends within one of them
    assert ((found - law[tokens]).abs() <= 4e-6 * law[tokens] + 2.0**-50).all()


def test_law_of_the_inversion_in_double_precision() -> None:
    logits = torch.randn(3000, generator=seeded(), dtype=torch.float64) * 4
    tokens = torch.tensor([0, 127, 128, 1500, 2815, 2816, 2943, 2944, 2999])
    found = interval_of(logits.expand(len(tokens), -1), tokens)
    assert (found - logits.softmax(0)[tokens]).abs().max() < 1e-14


# Categorical: the edges


def test_probability_0_is_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.3, -math.inf, -2.0, -math.inf, -math.inf])
    u = torch.rand(1000, dtype=torch.float64, generator=seeded())
    u[:2] = torch.tensor([0.0, LAST_U], dtype=torch.float64)
    drawn = categorical(logits.expand(len(u), -1), u)
    assert set(drawn.tolist()) == {1, 3}
    assert drawn[0] == 1
    assert drawn[1] == 3
    one = torch.full((len(u), 5), -math.inf)
    one[:, 2] = -700.0  # the only finite entry, whatever its size
    assert (categorical(one, u) == 2).all()


@quick
@given(seed=st.integers(0, 2**31), num_states=st.integers(1, 300), scale=st.floats(0.01, 300))
def test_the_ends_of_u_stay_inside(seed: int, num_states: int, scale: float) -> None:
    logits = torch.randn(20, num_states, generator=seeded(seed), dtype=torch.float64) * scale
    for u in (0.0, LAST_U):
        drawn = categorical(logits, torch.full((20,), u, dtype=torch.float64))
        weight = (logits - logits.amax(1, keepdim=True)).exp().gather(1, drawn[:, None])
        assert (weight > 0).all()  # also: no index beyond the last


def test_rounding_does_not_lead_out_of_a_block() -> None:
    """The first block holds a little more than 1/4 of the law, so that the last u and the end of the second block are rounded
    to the same distance from its beginning: what is drawn is the one token there is in it."""
    weights = torch.zeros(1, 256, dtype=torch.float64)
    weights[0, 0], weights[0, 128] = 1 / 4 + 3 * 2.0**-54, 3 / 4 - 2.0**-53
    token, total = invert(weights, torch.tensor([LAST_U], dtype=torch.float64))
    assert token.tolist() == [128]
    assert total.tolist() == [1.0]


def test_logits_need_not_be_normalised() -> None:
    logits, u = torch.randn(100, 30, generator=seeded(), dtype=torch.float64), torch.rand(100, dtype=torch.float64)
    assert torch.equal(categorical(logits, u), categorical(logits + 800.0, u))
    assert torch.equal(categorical(logits.float(), u), categorical(logits.float().double(), u))


def test_bad_logits_are_refused() -> None:
    u = torch.zeros(3, dtype=torch.float64)
    for bad in (math.nan, math.inf):
        logits = torch.zeros(3, 4)
        logits[1, 2] = bad
        with pytest.raises(
            ValueError, match=r"`model_output` has NaN, \+inf or no finite entry in 1 of 3 rows.*; where float16"
        ):
            categorical(logits, u)
    nothing = torch.zeros(3, 4)
    nothing[0] = -math.inf
    with pytest.raises(ValueError, match="no finite entry in 1 of 3 rows"):
        categorical(nothing, u)
    law = torch.full((2, 3, 4), 0.25)
    law[1, 0] = math.nan
    for draw in ("exact", "one_stage_float32", "one_stage_1e-6"):
        with pytest.raises(ValueError, match="in 1 of 6 rows"):
            draw_states(law, None, draw)


def test_a_wide_row_ends_where_it_ends() -> None:
    """Wide rows go by blocks: states of weight 0 at both ends, and a last block that is not whole."""
    for width in (4 * 128, 4 * 128 + 1, 700):
        logits = torch.full((4, width), -math.inf)
        logits[0, [0, 5]] = 0.0
        logits[1, width - 1] = -60.0
        logits[2, [127, 128, width - 1]] = torch.tensor(
            [0.0, 0.0, -100.0]
        )  # 4e-44, which float32 has no normal number for
        logits[3, 300] = 1e4
        first, last = (categorical(logits, torch.full((4,), u, dtype=torch.float64)).tolist() for u in (0.0, LAST_U))
        assert first == [0, width - 1, 127, 300]
        assert last[:2] == [5, width - 1]
        assert last[2] in (128, width - 1)
        assert last[3] == 300
        for bad in (math.nan, math.inf):
            broken = logits.clone()
            broken[2, 600 if width > 600 else 400] = bad
            with pytest.raises(ValueError, match="in 1 of 4 rows"):
                categorical(broken, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("width", [9, 600])
def test_rows_are_the_same_wherever_they_stand(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by themselves, among all logits (with strides of any kind), a few at a time, and one for every position."""
    logits, generator = torch.randn(3, 7, width, generator=seeded()), seeded(1)
    positions = torch.rand(3, 7, generator=generator) < 0.6
    tokens = torch.arange(21).view(3, 7)
    rows = RowLogits(logits[positions], positions)
    expected = draw_tokens(rows, seeded(2))
    put = tokens.masked_scatter(positions, expected)
    strided = torch.randn(7, 3, width).copy_(logits.transpose(0, 1)).transpose(0, 1)
    for size in (2**19, 2 * width):
        monkeypatch.setattr(sampling, "CPU_CHUNK", size)
        for dense in (logits, strided):
            among = RowLogits.chosen(dense, positions)
            assert torch.equal(among.logits, logits[positions])
            assert among.source.data_ptr() == dense.data_ptr()  # no copy of all
            assert len(among) == int(positions.sum())
            assert torch.equal(among.pick(tokens), tokens[positions])
            assert torch.equal(draw_tokens(among, seeded(2)), expected)
            for shaped in (
                lambda some, _: some,
                lambda some, part: some.add_(part.start),
            ):  # may overwrite what it gets
                assert torch.equal(draw_tokens(among, seeded(2), shaped), expected)
                assert torch.equal(draw_tokens(rows, seeded(2), shaped), expected)
            assert torch.equal(rows.logits, logits[positions])
            fewer = positions & (tokens % 2 == 0)
            for part in (among.among(fewer), rows.among(fewer), among.among(positions).among(fewer)):
                assert torch.equal(part.logits, logits[fewer])
                assert torch.equal(part.put(draw_tokens(part, seeded(2)), tokens), torch.where(fewer, put, tokens))
            with monkeypatch.context() as patch:
                patch.setattr(sampling, "needs_fixed_shapes", lambda _: True)
                fixed = RowLogits.chosen(dense, positions)
            assert fixed.is_fixed
            assert torch.equal(fixed.put(draw_tokens(fixed, seeded(2)), tokens), put)


PLACES = {"at once": (2**19, True), "a few rows": (6, True), "a few wide rows": (6, True), "device": (6, False)}


def work(place: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, or a few at a time by small blocks, also as those of a large vocabulary, and where values cannot be
    looked at."""
    rows, is_on_host = PLACES[place]
    for name in ("BLOCK", "WIDE_BLOCK"):
        monkeypatch.setattr(sampling, name, 128 if place == "at once" else 4)
    monkeypatch.setattr(sampling, "WIDE", 0 if "wide" in place else 2**14)
    monkeypatch.setattr(sampling, "CPU_CHUNK", rows * width)
    monkeypatch.setattr(sampling, "on_host", lambda _: is_on_host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_certain_has_no_entropy(dtype: torch.dtype) -> None:
    """Wherever its logit lies, and by whatever way the logarithm is rounded."""
    logits = torch.full((401, 5), -math.inf, dtype=dtype)
    logits[:, 1] = torch.linspace(-100, 100, 401)
    found = weigh(RowLogits(logits, torch.ones(1, 401, dtype=torch.bool)), 1 / 0.7, with_entropy=True)
    assert torch.equal(found.entropy(), torch.zeros(401, dtype=torch.float64))
    assert torch.equal(found.probability(torch.ones(401, dtype=torch.int64)), torch.ones(401, dtype=torch.float64))


@pytest.mark.parametrize("without", [2, torch.tensor([0, 4])], ids=["a column", "one of each row"])
def test_what_is_left_out_costs_no_second_look(without: int | Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight 0 times a logarithm of -inf would be mended, in two more passes."""
    seen: list[Tensor] = []
    mean_power = sampling.mean_power

    def noted(powers: Tensor, weights: Tensor) -> Tensor:
        seen.append(powers.clone())
        return mean_power(powers, weights)

    monkeypatch.setattr(sampling, "mean_power", noted)
    rows = RowLogits(torch.randn(2, 5, generator=seeded()), torch.ones(1, 2, dtype=torch.bool))
    weigh(rows, 1.0, without, with_entropy=True)
    assert len(seen) == 1
    assert seen[-1].isfinite().all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 700])
def test_weights_of_rows(width: int, dtype: torch.dtype, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities and entropies of softmax in float64, wherever the logits lie, without a column of each row, and the same
    in a batch as by themselves: a row far from 0 is weighed from its largest logit and changes no other one. To the last bit
    but one: torch's 2^x is rounded otherwise at the end of a tensor."""
    work(place, width, monkeypatch)
    logits = torch.randn(8, width, generator=seeded(), dtype=torch.float64) * 4
    logits += torch.tensor([0.0, 58.0, -58.0, 80.0, -80.0, 2e4, -2e4, 0.0])[:, None]
    logits[7, 1:] = -math.inf  # certain
    logits[:, 2] = -math.inf
    logits, own = logits.to(dtype), torch.tensor([3, 1, 4, 0, 1, 3, 4, 1])
    rows = RowLogits(logits, torch.ones(1, 8, dtype=torch.bool))
    for without in (None, 3, own):
        columns = own if isinstance(without, Tensor) else torch.full((8,), 3)
        kept = logits.double().clone()
        if without is not None:
            kept[torch.arange(8), columns] = -math.inf
        law = ((kept - kept.amax(1, keepdim=True)) / 0.7).softmax(-1)
        found = weigh(rows, 1 / 0.7, without, {"best": lambda w, _: w.amax(-1)}, with_entropy=True)
        error = 1e-13 if dtype == torch.float64 else 4e-6
        rarest = law.masked_fill(law == 0, 1.0).argmin(-1)
        for tokens in (torch.full((8,), 4), own, law.argmax(-1), rarest):
            expected = law.gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(found.probability(tokens), expected, rtol=error, atol=1e-30)
        torch.testing.assert_close(found.entropy(), -torch.xlogy(law, law).sum(-1), rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(found.found["best"] / found.total, law.amax(-1), rtol=error, atol=0)
        assert found.entropy()[7] == 0
        assert replace(found, total=0.999 * found.total).probability(law.argmax(-1))[7] == 1  # as if by rounding
        u, sums = torch.rand(8, generator=seeded(1), dtype=torch.float64), found.sums.clone()
        assert torch.equal(found.draw(u), found.draw(u))
        assert torch.equal(found.sums, sums)
        for row in range(8):
            column = without[row, None] if isinstance(without, Tensor) else without
            one = weigh(RowLogits(logits[row, None], torch.ones(1, 1, dtype=torch.bool)), 1 / 0.7, column)
            last = {"rtol": 4e-16 if dtype == torch.float64 else 4e-7, "atol": 0}
            torch.testing.assert_close(one.sums[0], found.sums[row], **last)
            torch.testing.assert_close(one.probability(own[row, None])[0], found.probability(own)[row], **last)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("width", [4, 300])
def test_tokens_beside_the_own_one(width: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against cumulative sums of the other tokens' probabilities: as they are, sharpened, far from 0, and without any other."""
    work(place, width, monkeypatch)
    logits = torch.randn(15, width, generator=seeded(), dtype=torch.float64) * 3
    logits += torch.tensor([0.0, 500.0, -3000.0])[:, None].repeat(5, 1)
    own, u = torch.arange(15) * 37 % width, torch.rand(15, generator=seeded(1), dtype=torch.float64)
    logits[7] = torch.full((width,), -math.inf).scatter(0, own[7], 2.0)
    rows = RowLogits(logits, torch.ones(1, 15, dtype=torch.bool))
    scales = 1 + torch.arange(15) / 5  # each row its own
    for shaped, scale in ((None, torch.ones(15)), (lambda some, part: some * scales[part, None], scales)):
        law = (logits * scale[:, None]).softmax(-1)
        others = law.scatter(1, own[:, None], 0.0)
        share = others.sum(1)
        expected = (others.cumsum(1) <= u[:, None] * share[:, None]).sum(1)
        tokens, found = draw_others(rows, u, own, shaped)
        has_others = torch.arange(15) != 7
        assert torch.equal(tokens[has_others], expected[has_others])
        assert 0 <= tokens[7] < width
        torch.testing.assert_close(found, share, rtol=1e-12, atol=0)
        assert found[7] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wide", [0, 1000])
@pytest.mark.parametrize("factor", [None, 1.0, 1.7])
def test_rows_come_a_few_at_a_time(
    factor: float | None, wide: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the size has room for, and one at least, from wherever they stand, times a factor that is not rounded to the
    precision of logits in half precision; those that lie together are read together."""
    monkeypatch.setattr(sampling, "WIDE", wide)
    logits = torch.randn(2, 8, 4, generator=seeded()).to(dtype)
    where = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 0, 0, 0]]).bool()
    every = RowLogits.chosen(logits, where)
    across = RowLogits.chosen(logits.transpose(0, 1).contiguous().transpose(0, 1), where)
    given = RowLogits(logits[where], where)
    for rows, number in ((every, 9), (across, 9), (given, 9), (every.some(torch.tensor([7, 2, 3, 8])), 4)):
        expected = rows.logits if factor is None else rows.logits.to(torch.promote_types(dtype, torch.float32)) * factor
        for size in (8, 15, 1, 1000):
            each = max(size // 4, 1)
            parts = [(part, some.clone()) for part, some in rows.chunks(size, factor)]
            assert [len(some) for _, some in parts] == [min(each, number - k) for k in range(0, number, each)]
            assert all(torch.equal(some, expected[part]) for part, some in parts)
    assert torch.equal(given.source, logits[where])  # what is given is not written to


def test_runs() -> None:
    assert runs([3, 4, 5, 9, 10, 2, 3, 3]) == [(3, 3), (9, 2), (2, 2), (3, 1)]
    assert runs([]) == []


def test_no_rows_draw_nothing() -> None:
    rows = RowLogits(torch.empty(0, 5), torch.zeros(2, 3, dtype=torch.bool))
    assert draw_tokens(rows, seeded()).shape == (0,)
    nothing = uniforms((0, 3), [], "cpu", torch.float32)
    assert (nothing.shape, nothing.dtype) == ((0, 3), torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_draws_do_not_depend_on_what_else_is_drawn(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniforms are drawn for the whole sheet: a position gets the same token with few or many others."""
    work(place, 9, monkeypatch)
    logits = torch.randn(4, 6, 9, generator=seeded())
    everywhere, somewhere = torch.ones(4, 6, dtype=torch.bool), torch.rand(4, 6, generator=seeded(1)) < 0.3
    dense = draw_tokens(RowLogits(logits[everywhere], everywhere), seeded(2)).view(4, 6)
    sparse = draw_tokens(RowLogits(logits[somewhere], somewhere), seeded(2))
    assert torch.equal(dense[somewhere], sparse)
    assert torch.equal(dense, draw_states(logits.softmax(-1), seeded(2)))


def test_laws_in_half_precision_are_summed_in_float64() -> None:
    law = torch.rand(40, 100, 300, generator=seeded()).bfloat16()
    assert torch.equal(draw_states(law, seeded(2)), draw_states(law.double(), seeded(2)))


# The published one-stage races


def race_law(weights: Tensor, offset: float, grid: float = GRID) -> Tensor:
    """P(state v wins argmin E_v / w_v) for E = offset + j * grid with P(j) = grid, j = 1, 2, ... where it matters (E << 1).

    v wins at the j-th grid point if nobody finishes before (offset + j grid) / w_v. Everybody together finishes at a rate
    Lambda, nearly 1, that makes the sum 1:  P(v) = sum_j grid exp(-Lambda (offset + j grid) / w_v). With offset 0 and
    Lambda 1 this is w_v x / (e^x - 1), x = grid / w_v.
    """
    total = 1.0
    for _ in range(20):
        wins = grid * torch.exp(-total * offset / weights) / torch.expm1(total * grid / weights)
        total *= float(wins.sum())
    return wins


def one_stage_weights(law: Tensor, steps_left: int) -> Tensor:
    """A step's law when it should open 1 of n masks: tokens law / n, then the mask."""
    return torch.cat([law / steps_left, torch.tensor([1 - 1 / steps_left], dtype=torch.float64)])


@pytest.mark.parametrize(
    ("exponent", "offset", "steps_left", "drawn_entropy", "realised"),
    [
        (1.0, 0.0, 16, 7.46, 0.98),
        (1.0, 0.0, 128, 6.84, 0.87),
        (1.0, 0.0, 1024, 5.63, 0.69),
        (1.0, 1e-6, 16, 6.09, 0.77),
        (1.0, 1e-6, 128, 4.84, 0.57),
        (1.0, 1e-6, 1024, 3.55, 0.39),
        (1.3, 0.0, 16, 4.32, 0.98),
        (1.3, 0.0, 128, 4.03, 0.95),
        (1.3, 0.0, 1024, 3.64, 0.90),
        (1.3, 1e-6, 16, 3.79, 0.93),
        (1.3, 1e-6, 128, 3.33, 0.85),
        (1.3, 1e-6, 1024, 2.72, 0.74),
        (1.6, 0.0, 16, 2.64, 1.00),
        (1.6, 0.0, 128, 2.56, 0.99),
        (1.6, 0.0, 1024, 2.43, 0.97),
        (1.6, 1e-6, 16, 2.49, 0.98),
        (1.6, 1e-6, 128, 2.30, 0.95),
        (1.6, 1e-6, 1024, 2.00, 0.89),
    ],
)
def test_one_stage_losses_over_a_large_vocabulary(
    exponent: float, offset: float, steps_left: int, drawn_entropy: float, realised: float
) -> None:
    """Entropy of the drawn token, and how much of the intended unmasking happens, for GPT-2's vocabulary."""
    wins = race_law(one_stage_weights(zipf(exponent), steps_left), offset)
    assert float(wins.sum()) == pytest.approx(1, abs=1e-9)
    tokens = wins[:-1]
    assert entropy(tokens / tokens.sum()) == pytest.approx(drawn_entropy, abs=0.01)
    assert float(tokens.sum()) * steps_left == pytest.approx(realised, abs=0.01)


def test_race_law_is_exact_for_two_states() -> None:
    """Summed over the whole grid of both uniforms, without the formula's approximations."""
    for weight, offset in [(1e-7, 0.0), (3e-6, 0.0), (5e-7, 1e-6), (3e-6, 1e-6)]:
        e = offset + torch.arange(1, 400_000, dtype=torch.float64) * GRID  # E of the rare state
        late = torch.exp(-((1 - weight) * e / weight - offset).clamp(min=0))  # P(the other's E is larger)
        exact = float((GRID * late).sum())
        weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
        assert float(race_law(weights, offset)[0]) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("draw", "offset", "weight"),
    [
        ("one_stage_float32", 0.0, 0.3 * GRID),
        ("one_stage_float32", 0.0, GRID),
        ("one_stage_float32", 0.0, 3 * GRID),
        ("one_stage_1e-6", 1e-6, 5e-7),
        ("one_stage_1e-6", 1e-6, 1e-6),
        ("one_stage_1e-6", 1e-6, 2e-6),
    ],
)
def test_one_stage_loses_rare_states_as_computed(draw: str, offset: float, weight: float) -> None:
    """A rare state can only win with one of the last 1024 uniforms below 1. These are drawn alone and weighted by 2^-14."""
    num_draws, last = 400_000, 1024
    generator = seeded(3)
    noise = torch.rand(num_draws, 2, generator=generator)
    noise[:, 0] = 1 - torch.randint(1, last + 1, (num_draws,), generator=generator) * GRID
    law = torch.tensor([weight, 1 - weight], dtype=torch.float64).expand(num_draws, 2)
    wins = int((one_stage(law, noise, draw) == 0).sum())
    expected = float(race_law(law[0], offset)[0]) / (last * GRID)  # P(win | one of the last 1024)
    assert abs(wins - num_draws * expected) < 4.5 * math.sqrt(num_draws * expected * (1 - expected)) + 1e-3 * wins
    intended = weight / (last * GRID)
    assert wins < num_draws * intended - 4.5 * math.sqrt(num_draws * intended)  # and it is a loss


def test_one_stage_loses_half_the_tokens_of_a_flat_law() -> None:
    """The whole race, 50,257 equally likely tokens with 16 steps left: 45 % of the unmasking happens."""
    weights = one_stage_weights(torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64), 16)
    generator, num_draws, opened = seeded(4), 1600, 0
    for _ in range(num_draws // 100):
        law = weights.expand(1, 100, -1)
        opened += int((draw_states(law, generator, "one_stage_1e-6") < TOKENS).sum())
    expected = 1 - float(race_law(weights, 1e-6)[-1])
    assert expected * 16 == pytest.approx(0.45, abs=0.02)
    assert abs(norm.isf(binom.sf(opened - 1, num_draws, expected))) < 4.5
    assert norm.isf(binom.cdf(opened, num_draws, 1 / 16)) > 4.5


@pytest.mark.parametrize("draw", ["one_stage_float32", "one_stage_1e-6"])
def test_one_stage_is_fine_for_common_states(draw: str) -> None:
    law = torch.tensor([0.05, 0.6, 0.0, 0.35], dtype=torch.float64)
    drawn = draw_states(law.expand(300, 300, 4), seeded(5), draw)
    assert chi_square_z(torch.bincount(drawn.flatten(), minlength=4), law) < 4.5


@pytest.mark.parametrize("draw", ["one_stage_float32", "one_stage_1e-6"])
def test_one_stage_keeps_a_certain_state_at_the_ends_of_u(draw: str) -> None:
    law = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(2, 3)
    noise = torch.tensor([[0.5, 0.5, 0.0], [1 - GRID, 1 - GRID, 1 - GRID]])
    assert one_stage(law, noise, draw).tolist() == [2, 2]


# Subsets


def test_bernoulli_subset_has_its_rates_and_is_independent() -> None:
    is_eligible = torch.tensor([True, True, False, True]).expand(20_000, 4)
    rate = torch.tensor([0.2, 0.9, 0.5, 0.0], dtype=torch.float64)
    chosen = bernoulli_subset(is_eligible, rate, seeded(6))
    assert not chosen[:, 2:].any()
    code = chosen[:, 0] * 2 + chosen[:, 1]
    law = torch.tensor([0.8 * 0.1, 0.8 * 0.9, 0.2 * 0.1, 0.2 * 0.9], dtype=torch.float64)
    assert chi_square_z(torch.bincount(code.long(), minlength=4), law) < 4.5
    assert torch.equal(bernoulli_subset(is_eligible, 1.0, seeded()), is_eligible)
    assert not bernoulli_subset(is_eligible, 0.0, seeded()).any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_uniform_subset_takes_every_subset_equally_often(count: int) -> None:
    eligible = [0, 2, 3, 4, 6]
    is_eligible = torch.zeros(6000, 7, dtype=torch.bool)
    is_eligible[:, eligible] = True
    chosen = uniform_subset(is_eligible, torch.full((6000,), count), seeded(7))
    allowed = [frozenset(subset) for subset in itertools.combinations(eligible, count)]
    counts = subset_counts(chosen, allowed)
    assert chi_square_z(counts, torch.full((len(allowed),), 1 / len(allowed), dtype=torch.float64)) < 4.5


@quick
@given(data=st.data(), seed=st.integers(0, 2**31), spread=st.booleans())
def test_subsets_have_exactly_the_count(data: st.DataObject, seed: int, spread: bool) -> None:
    length = data.draw(st.integers(1, 17))
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4))
    is_eligible = torch.tensor(rows)
    count = torch.tensor([data.draw(st.integers(0, sum(row))) for row in rows])
    chosen = (spread_subset if spread else uniform_subset)(is_eligible, count, seeded(seed))
    assert torch.equal(chosen.sum(1), count)
    assert not (chosen & ~is_eligible).any()


def test_top_subset_takes_the_highest_scores_and_the_left_ones_first() -> None:
    is_eligible = torch.tensor([[True, True, False, True, True], [True, True, True, True, True]])
    score = torch.tensor([[1.0, 5.0, 9.0, 5.0, 5.0], [-3.0, -1.0, -2.0, -1.0, -9.0]])
    chosen = top_subset(is_eligible, torch.tensor([2, 3]), score)
    assert chosen.int().tolist() == [[0, 1, 0, 1, 0], [0, 1, 1, 1, 0]]
    assert not top_subset(is_eligible, torch.tensor([0, 0]), score).any()


@pytest.mark.parametrize("count", [[-1, 0], [0, 4]])
def test_impossible_counts_are_refused(count: list[int]) -> None:
    is_eligible = torch.tensor([[True, True, True, False]] * 2)
    for subset in (uniform_subset, spread_subset):
        with pytest.raises(ValueError, match=r"`count` is .*, allowed are 0 to \[3, 3\]"):
            subset(is_eligible, torch.tensor(count), seeded())


# The spread order


def test_spread_of_a_power_of_two_is_even() -> None:
    is_eligible = torch.ones(8, 64, dtype=torch.bool)
    for count in (1, 2, 4, 8, 16, 32, 64):
        chosen = spread_subset(is_eligible, torch.full((8,), count), seeded(8))
        for row in chosen:
            place = row.nonzero().flatten()
            gaps = torch.diff(torch.cat([place, place[:1] + 64]))
            assert (gaps == 64 // count).all()


@pytest.mark.parametrize(("length", "grid_shape"), [(7, None), (8, None), (12, (3, 4))])
def test_spread_takes_every_position_at_every_rank(length: int, grid_shape: tuple[int, int] | None) -> None:
    """The pick of rank k is what k + 1 picks have and k picks do not, with the same noise."""
    num_rows = 3000
    is_eligible = torch.ones(num_rows, length, dtype=torch.bool)
    before = torch.zeros_like(is_eligible)
    flat = torch.full((length,), 1 / length, dtype=torch.float64)
    for rank in range(length):
        chosen = spread_subset(is_eligible, torch.full((num_rows,), rank + 1), seeded(9), grid_shape)
        picked = chosen & ~before
        assert (picked.sum(1) == 1).all()
        assert chi_square_z(picked.sum(0), flat) < 4.5
        before = chosen


@pytest.mark.parametrize(
    ("eligible", "count", "grid_shape"),
    [
        ([0, 1, 2, 4, 5, 6], 2, (1, 8)),
        ([0, 1, 2, 3, 4, 5], 3, (1, 6)),
        ([1, 2, 3, 4, 5, 7], 3, (2, 4)),
        ([0, 1, 2, 3, 5, 6, 8], 2, (3, 3)),
        ([0, 1, 3, 7, 8, 9], 3, (5, 2)),
    ],
)
def test_spread_subset_is_farthest_point_sampling(eligible: list[int], count: int, grid_shape: tuple[int, int]) -> None:
    """Against the law by going through all orders that can break the ties."""
    length, num_rows = grid_shape[0] * grid_shape[1], 4000
    is_eligible = torch.zeros(num_rows, length, dtype=torch.bool)
    is_eligible[:, eligible] = True
    law = spread_subset_law(eligible, count, grid_shape)
    shape = None if grid_shape[0] == 1 else grid_shape
    chosen = spread_subset(is_eligible, torch.full((num_rows,), count), seeded(10), shape)
    assert chi_square_z(subset_counts(chosen, list(law)), torch.tensor(list(law.values()), dtype=torch.float64)) < 4.5


def test_spread_on_a_square_goes_to_the_middle_of_the_torus() -> None:
    is_eligible = torch.ones(5, 16, dtype=torch.bool)
    is_eligible[:, 0] = False
    chosen = spread_subset(is_eligible, torch.ones(5, dtype=torch.int64), seeded(11), (4, 4))
    assert chosen.nonzero()[:, 1].tolist() == [10] * 5  # row 2, column 2


def test_spread_grid_must_hold_the_sample() -> None:
    with pytest.raises(ValueError, match=r"`grid_shape` \(3, 4\) has 12 cells, but the sample has 10"):
        spread_subset(torch.ones(1, 10, dtype=torch.bool), torch.tensor([1]), seeded(), (3, 4))


@pytest.mark.parametrize("grid_shape", [(1, 9), (4, 5), (16, 2), (2, 13), (12, 1), (1, 1)])
def test_distances_are_those_of_brute_force(grid_shape: tuple[int, int]) -> None:
    height, width = grid_shape
    is_source = torch.rand(40, height * width, generator=seeded(12)) < 1.5 / (height * width)
    distance = torus_distance(is_source.view(40, height, width)).view(40, -1)
    for row in range(40):
        sources = is_source[row].nonzero().flatten().tolist()
        if not sources:
            assert (distance[row] == distance[row, 0]).all()
            assert distance[row, 0] >= (height // 2) ** 2 + (width // 2) ** 2
            continue
        nearest = [min(torus_gap(i, j, grid_shape) for j in sources) for i in range(height * width)]
        assert distance[row].tolist() == nearest


@quick
@given(rows=st.lists(st.booleans(), min_size=1, max_size=20))
def test_nearest_on_ring_is_brute_force(rows: list[bool]) -> None:
    size = len(rows)
    sources = [j for j in range(size) if rows[j]]
    expected = [min((min((i - j) % size, (j - i) % size) for j in sources), default=2 * size) for i in range(size)]
    assert nearest_on_ring(torch.tensor([rows])).tolist() == [expected]


# One generator per row


def test_a_row_does_not_depend_on_its_batch() -> None:
    def generators(rows: list[int]) -> list[torch.Generator]:
        return [seeded(100 + row) for row in rows]

    is_eligible = torch.rand(4, 12, generator=seeded(13)) < 0.7
    count = is_eligible.sum(1) // 2
    logits = torch.randn(4, 12, 5, generator=seeded(14))
    draws = {
        "bernoulli": lambda rows: bernoulli_subset(is_eligible[rows], 0.4, generators(rows)),
        "uniform": lambda rows: uniform_subset(is_eligible[rows], count[rows], generators(rows)),
        "spread": lambda rows: spread_subset(is_eligible[rows], count[rows], generators(rows)),
        "states": lambda rows: draw_states(logits[rows].softmax(-1), generators(rows)),
        "race": lambda rows: draw_states(logits[rows].softmax(-1), generators(rows), "one_stage_float32"),
    }
    for name, draw in draws.items():
        together = draw([0, 1, 2, 3])
        for row in range(4):
            assert torch.equal(draw([row])[0], together[row]), name
        assert torch.equal(draw([3, 1])[1], together[1]), name
