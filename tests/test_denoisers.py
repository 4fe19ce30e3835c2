"""NetworkDenoiser against laws that are enumerated, or worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import LENGTH, MASK, WORDS, randomised, seeded, tiny_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

from discrete_schedulers import NetworkDenoiser, RowLogits
from discrete_schedulers.models.checkpoints import HEADS

K, L = 3, 3  # tokens and positions of the enumerated joint; the mask is K
INF = math.inf


class Joint:
    """A random joint of K^L sequences under a process with survival alpha: every law by enumeration."""

    def __init__(self, process: str, alpha: float) -> None:
        self.width = K + (process == "absorbing")
        joint = torch.rand(K, K, K, generator=seeded(3), dtype=torch.float64) ** 2
        self.clean = joint / joint.sum()
        self.noise = torch.zeros(K, self.width, dtype=torch.float64)  # q(x_t | x_0) of one token
        self.noise[:, :K] = alpha * torch.eye(K, dtype=torch.float64)
        if process == "absorbing":
            self.noise[:, K] = 1 - alpha
        else:
            self.noise += (1 - alpha) / K
        self.noisy = torch.einsum("abc,ax,by,cz->xyz", self.clean, self.noise, self.noise, self.noise)

    def posterior(self, x_t: Tensor) -> Tensor:
        """p(x_0^i | x_t), shape (B, L, width), the mask never."""
        return self.given(x_t, range(L))

    def leave_one_out(self, x_t: Tensor) -> Tensor:
        """p(x_0^i | x_t without its position i), shape (B, L, width)."""
        return torch.stack([self.given(x_t, [j for j in range(L) if j != i])[:, i] for i in range(L)], 1)

    def given(self, x_t: Tensor, seen: Any) -> Tensor:
        laws = torch.zeros(len(x_t), L, self.width, dtype=torch.float64)
        for b, row in enumerate(x_t.tolist()):
            weights = [self.noise[:, row[j]] if j in seen else torch.ones(K).double() for j in range(L)]
            weighted = torch.einsum("abc,a,b,c->abc", self.clean, *weights)
            for i in range(L):
                law = weighted.sum([j for j in range(L) if j != i])
                laws[b, i, :K] = law / law.sum()
        return laws

    def score(self, x_t: Tensor) -> Tensor:
        """p_t(x_t with v at i) / p_t(x_t), shape (B, L, width)."""
        ratio = torch.zeros(len(x_t), L, self.width, dtype=torch.float64)
        for b, row in enumerate(x_t.tolist()):
            for i in range(L):
                for v in range(self.width):
                    other = [*row[:i], v, *row[i + 1 :]]
                    ratio[b, i, v] = self.noisy[tuple(other)] / self.noisy[tuple(row)]
        return ratio


def all_states(width: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(width)] * L)


class Network(nn.Module):
    """Returns what `law` says of the tokens; notes the batches that it was called with."""

    def __init__(self, law: Any) -> None:
        super().__init__()
        self.law, self.calls = law, []

    def forward(self, *arguments: Any, **conditions: Any) -> Any:
        self.calls.append((arguments, conditions))
        return self.law(*arguments, **conditions)


def junk_at(x_t: Tensor, log_score: Tensor, junk: float) -> Tensor:
    """Published networks return anything at the token itself, where the score is 1 by definition."""
    return log_score.scatter(-1, x_t[..., None], junk)


LOGLINEAR = 0.25, 1 - (1 - 1e-3) * 0.25  # t and alpha_t
GEOMETRIC = 0.6, math.exp(-(1e-4**0.4) * 20**0.6)


# Conversions


@pytest.mark.parametrize(("schedule", "t", "alpha"), [("loglinear", *LOGLINEAR), ("geometric", *GEOMETRIC)])
def test_absorbing_score_is_the_posterior(schedule: str, t: float, alpha: float) -> None:
    joint, x_t = Joint("absorbing", alpha), all_states(K + 1)
    facts = {"vocab_size": K + 1, "mask_token_id": K, "noise_schedule": schedule}
    network = Network(lambda x: joint.score(x).log() + 2.5)  # SEDD leaves a constant per position to the caller
    denoiser = NetworkDenoiser(network, parametrization="score", **facts)
    masked = x_t == K
    law = joint.posterior(x_t)
    torch.testing.assert_close(denoiser(x_t, t).softmax(-1)[masked], law[masked], rtol=0, atol=1e-12)
    torch.testing.assert_close(denoiser.log_p_0(x_t, t).exp(), law, rtol=0, atol=1e-12)  # carry-over elsewhere
    # and back: the score of a network that returns the law
    exact = NetworkDenoiser(Network(lambda x: joint.posterior(x).log()), **facts)
    log_score = exact.log_score(x_t, t)
    expected = joint.score(x_t).log()
    own = torch.nn.functional.one_hot(x_t, K + 1).bool()
    torch.testing.assert_close(log_score[masked], expected[masked], rtol=0, atol=1e-10)
    assert (log_score[own] == 0).all()
    assert (log_score[~masked][~own[~masked]] == -INF).all()  # a token cannot have been another one
    # whence the law again
    again = NetworkDenoiser(Network(lambda x: log_score), parametrization="score", **facts)
    torch.testing.assert_close(again.log_p_0(x_t, t).exp(), law, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("schedule", "t", "alpha"), [("loglinear", *LOGLINEAR), ("geometric", *GEOMETRIC)])
@pytest.mark.parametrize("parametrization", ["x0", "score", "leave_one_out"])
def test_uniform_parametrizations_are_the_posterior(
    schedule: str, t: float, alpha: float, parametrization: str
) -> None:
    joint, x_t = Joint("uniform", alpha), all_states(K)
    laws = {
        "x0": lambda x: joint.posterior(x).log() + 1.0,
        "score": lambda x: junk_at(x, joint.score(x).log(), 17.0),
        "leave_one_out": lambda x: joint.leave_one_out(x).log() - 3.0,
    }
    denoiser = NetworkDenoiser(
        Network(laws[parametrization]), K, process="uniform", parametrization=parametrization, noise_schedule=schedule
    )
    torch.testing.assert_close(denoiser(x_t, t).softmax(-1), joint.posterior(x_t), rtol=0, atol=1e-12)
    torch.testing.assert_close(denoiser.log_p_0(x_t, t).exp(), joint.posterior(x_t), rtol=0, atol=1e-12)
    torch.testing.assert_close(denoiser.log_score(x_t, t).exp(), joint.score(x_t), rtol=1e-10, atol=1e-12)


def test_one_time_per_row() -> None:
    times, states = torch.tensor([0.2, 0.9]), torch.tensor([[0, 1, 2], [2, 2, 0]])
    joints = [Joint("uniform", 1 - (1 - 1e-3) * float(t)) for t in times]
    leave_one_out = torch.cat([joint.leave_one_out(row[None]) for joint, row in zip(joints, states, strict=True)])
    expected = torch.cat([joint.posterior(row[None]) for joint, row in zip(joints, states, strict=True)])
    network = Network(lambda x: leave_one_out.log())
    denoiser = NetworkDenoiser(network, K, process="uniform", parametrization="leave_one_out")
    torch.testing.assert_close(denoiser(states, times.double()).softmax(-1), expected, rtol=0, atol=1e-7)


def test_leave_one_out_by_hand() -> None:
    """K = 2, loglinear t = 0.5: alpha = 0.5005, the factor of the own token 1 + 2 * 0.5005 / 0.4995 = 3.004004."""
    network = Network(lambda x: torch.tensor([[[0.25, 0.75]]]).log())
    denoiser = NetworkDenoiser(network, 2, process="uniform", parametrization="leave_one_out")
    p_0 = denoiser(torch.tensor([[0]]), 0.5).softmax(-1)[0, 0]
    assert p_0.tolist() == pytest.approx([0.25 * 3.004004 / (0.25 * 3.004004 + 0.75), 0.75 / 1.501001], abs=1e-6)


def test_inexact_score_asks_for_nothing_negative() -> None:
    network = Network(lambda x: torch.tensor([[[0.0, -20.0, 1.0]]]))
    denoiser = NetworkDenoiser(network, 3, process="uniform", parametrization="score")
    p_0 = denoiser(torch.tensor([[0]]), 0.5).softmax(-1)
    assert torch.isfinite(p_0).all()
    assert p_0[0, 0, 1] < 1e-200


# Shape of the logits


def shift_network() -> Network:
    """The logits at position i have their peak at token 10 + i."""
    return Network(lambda x: 9.0 * torch.eye(32)[10 + torch.arange(x.shape[1])].expand(len(x), -1, -1))


@pytest.mark.parametrize("first", ["keep", "copy"])
def test_shift(first: str) -> None:
    denoiser = NetworkDenoiser(shift_network(), 32, 31, shift=1, shift_first=first)
    logits = denoiser(torch.tensor([[31, 5, 31, 31], [7, 31, 31, 2]]), 0.5)
    assert logits[:, 1:].argmax(-1).tolist() == [[10, 11, 12]] * 2  # position i reads the logits at i - 1
    known = [10, 7] if first == "copy" else [10, 10]  # a masked first token has no copy to take
    assert logits[:, 0].argmax(-1).tolist() == known
    assert torch.isfinite(logits[1, 0]).sum() == (1 if first == "copy" else 31)


def test_shift_copy_with_a_mask_that_the_network_has_no_column_for() -> None:
    denoiser = NetworkDenoiser(shift_network(), 33, 32, shift=1, shift_first="copy")
    logits = denoiser(torch.tensor([[32, 32], [4, 32]]), 0.5)
    assert logits.argmax(-1).tolist() == [[10, 10], [4, 10]]


def test_no_shift() -> None:
    logits = NetworkDenoiser(shift_network(), 32, 31)(torch.full((1, 3), 31), 0.5)
    assert logits.argmax(-1).tolist() == [[10, 11, 12]]


@pytest.mark.parametrize("width", [4, 6, 9])
def test_width(width: int) -> None:
    """Columns that the network lacks are impossible, padded ones are cut off; the mask is impossible."""
    raw = torch.arange(2 * 3 * width).reshape(2, 3, width).float()
    denoiser = NetworkDenoiser(Network(lambda x: raw), vocab_size=6, mask_token_id=5)
    logits = denoiser(torch.full((2, 3), 5), 0.5)
    assert logits.shape == (2, 3, 6)
    kept = min(width, 5)
    assert torch.equal(logits[..., :kept], raw[..., :kept])
    assert (logits[..., kept:] == -INF).all()


@pytest.mark.parametrize(
    "facts",
    [
        {"mask_token_id": 2},
        {"process": "uniform"},
        {"process": "uniform", "parametrization": "score"},
        {"process": "uniform", "parametrization": "leave_one_out"},
    ],
    ids=str,
)
def test_suppressed_ids_have_probability_zero(facts: dict) -> None:
    raw = torch.randn(1, 4, 6, generator=seeded(), dtype=torch.float64)
    network, x_t = Network(lambda x: raw), torch.tensor([[2, 0, 5, 2]])
    free = NetworkDenoiser(network, 6, **facts)(x_t, 0.5)
    logits = NetworkDenoiser(network, 6, suppress_token_ids=(0, 4), **facts)(x_t, 0.5)
    assert (logits[..., [0, 4]] == -INF).all()
    others = [1, 3, 5]
    torch.testing.assert_close(logits[..., others], free[..., others], rtol=0, atol=1e-12)
    assert torch.isfinite(logits[..., others]).all()


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, "cache"), lambda y: SimpleNamespace(logits=y)])
def test_output_forms(wrap: Any) -> None:
    raw = torch.randn(2, 3, 5, generator=seeded())
    denoiser = NetworkDenoiser(Network(lambda x: wrap(raw)), 5, process="uniform")
    assert torch.equal(denoiser(torch.zeros(2, 3, dtype=torch.int64), 0.5), raw)


def test_half_precision_logits() -> None:
    raw = torch.randn(2, 3, 5, generator=seeded()).bfloat16()
    denoiser = NetworkDenoiser(Network(lambda x: raw), 5, 4)
    x_t = torch.full((2, 3), 4)
    assert denoiser(x_t, 0.5).dtype == torch.bfloat16
    log_p_0 = denoiser.log_p_0(x_t, 0.5)
    assert log_p_0.dtype == torch.float32
    torch.testing.assert_close(log_p_0.exp().sum(-1), torch.ones(2, 3), rtol=0, atol=1e-6)


def test_carry_over() -> None:
    raw = torch.randn(1, 3, 4, generator=seeded())
    denoiser = NetworkDenoiser(Network(lambda x: raw), 4, 3)
    log_p_0 = denoiser.log_p_0(torch.tensor([[1, 3, 0]]), 0.5)
    assert log_p_0[0, 0].tolist() == [-INF, 0, -INF, -INF]
    assert log_p_0[0, 2].tolist() == [0, -INF, -INF, -INF]
    torch.testing.assert_close(log_p_0[0, 1], torch.cat([raw[0, 1, :3].log_softmax(-1), torch.tensor([-INF])]))


# Time and conditions


@pytest.mark.parametrize(
    ("time_input", "schedule", "t", "expected"),
    [
        ("t", "loglinear", 0.5, [0.5, 0.5]),
        ("t", "loglinear", torch.tensor([0.25, 1.0]), [0.25, 1.0]),
        ("sigma", "loglinear", 1.0, [6.907755279, 6.907755279]),  # -log 1e-3
        ("sigma", "loglinear", torch.tensor([0.5, 1.0]), [0.692147681, 6.907755279]),  # -log 0.5005
        ("sigma", "geometric", torch.tensor(0.5), [0.0447213595, 0.0447213595]),  # sqrt(1e-4 * 20)
        ("sigma", "geometric", 1.0, [20.0, 20.0]),
    ],
)
def test_time_input(time_input: str, schedule: str, t: Any, expected: list[float]) -> None:
    network = Network(lambda x, time: torch.zeros(2, 3, 5))
    denoiser = NetworkDenoiser(network, 5, 4, time_input=time_input, noise_schedule=schedule)
    denoiser(torch.full((2, 3), 4), t)
    (_, time), _ = network.calls[0]
    assert (time.dtype, time.shape) == (torch.float32, (2,))
    assert time.tolist() == pytest.approx(expected, rel=1e-6)
    assert denoiser.time_conditioned


def test_no_time_input() -> None:
    network = Network(lambda x: torch.zeros(2, 3, 5))
    denoiser = NetworkDenoiser(network, 5, 4)
    denoiser(torch.full((2, 3), 4), 0.5)
    assert len(network.calls[0][0]) == 1
    assert not denoiser.time_conditioned


def test_conditions_and_call_arguments_reach_the_network() -> None:
    network = Network(lambda x, **conditions: torch.zeros(*x.shape, 5))
    denoiser = NetworkDenoiser(network, 5, 4, call_arguments={"scale": 2.0})
    labels, x_t = torch.tensor([7, 8, 9]), torch.full((3, 2), 4)
    denoiser(x_t, 0.5, labels=labels, flag=True)
    assert torch.equal(network.calls[0][1]["labels"], labels)
    assert (network.calls[0][1]["scale"], network.calls[0][1]["flag"]) == (2.0, True)
    denoiser(x_t, 0.5, torch.tensor([[False, True], [False, False], [True, True]]), labels=labels, flag=True)
    assert network.calls[1][1]["labels"].tolist() == [7, 9]  # those of the rows that run
    assert (network.calls[1][1]["scale"], network.calls[1][1]["flag"]) == (2.0, True)


# Chosen positions


POSITIONS = torch.zeros(4, LENGTH, dtype=torch.bool)
POSITIONS[0, [1, 4, 5]] = True
POSITIONS[2, [0, LENGTH - 1]] = True


def tokens() -> Tensor:
    x_t = torch.randint(0, len(WORDS), (4, LENGTH), generator=seeded(1))
    return x_t.masked_fill(torch.rand(4, LENGTH, generator=seeded(2)) < 0.5, MASK)


@torch.no_grad()
@pytest.mark.parametrize(
    "facts",
    [
        {"split_head": True, "suppress_token_ids": (1, 3)},
        {"split_head": False, "suppress_token_ids": (1, 3)},
        {"split_head": True, "shift": 1},
        {"split_head": False, "shift": 1, "shift_first": "copy"},
        {"split_head": True, "parametrization": "score"},
        {"split_head": True, "process": "uniform", "mask_token_id": None},
        {"split_head": False, "process": "uniform", "mask_token_id": None, "parametrization": "leave_one_out"},
        {"split_head": True, "vocab_size": len(WORDS) + 2},
        {"split_head": True, "shift": 1, "shift_first": "copy", "vocab_size": len(WORDS) + 2},
        {"head": "output_layer.linear", "suppress_token_ids": (1, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("t", [0.5, torch.tensor([0.1, 0.4, 0.7, 1.0])], ids=["one time", "time per row"])
def test_rows_are_the_dense_logits(facts: dict, t: Any) -> None:
    model, x_t, labels = tiny_model(num_classes=3), tokens(), torch.tensor([0, 1, 2, 3])
    denoiser = NetworkDenoiser(
        model, **({"vocab_size": len(WORDS), "mask_token_id": MASK, "time_input": "sigma"} | facts)
    )
    dense = denoiser(x_t, t, class_labels=labels)
    rows = denoiser(x_t, t, POSITIONS, class_labels=labels)
    assert isinstance(rows, RowLogits)
    assert torch.equal(rows.positions, POSITIONS)
    torch.testing.assert_close(rows.logits, dense[POSITIONS], rtol=0, atol=1e-5)
    assert rows.logits.shape == (5, denoiser.vocab_size)


@torch.no_grad()
@pytest.mark.parametrize("split_head", [True, False])
def test_only_what_is_needed_is_run(split_head: bool) -> None:
    model, x_t, seen = tiny_model(), tokens(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    model.output_layer.linear.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    denoiser = NetworkDenoiser(model, len(WORDS), MASK, time_input="sigma", split_head=split_head)
    denoiser(x_t, 0.5, POSITIONS)
    assert seen == [(2, LENGTH), (5, 32) if split_head else (2, LENGTH, 32)]
    seen.clear()
    empty = denoiser(x_t, 0.5, torch.zeros_like(POSITIONS))
    assert seen == []
    assert empty.logits.shape == (0, len(WORDS))


# The head of published networks at chosen positions


def published(kind: str) -> torch.nn.Module:
    """transformers' network of a model_type, as `from_pretrained` builds it, with random weights."""
    config = CONFIG_MAPPING[kind](**TINY, **({"n_embd": 32, "n_head": 4, "n_layer": 2} if kind == "gpt2" else {}))
    is_causal = kind in ("llama", "qwen2", "qwen3", "gpt2")
    config.is_causal = not is_causal
    kinds = AutoModelForCausalLM if is_causal else AutoModelForMaskedLM
    model = randomised(kinds.from_config(config, attn_implementation="eager"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


TINY = {"vocab_size": len(WORDS) + 3, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}


@torch.no_grad()
@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize(
    "facts",
    [{}, {"shift": 1}, {"shift": 1, "shift_first": "copy"}, {"process": "uniform", "mask_token_id": None}],
    ids=str,
)
def test_head_of_a_published_network_at_chosen_positions(kind: str, facts: dict) -> None:
    """The logits are those of the whole head, which sees R rows, once; afterwards the network is as it was."""
    model, x_t, seen = published(kind), tokens(), []
    wide = TINY["vocab_size"]
    plain = {"vocab_size": wide, "mask_token_id": MASK, "suppress_token_ids": (1, wide - 1)} | facts
    dense = NetworkDenoiser(model, **plain)(x_t, 0.5)
    denoiser = NetworkDenoiser(model, **plain, head=HEADS[kind])
    assert torch.equal(denoiser(x_t, 0.5), dense)
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    edges = torch.zeros_like(POSITIONS)
    edges[0, [0, 1]] = edges[1, [1, LENGTH - 1]] = edges[3, 0] = (
        True  # the first position, with and without its neighbour
    )
    x_t[0, 0], x_t[3, 0] = MASK, 3
    dense = NetworkDenoiser(model, **plain)(x_t, 0.5)
    for positions in (POSITIONS, edges, torch.ones_like(POSITIONS)):
        seen.clear()
        rows = denoiser(x_t, 0.5, positions)
        torch.testing.assert_close(rows.logits, dense[positions], rtol=0, atol=2e-5)
        assert len(seen) == 1
        assert seen[0] <= int(positions.sum())
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_the_hook_goes_when_the_network_fails() -> None:
    model = published("bert")
    handle = model.cls.register_forward_hook(lambda *_: 1 / 0)
    denoiser = NetworkDenoiser(model, TINY["vocab_size"], MASK, head="cls")
    with pytest.raises(ZeroDivisionError):
        denoiser(tokens(), 0.5, POSITIONS)
    handle.remove()
    assert not model.cls._forward_pre_hooks
    wrong = NetworkDenoiser(model, TINY["vocab_size"], MASK, head="bert.embeddings.LayerNorm")
    broken = NetworkDenoiser(model, TINY["vocab_size"], MASK, head="bert.embeddings.word_embeddings")
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        wrong(tokens(), 0.5, POSITIONS)
    with pytest.raises(ValueError, match="`head` gets a tensor of shape"):
        broken(tokens(), 0.5, POSITIONS)
    assert not any(module._forward_pre_hooks for module in model.modules())


# Errors


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"mask_token_id": None}, "`mask_token_id` is missing"),
        ({"parametrization": "leave_one_out"}, "is for the uniform process"),
        ({"suppress_token_ids": (0, 5)}, r"must lie in \[0, 5\), got \[0, 5\]"),
        ({"frozen_token_ids": (-1,)}, r"must lie in \[0, 5\), got \[-1\]"),
        ({"process": "gaussian"}, "`process` is 'gaussian'; allowed: 'absorbing', 'uniform'"),
        ({"parametrization": "epsilon"}, "`parametrization` is 'epsilon'; allowed: 'x0', 'score', 'leave_one_out'"),
        ({"shift": 2}, "`shift` is 2; allowed: 0, 1"),
        ({"head": "lm_head"}, "`head` is 'lm_head'; Network has no submodule of this name"),
        ({"head": "", "split_head": True}, "`head` and `split_head` cannot both be given"),
        ({"shift": 1, "shift_first": "drop"}, "`shift_first` is 'drop'; allowed: 'keep', 'copy'"),
        ({"time_input": "step"}, "`time_input` is 'step'; allowed: 'sigma', 't', 'steps_left', None"),
        ({"noise_schedule": "quadratic"}, "`noise_schedule` is 'quadratic'"),
        ({"time_input": "sigma", "noise_schedule": "linear"}, "`time_input='sigma'` is infinite at t = 1"),
        (
            {"process": "uniform", "mask_token_id": None, "parametrization": "score", "noise_schedule": "cosine"},
            "says nothing of x_0 at t = 1",
        ),
        (
            {"process": "uniform", "mask_token_id": None, "shift": 1, "shift_first": "copy"},
            "`shift_first='copy'` is for the absorbing process",
        ),
    ],
)
def test_facts_that_contradict(facts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkDenoiser(Network(None), **({"vocab_size": 5, "mask_token_id": 4} | facts))


@pytest.mark.parametrize(
    ("x_t", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"`x_t` is torch.int64 of shape \(4,\); it must be int64 \(B, L\)"),
        (torch.zeros(2, 4), "`x_t` is torch.float32"),
        (torch.zeros(2, 9, dtype=torch.int64), "`x_t` has length 9; this model takes at most 8"),
        (torch.full((2, 4), 5), "`x_t` has ids from 5 to 5; allowed are 0 to 4"),
        (torch.full((2, 4), -1), "`x_t` has ids from -1 to -1"),
    ],
)
@pytest.mark.parametrize("split_head", [True, False])
def test_tokens_that_the_network_cannot_take(x_t: Tensor, message: str, split_head: bool) -> None:
    denoiser = NetworkDenoiser(Network(None), 5, 4, max_length=8, split_head=split_head)
    with pytest.raises(ValueError, match=message):
        denoiser(x_t, 0.5)
    if x_t.dim() == 2:
        with pytest.raises(ValueError, match=message):
            denoiser(x_t, 0.5, torch.ones_like(x_t, dtype=torch.bool))
