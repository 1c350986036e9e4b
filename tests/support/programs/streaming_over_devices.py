"""Compare streams whose height is sharded over eight devices with streams on one device."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.distributed import Parallelism, make_mesh
from dit_video.models.autoencoders import decode_stream, encode_stream, streaming
from support.random_params import make_random_params
from support.tiny_autoencoders import CONFIGS, assert_frames_are_close


def join_chunks(chunks) -> np.ndarray:
    """Concatenate the chunks of a stream."""
    return np.concatenate(list(chunks), axis=1)


def main() -> None:
    """Check both kinds of autoencoders."""
    assert jax.device_count() == 8
    rows = NamedSharding(make_mesh(Parallelism(data=1, context=8)), PartitionSpec(None, None, "context"))
    clip = np.random.default_rng(1).integers(0, 256, (1, 5, 64, 16, 3), np.uint8)
    for config in (CONFIGS["patches"], CONFIGS["levels"]):
        params = make_random_params(config.make)
        latents = join_chunks(encode_stream(config, params, [clip]))
        sharded_latents = join_chunks(encode_stream(config, params, [clip], sharding=rows))
        np.testing.assert_allclose(sharded_latents, latents, atol=1e-5)
        frames = join_chunks(decode_stream(config, params, [latents]))
        assert_frames_are_close(join_chunks(decode_stream(config, params, [latents], sharding=rows)), frames)
        # Devices exchange the rows at their borders, and none has the whole picture at full resolution.
        chunk = jax.device_put(latents[:, :1], rows)
        text = streaming._jit_method(config, "decode").lower(params, chunk, None).compile().as_text()
        assert "collective-permute" in text
        gathered = [line for line in text.splitlines() if "all-gather(" in line]
        assert not any("64,16" in line.split(" all-gather(")[0] for line in gathered), gathered
    print("done")


if __name__ == "__main__":
    main()
