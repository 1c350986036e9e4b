"""Conversion of latents into tokens, which are spacetime patches, and back, in NumPy or JAX."""

from einops import rearrange
from jaxtyping import Float

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid
from dit_video.core.typing import SameArray

_LATENT_AXES, _TOKEN_AXES = "... (t pt) (h ph) (w pw) c", "... (t h w) (pt ph pw c)"


def compute_token_grid(latents: Grid, patch: Grid) -> Grid:
    """Return the number of patches along each axis for latents of this size.

    Raises:
      UserError: If the patch does not divide the latents.
    """
    if latents.t % patch.t or latents.h % patch.h or latents.w % patch.w:
        raise UserError(
            f"latents of {latents} are not divisible by the patch {patch}; use a clip size whose latents are multiples "
            "of the patch"
        )
    return Grid(latents.t // patch.t, latents.h // patch.h, latents.w // patch.w)


def patchify(latents: Float[SameArray, "*batch t h w c"], patch: Grid) -> Float[SameArray, "*batch n p"]:
    """Cut latents into `n` tokens in (t, h, w) order, each of `p = patch volume * c` values in (t, h, w, c) order.

    Raises:
      UserError: If the patch does not divide the latents.
    """
    compute_token_grid(Grid(*latents.shape[-4:-1]), patch)
    return rearrange(latents, f"{_LATENT_AXES} -> {_TOKEN_AXES}", pt=patch.t, ph=patch.h, pw=patch.w)


def unpatchify(tokens: Float[SameArray, "*batch n p"], grid: Grid, patch: Grid) -> Float[SameArray, "*batch t h w c"]:
    """Invert `patchify`; `grid` is the token grid."""
    sizes = {"t": grid.t, "h": grid.h, "w": grid.w, "pt": patch.t, "ph": patch.h, "pw": patch.w}
    return rearrange(tokens, f"{_TOKEN_AXES} -> {_LATENT_AXES}", **sizes)
