"""First weights of a model that starts from nothing, where those of its parts are meant for pretrained
neighbours.
"""

import torch
from torch import nn

from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration


@torch.no_grad()
def open_to_images(model: MMInterleavedForConditionalGeneration) -> None:
    """Gives the outputs of a new model's resamplers and synchronizers their full size from the first step.

    These start such that they do not disturb pretrained neighbours: small weights, small slots, closed gates.
    A model that starts from nothing has nothing to protect; with that start, slots differed by 0.02 % from
    image to image after 400 steps.
    """
    nn.init.normal_(model.vision.slot_projection.weight, std=model.vision.slot_projection.in_features**-0.5)
    for index in model.language_model.synchronized_layers:
        model.language_model.layers[index].synchronizer.gate.fill_(0.5)
    resamplers = [model.vision.resampler]
    if model.image_decoder is not None:
        resamplers.append(model.image_decoder.resampler)
    for resampler in resamplers:
        for module in resampler.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)


@torch.no_grad()
def open_to_learning(model: MMInterleavedForConditionalGeneration) -> None:
    """First weights for a language model that starts from nothing.

    transformers' deviation of 0.02 is meant for widths of thousands: at a width of 192 attention starts
    almost uniform and stays so for long. Here each layer's outputs start about as large as its inputs, and
    each block adds a third of that.
    """
    language_model = model.language_model
    nn.init.normal_(language_model.embed_tokens.weight, std=0.5)
    for layer in language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in block.named_children():
                if isinstance(linear, nn.Linear):
                    scale = 0.3 if name in ("o_proj", "down_proj") else 1.0
                    nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
