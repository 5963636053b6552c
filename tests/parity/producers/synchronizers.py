"""`mmfs_llm.*` and `mmfs_sd.*`: the synchronizers alone, on given queries and features."""

from typing import Any

from golden import Golden
from torch import Tensor

from mm_interleaved.models.image_values import flatten_pyramid
from mm_interleaved.models.synchronizer import plan_of
from mm_interleaved.tokens.visibility import relative_image_index

STORED_PER_UNIT = 32
"""The folder stores features as 8-bit integers, so many of them a unit."""


def language_synchronizer(golden: Golden, case: str, layer: str, part: str) -> Tensor:
    query = golden.inputs[f"mmfs_llm.{case}.query"]
    cells = golden.inputs[f"mmfs_llm.{case}.features_i8"].float() / STORED_PER_UNIT
    visible = _visible(golden, case, query)
    level_sizes = tuple(golden.config["model"]["spatial_shapes"])
    gated: Any = golden.model.language_model.layers[int(layer)].synchronizer
    core = gated.synchronizer
    if part == "cross_attn_out":
        return gated(query, gated.project_cells(cells, level_sizes), visible)
    if part == "mmfs_core_out":
        return core(query, core.project_cells(cells, level_sizes), visible)
    plan = plan_of(core, query, visible)
    return {"debug.sampling_locations": plan.location, "debug.point_weights": plan.weight}[part]


def _visible(golden: Golden, case: str, query: Tensor) -> Tensor:
    """(B, Lq, N); the official code takes the last row of a mask of another length than the queries'."""
    visible = golden.inputs[f"mmfs_llm.{case}.mask"].bool()
    if visible.shape[1] != query.shape[1]:
        visible = visible[:, -1:].expand(-1, query.shape[1], -1)
    return visible


def map_synchronizer(golden: Golden, case: str) -> Tensor:
    synchronizers = golden.model.image_decoder.synchronizers
    number = golden.arguments(f"mmfs_sd.{case}")["block"]
    block = synchronizers.middle if number == "mid" else synchronizers.skips[int(number)]
    names = sorted(name for name in golden.inputs if name.startswith("mmfs_sd.pool_i8."))
    index = golden.inputs[f"mmfs_sd.{case}.image_index"]
    pool = [golden.inputs[name][index].float() / STORED_PER_UNIT for name in names]
    visible = golden.inputs[f"mmfs_sd.{case}.mask"].bool()
    values = block.project_cells(*flatten_pyramid(pool))
    return block(golden.inputs[f"mmfs_sd.{case}.sample"], values, relative_image_index(visible))


OUTPUTS = {
    r"mmfs_llm\.([^.]+)\.layer(\d+)\.(mmfs_core_out|cross_attn_out|debug\.\w+)": language_synchronizer,
    r"mmfs_sd\.([^.]+)\.block_out": map_synchronizer,
}
