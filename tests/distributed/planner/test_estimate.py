import dataclasses

from dit_video.distributed.planner import Step, estimate

STEP = Step(width=64, hidden=256, layers=1, tokens=1024, rows=1, itemsize=2, remat="none", forward=10**9, attention=0)
MESH = {"data": 1, "fsdp": 1, "tensor": 1, "context": 2}
STATE = ("parameters", "optimizer", "ema", "other")


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
        return estimate(step, dict.fromkeys(STATE, 0), 0, MESH)[1].bytes

    assert traffic(kernel) - traffic(dataclasses.replace(kernel, block=None)) == one_pass / 2


def test_what_is_computed_again_by_what_is_kept():
    step = dataclasses.replace(STEP, attention=4 * 10**8, remat="none")  # of 10**9 operations, 6 * 10**8 with weights
    with_weights, attention = step.forward - step.attention, step.attention
    once = 3 * with_weights + round((1 + 3.5) * attention)
    again = {
        "none": 0,
        "full": with_weights + attention,
        "attention": with_weights,
        "dots_no_batch": attention,
        "dots_attention": 0,
    }
    assert {remat: step.resized(1, remat).executed - once for remat in again} == again
    kept = [
        estimate(step.resized(1, remat), dict.fromkeys(STATE, 0), 0, MESH)[0].activations
        for remat in ("full", "attention", "dots_no_batch", "dots_attention", "none")
    ]
    assert kept == sorted(set(kept))
    assert kept[1] - kept[0] == kept[3] - kept[2] == 1024 // 2 * 64 * 2  # a device's tokens, in two bytes
