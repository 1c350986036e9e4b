"""A denoiser with random parameters, and requests for it."""

from dit_video.diffusion import RectifiedFlow, Velocity
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.nn import get_graph_def
from dit_video.sampling import Denoiser, Sampling, SamplingRequest, draw_initial_noise
from dit_video.tokens import Grid, PackedShape
from support.random_params import make_random_params

TEXT = ByteEncoderConfig(width=8, layers=1, heads=1, max_tokens=32)
DIT = DiTConfig(channels=2, context_width=8, patch=Grid(1, 2, 2), width=12, layers=1, heads=1, mlp_ratio=2.0)
SHAPE = PackedShape(tokens=16, text=20, segments=3)
SAMPLING = Sampling(steps=2, guidance=2.0)

DENOISER = Denoiser(
    backbone=get_graph_def(DIT.make),
    text=get_graph_def(TEXT.make),
    params={"backbone": make_random_params(DIT.make), "text": make_random_params(TEXT.make)},
    tokenizer=TEXT.make_tokenizer(),
    process=RectifiedFlow(shift=2.0),
    patch=DIT.patch,
    prediction=Velocity(),
    token_dt=1.0,
    token_lead=0.0,
)


def make_request(prompt: str, latents: tuple[int, int, int] = (2, 4, 4), *, seed: int = 0, negative: str = ""):
    """Make a request with the noise of a seed."""
    return SamplingRequest(prompt, negative, draw_initial_noise(seed, Grid(*latents), 2))


SMALL = make_request("dot", (1, 2, 4), seed=1)
