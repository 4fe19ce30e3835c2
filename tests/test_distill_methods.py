"""The methods of `distill.py` that have come after LSD: what each learns, against the modules that have the mathematics, and
that kills, processes and batches change nothing. On the transformer with random weights of test_distill.py."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_distill import FINISHED, LENGTH, do_not_draw, interrupt, launch, save_model, write_texts
from tiny import MASK, WORDS, tiny_model, tiny_pipeline

from discrete_schedulers import (
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    InformationCurve,
    Learn2PDScheduler,
    LearnedScheduler,
)
from discrete_schedulers.evaluation import sampler_nll_bound
from discrete_schedulers.information import curve_of, expected_nll, optimal_counts
from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.training import arguments, distill, method_marginal
from discrete_schedulers.training.data import Texts, load_texts, pack
from discrete_schedulers.training.frozen import FrozenTexts
from discrete_schedulers.training.hub import without_tokens
from discrete_schedulers.training.jump_steps import (
    beta_shares,
    jump_your_steps,
    klub,
    optimal_shares,
    share_bound,
    share_cross_entropy,
)
from discrete_schedulers.training.learn2pd import Decoded, decode_one_by_one, threshold_for
from discrete_schedulers.training.marginal import Verdict
from discrete_schedulers.training.measuring import Judged, at_entropy
from discrete_schedulers.training.method_filter import partly_known
from discrete_schedulers.training.method_grids import (
    measured_levels,
    measured_starts,
    ordered_counts,
    smallest_on_grids,
)
from discrete_schedulers.training.method_marginal import blocks_of, kept_floats
from discrete_schedulers.training.objectives import draw_noise, token_nats
from discrete_schedulers.training.order_search import order_nll
from discrete_schedulers.training.run import Run

BUDGETS = [2, 4]
SMALL = ["--num_inference_steps", "2", "4", "--num_eval_samples", "6"]
FEW = ["--max_data_samples", "48", "--num_samples", "24"]
METHODS = {
    "jys": ["--num_samples", "12"],
    "jys unbiased": ["--unbiased", "--unmasking", "bernoulli"],
    "beta": ["--unmasking", "bernoulli"],
    "search": [*FEW, "--num_epochs", "6"],
    "search grid": [*FEW, "--num_epochs", "6", "--blocks", "inverse_temperature", "grid", "--plan", "even"],
    "search gate": [*FEW, "--num_epochs", "4", "--blocks", "gate", "remask", "--order", "random", "--plan", "even"],
    "optimal_grid spread": ["--num_samples", "12", "--order", "spread"],
    "order": ["--num_samples", "24", "--num_epochs", "12"],
    "learn2pd": ["--num_samples", "6", "--num_epochs", "20", "--final_share", "0.6"],
    "learn2pd blocks": ["--num_samples", "6", "--num_epochs", "5", "--block_length", "4", "--hidden_units", "3"],
    "beta alone": [],
}
DRAWN = ["order", "search", "learn2pd", "jys unbiased"]
Finished = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    save_model(folder / "model")
    write_texts(folder / "texts.txt")
    return folder


def given(work: Path, name: str, folder: Path) -> list[str]:
    """Arguments of a run; `alone` is without texts."""
    texts = [] if "alone" in name else ["--train_file", str(work / "texts.txt")]
    model = ["--pretrained_model_name_or_path", str(work / "model"), "--output_dir", str(folder)]
    return [*model, *texts, "--method", name.split()[0], *SMALL, *METHODS[name]]


@pytest.fixture(scope="module")
def finished(work: Path) -> Callable[[str], Finished]:
    """Metrics and folder of a method's finished run; each is run once."""
    runs: dict[str, Finished] = {}

    def run(name: str) -> Finished:
        if name not in runs:
            folder = work / name.replace(" ", "_")
            with pytest.MonkeyPatch.context() as patch:
                if name not in DRAWN:
                    do_not_draw(patch)
                runs[name] = distill.main(given(work, name, folder)), folder
        return runs[name]

    return run


