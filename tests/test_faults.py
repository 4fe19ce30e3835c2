"""Kills, full disks, read-only folders and SIGTERM: no file is ever half written, and what goes on ends as if nothing had been.

`FAULT_KILLS=30 pytest tests/test_faults.py` kills every script 30 times, alone and as two processes; by default some of them, a
few times.
"""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from faults import Ended, Moment, require_whole, run, run_two
from safetensors.torch import load_file
from test_distill import save_model, write_texts
from test_distill_images import FEW, tiny_images, write_pictures
from test_pretrain import SMALL as PRETRAIN
from test_pretrain import write_corpus
from test_pretrain_images import SMALL as PRETRAIN_IMAGES
from test_pretrain_images import write_digits

from discrete_schedulers.training import adapt, distill, pretrain, pretrain_images

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("FAULT_KILLS", "2"))
ALL = "FAULT_KILLS" in os.environ
DISTILL = ["--num_inference_steps", "2", "4", "--num_samples", "13", "--num_eval_samples", "8"]
MARGINAL = ["--method", "marginal", "--num_samples", "24", "--num_epochs", "3", "--buckets", "4"]
ORDER = ["--method", "order", "--num_samples", "16", "--num_epochs", "12"]
SEARCH = ["--num_inference_steps", "2", "4", "--num_eval_samples", "8", "--method", "search", *FEW]
DIGITS = ["--patch_size", "7", "--max_train_steps", "40", "--checkpointing_steps", "8"]
ADAPT = ["--max_train_steps", "6", "--checkpointing_steps", "2", "--max_data_samples", "24", "--num_eval_samples", "4"]
ADAPT += ["--num_inference_steps", "1", "2", "--num_eval_latents", "2", "--num_latents", "2", "--train_batch_size", "2"]
GENERATE = [
    "--num_samples",
    "18",
    "--shard_size",
    "3",
    "--batch_size",
    "2",
    "--length",
    "8",
    "--num_inference_steps",
    "2",
]


class Script(NamedTuple):
    """A script, its arguments, what it needs to go on, and what its result is made of."""

    main: Callable[[list[str]], Any]
    arguments: list[str]
    resume: list[str]
    result: Callable[[Path], Any]


def learned(folder: Path) -> dict[str, bytes]:
    """What depends on nothing but the arguments: all files, but the command and the seconds in the card."""
    names = ("scheduler_config.json", "metrics.json", "plot.png", "coefficients.png")
    card = re.sub(r"```bash.*?```| [\d,]+ s (on|more)", "", (folder / "README.md").read_text(), flags=re.DOTALL)
    return {name: (folder / name).read_bytes() for name in names} | {"README.md": card.encode()}


def weights(folder: Path) -> dict[str, list]:
    """Tensors of the finished model and of the last checkpoint; the seconds that a run took are not part of them."""
    files = ["model/diffusion_pytorch_model.safetensors", "checkpoint-40/state.safetensors"]
    tensors = {f"{file} {name}": tensor for file in files for name, tensor in load_file(folder / file).items()}
    nats = json.loads((folder / "pretrain_metrics.json").read_text())["validation_nats_per_token"]
    return {name: tensor.tolist() for name, tensor in tensors.items()} | {"nats": [nats]}


def images(folder: Path) -> dict[str, Any]:
    """And the codebook, the scheduler with its curve, the samples and the card."""
    files = [
        "decoder/diffusion_pytorch_model.safetensors",
        "model_index.json",
        "samples.png",
        "scheduler/scheduler_config.json",
    ]
    card = re.sub(r"[\d,]+ seconds", "", (folder / "README.md").read_text())
    return weights(folder) | {file: (folder / file).read_bytes() for file in files} | {"card": card}


def adapter(folder: Path) -> dict[str, Any]:
    tensors = {name: tensor.tolist() for name, tensor in load_file(folder / "latent_adapter.safetensors").items()}
    return tensors | {"table": json.loads((folder / "metrics.json").read_text())["table"]}


