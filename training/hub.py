"""What a finished run leaves behind: tables, a model card, and one commit on the Hub. The pictures are `pictures.py`'s."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token

from discrete_schedulers.bundled import is_bundled
from discrete_schedulers.patience import BUSY, patiently
from discrete_schedulers.training.files import write_text

UPLOADED = ["scheduler_config.json", "metrics.json", "plot.png", "coefficients.png", "README.md", "latent_adapter.*"]

CARD = """{header}

# {title}

A scheduler for {base_link} with {learned} learned by `{method}` for {budgets} steps. The network is not
changed; this repository holds floats only.

```python
from discrete_schedulers import {pipeline_class}, {scheduler_class}

pipe = {pipeline_class}.from_pretrained("{base_model}")
pipe.scheduler = {scheduler_class}.from_pretrained("{repo_id}")
{example}
```

## Quality against model calls

{table}

Measured on {data}. {legend}

![quality against model calls](plot.png)

## What was learned

![coefficients](coefficients.png)

## What it cost

Learning took {evaluations} sequence evaluations (one sequence through the network once) and {learning} s on {processes};
measuring the table took {measuring} s more.

## How it was made

```bash
{command}
```

{versions}.

<details><summary>All arguments</summary>

{arguments}

</details>
"""

LEGEND = {  # what the columns of a table say
    "nll": "nll: bound on the negative log-likelihood of the data in nats per token, of the sampler itself at its number of "
    "steps (lower is better; none where the sampler looks at its predictions, or a top-p gives a true token no chance).",
    "calls": "calls: of the network, for a sample.",
    "entropy": "entropy: of the tokens within a sample, in nats; data has {data_entropy}.",
    "perplexity": "perplexity: under an in-domain n-gram judge, which copying can fool: read it beside the entropy only.",
    "statistic": "statistic: how far samples are from the data by layout, texture and fluency under the network, in nats: 0 in "
    "the mean for the data's own law, with errors of about sqrt(42) / samples.",
    "matched_perplexity": "matched_perplexity: the same at the entropy of the data, between temperatures on both sides of it "
    "(none where a sampler does not reach it); matched_error: its standard error over the samples.",
}


def table_cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return "" if value is None else str(value)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows of metrics as a Markdown table, numbers with three decimals, from 1,000 on with none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(column) for column in columns] for row in rows]
    text = [[table_cell(value) for value in line] for line in cells]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in text])


class Facts(NamedTuple):
    """What a run cost and how it was started; not among its metrics, which are the same for the same arguments.

    Args:
        command (`str`): That was run, without tokens.
        processes (`int`): How many.
        device (`str`): Of their networks.
        learning_seconds (`float`): Of all sessions of the run.
        measuring_seconds (`float`): Likewise.
        pipeline (`str`): Class of the base model's pipeline.
        example (`str`): A call of it.
    """

    command: str
    processes: int
    device: str
    learning_seconds: float
    measuring_seconds: float
    pipeline: str
    example: str


def without_tokens(argv: Sequence[str], token: str | None) -> list[str]:
    """A command's arguments without `--hub_token` and its value, however it was written."""
    kept: list[str] = []
    skip = False
    for one in argv:
        name = one.split("=")[0]
        is_token = name.startswith("--hub_t") and "--hub_token".startswith(name)  # argparse takes beginnings of names
        if not skip and not is_token and (not token or token not in one):
            kept.append(one)
        skip = is_token and "=" not in one
    return kept


