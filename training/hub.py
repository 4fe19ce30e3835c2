"""What a finished run leaves behind: plot, model card, and one commit on the Hub."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token

from discrete_schedulers.patience import BUSY, patiently
from discrete_schedulers.training.files import unwritten, write_text

UPLOADED = ["scheduler_config.json", "metrics.json", "plot.png", "README.md", "latent_adapter.*"]

CARD = """{header}

# {title}

A scheduler for {base_link} with coefficients learned by `{method}` for {budgets} steps. The network is not
changed; this repository holds floats only.

```python
from discrete_schedulers import DiscreteDiffusionPipeline, {scheduler_class}

pipe = DiscreteDiffusionPipeline.from_pretrained("{base_model}")
pipe.scheduler = {scheduler_class}.from_pretrained("{repo_id}")
print(pipe(num_samples=4, num_inference_steps={last_budget}).texts)
```

## Quality against steps

{table}

Measured on {data}. NLL: bound in nats per token, of the sampler itself, at its number of steps (lower is better). Entropy: of
the tokens within a sample, in nats; data has {data_entropy}. Perplexity, where there is one, is under an in-domain n-gram
judge, which copying can fool: read it beside the entropy only.

![quality against steps](plot.png)

## How it was made

{arguments}
"""


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows of metrics as a Markdown table, numbers with three decimals."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(column) for column in columns] for row in rows]
    text = [[f"{c:.3f}" if isinstance(c, float) else "" if c is None else str(c) for c in line] for line in cells]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in text])


def write_plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """NLL bound and entropy against steps, one line for each sampler.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["sampler"] for row in rows))
    columns = [("nll", "NLL bound (nats per token)"), ("entropy", "entropy within a sample (nats)")]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, (key, label) in zip(axes, columns, strict=True):
        for name in names:
            points = sorted((row["steps"], row[key]) for row in rows if row["sampler"] == name)
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        steps = sorted({row["steps"] for row in rows})
        axis.set(xscale="log", xlabel="model calls", ylabel=label)
        axis.set_xticks(steps, [str(n) for n in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    with unwritten(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def write_card(path: Path, repo_id: str, scheduler_class: str, metrics: dict[str, Any]) -> None:
    """The model card: base model and revision, method, table, usage. A base model in a local folder is named in the text only:
    the Hub refuses a card whose `base_model` is not a model id."""
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
        base_link=f"`{base_model}`" if is_local else f"[`{base_model}`](https://huggingface.co/{base_model})",
        method=metrics["method"],
        budgets=", ".join(map(str, metrics["budgets"])),
        last_budget=metrics["budgets"][-1],
        scheduler_class=scheduler_class,
        repo_id=repo_id,
        table=markdown_table(metrics["table"]),
        data=metrics["data"],
        data_entropy=f"{metrics['data_entropy']:.3f}",
        arguments="\n".join(f"- {key}: `{json.dumps(value)}`" for key, value in arguments.items()),
    )
    write_text(path, str(ModelCard(text)))


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
