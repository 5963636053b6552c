"""Every tensor of the golden folder, compared within the folder's own tolerances."""

import torch
from producers import PRODUCERS


def test_output_equals_the_official_one(golden, output_key):
    expected = golden.outputs[output_key]
    actual = golden.ours(output_key, PRODUCERS)
    assert actual is not None, f"nothing of ours produces {output_key}"
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"shape {tuple(actual.shape)}, golden {tuple(expected.shape)}"
    )

    tolerance = golden.tolerances[output_key]
    actual, expected = actual.double(), expected.double()
    valid = golden.valid(output_key)
    if valid is not None:
        # (B, L, ...) or (layers, B, L, ...): padding is not compared.
        index = (
            (..., valid)
            if expected.dim() == 2
            else ((slice(None), valid) if expected.dim() == 4 else (valid,))
        )
        actual, expected = actual[index], expected[index]
    allowed = 1 if output_key.split(".")[-1].startswith("image_u8") else tolerance.get("suggested_atol", 0)
    difference = (actual - expected).abs()
    assert torch.isfinite(actual[torch.isfinite(expected)]).all(), "not finite"
    worst = difference.max() if difference.numel() else torch.tensor(0.0)
    assert worst <= allowed, (
        f"largest difference {worst:.3g} (allowed {allowed:.3g}) at {divmod_index(difference)}; "
        f"golden's largest value {expected.abs().max():.3g}"
    )
    golden.compared.add(output_key)


def divmod_index(difference) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
