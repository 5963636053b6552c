"""Which variants of the model the ablation compares.

A variant is one of the language model with its slots, and one of the image decoder. Both have or lack
synchronizers; what else differs is the number of slots, the levels that are sampled, and which earlier images
the image decoder attends to. The two are trained apart, so variants share them: sixteen variants are thirteen
language models and four image decoders. Names of folders and results are those of the first release, so that
its runs go on.
"""

from dataclasses import dataclass
from typing import Any

from mm_interleaved.errors import UsageError

NO_LEVELS: tuple[int, ...] = ()
MIDDLE_LEVEL = (1,)
"""The pyramid's level of 16 cells, which has the resolution of the latents."""
ALL_LEVELS = (0, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageVariant:
    """Slots and language model."""

    num_slots: int = 4
    levels: tuple[int, ...] = ALL_LEVELS
    """Levels that the language model's synchronizers sample; none: it has no synchronizers."""
    are_slots_coarse: bool = False
    """Slots learn all attributes but badges and patterns, as those of the shipped model."""
    seed: int = 1

    @property
    def slots_name(self) -> str:
        return f"slots-{self.num_slots}{'-coarse' if self.are_slots_coarse else ''}"

    @property
    def name(self) -> str:
        slots = self.slots_name.removeprefix("slots-")
        return f"reader-{slots}-{_levels_name(self.levels)}-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDecoderVariant:
    """U-Net and conditioning of no context."""

    levels: tuple[int, ...] = ALL_LEVELS
    """Levels that the U-Net's synchronizers sample; none: it has no synchronizers."""
    context_images: str = "all"
    """Which earlier images it attends to, "previous" or "all"."""
    seed: int = 1

    @property
    def name(self) -> str:
        levels = _levels_name(self.levels)
        return f"painter-{levels}-{self.seed}" if not self.levels or self.context_images == "all" else (
            f"painter-{levels}-{self.context_images}-{self.seed}"
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A whole model."""

    kind: str
    """What it stands for; variants of the same kind differ in their seeds alone."""
    language: LanguageVariant
    image_decoder: ImageDecoderVariant

    @property
    def name(self) -> str:
        return f"{self.kind.replace(' ', '-')}-{self.language.seed}"


def _levels_name(levels: tuple[int, ...]) -> str:
    return {NO_LEVELS: "blind", MIDDLE_LEVEL: "one-level", ALL_LEVELS: "looking"}[levels]


WITH, WITHOUT = "both", "neither"
"""Kinds of the main pair, at four slots: synchronizers in both models, and none at all."""
SLOT_COUNTS = (1, 4, 16)


def kind_with(num_slots: int, *, has_synchronizers: bool = True) -> str:
    """The kind with so many slots, and synchronizers in both models or in none."""
    kind = WITH if has_synchronizers else WITHOUT
    return kind if num_slots == 4 else f"{kind} {num_slots} slots"


def all_variants() -> tuple[Variant, ...]:
    """Every variant, those of the main pair first: three seeds for these, one for the others.

    A seed is the language model's; image decoders, which cost as much and differ less, have one seed.
    """
    full, none = {"levels": ALL_LEVELS}, {"levels": NO_LEVELS}

    def variant(kind: str, language: dict[str, Any], image_decoder: dict[str, Any], seed: int = 1) -> Variant:
        return Variant(
            kind=kind,
            language=LanguageVariant(**language, seed=seed),
            image_decoder=ImageDecoderVariant(**image_decoder),
        )

    variants = [variant(WITH, full, full), variant(WITHOUT, none, none)]
    variants.append(variant("LLM only", full, none))
    variants.append(variant("U-Net only", none, full))
    for num_slots in (16, 1):
        slots = {"num_slots": num_slots}
        variants.append(variant(kind_with(num_slots, has_synchronizers=False), slots | none, none))
        variants.append(variant(kind_with(num_slots, has_synchronizers=True), slots | full, full))
    for seed in (2, 3):
        variants += [variant(WITH, full, full, seed), variant(WITHOUT, none, none, seed)]
    variants.append(variant("both one level", {"levels": MIDDLE_LEVEL}, {"levels": MIDDLE_LEVEL}))
    variants.append(variant("both previous image", full, full | {"context_images": "previous"}))
    coarse = {"are_slots_coarse": True}
    variants.append(variant("both coarse slots", full | coarse, full))
    variants.append(variant("neither coarse slots", none | coarse, none))
    return tuple(variants)


def chosen_variants(names: tuple[str, ...]) -> tuple[Variant, ...]:
    """The variants of these names, all where none is given. Raises UsageError for an unknown one."""
    variants = {variant.name: variant for variant in all_variants()}
    for name in names:
        if name not in variants:
            raise UsageError(f"variants: found {name!r}, expected some of {', '.join(variants)}")
    return tuple(variants[name] for name in names) if names else tuple(variants.values())
