"""The adapter's entry point on a tiny model: what it leaves behind, what it learns on, and that a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, tiny_model, tiny_pipeline

from discrete_schedulers import DiscreteDiffusionPipeline, LatentModel, LearnedScheduler
from discrete_schedulers.training import adapt

pytest.importorskip("peft")
SMALL = [
    "--sequence_length",
    "8",
    "--max_data_samples",
    "24",
    "--num_eval_samples",
    "4",
    "--num_inference_steps",
    "1",
    "2",
]
SMALL += ["--train_batch_size", "4", "--num_latents", "3", "--num_eval_latents", "4", "--learning_rate", "0.01"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt") / "model"
    tiny_pipeline(model=tiny_model(max_length=8, cond_dim=None)).save_pretrained(folder)
    return folder


def run(model: Path, folder: Path, *more: str) -> dict[str, Any]:
    return adapt.main(["--pretrained_model_name_or_path", str(model), "--output_dir", str(folder), *SMALL, *more])


def weights(folder: Path, model: Path) -> dict[str, torch.Tensor]:
    network = DiscreteDiffusionPipeline.from_pretrained(model).model
    return {name: p.detach().clone() for name, p in LatentModel.from_pretrained(folder, network).adapter().items()}


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ["--max_train_steps", "6", "--checkpointing_steps", "3"]
    metrics = run(model, tmp_path / "whole", *steps)
    names = ["README.md", "adapter_state.pt", "latent_adapter.json", "latent_adapter.safetensors", "metrics.json"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [*names, "scheduler_config.json"]
    rows = [(row["network"], row["steps"]) for row in metrics["table"]]
    assert rows == [(name, n) for name in ("frozen network", "di4c") for n in (1, 2)]
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text()) == metrics
    assert "LatentModel.from_pretrained" in (tmp_path / "whole" / "README.md").read_text()

    saved, calls = adapt.save_state, []

    def killed(path: Path, state: dict[str, Any]) -> None:
        saved(path, state)
        calls.append(state["step"])
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", *steps)
    assert calls == [3]
    monkeypatch.setattr(adapt, "save_state", saved)
    with pytest.raises(ValueError, match="belongs to a run with other arguments"):
        run(model, tmp_path / "parts", *steps, "--seed", "1", "--resume_from_checkpoint", "latest")
    run(model, tmp_path / "parts", *steps, "--resume_from_checkpoint", "latest")
    whole, parts = (weights(tmp_path / name, model) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    moved = [name for name, p in whole.items() if "lora_B" in name or name.endswith("2.weight")]
    assert moved
    assert all(float(whole[name].abs().max()) > 0 for name in moved)

    pipe = DiscreteDiffusionPipeline.from_pretrained(model)
    pipe.model = LatentModel.from_pretrained(tmp_path / "whole", pipe.model).eval()
    pipe.scheduler = LearnedScheduler.from_pretrained(tmp_path / "whole")
    assert pipe.scheduler.config.learned_for["method"] == "di4c"
    drawn = [
        pipe(
            num_samples=2, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).sequences
        for _ in range(2)
    ]
    assert torch.equal(*drawn)


def test_sdtt_leaves_the_latent_alone(model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join(WORDS[2 + (i + j) % 19] for j in range(12)) for i in range(60)))
    run(model, tmp_path / "sdtt", "--method", "sdtt", "--max_train_steps", "3", "--train_file", str(texts))
    found = weights(tmp_path / "sdtt", model)
    assert float(found["latent_embedding.mlp.2.weight"].abs().max()) == 0
    assert max(float(p.abs().max()) for name, p in found.items() if "lora_B" in name) > 0


@pytest.mark.parametrize("extra", ["--num_latents 1", "--teacher_step 0", "--max_train_steps 0"])
def test_arguments_are_refused(extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        adapt.main(["--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path), *extra.split()])
    assert f"{extra.split()[0]} is {float(extra.split()[1]):g}" in capsys.readouterr().err.replace(".0;", ";")
