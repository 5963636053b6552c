"""Fixed sine-cosine position tables and their resizing.

Letters: D channels, G cells along one side of a grid, T positions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos_1d_table(
    num_positions: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(T, D) table: half of the channels sines, half cosines, of position / 10000^(2i / D)."""
    return _sincos(torch.arange(num_positions, device=device, dtype=torch.float64), dim).to(dtype)


def sincos_2d_table(grid_size: int, dim: int) -> Tensor:
    """(G * G, D) float32 table in row-major order: first half of the channels for y, second half for x."""
    axis = torch.arange(grid_size, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.cat([_sincos(y.reshape(-1), dim // 2), _sincos(x.reshape(-1), dim // 2)], dim=1).float()


def resize_grid_table(table_gD: Tensor, size: tuple[int, int]) -> Tensor:
    """A square grid's table, resized bicubically to (height, width) cells; unchanged if it fits.

    Args:
        table_gD: (G * G, D), row-major.

    Returns:
        (height * width, D).
    """
    side = round(table_gD.shape[0] ** 0.5)
    if size == (side, side):
        return table_gD
    map_1Dyx = table_gD.T.reshape(1, -1, side, side)
    # Half precision has no bicubic kernel on every device, and the table is a constant: resize in float32.
    resized = F.interpolate(map_1Dyx.float(), size=size, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.to(table_gD.dtype)


def pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """(x, y) in [0, 1] of all pixels of a map, row by row: (1, height * width, 2), in float32, or in float64
    if `like` is.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    y = (torch.arange(height, device=like.device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=dtype) + 0.5) / width
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x.reshape(-1), grid_y.reshape(-1)], dim=-1)[None]


def _sincos(position_T: Tensor, dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"a sine-cosine table needs an even number of channels per axis, found {dim}")
    rate = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=position_T.device) / (dim / 2))
    angle = position_T[:, None] * rate[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
