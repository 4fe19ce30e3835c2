"""Molecules: RDKit's metrics by hand, the SMILES tokenizer and corpus, their training in miniature, the bundled model."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from discrete_schedulers import ConfidenceScheduler, DiscreteDiffusionPipeline
from discrete_schedulers.molecules import (
    canonical_smiles,
    internal_diversity,
    molecule_metrics,
    novelty,
    uniqueness,
    validity,
)
from discrete_schedulers.training import prepare_molecules, pretrain

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "src" / "discrete_schedulers" / "assets" / "tiny-molecule"


@pytest.fixture
def rdkit() -> None:
    """For tests that need the judge."""
    pytest.importorskip("rdkit", reason="the extra `molecules` is not installed")


# The metrics

# ethanol twice, benzene, ethane; an open ring, an aromatic ring of 5 CH, nothing at all, a carbon with 5 neighbours
WRITTEN = ["CCO", "OCC", "c1ccccc1", "CC", "C1CC", "c1cccc1", "", "C(C)(C)(C)(C)C"]


@pytest.mark.usefixtures("rdkit")
class TestMetrics:
    def test_canonical(self) -> None:
        assert [canonical_smiles(smiles) is not None for smiles in WRITTEN] == [True] * 4 + [False] * 4
        assert canonical_smiles("OCC") == canonical_smiles("C(O)C") == canonical_smiles("CCO")
        assert canonical_smiles("C1=CC=CC=C1") == canonical_smiles("c1ccccc1")  # a Kekulé structure
        assert canonical_smiles("CCO") != canonical_smiles("COC")

    def test_shares_by_hand(self) -> None:
        """4 of 8 strings are valid, 3 of these 4 differ, 2 of these 3 are not known (ethanol is, written otherwise)."""
        assert validity(WRITTEN) == 4 / 8
        assert uniqueness(WRITTEN) == 3 / 4
        assert novelty(WRITTEN, ["C(O)C", "C"]) == pytest.approx(2 / 3)
        assert novelty(WRITTEN, WRITTEN[:4]) == 0
        assert novelty(WRITTEN, ["N"]) == 1

    def test_diversity_by_hand(self) -> None:
        """Morgan features of ethane: CH3 and the whole; of methanol: CH3, OH and the whole. One of four is common."""
        assert internal_diversity(["CC", "CO"]) == pytest.approx(1 - (1 + 1 + 1 / 4 + 1 / 4) / 4)
        assert internal_diversity(["CC", "CC", "C1C"]) == pytest.approx(0)
        assert internal_diversity(["C", "O"]) == pytest.approx(1 / 2)  # nothing in common

    def test_all_at_once(self) -> None:
        numbers = molecule_metrics(WRITTEN, ["OCC"])
        assert numbers == {
            "validity": validity(WRITTEN),
            "uniqueness": uniqueness(WRITTEN),
            "novelty": novelty(WRITTEN, ["CCO"]),
            "internal_diversity": internal_diversity(WRITTEN),
        }

    def test_nothing_valid(self, capfd: pytest.CaptureFixture[str]) -> None:
        numbers = molecule_metrics(["(", "C1"], ["C"])
        assert numbers["validity"] == 0
        assert all(math.isnan(numbers[name]) for name in ("uniqueness", "novelty", "internal_diversity"))
        assert capfd.readouterr().err == ""  # RDKit says nothing about strings that fail

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="smiles must be a list of SMILES strings, got one str"):
            validity("CCO")
        with pytest.raises(ValueError, match="smiles must hold at least one"):
            uniqueness([])
        with pytest.raises(ValueError, match="reference must be a list of SMILES strings, got one str"):
            novelty(["CCO"], "CCO")
        with pytest.raises(ValueError, match="reference must hold at least one"):
            molecule_metrics(["CCO"], [])


def test_without_rdkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(
        ImportError, match=r"RDKit, which is not installed: pip install 'discrete_schedulers\[molecules\]'"
    ):
        validity(["CCCCCCCCCCCCCCCCCCCCCC"])  # not one that is remembered
    monkeypatch.setattr(pretrain, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        pretrain.parse_args(["--data", "molecules", "--output_dir", "x"])


# The tokens and the corpus


def test_tokens() -> None:
    by_hand = ["Cl", "C", "[C@@H]", "(", "Br", ")", "c", "1", "[nH]", "c", "%12", "=", "n", "B", "C"]
    assert prepare_molecules.smiles_tokens("".join(by_hand)) == by_hand
    tokenizer = pretrain.smiles_tokenizer("".join(by_hand) + "\nCC\n")
    vocabulary = [*sorted(set(by_hand)), "[END]", "[MASK]"]
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(vocabulary)}
    ids = tokenizer("".join(by_hand))["input_ids"]
    assert ids == [vocabulary.index(token) for token in by_hand]
    assert tokenizer.decode(ids) == "".join(by_hand)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "".join(by_hand)
    assert tokenizer("C[MASK][MASK]Cl")["input_ids"][1:3] == [tokenizer.mask_token_id] * 2


def test_rows() -> None:
    tokenizer = pretrain.smiles_tokenizer("CCl\nc1cc1\n")
    names = tokenizer.convert_ids_to_tokens
    rows = pretrain.molecule_rows(tokenizer, "CCl\nc1cc1\n", 5)
    assert [names(row.tolist()) for row in rows] == [["C", "Cl", "[END]", "[END]", "[END]"], ["c", "1", "c", "c", "1"]]
    with pytest.raises(ValueError, match="`--sequence_length` is 4, but a molecule has 5 tokens"):
        pretrain.molecule_rows(tokenizer, "CCl\nc1cc1\n", 4)


def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of a package that looks like molsets: training from its train, the other two apart from its test, none too long."""
    folder = tmp_path / "moses" / "dataset" / "data"
    folder.mkdir(parents=True)
    train, test = ["CCl", "BrCC", "CCCCC", "CC"], ["CO", "CN", "OCCCC", "NO"]
    for name, lines in {"train": train, "test": test}.items():
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress("\n".join(["SMILES", *lines, ""]).encode()))
    info = tmp_path / "molsets-0.3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: molsets\nVersion: 0.3.1\n")
    (info / "LICENSE").write_text("Copyright them\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "corpus"
    prepare_molecules.main(["--output_dir", str(out), "--max_tokens", "3", "--heldout", "1"])
    splits = {name: pretrain.read_split(out, name).splitlines() for name in ("train", "validation", "test")}
    assert (out / "LICENSE").read_text() == "Copyright them\n"
    assert splits["train"] == ["BrCC", "CC", "CCl"]
    assert len(splits["validation"]) == len(splits["test"]) == 1
    assert len({*splits["validation"], *splits["test"]} & {"CO", "CN", "NO"}) == 2
    with pytest.raises(SystemExit):
        prepare_molecules.main(["--output_dir", str(out), "--max_tokens", "3", "--heldout", "2"])
    monkeypatch.setattr(prepare_molecules, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="molsets is not installed"):
        prepare_molecules.main(["--output_dir", str(out)])


def test_bundled_corpus() -> None:
    splits = {
        name: pretrain.read_split(None, name, "tiny-molecule").splitlines() for name in ("train", "validation", "test")
    }
    assert {name: len(lines) for name, lines in splits.items()} == {"train": 240_879, "validation": 2500, "test": 2500}
    lines = [line for split in splits.values() for line in split]
    assert len(set(lines)) == len(lines)  # disjoint, and nothing twice
    lengths = [len(prepare_molecules.smiles_tokens(line)) for line in lines[::50]]
    assert max(lengths) == 30
    assert min(lengths) > 10


# The training in miniature


@pytest.mark.slow
@pytest.mark.usefixtures("rdkit")
def test_training(tmp_path: Path) -> None:
    """Chains of C, N and O that end in a branch, all of them molecules: learned in seconds; and the folder is whole."""
    letters = random.Random(0)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, count in {"train": 400, "validation": 60}.items():
        chains = ["".join(letters.choices("CCNO", k=letters.randint(1, 3))) + "C(C)CCl" for _ in range(count)]
        (corpus / f"{split}.txt.xz").write_bytes(lzma.compress(("\n".join(chains) + "\n").encode()))
    given = (
        "--sequence_length 9 --hidden_size 32 --num_blocks 1 --num_heads 2 --max_train_steps 200 --learning_rate 0.01"
    )
    given += " --lr_warmup_steps 5 --ema_decay 0.9 --num_eval_samples 50 --data molecules"
    pretrain.main([*given.split(), "--corpus_dir", str(corpus), "--output_dir", str(tmp_path / "model")])
    metrics = json.loads((tmp_path / "model" / "pretrain_metrics.json").read_text())
    tokens = 9 * 60 / len(pretrain.read_split(corpus, "validation"))
    nats = metrics["validation_nats_per_token"]
    assert metrics["validation_bits_per_character"] == pytest.approx(nats * tokens / math.log(2))
    assert set(metrics["judged"]) == {"1.0", "0.8"}
    assert metrics["judged"]["1.0"]["validity"] > 0.5
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert f"| 1.0 | {metrics['judged']['1.0']['validity']:.3f} |" in card.text
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    texts = pipe(num_samples=40, num_inference_steps=9, generator=torch.Generator().manual_seed(0)).texts
    assert sum(text.endswith("C(C)CCl") for text in texts) > 20


# The bundled model


def test_bundled_files() -> None:
    paths = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= 4_000_000
    assert {"README.md", "pretrain_metrics.json", "LICENSE"} <= {path.name for path in paths}
    card, metrics = ModelCard.load(BUNDLED / "README.md"), json.loads((BUNDLED / "pretrain_metrics.json").read_text())
    assert card.data.license == "mit"
    assert f"{metrics['validation_nats_per_token']:.3f} nats per token" in card.text
    for temperature, numbers in metrics["judged"].items():
        assert f"| {temperature} | {numbers['validity']:.3f} |" in card.text
    weights = load_file(BUNDLED / "model" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in weights.values())


@pytest.fixture(scope="module")
def bundled() -> DiscreteDiffusionPipeline:
    pipe = DiscreteDiffusionPipeline.from_pretrained("discrete-schedulers/tiny-molecule")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_prompt_that_is_no_molecule(bundled: DiscreteDiffusionPipeline) -> None:
    """The tokenizer has no token for what is unknown."""
    with pytest.raises(
        ValueError, match=r"`prompt` is 'hello', which this model's tokenizer cannot read: .*vocabulary"
    ):
        bundled("hello", num_inference_steps=2)


def test_bundled_tokenizer(bundled: DiscreteDiffusionPipeline) -> None:
    lines = pretrain.read_split(None, "validation", "tiny-molecule").splitlines()[:300]
    rows = bundled.tokenizer(lines, padding="max_length", max_length=30, return_tensors="pt")["input_ids"]
    assert torch.equal(rows, pretrain.molecule_rows(bundled.tokenizer, "\n".join(lines), 30))
    assert bundled.tokenizer.batch_decode(rows, skip_special_tokens=True) == lines
    again = pretrain.smiles_tokenizer(pretrain.read_split(None, "train", "tiny-molecule"))
    assert again.get_vocab() == bundled.tokenizer.get_vocab()
    assert bundled.tokenizer.mask_token_id == bundled.scheduler.config.mask_token_id == len(again) - 1


def test_bundled_model_has_the_quality_it_claims(bundled: DiscreteDiffusionPipeline) -> None:
    """Its any-order bound on held-out molecules with masks of their own, against pretrain_metrics.json."""
    metrics = json.loads((BUNDLED / "pretrain_metrics.json").read_text())
    lines = pretrain.read_split(None, "validation", "tiny-molecule").splitlines()[:500]
    rows = pretrain.molecule_rows(bundled.tokenizer, "\n".join(lines), 30)
    generator = torch.Generator().manual_seed(1)
    opened = torch.randint(30, (len(rows), 1), generator=generator)
    is_masked = torch.rand(rows.shape, generator=generator).argsort(1).argsort(1) >= opened
    with torch.no_grad():
        mask = bundled.scheduler.config.mask_token_id
        found = bundled.denoiser(rows.masked_fill(is_masked, mask), 0.5, positions=is_masked)
    loss = -found.logits.double().log_softmax(-1).gather(1, rows[is_masked][:, None])[:, 0]
    sums = torch.zeros(rows.shape, dtype=torch.float64).masked_scatter(is_masked, loss).sum(1)
    nats = sums / is_masked.sum(1)
    error = float(nats.std()) / math.sqrt(len(nats))
    assert abs(float(nats.mean()) - metrics["validation_nats_per_token"]) < 4.5 * error
    assert error < 0.05
    assert metrics["parameters"] == sum(p.numel() for p in bundled.model.parameters())
    curve = bundled.scheduler.config.information_curve
    assert sum(curve) / len(curve) == pytest.approx(metrics["validation_nats_per_token"], abs=0.1)


@pytest.mark.usefixtures("rdkit")
def test_bundled_model_writes_molecules(bundled: DiscreteDiffusionPipeline) -> None:
    """One token a step: as often as it claims, up to 4.5 standard errors; and a scaffold stays where it is put."""
    claimed = json.loads((BUNDLED / "pretrain_metrics.json").read_text())["judged"]["1.0"]["validity"]
    samples = 60
    texts = bundled(num_samples=samples, num_inference_steps=30, generator=torch.Generator().manual_seed(7)).texts
    assert validity(texts) > 0
    assert abs(validity(texts) - claimed) < 4.5 * math.sqrt(claimed * (1 - claimed) / samples)
    pipe = DiscreteDiffusionPipeline(
        bundled.model, ConfidenceScheduler.from_config(bundled.scheduler.config), bundled.tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    mask = pipe.tokenizer.mask_token
    template = "COc1ccc(CNC(=O)" + mask * 15
    texts = pipe(
        template=template, num_samples=30, num_inference_steps=15, generator=torch.Generator().manual_seed(0)
    ).texts
    assert all(text.startswith("COc1ccc(CNC(=O)") for text in texts)
    assert validity(texts) > 0.2
