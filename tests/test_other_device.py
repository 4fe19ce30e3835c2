"""No operation mixes two devices, also with generators and tensors of the CPU, and the samples are those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from other_device import CAN_RUN, ELSEWHERE, held, with_another_device
from scheduler_cases import CASES, SchedulerCase
from test_image_pipeline import pipeline as image_pipeline
from test_image_pipeline import shades, tiny_vq
from tiny import seeded
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline, NetworkDenoiser
from discrete_schedulers.pipelines.images import decode, encode

pytestmark = pytest.mark.skipif(not CAN_RUN, reason="this torch takes no device that is written in Python")
V, LENGTH = 6, 8
ONE_OF_EACH = {case.cls: case for case in reversed(CASES)}


class Neighbours(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(V, V, generator=seeded()))

    def forward(self, ids: Tensor, **told: Tensor) -> Tensor:
        return self.table[ids] + self.table[ids].mean(1, keepdim=True)


def run(case: SchedulerCase, device: str, gathers: bool) -> Tensor:
    scheduler = case.build(V)
    facts = {name: scheduler.config[name] for name in ("mask_token_id", "process")}
    facts["revealed_logits"] = "leave_one_out" if scheduler.needs_revealed_logits else "none"
    denoiser: Any = NetworkDenoiser(Neighbours().to(device), V, **facts)
    scheduler.set_timesteps(3, device=device)
    generators: Any = [seeded(row) for row in range(2)]
    x = scheduler.sample_prior((2, LENGTH), generators, device)
    for t in scheduler.timesteps:
        told = scheduler.model_inputs(t, x, torch.zeros_like(x, dtype=torch.bool), generators)
        chosen = scheduler.positions(t, x, generators) if gathers else None
        output: Any = scheduler.step(denoiser(x, t, chosen, **told), t, x, generator=generators)
        assert gathers or (output.pred_logits is not None and output.pred_logits.device == x.device)
        x = output.prev_sample
    return x


@pytest.mark.parametrize("gathers", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", range(4))
@with_another_device
def test_schedulers(number: int, gathers: bool) -> None:
    for case in list(ONE_OF_EACH.values())[number::4]:
        expected = run(case, "cpu", gathers)
        assert torch.equal(held(run(case, ELSEWHERE, gathers)), expected), case.name


@with_another_device
def test_the_device_sees_what_stays_behind() -> None:
    there = torch.ones(2, device=ELSEWHERE)
    assert torch.equal(held(there * torch.tensor(2.0)), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="two devices"):
        there * torch.ones(2)


@with_another_device
def test_text() -> None:
    expected, found = (
        DiscreteDiffusionPipeline.from_pretrained("discrete-schedulers/tiny-text").to(device)(
            ["The king", "The king said to"],
            max_new_tokens=6,
            guidance_scale=2.0,
            num_inference_steps=3,
            generator=seeded(),
        )
        for device in ("cpu", ELSEWHERE)
    )
    assert torch.equal(held(found.sequences), expected.sequences)
    assert found.texts == expected.texts


@with_another_device
def test_images() -> None:
    """Painted into, with labels of the CPU."""
    arguments: dict[str, Any] = {"image": torch.rand(1, 1, 8, 12, generator=seeded()), "guidance_scale": 2.0}
    arguments |= {"mask_image": torch.ones(8, 12).tril(), "num_inference_steps": 3, "output_type": "pt"}
    expected, found = (
        image_pipeline().to(device)(class_labels=torch.tensor([1, 2]), generator=seeded(), **arguments)
        for device in ("cpu", ELSEWHERE)
    )
    assert torch.equal(held(found.sequences), expected.sequences)
    assert torch.equal(held(found.images), expected.images)


@pytest.mark.parametrize("kind", ["patches", "VQ", "VQ without lookup"])
@with_another_device
def test_offloaded_decoders(kind: str) -> None:
    """Their weights are on the CPU until they are called: `enable_model_cpu_offload`."""
    decoder: Any = shades() if kind == "patches" else tiny_vq()
    if kind == "VQ without lookup":
        decoder.register_to_config(lookup_from_codebook=False)
    pixels = torch.rand(1, 1 if kind == "patches" else 3, 8, 12, generator=seeded())
    ids = encode(decoder, pixels, True)
    expected = decode(decoder, ids, True)
    _, hook = cpu_offload_with_hook(decoder, ELSEWHERE)
    assert torch.equal(held(encode(decoder, pixels.to(ELSEWHERE), True)), ids)
    hook.offload()
    assert torch.equal(held(decode(decoder, ids.to(ELSEWHERE), True)), expected)
