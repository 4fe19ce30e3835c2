"""What diffusers expects of a scheduler and a pipeline, in our own words.

diffusers' own mixins, which check the same, run in `test_diffusers_mixins.py` where its source tree is at hand.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from scheduler_cases import CASES as EVERY_CASE
from scheduler_cases import SchedulerCase
from tiny import LENGTH, MASK, WORDS, seeded, tiny_pipeline
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import discrete_schedulers
from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    EulerScheduler,
    GillespieScheduler,
    LearnedScheduler,
    LSDScheduler,
    TauLeapingScheduler,
)

V = len(WORDS)
STEPS = 10
SCALE = [1 + i / 3 for i in range(STEPS)]
CLASSES = [AncestralScheduler, EulerScheduler, LSDScheduler, TauLeapingScheduler]  # the rest: test_schedulers.py
CASES: list[tuple[type[DiscreteScheduler], dict[str, Any]]] = [
    *((cls, {"vocab_size": V, "mask_token_id": MASK}) for cls in CLASSES),
    *((cls, {"vocab_size": V, "process": "uniform"}) for cls in CLASSES),
    (LSDScheduler, {"vocab_size": V, "mask_token_id": MASK, "coefficients": {str(STEPS): {"scale": SCALE}}}),
    (AncestralScheduler, {"vocab_size": V, "mask_token_id": MASK, "grid": "cosine", "temperature": 0.8, "top_p": 0.9}),
]
cases = pytest.mark.parametrize(("cls", "arguments"), CASES, ids=lambda case: getattr(case, "__name__", None))
# every class once, without coefficients, which are for other budgets
PLAIN = {case.cls: case for case in reversed(EVERY_CASE) if "coefficients" not in case.kwargs}
PLAIN[LearnedScheduler] = SchedulerCase("learned", LearnedScheduler, {})
OTHERS = [
    (cls, {"vocab_size": V, "mask_token_id": MASK if case.is_absorbing else None} | case.kwargs)
    for cls, case in PLAIN.items()
    if cls not in CLASSES
]
every = pytest.mark.parametrize(("cls", "arguments"), CASES + OTHERS, ids=lambda case: getattr(case, "__name__", None))


def tokens(arguments: dict[str, Any]) -> Tensor:
    """A sample at t = 1 of the process, (4, LENGTH)."""
    if arguments.get("mask_token_id") is not None:
        return torch.full((4, LENGTH), MASK)
    return torch.randint(0, V, (4, LENGTH), generator=seeded(2))


def logits() -> Tensor:
    return torch.randn(4, LENGTH, V, generator=seeded(3))


def public(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


# Schedulers


@every
def test_scheduler_interface(cls: type[DiscreteScheduler], arguments: dict[str, Any]) -> None:
    scheduler = cls(**arguments)
    assert isinstance(scheduler, SchedulerMixin)
    assert cls.config_name == "scheduler_config.json"
    assert cls.__name__.endswith("Scheduler")  # diffusers reads the kind of a class off its name
    assert scheduler.init_noise_sigma == 1
    scheduler.set_timesteps(STEPS)
    assert STEPS <= len(scheduler.timesteps) <= STEPS * scheduler.order
    scheduler = cls(**arguments)
    assert len(scheduler.timesteps) >= 1  # before `set_timesteps` too
    sample = tokens(arguments)
    assert torch.equal(scheduler.scale_model_input(sample, 0.0), sample)
    assert list(inspect.signature(cls.set_timesteps).parameters) == ["self", "num_inference_steps", "device"]
    step = inspect.signature(cls.step).parameters
    assert list(step) == ["self", "model_output", "timestep", "sample", "generator", "return_dict"]
    assert "kwargs" not in inspect.signature(cls.__init__).parameters
    assert getattr(discrete_schedulers, cls.__name__) is cls  # diffusers looks the class up there


@cases
def test_step_output(cls: type[DiscreteScheduler], arguments: dict[str, Any]) -> None:
    scheduler, sample = cls(**arguments), tokens(arguments)
    scheduler.set_timesteps(STEPS)
    before = sample.clone()
    for index in (0, 1, STEPS - 1):
        t = scheduler.timesteps[index]
        output = scheduler.step(logits(), t, sample, generator=seeded())
        assert isinstance(output, BaseOutput)
        assert output.prev_sample.shape == sample.shape
        assert output.prev_sample.dtype == torch.int64
        assert output[0] is output.prev_sample
        as_tuple = scheduler.step(logits(), t, sample, generator=seeded(), return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], output.prev_sample)
        for one, other in zip(
            as_tuple, (output.prev_sample, output.pred_original_sample, output.pred_logits), strict=True
        ):
            assert (one is None and other is None) or torch.equal(one, other)
        by_index = scheduler.step(logits(), index, sample, generator=seeded())
        assert torch.equal(by_index.prev_sample, output.prev_sample)
    other_seed = scheduler.step(logits(), t, sample, generator=seeded(1)).prev_sample
    assert not torch.equal(other_seed, output.prev_sample)
    assert torch.equal(sample, before)


@cases
def test_step_after_save_and_load(cls: type[DiscreteScheduler], arguments: dict[str, Any], tmp_path: Path) -> None:
    scheduler = cls(**arguments)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for one in (scheduler, loaded):
        one.set_timesteps(STEPS)
    assert torch.equal(scheduler.times, loaded.times)
    for t in scheduler.timesteps:
        sample = scheduler.add_noise(torch.zeros(4, LENGTH, dtype=torch.int64), timesteps=t[None], generator=seeded(5))
        expected = scheduler.step(logits(), t, sample, generator=seeded()).prev_sample
        assert torch.equal(loaded.step(logits(), t, sample, generator=seeded()).prev_sample, expected)


@every
def test_config_survives(cls: type[DiscreteScheduler], arguments: dict[str, Any], tmp_path: Path) -> None:
    scheduler = cls(**arguments)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert public(loaded.config) == public(scheduler.config)
    assert "_use_default_values" not in loaded.config
    assert public(scheduler.config).items() >= arguments.items()
    written = (tmp_path / "scheduler_config.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(written, parse_constant=refuse)
    assert content["_class_name"] == cls.__name__
    assert public(content) == public(scheduler.config)
    changed = cls.from_pretrained(tmp_path, temperature=0.25)
    assert changed.config.temperature == 0.25
    named = DiscreteScheduler.from_pretrained(tmp_path, temperature=0.25)  # whatever it is
    assert type(named) is cls
    assert public(named.config) == public(changed.config)


@pytest.mark.parametrize("config", [{"vocab_size": 4}, {"_class_name": "DDIMScheduler"}, None])
def test_a_scheduler_of_any_class_needs_its_name(config: dict[str, Any] | None) -> None:
    with pytest.raises(
        ValueError, match=r"`config` is of the class (None|'DDIMScheduler'); known: AncestralScheduler, "
    ):
        DiscreteScheduler.from_config(config)


@cases
def test_compatibles(
    cls: type[DiscreteScheduler],
    arguments: dict[str, Any],
    warnings_of_diffusers: Callable[[], list[str]],
    tmp_path: Path,
) -> None:
    scheduler = cls(**arguments)
    process = scheduler.config.process
    assert set(scheduler.compatibles) == {case.cls for case in EVERY_CASE if process in case.cls.processes}
    for other in scheduler.compatibles:
        there = other.from_config(scheduler.config)
        assert type(there) is other
        back = cls.from_config(there.config)
        assert {key: back.config[key] for key in public(scheduler.config)} == public(scheduler.config)
        there.save_pretrained(tmp_path / other.__name__)
        from_file = cls.from_config(other.from_pretrained(tmp_path / other.__name__).config)
        assert {key: from_file.config[key] for key in public(scheduler.config)} == public(scheduler.config)
    assert warnings_of_diffusers() == []
    cls.from_config({**scheduler.config, "temprature": 2.0})
    assert any("temprature" in line for line in warnings_of_diffusers())  # a slip of the pen is still told


@cases
def test_learned_after_construction(cls: type[DiscreteScheduler], arguments: dict[str, Any]) -> None:
    """A value registered after `__init__` is kept by `from_config`; diffusers alone drops it."""
    scheduler = cls(**arguments)
    coefficients = {"2": {"times": [1.0, 0.3, 0.0]}}
    scheduler.register_to_config(coefficients=coefficients)
    for other in CLASSES:
        assert other.from_config(scheduler.config).config.coefficients == coefficients


def test_a_grid_that_only_one_class_has() -> None:
    """Counts are a grid of the learned scheduler's: the others take their own, for any budget, and give the counts back."""
    counts = {"coefficients": {"2": {"counts": [1, 3]}}}
    learned = LearnedScheduler(V, MASK, grid="learned", **counts)
    learned.set_timesteps(2)
    for other in learned.compatibles:
        there = other.from_config(learned.config)
        assert there.config.grid == ("learned" if other is LearnedScheduler else "uniform")
        if other is not GillespieScheduler and other.learned_block is None and other is not LearnedScheduler:
            there.set_timesteps(3)
        back = LearnedScheduler.from_config(there.config)
        back.set_timesteps(2)
        assert torch.equal(back.times, learned.times)
    times = LearnedScheduler(V, MASK, grid="learned", coefficients={"2": {"times": [1.0, 0.3, 0.0]}})
    assert AncestralScheduler.from_config(times.config).config.grid == "learned"
    assert AncestralScheduler.from_config(learned.config, grid="cosine").config.grid == "cosine"


