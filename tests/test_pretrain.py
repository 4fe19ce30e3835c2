"""The training of the bundled model in miniature, its corpus, and the bundled model itself."""

from __future__ import annotations

import json
import lzma
import math
import random
import re
import warnings
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from discrete_schedulers import (
    AncestralScheduler,
    DDiTModel,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    InformationCurve,
    LearnedScheduler,
)
from discrete_schedulers.training import pretrain

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "src" / "discrete_schedulers" / "assets" / "tiny-text"
V, LENGTH, STEPS = 300, 16, 40
SMALL = [
    "--vocab_size",
    "300",
    "--sequence_length",
    "16",
    "--hidden_size",
    "32",
    "--num_blocks",
    "1",
    "--num_heads",
    "2",
]
SMALL += ["--max_train_steps", "40", "--train_batch_size", "16", "--lr_warmup_steps", "5", "--checkpointing_steps", "8"]
SMALL += ["--learning_rate", "0.02", "--ema_decay", "0.9"]
WORDS = "the a of light water house king people went saw came made and to in upon great small river stone bread".split()


def write_corpus(folder: Path) -> Path:
    words = random.Random(0)
    folder.mkdir()
    for split, lines in {"train": 120, "validation": 30, "test": 5}.items():
        text = "".join(" ".join(words.choices(WORDS, k=12)).capitalize() + ".\n" for _ in range(lines))
        (folder / f"{split}.txt.xz").write_bytes(lzma.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("pretrain") / "corpus")