def load(name: str, folder: Path) -> DiscreteScheduler:
    return (Learn2PDScheduler if "learn2pd" in name else LearnedScheduler).from_pretrained(folder)


def model_and_data(work: Path) -> tuple[DiscreteDiffusionPipeline, torch.Tensor, torch.Tensor]:
    """The pipeline, and the sequences that a run fits on and measures on."""
    pipe = DiscreteDiffusionPipeline.from_pretrained(work / "model")
    pipe.set_progress_bar_config(disable=True)
    texts = load_texts(distill.parse_args(given(work, "beta", work)))
    assert isinstance(texts, Texts)
    return pipe, pack(texts.fit, pipe.tokenizer, LENGTH, 256), pack(texts.heldout, pipe.tokenizer, LENGTH, 6)


# What all of them leave behind


@pytest.mark.parametrize("name", METHODS)
def test_scheduler_and_metrics(finished: Callable[[str], Finished], work: Path, name: str) -> None:
    metrics, folder = finished(name)
    scheduler = load(name, folder)
    learned_for = scheduler.config.learned_for
    assert (learned_for["base_model"], learned_for["method"]) == (str(work / "model"), name.split()[0])
    assert learned_for["metrics"] == metrics["table"]
    assert (scheduler.config.coefficients or {}) == metrics["coefficients"]  # bit for bit
    assert metrics["sequence_evaluations"] > 0
    pipe, _, heldout = model_and_data(work)
    pipe.scheduler = scheduler
    rows = {row["steps"]: row for row in metrics["table"] if row["sampler"] == name.split()[0]}
    for steps in BUDGETS:
        output = pipe(num_samples=3, num_inference_steps=steps)
        assert output.sequences.shape == (3, LENGTH)
        assert (output.sequences != MASK).all()
        row = rows[steps]
        has_bound = not (scheduler.chooses_by_logits or scheduler.revises_tokens)
        assert has_bound == (name not in ("search gate", "learn2pd", "learn2pd blocks"))
        if name != "search":  # its nucleus may leave a true token out
            assert ("nll" in row) == has_bound
        assert 1 <= row["calls"] <= steps
        assert ("perplexity" in row) == ("alone" not in name)
    if "alone" not in name:
        assert len(heldout) == 6


@pytest.mark.parametrize("name", DRAWN)
def test_card(finished: Callable[[str], Finished], name: str) -> None:
    """Both pictures, cost and command; the command gives the run again."""
    metrics, folder = finished(name)
    assert sorted(path.name for path in folder.iterdir() if "checkpoint" not in path.name) == FINISHED
    for picture in ("plot.png", "coefficients.png"):
        with Image.open(folder / picture) as plot:
            assert plot.size[0] >= 600
            assert len(plot.convert("RGB").getcolors(1 << 20)) > 10
    card = ModelCard.load(folder / "README.md").text
    assert "(plot.png)" in card
    assert "(coefficients.png)" in card
    assert re.search(rf"{metrics['sequence_evaluations']:,} sequence evaluations .* \d+ s on 1 process \(cpu\)", card)
    (command,) = re.findall(r"```bash\naccelerate launch training/distill.py (.*)\n```", card)
    args = distill.parse_args(command.split())
    assert vars(args) == vars(distill.parse_args(given(folder.parent, name, folder)))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("search gate", "beta alone")])
