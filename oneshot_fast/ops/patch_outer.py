"""patch_outer: sums of outer products of patches, the gradient of patch_rotate in its matrix."""

from collections.abc import Sequence

from torch import Tensor

from oneshot_fast.ops.patch_rotate import unfold


def patch_outer(a: Tensor, b: Tensor, p: int, like: Tensor | Sequence[int] = ()) -> Tensor:
    """Sum a_n b_n^T over the patches n that share one matrix of ``like``.

    With a = b this is the patch covariance times the number of patches.

    Args:
        a: Latents, [B, C, H, W]; H and W are multiples of ``p``.
        b: Latents of the same shape, dtype and device as ``a``.
        p: Patch side, in latent pixels.
        like: The ``q`` of ``patch_rotate``, or its leading shape: () for one sum over all patches,
            (B,) for one per image, (B, Gh, Gw) for one per tile.

    Returns:
        Sums, [*leading, D, D] with D = C p p, in the dtype of ``a``.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not agree.
    """
    return reference(a, b, p, list(like.shape[:-2] if isinstance(like, Tensor) else like))


def reference(a: Tensor, b: Tensor, p: int, leading: Sequence[int]) -> Tensor:
    """Plain-torch definition of ``patch_outer``."""
    tiles = (leading[1], leading[2]) if len(leading) == 3 else (1, 1)
    u, v = unfold(a, p, tiles), unfold(b, p, tiles)
    D = u.shape[-1]
    if not leading:
        return u.reshape(-1, D).mT @ v.reshape(-1, D)
    return (u.mT @ v).reshape(*leading, D, D)
