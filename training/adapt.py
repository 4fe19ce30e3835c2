r"""Learn a small adapter for a masked model, where floats of a scheduler cannot do it: Di4C or SDTT on a frozen network.

    accelerate launch training/adapt.py --pretrained_model_name_or_path discrete-schedulers/tiny-text \
        --method di4c --output_dir tiny-text-di4c

`di4c` makes the tokens that open in one call depend on each other through a latent (training/di4c.py); `sdtt` teaches one step
what several say (training/sdtt.py, one round). The network gets LoRA and, for `di4c`, a latent's MLP; its own weights stay as
they are, and are the teacher. The folder then holds the adapter, a scheduler config that goes with it, metrics.json, README.md.

It learns on the texts that are given, else on the model's own samples, which the processes share out among them. Random numbers
are functions of (seed, step, process): a run that was killed goes on with `--resume_from_checkpoint latest` as if it had not
been, with as many processes. LoRA needs `pip install discrete_schedulers[adapters]`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    DDiTModel,
    DiscreteDiffusionPipeline,
    LatentModel,
    LearnedScheduler,
    NetworkDenoiser,
    RowLogits,
)
from discrete_schedulers.evaluation import unigram_entropy
from discrete_schedulers.training.arguments import check_push, check_texts
from discrete_schedulers.training.data import load_texts, pack, sequence_length
from discrete_schedulers.training.di4c import clean_log_p, di4c_losses, mixture_nll_bound, total_loss
from discrete_schedulers.training.files import output_folder, published, unwritten, write_text
from discrete_schedulers.training.frozen import FrozenTexts
from discrete_schedulers.training.hub import (
    Parser,
    access_token,
    check_counts,
    create_repository,
    markdown_table,
    upload,
)
from discrete_schedulers.training.run import DATA, JUDGED, gather_samples, sample
from discrete_schedulers.training.sdtt import sdtt_loss, sdtt_targets
from discrete_schedulers.training.signals import before_end, ends_at_sigterm, stop_if_asked

DDIT_LAYERS = ["attn_qkv", "attn_out", "mlp.0", "mlp.2"]
STATE, SAMPLES = "adapter_state.pt", "adapter_samples.pt"
ONLY_FOR = {  # arguments that the other method does not read, and what they are where they are not given
    "num_latents": ("di4c", 8),
    "num_eval_latents": ("di4c", 32),
    "distilled_below": ("di4c", 0.02),
    "correlation_scale": ("di4c", 0.1),
    "teacher_steps": ("sdtt", 2),
}
CARD = """---
library_name: discrete_schedulers
license: apache-2.0
tags: [discrete-diffusion, diffusers, diffusers-training, {method}]
---

# {title}

An adapter for `{base_model}`, learned by `{method}`, and the scheduler config that goes with it.

```python
from discrete_schedulers import DiscreteDiffusionPipeline, LatentModel, LearnedScheduler

pipe = DiscreteDiffusionPipeline.from_pretrained("{base_model}")
pipe.model = LatentModel.from_pretrained("{repo_id}", pipe.model)
pipe.scheduler = LearnedScheduler.from_pretrained("{repo_id}")
```

{table}

NLL: bound in nats per token on held-out sequences, of the sampler at its number of steps, random counts{gap}.
Entropy: of the tokens within a sample, in nats; data has {data_entropy:.3f}.

