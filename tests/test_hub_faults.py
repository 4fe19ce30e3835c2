"""A Hub that is busy, refuses, breaks off or sends something else: what is tried again, and what one error says.

Clients are processes of their own (see hub.py) in which `time.sleep` returns at once and writes down how long it was to be.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hub import Fault, LoopbackHub, Repository
from safetensors.torch import save_file
from test_distill import save_model
from tiny import tiny_pipeline

from discrete_schedulers.training import adapt, distill

pytestmark = pytest.mark.slow
ALWAYS = 10_000
FOLDER = {
    "scheduler_config.json": b'{"_class_name": "LSDScheduler"}\n',
    "metrics.json": b"{}\n",
    "plot.png": b"\x89PNG",
    "README.md": b"---\nlicense: apache-2.0\n---\n# x\n",
}
AWAKE = """
import json, sys, time
waits, sleep = [], time.sleep
time.sleep = lambda seconds: waits.append(seconds) if seconds >= 0.5 else sleep(seconds)
"""


class Case(NamedTuple):
    """Faults, what is said (`None`: it works), and what our own code waits for: the seconds before each further try."""

    faults: list[Fault]
    error: str | None = None
    waits: list[float] | None = None


# Uploads

CREATE, COMMIT = "POST /api/repos/create/{}$", "POST .*/{}/commit/main$"
PUSHES = {
    "fine": Case([], waits=[]),
    "there": Case([], waits=[]),  # 409: it exists
    "busy": Case([Fault(CREATE, 2, 503)], waits=[1, 2]),
    "broken": Case([Fault(CREATE, 1, cut=0)], waits=[1]),
    "patience": Case([Fault(CREATE, 2, 429, headers={"Retry-After": "7"})], waits=[7, 7]),
    "later": Case([Fault(CREATE, ALWAYS, 429, headers={"Retry-After": "3600"})], "429", waits=[]),
    "down": Case([Fault(CREATE, ALWAYS, 500)], "500 ", waits=[1, 2, 4, 8]),
    "stranger": Case([Fault(CREATE, ALWAYS, 401, "Invalid credentials")], "Invalid credentials", waits=[]),
    "forbidden": Case([Fault(CREATE, ALWAYS, 403, "not your namespace")], "not your namespace", waits=[]),
    "raced": Case([Fault(COMMIT, 2, 412, "A commit has happened since")], waits=[1, 2]),
    "race": Case(
        [Fault(COMMIT, ALWAYS, 412, "A commit has happened since")], "A commit has happened", waits=[1, 2, 4, 8]
    ),
    "commits": Case([Fault(COMMIT, 2, 503)]),  # huggingface_hub repeats commits itself
    "readonly": Case([Fault(COMMIT, ALWAYS, 403, "read-only token")], "read-only token", waits=[]),
    "gone": Case([Fault("POST .*/{}/preupload/", ALWAYS, 404, "not there")], "404", waits=[]),
}
PUSH = """
from pathlib import Path
from discrete_schedulers.training.hub import create_repository, upload
folder, told = Path(sys.argv[1]), {}
for name in sys.argv[2:]:
    waits.clear()
    try:
        error = upload(folder, create_repository(folder, name, None), None) and None
    except RuntimeError as caught:
        error = str(caught)
    told[name] = [error, list(waits)]
