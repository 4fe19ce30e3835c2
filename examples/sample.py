"""Sample, continue and fill in with the bundled model, and swap the scheduler in one line.

python examples/sample.py
"""

from __future__ import annotations

import torch

from discrete_schedulers import AncestralScheduler, DiscreteDiffusionPipeline, EulerScheduler


def main(num_inference_steps: int = 16) -> dict[str, list[str]]:
    pipe = DiscreteDiffusionPipeline.from_pretrained("discrete-schedulers/tiny-text")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    texts = {"unconditional": pipe(num_inference_steps=num_inference_steps, generator=generator).texts}

    pipe.scheduler = EulerScheduler.from_config(pipe.scheduler.config)
    texts["Euler"] = pipe(num_inference_steps=num_inference_steps, generator=generator).texts

    pipe.scheduler = AncestralScheduler.from_config(pipe.scheduler.config, order="spread")
    texts["prompt"] = pipe("The king said to", num_inference_steps=num_inference_steps, generator=generator).texts

    mask = pipe.tokenizer.mask_token
    template = f"In the beginning God created the{mask * 3} and the{mask * 2}."
    texts["infilling"] = pipe(template=template, num_inference_steps=4, generator=generator).texts
    for name, samples in texts.items():
        print(f"{name}:\n  {samples[0].strip()}")
    return texts


if __name__ == "__main__":
    main()
