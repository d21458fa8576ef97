"""patch_rotate: multiply every patch of a latent by an orthogonal matrix."""

from torch import Tensor


def patch_rotate(x: Tensor, q: Tensor, p: int) -> Tensor:
    """Replace every patch vector v of ``x``, ordered (channel, row, column), by ``q @ v``.

    Args:
        x: Latents, [B, C, H, W]; H and W are multiples of ``p``.
        q: Matrices of D = C p p rows and columns, same dtype and device as ``x``: [D, D] shared by
            all, [B, D, D] one per image, or [B, Gh, Gw, D, D] one per tile, where the H/p x W/p
            patches of an image are cut into Gh x Gw equal tiles.
        p: Patch side, in latent pixels.

    Returns:
        Rotated latents, [B, C, H, W], in the dtype of ``x``.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not agree.
    """
    return reference(x, q, p)


def reference(x: Tensor, q: Tensor, p: int) -> Tensor:
    """Plain-torch definition of ``patch_rotate``."""
    tiles = tile_grid(q)
    return fold(unfold(x, p, tiles) @ q.mT.reshape(*(q.shape[:1] if q.dim() > 2 else (1,)), *tiles, *q.shape[-2:]), x.shape, p)


def tile_grid(q: Tensor) -> tuple[int, int]:
    """Number of tiles (Gh, Gw) that have a matrix of their own in ``q``."""
    return (q.shape[1], q.shape[2]) if q.dim() == 5 else (1, 1)


def unfold(x: Tensor, p: int, tiles: tuple[int, int] = (1, 1)) -> Tensor:
    """Cut [B, C, H, W] into the patches of each tile, [B, Gh, Gw, N / (Gh Gw), D]."""
    B, C, H, W = x.shape
    Gh, Gw = tiles
    h, w = H // p // Gh, W // p // Gw
    patches = x.reshape(B, C, Gh, h, p, Gw, w, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return patches.reshape(B, Gh, Gw, h * w, C * p * p)


def fold(patches: Tensor, shape: tuple[int, ...], p: int) -> Tensor:
    """Inverse of ``unfold``: [B, Gh, Gw, N / (Gh Gw), D] to [B, C, H, W] = ``shape``."""
    B, C, H, W = shape
    Gh, Gw = patches.shape[1:3]
    x = patches.reshape(B, Gh, Gw, H // p // Gh, W // p // Gw, C, p, p)
    return x.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(B, C, H, W)
