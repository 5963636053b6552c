"""Every number of a model, mirroring its parts; saved as `config.json`.

Nothing here builds anything: `models/build.py` reads these and hands plain dimensions to the parts.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from inspect import get_annotations, signature
from typing import Any, ClassVar, Literal

from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PreTrainedConfig

from mm_interleaved.documents.strict_json import FieldError, describe
from mm_interleaved.model_files.resolve import HUB_ARGUMENTS, SMALL_FILES, find_folder
from mm_interleaved.model_files.values import check_object

CONTEXT_RULES = ("previous", "all")


_OUR_HINTS: Mapping[str, Mapping[str, Any]] = {
    # CLIP's class takes rectangles too.
    "vision_config": {"image_size": int, "patch_size": int},
}
# What transformers' own base class of configurations takes; it annotates with texts.
BASE_HINTS: Mapping[str, Any] = {
    "architectures": list[str] | None,
    "dtype": Literal["float64", "float32", "bfloat16", "float16"] | None,
    "id2label": dict[Any, Any] | None,
    "label2id": dict[Any, Any] | None,
    "output_attentions": bool | None,
    "output_hidden_states": bool | None,
    "return_dict": bool | None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The ViT-Adapter beside the vision transformer."""

    stem_dim: int = 64
    """Channels of the first convolutions."""
    num_points: int = 4
    """Samples a head and level of its deformable attention."""
    value_ratio: float = 0.5
    """Sampled channels, as a share of the transformer's."""
    feed_forward_ratio: float = 0.25
    """Hidden channels of the extractors' feed-forward, as a share of the transformer's."""
    num_interactions: int = 4
    """Exchanges between pyramid and transformer; they divide the transformer's layers evenly."""
    num_extra_extractors: int = 2
    """Further extractors in the last exchange."""
    pixel_levels: int = 0
    """How many of the finest levels also get their own pixels through a linear layer (not in the paper)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResamplerConfig:
    """A resampler: learned queries reading tokens."""

    dim: int
    """Hidden channels."""
    num_queries: int
    """Vectors that come out."""
    num_layers: int
    """Layers; each has self-attention and feed-forward."""
    num_heads: int
    """Attention heads."""
    mlp_dim: int = 3072
    """Hidden channels of the feed-forward."""
    cross_attention_every: int = 1
    """Layers 0, k, 2k, ... read the tokens."""
    query_key_norm: bool = False
    """Normalise the queries and keys of each head."""
    dropout: float = 0.0
    """Dropout in training, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SynchronizerConfig:
    """The synchronizers of one side, language or U-Net."""

    value_dim: int
    """Sampled channels over all heads."""
    levels: tuple[int, ...]
    """Which levels of the pyramid are looked into, finest = 0."""
    num_heads: int = 16
    """Heads; each has its own points."""
    num_points: int = 8
    """Points a head and image; all levels share them."""
    max_images: int
    """Rows of the relative-index table; fewer images than this can be seen at once."""
    base_size: int
    """Cells of the map in whose cells offsets are measured (of the U-Net's finest map, on that side)."""
    offset_spread: float
    """Points start within this many base cells of the reference point."""
    every: int = 1
    """Language side: layers 0, k, 2k, ... look at images."""
    keep: str = "values"
    """What is kept of an image: "values", projected for each layer, or "features", one copy for all layers:
    the same results from less memory, in more time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.keep not in ("values", "features"):
            raise ValueError(f"keep must be 'values' or 'features', found {self.keep!r}")
        if self.value_dim % self.num_heads:
            raise ValueError(f"value_dim {self.value_dim} must be a multiple of num_heads {self.num_heads}")


class MMInterleavedConfig(PreTrainedConfig):
    """Configuration of a whole model; the stock parts' own configurations in their libraries' terms.

    `adapter`, `slot_resampler`, `conditioning_resampler`, `text_synchronizer`, `image_synchronizer` are
    stored as dictionaries (they are JSON) and read through `part(name)`. `image_decoder` parts may be None: a
    model that generates text only. `text_synchronizer` or `image_synchronizer` None: the variant without.
    """

    model_type = "mm_interleaved"
    sub_configs: ClassVar[Any] = {"text_config": AutoConfig, "vision_config": CLIPVisionConfig}

    # Given as dictionaries or configurations, kept as configurations (see `__post_init__`): hence Any.
    text_config: Any = None
    vision_config: Any = None
    unet_config: Any = None
    vae_config: Any = None
    scheduler_config: Any = None
    adapter: Any = None
    slot_resampler: Any = None
    conditioning_resampler: Any = None
    text_synchronizer: Any = None
    image_synchronizer: Any = None
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    image_start_token_id: int = 32000
    image_token_id: int = 32001
    num_new_tokens: int = 2
    text_loss_weight: float = 1.0
    image_loss_weight: float = 10.0
    condition_dropout: float = 0.1
    context_images: str = "all"
    compat: str | None = None

    _PARTS = {  # noqa: RUF012
        "adapter": AdapterConfig,
        "slot_resampler": ResamplerConfig,
        "conditioning_resampler": ResamplerConfig,
        "text_synchronizer": SynchronizerConfig,
        "image_synchronizer": SynchronizerConfig,
    }

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in self._PARTS.items():
            value = getattr(self, name)
            if isinstance(value, kind):
                setattr(self, name, asdict(value))
        self._check_values()
        if isinstance(self.text_config, dict):
            settings = dict(self.text_config)
            self.text_config = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
        if isinstance(self.vision_config, dict):
            settings = {k: v for k, v in self.vision_config.items() if k != "model_type"}
            self.vision_config = CLIPVisionConfig(**settings)
        super().__post_init__(**kwargs)
        if self.context_images not in CONTEXT_RULES:
            raise ValueError(f"context_images must be one of {CONTEXT_RULES}, found {self.context_images!r}")
        if self.compat not in (None, "released"):
            raise ValueError(f"compat must be None or 'released', found {self.compat!r}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **settings: Any) -> Any:
        """As transformers', where "storyworld" is a name too. Raises ModelFileError if there is no model."""
        hub = {name: settings[name] for name in HUB_ARGUMENTS if settings.get(name) is not None}
        folder = find_folder(pretrained_model_name_or_path, files=SMALL_FILES, hub=hub)
        return super().from_pretrained(folder, **settings)

    def _check_values(self) -> None:
        """Refuses, as a ValueError that names the field, values that no model of any size has."""
        check_object(
            {name: getattr(self, name) for name in get_annotations(MMInterleavedConfig)},
            get_annotations(MMInterleavedConfig),
            "",
        )
        for name, kind in self._PARTS.items():
            if getattr(self, name) is not None:
                _check_part(getattr(self, name), kind, name)
        _check_family(self.text_config)
        for name, kind in _stock_classes(self.text_config).items():
            value = getattr(self, name)
            # A configuration that is one already has been checked by its own class.
            if value is not None and not isinstance(value, PreTrainedConfig):
                check_object(value, {**_hints(kind), **_OUR_HINTS.get(name, {})}, name)

    def check_complete(self) -> None:
        """Refuses a configuration that lacks what every model needs, or with ids beyond its vocabulary.

        Not asked at once, because transformers makes empty configurations to compare others with.

        Raises:
            ValueError: naming the field.
        """
        needed = ["text_config", "vision_config", "adapter", "slot_resampler"]
        if self.has_image_decoder:
            needed += ["vae_config", "scheduler_config", "conditioning_resampler"]
        for name in needed:
            if getattr(self, name) is None:
                raise FieldError(name, "found nothing, expected an object")
        size = self.text_config.vocab_size
        for name in ("bos", "eos", "pad", "image_start", "image"):
            value = getattr(self, f"{name}_token_id")
            if not 0 <= value < size:
                raise FieldError(
                    f"{name}_token_id", f"found {value}, expected less than text_config.vocab_size {size}"
                )

    def part(self, name: str) -> Any:
        """The dataclass of one of our own parts, or None where the model lacks it."""
        value = getattr(self, name)
        return None if value is None else self._PARTS[name](**value)

    @property
    def num_slots(self) -> int:
        """Image tokens an image takes in the language model."""
        return self.slot_resampler["num_queries"]

    @property
    def has_image_decoder(self) -> bool:
        return self.unet_config is not None

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self.text_config


