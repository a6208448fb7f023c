"""Texts with an image in them, for any class that says what an image becomes.

How pixels are laid out differs by class. Each layout is tried on ``get_image_features``, and the
first that a class takes is its own; as many image tokens as there are features go into the text.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from walk.build import first_line, takes, text
from walk.oracle import NotApplicableError

SIZE, PATCH = 16, 4  # of an image, see walk.shrink
PLACE = 2  # text tokens in front of the image


class Images:
    """What one class makes of images.

    Args:
        model: a plain one.

    Raises:
        NotApplicableError: no layout fits.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.token = _token(model.config)
        config = model.config
        self.vision = next(
            (
                getattr(config, n)
                for n in ("vision_config", "vq_config", "vision_model_config")
                if getattr(config, n, None) is not None
            ),
            config,
        )
        if takes(model, "aspect_ratio_ids"):  # attends to the image from one token
            self.count, self.layout = 1, self._tiles
            return
        self.function = next(
            (
                part.get_image_features
                for part in (model, getattr(model, "model", None))
                if hasattr(part, "get_image_features")
            ),
            None,
        )
        if self.function is None:
            raise NotApplicableError("the class does not say what an image becomes")
        problems = []
        for layout in (
            self._flat,
            self._twice,
            self._patches,
            self._plain,
            self._sized,
            self._listed,
            self._tiled,
            self._placed,
            self._packed,
        ):
            try:
                with torch.no_grad():
                    self.count = self._features(layout(1))
                self.layout = layout
                return
            except Exception as problem:
                problems.append(f"{layout.__name__[1:]}: {first_line(problem)}"[:110])
        raise NotApplicableError("no image that it takes is known: " + "; ".join(problems))

    def text(self, rows: int, length: int, seed: int) -> Tensor:
        """A text with an image behind its first tokens."""
        ids = text(rows, length, seed)
        image = torch.full((rows, self.count), self.token)
        return torch.cat([ids[:, :PLACE], image, ids[:, PLACE:]], 1)

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """What goes with a text with images besides its tokens."""
        is_image = ids == self.token
        rows = int(is_image.any(1).sum())
        given = self.layout(rows) if rows else {}
        if rows and "aspect_ratio_ids" in given:
            given["cross_attention_mask"] = torch.ones(*ids.shape, 1, 2, dtype=torch.long)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if takes(self.model, name) and (rows or name == "mm_token_type_ids"):
                given[name] = is_image.long()
        return given

    def _features(self, inputs: dict[str, Any]) -> int:
        """How many tokens an image becomes."""
        known = {*inspect.signature(self.function).parameters, "image_merge_sizes"}
        found = self.function(**{n: x for n, x in inputs.items() if n in known})
        if not isinstance(found, (Tensor, list, tuple)):
            pooled = found.pooler_output
            found = found.last_hidden_state if pooled is None else pooled
        if isinstance(found, (list, tuple)):
            found = torch.cat([x.reshape(-1, x.shape[-1]) for x in found])
        return found.reshape(-1, found.shape[-1]).shape[0]

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(21)).to(self.model.dtype)

    def _flat(self, rows: int) -> dict[str, Any]:
        """Patches of all images in one list, and how many an image has (Qwen2-VL)."""
        if not takes(self.model, "image_grid_thw"):
            raise NotApplicableError("takes no image_grid_thw")
        config = self.vision
        patch = _number(getattr(config, "patch_size", PATCH))
        times = _number(getattr(config, "temporal_patch_size", 1))
        channels = getattr(config, "in_channels", getattr(config, "num_channels", 3))
        grid = torch.tensor([[1, 4, 4]] * rows)
        found = {"image_grid_thw": grid, **self._merged(rows)}
        return {"pixel_values": self._noise(rows * 16, channels * times * patch * patch), **found}

    def _merged(self, rows: int) -> dict[str, Any]:
        merges = takes(self.model, "image_merge_sizes")
        return {"image_merge_sizes": torch.tensor([2] * rows)} if merges else {}

    def _twice(self, rows: int) -> dict[str, Any]:
        """The same with two frames in a patch, which not every configuration says."""
        given = self._flat(rows)
        return {**given, "pixel_values": given["pixel_values"].repeat(1, 2)}

    def _patches(self, rows: int) -> dict[str, Any]:
        """The same with patches of two dimensions (Kimi)."""
        given, patch = self._flat(rows), _number(getattr(self.vision, "patch_size", PATCH))
        return {**given, "pixel_values": given["pixel_values"].view(rows * 16, -1, patch, patch)}

    def _tiles(self, rows: int) -> dict[str, Any]:
        """Tiles of an image in a shape of its own (Mllama)."""
        size = self._size()
        return {
            "pixel_values": self._noise(rows, 1, 2, 3, size, size),
            "aspect_ratio_ids": torch.tensor([[2]] * rows),
            "aspect_ratio_mask": torch.ones(rows, 1, 2, dtype=torch.long),
        }

    def _placed(self, rows: int) -> dict[str, Any]:
        """Patches and where each one is (Gemma 4)."""
        if not takes(self.model, "image_position_ids"):
            raise NotApplicableError("takes no image_position_ids")
        patch = _number(getattr(self.vision, "patch_size", PATCH))
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
        return {
            "pixel_values": self._noise(rows, 16, 3 * patch * patch),
            "image_position_ids": places.expand(rows, -1, -1),
        }

    def _packed(self, rows: int) -> dict[str, Any]:
        """Patches of images of any shape, padded (LFM2-VL)."""
        if not takes(self.model, "spatial_shapes"):
            raise NotApplicableError("takes no spatial_shapes")
        patch = _number(getattr(self.vision, "patch_size", PATCH))
        return {
            "pixel_values": self._noise(rows, 16, 3 * patch * patch),
            "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * rows),
        }

    def _size(self) -> int:
        return _number(getattr(self.vision, "image_size", None) or SIZE)

    def _plain(self, rows: int) -> dict[str, Any]:
        """An image a row (LLaVA)."""
        size = self._size()
        return {"pixel_values": self._noise(rows, 3, size, size)}

    def _sized(self, rows: int) -> dict[str, Any]:
        """An image a row and its size (Pixtral)."""
        size = self._size()
        return {**self._plain(rows), "image_sizes": torch.tensor([[size, size]] * rows)}

    def _tiled(self, rows: int) -> dict[str, Any]:
        """Several views of an image (LLaVA-NeXT)."""
        size = self._size()
        return {
            "pixel_values": self._noise(rows, 3, 3, size, size),
            "image_sizes": torch.tensor([[size, 2 * size]] * rows),
        }

    def _listed(self, rows: int) -> dict[str, Any]:
        """A list of images a row (Idefics)."""
        size = self._size()
        return {"pixel_values": self._noise(rows, 1, 3, size, size)}


def _number(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index", "media_placeholder_token_id"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    raise NotApplicableError("its configuration names no image token")
