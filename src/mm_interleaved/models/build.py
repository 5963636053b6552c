"""From a configuration to built parts: the one place that reads the numbers.

Parts never see the configuration; what does not fit together is refused here, in one sentence.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.models.adapter import VisionAdapter
from mm_interleaved.models.config import MMInterleavedConfig, ResamplerConfig, SynchronizerConfig
from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.models.image_decoder import ImageDecoder
from mm_interleaved.models.language import language_family
from mm_interleaved.models.resampler import Resampler
from mm_interleaved.models.synchronizer import FeatureSynchronizer
from mm_interleaved.models.unet import MapSynchronizer, UNetSynchronizers, check_unet, skip_channels
from mm_interleaved.models.vision import ClipBackbone, VisionTower

# Not RuntimeError, which is also what a lack of memory is.
_BUILDING_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, NotImplementedError,
)  # fmt: skip


def build_vision_tower(config: MMInterleavedConfig) -> VisionTower:
    """CLIP, its adapter and the resampler to the slots."""
    vision, adapter = config.vision_config, config.part("adapter")
    if vision.num_hidden_layers % adapter.num_interactions:
        raise FieldError(
            "",
            f"vision_config.num_hidden_layers {vision.num_hidden_layers} must be a multiple of "
            f"adapter.num_interactions {adapter.num_interactions}",
        )
    if adapter.num_interactions < 4:
        raise FieldError("", f"adapter.num_interactions must be at least 4, found {adapter.num_interactions}")
    if vision.image_size % (2 * vision.patch_size):
        raise FieldError(
            "",
            f"vision_config.image_size {vision.image_size} must be a multiple of two patches "
            f"of {vision.patch_size}",
        )
    if vision._attn_implementation is None:
        # Only sub-models that are PreTrainedModels get one by themselves; these layers stand alone.
        vision._attn_implementation = "sdpa"
    dim = vision.hidden_size
    with _out_of("vision_config"):
        clip = ClipBackbone(vision)
    with _out_of("adapter"):
        built = VisionAdapter(
            dim,
            num_heads=vision.num_attention_heads,
            stem_dim=adapter.stem_dim,
            num_points=adapter.num_points,
            value_ratio=adapter.value_ratio,
            feed_forward_ratio=adapter.feed_forward_ratio,
            num_interactions=adapter.num_interactions,
            num_extra_extractors=adapter.num_extra_extractors,
            pixel_levels=adapter.pixel_levels,
        )
    with _out_of("slot_resampler"):
        resampler = _build_resampler(config.part("slot_resampler"), token_dim=dim)
    return VisionTower(clip, built, resampler, dim=dim, slot_dim=config.text_config.hidden_size)


def build_language_model(config: MMInterleavedConfig) -> Any:
    """The language model with its synchronizers.

    Raises:
        ValueError: the family does not fit.
    """
    text, synchronizer = config.text_config, config.part("text_synchronizer")
    with _out_of("text_config.model_type"):
        family = language_family(text.model_type)
    if synchronizer is None:
        with _out_of("text_config"):
            return family(text)
    feature_dim = config.vision_config.hidden_size
    with _out_of("text_synchronizer"):
        synchronizers = {
            index: GatedSynchronizer(
                _build_synchronizer(synchronizer, text.hidden_size, feature_dim),
                text.hidden_size,
                feature_dim,
                norm_eps=text.rms_norm_eps,
            )
            for index in range(0, text.num_hidden_layers, synchronizer.every)
        }
    with _out_of("text_config"):
        return family(text, synchronizers)


def build_image_decoder(config: MMInterleavedConfig) -> ImageDecoder | None:
    """Resampler, U-Net with its synchronizers, VAE; None for a model that only writes.

    Raises:
        ValueError: the U-Net has another shape than SD 1.x/2.x, or the parts do not fit each other.
    """
    if not config.has_image_decoder:
        return None
    with _out_of("unet_config"):
        unet: Any = UNet2DConditionModel.from_config(config.unet_config)
        check_unet(unet)
    with _out_of("vae_config"):
        vae: Any = AutoencoderKL.from_config(config.vae_config)
    resampler = config.part("conditioning_resampler")
    if unet.config.cross_attention_dim != resampler.dim:
        raise FieldError(
            "",
            f"unet_config.cross_attention_dim {unet.config.cross_attention_dim} must equal "
            f"conditioning_resampler.dim {resampler.dim}",
        )
    if unet.config.in_channels != vae.config.latent_channels:
        raise FieldError(
            "",
            f"unet_config.in_channels {unet.config.in_channels} must equal vae_config.latent_channels "
            f"{vae.config.latent_channels}",
        )
    with _out_of("conditioning_resampler"):
        built = _build_resampler(resampler, token_dim=config.text_config.hidden_size)
    with _out_of("image_synchronizer"):
        synchronizers = _build_unet_synchronizers(config, unet)
    return ImageDecoder(built, unet, vae, synchronizers)


@contextmanager
def _out_of(part: str) -> Generator[None, None, None]:
    """What is raised while something is built out of a part of the configuration names that part.

    Stock classes meet a value that they cannot work with by all kinds of errors.
    """
    try:
        yield
    except FieldError:
        raise
    except _BUILDING_ERRORS as error:
        sentence = " ".join(str(error).split()) or type(error).__name__
        raise FieldError(part, f"no model can be built so ({sentence[:300]})") from error


def _build_unet_synchronizers(
    config: MMInterleavedConfig, unet: UNet2DConditionModel
) -> UNetSynchronizers | None:
    settings, feature_dim = config.part("image_synchronizer"), config.vision_config.hidden_size
    if settings is None:
        return None

    def block(channels: int, depth: int) -> MapSynchronizer:
        # Offsets are measured in cells of the map itself: a block at half the size has half the base.
        base_size = settings.base_size / 2**depth
        synchronizer = _build_synchronizer(settings, channels, feature_dim, base_size=base_size)
        return MapSynchronizer(synchronizer, channels, feature_dim, grid_size=settings.base_size)

    skips = skip_channels(unet)
    return UNetSynchronizers([block(*skip) for skip in skips], block(*skips[-1]))


def _build_synchronizer(
    settings: SynchronizerConfig, query_dim: int, feature_dim: int, *, base_size: float | None = None
) -> FeatureSynchronizer:
    return FeatureSynchronizer(
        query_dim,
        feature_dim,
        value_dim=settings.value_dim,
        num_heads=settings.num_heads,
        num_levels=len(settings.levels),
        num_points=settings.num_points,
        max_images=settings.max_images,
        base_size=settings.base_size if base_size is None else base_size,
        offset_spread=settings.offset_spread,
        keep=settings.keep,
    )


def _build_resampler(settings: ResamplerConfig, *, token_dim: int) -> Resampler:
    return Resampler(
        settings.dim,
        token_dim,
        num_queries=settings.num_queries,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        mlp_dim=settings.mlp_dim,
        cross_attention_every=settings.cross_attention_every,
        query_key_norm=settings.query_key_norm,
        dropout=settings.dropout,
    )
