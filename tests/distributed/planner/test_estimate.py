import dataclasses

from dit_video.distributed.planner import Step, estimate

STEP = Step(width=64, hidden=256, layers=1, tokens=1024, rows=1, itemsize=2, remat="none", forward=10**9, attention=0)
MESH = {"data": 1, "fsdp": 1, "tensor": 1, "context": 2}


def test_kernels_read_keys_and_values_again_for_each_block_of_queries():
    pairs = 1024 * 1024
    one_pass = 1024 // 128 * (2 * 1024 * 64 * 2)  # each block: keys and values of all tokens, in two bytes
    kernel = dataclasses.replace(STEP, attention=4 * pairs * 64, block=128, training=False)
    assert kernel.attention_bytes == one_pass
    # In training for the gradients of queries, and of keys and values, too; a repeated forward pass reads again.
    assert dataclasses.replace(kernel, training=True).attention_bytes == 3 * one_pass
    assert dataclasses.replace(kernel, training=True, remat="full").attention_bytes == 4 * one_pass
    assert dataclasses.replace(kernel, block=None).attention_bytes == 0

    def traffic(step):
        return estimate(step, dict.fromkeys(("parameters", "optimizer", "ema", "other"), 0), 0, MESH)[1].bytes

    assert traffic(kernel) - traffic(dataclasses.replace(kernel, block=None)) == one_pass / 2