@pytest.fixture(scope="module")
def finished(corpus: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = corpus.parent / "finished"
    pretrain.main([*SMALL, "--corpus_dir", str(corpus), "--output_dir", str(folder)])
    return folder


def small_model() -> DDiTModel:
    model = DDiTModel(
        vocab_size=V,
        hidden_size=32,
        num_blocks=1,
        num_heads=2,
        cond_dim=None,
        max_length=LENGTH,
        time_conditioning=False,
    )
    pretrain.initialise(model)
    return model


# The run


def test_finished_folder(finished: Path, corpus: Path) -> None:
    pipe = DiscreteDiffusionPipeline.from_pretrained(finished)
    pipe.set_progress_bar_config(disable=True)
    texts = pipe(num_samples=4, num_inference_steps=8, generator=torch.Generator().manual_seed(0)).texts
    assert len(set(texts)) == 4
    assert not any(pretrain.MASK_TOKEN in text for text in texts)
    assert isinstance(pipe.scheduler, AncestralScheduler)
    assert len(InformationCurve.from_config(pipe.scheduler.config.information_curve).values) == LENGTH
    assert (pipe.scheduler.config.vocab_size, pipe.scheduler.config.mask_token_id) == (V, V - 1)
    assert pipe.tokenizer.mask_token_id == V - 1

    metrics = json.loads((finished / "pretrain_metrics.json").read_text())
    nats = metrics["validation_nats_per_token"]
    assert 1 < nats < math.log(V) - 2  # it has learned
    assert metrics["steps"] == STEPS
    assert metrics["parameters"] == sum(p.numel() for p in pipe.model.parameters())
    text = pretrain.read_split(corpus, "validation")
    tokens = len(pipe.tokenizer(text)["input_ids"])
    assert metrics["validation_bits_per_character"] == pytest.approx(nats * tokens / len(text) / math.log(2))
    card = ModelCard.load(finished / "README.md")
    assert card.data.license == "apache-2.0"
    assert f"{nats:.3f} nats per token" in card.text
    weights = load_file(finished / "model" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_weights_are_the_moving_average(finished: Path) -> None:
    state = load_file(finished / f"checkpoint-{STEPS}" / "state.safetensors")
    weights = load_file(finished / "model" / "diffusion_pytorch_model.safetensors")
    parameters = [name.removeprefix("average.") for name in state if name.startswith("average.")]
    assert len(parameters) > 10
    for name in parameters:
        assert torch.equal(weights[name], state[f"average.{name}"].half())
        assert not torch.equal(state[f"average.{name}"], state[f"model.{name}"])


@pytest.mark.parametrize("stops", [[1, 3], [2, 1, 1]])
def test_stopped_and_resumed_to_the_same_bits(
    finished: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    """Stopped right after so many more checkpoints, each time: weights, averages and moments end as if nothing had been."""
    given = [*SMALL, "--corpus_dir", str(corpus), "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    save = pretrain.save_checkpoint
    for saves in stops:
        left = saves

        def save_and_stop(*args: Any) -> None:
            nonlocal left
            save(*args)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "save_checkpoint", save_and_stop)
            with pytest.raises(KeyboardInterrupt):
                pretrain.main(given)
    assert pretrain.checkpoints(tmp_path)[-1].name == f"checkpoint-{8 * sum(stops)}"
    pretrain.main(given)
    for file in (f"checkpoint-{STEPS}/state.safetensors", "model/diffusion_pytorch_model.safetensors"):
        ours, theirs = load_file(tmp_path / file), load_file(finished / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in pretrain.checkpoints(tmp_path)] == [
        "checkpoint-32",
        "checkpoint-40",
    ]  # the limit is 2
    nats = [
        json.loads((f / "pretrain_metrics.json").read_text())["validation_nats_per_token"] for f in (tmp_path, finished)
    ]
    assert nats[0] == nats[1]


def test_a_checkpoint_of_other_arguments_is_refused(finished: Path, corpus: Path) -> None:
    given = [*SMALL, "--corpus_dir", str(corpus), "--output_dir", str(finished), "--resume_from_checkpoint", "latest"]
    told = r"checkpoint-40 belongs to a run with other arguments \(saved, now\): \{'learning_rate': \(0.02, 0.01\)\}"
    with pytest.raises(ValueError, match=told):
        pretrain.main([*given, "--learning_rate", "0.01", "--checkpoints_total_limit", "5"])
    with pytest.raises(ValueError, match=r"'hidden_size': \(32, 64\)"):
        pretrain.main([*given, "--hidden_size", "64"])


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-8.tmp").mkdir()  # what a kill while writing leaves
    (tmp_path / "checkpoint-old").mkdir()
    assert pretrain.checkpoints(tmp_path) == []
    for step in (8, 100, 9):
        pretrain.save_checkpoint(tmp_path / f"checkpoint-{step}", {"x": torch.ones(1)}, step, 1.5, {})
    assert [path.name for path in pretrain.checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-9", "checkpoint-100"]


REFUSED = {
    "--lr_warmup_steps 0": "--lr_warmup_steps is 0; it must be at least 1",
    "--checkpoints_total_limit 0": "--checkpoints_total_limit is 0",
    "--num_eval_samples 0": "--num_eval_samples is 0",
    "--data proteins": "invalid choice: 'proteins'",
    "--lr_decay_share 0": r"--lr_decay_share is 0.0; allowed are numbers in \(0, 1\]",
    "--mixed_precision fp16": "invalid choice: 'fp16'",
}


@pytest.mark.parametrize("extra", REFUSED)
def test_arguments_are_refused(extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.parse_args(["--output_dir", "x", *extra.split()])
    assert re.search(REFUSED[extra], capsys.readouterr().err)


def test_corpora_are_refused(corpus: Path, tmp_path: Path) -> None:
    given = [*SMALL, "--corpus_dir", str(corpus), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"`--vocab_size` is 5000, but this corpus makes \d+ tokens"):
        pretrain.main([*given, "--vocab_size", "5000"])
    with pytest.raises(ValueError, match=r"`--sequence_length` is 4000, but a split has \d+ tokens"):
        pretrain.main([*given, "--sequence_length", "4000"])


# Its parts


def test_learning_rate() -> None:
    """Up over 10 steps, flat, and down to zero over the last half of 100."""
    args = Namespace(max_train_steps=100, lr_decay_share=0.5, lr_warmup_steps=10)
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 30: 1.0, 50: 1.0, 51: 0.98, 75: 0.5, 99: 0.02, 100: 0.0, 130: 0.0}
    for step, factor in expected.items():
        assert pretrain.learning_rate_factor(step, args) == pytest.approx(factor)


def test_heldout_nats() -> None:
    model = small_model().eval()
    rows = torch.randint(V - 1, (130, LENGTH), generator=torch.Generator().manual_seed(0))
    nats = pretrain.heldout_nats_per_token(model, rows, V - 1)
    assert nats == pytest.approx(math.log(V), abs=1e-5)  # the head starts at zero
    with torch.no_grad():
        model.output_layer.linear.bias[7] = 3.0  # p(7) = e^3 / (V - 1 + e^3), whatever the context
    nats = pretrain.heldout_nats_per_token(model, torch.full((70, LENGTH), 7), V - 1)
    assert nats == pytest.approx(math.log(V - 1 + math.exp(3)) - 3, abs=1e-5)


def test_heldout_nats_are_means_over_orders() -> None:
    """A network that knows a token only if its left neighbour is open: i of L tokens open means that a masked token's
    neighbour is open with probability i / (L - 1) (none for the first position)."""

    class Neighbour(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def hidden(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.roll(ids, 1, 1).masked_fill(torch.arange(ids.shape[1]) == 0, V - 1)

        def head(self, left: torch.Tensor) -> torch.Tensor:
            certain = torch.nn.functional.one_hot((left + 1) % (V - 1), V) * 100.0
            return torch.where((left == V - 1)[..., None], 0.0, certain)

    rows = (torch.arange(LENGTH * 1600) % (V - 1)).view(-1, LENGTH)
    nats = pretrain.heldout_nats_per_token(Neighbour(), rows, V - 1)
    known = sum((LENGTH - 1) / LENGTH * i / (LENGTH - 1) for i in range(LENGTH)) / LENGTH
    assert nats == pytest.approx(math.log(V) * (1 - known), rel=0.03)


def test_tokenizer(corpus: Path) -> None:
    text = pretrain.read_split(corpus, "train")
    tokenizer = pretrain.train_tokenizer(text, V)
    assert len(tokenizer) == V
    assert tokenizer.mask_token_id == V - 1
    assert sorted(tokenizer.get_vocab().values()) == list(range(V))
    for sample in (text, "Ünïcode, tabs\tand\n\nlines; 123 \U0001f600"):  # bytes: nothing is unknown
        ids = tokenizer(sample)["input_ids"]
        assert max(ids) < V - 1
        assert tokenizer.decode(ids) == sample
    assert len(tokenizer(text)["input_ids"]) < 0.6 * len(text)
    assert tokenizer("the [MASK]")["input_ids"][-1] == V - 1


def test_batches() -> None:
    rows = torch.arange(1000).unfold(0, LENGTH, 1)
    clean, is_masked = pretrain.draw_batch(rows, 64, seed=1, step=5, rank=0)
    again = pretrain.draw_batch(rows, 64, seed=1, step=5, rank=0)
    assert torch.equal(clean, again[0])
    assert torch.equal(is_masked, again[1])
    for other in (
        {"seed": 2, "step": 5, "rank": 0},
        {"seed": 1, "step": 6, "rank": 0},
        {"seed": 1, "step": 5, "rank": 1},
    ):
        assert not torch.equal(pretrain.draw_batch(rows, 64, **other)[0], clean)
    assert torch.equal(clean - clean[:, :1], torch.arange(LENGTH).expand(64, -1))  # windows of the stream
    assert is_masked.any(1).all()
    share = is_masked.double().mean(1)
    assert float(share.mean()) == pytest.approx(0.5, abs=0.04)  # stratified: the rows go from none to all
    assert share[:8].mean() < 0.2
    assert share[-8:].mean() > 0.8


# The corpus and the bundled model


def test_corpus() -> None:
    splits = {name: pretrain.read_split(None, name).splitlines() for name in ("train", "validation", "test")}
    total = sum(map(len, splits.values()))
    assert total == 1189  # chapters
    assert len(splits["validation"]) == len(range(7, total, 30))
    assert len(splits["test"]) == len(range(22, total, 30))
    chapters = [chapter for split in splits.values() for chapter in split]
    assert len(set(chapters)) == total  # disjoint, and nothing twice
    assert min(map(len, chapters)) > 50
    assert not any("[" in chapter or "`" in chapter or "  " in chapter for chapter in chapters)
    sentences = {
        name: {s for chapter in split for s in chapter.split(". ") if len(s) > 120} for name, split in splits.items()
    }
    for name in ("validation", "test"):
        assert len(sentences[name] & sentences["train"]) < 0.05 * len(sentences[name])  # parallel passages only


def test_bundled_files() -> None:
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    for path in files:
        match path.suffix:
            case ".json":
                json.loads(path.read_text())
            case ".safetensors":
                assert all(tensor.isfinite().all() for tensor in load_file(path).values())
            case ".xz":
                assert lzma.decompress(path.read_bytes()).decode()
            case ".md":
                assert ModelCard.load(path).data.license == "apache-2.0"
            case other:
                raise AssertionError(f"{path}: what is {other}?")
    names = {path.relative_to(BUNDLED).as_posix() for path in files}
    assert {"model_index.json", "pretrain_metrics.json", "README.md", "scheduler/scheduler_config.json"} <= names


def test_schedulers_load_by_the_name_of_a_bundled_model() -> None:
    own = AncestralScheduler.from_pretrained("discrete-schedulers/tiny-text", subfolder="scheduler")
    folder = BUNDLED / "scheduler"
    assert dict(own.config) == dict(AncestralScheduler.from_pretrained(folder).config)
    with pytest.raises(ValueError, match=r"'discrete-schedulers/huge-text' is not bundled; bundled: .*tiny-text"):
        AncestralScheduler.from_pretrained("discrete-schedulers/huge-text")
    said = "'discrete-schedulers/tiny-text' holds learned floats of LearnedScheduler, of which AncestralScheduler reads those"
    with pytest.warns(UserWarning, match=said) as caught:
        AncestralScheduler.from_pretrained("discrete-schedulers/tiny-text", subfolder="learned")
    assert [warning.filename for warning in caught] == [__file__]  # it names the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned = DiscreteScheduler.from_pretrained("discrete-schedulers/tiny-text", subfolder="learned")
        assert type(learned) is LearnedScheduler
    where = "in the subfolder 'other' of 'discrete-schedulers/tiny-text'; pass `subfolder`: 'learned' or 'scheduler'"
    with pytest.raises(OSError, match=rf"no file named scheduler_config\.json {where}$"):
        AncestralScheduler.from_pretrained("discrete-schedulers/tiny-text", subfolder="other")
    with pytest.raises(
        OSError, match=r"json in 'discrete-schedulers/tiny-text'; pass `subfolder`: 'learned' or 'scheduler'$"
    ):
        AncestralScheduler.from_pretrained("discrete-schedulers/tiny-text")


@pytest.fixture(scope="module")
def bundled() -> DiscreteDiffusionPipeline:
    pipe = DiscreteDiffusionPipeline.from_pretrained("discrete-schedulers/tiny-text")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_bundled_model_has_the_quality_it_claims(bundled: DiscreteDiffusionPipeline) -> None:
    """Its any-order bound on validation windows, one random mask each, against pretrain_metrics.json."""
    metrics = json.loads((BUNDLED / "pretrain_metrics.json").read_text())
    text = pretrain.read_split(None, "validation")
    stream = torch.tensor(bundled.tokenizer(text)["input_ids"])
    ratio = metrics["validation_bits_per_character"] / metrics["validation_nats_per_token"]
    assert ratio == pytest.approx(len(stream) / len(text) / math.log(2))
    length = bundled.model.config.max_length
    windows = stream[: len(stream) // length * length].view(-1, length)[::12]
    generator = torch.Generator().manual_seed(1)
    opened = torch.randint(length, (len(windows), 1), generator=generator)
    is_masked = torch.rand(windows.shape, generator=generator).argsort(1).argsort(1) >= opened
    mask = bundled.scheduler.config.mask_token_id
    with torch.no_grad():
        rows = bundled.denoiser(windows.masked_fill(is_masked, mask), 0.5, positions=is_masked)
    loss = -rows.logits.double().log_softmax(-1).gather(1, windows[is_masked][:, None])[:, 0]
    sums = torch.zeros(windows.shape, dtype=torch.float64).masked_scatter(is_masked, loss).sum(1)
    nats = sums / is_masked.sum(1)
    error = float(nats.std()) / math.sqrt(len(nats))
    assert abs(float(nats.mean()) - metrics["validation_nats_per_token"]) < 4.5 * error
    assert error < 0.25
    assert metrics["parameters"] == sum(p.numel() for p in bundled.model.parameters())


def test_bundled_curve_is_the_models(bundled: DiscreteDiffusionPipeline) -> None:
    """Nothing revealed: the same for every window, so a few windows give f(0) up to their tokens; and the mean of the curve
    is the bound."""
    metrics = json.loads((BUNDLED / "pretrain_metrics.json").read_text())
    curve = bundled.scheduler.config.information_curve
    assert len(curve) == bundled.model.config.max_length
    assert all(a >= b for a, b in pairwise(curve))
    assert sum(curve) / len(curve) == pytest.approx(metrics["validation_nats_per_token"], abs=0.15)


def test_bundled_model_writes_words(bundled: DiscreteDiffusionPipeline) -> None:
    texts = bundled(num_samples=1, num_inference_steps=64, generator=torch.Generator().manual_seed(0)).texts
    known = set(pretrain.read_split(None, "train").split())
    words = " ".join(texts).split()
    assert len(words) > 20
    assert sum(word in known for word in words[1:-1]) > 0.6 * len(words)
