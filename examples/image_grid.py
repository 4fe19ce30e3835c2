"""One picture grid for each scheduler: a row for each class, with the same model, steps, guidance and seed.

python examples/image_grid.py --output_dir grids
python examples/image_grid.py --model my-folder --num_inference_steps 8 16 --guidance_scale 3 --guidance_schedule linear
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid

from discrete_schedulers import (
    AncestralScheduler,
    ConfidenceScheduler,
    DiscreteImagePipeline,
    EntropyBoundScheduler,
    MaskGITScheduler,
    RemaskingScheduler,
    SpreadScheduler,
)

SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "random_order": (AncestralScheduler, {}),
    "halton": (SpreadScheduler, {"pattern": "halton"}),
    "farthest": (SpreadScheduler, {"pattern": "farthest"}),
    "halton_cosine_grid": (SpreadScheduler, {"pattern": "halton", "grid": "cosine"}),
    "maskgit": (MaskGITScheduler, {}),
    "confidence": (ConfidenceScheduler, {}),
    "entropy_bound": (EntropyBoundScheduler, {}),
    "remasking": (RemaskingScheduler, {}),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="discrete-schedulers/tiny-image", help="folder, Hub id or bundled id")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("image_grids"), help="for the pictures; default: %(default)s"
    )
    parser.add_argument(
        "--num_inference_steps", type=int, nargs="+", default=[16], help="one grid for each; default: %(default)s"
    )
    parser.add_argument("--images_per_class", type=int, default=10, help="pictures in a row; default: %(default)s")
    parser.add_argument("--classes", type=int, nargs="+", help="default: the first ten")
    parser.add_argument("--prompt", help="for a model of texts: one row")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1 is none; default: %(default)s")
    parser.add_argument(
        "--guidance_schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="how guidance grows while noise goes; default: %(default)s",
    )
    parser.add_argument("--enlarge", type=int, default=2, help="pixels of the grid for each pixel of an image")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Path]:
    """Writes `<scheduler>_<steps>.png` for each; returns their paths by name."""
    options = parse(arguments)
    pipe = DiscreteImagePipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    subject: dict[str, Any] = {"prompt": options.prompt} if options.prompt else {}
    if pipe.num_classes is not None:
        subject = {"class_labels": options.classes or list(range(min(pipe.num_classes, 10)))}
    written, start = {}, pipe.scheduler.config  # each starts from it: knobs do not pass from one to the next
    for name, (scheduler, knobs) in SCHEDULERS.items():
        pipe.scheduler = scheduler.from_config(start, **knobs)
        for steps in options.num_inference_steps:
            output = pipe(
                **subject,
                num_images_per_prompt=options.images_per_class,
                num_inference_steps=steps,
                guidance_scale=options.guidance_scale,
                guidance_schedule=options.guidance_schedule,
                generator=torch.Generator().manual_seed(options.seed),
            )
            images = [
                image.resize((image.width * options.enlarge, image.height * options.enlarge), resample=0)
                for image in output.images
            ]
            path = options.output_dir / f"{name}_{steps}.png"
            make_image_grid(images, len(images) // options.images_per_class, options.images_per_class).save(path)
            written[f"{name}_{steps}"] = path
            print(f"{path}: {output.num_model_calls} model calls")
    return written


if __name__ == "__main__":
    main()
