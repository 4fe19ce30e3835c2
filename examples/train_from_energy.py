"""Train a masked model from an energy alone (MDNS): Ising or Potts spins on a torus, with log Z and the effective sample size.

    python examples/train_from_energy.py --side 4 --states 2 --beta 0.28

Prints, round by round, the estimate of log Z beside the exact one (transfer matrix) and the effective sample size; then samples
the trained network with the counts of an ordinary scheduler at fewer and fewer calls, weighs these samples too, and writes a
table. About half a minute of CPU time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discrete_schedulers import AncestralScheduler, NetworkDenoiser
from discrete_schedulers.training.hub import markdown_table, write_text
from discrete_schedulers.training.mdns import (
    denoising_cross_entropy,
    effective_sample_size,
    log_partition,
    weighted_samples,
)


def lattice_energy(x: Tensor, side: int, beta: float, states: int) -> Tensor:
    """U = -beta sum over bonds of s s' (two states, spins -1 and 1) or of 1[x = x'] (Potts), on a torus; (B,)."""
    grid = x.view(-1, side, side)
    total = torch.zeros(len(grid), dtype=torch.float64)
    for axis in (1, 2):
        equal = (grid == grid.roll(-1, axis)).double()
        total += (2 * equal - 1 if states == 2 else equal).sum((1, 2))
    return -beta * total


def exact_log_partition(side: int, beta: float, states: int) -> float:
    """log Z of the torus by its transfer matrix: Z = tr T^side, over states^side rows of the lattice."""
    rows = torch.tensor(list(itertools.product(range(states), repeat=side)))
    sign, shift = (2, -1) if states == 2 else (1, 0)
    within = (sign * (rows == rows.roll(-1, 1)).double() + shift).sum(1)
    between = (sign * (rows[:, None] == rows).double() + shift).sum(-1)
    transfer = torch.exp(beta * (within[:, None] / 2 + within / 2 + between))
    return math.log(float(torch.linalg.matrix_power(transfer, side).trace()))


class SpinModel(nn.Module):
    """Logits of all spins from all spins: a multilayer perceptron, which knows where each of them stands.

    Args:
        length (`int`): Spins L.
        vocab_size (`int`): States and the mask.
        hidden (`int`): Width.
    """

    def __init__(self, length: int, vocab_size: int, hidden: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        layers = [nn.Linear(length * vocab_size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, length * vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(x, self.vocab_size).float().flatten(1)
        return self.net(one_hot).view(*x.shape, self.vocab_size)


def train(denoiser: NetworkDenoiser, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Rounds of fresh weighted samples and gradient steps on them, from a high temperature down to that of the energy."""
    length, mask = args.side**2, args.states
    optimizer = torch.optim.Adam(denoiser.model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.rounds * args.steps_per_round)
    for number in range(args.rounds):
        beta = args.beta * min(1.0, (number + 1) / (args.rounds / 3))
        samples = weighted_samples(
            denoiser,
            lambda x, b=beta: lattice_energy(x, args.side, b, args.states),
            args.batch,
            [1] * length,
            mask,
            generator,
        )
        for _ in range(args.steps_per_round):
            optimizer.zero_grad()
            denoising_cross_entropy(denoiser, samples, mask, args.replicates, generator).backward()
            optimizer.step()
            schedule.step()
        if (number + 1) % max(1, args.rounds // 10) == 0:
            ess = effective_sample_size(samples.log_weights)
            print(f"round {number + 1}: beta {beta:.3f}, log Z {log_partition(samples.log_weights):.4f}, ESS {ess:.3f}")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4, help="Sites of the torus along each axis.")
    parser.add_argument("--states", type=int, default=2, help="2 is Ising; more is Potts.")
    parser.add_argument("--beta", type=float, default=0.28, help="Inverse temperature; Ising is critical at 0.4407.")
    parser.add_argument(
        "--rounds", type=int, default=150, help="Rounds of training, each with fresh samples. Default: %(default)s."
    )
    parser.add_argument("--steps_per_round", type=int, default=8, help="Gradient steps on them. Default: %(default)s.")
    parser.add_argument("--batch", type=int, default=256, help="Samples in a round. Default: %(default)s.")
    parser.add_argument(
        "--replicates", type=int, default=8, help="Maskings of each sample in a step. Default: %(default)s."
    )
    parser.add_argument("--hidden", type=int, default=256, help="Width of the network. Default: %(default)s.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Of Adam. Default: %(default)s.")
    parser.add_argument(
        "--num_eval_samples",
        type=int,
        default=8192,
        help="Samples behind each line of the table. Default: %(default)s.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("energy_results"),
        help="For the network and the table. Default: %(default)s.",
    )
    args = parser.parse_args(argv)
    length, mask = args.side**2, args.states
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    network = SpinModel(length, args.states + 1, args.hidden)
    denoiser = NetworkDenoiser(network, vocab_size=args.states + 1, mask_token_id=mask)
    train(denoiser, args, generator)

    exact = exact_log_partition(args.side, args.beta, args.states)
    scheduler, table = AncestralScheduler(vocab_size=args.states + 1, mask_token_id=mask, noise_schedule="linear"), []
    for calls in sorted({length, max(1, length // 2), max(1, length // 4), 1}, reverse=True):
        scheduler.set_timesteps(calls)
        x, counts = torch.full((1, length), mask), []
        for t in scheduler.timesteps:  # how many open in each step of the ordinary scheduler
            counts.append(int(scheduler.positions(t, x, generator).sum()))
            x[0, : sum(counts)] = 0
        drawn = weighted_samples(
            denoiser,
            lambda x: lattice_energy(x, args.side, args.beta, args.states),
            *(args.num_eval_samples, [count for count in counts if count], mask, generator),
        )
        energies = lattice_energy(drawn.x, args.side, args.beta, args.states)
        row = {"calls": calls, "log Z": log_partition(drawn.log_weights), "exact log Z": exact}
        row |= {"ESS": effective_sample_size(drawn.log_weights), "mean energy": float(energies.mean())}
        row["reweighted energy"] = float(drawn.log_weights.softmax(0) @ energies)
        table.append(row)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(args.output_dir / "table.json", json.dumps(table, indent=2) + "\n")
    torch.save(network.state_dict(), args.output_dir / ".model.pt")
    (args.output_dir / ".model.pt").replace(args.output_dir / "model.pt")
    print(markdown_table(table))
    return table


if __name__ == "__main__":
    main()