print("TOLD", json.dumps(told))
"""


def told_by(printed: str) -> Any:
    return json.loads(re.search(r"^TOLD (.*)$", printed, re.MULTILINE)[1])


def set_up(hub: LoopbackHub, cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        for fault in case.faults:
            fault.matching = fault.matching.format(name)
            hub.fail_next(fault)


def test_uploads(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "my results"
    folder.mkdir()
    for name, content in FOLDER.items():
        (folder / name).write_bytes(content)
    hub.repos["tester/there"] = Repository("tester/there", private=False)
    set_up(hub, PUSHES)
    told = told_by(hub.python(AWAKE + PUSH, folder, *PUSHES))
    for name, case in PUSHES.items():
        error, waits = told[name]
        if case.waits is not None:
            assert waits == case.waits, (name, error)
        if case.error is None:
            assert error is None, name
            assert dict(hub.repos[f"tester/{name}"].files) == FOLDER, name
            assert len(hub.repos[f"tester/{name}"].commits) == 2, name
            continue
        assert re.match(f"could not push to '(tester/)?{name}': .*{case.error}", error, re.DOTALL), (name, error)
        assert f"Nothing is lost: the results are in {folder}" in error
        assert "--resume_from_checkpoint latest" in error
        command = shlex.split(re.search("To push them later: `(.*?)`", error)[1])
        assert command[:2] == ["hf", "upload"]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == FOLDER

    # What it says to do later, done later: from another place, with a Hub that is well again
    hub._server.faults.clear()
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "state.json").write_text("{}")
    command = shlex.split(re.search("To push them later: `(.*?)`", told["down"][0])[1])
    done = hub.run(Path(sys.executable).with_name("hf"), *command[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert dict(hub.repos["tester/down"].files) == FOLDER


# Downloads

WEIGHTS, ANY = "GET /tester/{}/resolve/.*/diffusion_pytorch_model.safetensors$", "/tester/{}/resolve/"
SHARD, CONFIG = "GET /tester/{}/resolve/.*/part-2.safetensors$", "GET /tester/{}/resolve/.*/scheduler_config.json$"
PIPELINES = {
    "well": Case([], waits=[]),
    "cut": Case([Fault(WEIGHTS, 2, cut=5000)]),
    "slow": Case([Fault(WEIGHTS, 1, slow=2.5)]),
    "refused": Case([Fault(WEIGHTS, 2, 503)], waits=[1, 2]),
    "limited": Case([Fault(WEIGHTS, 1, 429, headers={"Retry-After": "3"})]),
    "changed": Case([Fault(WEIGHTS, 1, flip=True)], waits=[1]),
    "forever": Case([Fault(WEIGHTS, ALWAYS, flip=True)], "came damaged from the Hub: its hash is", waits=[1, 2, 4, 8]),
    "dead": Case([Fault(WEIGHTS, ALWAYS, 500)], "500 ", waits=[1, 2, 4, 8]),
    "private": Case([Fault("/{}(/|$)", ALWAYS, 401, headers={"X-Error-Code": "GatedRepo"})], "401", waits=[]),
    "secret": Case([Fault("/{}(/|$)", ALWAYS, 403, "no access")], r"the Hub answers 403 \(no access\)", waits=[]),
    "away": Case([Fault("HEAD /tester/{}/", ALWAYS, 503)], r"the Hub answers 503 \(not now\)"),
    "lost": Case([Fault("/{}(/|$)", ALWAYS, 404, headers={"X-Error-Code": "RepoNotFound"})], "404", waits=[]),
}
SHARDS = {
    "shards": Case([], waits=[]),
    "shard-cut": Case([Fault(SHARD, 3, cut=900)]),
    "shard-changed": Case([Fault(SHARD, 1, flip=True)], waits=[1]),
    "shard-busy": Case([Fault(SHARD, 1, 502)], waits=[1]),
    "shard-gone": Case(
        [Fault("/{}/resolve/.*/part-2", ALWAYS, 404, headers={"X-Error-Code": "EntryNotFound"})], "lacks part-2"
    ),
}
SCHEDULERS = {
    "plan": Case([], waits=[]),
    "plan-busy": Case([Fault(CONFIG, 1, 503)], waits=[1]),
    "plan-dead": Case([Fault(CONFIG, ALWAYS, 500)], "500 ", waits=[1, 2, 4, 8]),
}
LOAD = """
import hashlib
from discrete_schedulers import AncestralScheduler, DiscreteDiffusionPipeline
from discrete_schedulers.models.loading import tensors_of, weight_paths
def digest(tensors):
    sums = hashlib.sha256()
    for name, tensor in sorted(tensors):
        sums.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sums.hexdigest()
def pipeline(name):
    return digest(DiscreteDiffusionPipeline.from_pretrained(name).model.state_dict().items())
def shards(name):
    return digest(pair for path in weight_paths(name, {}) for pair in tensors_of(path))
def scheduler(name):
    return AncestralScheduler.from_pretrained(name).config.vocab_size
told = {}
for kind, names in json.loads(sys.argv[1]).items():
    for name in names:
        waits.clear()
        try:
            error, loaded = None, globals()[kind]("tester/" + name)
        except (OSError, ValueError) as caught:
            error, loaded = f"{type(caught).__name__}: {caught}", None
        told[name] = [error, list(waits), loaded]
