r"""Learned parallel decoding (Learn2PD): a small filter says which tokens are final already, and these open at once.

    c_i = p(x_0^i = drawn token | x_t) at a mask, 1 at a known token                  i in a block of w positions
    f   = sigmoid(W_2 relu(W_1 c + b_1) + b_2)                                        P(token i is final), (w,)
    position i opens where f_i > threshold

The filter sees the confidences of a whole block, and nothing else of the network. How many open is for it to say:
`num_inference_steps` caps the calls, and a sample without masks costs none. At least one opens in a call, and as many as the
time grid has due, the most confident first; the last call opens all. With w = 32 and 32 hidden units it has 2,112 floats, which
stand in the config. `training/learn2pd.py` learns them. Without a filter the confidence itself takes the place of f.

Exact for no law: it aims at the tokens that one-by-one decoding would have ended with (`temperature=0`).

Source: Bao et al. 2025 (Learn2PD, arXiv 2509.25188). Its cut behind the end of a text is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers.order_utils import OrderScheduler, Prediction, Rounding
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName

FilterFloats: TypeAlias = dict[
    str, list
]  # hidden_weight (H, w), hidden_bias (H,), output_weight (w, H), output_bias (w,)
FILTER_SHAPES = {"hidden_weight": "hw", "hidden_bias": "h", "output_weight": "wh", "output_bias": "w"}


class Learn2PDScheduler(OrderScheduler):
    """Opens what a learned filter holds for final. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`; says how many open at least.
        filter (`dict`, *optional*): `hidden_weight` (H, w), `hidden_bias` (H,), `output_weight` (w, H) and `output_bias` (w,)
            as nested lists.
        threshold (`float`, defaults to 0.9): Of f, above which a token is accepted, in [0, 1]; 1 accepts none by itself.
        rounding (`str`, defaults to `"up"`): Of the number that is due: `"up"` or `"down"`.
        block_length (`int`, *optional*): Opens blocks of this length, the filter's, from left to right; `None` is one block.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token, as published.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"threshold": [8 floats]}}`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    learned_knobs = {"threshold": "numbers in [0, 1]"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        filter: FilterFloats | None = None,
        threshold: float = 0.9,
        rounding: Rounding = "up",
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        self.layers: dict[str, Tensor] | None = None
        if filter is not None:
            self.layers = check_filter(filter, block_length)
            self.register_to_config(filter={name: layer.tolist() for name, layer in self.layers.items()})

    def choose(self, prediction: Prediction, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The accepted masks, or the most confident ones where fewer than are due. See [`OrderScheduler.choose`]."""
        confidence = prediction.sheet(prediction.token_probability.double(), 1.0)  # (B, L)
        accepted = prediction.is_eligible & (self.final_probability(confidence) > self.per_step("threshold", index))
        at_least = self.due(sample, index).clamp(min=1)
        return accepted | self.take(confidence, at_least, prediction.is_eligible)

    def final_probability(self, confidence: Tensor) -> Tensor:
        """f (B, L) from confidences (B, L), block by block.

        Raises:
            ValueError: If there is one block, and it has not the filter's width.
        """
        if self.layers is None:
            return confidence
        length, width = confidence.shape[1], len(self.layers["output_bias"])
        if self.config.block_length is None and length != width:
            raise ValueError(
                f"`filter` is for {width} positions, but `sample` has {length}: pass `block_length={width}`"
            )
        padded = torch.nn.functional.pad(confidence, (0, -length % width), value=1.0)
        layers = {name: layer.to(confidence.device) for name, layer in self.layers.items()}
        blocks = padded.unflatten(1, (-1, width))
        return filter_log_odds(layers, blocks).sigmoid().flatten(1)[:, :length]


def filter_log_odds(layers: dict[str, Tensor], confidence: Tensor) -> Tensor:
    """Logit of f, (..., w), from the confidences of blocks (..., w)."""
    hidden = torch.relu(confidence @ layers["hidden_weight"].T + layers["hidden_bias"])
    return hidden @ layers["output_weight"].T + layers["output_bias"]


def check_filter(layers: FilterFloats, block_length: int | None) -> dict[str, Tensor]:
    """The floats of a filter as tensors, float64.

    Raises:
        ValueError: If layers are missing or do not fit each other or the block, or a float is not finite.
    """
    if not isinstance(layers, Mapping) or set(layers) != set(FILTER_SHAPES):
        held = sorted(layers) if isinstance(layers, Mapping) else repr(layers)
        raise ValueError(f"`filter` has {held}; it needs {sorted(FILTER_SHAPES)}")
    tensors = {name: torch.tensor(layers[name], dtype=torch.float64) for name in FILTER_SHAPES}
    sizes = {"h": tensors["hidden_bias"].numel(), "w": tensors["output_bias"].numel()}
    for name, shape in FILTER_SHAPES.items():
        wanted = tuple(sizes[axis] for axis in shape)
        if tuple(tensors[name].shape) != wanted or not tensors[name].isfinite().all():
            raise ValueError(
                f"`filter` has {name} of shape {tuple(tensors[name].shape)}; {wanted} is needed, all finite"
            )
    if block_length not in (None, sizes["w"]):
        raise ValueError(f"`filter` is for blocks of {sizes['w']} positions, but `block_length` is {block_length}")
    return tensors
