"""diffusers' `ModelMixin`, for networks that are loaded whole or not at all.

diffusers fills in what a weight file lacks with random numbers, and passes over what it has too much, with a line in the log:
samples of such a network look like those of a bad model.
"""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin


class WholeModelMixin(ModelMixin):
    """Loads all weights, or says which ones are not there."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers.

        Raises:
            ValueError: If weights are missing, left over, or of another shape than the config says.
            OSError: If a file is not there, or damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except OSError as error:
            if "Unable to load weights" not in str(error):
                raise
            raise OSError(
                f"{str(error).strip()} It is damaged, or no weight file: delete it and download it again"
            ) from error
        faults = {kind: list(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
        said = "; ".join(f"{kind}: {', '.join(map(str, keys[:5]))}" for kind, keys in faults.items() if keys)
        if said:
            raise ValueError(
                f"the weights in {str(pretrained_model_name_or_path)!r} do not fit the config of this {cls.__name__}: {said}. "
                "They must be all of its parameters and no others: take both from the same commit"
            )
        return (model, info) if wants_info else model


def check_sizes(**sizes: Any) -> None:
    """Raises `ValueError` if a size of a network is not an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`{name}` is {size!r}; it must be an integer of at least 1")
