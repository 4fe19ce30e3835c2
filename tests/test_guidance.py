"""Classifier-free guidance: the guided law on an enumerable joint, rows against dense logits, calls, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import LENGTH, MASK, WORDS, seeded, tiny_model, tiny_pipeline
from torch import Tensor, nn

from discrete_schedulers import GuidedDenoiser, NetworkDenoiser, RowLogits, guidance_schedule
from discrete_schedulers.blocks import BlockCache
from discrete_schedulers.processes import AbsorbingProcess, UniformProcess

K, L = 3, 3  # tokens and positions of the enumerated joint; the mask is K
CLASSES = 2
ANY = CLASSES  # the label of the unconditional branch
INF = math.inf


class Joint:
    """A random joint of K^L sequences and a class, under a process with survival alpha: every law by enumeration."""

    def __init__(self, process: str, alpha: float) -> None:
        self.width = K + (process == "absorbing")
        joint = torch.rand(CLASSES, K, K, K, generator=seeded(3), dtype=torch.float64) ** 3
        self.joint = joint / joint.sum()
        self.noise = torch.zeros(K, self.width, dtype=torch.float64)  # q(x_t | x_0) of one token
        self.noise[:, :K] = alpha * torch.eye(K, dtype=torch.float64)
        if process == "absorbing":
            self.noise[:, K] = 1 - alpha
        else:
            self.noise += (1 - alpha) / K

    def with_token(self, x_t: Tensor, leave_out: bool = False) -> Tensor:
        """p(y, x_0^i = v, x_t), or with x_t but its position i, (B, L, classes, width)."""
        laws = torch.zeros(len(x_t), L, CLASSES, self.width, dtype=torch.float64)
        for b, row in enumerate(x_t.tolist()):
            for i in range(L):
                weights = [
                    self.noise[:, row[j]] if j != i or not leave_out else torch.ones(K).double() for j in range(L)
                ]
                weighted = torch.einsum("yabc,a,b,c->yabc", self.joint, *weights)
                laws[b, i, :, :K] = weighted.sum([1 + j for j in range(L) if j != i])
        return laws

    def network(self, parametrization: str) -> nn.Module:
        """Exact logits for rows with a class label, up to a constant."""

        def law(x: Tensor, class_labels: Tensor) -> Tensor:
            laws = self.with_token(x, parametrization == "leave_one_out")  # (B, L, classes, width)
            laws = torch.cat([laws, laws.sum(2, keepdim=True)], 2)
            chosen = laws[torch.arange(len(x)), :, class_labels]  # (B, L, width)
            return (chosen / chosen.sum(-1, keepdim=True)).log() + 1.5

        return Network(law)


class Network(nn.Module):
    """Returns what `law` says; notes the calls."""

    def __init__(self, law: Callable) -> None:
        super().__init__()
        self.law, self.calls = law, []

    def forward(self, *arguments: Any, **conditions: Any) -> Any:
        self.calls.append((arguments, conditions))
        return self.law(*arguments, **conditions)


def all_states(width: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(width)] * L)


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def guided(network: nn.Module, scale: Any, labels: Tensor, **facts: Any) -> GuidedDenoiser:
    denoiser = NetworkDenoiser(network, **facts)
    return GuidedDenoiser(denoiser, scale, {"class_labels": labels}, {"class_labels": torch.full_like(labels, ANY)})


def facts_of(process: str, parametrization: str = "x0") -> dict:
    if process == "absorbing":
        return {"vocab_size": K + 1, "mask_token_id": K}
    return {"vocab_size": K, "process": "uniform", "parametrization": parametrization}


T = 0.4
ALPHA = 1 - (1 - 1e-3) * T  # loglinear


# The law


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, -1.0])
@pytest.mark.parametrize(
    ("process", "parametrization"), [("absorbing", "x0"), ("uniform", "x0"), ("uniform", "leave_one_out")]
)
def test_guided_law_trusts_the_classifier_s_times(process: str, parametrization: str, scale: float) -> None:
    """p(x_0^i = v | x_t) p(y | x_0^i = v, x_t)^s, both by enumeration."""
    joint = Joint(process, ALPHA)
    x_t, label = all_states(joint.width), 1
    weights = joint.with_token(x_t)
    prior = weights.sum(2)  # (B, L, width)
    classifier = weights[:, :, label, :K] / prior[..., :K]
    expected = normalised(prior[..., :K] * classifier**scale)
    labels = torch.full((len(x_t),), label)
    denoiser = guided(joint.network(parametrization), scale, labels, **facts_of(process, parametrization))
    found = denoiser(x_t, T).softmax(-1)[..., :K]
    read = (x_t == K) if process == "absorbing" else torch.ones_like(x_t, dtype=torch.bool)
    torch.testing.assert_close(found[read], expected[read], rtol=0, atol=1e-12)
    rows = denoiser(x_t, T, read).logits.softmax(-1)[..., :K]
    torch.testing.assert_close(rows, expected[read], rtol=0, atol=1e-12)


def d_cfg(process: Any, joint: Joint, x_t: Tensor, label: int, scale: float, s: float) -> Tensor:
    """Schiff et al. 2024: the law of x_s itself is guided, (B, L, width)."""
    weights = joint.with_token(x_t)
    conditional, unconditional = normalised(weights[:, :, label]), normalised(weights.sum(2))
    c, u = (process.posterior(x_t, law, T, s) for law in (conditional, unconditional))
    return normalised(torch.where(c > 0, c**scale * u ** (1 - scale), 0.0))


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_what_guiding_the_law_of_x_s_does_instead(name: str) -> None:
    """The docstring's comparison: equal in a step to time 0, and for the token of a mask that opens; else not."""
    process = AbsorbingProcess(K + 1, K) if name == "absorbing" else UniformProcess(K)
    joint, scale, label = Joint(name, ALPHA), 3.0, 1
    x_t = torch.full((1, L), K) if name == "absorbing" else all_states(K)
    labels = torch.full((len(x_t),), label)
    p_0 = guided(joint.network("x0"), scale, labels, **facts_of(name))(x_t, T).softmax(-1)
    torch.testing.assert_close(d_cfg(process, joint, x_t, label, scale, 0.0), p_0, rtol=0, atol=1e-12)
    ours, theirs = process.posterior(x_t, p_0, T, 0.3), d_cfg(process, joint, x_t, label, scale, 0.3)
    if name == "absorbing":
        torch.testing.assert_close(normalised(ours[..., :K]), normalised(theirs[..., :K]), rtol=0, atol=1e-12)
        assert (theirs[..., K] < ours[..., K] - 1e-3).all()  # Hoelder: the sum is above 1 for s > 1, so more masks open
    else:  # taken by the likelihood q(x_t | x_s): the noised laws
        alpha_t, alpha_s = process.alpha(T), process.alpha(0.3)
        own = torch.nn.functional.one_hot(x_t, K)
        likelihood = alpha_t / alpha_s * own + (1 - alpha_t / alpha_s) / K
        least = (1 - alpha_s) / K
        assert (normalised(ours / likelihood) > least - 1e-12).all()
        assert (normalised(theirs / likelihood) < 0.5 * least).any()