```json
{arguments}
```
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision", default=None)
    parser.add_argument("--dataset_name", default=None, help="Of the Hub. Without texts: the model's own samples.")
    parser.add_argument("--dataset_config", default=None)
    parser.add_argument("--train_file", default=None, help="A text file, one document a line.")
    parser.add_argument("--validation_file", default=None)
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_data_samples", type=int, default=20_000)
    parser.add_argument("--sequence_length", type=int, default=None, help="Defaults to the model's longest.")
    parser.add_argument("--method", choices=["di4c", "sdtt"], default="di4c")
    parser.add_argument("--num_latents", type=int, default=None, help="di4c: J of each row, 8. Published: 16 or 32.")
    parser.add_argument("--teacher_step", type=float, default=1 / 1024, help="Length in time of a teacher's step.")
    parser.add_argument(
        "--distilled_below", type=float, default=None, help="di4c: time below which components are taught, 0.02."
    )
    parser.add_argument(
        "--correlation_scale", type=float, default=None, help="di4c: of a(t), 0.1, as published for text."
    )
    parser.add_argument("--teacher_steps", type=int, default=None, help="sdtt: steps of a target, 2.")
    parser.add_argument("--embedding", default=None, help="Module of token embeddings; found in most networks.")
    parser.add_argument("--lora_r", type=int, default=8)
    parser.add_argument("--lora_alpha", type=int, default=16)
    parser.add_argument("--lora_target_modules", nargs="+", default=DDIT_LAYERS, help="Default: those of DDiTModel.")
    parser.add_argument("--train_batch_size", type=int, default=8, help="Rows in each process.")
    parser.add_argument("--max_train_steps", type=int, default=5000)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[4, 8, 16], help="Budgets to measure at.")
    parser.add_argument("--num_eval_samples", type=int, default=32)
    parser.add_argument("--num_eval_latents", type=int, default=None, help="di4c: J of the NLL bound, 32.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume_from_checkpoint", choices=["latest"], default=None)
    parser.add_argument("--push_to_hub", action="store_true")
    parser.add_argument("--hub_model_id", default=None, help="Defaults to the name of the output folder.")
    parser.add_argument("--hub_token", type=access_token, help="Better HF_TOKEN: launchers print what they were given.")
    args = parser.parse_args(argv)
    for name, (method, default) in ONLY_FOR.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.method != method:
            parser.error(f"--{name} is for --method {method}")
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if arguments are not allowed or contradict each other."""
    counts = ["max_data_samples", "sequence_length", "num_eval_latents", "teacher_steps", "lora_r", "lora_alpha"]
    counts += ["train_batch_size", "max_train_steps", "checkpointing_steps", "num_eval_samples"]
    check_counts(parser, args, counts)
    if min(args.num_inference_steps) < 1:
        parser.error(f"--num_inference_steps is {args.num_inference_steps}; budgets must be at least 1")
    if args.num_latents < 2:
        parser.error(f"--num_latents is {args.num_latents}; a mixture needs at least 2")
    if not 0 < args.teacher_step < 1:
        parser.error(f"--teacher_step is {args.teacher_step}; allowed are numbers between 0 and 1")
    if not 0 < args.distilled_below < 1:
        parser.error(f"--distilled_below is {args.distilled_below}; allowed are numbers between 0 and 1")
    if not 0 <= args.correlation_scale < math.inf:
        parser.error(f"--correlation_scale is {args.correlation_scale}; allowed are numbers of at least 0")
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} is {getattr(args, name)}; it must be positive and finite")
    if not 0 <= args.seed < 2**32 - 1:
        parser.error(f"--seed is {args.seed}; allowed are 0 to {2**32 - 2}")
    check_texts(parser, args)
    check_push(parser, args)


def identity_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the result depends on: none that the method does not read."""
    free = {"output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token"}
    free |= {name for name, (method, _) in ONLY_FOR.items() if method != args.method}
    return {name: value for name, value in vars(args).items() if name not in free and value is not None}


def embedding_of(model: Any, name: str | None) -> tuple[str, int]:
    """Name and width of the module that embeds tokens.

    Raises:
        ValueError: If the network does not say which it is.
    """
    if isinstance(model, DDiTModel):
        return "vocab_embed", model.config.hidden_size
    modules = dict(model.named_modules())
    module = modules.get(name) if name is not None else model.get_input_embeddings()
    found = [key for key, value in modules.items() if value is module]
    if module is None or not found:
        raise ValueError(f"`--embedding` is {name!r}, which {type(model).__name__} does not have")
    return found[0], module.weight.shape[-1]


def batch_seeds(seed: int, step: int, process: int) -> tuple[int, int]:
    """Of the choice of rows, and of their noise: no two are the same in a run of up to 4,096 processes."""
    first = 2 * ((seed * 1_000_003 + step) * 4096 + process)
    return first, first + 1


