"""A masked language model that nobody here trained, run end to end by every scheduler: AntiBERTy, antibodies, 120 masks.

Needs the package `antiberty` with weights: pip install --no-deps antiberty==0.1.3. Skipped where it is missing.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from scheduler_cases import CASES

from discrete_schedulers import AncestralScheduler, EulerScheduler, LSDScheduler, TauLeapingScheduler, information_curve

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import language
import part_antiberty

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not part_antiberty.is_installed(), reason="antiberty==0.1.3 is not installed"),
]

STEPS, LENGTH, SAMPLES = 8, 120, 2
COEFFICIENTS = {"8": {"scale": [1.0, 0.98, 0.97, 0.98, 1.02, 1.0, 0.99, 1.0]}}
TIMES = {"8": COEFFICIENTS["8"] | {"times": [(1 - k / 8) ** 1.2 for k in range(9)]}}
SCHEDULERS = {
    "ancestral": (AncestralScheduler, {}),
    "ancestral-bernoulli": (AncestralScheduler, {"unmasking": "bernoulli", "grid": "cosine"}),
    "ancestral-spread": (AncestralScheduler, {"order": "spread"}),
    "ancestral-optimal": (AncestralScheduler, {"grid": "optimal"}),
    "euler": (EulerScheduler, {}),
    "tau-leaping": (TauLeapingScheduler, {}),
    "lsd": (LSDScheduler, {"coefficients": COEFFICIENTS}),
    "lsd-log-score": (LSDScheduler, {"coefficients": COEFFICIENTS, "scale": "log_score"}),
    "lsd-plus": (LSDScheduler, {"coefficients": TIMES, "grid": "learned"}),
}
KNOWN = {cls for cls, _ in SCHEDULERS.values()}
OTHERS = dict.fromkeys(case.cls for case in CASES if case.is_absorbing and not case.cls.needs_revealed_logits)
SCHEDULERS |= {cls.__name__: (cls, {}) for cls in OTHERS if cls not in KNOWN}


@pytest.fixture(scope="module")
def subject() -> language.Subject:
    pipe = part_antiberty.load_pipeline()
    pipe.model.requires_grad_(False)
    return language.Subject(
        "antiberty", pipe, part_antiberty.template(LENGTH), lambda *arguments: {}, "trigram_entropy"
    )


@pytest.fixture(scope="module")
def nll_of_chance(subject: language.Subject) -> float:
    """The model's nats per token for uniformly random amino acids."""
    noise = torch.randint(5, 25, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    return part_antiberty.any_order_nll(subject.denoiser, noise, 4, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_fills_120_masks(subject: language.Subject, nll_of_chance: float, name: str) -> None:
    cls, arguments = SCHEDULERS[name]
    if arguments.get("grid") == "optimal":
        arguments = arguments | {"information_curve": [3.0 - 2 * (i / LENGTH) ** 0.5 for i in range(LENGTH)]}
    subject.pipe.scheduler = cls(**subject.base, **arguments)
    generators = [torch.Generator().manual_seed(i) for i in range(SAMPLES)]
    output = subject.pipe(
        template=subject.template,
        num_samples=SAMPLES,
        num_inference_steps=STEPS,
        generator=generators,
        output_type="pt",
    )
    ends, samples = output.sequences[:, [0, -1]], output.sequences[:, 1:-1]
    assert output.num_model_calls <= len(subject.pipe.scheduler.timesteps)
    assert (
        cls not in KNOWN or output.num_model_calls == STEPS
    )  # others stop when all is said, or take two calls in a step
    assert (ends == torch.tensor([part_antiberty.CLS, part_antiberty.SEP])).all()
    assert samples.shape == (SAMPLES, LENGTH)
    assert samples.min() > part_antiberty.MASK  # amino acids only
    assert (part_antiberty.ids(part_antiberty.letters(samples)) == samples).all()
    # far more likely to the model than chance is; its own many-step samples are at about 1.5 nats
    nll = part_antiberty.any_order_nll(subject.denoiser, samples, 4, torch.Generator().manual_seed(0))
    assert nll < nll_of_chance - 0.3


def test_knows_a_human_antibody(subject: language.Subject) -> None:
    """Trastuzumab's heavy chain: with 40 of 120 residues masked the model recovers most."""
    heavy = (
        "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC"
        "SRWGGDGFYAMDYWGQGTLVTVSS"
    )
    x_0 = part_antiberty.ids([heavy])
    is_masked = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1) < 40
    rows = subject.denoiser(x_0.masked_fill(is_masked, part_antiberty.MASK), 1.0, is_masked)
    assert (rows.logits.argmax(-1) == x_0[is_masked]).float().mean() > 0.75


def test_pooled_entropy_by_hand() -> None:
    # trigrams aba bab aba, bab aba bab: two kinds, three of each
    samples = torch.tensor([[5, 6, 5, 6, 5], [6, 5, 6, 5, 6]])
    assert part_antiberty.pooled_entropy(samples, 3) == pytest.approx(math.log(2))
    assert part_antiberty.pooled_entropy(torch.arange(10)[None], 3) == pytest.approx(math.log(8))


def test_information_curve_falls(subject: language.Subject) -> None:
    x_0 = subject.sample(AncestralScheduler(**subject.base), 15, 0, 2)
    curve = information_curve(subject.denoiser, x_0, part_antiberty.MASK, 4, torch.Generator().manual_seed(0))
    assert curve.values[0] > curve.values[-1] + 0.5
