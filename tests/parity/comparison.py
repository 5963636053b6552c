"""How far our output may be from the official one, and where they are compared at all."""

import torch
from golden import Golden
from torch import Tensor

BY_POSITION = {
    "forward.mm_embeds": 0,
    "forward.cross_attention_mask": 0,
    "forward.mm_hidden_state": 0,
    "forward.text_logits": 0,
    "forward.llm_hidden_states": 1,
}
"""Outputs with an axis of rows, here its number, followed by one of positions."""
PIXEL_LEVELS = 1
"""8-bit images may differ by one level."""


def assert_equal(golden: Golden, key: str, ours: Tensor) -> None:
    """Within the folder's tolerance, wherever the two are compared.

    Raises:
        AssertionError: they differ; how much and where.
    """
    official = golden.outputs[key]
    assert ours.shape == official.shape, f"shape {tuple(ours.shape)}, golden {tuple(official.shape)}"
    compared = compared_elements(golden, key)
    difference = (ours.double() - official.double()).abs().masked_fill(~compared, 0)
    is_wild = ~difference.isfinite()
    assert not is_wild.any(), f"not finite at {_place(is_wild.int())}{golden.what_is_missing}"
    allowed = tolerance(golden, key)
    worst = difference.max() if difference.numel() else torch.tensor(0.0)
    assert worst <= allowed, (
        f"largest difference {worst:.3g} (allowed {allowed:.3g}) at {_place(difference)}; "
        f"golden's largest value {official.abs().max():.3g}{golden.what_is_missing}"
    )


def tolerance(golden: Golden, key: str) -> float:
    """Largest difference allowed.

    Raises:
        LookupError: the folder does not say.
    """
    if key not in golden.tolerances:
        raise LookupError(f"tolerances.json: no field {key!r}")
    if key.split(".")[-1].startswith("image_u8"):
        return PIXEL_LEVELS
    return 0 if golden.tolerances[key].get("exact") else golden.tolerances[key]["suggested_atol"]


def compared_elements(golden: Golden, key: str) -> Tensor:
    """Bool, of the output's shape: padding, and what a row says after its end, are left out."""
    official = golden.outputs[key]
    if key in BY_POSITION:
        return _along(official, BY_POSITION[key], golden.inputs["forward.attention_mask"].bool())
    if key.startswith("gen_text.") and key.endswith(".step_logits"):
        ids = golden.outputs[key.replace(".step_logits", ".text_ids")]
        return _along(official, 0, steps_before_end(ids, official.shape[0], _stop_ids(golden)))
    return torch.ones(official.shape, dtype=torch.bool)


def _along(official: Tensor, axis: int, mask: Tensor) -> Tensor:
    """A mask over two axes, the first of them `axis`, for all others alike."""
    shape = (1,) * axis + mask.shape + (1,) * (official.dim() - axis - mask.dim())
    return mask.view(shape).expand(official.shape)


def _stop_ids(golden: Golden) -> tuple[int, int]:
    return golden.tokens["eos_token_id"], golden.tokens["soi_token_id"]


def steps_before_end(ids: Tensor, num_steps: int, stop_ids: tuple[int, ...]) -> Tensor:
    """Steps that a row took part in: up to the one that ended it. After that it is fed padding.

    Args:
        ids: (B, 1 + num_steps), the bos that decoding starts with, then a token a step.

    Returns:
        (num_steps, B) bool.
    """
    is_stop = torch.isin(ids[:, 1 : 1 + num_steps], torch.tensor(stop_ids)).long()
    stops_before = is_stop.cumsum(dim=1) - is_stop
    return (stops_before == 0).T


def _place(size: Tensor) -> tuple[int, ...]:
    """Where the largest element stands."""
    return tuple(int(i) for i in torch.unravel_index(size.argmax(), size.shape))
