"""What trains is chosen by part: which parameters belong to which part, and how each part learns.

Every parameter of a model belongs to exactly one part. Parts are found by walking the model's modules, never
by looking for a word in a parameter's name.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from mm_interleaved.errors import UsageError
from mm_interleaved.models.adapter import DeformableAttention
from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.language import TextHead
from mm_interleaved.models.synchronizer import FeatureSynchronizer
from mm_interleaved.models.unet import MapSynchronizer
from mm_interleaved.training.config import PartConfig, PartsConfig
from mm_interleaved.training.optimizer import ParameterRule

PART_NAMES = tuple(part.name for part in fields(PartsConfig))


class LinearProbe(nn.Linear):
    """A linear layer that learns beside the model to guess something out of its features, and is thrown away:
    what it can guess, the features hold in a form that other linear layers can use.
    """


def parameters_by_part(
    model: MMInterleavedForConditionalGeneration,
) -> dict[str, dict[str, nn.Parameter]]:
    """All parameters by part and by their name in the model; each stands in one part."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PART_NAMES}
    for part, parameters in _in_order(model):
        for parameter in parameters:
            # A parameter belongs to the first part that has it.
            if parameter in names:
                parts[part][names.pop(parameter)] = parameter
    assert not names, f"parameters of no part: {list(names.values())[:3]}"
    return parts


def choose_trained(model: MMInterleavedForConditionalGeneration, config: PartsConfig) -> dict[str, Any]:
    """Lets the chosen parts require gradients, and nothing else.

    Returns:
        The rule of each trained parameter, by its name in the model.

    Raises:
        UsageError: nothing would be trained.
    """
    model.requires_grad_(False)
    rules: dict[str, ParameterRule] = {}
    for part, parameters in parameters_by_part(model).items():
        how: PartConfig = getattr(config, part)
        if not how.train:
            continue
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            rules[name] = ParameterRule(part, how.learning_rate, how.weight_decay)
    if not rules:
        raise UsageError("parts: none is trained, expected at least one with train=true that the model has")
    return rules


def synchronizer_rules(parts: Mapping[str, nn.Module], learning_rate: float) -> dict[str, ParameterRule]:
    """A learning rate for all synchronizers among a stage's trained parts, by the parameters' names there."""
    return {
        f"{place}.{name}": ParameterRule("synchronizers", learning_rate)
        for part, module in parts.items()
        for place, layer in module.named_modules(prefix=part)
        if isinstance(layer, FeatureSynchronizer | GatedSynchronizer)
        for name, _ in layer.named_parameters()
    }


def inner_matrices(parts: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of the weights, among a stage's trained parts, that Muon is made for: those of linear layers and
    convolutions inside the networks.

    Layers between a network and what goes in or comes out of it are better off with AdamW (Jordan et al.,
    2024), and so are synchronizers, whose layers say where to sample.
    """
    outer = {layer for module in parts.values() for layer in _outer_layers(module)}
    return frozenset(
        f"{name}.weight"
        for part, module in parts.items()
        for name, layer in module.named_modules(prefix=part)
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer not in outer
    )


def _outer_layers(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if isinstance(part, UNet2DConditionModel | Encoder | Decoder):
            yield from (part.conv_in, part.conv_out)
        elif isinstance(part, CLIPVisionEmbeddings):
            yield part.patch_embedding
        elif isinstance(part, TextHead | FeatureSynchronizer | MapSynchronizer | LinearProbe):
            yield from part.modules()


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold; those of a sharded parameter are counted over all ranks."""
    return sum(parameter.numel() for parameter in parameters)


def _in_order(
    model: MMInterleavedForConditionalGeneration,
) -> Iterator[tuple[str, Iterable[nn.Parameter]]]:
    """(part, parameters): small parts first, then those that contain them."""
    yield "lora", _low_rank_parameters(model)
    for module in model.modules():
        if isinstance(module, FeatureSynchronizer | DeformableAttention):
            yield "offsets", module.sampling_offsets.parameters()
        elif isinstance(module, GatedSynchronizer):
            yield "gates", (module.gate,)
    for index in model.language_model.synchronized_layers:
        yield "text_synchronizers", model.language_model.layers[index].synchronizer.parameters()
    yield "vision", model.vision.clip.parameters()
    yield "adapter", model.vision.adapter.parameters()
    yield "slot_resampler", model.vision.parameters()
    yield "language", model.language_model.parameters()
    yield "new_tokens", (*model.text_head.new.parameters(), model.image_start_embedding)
    yield "text_head", model.text_head.parameters()
    decoder = model.image_decoder
    if decoder is None:
        return
    if decoder.synchronizers is not None:
        yield "image_synchronizers", decoder.synchronizers.parameters()
    yield "unet", decoder.unet.parameters()
    yield "vae", decoder.vae.parameters()
    yield "conditioning_resampler", (*decoder.resampler.parameters(), *model.context_projection.parameters())
    yield "conditioning_resampler", (decoder.negative_conditioning,)


def _low_rank_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of PEFT's additions; none where nothing was added (then PEFT need not be there either)."""
    for module in model.modules():
        additions: Mapping[str, nn.Module] = getattr(module, "lora_A", None) or {}
        if additions:
            yield from module.lora_A.parameters()
            yield from module.lora_B.parameters()
