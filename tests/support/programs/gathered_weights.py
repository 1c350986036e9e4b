"""Write weights that are sharded over two processes, and pass values among these; the argument is the folder.

Process 0 writes weights in parts, and process 1 gathers with it; neither holds all of them.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism, exchange, make_mesh, make_shardings
from dit_video.distributed.gather import GatheredArray, gather_parts, is_first_process, to_host
from dit_video.families import find_format
from dit_video.weights import load, save
from support.devices import join_processes
from support.process_memory import read_memory, reset_peak_memory
from support.random_params import make_random_params
from support.tiny_wan import DIT

SHAPE = (64, 1024, 512)
PART_BYTES = 4_000_000


def make_rows(index: tuple[slice, ...]) -> np.ndarray:
    """Return a part of an array whose values are known, of up to 128 MB."""
    rows = np.arange(SHAPE[0], dtype=np.float32)[index[0], None, None]
    columns = np.arange(SHAPE[1], dtype=np.float32)[index[1], None]
    return np.broadcast_to(rows * 1000 + columns, (*np.broadcast_shapes(rows.shape, columns.shape)[:2], SHAPE[2]))


def check_exchange() -> None:
    """Pass values of other sizes in parts, one of them an error."""
    exchange._PART_BYTES = 64
    own = [UserError("one"), {"rows": np.arange(50)}][jax.process_index()]
    first, second = exchange.broadcast_values(own)
    assert isinstance(first, UserError)
    assert str(first) == "one"
    np.testing.assert_array_equal(second["rows"], np.arange(50))


def main() -> None:
    """Join the processes, write and compare."""
    join_processes()
    check_exchange()
    folder, mesh = Path(sys.argv[1]), make_mesh(Parallelism(data=1, fsdp=jax.device_count()))
    sharding = make_shardings({"blocks/up/kernel": jax.ShapeDtypeStruct(SHAPE, np.float32)}, mesh)["blocks/up/kernel"]
    array = jax.make_array_from_callback(SHAPE, sharding, make_rows)
    assert not array.is_fully_addressable
    tiny = {"scale": jax.make_array_from_callback((3,), make_shardings(np.ones(3), mesh), lambda _: np.ones(3))}

    def write(name: str) -> None:
        tree = {"kernel": GatheredArray.from_array(array, max_bytes=PART_BYTES), **gather_parts(tiny)}
        save(folder / name, tree, is_writer=is_first_process())

    write("first.safetensors")  # compiles
    reset_peak_memory()
    before = read_memory("VmRSS")
    write("second.safetensors")
    # A part is on each device of this process, and in process 0 once on its host.
    peak = read_memory("VmHWM") - before
    assert peak < array.nbytes / 2, (peak, array.nbytes)
    assert (folder / "second.safetensors").exists() or not is_first_process()

    params = make_random_params(DIT.make)
    sharded = jax.tree.map(
        lambda leaf, layout: jax.make_array_from_callback(leaf.shape, layout, lambda index: leaf[index]),
        params,
        make_shardings(params, mesh),
    )
    wan = find_format(DIT)
    wan.save(folder / "transformer", DIT, gather_parts(sharded), is_writer=is_first_process())
    assert to_host(array[0]).shape == SHAPE[1:]
    if is_first_process():
        written = load(folder / "second.safetensors")
        np.testing.assert_array_equal(written["kernel"], make_rows((slice(None),) * 3))
        np.testing.assert_array_equal(written["scale"], np.ones(3))
        wan.save(folder / "expected", DIT, params)
        name = "diffusion_pytorch_model.safetensors"
        assert (folder / "transformer" / name).read_bytes() == (folder / "expected" / name).read_bytes()
    print("done")


if __name__ == "__main__":
    main()
