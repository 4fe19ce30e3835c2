r"""Train a bundled masked diffusion model from its corpus: tokenizer, network, scheduler, card.

    accelerate launch training/pretrain.py --output_dir tiny-text --mixed_precision bf16
    accelerate launch training/pretrain.py --data molecules --output_dir tiny-molecule --mixed_precision bf16 \
        --sequence_length 30 --hidden_size 176 --num_blocks 4 --max_train_steps 10000

`--data text` reads a running text in windows of byte-level BPE. `--data molecules` reads one SMILES string a line, atom by
atom. A line is a sequence, filled up with an end token that the model predicts like any other: so it writes the length too.

The loss is the mean cross-entropy over masked tokens with the masked share drawn uniformly (MDLM's objective without its
1/t weight: the same optimum, and faster at this size). Each step's data and noise are a function of (seed, step), so a run
that is killed and started again with `--resume_from_checkpoint latest` ends with the weights of one that was not.

Sources: Sahoo et al. 2024 (MDLM, eq. 10), Zheng et al. 2024 (the weights in front do not move the optimum).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from discrete_schedulers import AncestralScheduler, DDiTModel, DiscreteDiffusionPipeline, information_curve
from discrete_schedulers.molecules import NO_RDKIT, molecule_metrics
from discrete_schedulers.training.files import output_folder, published, remove, unwritten
from discrete_schedulers.training.hub import check_counts
from discrete_schedulers.training.prepare_molecules import SMILES_TOKEN, smiles_tokens
from discrete_schedulers.training.signals import before_end, ends_at_sigterm, stop_if_asked

END_TOKEN, MASK_TOKEN = "[END]", "[MASK]"
FREE = {  # what a run may change when it goes on
    *("output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "num_eval_samples"),
}

CARD = """---
library_name: discrete_schedulers
license: apache-2.0
tags: [discrete-diffusion, masked-diffusion, text]
---

# tiny-text

A masked diffusion model of English text, small enough for tests, examples and measurements on a CPU.

- **Network**: DDiT without time input, {num_blocks} blocks of width {hidden_size}, {parameters:,} parameters, half precision.
- **Tokens**: byte-level BPE, {vocab_size} ids (the last is the mask), packed sequences of {sequence_length}.
- **Data**: `corpus/`, made from the World English Bible (public domain; changed, hence not called by that name) by
  `training/prepare_corpus.py`. Of every 30 chapters one is kept for validation and one for test; no training saw them.
- **Training**: {steps:,} steps of {train_batch_size} sequences, AdamW, learning rate {learning_rate}, {seconds:,} seconds on a
  CPU that did other work meanwhile. One command: `accelerate launch training/pretrain.py --output_dir tiny-text
  --mixed_precision {mixed_precision} --max_train_steps {max_train_steps}`.
- **Held-out bound** (validation, any order): {validation_nats_per_token:.3f} nats per token,
  {validation_bits_per_character:.3f} bits per character.
- **Licence**: Apache-2.0 for the weights, the text is in the public domain.

It writes in the style of its only book and knows nothing. Samples, {sequence_length} steps, the first of seed 0, not chosen:

{samples}
"""

MOLECULE_CARD = """---
library_name: discrete_schedulers
license: mit
tags: [discrete-diffusion, masked-diffusion, molecules, smiles]
---

# tiny-molecule

A masked diffusion model of drug-like molecules, small enough for tests, examples and measurements on a CPU.

- **Network**: DDiT with learned positions and without time input, {num_blocks} blocks of width {hidden_size}, {parameters:,}
  parameters, half precision.
- **Tokens**: atoms, bonds, brackets and ring numbers of SMILES; {vocab_size} ids, the last two the end and the mask token.
  A molecule has at most {sequence_length} tokens; shorter ones are filled up with the end token, which the model writes itself.
- **Data**: `corpus/`, the molecules of MOSES (Polykovskiy et al. 2020, MIT licence; a filtered part of ZINC) with at most
  {sequence_length} tokens, by `training/prepare_molecules.py`. Validation and test come from MOSES' own test split; no
  training saw them.
