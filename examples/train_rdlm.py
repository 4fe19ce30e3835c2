"""Train a diffusion on the sphere (RDLM) and judge its samples: by their exact law, or by their spelling.

    python examples/train_rdlm.py                   # a ring of spins that can be enumerated: 90 s of CPU time
    python examples/train_rdlm.py --data text       # letters of the bundled corpus: 0.1 s for each of 8000 steps

Writes the pipeline, which `RDLMPipeline.from_pretrained` loads, and a table over numbers of steps. For spins: the total
variation between the samples and the data's law, beside that of as many draws from this law itself, and of independent spins.
For text: the share of words that the corpus has, beside that of held-out text, and the entropy of letters.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from discrete_schedulers import RDLMPipeline, RDLMScheduler, SphereTransformerModel
from discrete_schedulers.evaluation import total_variation, unigram_entropy
from discrete_schedulers.training.hub import markdown_table, write_text
from discrete_schedulers.training.pretrain import read_split
from discrete_schedulers.training.rdlm import denoising_cross_entropy, draw_times

LETTERS = "abcdefghijklmnopqrstuvwxyz "


class Spins:
    """Ising spins on a ring in a weak field: all states and their law.

    Args:
        length (`int`): Spins L.
        coupling (`float`): Of neighbours.
    """

    vocab_size, tokenizer = 3, None  # two spins and the mask

    def __init__(self, length: int, coupling: float) -> None:
        self.states = torch.tensor(list(itertools.product(range(2), repeat=length)))
        spin = 2 * self.states.double() - 1
        self.p = (coupling * (spin * spin.roll(1, 1)).sum(1) + 0.1 * spin.sum(1)).softmax(0)

    def batch(self, rows: int, generator: torch.Generator) -> Tensor:
        """Clean rows (rows, L)."""
        return self.states[torch.multinomial(self.p, rows, replacement=True, generator=generator)]

    def law(self, x: Tensor) -> Tensor:
        """Shares of the states among samples (B, L)."""
        places = x @ 2 ** torch.arange(x.shape[1] - 1, -1, -1)
        return torch.bincount(places, minlength=len(self.p)).double() / len(x)

    def judge(self, x: Tensor) -> dict[str, Any]:
        """Total variations, from samples (B, L)."""
        fresh = self.batch(len(x), torch.Generator().manual_seed(1))
        up = (self.p[:, None] * self.states).sum(0)  # (L,)
        independent = torch.where(self.states == 1, up, 1 - up).prod(1)
        pairs = {"samples": self.law(x), "draws of the law": self.law(fresh), "independent spins": independent}
        return {f"TV, {name}": float(total_variation(q, self.p)) for name, q in pairs.items()}


class Text:
    """The bundled corpus as lower-case letters and single spaces.

    Args:
        length (`int`): Letters L of a sample.
    """

    vocab_size = len(LETTERS) + 1

    def __init__(self, length: int) -> None:
        train, heldout = (re.sub("[^a-z]+", " ", read_split(None, name).lower()) for name in ("train", "validation"))
        self.length, self.words = length, set(train.split())
        vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"[MASK]": len(LETTERS)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.decoder = decoders.Fuse()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]")
        self.stream = torch.tensor([vocabulary[letter] for letter in train])
        self.heldout = heldout

    def batch(self, rows: int, generator: torch.Generator) -> Tensor:
        """Clean rows (rows, L)."""
        start = torch.randint(len(self.stream) - self.length, (rows, 1), generator=generator)
        return self.stream[start + torch.arange(self.length)]

    def known_share(self, text: str) -> float:
        """Share of the whole words of a text, the first and the last left out, that the corpus has."""
        words = text.split()[1:-1]
        return sum(word in self.words for word in words) / max(len(words), 1)

    def judge(self, x: Tensor) -> dict[str, Any]:
        """Spelling and entropy, from samples (B, L)."""
        texts = self.tokenizer.batch_decode(x)
        rows = [self.heldout[i : i + self.length] for i in range(0, 200 * self.length, self.length)]
        found, given = ([self.known_share(text) for text in some] for some in (texts, rows))
        return {
            "known words": sum(found) / len(found),
            "of held-out text": sum(given) / len(given),
            "entropy": float(unigram_entropy(x).mean()),
            "first sample": texts[0],
        }


def train(
    model: SphereTransformerModel, scheduler: RDLMScheduler, data: Spins | Text, args: argparse.Namespace
) -> None:
    """Adam with a cosine decay; prints the loss ten times."""
    generator, total = torch.Generator().manual_seed(args.seed), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_train_steps)
    every = max(1, args.max_train_steps // 10)
    for step in range(1, args.max_train_steps + 1):
        x_0, t = data.batch(args.batch, generator), draw_times(args.batch, generator)
        loss = denoising_cross_entropy(model, scheduler.bridge, x_0, t, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        total += float(loss.detach())
        if step % every == 0:
            print(f"step {step}: {total / every:.4f} nats per token", flush=True)
            total = 0.0


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", choices=["spins", "text"], default="spins", help="What to learn. Default: %(default)s."
    )
    parser.add_argument("--length", type=int, default=None, help="Tokens of a sample: 6 spins or 32 letters.")
    parser.add_argument("--coupling", type=float, default=0.6, help="Of neighbouring spins.")
    parser.add_argument(
        "--prior",
        choices=["mask", "uniform", "mixture"],
        default="mask",
        help="Where the walk begins: mask's corner or centre; mixture: centre, trained on both. Default: %(default)s.",
    )
    parser.add_argument("--hidden_size", type=int, default=None, help="64 for spins, 96 for text.")
    parser.add_argument("--num_blocks", type=int, default=None, help="2 for spins, 3 for text.")
    parser.add_argument("--max_train_steps", type=int, default=None, help="1500 for spins, 8000 for text.")
    parser.add_argument("--batch", type=int, default=None, help="256 for spins, 64 for text.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Of AdamW. Default: %(default)s.")
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64],
        help="Numbers of steps to judge at. Default: %(default)s.",
    )
    parser.add_argument("--num_eval_samples", type=int, default=None, help="10000 for spins, 100 for text.")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("rdlm_results"),
        help="For the pipeline and the table. Default: %(default)s.",
    )
    args = parser.parse_args(argv)
    names = ("length", "hidden_size", "num_blocks", "max_train_steps", "batch", "num_eval_samples")
    standard = {"spins": (6, 64, 2, 1500, 256, 10_000), "text": (32, 96, 3, 8000, 64, 100)}[args.data]
    for name, value in zip(names, standard, strict=True):
        given = getattr(args, name)
        if given is not None and given < 1:
            parser.error(f"--{name} is {given}; it must be at least 1")
        setattr(args, name, value if given is None else given)
    torch.manual_seed(args.seed)
    data = Spins(args.length, args.coupling) if args.data == "spins" else Text(args.length)
    sizes = {"hidden_size": args.hidden_size, "num_blocks": args.num_blocks, "max_length": args.length}
    model = SphereTransformerModel(data.vocab_size, num_heads=4, cond_dim=32, **sizes)
    scheduler = RDLMScheduler(data.vocab_size, data.vocab_size - 1, args.prior)
    train(model, scheduler, data, args)
    pipe = RDLMPipeline(model.eval(), scheduler, data.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    table = []
    for steps in args.num_inference_steps:
        asked = {"num_samples": args.num_eval_samples, "num_inference_steps": steps, "output_type": "pt"}
        x = pipe(**asked, generator=torch.Generator().manual_seed(args.seed)).sequences
        table.append({"steps": steps} | data.judge(x))
    pipe.save_pretrained(args.output_dir)
    write_text(args.output_dir / "table.json", json.dumps(table, indent=2) + "\n")
    print(markdown_table(table))
    return table


if __name__ == "__main__":
    main()
