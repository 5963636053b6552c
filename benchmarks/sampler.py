"""The sampling alone, softmax included: every implementation that runs here, forward, backward, and both.

Two cases: language queries, which all sample around one point (their gradients collide), and the U-Net's
pixels, each at its own place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cost import Cost, sampling_bytes, sampling_flops
from benchmarks.deformops_sampler import deformops_attention, has_deformops
from benchmarks.harness import HALF, Case, Comparison, Setting, compare, compiled
from benchmarks.machine import rates
from benchmarks.sizes import LANGUAGE, SynchronizerSize, causal_visibility, unet_map
from benchmarks.train_mmfs import GRADIENT_TOLERANCE
from mm_interleaved.ops import IMPLEMENTATIONS, multi_image_deformable_attention
from mm_interleaved.tokens.visibility import relative_image_index


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of `multi_image_deformable_attention`."""

    value: Tensor
    query_term: Tensor
    index_term: Tensor
    relative_index: Tensor
    reference: Tensor
    size: SynchronizerSize

    def attend(self, implementation: str) -> Tensor:
        return multi_image_deformable_attention(
            self.value,
            self.query_term,
            self.index_term,
            self.relative_index,
            self.reference,
            self.size.level_sizes,
            num_points=self.size.num_points,
            base_size=self.size.base_size,
            implementation=implementation,
        )


def run(setting: Setting) -> Iterator[Case]:
    if setting.quick:
        language, grids = ((1, 8), (128, 4)), (16,)
    elif setting.is_gpu:
        language, grids = ((1, 8), (512, 8), (2048, 8), (2048, 30)), (64, 32, 16, 8)
    else:
        language, grids = ((1, 8), (512, 8)), (32, 16)
    for queries, images in language:
        inputs = language_inputs(setting, queries, images)
        yield from both_ways(setting, "language", inputs, queries=queries, images=images)
    for grid in grids:
        yield from both_ways(setting, "unet", unet_inputs(setting, grid), queries=grid * grid, images=1)


def language_inputs(setting: Setting, queries: int, images: int, size: SynchronizerSize = LANGUAGE) -> Inputs:
    """One query sees all images; many see them causally."""
    visible = (
        torch.ones(1, 1, images, dtype=torch.bool, device=setting.device)
        if queries == 1
        else causal_visibility(queries, images, setting.device)
    )
    return _inputs(setting, size, visible, torch.full((1, 1, 2), 0.5, device=setting.device))


def unet_inputs(setting: Setting, grid: int, size: SynchronizerSize | None = None) -> Inputs:
    """The pixels of a square map attend to one image, each around its own place."""
    side = (torch.arange(grid, device=setting.device) + 0.5) / grid
    centre = torch.stack([side.repeat(grid), side.repeat_interleave(grid)], dim=-1)[None]
    visible = torch.ones(1, grid * grid, 1, dtype=torch.bool, device=setting.device)
    return _inputs(setting, size or unet_map(320, grid), visible, centre)


