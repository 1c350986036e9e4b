import dataclasses

from dit_video.distributed.planner import StepSpec, estimate_step

STEP = StepSpec(
    width=64,
    mlp_dim=256,
    layers=1,
    tokens_per_row=1024,
    rows=1,
    itemsize=2,
    remat="none",
    forward_flops=10**9,
    attention_flops=0,
)
MESH = {"data": 1, "fsdp": 1, "tensor": 1, "context": 2}
STATE = ("parameters", "optimizer", "ema", "other")


def test_kernels_read_keys_and_values_again_for_each_block_of_queries():
    pairs = 1024 * 1024
    one_pass = 1024 // 128 * (2 * 1024 * 64 * 2)  # each block: keys and values of all tokens, in two bytes
    kernel = dataclasses.replace(STEP, attention_flops=4 * pairs * 64, query_block=128, training=False)
    assert kernel.attention_bytes == one_pass
    # In training for the gradients of queries, and of keys and values, too; a repeated forward pass reads again.
    assert dataclasses.replace(kernel, training=True).attention_bytes == 3 * one_pass
    assert dataclasses.replace(kernel, training=True, remat="full").attention_bytes == 4 * one_pass
    assert dataclasses.replace(kernel, query_block=None).attention_bytes == 0

    def traffic(step):
        return estimate_step(step, dict.fromkeys(STATE, 0), 0, MESH)[1].bytes

    assert traffic(kernel) - traffic(dataclasses.replace(kernel, query_block=None)) == one_pass / 2


def test_recomputation_depends_on_the_stored_activations():
    step = dataclasses.replace(
        STEP, attention_flops=4 * 10**8, remat="none"
    )  # of 10**9 operations, 6 * 10**8 with weights
    with_weights, attention = step.forward_flops - step.attention_flops, step.attention_flops
    once = 3 * with_weights + round((1 + 3.5) * attention)
    again = {
        "none": 0,
        "full": with_weights + attention,
        "attention": with_weights,
        "dots_no_batch": attention,
        "dots_attention": 0,
    }
    assert {remat: step.resize(1, remat).executed_flops - once for remat in again} == again
    kept = [
        estimate_step(step.resize(1, remat), dict.fromkeys(STATE, 0), 0, MESH)[0].activations
        for remat in ("full", "attention", "dots_no_batch", "dots_attention", "none")
    ]
    assert kept == sorted(set(kept))
    assert kept[1] - kept[0] == kept[3] - kept[2] == 1024 // 2 * 64 * 2  # a device's tokens, in two bytes
