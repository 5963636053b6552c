"""Which twins the ablation compares, and how a twin is built out of a finished model.

A twin is a reader (slots and language model) and a painter (U-Net). Both have or lack synchronizers; what
else differs is the number of slots, the levels that are looked into, and which earlier images the painter
sees. Readers and painters are trained apart, so twins share them: sixteen twins are thirteen readers and
four painters.
"""

from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mm_interleaved.config import MMInterleavedConfig, SynchronizerConfig
from mm_interleaved.errors import UsageError
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.training.initialisation import open_to_images, open_to_learning
from mm_interleaved.training.settings import check_least

NO_LEVELS: tuple[int, ...] = ()
MIDDLE_LEVEL = (1,)
"""The pyramid's level of 16 cells, which has the resolution of the latents."""
ALL_LEVELS = (0, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What sees and reads."""

    num_slots: int = 4
    levels: tuple[int, ...] = ALL_LEVELS
    """Levels that the language model's synchronizers look into; none: it has no synchronizers."""
    are_slots_coarse: bool = False
    """Slots are taught all but badges and patterns, as those of the shipped model."""
    seed: int = 1

    @property
    def slots_name(self) -> str:
        return f"slots-{self.num_slots}{'-coarse' if self.are_slots_coarse else ''}"

    @property
    def name(self) -> str:
        slots = self.slots_name.removeprefix("slots-")
        return f"reader-{slots}-{_levels_name(self.levels)}-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Painter:
    """What paints."""

    levels: tuple[int, ...] = ALL_LEVELS
    """Levels that the U-Net's synchronizers look into; none: it has no synchronizers."""
    context_images: str = "all"
    """Which earlier images it sees, "previous" or "all"."""
    seed: int = 1

    @property
    def name(self) -> str:
        looks = _levels_name(self.levels)
        return f"painter-{looks}-{self.seed}" if not self.levels or self.context_images == "all" else (
            f"painter-{looks}-{self.context_images}-{self.seed}"
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A whole model."""

    arm: str
    """What it stands for; twins of the same arm differ in their seeds alone."""
    reader: Reader
    painter: Painter

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '-')}-{self.reader.seed}"


def _levels_name(levels: tuple[int, ...]) -> str:
    return {NO_LEVELS: "blind", MIDDLE_LEVEL: "one-level", ALL_LEVELS: "looking"}[levels]


WITH, WITHOUT = "both", "neither"
"""Arms of the main pair, at four slots: synchronizers on both sides, and none at all."""
SLOT_COUNTS = (1, 4, 16)


def arm_with(num_slots: int, *, is_looking: bool) -> str:
    """The arm of so many slots, with synchronizers on both sides or on none."""
    arm = WITH if is_looking else WITHOUT
    return arm if num_slots == 4 else f"{arm} {num_slots} slots"


def all_twins() -> tuple[Twin, ...]:
    """Every twin, those of the main pair first: three seeds for these, one for the others.

    A seed is the reader's; painters, which cost as much and differ less, have one seed.
    """
    looking, blind = {"levels": ALL_LEVELS}, {"levels": NO_LEVELS}

    def twin(arm: str, reader: dict[str, Any], painter: dict[str, Any], seed: int = 1) -> Twin:
        return Twin(arm=arm, reader=Reader(**reader, seed=seed), painter=Painter(**painter))

    twins = [twin(WITH, looking, looking), twin(WITHOUT, blind, blind)]
    twins.append(twin("LLM only", looking, blind))
    twins.append(twin("U-Net only", blind, looking))
    for num_slots in (16, 1):
        slots = {"num_slots": num_slots}
        twins.append(twin(arm_with(num_slots, is_looking=False), slots | blind, blind))
        twins.append(twin(arm_with(num_slots, is_looking=True), slots | looking, looking))
    for seed in (2, 3):
        twins += [twin(WITH, looking, looking, seed), twin(WITHOUT, blind, blind, seed)]
    twins.append(twin("both one level", {"levels": MIDDLE_LEVEL}, {"levels": MIDDLE_LEVEL}))
    twins.append(twin("both previous image", looking, looking | {"context_images": "previous"}))
    coarse = {"are_slots_coarse": True}
    twins.append(twin("both coarse slots", looking | coarse, looking))
    twins.append(twin("neither coarse slots", blind | coarse, blind))
    return tuple(twins)


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinSizes:
    """The numbers of a twin's language model; vision tower, U-Net and VAE are those of the finished model."""

    text_dim: int = 128
    """Width of the language model."""
    text_layers: int = 4
    """Its layers; every second looks at images, the first among them."""
    text_heads: int = 4
    """Attention heads of each."""
    max_context_images: int = 5
    """Earlier images that the painter can tell apart: all of a story."""

    def __post_init__(self) -> None:
        check_least(self, 1, "text_layers", "text_heads", "max_context_images")
        # Positions turn pairs of channels, so each head needs an even number of them.
        if self.text_dim < 1 or self.text_dim % (2 * self.text_heads):
            raise UsageError(
                f"text_dim must be a multiple of twice text_heads ({2 * self.text_heads}), "
                f"found {self.text_dim}"
            )


def twin_config(
    finished: MMInterleavedConfig, sizes: TwinSizes, reader: Reader, painter: Painter
) -> MMInterleavedConfig:
    """The finished model's configuration with another language model, slots and synchronizers."""
    config = deepcopy(finished)
    text = config.text_config
    text.hidden_size, text.intermediate_size = sizes.text_dim, 5 * sizes.text_dim // 2
    text.num_hidden_layers = sizes.text_layers
    text.num_attention_heads = text.num_key_value_heads = sizes.text_heads
    text.head_dim = sizes.text_dim // sizes.text_heads
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:1] * sizes.text_layers
    config.slot_resampler = {**config.slot_resampler, "num_queries": reader.num_slots}
    shape: dict[str, Any] = {"num_heads": 4, "num_points": 4, "value_dim": 96}
    config.text_synchronizer = asdict(
        SynchronizerConfig(
            **shape, levels=reader.levels, max_images=16, base_size=8, offset_spread=3.0, every=2
        )
    ) if reader.levels else None  # fmt: skip
    config.image_synchronizer = asdict(
        SynchronizerConfig(
            **shape, levels=painter.levels, max_images=sizes.max_context_images + 1, base_size=16,
            offset_spread=4.0,
        )
    ) if painter.levels else None  # fmt: skip
    config.context_images = painter.context_images
    return config


def build_twin(
    finished: MMInterleavedForConditionalGeneration, sizes: TwinSizes, reader: Reader, painter: Painter
) -> MMInterleavedForConditionalGeneration:
    """A twin whose eyes, U-Net and VAE are the finished model's; slots, language model and synchronizers
    are new, by the reader's seed.
    """
    torch.manual_seed(reader.seed)
    config: Any = finished.config
    model = MMInterleavedForConditionalGeneration(twin_config(config, sizes, reader, painter))
    open_to_images(model)
    open_to_learning(model)
    kept = ("vision.", "image_decoder.unet.", "image_decoder.vae.", "image_decoder.negative_conditioning")
    made_anew = ("vision.resampler.", "vision.slot_projection.")
    weights = {
        name: tensor
        for name, tensor in finished.state_dict().items()
        if name.startswith(kept) and not name.startswith(made_anew)
    }
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, f"a twin lacks {unknown[:3]}"
    return model.train()
