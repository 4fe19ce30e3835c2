"""diffusers' own test mixins, unmodified, as an outside judge of our schedulers and pipeline.

They are not part of the diffusers wheel. Give a diffusers source tree (with its `tests` folder) to run them:

    DIFFUSERS_TESTS=/path/to/diffusers pytest tests/test_diffusers_mixins.py

They need `parameterized` and `requests_mock` installed. What they check stands in our own words in
`test_diffusers_contract.py`, which always runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_image_pipeline import CODES, GRID, tiny_network, tiny_vq
from tiny import LENGTH, MASK, WORDS, tiny_model, tiny_tokenizer

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    DiscreteImagePipeline,
    EulerScheduler,
    LSDScheduler,
    TauLeapingScheduler,
)

if "DIFFUSERS_TESTS" not in os.environ:
    pytest.skip("DIFFUSERS_TESTS does not name a diffusers source tree", allow_module_level=True)

pytestmark = pytest.mark.slow

JUDGE = "diffusers_own_tests"  # their package is called `tests`, as ours


def judge(module: str) -> ModuleType:
    """A module of diffusers' tests."""
    if JUDGE not in sys.modules:
        folder = Path(os.environ["DIFFUSERS_TESTS"]) / "tests"
        spec = importlib.util.spec_from_file_location(
            JUDGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        package = importlib.util.module_from_spec(spec)
        sys.modules[JUDGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{JUDGE}.{module}")


schedulers = judge("schedulers.test_schedulers")
pipelines = judge("pipelines.testing_utils")
pipelines_unittest = judge("pipelines.test_pipelines_common")


class Tokens(torch.Tensor):
    """Token ids. The mixin takes `0.1 * sample` for the output of a network: here that is logits."""

    def __rmul__(self, factor: Any) -> torch.Tensor:
        if isinstance(factor, torch.Tensor):  # a product in a scheduler
            return super().__rmul__(factor)
        return torch.randn(*self.shape, len(WORDS), generator=torch.Generator().manual_seed(1))


class SchedulerJudge:
    forward_default_kwargs = (("num_inference_steps", 10),)
    arguments: dict[str, Any] = {"vocab_size": len(WORDS), "mask_token_id": MASK}

    @property
    def dummy_sample(self) -> Tokens:
        return torch.full((4, LENGTH), MASK).as_subclass(Tokens)

    def get_scheduler_config(self, **changes: Any) -> dict[str, Any]:
        return self.arguments | changes

    @unittest.skip("`trained_betas` is of Gaussian schedulers")
    def test_trained_betas(self) -> None: ...


class UniformJudge(SchedulerJudge):
    arguments = {"vocab_size": len(WORDS), "process": "uniform"}

    @property
    def dummy_sample(self) -> Tokens:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, len(WORDS), (4, LENGTH), generator=generator).as_subclass(Tokens)


class TestAncestral(SchedulerJudge, schedulers.SchedulerCommonTest):
    scheduler_classes = (AncestralScheduler,)


class TestAncestralUniform(UniformJudge, schedulers.SchedulerCommonTest):
    scheduler_classes = (AncestralScheduler,)


class TestEuler(SchedulerJudge, schedulers.SchedulerCommonTest):
    scheduler_classes = (EulerScheduler,)


class TestEulerUniform(UniformJudge, schedulers.SchedulerCommonTest):
    scheduler_classes = (EulerScheduler,)


class TestTauLeaping(SchedulerJudge, schedulers.SchedulerCommonTest):
    scheduler_classes = (TauLeapingScheduler,)


class TestTauLeapingUniform(UniformJudge, schedulers.SchedulerCommonTest):
    scheduler_classes = (TauLeapingScheduler,)


class TestLSD(SchedulerJudge, schedulers.SchedulerCommonTest):
    scheduler_classes = (LSDScheduler,)


class TestLSDLearned(SchedulerJudge, schedulers.SchedulerCommonTest):
    """With coefficients for the two budgets that the mixin takes."""

    scheduler_classes = (LSDScheduler,)

    def get_scheduler_config(self, **changes: Any) -> dict[str, Any]:
        coefficients = {str(steps): {"scale": [1 + i / 3 for i in range(steps)]} for steps in (10, 50)}
        return self.arguments | {"coefficients": coefficients} | changes


class TestLSDUniform(UniformJudge, schedulers.SchedulerCommonTest):
    scheduler_classes = (LSDScheduler,)


class PipelineJudge:
    """`num_samples` is our `num_images_per_prompt`."""

    pipeline_class = DiscreteDiffusionPipeline
    required_input_params_in_call_signature = frozenset(["prompt", "length"])
    batch_input_params = frozenset(["prompt"])
    optional_input_params = frozenset(
        ["num_inference_steps", "num_samples", "generator", "latents", "output_type", "return_dict"]
    )
    output_shape = (200,)

    def get_dummy_components(self) -> dict[str, Any]:
        scheduler = AncestralScheduler(vocab_size=len(WORDS), mask_token_id=MASK)
        return {"model": tiny_model(max_length=256), "scheduler": scheduler, "tokenizer": tiny_tokenizer()}

    def get_dummy_inputs(self, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        return {
            "prompt": "the old cat sat",
            "length": 200,  # one of the mixin's prompts has 101 words
            "num_inference_steps": 3,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "pt",
        }


class TestPipeline(PipelineJudge, pipelines.BasePipelineTesterConfig, pipelines.PipelineTesterMixin):
    @pytest.mark.skip("the tokenizer is optional, but not with a prompt: see TestPipelineWithoutPrompt")
    def test_save_load_optional_components(self) -> None: ...


class WithoutPrompt(PipelineJudge):
    required_input_params_in_call_signature = frozenset(["num_samples", "length"])
    batch_input_params = frozenset()

    def get_dummy_inputs(self, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        inputs = super().get_dummy_inputs(device, seed)
        del inputs["prompt"]
        return inputs


NO_BATCH = "no argument makes a batch here: see TestPipeline"
NO_GUIDE = "guidance by nothing is an error: see TestPipeline"


class TestPipelineWithoutPrompt(WithoutPrompt, pipelines.BasePipelineTesterConfig, pipelines.PipelineTesterMixin):
    @pytest.mark.skip(NO_BATCH)
    def test_inference_batch_consistent(self) -> None: ...

    @pytest.mark.skip(NO_BATCH)
    def test_inference_batch_single_identical(self) -> None: ...

    @pytest.mark.skip(NO_GUIDE)
    def test_cfg(self) -> None: ...

    @pytest.mark.skip(NO_GUIDE)
    def test_callback_cfg(self) -> None: ...


class TestPipelineMemory(PipelineJudge, pipelines.BasePipelineTesterConfig, pipelines.MemoryTesterMixin):
    pass


class TestPipelineUnittest(PipelineJudge, pipelines_unittest.PipelineTesterMixin, unittest.TestCase):
    """The older form of the mixin, which checks some things that the newer one does not."""

    test_attention_slicing = False  # of networks whose attention can be sliced; compares images
    params = PipelineJudge.required_input_params_in_call_signature
    batch_params = PipelineJudge.batch_input_params
    required_optional_params = PipelineJudge.optional_input_params

    @unittest.skip("the tokenizer is optional, but not with a prompt: see TestPipelineUnittestWithoutPrompt")
    def test_save_load_optional_components(self) -> None: ...


class TestPipelineUnittestWithoutPrompt(WithoutPrompt, pipelines_unittest.PipelineTesterMixin, unittest.TestCase):
    test_attention_slicing = False
    params = WithoutPrompt.required_input_params_in_call_signature
    batch_params = WithoutPrompt.batch_input_params
    required_optional_params = WithoutPrompt.optional_input_params

    @unittest.skip(NO_BATCH)
    def test_inference_batch_consistent(self) -> None: ...

    @unittest.skip(NO_BATCH)
    def test_inference_batch_single_identical(self) -> None: ...

    @unittest.skip(NO_GUIDE)
    def test_cfg(self) -> None: ...

    @unittest.skip(NO_GUIDE)
    def test_callback_cfg(self) -> None: ...


class ImageJudge:
    pipeline_class = DiscreteImagePipeline
    required_input_params_in_call_signature = frozenset(["class_labels", "guidance_scale"])
    batch_input_params = frozenset(["class_labels"])
    optional_input_params = frozenset(
        ["num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"]
    )
    output_shape = (3, 2 * GRID[0], 2 * GRID[1])

    def get_dummy_components(self) -> dict[str, Any]:
        scheduler = AncestralScheduler(vocab_size=CODES + 1, mask_token_id=CODES)
        parts = {"model": tiny_network(grid_shape=GRID), "scheduler": scheduler, "decoder": tiny_vq()}
        return parts | {"tokenizer": None, "text_encoder": None}

    def get_dummy_inputs(self, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        return {
            "class_labels": 1,
            "guidance_scale": 2.0,
            "num_inference_steps": 3,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "pt",
        }


class TestImagePipeline(ImageJudge, pipelines.BasePipelineTesterConfig, pipelines.PipelineTesterMixin):
    pass


class TestImagePipelineMemory(ImageJudge, pipelines.BasePipelineTesterConfig, pipelines.MemoryTesterMixin):
    pass


class TestImagePipelineUnittest(ImageJudge, pipelines_unittest.PipelineTesterMixin, unittest.TestCase):
    test_attention_slicing = False
    params = ImageJudge.required_input_params_in_call_signature
    batch_params = ImageJudge.batch_input_params
    required_optional_params = ImageJudge.optional_input_params