def test_equal_names_have_equal_defaults() -> None:
    """Otherwise a swap in memory and one through a file give different schedulers."""
    defaults: dict[str, set] = {}
    for cls in CLASSES:
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            defaults.setdefault(name, set()).add(parameter.default)
    assert {name: values for name, values in defaults.items() if len(values) > 1} == {}
    assert all(len(inspect.signature(cls.__init__).parameters) > 2 for cls in CLASSES)


def test_swap_with_a_scheduler_of_diffusers() -> None:
    ours = EulerScheduler(vocab_size=V, mask_token_id=MASK, temperature=0.5)
    theirs = DDIMScheduler.from_config(ours.config)
    back = EulerScheduler.from_config(theirs.config)
    assert public(ours.config).items() <= public(back.config).items()


@every
def test_add_noise(cls: type[DiscreteScheduler], arguments: dict[str, Any]) -> None:
    scheduler = cls(**arguments)
    scheduler.set_timesteps(STEPS)
    clean = torch.randint(0, MASK, (2000, LENGTH), generator=seeded(4))
    floats = torch.randn(clean.shape, generator=seeded())
    noisy = scheduler.add_noise(clean, floats, scheduler.timesteps[5][None])
    assert noisy.shape == clean.shape
    assert noisy.dtype == torch.int64
    t = float(scheduler.timesteps[5])
    changed = (1 - 1e-3) * t * (1 if scheduler.config.process == "absorbing" else 1 - 1 / V)
    spread = (changed * (1 - changed) / clean.numel()) ** 0.5
    assert abs(float((noisy != clean).double().mean()) - changed) < 4.5 * spread
    if scheduler.config.process == "absorbing":
        assert ((noisy == clean) | (noisy == MASK)).all()
    per_row = scheduler.add_noise(clean[:2], timesteps=torch.tensor([0.0, 1.0]), generator=seeded())
    assert torch.equal(per_row[0], clean[0])
    assert (per_row[1] != clean[1]).double().mean() > 0.7
    by_index = scheduler.add_noise(clean, timesteps=torch.tensor([5]), generator=seeded())
    by_time = scheduler.add_noise(clean, timesteps=scheduler.timesteps[5:6], generator=seeded())
    assert torch.equal(by_index, by_time)
    given = torch.full_like(clean, 3)
    to_given = scheduler.add_noise(clean, given, torch.tensor([1.0]), generator=seeded())
    assert ((to_given == clean) | (to_given == 3)).all()
    with pytest.raises(ValueError, match="`timesteps` is required"):
        scheduler.add_noise(clean)


