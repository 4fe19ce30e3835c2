"""Where weights of the Hub's repositories go: one device, several, disk; and how much memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_ddit import published_shapes
from test_families import IDS, MDLM, TIME, Tiny, causal_cases, ddit_cases

from discrete_schedulers import DiscreteDiffusionPipeline
from discrete_schedulers.models import loading


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tiny]]:
    """Repositories as folders."""
    made = tmp_path_factory.mktemp("made")
    found = {}
    for name, case in (ddit_cases(made) | causal_cases(made)).items():
        if name in ("org/mdlm", "org/dream", "org/a2d"):
            folder = tmp_path_factory.mktemp("repository")
            for file, content in case.files.items():
                (folder / file).write_bytes(content)
            found[name] = folder, case
    return found


def loaded(case: tuple[Path, Tiny], **kwargs: Any) -> DiscreteDiffusionPipeline:
    folder, tiny = case
    arguments = {"tokenizer": None, "mask_token_id": 21} | kwargs
    return DiscreteDiffusionPipeline.from_pretrained(folder, family=tiny.family, **arguments)


MAPS = {
    "org/mdlm": {
        "vocab_embed": "cpu",
        "sigma_map": "cpu",
        "rotary_emb": "cpu",
        "blocks": "cpu",
        "output_layer": "disk",
    },
    "org/dream": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
    | {"model.rotary_emb": "cpu", "lm_head": "cpu"},
    "org/a2d": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    | {"lm_head": "cpu"},  # tied to the embedding
}


@pytest.mark.parametrize("name", MAPS)
def test_dictionaries(name: str, cases: dict[str, tuple[Path, Tiny]], tmp_path: Path) -> None:
    """All on the CPU, and parts of it on disk: the same logits."""
    with torch.no_grad():
        for places in (dict.fromkeys(MAPS[name], "cpu"), MAPS[name]):
            pipe = loaded(cases[name], device_map=places, offload_folder=tmp_path)
            assert any(p.is_meta for p in pipe.model.parameters()) == ("disk" in places.values())
            raw = pipe.denoiser.raw(IDS, TIME)
            torch.testing.assert_close(raw.double(), cases[name][1].expected.double(), rtol=0, atol=2e-5)
            pipe.set_progress_bar_config(disable=True)
            assert pipe(length=8, num_inference_steps=2, output_type="pt").sequences.shape == (1, 8)
    assert (tmp_path / "index.json").is_file()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("strategy", ["auto", "sequential"])
def test_strategies(name: str, strategy: str, cases: dict[str, tuple[Path, Tiny]], tmp_path: Path) -> None:
    """With room for everything, and with room for four fifths of it, the rest on disk, in the dtype that is asked for."""
    with torch.no_grad():
        whole = loaded(cases[name], device_map=strategy)
        weights = sum(p.numel() * p.element_size() for p in whole.model.parameters())
        assert {p.device.type for p in whole.model.parameters()} == {"cpu"}
        half = loaded(
            cases[name],
            device_map=strategy,
            max_memory={"cpu": int(0.4 * weights)},
            offload_folder=tmp_path,
            torch_dtype=torch.bfloat16,
        )
        places = {p.device.type for p in half.model.parameters()}
        assert places == {"cpu", "meta"}
        assert half.model.dtype == torch.bfloat16
        raw, expected = half.denoiser.raw(IDS, TIME), whole.denoiser.raw(IDS, TIME)
    assert not torch.equal(raw.float(), expected)
    torch.testing.assert_close(raw.float(), expected, rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": "round"}, "`device_map` is 'round'; allowed: a device such as 'cuda:0', 'auto', "),
        ({"device_map": {"blocks": "cpu"}}, "output_layer"),
        ({"device_map": MAPS["org/mdlm"]}, "`offload_folder` is required: `device_map` puts modules on disk"),
        ({"device_map": "cpu", "max_memory": {"cpu": 1}}, "`max_memory` is for `device_map` 'auto'"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str, cases: dict[str, tuple[Path, Tiny]]) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(cases["org/mdlm"], **arguments)


# ---- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import json, resource, sys
from pathlib import Path
import torch, transformers, accelerate, tokenizers
from discrete_schedulers import DiscreteDiffusionPipeline

def peak():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1]) * 1024

repository, tiny, dtype = sys.argv[1:]
arguments = {"tokenizer": None, "torch_dtype": getattr(torch, dtype)}
DiscreteDiffusionPipeline.from_pretrained(tiny, **arguments)  # all that is imported on the way
before = peak()
pipe = DiscreteDiffusionPipeline.from_pretrained(repository, **arguments)
total = sum(parameter.sum().item() for parameter in pipe.model.parameters())  # every page has been read
weights = sum(parameter.numel() * parameter.element_size() for parameter in pipe.model.parameters())
print(json.dumps({"peak": peak() - before, "weights": weights, "parameters": sum(p.numel() for p in pipe.model.parameters())}))
"""


def write_repository(folder: Path, hidden: int, blocks: int, vocab_size: int, kind: str) -> Path:
    """MDLM of a size, all weights 0.01."""
    folder.mkdir()
    sizes = {"hidden_dim": hidden, "n_blocks": blocks, "n_heads": 16, "vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(MDLM | sizes))
    shapes = published_shapes(vocab_size, hidden, blocks, 16, 128)
    state = {f"backbone.{key}": torch.full(shape, 0.01) for key, shape in shapes.items()}
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_another_dtype_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, however small the pieces; integers and what is as it should be stay."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(13, generator=generator),
        "c": torch.arange(9),
    }
    state |= {"d": torch.tensor(0.3), "e": torch.randn(4, 3, generator=generator).bfloat16()}
    save_file(state, tmp_path / "some.safetensors")
    torch.save(state, tmp_path / "some.bin")
    for piece in (8, 50, 2**24):
        monkeypatch.setattr(loading, "PIECE", piece)
        for name in ("some.safetensors", "some.bin"):
            found = dict(loading.tensors_of(tmp_path / name, torch.bfloat16))
            assert {key: value.dtype for key, value in found.items()} == dict.fromkeys("abde", torch.bfloat16) | {
                "c": torch.int64
            }
            for key, value in found.items():
                assert torch.equal(value, state[key].to(value.dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("safetensors", "float32"), ("safetensors", "bfloat16"), ("bin", "float32")]
)
def test_peak_memory(kind: str, dtype: str, tmp_path: Path) -> None:
    """A model of 200 million parameters, loaded in a process of its own, takes 1.15 times its weights at most, also where it
    gets another dtype than the file has."""
    tiny = write_repository(tmp_path / "tiny", 32, 1, 40, kind)
    large = write_repository(tmp_path / "large", 1024, 12, 20_000, kind)
    arguments = [sys.executable, "-c", PEAK, str(large), str(tiny), dtype]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    measured = json.loads(output.splitlines()[-1])
    assert measured["parameters"] > 195e6
    assert measured["peak"] <= 1.15 * measured["weights"], measured
    assert measured["peak"] >= 0.9 * measured["weights"], measured