def losses_of_batch(
    student: NetworkDenoiser, teacher: Any, process: Any, x_0: Tensor, args: argparse.Namespace, seed: int
) -> Tensor:
    """Loss of each row, (B,), with times, noise and latents that the seed says."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(len(x_0), generator=generator, dtype=torch.float64).to(x_0.device)

    def logits(x_t: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        return student(x_t, t, latent=latent)

    if args.method == "di4c":
        low = args.distilled_below
        is_low = torch.rand(len(x_0), generator=generator, dtype=torch.float64).to(x_0.device) < 0.3
        t = torch.where(is_low, low * (1 - u), low + (1 - low) * (1 - u)).clamp(min=1e-4)
        before = t - torch.minimum(torch.full_like(t, args.teacher_step), t / 2)
        losses = di4c_losses(logits, teacher, process, x_0, t, before, args.num_latents, generator)
        return total_loss(losses, t, low, args.correlation_scale)
    t = (args.teacher_step + (1 - args.teacher_step) * (1 - u)).clamp(max=1.0)
    x_t = process.add_noise(x_0, t, generator)
    share = torch.arange(args.teacher_steps + 1, dtype=torch.float64, device=t.device)[:, None] / args.teacher_steps
    times = t - share * torch.minimum(torch.full_like(t, args.teacher_step * args.teacher_steps), t)
    target = sdtt_targets(teacher, process, x_t, times, generator)
    log_p = clean_log_p(logits(x_t, t, torch.zeros_like(t)), process.mask_token_id)
    return sdtt_loss(log_p, target, x_t == process.mask_token_id)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The state, whole or as it was before. Through memory: to a file, torch calls a full disk an unexpected position."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with unwritten(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What `save_state` has written in a run with these arguments.

    Raises:
        ValueError: If it is of a run with others, or damaged.
    """
    try:  # of two processes on CPUs the device is "cpu:0"
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or start again in another `--output_dir`") from error
    changed = {k: (state["identity"].get(k), v) for k, v in identity.items() if state["identity"].get(k) != v}
    if changed:
        raise ValueError(f"{path} belongs to a run with other arguments (saved, now): {changed}")
    return state


