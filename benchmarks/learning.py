"""Coefficients of LSD and LSD+, learned with the functions of `discrete_schedulers.training`.

The settings are the paper's: a teacher of 1,024 steps, the same for all budgets. Phi is the exact minimiser of eq. 6
(`--solver closed_form`), which is where the paper's gradient steps go; for the generalised KL of a normalised network both
give Phi = 1. The step sizes of LSD+ as printed are the paper's 20 gradient steps of 1e-3: their limit is useless.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from discrete_schedulers import LSDScheduler, RowLogits
from discrete_schedulers.training.distill import parse_args
from discrete_schedulers.training.method_lsd import learn_phi, learn_times, roll_teacher
from discrete_schedulers.training.objectives import draw_noise

# Scale and objective of the methods that learn Phi; LSD+ takes Phi of the first and learns the grid.
METHODS = {
    "lsd-score-kl": ("score", "generalised_kl"),
    "lsd-score-l2": ("score", "l2"),
    "lsd-log-score": ("log_score", "softmax_kl"),
}
RECENT_ROWS = 256  # rows of the student that are remembered


class Memory:
    """A denoiser without time input that runs its network once for each sequence.

    Teacher and student states are asked for again and again: by each objective, each Newton step, and the roll. The logits of
    all masked positions are kept: for the teacher's states always, for others while they are among the last ones.

    Args:
        denoiser (`Callable`): The network.
        mask_token_id (`int`): The mask.
    """

    def __init__(self, denoiser: Callable[..., RowLogits], mask_token_id: int) -> None:
        self.denoiser, self.mask_token_id = denoiser, mask_token_id
        self.kept: dict[bytes, Tensor] = {}
        self.recent: OrderedDict[bytes, Tensor] = OrderedDict()
        self.keeps_all = True

    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor) -> RowLogits:
        """Logits at chosen masked positions. Arguments as in `Denoiser`."""
        is_masked = x_t == self.mask_token_id
        keys = [row.numpy().tobytes() for row in x_t]
        active = [i for i, wanted in enumerate(positions.any(1).tolist()) if wanted]
        new = {keys[i]: i for i in active if keys[i] not in self.kept and keys[i] not in self.recent}
        if new:
            rows = x_t[list(new.values())]
            logits = self.denoiser(rows, t, positions=rows == self.mask_token_id).logits
            parts = logits.split((rows == self.mask_token_id).sum(1).tolist())
            (self.kept if self.keeps_all else self.recent).update(
                zip(new, (part.clone() for part in parts), strict=True)
            )
        found = []
        for i in active:
            stored = self.kept[keys[i]] if keys[i] in self.kept else self.recent[keys[i]]
            found.append(stored[positions[i][is_masked[i]]])
        while len(self.recent) > RECENT_ROWS:
            self.recent.popitem(last=False)
        if not found:
            return self.denoiser(x_t, t, positions=positions)  # nothing asked: an empty tensor of the right width
        return RowLogits(torch.cat(found), positions)


def learn(
    denoiser: Callable[..., RowLogits],
    base: dict[str, Any],
    length: int,
    budgets: list[int],
    seed: int,
    num_samples: int,
    teacher_steps: int,
    batch_size: int = 64,
) -> tuple[dict[str, dict[str, dict[str, list[float]]]], Tensor]:
    """Coefficients of all learned samplers for one seed, and the teacher's samples.

    Args:
        denoiser (`Callable`): The network, without time input; takes `positions`.
        base (`dict`): `vocab_size` and `mask_token_id`.
        length (`int`): Tokens L of a sequence.
        budgets (`list[int]`): Step budgets; each divides `teacher_steps`.
        seed (`int`): Of the shared noise.
        num_samples (`int`): Samples that the coefficients are fitted on.
        teacher_steps (`int`): Steps of the teacher.
        batch_size (`int`, defaults to 64): Sequences in one call of the network.

    Returns:
        `tuple`: `{method: {budget: {"scale": [...], "times": [...]}}}`, and int64 (num_samples, L).
    """
    args = parse_args(
        ["--pretrained_model_name_or_path", "", "--output_dir", ".", "--method", "lsd_plus"]
        + ["--teacher_steps", str(teacher_steps), "--num_samples", str(num_samples), "--seed", str(seed)]
        + ["--train_batch_size", str(batch_size), "--num_inference_steps", *map(str, budgets)]
    )
    memory = Memory(denoiser, base["mask_token_id"])
    noise = draw_noise(range(num_samples), length, seed)
    start = torch.full((num_samples, length), base["mask_token_id"])
    states, counted = [start], []  # the teacher at the times that all students share, and its masks before each step
    for state, masks in roll_teacher(memory, base, args, noise, start, 0):
        states.append(state)
        counted.append(masks)
    masked, segments = torch.cat(counted), len(counted)
    memory.keeps_all = False
    learned: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, (scale, args.objective) in METHODS.items():
        learned[name] = {}
        for steps in budgets:
            student = LSDScheduler(**base, coefficients={str(steps): {"scale": [1.0] * steps}}, scale=scale)
            student.set_timesteps(steps)
            shared = torch.stack(states[: segments : segments // steps])
            phi = learn_phi(memory, student, shared, noise, start, args, lambda sums: sums)
            learned[name][str(steps)] = {"scale": phi}
    for name, args.repaired in (("lsd-plus-literal", False), ("lsd-plus-repaired", True)):
        learned[name] = {}
        for steps in budgets:
            blocks = learned["lsd-score-kl"][str(steps)]
            student = LSDScheduler(**base, coefficients={str(steps): blocks})
            student.set_timesteps(steps)
            learned[name][str(steps)] = blocks | {"times": learn_times(student, masked, args)}
    return learned, states[-1]
