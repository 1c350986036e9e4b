"""The hash chain of a training: the same for an interrupted run as for one that was not, and closed to changes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.training.digests import compute_digests
from dit_video.training.hooks.hash_chain import HashChain, read_chain
from dit_video.training.step import BATCH_DIGESTS


def make_metrics(step: int) -> dict:
    batch = {"clips/latents": jnp.arange(4.0) + step, "clips/segments": jnp.arange(4)}
    return {
        "loss": jnp.float32(1 / step),
        "gradient_norm": jnp.float32(step / 3),
        "skipped": jnp.float32(0),
        BATCH_DIGESTS: {path: jnp.uint32(digest) for path, digest in compute_digests(batch).items()},
    }


def make_digests(step: int) -> dict[str, int]:
    return {"params/kernel": step * 1000003}


def train(path, start: int, stop: int, *, save: int = 4, version: str = "a") -> None:
    """Write the chain of the steps after `start` up to `stop`, and end without a last entry of the log."""
    chain = HashChain(path, {"code": {"sources": version}}, read_digests=make_digests)
    chain.resume(start)
    for step in range(start + 1, stop + 1):
        chain.on_step(step, None, make_metrics(step))
        if step % 3 == 0:
            chain.write(step, {})
        if step % save == 0:
            chain.before_save(step, None)
            chain.on_save(step, make_digests(step))


def test_every_step_and_state_is_recorded_to_the_bit(tmp_path):
    train(tmp_path / "chain.jsonl", 0, 8)
    start, *records = read_chain(tmp_path / "chain.jsonl")
    assert start["start"] == {"code": {"sources": "a"}}
    assert [(record["step"], "state" in record) for record in records] == [
        *((step, False) for step in range(1, 5)),
        (4, True),
        *((step, False) for step in range(5, 9)),
        (8, True),
    ]
    third = records[2]
    assert float.fromhex(third["loss"]) == float(np.float32(1 / 3)) != 1 / 3
    assert third["batch"].keys() == {"clips/latents", "clips/segments"}
    assert third["batch"]["clips/latents"] != records[1]["batch"]["clips/latents"]
    assert third["batch"]["clips/segments"] == records[1]["batch"]["clips/segments"]
    assert records[4]["state"] == {"params/kernel": f"{4 * 1000003:08x}"}


def test_a_run_that_was_killed_and_resumed_has_the_same_records(tmp_path):
    train(tmp_path / "whole.jsonl", 0, 8)
    train(tmp_path / "parts.jsonl", 0, 7)  # killed after step 7, whose newest checkpoint is step 4
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"step": 8, "batch"')  # half a line
    train(tmp_path / "parts.jsonl", 4, 8, version="b")
    whole, parts = (read_chain(tmp_path / f"{name}.jsonl") for name in ("whole", "parts"))

    def get_content(records):
        return [{k: v for k, v in record.items() if k != "link"} for record in records if "start" not in record]

    assert get_content(parts) == get_content(whole)
    assert [record["start"]["code"]["sources"] for record in parts if "start" in record] == ["a", "b"]


def test_a_state_whose_record_was_lost_is_recorded_from_its_checkpoint(tmp_path):
    """The machine was lost after the checkpoint of step 4 was complete, and before the record of its state was sent."""
    train(tmp_path / "whole.jsonl", 0, 8)
    train(tmp_path / "parts.jsonl", 0, 4)
    lines = (tmp_path / "parts.jsonl").read_text().splitlines(keepends=True)
    assert "state" in json.loads(lines[-1])
    (tmp_path / "parts.jsonl").write_text("".join(lines[:-1]))
    train(tmp_path / "parts.jsonl", 4, 8)
    whole, parts = (
        [
            record.get("state") or (record["step"], record.get("batch"))
            for record in read_chain(tmp_path / f"{name}.jsonl")
        ]
        for name in ("whole", "parts")
    )
    assert [record for record in parts if record != (4, None)] == whole


@pytest.mark.parametrize("change", ["value", "line left out", "line added", "lines swapped"])
def test_changes_after_writing_are_noticed(tmp_path, change):
    path = tmp_path / "chain.jsonl"
    train(path, 0, 8)
    lines = path.read_text().splitlines(keepends=True)
    if change == "value":
        record = json.loads(lines[3])
        lines[3] = json.dumps({**record, "loss": (0.25).hex()}) + "\n"
    elif change == "line left out":
        del lines[3]
    elif change == "line added":
        lines.insert(3, lines[3])
    else:
        lines[3:5] = lines[4:2:-1]
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=r"chain\.jsonl line [45] has the hash .*: a line up to there was changed"):
        read_chain(path)


def test_a_chain_that_is_no_chain_is_named(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        read_chain(tmp_path / "chain.jsonl")
    (tmp_path / "chain.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is not a record of a hash chain"):
        read_chain(tmp_path / "chain.jsonl")