def test_killed_and_other_batches(
    finished: Callable[[str], Finished], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped after one more checkpoint each time, a run ends where the uninterrupted one did, counts and all."""
    metrics, folder = finished(name)
    do_not_draw(monkeypatch)
    monkeypatch.setattr("discrete_schedulers.training.run.NUMBERS_BETWEEN_CHECKPOINTS", 5)
    for saves in (1, 1, 2, 3, 100):
        with monkeypatch.context() as patch:
            interrupt(patch, saves)
            try:
                resumed = distill.main([*given(work, name, tmp_path), "--resume_from_checkpoint", "latest"])
            except KeyboardInterrupt:
                continue
    assert resumed == metrics
    for file in ("scheduler_config.json", "metrics.json"):
        text = (tmp_path / file).read_text()
        assert text == (folder / file).read_text()


@pytest.mark.parametrize("name", ["jys", "order", "learn2pd"])
def test_other_batches(
    finished: Callable[[str], Finished], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    metrics, folder = finished(name)
    do_not_draw(monkeypatch)
    other = distill.main([*given(work, name, tmp_path), "--train_batch_size", "5", "--num_eval_samples", "1"])
    assert other["sequence_evaluations"] == metrics["sequence_evaluations"]
    same_floats(load(name, folder), load(name, tmp_path))


def same_floats(a: DiscreteScheduler, b: DiscreteScheduler) -> None:
    """Coefficients and filters agree but for rounding."""
    for name in ("coefficients", "filter"):
        first, second = (json.dumps(one.config.get(name)) for one in (a, b))
        numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+(?:e-\d+)?", text)] for text in (first, second)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jys", "beta", "search", "order", "learn2pd"])
def test_two_processes(finished: Callable[[str], Finished], work: Path, tmp_path: Path, name: str) -> None:
    metrics, folder = finished(name)
    launch(given(work, name, tmp_path), 2, tmp_path)
    launched = json.loads((tmp_path / "metrics.json").read_text())
    assert launched["sequence_evaluations"] == metrics["sequence_evaluations"]
    same_floats(load(name, folder), load(name, tmp_path))
    assert "on 2 processes (cpu)" in (tmp_path / "README.md").read_text()
    assert "accelerate launch --num_processes 2 training/distill.py" in (tmp_path / "README.md").read_text()


# What each learns


def test_jys_is_the_published_search(finished: Callable[[str], Finished], work: Path) -> None:
    metrics, _ = finished("jys")
    pipe, data, _ = model_and_data(work)
    thresholds = draw_noise(range(12), LENGTH, 0).thresholds
    process = AbsorbingProcess(len(WORDS), MASK)
    passed = []
    pipe.model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))

    def gain(t1: float, t2: float, t3: float) -> float:
        return klub(pipe.denoiser, process, data[:12], thresholds, torch.full((12, LENGTH), MASK), (t1, t2, t3))

    with torch.no_grad():
        for steps in BUDGETS:
            times = jump_your_steps(gain, steps)
            assert metrics["coefficients"][str(steps)]["times"] == pytest.approx(times, abs=2 / 1024)
    assert metrics["sequence_evaluations"] == sum(passed)
    assert min(passed) < 12  # sequences without a mask at t2 have no rate there: they are not asked about


def curve_price(folder: Path, work: Path) -> Callable[[float], float]:
    """c of the curve that a run has measured."""
    state = json.loads((next(folder.glob("checkpoint-*")) / "state.json").read_text())
    curve = InformationCurve.from_config(state["curve"]).values
    return lambda share: float(share_cross_entropy(curve, torch.tensor([share], dtype=torch.float64)))


def test_unbiased_jys_and_beta_are_optima_of_the_bound(finished: Callable[[str], Finished], work: Path) -> None:
    """The exact optimum is below the Beta schedule, that below the uniform grid and a coarse search by hand."""
    process = AbsorbingProcess(len(WORDS), MASK)
    found = {}
    for name in ("jys unbiased", "beta"):
        metrics, folder = finished(name)
        c = curve_price(folder, work)
        for steps in BUDGETS:
            times = torch.tensor(metrics["coefficients"][str(steps)]["times"], dtype=torch.float64)
            survival = process.alpha(times).flatten()
            shares = ((1 - survival) / (1 - survival[0])).tolist()
            found[name, steps] = share_bound([1.0, *shares[1:-1], 0.0], c)
    config = json.loads((finished("beta")[1] / "scheduler_config.json").read_text())
    by_hand = [math.exp(math.log(0.1) + k * math.log(40) / 12) for k in range(13)]
    for steps in BUDGETS:
        even = [1 - k / steps for k in range(steps + 1)]
        coarse = min(share_bound(beta_shares(a, b, steps), c) for a in by_hand for b in by_hand)
        assert found["jys unbiased", steps] <= found["beta", steps] + 1e-6
        assert found["beta", steps] <= min(coarse, share_bound(even, c)) + 1e-9
        a, b = config["learned_for"]["beta"][str(steps)]
        assert share_bound(beta_shares(a, b, steps), c) == pytest.approx(found["beta", steps], abs=1e-9)
    points = torch.linspace(1, 0, 1025, dtype=torch.float64)
    best = optimal_shares(points, torch.tensor([c(float(m)) for m in points]), 2)
    times = process.time_of_noise(torch.tensor(best, dtype=torch.float64)).tolist()
    assert finished("jys unbiased")[0]["coefficients"]["2"]["times"] == pytest.approx(times, abs=1e-12)


def test_levels_of_a_long_curve() -> None:
    """All of 64 positions; of 1,024 as few, and the grids of the curve through them are nearly as good as its own."""
    assert measured_levels(1) == [0]
    assert measured_levels(64) == list(range(64))
    levels = measured_levels(512)
    assert levels[:4] == [0, 1, 2, 3]
    assert levels[-1] == 511
    assert 55 < len(levels) <= 64
    assert len(measured_levels(4096)) <= 64
    known = torch.arange(512, dtype=torch.float64)
    for values in (2 + 4 * (1 + known) ** -0.5, 1 + 5 * (1 + known) ** -0.25, 6 - 0.5 * (1 + known).log()):
        curve = InformationCurve.from_config(values.tolist())
        through = curve_of(values[levels].repeat(2, 1), levels, 512)
        best, found = optimal_counts(curve, 16), optimal_counts(through, 16)
        for steps in (4, 16):
            excess = expected_nll(curve, found[steps - 1]) - expected_nll(curve, best[steps - 1])
            assert 0 <= excess / 512 < 4e-4


def test_starts_of_a_long_order() -> None:
    assert measured_starts(100, 25) == list(range(100))
    starts = measured_starts(4096, 16)
    assert starts[:17] == [*range(16), 64]
    assert {1024, 2048, 3072} < set(starts)
    assert len(starts) == 16 + 63
    assert len(measured_starts(4096, 256)) > 1024  # more calls than starts: no plan


def test_what_should_not_be_shipped_is_said() -> None:
    told: list[str] = []
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(print=told.append))
    candidates = [{"x": torch.tensor([value])} for value in (0.9, 0.95, 1.0)]
    found = kept_floats(run, 4, candidates, lambda one: Verdict(1.0, float(one["x"])))
    assert (float(found["x"]), told) == (1.0, [])
    found = kept_floats(run, 4, candidates[:2], lambda one: Verdict(1.0, float(one["x"])))
    assert float(found["x"]) == pytest.approx(0.95)
    assert re.match("4 steps: no candidate's samples have 0.99 of the entropy.* 0.950, is kept: do not ship", told[0])


def test_smallest_on_grids() -> None:
    found = smallest_on_grids(lambda x, y: (x - 0.3) ** 2 + 3 * (y - x + 0.9) ** 2, (-2.0, 1.0))
    assert found == pytest.approx((0.3, -0.6), abs=2e-3)
    assert smallest_on_grids(lambda x, y: x - y, (-2.0, 1.0)) == (-2.0, 1.0)  # stays within


def test_search_keeps_what_its_judge_prefers(finished: Callable[[str], Finished]) -> None:
    plain, folder = finished("search")
    config = LearnedScheduler.from_pretrained(folder).config
    assert (config.grid, config.unmasking) == ("learned", "counts")
    assert config.order in ("spread", "random")
    for steps in BUDGETS:
        blocks = plain["coefficients"][str(steps)]
        assert sorted(blocks) == ["contrast", "counts", "inverse_temperature"]
        assert (len(blocks["counts"]), sum(blocks["counts"])) == (steps, LENGTH)
        assert len(set(blocks["contrast"])) == 1
        assert 0 <= blocks["contrast"][0] <= 1
        logs = torch.tensor(blocks["inverse_temperature"]).log()
        torch.testing.assert_close(logs, torch.linspace(float(logs[0]), float(logs[-1]), steps), atol=1e-6, rtol=0)
    metrics, folder = finished("search grid")
    config = LearnedScheduler.from_pretrained(folder).config
    assert (config.order, config.grid, config.unmasking) == ("spread", "learned", "counts")
    for steps in BUDGETS:
        blocks = metrics["coefficients"][str(steps)]
        assert {name: len(values) for name, values in blocks.items()} == {
            "inverse_temperature": steps,
            "times": steps + 1,
        }
        assert all(0.2 <= value <= 5 for value in blocks["inverse_temperature"])
    gated = finished("search gate")[0]["coefficients"]["4"]
    assert {name: len(set(values)) for name, values in gated.items()} == {"gate_a": 1, "gate_b": 1, "remask": 1}
    start = {"inverse_temperature": torch.zeros(4).double(), "grid": torch.tensor([0.5, 0.5]).double().log()}
    blocks = blocks_of(AbsorbingProcess(len(WORDS), MASK), start, 4)
    assert blocks["inverse_temperature"] == [1.0] * 4
    assert blocks["times"] == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-12)


@pytest.mark.parametrize(("orders", "best"), [("best", "random"), ("spread", "spread")])
def test_the_order_and_the_plans_of_a_search_are_the_nearest_ones(
    monkeypatch: pytest.MonkeyPatch, orders: str, best: str
) -> None:
    """One order for all budgets, by the sum of what its best plans have; `spread` alone has no other."""
    bound = {"spread": {2: [1, 7], 4: [1, 1, 1, 5]}, "random": {2: [3, 5], 4: [1, 2, 2, 3]}}
    monkeypatch.setattr(method_marginal, "ordered_counts", lambda run, data, order: bound[order])
    losses = {("spread", 2): [0.5, 0.3, 0.4], ("spread", 4): [0.1, 0.2, 0.9]}  # 0.4 in all
    losses |= {("random", 2): [0.6, 0.6, 0.3], ("random", 4): [0.5, 0.05, 0.5]}  # 0.35
    tried = []

    def loss(order: str, steps: int, number: int, counts: list[int]) -> float:
        tried.append((order, counts))
        return losses[order, steps][number]

    args = SimpleNamespace(order=orders, num_inference_steps=BUDGETS)
    run: Any = SimpleNamespace(args=args, state={}, data=torch.zeros(4, LENGTH), length=LENGTH)
    run.accelerator = SimpleNamespace(print=lambda told: None)
    run.add_evaluations = run.save = lambda *_: None
    assert method_marginal.best_plans(run, loss) == best
    expected = {"spread": {"2": [2, 6], "4": [2, 2, 2, 2]}, "random": {"2": [3, 5], "4": [1, 1, 2, 4]}}[best]
    assert run.state["plans"] == {"order": best, "counts": expected}
    assert [4, 4] in [counts for _, counts in tried]
    assert len(tried) == (12 if orders == "best" else 6)
    assert method_marginal.best_plans(run, loss) == best  # remembered
    assert len(tried) == (12 if orders == "best" else 6)


def test_the_counts_of_the_smallest_bound_for_an_order() -> None:
    """Of the random order they are those of the optimal grid on the curve that the same permutations measure."""
    pipe = tiny_pipeline(model=tiny_model(max_length=LENGTH, cond_dim=None))
    data = torch.randint(0, MASK, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    args = SimpleNamespace(seed=3, num_inference_steps=BUDGETS, train_batch_size=4)
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    run: Any = Run(args, accelerator, FrozenTexts(pipe, LENGTH), {"mask_token_id": MASK}, data, {}, {}, None, {})  # type: ignore[arg-type]
    run.reduce = lambda x: x
    ranks = torch.rand(6, LENGTH, generator=torch.Generator().manual_seed(3)).argsort(1)
    curve = []
    for known in range(LENGTH):
        hidden = ranks >= known
        rows = pipe.denoiser(data.masked_fill(hidden, MASK), (LENGTH - known) / LENGTH, hidden)
        curve.append(float(token_nats(rows, data[hidden], MASK).mean()))
    found = ordered_counts(run, data, "random")

    def price(counts: tuple[int, ...]) -> float:
        starts = [sum(counts[:k]) for k in range(len(counts))]
        return sum(count * curve[start] for start, count in zip(starts, counts, strict=True))

    for steps in BUDGETS:
        plans = [p for p in itertools.product(range(1, LENGTH), repeat=steps) if sum(p) == LENGTH]
        assert price(tuple(found[steps])) == pytest.approx(min(map(price, plans)), abs=1e-9)


@pytest.mark.slow
def test_search_finds_temperatures_that_its_data_has(work: Path, tmp_path: Path) -> None:
    """Data that the model itself has drawn coldly, in one order: found again by the temperature alone, in one call."""
    pipe, _, _ = model_and_data(work)
    cold = LearnedScheduler.from_config(pipe.scheduler.config, temperature=0.5, order="spread")
    pipe.scheduler = cold
    generators = [torch.Generator().manual_seed(i) for i in range(400)]
    texts = pipe(num_samples=400, num_inference_steps=2, generator=generators).texts
    (tmp_path / "cold.txt").write_text("\n".join(texts))
    arguments = ["--pretrained_model_name_or_path", str(work / "model"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--train_file", str(tmp_path / "cold.txt"), "--method", "search", "--num_inference_steps", "2"]
    arguments += [
        "--blocks",
        "inverse_temperature",
        "--plan",
        "even",
        "--num_samples",
        "200",
        "--max_data_samples",
        "400",
    ]
    with pytest.MonkeyPatch.context() as patch:
        do_not_draw(patch)
        metrics = distill.main([*arguments, "--num_epochs", "40", "--num_eval_samples", "4"])
    first, second = metrics["coefficients"]["2"]["inverse_temperature"]
    assert 1.5 < (first * second) ** 0.5 < 2.7  # 2 and 2 have made the data


def test_order_is_no_worse_than_its_starts(finished: Callable[[str], Finished], work: Path) -> None:
    """On the half that chooses; and its row of the table is the exact likelihood."""
    metrics, folder = finished("order")
    scheduler = LearnedScheduler.from_pretrained(folder)
    pipe, data, heldout = model_and_data(work)
    choosing = data[:24][1::2]
    for steps in BUDGETS:
        blocks = metrics["coefficients"][str(steps)]
        groups = [[i for i in range(LENGTH) if blocks["order"][i] == float(steps - k)] for k in range(steps)]
        assert [len(group) for group in groups] == blocks["counts"]
        exact = order_nll(pipe.denoiser, heldout, groups, MASK) / LENGTH
        row = next(row for row in metrics["table"] if (row["sampler"], row["steps"]) == ("order", steps))
        assert row["nll"] == pytest.approx(float(exact.mean()), abs=1e-5)
        bound = sampler_nll_bound(pipe.denoiser, scheduler, heldout, steps)
        assert bound.tolist() == pytest.approx(exact.tolist(), abs=1e-5)
        own = float(order_nll(pipe.denoiser, choosing, groups, MASK).mean())
        step = LENGTH // steps
        dilated = [[0, 4], [2, 6], [1, 3], [5, 7]] if steps == 4 else [[0, 2, 4, 6], [1, 3, 5, 7]]
        assert all(len(group) == step for group in dilated)
        assert own <= float(order_nll(pipe.denoiser, choosing, dilated, MASK).mean()) + 1e-6


def test_filter_is_fitted_to_the_models_own_decoding(finished: Callable[[str], Finished], work: Path) -> None:
    metrics, folder = finished("learn2pd")
    scheduler = Learn2PDScheduler.from_pretrained(folder)
    assert {name: len(layer) for name, layer in scheduler.config.filter.items()} == {
        "hidden_weight": 32,
        "hidden_bias": 32,
        "output_weight": LENGTH,
        "output_bias": LENGTH,
    }
    pipe, data, _ = model_and_data(work)
    start = partly_known(data[:12], 0, range(12), MASK)
    assert ((start == MASK).sum(1) == LENGTH - 1).all()
    assert ((start == data[:12]) | (start == MASK)).all()
    assert metrics["sequence_evaluations"] == 12 * (LENGTH - 1)
    heldout = decode_one_by_one(pipe.denoiser, start[1::2], MASK)
    assert scheduler.layers is not None
    f = torch.stack([scheduler.final_probability(row[None])[0] for row in heldout.confidence])
    threshold = scheduler.config.threshold
    assert threshold == threshold_for(f, heldout, 0.6)
    if threshold < 1:
        assert float(heldout.is_final[heldout.is_masked & (f > threshold)].double().mean()) >= 0.6
    blocks = Learn2PDScheduler.from_pretrained(finished("learn2pd blocks")[1]).config
    assert (blocks.block_length, len(blocks.filter["hidden_bias"]), len(blocks.filter["output_bias"])) == (4, 3, 4)


def test_threshold() -> None:
    f = torch.tensor([[0.55, 0.705, 0.8, 0.99]], dtype=torch.float64)
    final = torch.tensor([[False, False, True, True]])
    decoded = Decoded(f, final, torch.ones_like(final))
    assert threshold_for(f, decoded, 0.5) == 0.5
    assert threshold_for(f, decoded, 0.6) == 0.55  # 2 of 3
    assert threshold_for(f, decoded, 1.0) == 0.71
    assert threshold_for(f, Decoded(f, ~final, decoded.is_masked), 1.0) == 1.0
    assert threshold_for(f, Decoded(f, final, ~decoded.is_masked), 0.1) == 1.0


# Measuring, and the command


def test_perplexity_at_equal_entropy() -> None:
    """Linear in the logarithm between the temperatures around the target; none beyond them; the error falls as 1 / sqrt(n)."""

    def drawn(temperature: float, entropy: float, nats: float, count: int) -> Judged:
        noise = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
        units = torch.full((count,), 10.0, dtype=torch.float64)
        return Judged(temperature, torch.full_like(units, entropy), -(nats + noise) * units, units)

    found = {}
    for count in (100, 10_000):
        each = [drawn(1.0, 3.0, 5.0, count), drawn(0.8, 2.0, 3.0, count), drawn(0.9, 2.4, 4.0, count)]
        offset = float(each[0].log_prob.mean()) / -10 - 5.0
        value, error = at_entropy(each, 2.1, 0)
        assert value == pytest.approx(math.exp(3.25 + offset), rel=1e-9)
        found[count] = error / value
        assert at_entropy(each, 1.9, 0) == at_entropy(each, 3.1, 0) == (None, None)
        assert at_entropy(each, 3.0, 0)[0] == pytest.approx(math.exp(5 + offset), rel=1e-9)
    assert found[100] == pytest.approx(0.2 / 10, rel=0.25)
    assert found[10_000] == pytest.approx(0.2 / 100, rel=0.25)


@pytest.mark.parametrize("written", [["--hub_token", "hf_x"], ["--hub_token=hf_x"], ["--hub_to", "hf_x"]])
def test_command_has_no_token(written: list[str]) -> None:
    assert without_tokens(["--seed", "1", *written, "--push_to_hub"], "hf_x") == ["--seed", "1", "--push_to_hub"]
    assert without_tokens(["--hub_model_id", "me/x"], None) == ["--hub_model_id", "me/x"]


# What they refuse

REFUSED = {
    "--method jys --num_inference_steps 4 6": r"--num_inference_steps has \[6\]; --method jys halves intervals",
    "--method jys --unbiased --num_inference_steps 2000": r"has \[2000\]; .* with --unbiased numbers up to 1024",
    "--unbiased": "--unbiased is for --method jys",
    "--method marginal --unmasking bernoulli": "--unmasking is for --method jys or beta",
    "--method beta --order spread --unmasking bernoulli": "--order spread needs --unmasking counts",
    "--order spread": "--order is for --method marginal, search, jys, beta or optimal_grid",
    "--method search --blocks inverse_temperature grid --plan even --num_inference_steps 32": "has 34 floats for 32 steps",
    "--method search --blocks grid": "--blocks grid says when positions open, and --plan best too: add --plan even",
    "--method search --blocks inverse_temperature temperature_line": "two ways to say the same",
    "--plan even": "--plan is for --method search",
    "--method search --blocks remask": "has 1 floats for 4 steps with --blocks remask; allowed are 2 to 19",
    "--method search --num_samples 21": "--num_samples is 21; --method search needs more than 21",
    "--method search --blocks colour": "invalid choice: 'colour'",
    "--blocks grid": "--blocks is for --method search",
    "--block_length 8": "--block_length is for --method learn2pd",
    "--method learn2pd --block_length 0": "--block_length is 0; it must be at least 1",
    "--method learn2pd --hidden_units 0": "--hidden_units is 0; it must be at least 1",
    "--method learn2pd --final_share 1.5": "--final_share is 1.5; allowed are numbers in",
    "--method learn2pd --learned_scheduler": "--learned_scheduler has no filter",
    "--eval_temperatures 1 0": r"--eval_temperatures is \[1.0, 0.0\]; temperatures must be positive",
    "--eval_temperatures nan": "temperatures must be positive",
}


@pytest.mark.parametrize("extra", REFUSED)
def test_arguments_are_refused(extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill.parse_args(
            ["--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path / "out"), *extra.split()]
        )
    assert re.search(REFUSED[extra], capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_cma_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda name: None if name == "cma" else object())
    with pytest.raises(SystemExit):
        distill.parse_args(["--pretrained_model_name_or_path", "x", "--output_dir", "y", "--method", "search"])
    assert re.search(r"needs cma: pip install 'discrete_schedulers\[search\]'", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "extra", "told"),
    [
        (
            "order",
            "--num_inference_steps 9",
            "`--num_inference_steps` has 9; `--method order` opens at least one of the 8",
        ),
        ("learn2pd", "--block_length 3", "`--block_length` is 3, which does not divide the 8 positions"),
        ("search", "--max_data_samples 43", "judges on half of 43 sequences; it needs more than 21 there"),
        ("order", "--max_data_samples 1", "`--method order` has 1 sequences; 1 processes need at least 2"),
        ("order", "--num_samples 1", "`--method order` has 1 sequences; 1 processes need at least 2 (`--num_samples`"),
        ("beta", "--max_data_samples 1", "a curve needs 2 sequences or more; there is 1"),
        ("jys unbiased", "--max_data_samples 1", "a curve needs 2 sequences or more; there is 1"),
    ],
)
def test_refused_before_any_work(work: Path, tmp_path: Path, name: str, extra: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        distill.main([*given(work, name, tmp_path / "out"), *extra.split()])
    assert not (tmp_path / "out").exists()
