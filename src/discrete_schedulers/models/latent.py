r"""A network that is a mixture: its own weights plus a small adapter that a latent number of each row steers.

    e(l)   = W_2 silu(W_1 wave(1000 l) + b_1) + b_2,      wave = [cos, sin] of 64 frequencies, base 10,000
    h_i    = E[x_i] + e(l)                                added to the embedding of every position
    W      = W_0 + (alpha / r) B A                        LoRA of the linear layers that `lora` names

W_2, b_2 and B are zero at first, so that a new adapter is the network it stands on. l ~ U[0, 1] is drawn anew for each row and
call: by the scheduler, if it tells `latent` (`LearnedScheduler(network_latent=True)`, which makes samples reproducible), else
here from torch's own generator. With Di4C's losses (training/di4c.py) tokens that open in one call depend on each other.

The adapter is two files, which stand beside a scheduler's config: `latent_adapter.json` and `latent_adapter.safetensors`. LoRA
needs `pip install discrete_schedulers[adapters]`; an adapter without it (`lora=None`) needs nothing.

Source: Di4C (arXiv 2410.08709), whose text models take the latent as one more token; LoRA: Hu et al. 2021, by peft.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from discrete_schedulers.models.loading import first_file
from discrete_schedulers.sampling import uniforms

CONFIG, WEIGHTS = "latent_adapter.json", "latent_adapter.safetensors"
WAVES = 64
LORA_SETTINGS = {"r", "lora_alpha", "target_modules"}


class LatentEmbedding(nn.Module):
    """A latent in [0, 1) of each row, (B,), to what is added to its embeddings, (B, H). Zero at first.

    Args:
        width (`int`): H.
        hidden (`int`): Width of the layer between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(2 * WAVES, hidden), nn.SiLU(), last)

    def forward(self, latent: Tensor) -> Tensor:
        frequency = 10_000.0 ** -(torch.arange(WAVES, device=latent.device) / WAVES)
        angle = 1000 * latent.float()[:, None] * frequency  # (B, 64)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))


class LatentModel(nn.Module):
    """A network with a latent adapter. It is called as the network is, and with `latent`.

    ```python
    pipe.model = LatentModel.from_pretrained("me/tiny-text-di4c", pipe.model)
    pipe.scheduler = LearnedScheduler.from_pretrained("me/tiny-text-di4c")  # its config says network_latent
    ```

    Args:
        model (`torch.nn.Module`): The network; takes ids (B, L) first. Its own weights are frozen. LoRA layers are put into it:
            it is not to be used alone any more.
        embedding (`str`): Name of its module that turns ids into embeddings (B, L, H): `"vocab_embed"` in a [`DDiTModel`].
        width (`int`): H.
        hidden (`int`, defaults to 128): Width of the latent's MLP.
        lora (`dict`, *optional*): `r`, `lora_alpha` and `target_modules` (a list of names) of peft's LoRA; `None` for none.

    Raises:
        ValueError: If the network has no such module, or `lora` has other settings.
        ImportError: If LoRA is asked for and peft is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: str,
        width: int,
        hidden: int = 128,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        if embedding not in modules:
            raise ValueError(f"`embedding` is {embedding!r}, which {type(model).__name__} does not have")
        if lora is not None and set(lora) != LORA_SETTINGS:
            raise ValueError(f"`lora` has {sorted(lora)}; it needs {sorted(LORA_SETTINGS)}")
        model.requires_grad_(False)
        if lora is not None:
            model = with_lora(model, lora)
        self.model = model
        parameter = next(model.parameters())
        self.latent_embedding = LatentEmbedding(width, hidden).to(parameter.device, parameter.dtype)
        self.settings = {"embedding": embedding, "width": width, "hidden": hidden, "lora": lora}
        self.added: dict[int, Tensor] = {}  # e(l) of the calls that run, by their threads
        modules[embedding].register_forward_hook(self.add_latent)

    @property
    def config(self) -> Any:
        """The network's own."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, as diffusers' pipelines ask for it."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.model.parameters()).device

    def get_submodule(self, target: str) -> nn.Module:
        """As in torch; names in the network do as well."""
        try:
            return super().get_submodule(target)
        except AttributeError:
            return self.model.get_submodule(target)

    def add_latent(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Forward hook of the embedding."""
        added = self.added.get(threading.get_ident())
        return output if added is None else output + added[:, None].to(output.dtype)

    def forward(self, input_ids: Tensor, *arguments: Any, latent: Tensor | None = None, **more: Any) -> Any:
        """What the network returns for these rows with their latents.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`): Tokens x_t, int64.
            *arguments: Passed to the network.
            latent (`torch.Tensor` of shape `(B,)`, *optional*): In [0, 1); drawn from torch's own generator when `None`.
            **more: Passed to the network.

        Raises:
            ValueError: If there is not one latent for each row.
        """
        if latent is None:
            latent = uniforms((len(input_ids),), None, input_ids.device)
        if tuple(latent.shape) != (len(input_ids),):
            raise ValueError(f"`latent` has shape {tuple(latent.shape)}, but the batch has {len(input_ids)} rows")
        thread = threading.get_ident()
        self.added[thread] = self.latent_embedding(latent)
        try:
            return self.model(input_ids, *arguments, **more)
        finally:
            del self.added[thread]

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The network without its adapter, inside a `with`: the teacher of the one that it is learned for."""
        for layer in self.lora_layers():
            layer.enable_adapters(False)
        try:
            yield self.model
        finally:
            for layer in self.lora_layers():
                layer.enable_adapters(True)

    def lora_layers(self) -> list[Any]:
        """peft's layers in the network."""
        if self.settings["lora"] is None:
            return []
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def adapter(self) -> dict[str, nn.Parameter]:
        """What is learned and saved: the latent's MLP and the LoRA matrices, by their names in this module."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter's two files, each under a temporary name first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.adapter().items()}
        save_file(tensors, folder / f".{WEIGHTS}", metadata={"format": "pt"})
        (folder / f".{CONFIG}").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / f".{name}", folder / name)

    @classmethod
    def from_pretrained(cls, source: str | Path, model: nn.Module, **hub: Any) -> LatentModel:
        """Put a saved adapter on its network.

        Args:
            source (`str` or `Path`): A folder or a Hub id with the adapter's two files.
            model (`torch.nn.Module`): The network that it was learned on; its floating parameters set dtype and device.
            **hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, as `huggingface_hub` has them.

        Raises:
            ValueError: If files are missing, or are not of an adapter for this network.
        """
        paths = [first_file(str(source), (name,), hub) for name in (CONFIG, WEIGHTS)]
        if paths[0] is None or paths[1] is None:
            raise ValueError(f"{str(source)!r} has no latent adapter: looked for {CONFIG} and {WEIGHTS}")
        found = cls(model, **json.loads(paths[0].read_text(encoding="utf-8")))
        tensors, wanted = load_file(paths[1]), found.adapter()
        for name in sorted(wanted.keys() | tensors.keys()):
            shapes = [None if name not in table else tuple(table[name].shape) for table in (wanted, tensors)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{paths[1]} does not fit the network: {name} is {shapes[1]}, it needs {shapes[0]}")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(tensors[name])
        return found


def with_lora(model: nn.Module, lora: dict[str, Any]) -> nn.Module:
    """The network with peft's LoRA layers put into it; only these have a gradient.

    Raises:
        ImportError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("`lora` needs peft: pip install discrete_schedulers[adapters], or pass lora=None") from error
    return inject_adapter_in_model(LoraConfig(**lora), model)