- **Training**: {steps:,} steps of {train_batch_size} molecules, AdamW, learning rate {learning_rate}, {seconds:,} seconds on a
  CPU that did other work meanwhile. One command: `accelerate launch training/pretrain.py --data molecules
  --output_dir tiny-molecule --mixed_precision {mixed_precision} --sequence_length {sequence_length}
  --hidden_size {hidden_size} --num_blocks {num_blocks} --max_train_steps {max_train_steps}`.
- **Held-out bound** (validation, any order): {validation_nats_per_token:.3f} nats per token (end tokens count),
  {validation_bits_per_character:.3f} bits per character.
- **Licence**: MIT, as the data.

{num_eval_samples:,} samples of seed 0 at each temperature, fixed counts at random places, {judged_steps} steps, judged by RDKit
{rdkit}; novelty is against the training split:

{quality}

It knows which strings look like the molecules of its corpus, nothing of chemistry beyond that. The first samples of seed 0,
not chosen:

{samples}
"""
SIZES = (
    "hidden_size",
    "num_blocks",
    "num_heads",
    "sequence_length",
    "vocab_size",
    "cond_dim",
    "num_codes",
    "patch_size",
)
JUDGED_STEPS = 64  # more than a molecule has tokens: one token a step


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where checkpoints and the finished model go.")
    parser.add_argument("--data", choices=["text", "molecules"], default="text", help="How the corpus is to be read.")
    parser.add_argument("--corpus_dir", type=Path, default=None, help="Folder with {train,validation,test}.txt.xz.")
    # The model
    parser.add_argument("--vocab_size", type=int, default=2048, help="Tokens of text, the mask token included.")
    parser.add_argument("--sequence_length", type=int, default=64)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_blocks", type=int, default=5)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--max_train_steps", type=int, default=24_000)
    parser.add_argument("--num_eval_samples", type=int, default=400, help="Molecules that the card judges.")
    add_fit_arguments(parser)
    args = check_fit_arguments(parser, parser.parse_args(argv))
    check_counts(parser, args, ["num_eval_samples"])
    if args.data == "molecules" and find_spec("rdkit") is None:
        parser.error(f"--data molecules: {NO_RDKIT}")
    return args


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """What `fit` reads, apart from `--output_dir` and `--max_train_steps`."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_batch_size", type=int, default=32, help="Sequences per process and step.")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--lr_decay_share", type=float, default=0.6, help="Last share of the run with a falling rate.")
    parser.add_argument("--weight_decay", type=float, default=0.02)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", default=None, help="A checkpoint folder, or `latest`.")


