"""A golden folder: the official code's inputs, weights and outputs at a tiny size, and our model beside them.

What each tensor is stands in the reference sheet `GOLDEN.md`; `producers/` makes our side of the outputs.
"""

import functools
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mm_interleaved.checkpoint.key_map import from_official
from mm_interleaved.checkpoint.released_config import released_config
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

FILES = ("config.json", "inputs.safetensors", "model.safetensors", "outputs.safetensors", "tolerances.json")
GREY = 128 / 255
"""The official placeholder of an image that is still to come."""


class Tensors(dict):
    """The tensors of one file by name; a missing one is reported with the file's name."""

    def __init__(self, path: Path):
        super().__init__(load_file(path))
        self.file = path.name

    def __missing__(self, name: str) -> Tensor:
        raise LookupError(f"{self.file}: no tensor {name!r}")


class StepFailedError(Exception):
    """A step that others need has failed before; the first output that needed it tells how."""


def shared(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A step that several outputs are made from: `compute(golden, *arguments)`.

    It is computed once a folder, whether it works or fails.
    """

    @functools.wraps(compute)
    def step(golden: "Golden", *arguments: Any) -> Any:
        name = (compute, *arguments)
        if name in golden.failures:
            error = golden.failures[name]
            raise StepFailedError(f"{compute.__name__} has failed before: {type(error).__name__}: {error}")
        if name not in golden.results:
            try:
                with torch.no_grad():
                    golden.results[name] = compute(golden, *arguments)
            except Exception as error:
                golden.failures[name] = error
                raise
        return golden.results[name]

    return step


class Golden:
    """One folder; each file is read, and the model built, when it is first needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.results: dict[tuple, Any] = {}
        self.failures: dict[tuple, Exception] = {}

    @property
    def missing_files(self) -> list[str]:
        return [name for name in FILES if not (self.folder / name).is_file()]

    @cached_property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def inputs(self) -> Tensors:
        return Tensors(self.folder / "inputs.safetensors")

    @cached_property
    def outputs(self) -> Tensors:
        return Tensors(self.folder / "outputs.safetensors")

    @cached_property
    def tolerances(self) -> dict:
        return json.loads((self.folder / "tolerances.json").read_text())

    @cached_property
    def output_keys(self) -> list[str]:
        with safe_open(self.folder / "outputs.safetensors", "pt") as file:
            return sorted(file.keys())

    # ---- Arguments -------------------------------------------------------------------------------

    def arguments(self, case: str) -> dict[str, Any]:
        """What the official functions were called with in a case, such as `gen_text.greedy`."""
        return self._named("meta", case)

    def variant_arguments(self, variant: str) -> dict[str, Any]:
        """Arguments of one variant of the training pass, by their official names; empty if it has none."""
        return self._named("meta", "forward", "variant_arguments").get(variant, {})

    def _named(self, *path: str) -> dict[str, Any]:
        found = self.config
        for depth, name in enumerate(path):
            if name not in found:
                raise LookupError(f"config.json: no field {'.'.join(path[: depth + 1])}")
            found = found[name]
        return found

    @property
    def tokens(self) -> dict[str, int]:
        """Special ids by their official names, such as `bos_token_id`."""
        return self.config["model"]["special_token_dict"]

    # ---- The model -------------------------------------------------------------------------------

    @property
    def model(self) -> MMInterleavedForConditionalGeneration:
        """Ours with the folder's weights, in float32."""
        return _build(self)[0]

    @property
    def missing_weights(self) -> list[str]:
        """Names, ours, of weights that the folder lacks or has in another shape.

        Such a weight is not a number here, so that whatever is made from it cannot equal the official output.
        (A folder may hold the weights, and outputs, of some parts only.)
        """
        return _build(self)[1]

    @property
    def what_is_missing(self) -> str:
        """The end of a message: how many weights the folder lacks, and the first; nothing if it is whole."""
        names = self.missing_weights
        return f"; the folder lacks {len(names)} weights, the first is {names[0]}" if names else ""

    # ---- Inputs ----------------------------------------------------------------------------------

    def image_start(self, input_ids: Tensor) -> Tensor:
        """(B, N) index of each image's start token, padded with -1."""
        rows = [(row == self.tokens["soi_token_id"]).nonzero()[:, 0] for row in input_ids]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def pixels(self, image_index: Tensor) -> Tensor:
        """RGB in [0, 1] of images, by their numbers among those of the training pass; -1 is a placeholder."""
        images = self.inputs["forward.image_tensors_u8"].float() / 255
        return torch.cat([images, torch.full_like(images[:1], GREY)])[image_index]


@shared
def _build(golden: Golden) -> tuple[MMInterleavedForConditionalGeneration, list[str]]:
    """Our model with the folder's weights, through the same key map as `convert`, and which are missing."""
    config = released_config(
        **{part: golden.config[part] for part in ("llm", "clip", "unet", "vae", "model")},
        scheduler=golden.config["effective"]["scheduler"],
    )
    model = MMInterleavedForConditionalGeneration(config).eval()
    official = load_file(golden.folder / "model.safetensors")
    given = dict(pair for key, tensor in official.items() if (pair := from_official(key, tensor)))
    expected = model.state_dict()
    unknown = sorted(given.keys() - expected.keys())
    if unknown:
        raise LookupError(f"model.safetensors: the model has no place for {', '.join(unknown)}")
    missing = [key for key in expected if key not in given or given[key].shape != expected[key].shape]
    nothing = {key: torch.full_like(expected[key], torch.nan) for key in missing}
    model.load_state_dict(given | nothing)
    return model, missing