def both_ways(setting: Setting, kind: str, inputs: Inputs, *, queries: int, images: int) -> Iterator[Case]:
    """Forward alone, backward alone, then both."""
    attends: dict[str, Callable[[Inputs], Tensor]] = {
        name: lambda given, name=name: given.attend(name) for name in implementations(setting)
    }
    if setting.is_gpu and has_deformops():
        attends["deformops"] = lambda given: deformops_attention(
            given.value, given.query_term, given.index_term, given.relative_index, given.reference,
            given.size.level_sizes, num_points=given.size.num_points, base_size=given.size.base_size,
        )  # fmt: skip
    if setting.compiles and (queries > 1 or kind == "unet"):
        attends["reference, compiled"] = compiled(attends["reference"])
    pairs = int((inputs.relative_index > 0).sum())
    sizes = {"kind": kind, "queries": queries, "images": images, "pairs": pairs}
    widths = inputs.value.element_size(), inputs.query_term.element_size()
    flops = sampling_flops(inputs.size, pairs)
    moved = sampling_bytes(inputs.size, queries, pairs, images, *widths)

    def with_costs(result: Comparison, passes: str, times_flops: int, times_bytes: int) -> Case:
        """Beside what it costs: the backward pass samples again, and adds to what it read, which is both
        read and written."""
        costs = Cost(times_flops * flops, times_bytes * moved)
        rate = rates(setting.device, setting.dtype)
        limit = costs.seconds(rate.flops_a_second, rate.bytes_a_second)
        case = {**sizes, "pass": passes, **_record(result)}
        case |= {"flops": {"each": costs.flops}, "bytes": {"each": costs.bytes}}
        return case | ({"share_of_limit": limit / result.median[case["fastest"]]} if result.equal else {})

    with torch.inference_mode():
        forward = compare(setting, {name: lambda f=f: f(inputs) for name, f in attends.items()})
        if setting.dtype in HALF:
            forward = _ours_within(forward, 2e-2)
    yield with_costs(forward, "forward", 1, 1)

    leaves = (inputs.value, inputs.query_term, inputs.index_term)
    trained = Inputs(
        *(leaf.detach().clone().requires_grad_() for leaf in leaves),
        inputs.relative_index, inputs.reference, inputs.size,
    )  # fmt: skip
    wanted = (trained.value, trained.query_term, trained.index_term)
    outward = torch.randn_like(inputs.attend("reference"))

    def step(attend: Callable[[Inputs], Tensor]) -> tuple[Tensor, ...]:
        out = attend(trained)
        return out.detach(), *torch.autograd.grad(out, wanted, outward)

    tolerance = 5e-2 if setting.dtype in HALF else GRADIENT_TOLERANCE[setting.dtype]
    # What each forward pass keeps lives until here.
    kept = {name: attend(trained) for name, attend in attends.items()}
    backward = compare(
        setting,
        {
            name: lambda out=out: torch.autograd.grad(out, wanted, outward, retain_graph=True)
            for name, out in kept.items()
        },
        tolerance=tolerance,
        measure="norm",
    )
    yield with_costs(backward, "backward", 2, 3)
    del kept
    both = compare(
        setting,
        {name: lambda f=f: step(f) for name, f in attends.items()},
        tolerance=tolerance,
        measure="norm",
    )
    yield with_costs(both, "forward+backward", 3, 4)


def implementations(setting: Setting) -> list[str]:
    """Names of the implementations that can run here, the readable reference first."""
    others = sorted(IMPLEMENTATIONS.keys() - {"reference", *([] if setting.is_gpu else ["triton"])})
    return ["reference", *others]


def _ours_within(result: Comparison, limit: float) -> Comparison:
    """A stricter limit for ours alone: deformops rounds places, too, to the precision of the values."""
    ours = [error for name, error in result.error.items() if name != "deformops"]
    return result if max(ours) <= limit else replace(result, equal=False, median={})


def _record(result: Comparison) -> Case:
    """The ratio is that of the fastest to the reference; `ratios` has all."""
    if not result.equal:
        return result.record("reference")
    ours = sorted(IMPLEMENTATIONS.keys() - {"reference"})
    names = [name for name in result.median if name in ours]
    best = min(names, key=lambda name: result.median[name])
    ratios = {name: result.ratio(name) for name in result.median}
    record = {"fastest": best, **result.record(best), "ratios": ratios}
    if "deformops" in result.median:
        record["ratio_to_deformops"] = result.ratio(best, "deformops")
    return record


def _inputs(setting: Setting, size: SynchronizerSize, visible: Tensor, reference: Tensor) -> Inputs:
    generator = torch.Generator(setting.device).manual_seed(0)
    # Places and weights stay in single precision or better, whatever the values are.
    exact = torch.promote_types(setting.dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=setting.device).to(exact)

    _, queries, images = visible.shape
    heads, terms = size.num_heads, size.terms // size.num_heads
    spread = torch.ones(terms, device=setting.device)
    spread[: 2 * size.num_points] = 2.0
    return Inputs(
        value=normal(1, images, size.cells, heads, size.head_dim).to(setting.dtype),
        query_term=normal(1, queries, heads, terms) * spread,
        index_term=normal(size.max_images, heads, terms) * 0.3,
        relative_index=relative_image_index(visible),
        reference=reference.to(exact),
        size=size,
    )