def check_fit_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, or an error of the parser about one of them."""
    counts = ["max_train_steps", "train_batch_size", "lr_warmup_steps", "checkpointing_steps"]
    check_counts(parser, args, [*counts, "checkpoints_total_limit", *(name for name in SIZES if name in args)])
    if args.hidden_size % args.num_heads:
        parser.error(f"--hidden_size is {args.hidden_size}; it must be a multiple of --num_heads {args.num_heads}")
    if not 0 < args.lr_decay_share <= 1:
        parser.error(f"--lr_decay_share is {args.lr_decay_share}; allowed are numbers in (0, 1]")
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} is {getattr(args, name)}; it must be positive and finite")
    if not 0 <= args.weight_decay < math.inf:
        parser.error(f"--weight_decay is {args.weight_decay}; allowed are numbers of at least 0")
    if not 0 <= args.ema_decay < 1:
        parser.error(f"--ema_decay is {args.ema_decay}; allowed are numbers in [0, 1)")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file; it must be a folder, or not there")
    resumed = args.resume_from_checkpoint
    if resumed not in (None, "latest") and not (Path(resumed) / "state.safetensors").is_file():
        parser.error(
            f"--resume_from_checkpoint {resumed} is not a checkpoint; it must be a folder with state.safetensors"
        )
    return args


def read_split(corpus_dir: Path | None, split: str, model: str = "tiny-text") -> str:
    """The text of one split of the corpus; the one of a bundled model where no folder is named.

    Raises:
        ValueError: If the file is not there, not compressed text, or empty.
    """
    folder = corpus_dir or files("discrete_schedulers") / "assets" / model / "corpus"
    path = folder / f"{split}.txt.xz"
    try:
        text = lzma.decompress(path.read_bytes()).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`--corpus_dir`: {path} could not be read ({type(error).__name__}: {error}); it must be UTF-8 text in xz"
        ) from error
    if not text.strip():
        raise ValueError(f"`--corpus_dir`: {path} has no text; it must have some")
    return text


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training split; the mask token takes the last id.

    Raises:
        ValueError: If the text has too few different pairs for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([MASK_TOKEN])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"`--vocab_size` is {vocab_size}, but this corpus makes {tokenizer.get_vocab_size()} tokens, the mask included: "
            "they must be equal"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token=MASK_TOKEN, clean_up_tokenization_spaces=False
    )


def smiles_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """The tokens that occur in these SMILES strings, one a line; then the end token, and the mask token as the last id.

    The end token is what sequences are filled up with. It is a state that the model writes; decoding leaves it out.
    """
    tokens = sorted(set(smiles_tokens(text)))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*tokens, END_TOKEN, MASK_TOKEN])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES_TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_TOKEN, MASK_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        mask_token=MASK_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def text_rows(tokenizer: PreTrainedTokenizerFast, text: str, length: int, stride: int) -> Tensor:
    """Windows (R, L) of a running text, one every `stride` tokens.

    Raises:
        ValueError: If there are not more than L tokens.
    """
    stream = torch.tensor(tokenizer(text)["input_ids"])
    if len(stream) <= length:
        raise ValueError(f"`--sequence_length` is {length}, but a split has {len(stream)} tokens: it must have more")
    return stream.unfold(0, length, stride)


def molecule_rows(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> Tensor:
    """One row (R, L) a line, filled up with the end token.

    Raises:
        ValueError: If a line has more than L tokens.
    """
    rows = tokenizer(text.splitlines())["input_ids"]
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(f"`--sequence_length` is {length}, but a molecule has {longest} tokens")
    return torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows])


def initialise(model: DDiTModel) -> None:
    """Residual branches and head start at zero: the first steps are then a unigram model, and none of them is lost. Where
    blocks are modulated, they start as if they were not, with open gates: closed ones would keep the branches at zero."""
    block: Any
    for block in model.blocks:
        if block.adaLN_modulation is not None:
            nn.init.zeros_(block.adaLN_modulation.weight)
            nn.init.zeros_(block.adaLN_modulation.bias)
            for gate in block.adaLN_modulation.bias.data.chunk(6)[2::3]:  # shift, scale, gate of each branch
                gate.fill_(1.0)
        nn.init.zeros_(block.attn_out.weight)
        nn.init.zeros_(block.mlp[2].weight)
        nn.init.zeros_(block.mlp[2].bias)
    nn.init.zeros_(model.output_layer.linear.weight)
    nn.init.zeros_(model.output_layer.linear.bias)


def draw_batch(rows: Tensor, batch: int, seed: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Clean tokens (B, L), drawn from all `rows` (R, L), and where they are masked: a function of (seed, step, rank) alone."""
    generator = torch.Generator().manual_seed(hash((seed, step, rank)) % 2**63)
    clean = rows[torch.randint(len(rows), (batch,), generator=generator)]
    return clean, draw_masks(batch, clean.shape[1], generator)