print("TOLD", json.dumps(told))
"""


def repository(hub: LoopbackHub, name: str, folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repos[f"tester/{name}"] = found = Repository(f"tester/{name}", private=False)
    found._append("files", files)


@pytest.fixture
def filled(hub: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """Repositories of pipelines, of weights in two shards, and of schedulers."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "shards").mkdir()
    parts = {f"part-{i}.safetensors": {f"w{i}": torch.arange(600.0) * i} for i in (1, 2)}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / "shards" / name)
    index = {"weight_map": {key: name for name, tensors in parts.items() for key in tensors}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    for cases, folder in ((PIPELINES, "pipeline"), (SHARDS, "shards"), (SCHEDULERS, "scheduler")):
        for name in cases:
            repository(hub, name, tmp_path / folder)
    return hub


def offline(hub: LoopbackHub, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=hub.environment(None) | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_downloads(filled: LoopbackHub, tmp_path: Path) -> None:
    """And what came once is there without a network."""
    hub, kinds = filled, {"pipeline": PIPELINES, "shards": SHARDS, "scheduler": SCHEDULERS}
    for cases in kinds.values():
        set_up(hub, cases)
    names = {kind: list(cases) for kind, cases in kinds.items()}
    done = subprocess.run(
        [sys.executable, "-c", AWAKE + LOAD, json.dumps(names)],
        env=hub.environment() | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = told_by(done.stdout)
    for cases in kinds.values():
        well = told[next(iter(cases))][2]
        assert well is not None
        for name, case in cases.items():
            error, waits, loaded = told[name]
            if case.waits is not None:
                assert waits == case.waits, (name, error)
            if case.error is None:
                assert (error, loaded) == (None, well), name
            else:
                assert error is not None, name
                assert re.search(case.error, error), (name, error)
                assert loaded is None
    assert LoopbackHub.token not in done.stdout + done.stderr

    # Offline: the same from the cache; nothing damaged is in it; a bundled model needs none
    works = {kind: [name for name, case in cases.items() if case.error is None] for kind, cases in kinds.items()}
    works["pipeline"] += ["forever", "secret"]
    requests = len(hub.log)
    bundled = "\nDiscreteDiffusionPipeline.from_pretrained('discrete-schedulers/tiny-text')"
    done = offline(hub, AWAKE + LOAD + bundled, json.dumps(works))
    assert done.returncode == 0, done.stderr
    cached = told_by(done.stdout)
    assert len(hub.log) == requests
    for kind, cases in kinds.items():
        for name in works[kind]:
            error, waits, loaded = cached[name]
            assert waits == []
            if cases[name].error is None:
                assert (error, loaded) == (None, told[name][2]), name
            else:
                assert loaded is None
                assert error is not None


# Tokens

SECRET = "hf_RecogniseMeRecogniseMeRecogniseMe"
RUN = """
import logging, traceback
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from discrete_schedulers import DiscreteDiffusionPipeline
from discrete_schedulers.training import distill
from discrete_schedulers.training.hub import upload
model, folder, token = sys.argv[1:4]
given = ["--pretrained_model_name_or_path", model, "--output_dir", folder, "--push_to_hub", "--hub_model_id", "x"]
given += ["--num_inference_steps", "2", "--teacher_steps", "4", "--num_samples", "4", "--num_eval_samples", "4"]
given += ["--resume_from_checkpoint", "latest"]
told = []
for said in (token + "x", token):  # refused; right
    try:
        distill.main([*given, "--hub_token", said, *(["--report_to", "tensorboard"] if said == token else [])])
        told.append("pushed")
    except RuntimeError as error:
        traceback.print_exc()
        told.append(str(error))
for begin in (["--hub_token", token + "\\r"], ["--hub_token", token[:9] + " " + token]):
    try:
        distill.main([*given, *begin])
    except SystemExit as error:
        told.append(error.code)
try:
    upload(Path(folder), "tester/x", token + "\\r")
except RuntimeError as error:
    traceback.print_exc()
    told.append(str(error))
pipe = DiscreteDiffusionPipeline.from_pretrained("tester/closed", token=token)
pipe.save_pretrained(folder + "/pipeline")
print(pipe, dict(pipe.config))
try:
    DiscreteDiffusionPipeline.from_pretrained("tester/closed", token=token + "x", cache_dir=folder + "/other")
except (OSError, ValueError):
    traceback.print_exc()
print("TOLD", json.dumps(told))
"""


@pytest.mark.parametrize("main", [distill, adapt])
def test_a_token_behind_a_misspelt_name(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--pretrained_model_name_or_path",
        "x",
        "--output_dir",
        "y",
        "--hub_tokens",
        SECRET,
        "--num_inference_step",
        "x",
    ]
    for arguments in (given, given[:6], [*given[:4], f"--hub_tokens={SECRET}"]):
        with pytest.raises(SystemExit):
            main.parse_args(arguments)
    told = capsys.readouterr().err
    assert SECRET not in told
    assert "unrecognized arguments: --hub_tokens [token]" in told


class OwnHub(LoopbackHub):
    token = SECRET


def test_tokens_are_never_told(tmp_path: Path) -> None:
    """Not on stdout or stderr with logging of everything, in no error, and in no file: results, checkpoints, cache, tracker."""
    pytest.importorskip("tensorboard", reason="the extra `train` is not installed")
    save_model(tmp_path / "model")
    with OwnHub(tmp_path / "home") as hub:
        repository(hub, "closed", tmp_path / "model")
        hub.repos["tester/closed"].private = True
        code = AWAKE + RUN
        done = hub.run(
            sys.executable, "-c", code, tmp_path / "model", tmp_path / "out", SECRET, token=None, timeout=900
        )
        assert done.returncode == 0, done.stderr
        refused, pushed, ended, ended_too, illegal = told_by(done.stdout)
        assert (pushed, ended, ended_too) == ("pushed", 2, 2)
        assert "scheduler_config.json" in hub.repos["tester/x"].files
    assert "Invalid credentials" in refused
    assert "another character in it that no token has" in illegal
    assert done.stderr.count("another character in it that no token has") == 3
    for name, text in {"stdout": done.stdout, "stderr": done.stderr}.items():
        assert SECRET not in text, name
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
