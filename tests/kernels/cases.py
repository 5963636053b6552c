"""Arguments of the synchronizer's operator, and what an implementation makes of them."""

import torch

from mm_interleaved.ops import multi_image_deformable_attention
from mm_interleaved.tokens.visibility import relative_image_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On a CPU the kernels are interpreted, see tests/conftest.py."""
LEAVES = ("value_BNSHD", "query_term_BQHE", "index_term_KHE", "reference_BQ2", "ignore_HD")


def case(
    visible_BQN,
    *,
    levels=(4, 2),
    heads=2,
    channels=3,
    points=2,
    base_size=4.0,
    reference_queries=1,
    dtype=torch.float64,
    value_dtype=None,
    seed=0,
):
    """Random arguments; points lie up to a few cells of the coarsest map away, some beyond its border."""
    visible_BQN = visible_BQN.to(DEVICE)
    B, Q, N = visible_BQN.shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    S, E = sum(size * size for size in levels), 2 * points + len(levels) * points

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=DEVICE).to(dtype)

    reference = 0.5 + 0.3 * normal(1, reference_queries, 2)
    return {
        "value_BNSHD": normal(B, N, S, heads, channels, dtype=value_dtype or dtype),
        "query_term_BQHE": 1.5 * normal(B, Q, heads, E),
        "index_term_KHE": normal(N + 2, heads, E),
        "relative_index_BQN": relative_image_index(visible_BQN),
        "reference_BQ2": reference,
        "level_sizes": levels,
        "num_points": points,
        "base_size": base_size,
        "ignore_HD": normal(heads, channels, dtype=value_dtype or dtype),
    }


def outcome(arguments, implementation, leaf_names=LEAVES):
    """The result and all gradients of a weighted sum of it, by name."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in leaf_names}
    out = multi_image_deformable_attention(**{**arguments, **leaves}, implementation=implementation)
    generator = torch.Generator(out.device).manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64, device=out.device)
    gradients = torch.autograd.grad((out.double() * weight).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaf_names, gradients, strict=True))}


def in_float64(arguments):
    """The same numbers in double precision."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def assert_equal(actual, expected, tolerance):
    """Every tensor to within `tolerance` of the greatest number in it."""
    for name, want in expected.items():
        greatest = max(1.0, float(want.abs().max()))
        difference = float((actual[name].to(want.dtype) - want).abs().max())
        assert difference <= tolerance * greatest, f"{name}: differs by {difference:.3g} of {greatest:.3g}"


def causal(num_queries, starts, documents=None):
    """(1, Q, N): each query sees the images that began before it, in its own document."""
    query = torch.arange(num_queries)[:, None]
    start = torch.tensor(starts)[None]
    visible = start < query
    if documents is not None:
        visible = visible & (torch.tensor(documents)[:, None] == torch.tensor(documents)[None, starts])
    return visible[None]
