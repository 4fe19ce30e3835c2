"""The adapter's entry point on a tiny model: what it leaves behind, what it learns on, and that a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import run_two
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
    names = [
        "README.md",
        "adapter_samples.pt",
        "adapter_state.pt",
        "latent_adapter.json",
        "latent_adapter.safetensors",
        "metrics.json",
    ]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [*names, "scheduler_config.json"]
    rows = [(row["network"], row["steps"]) for row in metrics["table"]]
    assert rows == [(name, n) for name in ("frozen network", "di4c") for n in (1, 2)]
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text()) == metrics
    assert "LatentModel.from_pretrained" in (tmp_path / "whole" / "README.md").read_text()

    saved, calls = adapt.save_state, []

    def killed(path: Path, state: dict[str, Any]) -> None:
        saved(path, state)
        if "step" in state:
            calls.append(state["step"])
            raise KeyboardInterrupt

    monkeypatch.setattr(adapt, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", *steps)
    assert calls == [3]
    monkeypatch.setattr(adapt, "save_state", saved)
    with pytest.raises(ValueError, match="belongs to a run with other arguments"):
        run(model, tmp_path / "parts", *steps, "--seed", "1", "--resume_from_checkpoint", "latest")
    with monkeypatch.context() as patch:  # what the model has drawn to learn on is kept, too
        patch.setattr(adapt, "gather_samples", None)
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
    sdtt = [*SMALL[:-6], *SMALL[-2:], "--method", "sdtt", "--max_train_steps", "3", "--train_file", str(texts)]
    adapt.main(["--pretrained_model_name_or_path", str(model), "--output_dir", str(tmp_path / "sdtt"), *sdtt])
    assert not (tmp_path / "sdtt" / adapt.SAMPLES).exists()
    card = (tmp_path / "sdtt" / "README.md").read_text()
    assert '"teacher_steps": 2' in card
    assert "Jensen's gap" not in card
    assert "latents" not in card  # what the method does not read
    found = weights(tmp_path / "sdtt", model)
    assert float(found["latent_embedding.mlp.2.weight"].abs().max()) == 0
    assert max(float(p.abs().max()) for name, p in found.items() if "lora_B" in name) > 0


def test_it_is_measured_on_sequences_that_it_has_not_learned_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both are the model's own samples, and however many processes share the drawing of them out."""
    seen: dict[str, list] = {"fit": [], "heldout": [], "seeds": []}
    losses, measure = adapt.losses_of_batch, adapt.measure

    def noted(student: Any, teacher: Any, process: Any, x_0: torch.Tensor, *more: Any) -> torch.Tensor:
        seen["fit"] += x_0.tolist()
        seen["seeds"].append(more[-1])
        return losses(student, teacher, process, x_0, *more)

    def judged(pipe: Any, name: str, heldout: torch.Tensor, args: Any) -> list:
        seen["heldout"].append(heldout.tolist())
        return measure(pipe, name, heldout, args)

    monkeypatch.setattr(adapt, "losses_of_batch", noted)
    monkeypatch.setattr(adapt, "measure", judged)
    run(model, tmp_path, "--max_train_steps", "8", "--checkpointing_steps", "8")
    drawn = torch.load(tmp_path / adapt.SAMPLES, weights_only=True)["samples"].tolist()
    assert len(drawn) == 24 + 4
    assert seen["heldout"] == [drawn[24:]] * 2
    assert all(row in drawn[:24] for row in seen["fit"])
    assert seen["seeds"] == [adapt.batch_seeds(0, step, 0)[1] for step in range(8)]


def test_seeds_of_batches_differ() -> None:
    found = [seed for step in range(50) for process in range(8) for seed in adapt.batch_seeds(3, step, process)]
    assert len({seed % 2**32 for seed in found}) == len(found)  # torch reads 32 bits


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one(model: Path, tmp_path: Path) -> None:
    short = ["--max_train_steps", "2", "--checkpointing_steps", "1"]
    run(model, tmp_path / "one", *short)
    folder = tmp_path / "two"
    arguments = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(folder), *SMALL, *short]
    ended = run_two(adapt.main, arguments, folder)
    assert ended.code == 0, ended.printed
    one, two = (torch.load(tmp_path / name / adapt.SAMPLES, weights_only=True) for name in ("one", "two"))
    assert torch.equal(one["samples"], two["samples"])
    assert two["identity"] == one["identity"] | {"num_processes": 2}
    state = torch.load(folder / adapt.STATE, weights_only=True)
    assert state["step"] == 2
    with pytest.raises(
        ValueError, match=r"belongs to a run with other arguments \(saved, now\): \{'num_processes': \(2, 1\)"
    ):
        run(model, folder, *short, "--resume_from_checkpoint", "latest")


REFUSED = {
    "--num_latents 1": "--num_latents is 1; a mixture needs at least 2",
    "--teacher_step 0": "--teacher_step is 0.0; allowed are numbers between 0 and 1",
    "--max_train_steps 0": "--max_train_steps is 0; it must be at least 1",
    "--checkpointing_steps 0": "--checkpointing_steps is 0; it must be at least 1",
    "--num_eval_latents 0": "--num_eval_latents is 0; it must be at least 1",
    "--num_inference_steps 4 0": "--num_inference_steps is [4, 0]; budgets must be at least 1",
    "--distilled_below 1": "--distilled_below is 1.0; allowed are numbers between 0 and 1",
    "--correlation_scale -1": "--correlation_scale is -1.0; allowed are numbers of at least 0",
    "--learning_rate nan": "--learning_rate is nan; it must be positive and finite",
    "--seed -1": "--seed is -1; allowed are 0 to",
    "--method sdtt --num_latents 4": "--num_latents is for --method di4c",
    "--teacher_steps 2": "--teacher_steps is for --method sdtt",
    "--validation_file x": "--validation_file needs --train_file",
    "--push_to_hub --hub_model_id a/b/c": "--hub_model_id: ",
}


@pytest.mark.parametrize("extra", REFUSED)
def test_arguments_are_refused(extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        adapt.main(["--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path / "out"), *extra.split()])
    assert REFUSED[extra] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_folder_where_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    given = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="`--sequence_length` is 9; this model takes at most 8"):
        adapt.main([*given, "--sequence_length", "9"])
    assert not (tmp_path / "out").exists()
