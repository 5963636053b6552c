"""A golden folder: the official code's inputs, weights and outputs at a tiny size, and ours beside them.

What each tensor is stands in the reference sheet `GOLDEN.md`; producers of our side are in `producers.py`.
"""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mm_interleaved.checkpoint.key_map import from_official
from mm_interleaved.checkpoint.released_config import released_config
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration


class Golden:
    """One folder; everything is read and built on first use, and each group of outputs is computed once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.compared: set[str] = set()
        self.asked = False
        self._computed: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def meta(self) -> dict:
        return self.config["meta"]

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "outputs.safetensors")

    @cached_property
    def tolerances(self) -> dict:
        return json.loads((self.folder / "tolerances.json").read_text())

    @cached_property
    def output_keys(self) -> list[str]:
        return sorted(self.outputs)

    @cached_property
    def model(self) -> MMInterleavedForConditionalGeneration:
        """Our model with the folder's weights, loaded through the same key map as `convert`.

        A folder may hold the weights of some parts only; then only their outputs can be asked for.
        """
        config = released_config(
            llm=self.config["llm"],
            clip=self.config["clip"],
            unet=self.config["unet"],
            vae=self.config["vae"],
            scheduler=self.config["effective"]["scheduler"],
            model=self.config["model"],
        )
        model = MMInterleavedForConditionalGeneration(config).eval()
        official = load_file(self.folder / "model.safetensors")
        ours = dict(pair for key, tensor in official.items() if (pair := from_official(key, tensor)))
        unexpected = model.load_state_dict(ours, strict=False).unexpected_keys
        assert not unexpected, unexpected
        self.unfilled = tuple(key for key in model.state_dict() if key not in ours)
        return model

    @cached_property
    def tokens(self) -> dict[str, int]:
        return self.config["model"]["special_token_dict"]

    def image_start(self, input_ids: Tensor) -> Tensor:
        """(B, N) index of each image's start token, padded with -1."""
        rows = [(row == self.tokens["soi_token_id"]).nonzero()[:, 0] for row in input_ids]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def pixels(self, image_index: Tensor) -> Tensor:
        """Images by index into the forward images; -1 is a grey placeholder."""
        images = self.inputs["forward.image_tensors_u8"].float() / 255
        grey = torch.full_like(images[:1], 128 / 255)
        return torch.cat([images, grey])[image_index]

    def cases(self, prefix: str) -> list[str]:
        """Names between `prefix.` and the next dot, among the outputs."""
        names = {key[len(prefix) + 1 :].split(".")[0] for key in self.outputs if key.startswith(prefix + ".")}
        return sorted(names)

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.outputs)

    def ours(self, key: str, producers: dict[str, Callable[["Golden"], dict[str, Tensor]]]) -> Tensor | None:
        """Our tensor for an output key; None if no producer makes it."""
        self.asked = True
        for prefix, produce in producers.items():
            if key.startswith(prefix):
                if prefix not in self._computed:
                    with torch.no_grad():
                        self._computed[prefix] = produce(self)
                return self._computed[prefix].get(key)
        return None

    def valid(self, key: str) -> Tensor | None:
        """Which positions of (B, L, ...) outputs are no padding; None if the output has no such axes."""
        by_position = (
            "mm_embeds",
            "cross_attention_mask",
            "llm_hidden_states",
            "mm_hidden_state",
            "text_logits",
        )
        if key.startswith("forward.") and key.split(".")[1] in by_position:
            return self.inputs["forward.attention_mask"].bool()
        return None