@every
def test_attributes(cls: type[DiscreteScheduler], arguments: dict[str, Any]) -> None:
    scheduler = cls(**arguments)
    scheduler.anything = 5
    scheduler.register_to_config(something=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scheduler.anything == 5
        assert scheduler.save_pretrained
        assert scheduler.config.something == 6
    with pytest.warns(FutureWarning, match="something"):
        assert scheduler.something == 6
    with pytest.raises(AttributeError, match=f"'{cls.__name__}' object has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist


def test_library_names_that_diffusers_reads() -> None:
    """Loading looks these up on the library, and the library up in this table, which is not documented: if diffusers moves
    it, this is the test to fail."""
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    methods = ["save_pretrained", "from_pretrained"]
    assert LOADABLE_CLASSES["discrete_schedulers"] == {"ModelMixin": methods, "SchedulerMixin": methods}
    assert discrete_schedulers.SchedulerMixin is SchedulerMixin
    assert discrete_schedulers.ModelMixin is ModelMixin
    for name in discrete_schedulers.__all__:
        assert getattr(discrete_schedulers, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchScheduler'"):
        _ = discrete_schedulers.NoSuchScheduler


# Pipelines: the transformer of this library, and one of transformers


def ddit() -> DiscreteDiffusionPipeline:
    return tiny_pipeline()


def bert() -> DiscreteDiffusionPipeline:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    return tiny_pipeline(model=BertForMaskedLM(config).eval(), denoiser={"max_length": 32})


pipelines = pytest.mark.parametrize("build", [ddit, bert])
Build = Callable[[], DiscreteDiffusionPipeline]


def inputs(**changes: Any) -> dict[str, Any]:
    standard = {"prompt": "the old cat", "length": 20, "num_inference_steps": 4, "output_type": "pt"}
    return standard | {"generator": seeded()} | changes


def quiet(pipe: DiscreteDiffusionPipeline) -> DiscreteDiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_call_signature() -> None:
    parameters = inspect.signature(DiscreteDiffusionPipeline.__call__).parameters
    assert all(
        parameter.default is not inspect.Parameter.empty for name, parameter in parameters.items() if name != "self"
    )
    names = "prompt template num_samples length num_inference_steps generator latents output_type return_dict"
    names += " messages negative_prompt class_labels guidance_scale guidance_schedule max_new_tokens logits_processor"
    names += " eos_token_id use_cache"
    assert set(parameters) - {"self"} == {
        *names.split(),
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    }
    assert parameters["return_dict"].default is True


@pipelines
def test_components(build: Build) -> None:
    pipe = build()
    assert set(pipe.components) == {"model", "scheduler", "tokenizer"}
    again = DiscreteDiffusionPipeline(**pipe.components, denoiser=pipe.config.denoiser)
    assert torch.equal(quiet(again)(**inputs())[0], pipe(**inputs())[0])


@pipelines
def test_dict_and_tuple_are_equal(build: Build) -> None:
    pipe = build()
    output = pipe(**inputs())
    assert isinstance(output, BaseOutput)
    assert torch.equal(output[0], output.sequences)
    assert torch.equal(pipe(**inputs(), return_dict=False)[0], output.sequences)


@pipelines
def test_batch_is_its_rows(build: Build) -> None:
    """With prompts of unequal lengths and one generator each."""
    pipe = build()
    prompts = ["the old cat", "the", "a big red bird flew under the old tree and then it sat on a"]
    batch = pipe(**inputs(prompt=prompts, generator=[seeded(i) for i in range(3)]))[0]
    assert batch.shape == (3, 20)
    for i, prompt in enumerate(prompts):
        assert torch.equal(batch[i], pipe(**inputs(prompt=prompt, generator=seeded(i)))[0][0])


@pipelines
@pytest.mark.usefixtures("warnings_of_diffusers")
def test_save_and_load(build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = build()
    expected = pipe(**inputs())[0]
    for safe in (True, False):
        folder = tmp_path / str(safe)
        pipe.save_pretrained(folder, safe_serialization=safe)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="diffusers"):
            loaded = quiet(DiscreteDiffusionPipeline.from_pretrained(folder))
        messages = [record.getMessage() for record in caplog.records]
        for name in ("model", "scheduler", "tokenizer"):  # each went through diffusers' own loader
            assert any(message.startswith(f"Loaded {name} as ") for message in messages)
        assert torch.equal(loaded(**inputs())[0], expected)
        assert public(loaded.scheduler.config) == public(pipe.scheduler.config)


@pipelines
def test_optional_components(build: Build, tmp_path: Path) -> None:
    pipe, arguments = build(), inputs()
    del arguments["prompt"]
    pipe.tokenizer = None
    output = pipe(**arguments)[0]
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiscreteDiffusionPipeline.from_pretrained(tmp_path))
    assert loaded.tokenizer is None
    assert torch.equal(loaded(**arguments | {"generator": seeded()})[0], output)


@pipelines
def test_device_and_dtype(build: Build, tmp_path: Path) -> None:
    pipe = build()
    expected = pipe(**inputs())[0]
    assert pipe.to("cpu").device == torch.device("cpu")
    assert torch.equal(pipe(**inputs())[0], expected)
    pipe.save_pretrained(tmp_path)
    assert pipe.to(dtype=torch.float16).model.dtype == torch.float16
    assert pipe.dtype == torch.float16
    assert pipe.to(torch.float32).model.dtype == torch.float32
    for dtype in (torch.bfloat16, {"model": torch.bfloat16, "default": torch.float16}):
        loaded = quiet(DiscreteDiffusionPipeline.from_pretrained(tmp_path, dtype=dtype))
        assert loaded.model.dtype == torch.bfloat16
        sequences = loaded(**inputs())[0]
        assert (sequences != MASK).all()
        assert loaded.scheduler.timesteps.dtype == torch.float64


@pipelines
def test_variants(build: Build, tmp_path: Path) -> None:
    pipe = build()
    pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    weights = [path.name for path in (tmp_path / "variant" / "model").iterdir() if path.suffix == ".safetensors"]
    assert weights
    assert all(".fp16." in name for name in weights)
    loaded = quiet(DiscreteDiffusionPipeline.from_pretrained(tmp_path / "variant", variant="fp16"))
    for one, other in zip(pipe.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(one, other)
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="`variant=fp16`"):
        DiscreteDiffusionPipeline.from_pretrained(tmp_path / "plain", variant="fp16")


@pipelines
def test_callback_inputs(build: Build) -> None:
    pipe = build()
    assert pipe._callback_tensor_inputs == ["latents"]
    seen = []

    def look(pipe: DiffusionPipeline, step: int, t: Tensor, kwargs: dict) -> dict:
        seen.append(set(kwargs))
        return kwargs

    for names in (None, ["latents"], pipe._callback_tensor_inputs):
        arguments = inputs(output_type="latent", callback_on_step_end_tensor_inputs=names)
        pipe(**arguments, callback_on_step_end=look)
    assert seen == [{"latents"}] * 12

    def clear_at_the_end(pipe: DiffusionPipeline, step: int, t: Tensor, kwargs: dict) -> dict:
        if step == pipe.num_timesteps - 1:
            kwargs["latents"] = torch.zeros_like(kwargs["latents"])
        return kwargs

    output = pipe(**inputs(output_type="latent", callback_on_step_end=clear_at_the_end))[0]
    assert (output == 0).all()
