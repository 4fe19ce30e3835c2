"""What is learned on another device is what is learned on the CPU: no operation of the trainers mixes the two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_device import CAN_RUN, ELSEWHERE, held, with_another_device
from tiny import MASK, WORDS, seeded, tiny_model, tiny_pipeline
from torch import Tensor

from discrete_schedulers import AbsorbingProcess, AncestralScheduler, RowLogits
from discrete_schedulers.training import distill
from discrete_schedulers.training.conditional_matching import matching_loss, teacher_draws
from discrete_schedulers.training.di4c import clean_log_p, di4c_losses, mixture_nll_bound
from discrete_schedulers.training.frozen import FrozenTexts
from discrete_schedulers.training.mdns import denoising_cross_entropy, weighted_samples
from discrete_schedulers.training.methods import METHODS
from discrete_schedulers.training.run import Run
from discrete_schedulers.training.sdtt import sdtt_loss, sdtt_targets

pytestmark = pytest.mark.skipif(not CAN_RUN, reason="this torch takes no device that is written in Python")
V, LENGTH, ROWS = 5, 6, 44
DATA = torch.randint(2, MASK, (ROWS, LENGTH), generator=seeded(5))
SMALL = {
    "lsd": "--objective l2 --relaxed --hamming_share 0.4 --teacher_steps 4",
    "lsd log": "--objective softmax_kl --teacher_steps 4",
    "lsd_plus": "--repaired --teacher_steps 4",
    "optimal_grid": "",
    "optimal_grid spread": "--order spread",
    "order": "--num_epochs 2",
    "learn2pd": "--num_epochs 2 --block_length 3",
    "jys": "",
    "marginal": "--num_samples 24 --num_epochs 2 --buckets 3",
    "search": "--num_samples 24 --num_epochs 2",
}
SLOW = ("jys", "marginal", "search")


def learned(name: str, device: str) -> Any:
    """The config that a method ends with on a device."""
    given = f"--pretrained_model_name_or_path m --output_dir o --method {name.split()[0]} --num_inference_steps 2 "
    given += f"--train_batch_size 16 {SMALL[name]} " + ("" if "num_samples" in SMALL[name] else "--num_samples 6")
    args = distill.parse_args(given.split())
    pipe = tiny_pipeline(model=tiny_model(max_length=LENGTH, cond_dim=None)).to(device)
    pipe.model.requires_grad_(False)

    def alone(x: Tensor, how: str = "") -> Tensor:
        assert x.device.type == torch.device(device).type  # where the process group works
        return x

    facts: dict[str, Any] = {"device": torch.device(device), "num_processes": 1, "process_index": 0}
    accelerator: Any = SimpleNamespace(
        **facts, is_main_process=True, reduce=alone, gather=alone, print=lambda told: None
    )
    state: dict[str, Any] = {"coefficients": {}, "evaluations": 0}
    base = dict(AncestralScheduler(len(WORDS), MASK).config)
    run = Run(
        args, accelerator, FrozenTexts(pipe, LENGTH), base, DATA.to(device), state, {}, lambda scheduler: None, {}
    )
    with torch.enable_grad():
        config = dict(METHODS[args.method](run).config)
    return {key: config.get(key) for key in ("coefficients", "information_curve", "filter", "threshold")}


def numbers(value: Any) -> list[float]:
    """All of them, in order."""
    if isinstance(value, dict | list):
        return [x for one in (value.values() if isinstance(value, dict) else value) for x in numbers(one)]
    return [] if value is None else [float(value)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SMALL])
@with_another_device
def test_methods(name: str) -> None:
    found, expected = numbers(learned(name, ELSEWHERE)), numbers(learned(name, "cpu"))
    assert len(expected) > 1
    assert found == pytest.approx(expected, abs=1e-5)  # attention takes other ways there


def trained(device: str) -> list[Tensor]:
    """Losses of the trainers of weights, on tokens of a device."""
    table = torch.randn(V, V, generator=seeded()).to(device)

    def logits(x: Tensor, t: Any, positions: Tensor | None = None) -> Any:
        every = table[x] + table[x].mean(1, keepdim=True)
        return every if positions is None else RowLogits(every[positions], positions)

    def student(x: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        return logits(x, t) * (1 + latent.float())[:, None, None]

    def bounded(x: Tensor, t: Tensor, positions: Tensor, latent: Tensor) -> RowLogits:
        return RowLogits(student(x, t, latent)[positions], positions)

    process, x_0 = AbsorbingProcess(V, V - 1), torch.randint(0, V - 1, (5, LENGTH), generator=seeded(1)).to(device)
    t = torch.linspace(0.3, 1.0, 5, dtype=torch.float64).to(device)
    times = torch.stack([t, t * 0.6, t * 0.2])
    x_t = process.add_noise(x_0, t, seeded(2))
    target = sdtt_targets(logits, process, x_t, times, seeded(3))
    energy = weighted_samples(logits, lambda x: x.double().sum(1), 4, [2, 4], V - 1, seeded(4), device)
    scheduler = AncestralScheduler(V, V - 1)
    return [
        *di4c_losses(student, logits, process, x_0, t, t * 0.5, 3, seeded(5)),
        sdtt_loss(clean_log_p(logits(x_t, t), V - 1), target, x_t == V - 1),
        matching_loss(student, x_t, teacher_draws(logits, process, x_t, times, seeded(6)), t, 3, V - 1, seeded(7)),
        mixture_nll_bound(bounded, scheduler, x_0, 3, 2, seeded(8)),
        energy.log_weights,
        denoising_cross_entropy(logits, energy, V - 1, 2, seeded(9)),
    ]


@with_another_device
def test_weights() -> None:
    for found, expected in zip(trained(ELSEWHERE), trained("cpu"), strict=True):
        torch.testing.assert_close(held(found), expected)
