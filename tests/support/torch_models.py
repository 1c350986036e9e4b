"""Small models of torch, with which parity tests compare."""

from typing import Any

TEXT = {
    "vocab_size": 64,
    "d_model": 24,
    "d_kv": 4,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "gated-gelu",
}
"""Settings of a T5 or UMT5 encoder."""


def randomize(torch: Any, model: Any, seed: int) -> Any:
    """Add noise to all parameters, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