def _check_part(value: Any, kind: Any, path: str) -> None:
    """Refuses settings that are not those of one of our parts. Raises ValueError, naming the field."""
    check_object(value, _hints(kind), path)
    known = {field.name: field.default is MISSING for field in fields(kind)}
    unknown = [name for name in value if name not in known]
    missing = [name for name, is_needed in known.items() if is_needed and name not in value]
    if unknown:
        raise FieldError(f"{path}.{unknown[0]}", f"no such field, expected some of {', '.join(known)}")
    if missing:
        raise FieldError(f"{path}.{missing[0]}", "missing")
    try:
        kind(**value)
    except ValueError as error:
        raise FieldError(path, str(error)) from error


def _check_family(text_config: Any) -> None:
    if isinstance(text_config, Mapping) and "model_type" in text_config:
        family = text_config["model_type"]
        if not isinstance(family, str) or family not in CONFIG_MAPPING:
            raise FieldError(
                "text_config.model_type", f"found {describe(family)}, expected a type that transformers knows"
            )


def _stock_classes(text_config: Any) -> dict[str, Any]:
    """The class that each stock part's values are for."""
    # Late: who only wants a configuration need not wait for all of diffusers.
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    classes = {
        "vision_config": CLIPVisionConfig,
        "unet_config": UNet2DConditionModel,
        "vae_config": AutoencoderKL,
        "scheduler_config": DDPMScheduler,
    }
    family = text_config.get("model_type", "llama") if isinstance(text_config, Mapping) else None
    if isinstance(family, str) and family in CONFIG_MAPPING:
        return {"text_config": CONFIG_MAPPING[family], **classes}
    return {"text_config": None, **classes}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Name and type of each field that a class takes, as its dataclass or its constructor says."""
    if kind is None:
        return {}
    if is_dataclass(kind):
        return {**{field.name: field.type for field in fields(kind)}, **BASE_HINTS}
    return {name: taken.annotation for name, taken in signature(kind.__init__).parameters.items()}