def write_card(path: Path, repo_id: str, scheduler_class: str, metrics: dict[str, Any], facts: Facts) -> None:
    """The model card: base model and revision, method, table, usage, cost and command. A base model in a local folder is named
    in the text only: the Hub refuses a card whose `base_model` is not a model id."""
    base_model = metrics["base_model"]
    is_local = Path(base_model).is_dir()
    data = ModelCardData(
        base_model=None if is_local else base_model,
        library_name="discrete_schedulers",
        license="apache-2.0",
        tags=["discrete-diffusion", "diffusers", "diffusers-training", metrics["method"]],
    )
    arguments = {"base_model": base_model, "revision": metrics["revision"]} | metrics["arguments"]
    text = CARD.format(
        header=f"---\n{data.to_yaml()}\n---",
        title=repo_id.split("/")[-1],
        base_model=base_model,
        base_link=base_link(base_model, is_local),
        method=metrics["method"],
        budgets=", ".join(map(str, metrics["budgets"])),
        pipeline_class=facts.pipeline,
        example=facts.example,
        scheduler_class=scheduler_class,
        repo_id=repo_id,
        table=markdown_table(metrics["table"]),
        data=metrics["data"],
        legend=" ".join(
            text.format(data_entropy=f"{metrics['data_entropy']:.3f}")
            for column, text in LEGEND.items()
            if any(row.get(column) is not None for row in metrics["table"])
        ),
        learned="a filter" if metrics["method"] == "learn2pd" else "coefficients",
        evaluations=f"{metrics['sequence_evaluations']:,}",
        learning=f"{facts.learning_seconds:.0f}",
        measuring=f"{facts.measuring_seconds:.0f}",
        processes=f"{facts.processes} process{'es' if facts.processes > 1 else ''} ({facts.device})",
        command=facts.command,
        versions=f"discrete_schedulers {version('discrete_schedulers')}, torch {version('torch')}",
        arguments="\n".join(f"- {key}: `{json.dumps(value)}`" for key, value in arguments.items()),
    )
    write_text(path, str(ModelCard(text)))


def base_link(base_model: str, is_local: bool) -> str:
    """The base model in the text of a card: a folder and a bundled model have no page to link to."""
    if is_bundled(base_model):
        return f"`{base_model}` (bundled with discrete_schedulers)"
    return f"`{base_model}`" if is_local else f"[`{base_model}`](https://huggingface.co/{base_model})"


def push_command(folder: Path, repo_id: str) -> str:
    """What uploads the finished files of a folder from a shell, and makes the repository where there is none."""
    patterns = [part for pattern in UPLOADED for part in ("--include", pattern)]
    return shlex.join(["hf", "upload", repo_id, str(folder.resolve()), ".", *patterns])


def without_token(text: str, token: str | None) -> str:
    """The text without this token, the one that the machine is logged in with, and what looks like one."""
    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "[token]").replace(repr(secret)[1:-1], "[token]")
    return re.sub(r"\bhf_\w{6,}", "[token]", text)


class Parser(argparse.ArgumentParser):
    """Its errors repeat what was given; a token behind a misspelt name is not repeated."""

    def error(self, message: str) -> NoReturn:
        super().error(without_token(message, None))


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str]) -> None:
    """Exits with a message if one of these arguments is below 1; those that are `None` are left to others."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")


def access_token(text: str) -> str:
    """A token as an argument.

    Raises:
        argparse.ArgumentTypeError: If it cannot be one. In a header it would be refused by an error, and by lines in logs, that
            repeat it.
    """
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("there is a space, a line end or another character in it that no token has")
    return text


@contextmanager
def nothing_is_lost(folder: Path, repo_id: str, token: str | None) -> Iterator[None]:
    """Whatever the Hub or the way to it raises becomes one error that says where the results are and how to push them."""
    try:
        yield
    except Exception as error:  # huggingface_hub passes on its HTTP library's errors, which differ between its versions
        told = without_token(f"{type(error).__name__}: {error}", token)
    else:
        return
    # Not from the first one: its text may hold the token, as that of a header which is not allowed does
    raise RuntimeError(
        f"could not push to {repo_id!r}: {told}. Nothing is lost: the results are in {folder}. To push them later: "
        f"`{push_command(folder, repo_id)}`; the same command as before with `--resume_from_checkpoint latest` uploads them "
        "too, without learning again"
    ) from None


def create_repository(folder: Path, repo_id: str, token: str | None) -> str:
    """Make the repository if it is not there, and return its full id, with the namespace of the token's owner.

    Raises:
        RuntimeError: If the Hub refuses, stays busy or cannot be reached.
    """
    with nothing_is_lost(folder, repo_id, token):
        token = token and access_token(token)
        return patiently(lambda: HfApi(token=token).create_repo(repo_id, exist_ok=True).repo_id)


def upload(folder: Path, repo_id: str, token: str | None) -> str:
    """Upload the finished files of a folder in one commit and return the commit's address.

    Raises:
        RuntimeError: If the Hub refuses, stays busy or cannot be reached.
    """
    what: dict[str, Any] = {"repo_id": repo_id, "folder_path": folder, "commit_message": "Learned scheduler"}
    with nothing_is_lost(folder, repo_id, token):
        token = token and access_token(token)
        # 412: somebody else's commit came between; this one asks for no certain state before it
        return patiently(
            lambda: HfApi(token=token).upload_folder(**what, allow_patterns=UPLOADED).commit_url, (412, *BUSY)
        )