def load_data(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: DiscreteDiffusionPipeline,
    length: int,
    identity: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Sequences to learn on, (n, L), and others to measure on: texts, or what the model draws, one token a call.

    Raises:
        ValueError: If there are texts and no tokenizer, or too few sequences.
    """
    texts, sizes = load_texts(args), [args.max_data_samples, args.num_eval_samples]
    if texts is not None:
        if pipe.tokenizer is None:
            raise ValueError("texts need a tokenizer, which this model does not bring: leave out data arguments")
        fit, heldout = (
            pack(part, pipe.tokenizer, length, size)
            for part, size in zip((texts.fit, texts.heldout), sizes, strict=True)
        )
        return fit, heldout
    path = args.output_dir / SAMPLES
    if args.resume_from_checkpoint and path.is_file():
        drawn = load_state(path, identity)["samples"]
    else:
        share = range(accelerator.process_index, sum(sizes), accelerator.num_processes)
        drawn = gather_samples(accelerator, sample(FrozenTexts(pipe, length), DATA, share, length, args), sum(sizes))
        before_end(lambda: None)  # SIGTERM waits for the file, and then all processes stop
        if accelerator.is_main_process:
            save_state(path, {"identity": identity, "samples": drawn})
        stop_if_asked(accelerator)
    fit, heldout = drawn.split(sizes)
    return fit, heldout


@ends_at_sigterm
def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    accelerator = Accelerator()
    if args.max_data_samples < accelerator.num_processes:
        raise ValueError(
            f"`--max_data_samples` {args.max_data_samples} leaves some of {accelerator.num_processes} processes idle"
        )
    set_seed(args.seed + 1)  # the first weights, the same in all processes
    pipe = DiscreteDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision)
    pipe.to(accelerator.device).set_progress_bar_config(disable=True)
    if pipe.scheduler.config.process != "absorbing":
        raise ValueError(
            "`--pretrained_model_name_or_path` is a uniform-noise model; these methods are for masked models"
        )
    length = sequence_length(args, pipe)
    name, width = embedding_of(pipe.model, args.embedding)
    if accelerator.is_main_process:  # from here on there are files
        output_folder(args.output_dir)
    accelerator.wait_for_everyone()
    facts = {name: pipe.config.denoiser[name] for name in ("vocab_size", "mask_token_id", "noise_schedule")}
    pipe.scheduler = AncestralScheduler(**facts)
    identity = identity_of(args) | {"num_processes": accelerator.num_processes}
    data, heldout = load_data(args, accelerator, pipe, length, identity)

    lora = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "target_modules": args.lora_target_modules}
    model = LatentModel(pipe.model.eval(), name, width, lora=lora)
    if args.method == "sdtt":
        model.latent_embedding.requires_grad_(False)  # stays 0: a product of positions
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, weight_decay=0
    )
    path, begin = args.output_dir / STATE, 0
    if args.resume_from_checkpoint and path.is_file():
        state = load_state(path, identity)
        begin = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for key, parameter in model.adapter().items():
                parameter.copy_(state["adapter"][key])
    prepared, optimizer = accelerator.prepare(model, optimizer)
    arguments = dict(pipe.config.denoiser)
    student = NetworkDenoiser(prepared, **arguments)

    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad(), model.disabled() as network:
            return NetworkDenoiser(network, **arguments)(x_t, t)

    done = saved = begin

    def checkpoint() -> None:
        nonlocal saved
        if accelerator.is_main_process and saved != done:
            adapter = {key: parameter.detach().cpu() for key, parameter in model.adapter().items()}
            state = {"step": done, "identity": identity, "adapter": adapter, "optimizer": optimizer.state_dict()}
            save_state(path, state)
        saved = done

    before_end(checkpoint)
    progress = tqdm(range(begin, args.max_train_steps), disable=not accelerator.is_main_process)
    for step in progress:
        of_rows, of_noise = batch_seeds(args.seed, step, accelerator.process_index)
        rows = torch.randint(len(data), (args.train_batch_size,), generator=torch.Generator().manual_seed(of_rows))
        x_0 = data[rows].to(accelerator.device)
        loss = losses_of_batch(student, teacher, pipe.scheduler.noise_process, x_0, args, of_noise).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        done = step + 1
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            checkpoint()
        stop_if_asked(accelerator)
    before_end(None)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}

    model.latent_embedding.requires_grad_(True)  # part of the adapter's file, also where it is 0
    learned_for = {"base_model": args.pretrained_model_name_or_path, "revision": args.revision, "method": args.method}
    learned_for["vocab_size"] = facts["vocab_size"]
    scheduler = LearnedScheduler(**facts, learned_for=learned_for, network_latent=True)
    with published(args.output_dir, "scheduler_config.json") as folder:
        model.save_pretrained(folder)
        scheduler.save_pretrained(folder)
    with model.disabled():  # at the end: other processes would wait for it, longer than they may
        table = measure(pipe, "frozen network", heldout, args)
    pipe.model, pipe.scheduler = model, scheduler
    table += measure(pipe, args.method, heldout, args)
    metrics = {"table": table, "arguments": identity, "data_entropy": unigram_entropy(heldout).mean().item()}
    write_text(args.output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    repo_id = args.hub_model_id or args.output_dir.resolve().name
    card = {"method": args.method, "base_model": args.pretrained_model_name_or_path, "table": markdown_table(table)}
    card |= {"arguments": json.dumps(identity, indent=2), "data_entropy": metrics["data_entropy"]}
    gap = f"; too high by\nJensen's gap of {args.num_eval_latents} latents" if args.method == "di4c" else ""
    card |= {"gap": gap, "title": repo_id.split("/")[-1]}
    write_text(args.output_dir / "README.md", CARD.format(**card, repo_id=repo_id))
    accelerator.print(markdown_table(table))
    if args.push_to_hub:
        repo_id = create_repository(args.output_dir, repo_id, args.hub_token)
        write_text(args.output_dir / "README.md", CARD.format(**card, repo_id=repo_id))  # now with the namespace
        accelerator.print(f"pushed: {upload(args.output_dir, repo_id, args.hub_token)}")
    return metrics


def measure(
    pipe: DiscreteDiffusionPipeline, name: str, heldout: Tensor, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """NLL bound and entropy of samples at each budget, rows of the table."""
    denoiser, scheduler = pipe.denoiser, pipe.scheduler
    mixes = isinstance(pipe.model, LatentModel) and args.method == "di4c"

    def network(x_t: Tensor, t: Tensor, positions: Tensor, latent: Tensor) -> RowLogits:
        return denoiser(x_t, t, positions, latent=latent) if mixes else denoiser(x_t, t, positions)

    rows = []
    for steps in args.num_inference_steps:
        bounds = []
        for number, part in enumerate(heldout.to(pipe.device).split(args.train_batch_size)):
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
            latents = args.num_eval_latents if mixes else 1
            bounds.append(mixture_nll_bound(network, scheduler, part, steps, latents, generator))
        samples = sample(FrozenTexts(pipe, heldout.shape[1]), JUDGED, range(args.num_eval_samples), steps, args)
        row = {"network": name, "steps": steps, "nll": torch.cat(bounds).mean().item()}
        rows.append(row | {"entropy": unigram_entropy(samples).mean().item()})
    return rows


if __name__ == "__main__":
    main()