def test_by_hand() -> None:
    """c = (0, 2), u = (1, 1), s = 2: u + 2 (c - u) = (-1, 3)."""
    network = Network(lambda x, class_labels: torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]]])[class_labels // ANY])
    logits = guided(network, 2, torch.tensor([0]), vocab_size=2, process="uniform")(torch.tensor([[0]]), 0.5)
    assert logits.tolist() == [[[-1.0, 3.0]]]


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_ids_that_the_network_rules_out(scale: float) -> None:
    """A network that returns -inf itself gives no NaN; what the conditional branch rules out stays so."""
    table = torch.tensor([[[-INF, 0.0, -INF, 1.0]], [[-INF, -INF, 2.0, 1.5]]])
    network = Network(lambda x, class_labels: table[class_labels // ANY])
    logits = guided(network, scale, torch.tensor([0]), vocab_size=4, process="uniform")(torch.tensor([[0]]), 0.5)
    assert logits[0, 0, :3].tolist() == [-INF, 0.0, -INF]
    assert logits[0, 0, 3] == pytest.approx(1.5 - 0.5 * scale)


# Rows, batches, calls


POSITIONS = torch.zeros(4, LENGTH, dtype=torch.bool)
POSITIONS[0, [1, 4, 5]] = True
POSITIONS[2, [0, LENGTH - 1]] = True


def tokens() -> Tensor:
    x_t = torch.randint(0, MASK, (4, LENGTH), generator=seeded(1))
    return x_t.masked_fill(torch.rand(4, LENGTH, generator=seeded(2)) < 0.5, MASK)


SHAPES: list[dict] = [
    {"split_head": True, "suppress_token_ids": (1, 3)},
    {"split_head": False},
    {"split_head": True, "shift": 1},
    {"head": "output_layer.linear", "shift": 1, "shift_first": "copy"},
    {"split_head": False, "shift": 1, "shift_first": "copy"},
    {"split_head": True, "attention": "block_causal", "block_size": 4},
    {"split_head": False, "attention": "block_causal", "block_size": 4, "shift": 1},
    {"split_head": True, "parametrization": "score"},
    {"split_head": True, "revealed_logits": "shadow"},
    {"split_head": False, "process": "uniform", "mask_token_id": None, "parametrization": "leave_one_out"},
]


@torch.no_grad()
@pytest.mark.parametrize("facts", SHAPES, ids=str)
@pytest.mark.parametrize("t", [0.5, torch.tensor([0.1, 0.4, 0.7, 1.0])], ids=["one time", "time per row"])
@pytest.mark.parametrize("scale", [2.5, lambda t: 1 + 3 * t], ids=["constant", "schedule"])
def test_rows_are_the_dense_logits_and_both_those_of_two_calls(facts: dict, t: Any, scale: Any) -> None:
    model, x_t, labels = tiny_model(num_classes=ANY), tokens(), torch.tensor([0, 1, 1, 0])
    facts = {"vocab_size": len(WORDS), "mask_token_id": MASK, "time_input": "sigma"} | facts
    ids = torch.where(torch.rand(4, LENGTH, generator=seeded(5)) < 0.2, 7, -1)
    denoiser = NetworkDenoiser(model, **facts)
    both = GuidedDenoiser(
        denoiser, scale, {"class_labels": labels}, {"class_labels": torch.full((4,), ANY)}, negative_ids=ids
    )
    dense, rows = both(x_t, t), both(x_t, t, POSITIONS)
    assert isinstance(rows, RowLogits)
    shadows = facts.get("revealed_logits") == "shadow"  # which do not see each other: fewer asked for, other estimates
    if not shadows:
        torch.testing.assert_close(rows.logits, dense[POSITIONS], rtol=0, atol=2e-5)
    c = denoiser.raw(x_t, t, class_labels=labels)
    u = denoiser.raw(torch.where(ids < 0, x_t, ids), t, class_labels=torch.full((4,), ANY))
    times = torch.as_tensor(t).expand(4).tolist()
    s = torch.tensor([scale if isinstance(scale, float) else scale(time) for time in times])[:, None, None]
    expected = denoiser.clean_logits(u + s * (c - u), x_t, t)
    torch.testing.assert_close(dense, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_two_calls_where_branches_do_not_fit_in_one() -> None:
    """Conditions of unequal shapes, as embeddings of prompts of unequal lengths, or that only one branch has."""
    seen = []

    def law(x: Tensor, context: Tensor | None = None, flag: bool = False) -> Tensor:
        seen.append((len(x), flag))
        total = 0.0 if context is None else context.sum((1, 2))[:, None, None]
        return torch.arange(5.0).expand(*x.shape, 5) * (1 + total)

    denoiser, x_t = NetworkDenoiser(Network(law), 5, 4), torch.full((2, 3), 4)
    long, short = torch.ones(2, 3, 1), torch.ones(2, 1, 1)
    logits = GuidedDenoiser(denoiser, 2.0, {"context": long}, {"context": short})(x_t, 0.5)
    assert logits[0, 0, :4].tolist() == [0.0, 6.0, 12.0, 18.0]  # 2 + 2 (4 - 2) = 6
    GuidedDenoiser(denoiser, 2.0, {"context": long}, {"flag": True})(x_t, 0.5)
    GuidedDenoiser(denoiser, 2.0, {"flag": False}, {"flag": True})(x_t, 0.5)
    GuidedDenoiser(denoiser, 2.0, {"context": long}, {"context": long * 2})(x_t, 0.5, flag=True)
    assert seen == [(2, False), (2, False), (2, False), (2, True), (2, False), (2, True), (4, True)]


@torch.no_grad()
def test_calls_and_rows_that_run() -> None:
    model, x_t, seen = tiny_model(num_classes=ANY), tokens(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    model.output_layer.linear.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    facts = {"vocab_size": len(WORDS), "mask_token_id": MASK, "time_input": "sigma", "split_head": True}
    labels = torch.tensor([0, 1, 1, 0])
    late = guided(model, lambda t: 2.0 if t < 0.5 else 1.0, labels, **facts)
    assert (late.calls_at(0.4), late.calls_at(0.5), late.calls_at(torch.tensor([0.9, 0.1]))) == (2, 1, 2)
    late(x_t, 0.4, POSITIONS)
    assert seen == [(4, LENGTH), (10, 32)]  # two of four rows, twice; five positions, twice
    seen.clear()
    plain = late(x_t, 0.9, POSITIONS)
    assert seen == [(2, LENGTH), (5, 32)]
    expected = NetworkDenoiser(model, **facts)(x_t, 0.9, POSITIONS, class_labels=labels)
    assert torch.equal(plain.logits, expected.logits)
    seen.clear()
    late(x_t, 0.4, torch.zeros_like(POSITIONS))
    assert seen == []


def test_what_the_pipeline_reads() -> None:
    network = Network(lambda x, **conditions: torch.zeros(*x.shape, 5))
    denoiser = NetworkDenoiser(network, 5, 4)
    assert denoiser.calls_at(0.5) == 1
    both = GuidedDenoiser(denoiser, 1.0, {}, {"flag": True})
    assert (both.vocab_size, both.mask_token_id, both.time_conditioned) == (5, 4, False)
    assert both.calls_at(0.5) == 1
    assert GuidedDenoiser(denoiser, lambda t: t, {}, {"flag": True}).time_conditioned


def test_half_precision_is_combined_in_float32() -> None:
    network = Network(
        lambda x, class_labels: torch.tensor([[[3.0, 1.0]], [[3.015625, 1.0]]])[class_labels // ANY].bfloat16()
    )
    logits = guided(network, 1.25, torch.tensor([0]), vocab_size=2, process="uniform")(torch.tensor([[0]]), 0.5)
    assert logits.dtype == torch.float32
    assert logits[0, 0, 0] == 3.015625 - 1.25 * 0.015625


# Schedules


@pytest.mark.parametrize(
    ("name", "expected"),
    [("constant", [4.0, 4.0, 4.0]), ("linear", [1.0, 3.25, 4.0]), ("cosine", [1.0, 1 + 3 * (1 + 0.5**0.5) / 2, 4.0])],
)
def test_schedules(name: Any, expected: list[float]) -> None:
    scale = guidance_schedule(name, 4.0)
    assert [scale(t) for t in (1.0, 0.25, 0.0)] == pytest.approx(expected)
    if name != "constant":
        assert guidance_schedule(name, 4.0, start=2.0)(1.0) == 2.0


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": math.nan}, "`guidance_scale` is nan; it must be a finite number, or a function of t"),
        ({"negative_conditions": {}}, "pass `negative_conditions` or `negative_ids`"),
        ({"negative_ids": torch.zeros(2, 3)}, r"`negative_ids` is torch.float32 of shape \(2, 3\)"),
        ({"negative_ids": torch.full((2, 3), 5)}, "`negative_ids` has ids from 5 to 5; allowed are -1 to 4"),
    ],
)
def test_facts_that_are_not_allowed(arguments: dict, message: str) -> None:
    facts = {"guidance_scale": 2.0, "negative_conditions": {"flag": True}}
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(NetworkDenoiser(Network(None), 5, 4), **(facts | arguments))


def test_a_cache_is_for_one_branch() -> None:
    facts = {"attention": "block_causal", "block_size": 4, "cache": BlockCache(dict)}
    denoiser = NetworkDenoiser(tiny_model(num_classes=ANY, cond_dim=16), len(WORDS), MASK, **facts)
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="`denoiser` has a cache, which is for one branch"):
        GuidedDenoiser(denoiser, 2.0, {"class_labels": labels}, {"class_labels": labels + ANY})


def test_calls_that_are_not_allowed() -> None:
    denoiser = NetworkDenoiser(Network(None), 5, 4)
    both = GuidedDenoiser(denoiser, 2.0, negative_ids=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`negative_ids` is of shape \(1, 3\), but `x_t` is \(2, 3\)"):
        both(torch.full((2, 3), 4), 0.5)
    both = GuidedDenoiser(denoiser, lambda t: 1 / t if t else INF, {}, {"flag": True})
    with pytest.raises(ValueError, match=r"`guidance_scale` gives \[inf\] at t = 0.0; it must give finite numbers"):
        both(torch.full((2, 3), 4), 0.0)
    with pytest.raises(ValueError, match="`name` is 'square'; allowed: 'constant', 'linear', 'cosine'"):
        guidance_schedule("square", 2.0)


# The pipeline


def test_the_loop_counts_two_calls_for_a_guided_one() -> None:
    pipe, seen = tiny_pipeline(model=tiny_model(num_classes=ANY)), []
    pipe.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    labels = torch.zeros(2, dtype=torch.int64)
    denoiser = GuidedDenoiser(
        pipe.denoiser,
        lambda t: 2.0 if t < 0.6 else 1.0,
        {"class_labels": labels},
        {"class_labels": torch.full_like(labels, ANY)},
    )
    latents = torch.full((2, 8), MASK)
    _, calls = pipe.denoise(denoiser, latents, torch.zeros_like(latents, dtype=torch.bool), 4, seeded())
    assert seen == [2, 2, 4, 4]
    assert calls == 6
    _, calls = pipe.denoise(denoiser, torch.tensor([[MASK], [3]]), torch.tensor([[False], [True]]), 4, seeded())
    assert calls in (1, 2)  # the only token opens once
