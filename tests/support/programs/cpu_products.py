"""Compile a convolution and a product on CPU with the XLA flags that the package sets, which keep YNNPACK out."""

import jax
import jax.numpy as jnp

from dit_video.core.platform.xla_flags import CPU_FLAGS, get_release

picture, kernel = jnp.ones((1, 64, 64, 16)), jnp.ones((3, 3, 16, 16))


@jax.jit
def compute(picture, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    convolved = jax.lax.conv_general_dilated(picture, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return convolved, picture.reshape(4096, 16) @ kernel[0, 0]


compiled = compute.lower(picture, kernel).compile()
if CPU_FLAGS[get_release("jaxlib")]:
    assert "ynn" not in compiled.as_text(), compiled.as_text()
convolved, product = compiled(picture, kernel)
assert (float(convolved[0, 4, 4, 0]), float(product[0, 0])) == (144, 16)
