r"""Images as grids of patches out of a small codebook, and back.

    encode   id_{ij} = argmin_k || patch_{ij} - c_k ||^2          patch_{ij}: the p x p pixels at row i p, column j p
    decode   patch_{ij} = c_{id_{ij}}

The simplest tokenizer of images there is: no network, and a codebook that k-means finds in seconds. `decode(encode(x))` is
the nearest image that the codebook can show.

Source: Lloyd 1982 (k-means as vector quantisation); van den Oord et al. 2017 learn the same with an encoder in front.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.models.whole_weights import WholeModelMixin


class PatchCodebook(WholeModelMixin, ConfigMixin):
    """Nearest-patch codes of images with values in [0, 1].

    Args:
        num_codes (`int`, defaults to 64): Number K of patches.
        patch_size (`int`, defaults to 2): Height and width p of a patch, in pixels.
        num_channels (`int`, defaults to 1): Channels C of the images.

    Attributes:
        codebook (`torch.nn.Parameter` of shape `(K, C, p, p)`): The patches, without gradients; zeros until it is set or
            loaded. No buffer: offloading looks for parameters.
    """

    @register_to_config
    def __init__(self, num_codes: int = 64, patch_size: int = 2, num_channels: int = 1) -> None:
        super().__init__()
        patches = torch.zeros(num_codes, num_channels, patch_size, patch_size)
        self.codebook = torch.nn.Parameter(patches, requires_grad=False)

    def encode(self, images: Tensor) -> Tensor:
        """Ids of the nearest patches.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): Pixels in [0, 1]; H and W are multiples of p.

        Returns:
            `torch.Tensor`: Ids, int64, of shape (B, H / p, W / p).

        Raises:
            ValueError: If the images have other channels, or sizes that p does not divide.
        """
        count, channels, p, _ = self.codebook.shape
        if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % p or images.shape[3] % p:
            raise ValueError(
                f"`images` has shape {tuple(images.shape)}; allowed is (B, {channels}, H, W) with H and W multiples of {p}"
            )
        rows, columns = images.shape[2] // p, images.shape[3] // p
        patches = F.unfold(images.float(), p, stride=p).transpose(1, 2)  # (B, h * w, C * p * p)
        codes = self.codebook.float().view(1, count, -1).expand(len(images), -1, -1)
        # The direct distance: the one by matrix products rounds equal patches apart
        distance = torch.cdist(patches, codes, compute_mode="donot_use_mm_for_euclid_dist")  # (B, h * w, K)
        return distance.argmin(-1).view(-1, rows, columns)

    def decode(self, ids: Tensor) -> Tensor:
        """The image that ids stand for.

        Args:
            ids (`torch.Tensor` of shape `(B, h, w)`): Ids in [0, K), int64.

        Returns:
            `torch.Tensor`: Pixels in [0, 1], of shape (B, C, h * p, w * p), in the dtype of the codebook.

        Raises:
            ValueError: If an id is not in [0, K), as that of a mask is.
        """
        count, channels, p, _ = self.codebook.shape
        if ids.dim() != 3 or ids.lt(0).any() or ids.ge(count).any():
            raise ValueError(
                f"`ids` has shape {tuple(ids.shape)} and values from {int(ids.min())} to {int(ids.max())}; "
                f"allowed is (B, h, w) with values from 0 to {count - 1}"
            )
        batch, rows, columns = ids.shape
        patches = self.codebook[ids]  # (B, h, w, C, p, p)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * p, columns * p)
