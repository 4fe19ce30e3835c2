"""`lsd` and `lsd_plus` of `distill.py`: factors on the score, and step sizes, along coupled rolls. See `objectives.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from accelerate.utils import tqdm
from torch import Tensor

from discrete_schedulers import DiscreteScheduler, LSDScheduler
from discrete_schedulers.denoisers import Denoiser
from discrete_schedulers.training.objectives import (
    PHI_RANGE,
    CoupledRoll,
    Reduce,
    SharedNoise,
    draw_noise,
    fit_phi,
    literal_kappa_gradient,
    perturbed_start,
    phi_gradient,
    repaired_step_sizes,
    times_from_step_sizes,
)
from discrete_schedulers.training.run import Run, absorbing

SMALLEST_STEP = 1e-6  # LSD+ as printed: gradient steps that would make a kappa or the time after it negative end here


def lsd(run: Run) -> DiscreteScheduler:
    """A factor on the score for each step; with `--method lsd_plus` step sizes as well."""
    args, tensors = run.args, run.tensors
    # This process has its share of the samples; every process keeps the teacher's states of all of them
    share = list(run.share(args.num_samples))
    noise = draw_noise(share, run.length, args.seed, run.accelerator.device)
    mask = run.mask_token_id
    segments = math.lcm(*args.num_inference_steps)  # of the teacher's grid, between times that students share
    if "states" not in tensors:
        tensors["states"] = torch.full((1, args.num_samples, run.length), mask)
        tensors["masked"] = torch.zeros(0, dtype=torch.float64)
    done = len(tensors["states"]) - 1
    last = tensors["states"][-1, share].to(run.accelerator.device)
    rolled = roll_teacher(run.denoiser, run.base, args, noise, last, done)
    progress = tqdm(rolled, desc="teacher", initial=done, total=segments, disable=not run.accelerator.is_main_process)
    for number, (x, masked) in enumerate(progress, start=done + 1):
        reached, masked = run.gather(x, args.num_samples), run.reduce(masked)
        run.add_evaluations()  # where processes meet a run may end: what goes together changes behind it
        tensors["states"] = torch.cat([tensors["states"], reached[None]])
        tensors["masked"] = torch.cat([tensors["masked"], masked])
        if number == segments or number % -(-segments // 16) == 0:
            run.save(None)

    run.learned_for |= {"objective": args.objective, "repaired": args.repaired}
    settings = {"scale": args.scale, "learned_for": run.learned_for}
    if args.method == "lsd_plus":
        settings["grid"] = "learned"
    # no mask is left in the last states
    unigram = torch.bincount(tensors["states"][-1].flatten(), minlength=run.base["vocab_size"])
    start = perturbed_start(noise, mask, args.hamming_share if args.relaxed else 0.0, unigram)

    def learn(steps: int) -> dict[str, list[float]]:
        student = LSDScheduler.from_config(
            run.base, coefficients={str(steps): {"scale": [1.0] * steps}}, scale=args.scale
        )
        student.set_timesteps(steps)
        at = torch.arange(steps) * (segments // steps)
        teacher_states = tensors["states"][at][:, share].to(run.accelerator.device)
        blocks = {"scale": learn_phi(run.denoiser, student, teacher_states, noise, start, args, run.reduce)}
        if args.method == "lsd_plus":
            blocks["times"] = learn_times(student, tensors["masked"], args)
        return blocks

    return run.each_budget(learn, lambda found: LSDScheduler.from_config(run.base, coefficients=found, **settings))


def roll_teacher(
    denoiser: Denoiser, base: dict, args: argparse.Namespace, noise: SharedNoise, state: Tensor, done: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Roll the teacher from one shared time to the next, from the `done`-th of them on, where it has the given state.

    Yields:
        Its state at the next shared time, int64 (B, L), and the rows masked before each step on the way there.
    """
    teacher = LSDScheduler.from_config(base, scale="score")
    teacher.set_timesteps(args.teacher_steps)
    stride = args.teacher_steps // math.lcm(*args.num_inference_steps)
    roll = CoupledRoll(denoiser, teacher, noise, state, args.train_batch_size)
    for index in range(done * stride):
        roll.survival = roll.survival * (1 - teacher.open_probability(index))
    for start in range(done * stride, args.teacher_steps, stride):
        masked = torch.zeros(stride, dtype=torch.float64)
        for index in range(start, start + stride):
            masked[index - start] = (roll.state == teacher.config.mask_token_id).sum()
            roll.step(index)
        yield roll.state.clone(), masked


def learn_phi(
    denoiser: Denoiser,
    scheduler: LSDScheduler,
    teacher_states: Tensor,
    noise: SharedNoise,
    start: Tensor,
    args: argparse.Namespace,
    reduce: Reduce,
) -> list[float]:
    """Phi for each step of the scheduler's grid (eq. 6): closed form in one roll, or the paper's gradient steps."""
    steps, process = len(scheduler.timesteps), absorbing(scheduler)
    phi = [1.0] * steps
    epochs = 1 if args.solver == "closed_form" else args.num_epochs
    for _ in range(epochs):
        roll = CoupledRoll(denoiser, scheduler, noise, start, args.train_batch_size)
        for k in range(steps):
            shared = (denoiser, process, roll.state, teacher_states[k], scheduler.times[k])
            if args.solver == "closed_form":
                phi[k] = fit_phi(*shared, args.objective, args.train_batch_size, reduce)
            else:
                gradient = phi_gradient(*shared, phi[k], args.objective, args.train_batch_size, reduce)
                phi[k] = max(phi[k] - args.learning_rate * gradient, PHI_RANGE[0])
            scheduler.register_to_config(coefficients={str(steps): {"scale": phi}})
            if k < steps - 1:
                roll.step(k)
    return phi


def learn_times(scheduler: LSDScheduler, masked: Tensor, args: argparse.Namespace) -> list[float]:
    """The grid of LSD+: eq. 8 by the paper's gradient steps, or the repaired objective.

    Both need the odds of the score only, which a normalised network has in closed form: no roll is needed.
    """
    steps, process = len(scheduler.timesteps), absorbing(scheduler)
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if args.repaired:
        fine = torch.linspace(1, 0, args.teacher_steps + 1, dtype=torch.float64)[:-1]
        opened = (
            masked * process.hazard(fine).reshape(-1) / args.teacher_steps
        )  # expected openings of each teacher step
        return times_from_step_sizes(
            repaired_step_sizes(process, opened.view(steps, -1).sum(1), masked.view(steps, -1)[:, 0])
        )
    kappa = torch.full((steps,), 1 / steps, dtype=torch.float64)
    for _ in range(args.num_epochs):
        for k in range(1, steps):  # tau_k, t_k for k = 1 .. M - 1: at k = M nothing is left to sample
            tau = (1 - kappa[:k].sum()).clamp(min=SMALLEST_STEP)
            gradient = literal_kappa_gradient(process, tau, uniform[k], float(kappa[k - 1]), args.teacher_steps)
            kappa[k - 1] = (kappa[k - 1] - args.learning_rate * gradient).clamp(min=SMALLEST_STEP)
    return times_from_step_sizes(kappa)