def draw_masks(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Which tokens are masked, bool (B, L), at least one a row. The masked share is stratified over the batch, so that every
    step sees all noise levels."""
    share = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch  # (B,) in [0, 1)
    noise = torch.rand(batch, length, generator=generator)
    is_masked = noise < share.clamp(min=1.0 / length)[:, None]
    return is_masked | (noise == noise.amin(1, keepdim=True))


def learning_rate_factor(step: int, args: argparse.Namespace) -> float:
    """Warm up, stay, fall linearly to zero."""
    remaining = (args.max_train_steps - step) / (args.lr_decay_share * args.max_train_steps)
    return min(1.0, (step + 1) / args.lr_warmup_steps, max(0.0, remaining))


@torch.no_grad()
def heldout_nats_per_token(
    model: DDiTModel, clean: Tensor, mask_token_id: int, class_labels: Tensor | None = None
) -> float:
    """Mean cross-entropy of masked tokens of (N, L) clean ones over uniform masked shares: the model's any-order bound."""
    device, total, generator = next(model.parameters()).device, 0.0, torch.Generator().manual_seed(0)
    for rows in torch.arange(len(clean)).split(64):
        opened = torch.randint(clean.shape[1], (len(rows), 1), generator=generator)  # revealed tokens, 0 .. L - 1
        rank = torch.rand(len(rows), clean.shape[1], generator=generator).argsort(1).argsort(1)
        is_masked = rank >= opened
        ids = clean[rows].masked_fill(is_masked, mask_token_id).to(device)
        labels = {} if class_labels is None else {"class_labels": class_labels[rows].to(device)}
        logits = model.head(model.hidden(ids, **labels)).float()
        loss = F.cross_entropy(logits.transpose(1, 2), clean[rows].to(device), reduction="none").cpu()
        total += float(((loss * is_masked).sum(1) / is_masked.sum(1)).sum())
    return total / len(clean)


def identity(args: argparse.Namespace, num_processes: int) -> dict[str, Any]:
    """What the weights depend on."""
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {name: value for name, value in told.items() if name not in FREE} | {"num_processes": num_processes}


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], step: int, seconds: float, identity: dict[str, Any]
) -> None:
    """Write under a temporary name, then rename: a killed run never leaves half a checkpoint."""
    with unwritten(path) as temporary:
        temporary.mkdir(parents=True)
        facts = {"step": str(step), "seconds": str(seconds), "identity": json.dumps(identity)}
        save_file(tensors, temporary / "state.safetensors", facts)


