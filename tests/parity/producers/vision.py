"""`vt.*`: the image tokenizer over all images of the training pass; most outputs show the first image."""

from typing import Any

from golden import Golden, shared
from torch import Tensor

from .recording import recorded


@shared
def vision_pass(golden: Golden) -> dict[str, Any]:
    """What passes through the tower's parts; its own output as `features`."""
    tower = golden.model.vision
    parts = {
        "pre_norm": tower.clip.pre_norm,
        "spatial_prior": tower.adapter.spatial_prior,
        "resampler": tower.resampler,
    }
    for i, interaction in enumerate(tower.adapter.interactions):
        parts |= {f"injector{i}": interaction.injector, f"interaction{i}": interaction}
    with recorded(**parts) as record:
        features = tower(golden.inputs["forward.image_tensors_u8"].float() / 255)
    return record | {"features": features}


def slots(golden: Golden) -> Tensor:
    return vision_pass(golden)["features"].slots


def level(golden: Golden, index: str) -> Tensor:
    return vision_pass(golden)["features"].pyramid[int(index)][:1]


def last_tokens(golden: Golden) -> Tensor:
    """Class token and patches."""
    interactions = golden.model.vision.adapter.interactions
    return vision_pass(golden)[f"interaction{len(interactions) - 1}"][0][:1]


def patches_in_their_places(golden: Golden) -> Tensor:
    return last_tokens(golden)[:, 1:] + golden.model.vision.position_table[1:]


def normed_tokens(golden: Golden) -> Tensor:
    return vision_pass(golden)["pre_norm"][:1]


def resampled(golden: Golden) -> Tensor:
    return vision_pass(golden)["resampler"]


def spatial_prior(golden: Golden, number: str) -> Tensor:
    """One of its maps, counted from 1, as tokens."""
    return vision_pass(golden)["spatial_prior"][int(number) - 1][:1].flatten(2).transpose(1, 2)


def injected(golden: Golden, index: str) -> Tensor:
    return vision_pass(golden)[f"injector{index}"][:1]


def interaction(golden: Golden, index: str, part: str) -> Tensor:
    tokens, cells = vision_pass(golden)[f"interaction{index}"]
    return {"x": tokens[:1, 1:], "cls": tokens[:1, :1], "c": cells[:1]}[part]


OUTPUTS = {
    r"vt\.vis_embed": slots,
    r"vt\.image_embeds": patches_in_their_places,
    r"vt\.multiscale_features\.(\d+)": level,
    r"vt\.debug\.pre_layrnorm": normed_tokens,
    r"vt\.debug\.encoder_last_hidden_state": last_tokens,
    r"vt\.debug\.perceiver_out": resampled,
    r"vt\.debug\.spm_c(\d+)": spatial_prior,
    r"vt\.debug\.injector(\d+)_out": injected,
    r"vt\.debug\.interaction(\d+)_(x|cls|c)": interaction,
}