def samples(folder: Path) -> list[dict]:
    from pyarrow import parquet

    return [row for path in sorted(folder.glob("samples-*.parquet")) for row in parquet.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Script]]:
    work = tmp_path_factory.mktemp("faults")
    save_model(work / "model")
    texts = ["--train_file", str(write_texts(work / "texts.txt"))]
    tiny_images().save_pretrained(work / "images")
    write_pictures(work / "pictures", 40)
    pictures = ["--pretrained_model_name_or_path", str(work / "images")]
    pictures += ["--train_data_dir", str(work / "pictures"), "--class_column", "label"]
    model = ["--pretrained_model_name_or_path", str(work / "model")]
    again = ["--resume_from_checkpoint", "latest"]
    spec = importlib.util.spec_from_file_location("generate", ROOT / "examples" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    corpus = ["--corpus_dir", str(write_corpus(work / "corpus"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(write_digits(work / "digits"))
        yield {
            "lsd": Script(
                distill.main, [*model, *DISTILL, "--objective", "l2", "--teacher_steps", "32"], again, learned
            ),
            "marginal": Script(distill.main, [*model, *DISTILL, *MARGINAL, *texts], again, learned),
            "order": Script(distill.main, [*model, *DISTILL, *ORDER, *texts], again, learned),
            "search images": Script(distill.main, [*pictures, *SEARCH], again, learned),
            "optimal_grid": Script(
                distill.main, [*model, *DISTILL, "--method", "optimal_grid", *texts], again, learned
            ),
            "pretrain": Script(pretrain.main, [*PRETRAIN, *corpus], again, weights),
            "pretrain_images": Script(pretrain_images.main, [*PRETRAIN_IMAGES, *DIGITS], again, images),
            "adapt": Script(adapt.main, [*model, *ADAPT], again, adapter),
            "generate": Script(generate.main, [*model, *GENERATE], [], samples),
        }


class Whole(NamedTuple):
    ended: Ended
    result: Any


@pytest.fixture(scope="module")
def whole(scripts: dict[str, Script], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Whole]:
    """A run that nothing disturbed, of one process or two."""
    done: dict[tuple[str, int], Whole] = {}

    def get(name: str, processes: int = 1) -> Whole:
        if (name, processes) not in done:
            script, folder = scripts[name], tmp_path_factory.mktemp("whole") / "out"
            ended = start(processes)(script.main, [*script.arguments, "--output_dir", str(folder)], folder)
            assert ended.code == 0, ended.printed
            assert require_whole(folder) > 1
            assert not list(folder.glob(".*"))
            done[name, processes] = Whole(ended, script.result(folder))
        return done[name, processes]

    return get


def start(processes: int) -> Callable[..., Ended]:
    return run if processes == 1 else run_two


def moment_of(chance: random.Random, ended: Ended) -> Moment:
    """Any event, the middle of the write after it, or any time of a run that nothing disturbs."""
    event = chance.randint(1, ended.events)
    kinds = [
        Moment(event),
        Moment(event, bytes=chance.choice([0, 10, 100, 1000])),
        Moment(seconds=chance.random() * ended.seconds),
    ]
    return chance.choice(kinds)


def cases(names: list[str], some: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Every script as one process and as two, or some of them."""
    return [(name, processes) for name in names for processes in (1, 2)] if ALL else some


EVERY = ["lsd", "marginal", "search images", "optimal_grid", "pretrain", "pretrain_images", "adapt", "generate"]
SOME = [("lsd", 1), ("lsd", 2), ("pretrain", 1), ("pretrain", 2), ("pretrain_images", 1), ("adapt", 1), ("generate", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), cases(EVERY, SOME))
def test_killed(scripts: dict[str, Script], whole: Callable, tmp_path: Path, name: str, processes: int) -> None:
    """Killed again and again until a run gets through, and the next folder, until there were enough kills."""
    script, chance, kills, finished = scripts[name], random.Random(f"{name} {processes}"), 0, 0
    reference = whole(name, processes)
    while kills < KILLS or not finished:
        folder = tmp_path / str(finished) / "out"  # its name stands in the card
        given = [*script.arguments, "--output_dir", str(folder), *script.resume]
        while True:
            moment = moment_of(chance, reference.ended) if kills < KILLS else Moment()
            ended = start(processes)(script.main, given, folder, moment)
            require_whole(folder)
            if ended.code == 0:
                break
            assert ended.code in (-signal.SIGKILL, -signal.SIGXFSZ), (moment, ended.printed)
            kills += 1
        assert script.result(folder) == reference.result, moment
        assert not list(folder.glob(".*"))
        finished += 1
    print(f"{name}, {processes} processes: {kills} kills, {finished} runs came through")


DISKS = [("lsd", errno.ENOSPC), ("generate", errno.EROFS), ("pretrain", errno.EFBIG), ("adapt", errno.EFBIG)]
if ALL:
    DISKS = [(name, code) for name in EVERY for code in (errno.ENOSPC, errno.EROFS, errno.EFBIG)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), DISKS)
def test_disks_that_fill_up(scripts: dict[str, Script], whole: Callable, tmp_path: Path, name: str, code: int) -> None:
    """From some event on nothing can be written: one error that says so, what was written is whole, and with room again the run
    goes on."""
    script, reference = scripts[name], whole(name)
    given = [*script.arguments, "--output_dir", str(tmp_path / "out"), *script.resume]
    possible = range(1, reference.ended.events)
    events = random.Random(f"{name} {code}").sample(possible, min(KILLS, len(possible)))
    size = 300 if code == errno.EFBIG else None
    for event in [1, *sorted(events)]:
        ended = run(script.main, given, tmp_path / "out", Moment(event, size, code))
        require_whole(tmp_path / "out")
        if ended.code == 0:
            break
        last = [line for line in ended.printed.splitlines() if line and not line.startswith("events")][-1]
        assert ended.code == 1
        assert last.startswith("OSError: "), ended.printed
        assert os.strerror(code) in last
        assert re.search("could not be (written|removed)|`--output_dir`", last), last
        assert str(tmp_path / "out") in last
    else:
        assert run(script.main, given, tmp_path / "out").code == 0
    assert script.result(tmp_path / "out") == reference.result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes"),
    cases(
        ["lsd", "marginal", "search images", "order", "pretrain", "pretrain_images", "adapt"],
        [("lsd", 1), ("lsd", 2), ("order", 1), ("pretrain", 2)],
    ),
)
def test_sigterm(scripts: dict[str, Script], whole: Callable, tmp_path: Path, name: str, processes: int) -> None:
    """It comes to one process, where it opens, renames or removes a file: all end with 143 and a checkpoint, and go on."""
    script, reference = scripts[name], whole(name, processes)
    given = [*script.arguments, "--output_dir", str(tmp_path / "out"), *script.resume]
    stopped, chance, last = 0, random.Random(f"{name} {processes}"), reference.ended.events
    edges = [
        5 + (last - 5) * i // KILLS for i in range(KILLS + 1)
    ]  # one moment in each part: the last files take many events
    for event in (chance.randrange(*between) for between in itertools.pairwise(edges)):
        ended = start(processes)(script.main, given, tmp_path / "out", Moment(event, signal=signal.SIGTERM))
        require_whole(tmp_path / "out")
        if ended.code == 0:  # nothing but the last files was left to write
            break
        stopped += 1
        assert ended.code == 143, ended.printed
        assert "SIGTERM: stopped; go on with `--resume_from_checkpoint latest`" in ended.printed
        assert "Traceback" not in ended.printed
        kept = [*(tmp_path / "out").glob("checkpoint-*"), *(tmp_path / "out").glob("adapter_*.pt")]
        assert kept  # of `adapt.py` the samples that it learns on, or a state
    else:
        assert start(processes)(script.main, given, tmp_path / "out").code == 0
    assert stopped
    assert script.result(tmp_path / "out") == reference.result


@pytest.mark.slow
def test_sigterm_to_a_launcher(scripts: dict[str, Script], tmp_path: Path) -> None:
    """`accelerate launch` with two processes hands SIGTERM on: a checkpoint, and its own exit code is not 0."""
    if not ALL:
        pytest.skip("three times the imports: with FAULT_KILLS only")
    folder = tmp_path / "out"
    given = [*scripts["pretrain"].arguments, "--max_train_steps", "100000", "--checkpointing_steps", "100000"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    command += [str(ROOT / "training" / "pretrain.py"), *given, "--output_dir", str(folder)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    printed = ""
    for line in process.stdout:
        printed += line
        if "step 100 " in line:
            break
    process.send_signal(signal.SIGTERM)
    printed += process.communicate(timeout=120)[0]
    assert process.returncode not in (0, -signal.SIGKILL), printed
    assert printed.count("SIGTERM: stopped; go on with `--resume_from_checkpoint latest`") == 2, printed
    (checkpoint,) = folder.glob("checkpoint-*")
    assert int(checkpoint.name.split("-")[1]) >= 100
    assert require_whole(folder) == 1
    print(f"the launcher ends with {process.returncode}")