def checkpoints(output_dir: Path) -> list[Path]:
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def training_state(model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, their moving average and the optimizer's moments as one flat dictionary of tensors."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"average.{k}": v for k, v in average.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{key}.{name}"] = value
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def load_checkpoint(
    path: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
) -> tuple[int, float]:
    """Put a saved state back; returns the step to go on from and the seconds already spent.

    Raises:
        ValueError: If there is none, it is damaged, or of a run with other arguments.
    """
    try:
        file = safe_open(path / "state.safetensors", "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"`--resume_from_checkpoint` {path} has no whole state.safetensors ({error}): delete it and resume from another one"
        ) from error
    with file as state:
        saved = json.loads(state.metadata().get("identity", "{}"))
        changed = {k: (saved.get(k), v) for k, v in identity.items() if saved.get(k) != v}
        if changed:
            raise ValueError(f"checkpoint {path} belongs to a run with other arguments (saved, now): {changed}")
        model.load_state_dict({k: state.get_tensor(f"model.{k}") for k in model.state_dict()})
        for name in average:
            average[name].copy_(state.get_tensor(f"average.{name}"))
        for name, parameter in model.named_parameters():
            moments = {key: state.get_tensor(f"optimizer.{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
            optimizer.state[parameter]["step"] = state.get_tensor(f"optimizer.step.{name}")  # AdamW keeps it on the CPU
        return int(state.metadata()["step"]), float(state.metadata()["seconds"])


@ends_at_sigterm
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)

    # Data
    length, bundled = args.sequence_length, {"text": "tiny-text", "molecules": "tiny-molecule"}[args.data]
    train_text, heldout_text = (read_split(args.corpus_dir, split, bundled) for split in ("train", "validation"))
    if args.data == "text":
        tokenizer = train_tokenizer(train_text, args.vocab_size)
        rows = text_rows(tokenizer, train_text, length, 1)[:-1]
        heldout = text_rows(tokenizer, heldout_text, length, length)
        heldout_tokens = len(tokenizer(heldout_text)["input_ids"])
    else:
        tokenizer = smiles_tokenizer(train_text)
        args.vocab_size = len(tokenizer)
        rows, heldout = (molecule_rows(tokenizer, text, length) for text in (train_text, heldout_text))
        heldout_tokens = heldout.numel()
    accelerator.print(f"{len(rows):,} rows of {length} tokens to train on, {len(heldout):,} held out")

    # Model
    torch.manual_seed(args.seed)
    model = DDiTModel(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_blocks=args.num_blocks,
        num_heads=args.num_heads,
        cond_dim=None,
        max_length=args.sequence_length,
        time_conditioning=False,
        absolute_positions=args.data == "molecules",
    )

    def draw(step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return *draw_batch(rows, args.train_batch_size, args.seed, step, accelerator.process_index), {}

    model, seconds = fit(model, draw, args.vocab_size - 1, accelerator, args)
    if accelerator.is_main_process:
        nats = heldout_nats_per_token(model, heldout, args.vocab_size - 1)
        bits_per_character = nats * heldout_tokens / len(heldout_text) / math.log(2)
        results = {"steps": args.max_train_steps, "seconds": round(seconds), "validation_nats_per_token": nats}
        results |= {"validation_bits_per_character": bits_per_character}
        results |= {"parameters": sum(p.numel() for p in model.parameters())}
        save_pipeline(model, tokenizer, heldout, args, results)
        accelerator.print(json.dumps(results))


def fit(
    model: DDiTModel,
    draw: Callable[[int], tuple[Tensor, Tensor, dict[str, Tensor]]],
    mask_token_id: int,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> tuple[DDiTModel, float]:
    """Train a denoiser for absorbing noise, from the newest checkpoint where it is to resume.

    Args:
        model (`DDiTModel`): The network, new; its residual branches and head are set to zero.
        draw (`Callable`): Step number to clean tokens (B, L), where they are masked, and further arguments of the network.
        mask_token_id (`int`): What the network sees at masked positions.
        accelerator (`Accelerator`): Device, precision and processes.
        args (`argparse.Namespace`): Those of `add_fit_arguments`, `output_dir` and `max_train_steps`.

    Returns:
        `tuple`: The network with the moving average of its weights, in evaluation mode, and the seconds of all runs.
    """
    initialise(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    model, optimizer = accelerator.prepare(model, optimizer)
    network = accelerator.unwrap_model(model)
    average = {name: p.detach().clone() for name, p in network.named_parameters()}

    # Resume
    if accelerator.is_main_process:  # what came before refuses without a trace
        output_folder(args.output_dir)
    accelerator.wait_for_everyone()
    step, seconds = 0, 0.0
    same = identity(args, accelerator.num_processes)
    known = checkpoints(args.output_dir)
    if args.resume_from_checkpoint and (known or args.resume_from_checkpoint != "latest"):
        path = known[-1] if args.resume_from_checkpoint == "latest" else Path(args.resume_from_checkpoint)
        step, seconds = load_checkpoint(path, network, average, optimizer.optimizer, same)
        accelerator.print(f"resumed from {path} at step {step}")

    # Train
    began, running, saved = time.time() - seconds, None, step

    def checkpoint() -> None:
        nonlocal saved
        if accelerator.is_main_process and saved != step:
            state = training_state(network, average, optimizer.optimizer)
            save_checkpoint(args.output_dir / f"checkpoint-{step}", state, step, time.time() - began, same)
            for old in checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                remove(old)
        saved = step

    before_end(checkpoint)
    while step < args.max_train_steps:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(step, args)
        clean, is_masked, conditions = draw(step)
        clean, is_masked = clean.to(accelerator.device), is_masked.to(accelerator.device)
        conditions = {name: value.to(accelerator.device) for name, value in conditions.items()}
        noisy = clean.masked_fill(is_masked, mask_token_id)
        with accelerator.autocast():
            logits = model(noisy, positions=is_masked, **conditions).logits
        loss = F.cross_entropy(logits.float(), clean[is_masked])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(args.ema_decay, step / (step + 10.0))
        for name, parameter in network.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            accelerator.print(f"step {step} loss {running:.3f} {time.time() - began:.0f} s", flush=True)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            checkpoint()
            accelerator.wait_for_everyone()
        stop_if_asked(accelerator)
    before_end(None)

    # Finish: the moving average is the model
    for name, parameter in network.named_parameters():
        parameter.data.copy_(average[name])
    return network.eval(), time.time() - began


def save_pipeline(
    network: DDiTModel, tokenizer: PreTrainedTokenizerFast, heldout: Tensor, args: argparse.Namespace, results: dict
) -> None:
    """The folder that `DiscreteDiffusionPipeline.from_pretrained` reads: half-precision weights, tokenizer, scheduler with the
    model's information curve, and a card with samples."""
    scheduler = AncestralScheduler(vocab_size=args.vocab_size, mask_token_id=args.vocab_size - 1)
    pipe = DiscreteDiffusionPipeline(network, scheduler, tokenizer)
    curve = information_curve(
        pipe.denoiser, heldout[:256], args.vocab_size - 1, generator=torch.Generator().manual_seed(0)
    )
    scheduler.register_to_config(information_curve=curve.to_config())
    pipe.set_progress_bar_config(disable=True)
    card = text_card(pipe, args, results) if args.data == "text" else molecule_card(pipe, args, results)
    with published(args.output_dir, "model_index.json") as folder:
        pipe.to(torch.float16).save_pretrained(folder)
        (folder / "pretrain_metrics.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "README.md").write_text(card)


def samples_at(pipe: DiscreteDiffusionPipeline, temperature: float, num_samples: int, steps: int) -> list[str]:
    """Samples of seed 0 with fixed counts at random places."""
    sampler = AncestralScheduler.from_config(pipe.scheduler.config, temperature=temperature)
    other = DiscreteDiffusionPipeline(pipe.model, sampler, pipe.tokenizer)
    other.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    _, texts, _ = other(num_samples=num_samples, num_inference_steps=steps, generator=generator, return_dict=False)
    return texts


def text_card(pipe: DiscreteDiffusionPipeline, args: argparse.Namespace, results: dict) -> str:
    """The card with three samples at each of two temperatures."""
    quoted = []
    for temperature in (1.0, 0.8):
        samples = samples_at(pipe, temperature, 3, args.sequence_length)
        quoted += [f"Temperature {temperature}:", *("> " + sample.replace("\n", " / ") for sample in samples)]
    return CARD.format(**vars(args), **results, samples="\n\n".join(quoted))


def molecule_card(pipe: DiscreteDiffusionPipeline, args: argparse.Namespace, results: dict) -> str:
    """The card with RDKit's judgement of samples at two temperatures, which goes into `results` too, and with a few of them."""
    known = read_split(args.corpus_dir, "train", "tiny-molecule").splitlines()
    judged = results["judged"] = {}
    lines = ["| temperature | valid | unique | novel | internal diversity |", "| ---: | ---: | ---: | ---: | ---: |"]
    quoted = []
    for temperature in (1.0, 0.8):
        samples = samples_at(pipe, temperature, args.num_eval_samples, JUDGED_STEPS)
        judged[str(temperature)] = numbers = molecule_metrics(samples, known)
        lines.append(f"| {temperature} | " + " | ".join(f"{value:.3f}" for value in numbers.values()) + " |")
        quoted += [f"Temperature {temperature}:", "", *(f"    {sample}" for sample in samples[:6]), ""]
    found = {"quality": "\n".join(lines), "samples": "\n".join(quoted[:-1])}
    found |= {"judged_steps": str(JUDGED_STEPS), "rdkit": version("rdkit")}
    return MOLECULE_CARD.format(**vars(args), **results, **found)


if __name__ == "__main__":
    main()
