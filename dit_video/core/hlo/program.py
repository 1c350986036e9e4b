"""Operations, memory traffic and collectives of a compiled program, read from its text (HLO).

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it runs: the trip
count of a loop is its `known_trip_count`, or the constant of its condition. A loop with neither, whose end depends on
data, counts once, and `Program.unknown_loops` is the number of such loops.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dit_video.core.hlo.text import (
    CALLEES,
    Computation,
    Instruction,
    Shape,
    find_mesh_axes,
    find_users,
    parse_computations,
    parse_lists,
    parse_replica_groups,
    read_slice_transfer,
)

ATTENTION_KERNELS = {
    "splash": ("tpu_custom_call",),
    "cudnn": ("__cudnn$fmha",),
    "tokamax": ("mosaic_gpu", "__gpu$xla.gpu.triton"),
}
"""Beginnings of the names of an attention backend's kernels; backends that are left out have none."""


class AttentionCall(NamedTuple):
    """A kind of attention call, as `nn.attention.api.name_calls` names it in the program."""

    backend: str
    pattern: str
    kind: str
    """`self`, or `cross` for keys of other tokens."""


@dataclass
class CollectiveTraffic:
    """Traffic of one kind of collective over some mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    bytes: float = 0.0
    """Lower bound on the bytes that each device receives.

    `(n - 1) / n` of what is gathered, scattered or exchanged among `n` devices, and twice that for an all-reduce.
    """
    count: int = 0
    """Number of executions in one step."""
    between_slices: bool = False
    """The bytes come from other slices, through the data centre's network (DCN)."""


@dataclass
class Program:
    """Operations of one step of a compiled program, on one device."""

    flops: float = 0.0
    """FLOPs of matrix products and convolutions, without those inside kernels."""
    bytes: float = 0.0
    """Bytes that instructions read from HBM and write to it, assuming that no operand is cached."""
    product_flops: dict[str, float] = field(default_factory=dict)
    """These FLOPs by the dtype of the factors, with the precision if one is set, such as `bf16` or `f32 highest`."""
    recomputed_flops: float = 0.0
    """FLOPs of those in the forward pass that are computed again for the backward pass."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Calls of custom kernels by name, whose FLOPs the text doesn't contain; those of libraries' products, too."""
    attention: dict[AttentionCall, Counter[str]] = field(default_factory=dict)
    """Uses of attention with the calls of kernels in them."""
    collectives: dict[tuple[str, tuple[str, ...]], CollectiveTraffic] = field(default_factory=dict)
    """Traffic by kind of collective and mesh axes, without that between slices."""
    slice_transfers: dict[tuple[str, tuple[str, ...]], CollectiveTraffic] = field(default_factory=dict)
    """Traffic between slices by kind of collective and mesh axes."""
    saved_bytes: float = 0.0
    """Bytes that loops over layers stack up for the backward pass."""
    unknown_loops: int = 0
    """Number of loops whose trip count is unknown, each counted once."""

    @property
    def kernel_calls(self) -> int:
        """Return the calls of attention kernels."""
        beginnings = tuple(each for names in ATTENTION_KERNELS.values() for each in names)
        return sum(count for name, count in self.kernels.items() if name.startswith(beginnings))


def read_program(
    text: str,
    mesh: dict[str, int],
    *,
    slices: Mapping[str, int] | None = None,
    outer_trip_count: int = 1,
    max_outer_trip_count: int | None = None,
) -> Program:
    """Read the operations of a compiled program from `compiled.as_text()`.

    Args:
      text: The program's HLO.
      mesh: Sizes of the mesh's axes by name.
      slices: Number of slices along each axis; None for a single slice.
      outer_trip_count: Assumed trip count of an outermost loop whose end depends on data, such as a sampler's steps:
        one with an unknown trip count, or with `max_outer_trip_count`, most of whose iterations may do nothing.
      max_outer_trip_count: Upper bound of that loop's trip count.
    """
    computations, entry = parse_computations(text)
    slices = dict.fromkeys(mesh, 1) if slices is None else dict(slices)
    reader = _CostReader(computations, mesh, slices, outer_trip_count, max_outer_trip_count)
    if entry is not None:
        reader.walk(entry, 1, in_fusion=False)
    return reader.program


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Kinds of collectives; a ragged all-to-all counts as an all-to-all, a broadcast as a permutation."""
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHAIN_ID = re.compile(r'"?chain_id"?[:=]"?(\w+)"?')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OPERATION = re.compile(r'\bop_name="([^"]*)"')
_PRECISION = re.compile(r"operand_precision=\{(high\w*)")
_ATTENTION = re.compile(r"attention:(\w+):(\w+):(\w+)")
_NO_KERNEL = re.compile(r"Sharding|SPMD|xla\.sdy|AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound")
"""Beginnings of the targets of custom calls that compute nothing."""
_KIND_ALIASES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}
_COPY_OPCODES = ("bitcast", "copy", "get-tuple-element")
"""Opcodes whose result has the values of their first operand."""


class _CostReader:
    """Accumulates the costs of a program while walking through its computations."""

    def __init__(
        self,
        computations: dict[str, Computation],
        mesh: dict[str, int],
        slices: dict[str, int],
        trip_count: int,
        max_trip_count: int | None,
    ):
        self.computations, self.slices = computations, slices
        # The program of several slices is the program of one slice, with its own devices.
        self.mesh = {axis: size // slices[axis] for axis, size in mesh.items()}
        self.outer_trip_count, self.max_outer_trip_count = trip_count, max_trip_count
        self.program = Program()
        self._chains: set[tuple[str, str]] = set()

    def walk(self, name: str, executions: int, *, in_fusion: bool) -> None:
        """Count a computation that runs `executions` times; nothing inside a fusion accesses memory."""
        computation = self.computations.get(name, {})
        for instruction in computation.values():
            self._count(instruction, computation, executions, in_fusion)

    def _count(self, instruction: Instruction, computation: Computation, executions: int, in_fusion: bool) -> None:
        if instruction.opcode == "while":
            self._count_loop(instruction, executions)
            return
        if instruction.opcode.endswith(("-done", "-update")):  # Counted at its start.
            return
        self._count_work(instruction, computation, executions)
        is_counted = self._count_collective(instruction, computation, executions)
        if instruction.opcode == "recv":
            self._count_slice_transfer(instruction, executions)
        if not in_fusion:
            self.program.bytes += executions * count_traffic(instruction, computation, self.computations)
        elif is_counted:
            self.program.bytes += executions * count_collective_traffic(instruction, computation)
        fused = in_fusion or instruction.opcode == "fusion"
        for kind, callee in CALLEES.findall(instruction.rest):
            if kind != "to_apply" or instruction.opcode == "call":
                self.walk(callee, executions, in_fusion=fused)
        for branches in _BRANCHES.findall(instruction.rest):
            for callee in re.findall(r"[\w.\-]+", branches):
                self.walk(callee, executions, in_fusion=fused)

    def _count_work(self, instruction: Instruction, computation: Computation, executions: int) -> None:
        """Count an instruction's products and kernels, and those of the attention that it belongs to."""
        count_flops = _PRODUCTS.get(instruction.opcode)
        flops = executions * count_flops(instruction, computation) if count_flops is not None else 0.0
        operation = match[1] if (match := _OPERATION.search(instruction.rest)) is not None else ""
        if flops:
            precision = _PRECISION.search(instruction.rest)
            dtype = computation[instruction.operands[0]].shapes[0].dtype + (f" {precision[1]}" if precision else "")
            self.program.flops += flops
            self.program.product_flops[dtype] = self.program.product_flops.get(dtype, 0.0) + flops
            self.program.recomputed_flops += flops * ("rematted_computation" in operation)
        names = _TARGET.findall(instruction.rest) if instruction.opcode == "custom-call" else []
        kernels = Counter({_name_kernel(name, operation): executions for name in names if not _NO_KERNEL.match(name)})
        self.program.kernels += kernels
        if (scope := _ATTENTION.search(operation)) is not None:
            self.program.attention.setdefault(AttentionCall(*scope.groups()), Counter()).update(kernels)

    def _count_loop(self, instruction: Instruction, executions: int) -> None:
        callees = dict(CALLEES.findall(instruction.rest))
        trip_count = self._read_trip_count(instruction, callees.get("condition", ""))
        # A loop with the maximum trip count may end earlier, so the assumed trip count replaces it.
        if trip_count is not None and trip_count == self.max_outer_trip_count and executions == 1:
            trip_count = self.outer_trip_count
        if trip_count is None:
            trip_count = self.outer_trip_count if executions == 1 else 1
            self.program.unknown_loops += trip_count == 1
        body = callees.get("body", "")
        # Backward loops ("transpose") only consume what the forward loops have stacked up.
        if "transpose(" not in instruction.rest and executions == 1:
            self.program.saved_bytes += _count_stacked_bytes(self.computations, body, trip_count)
        self.walk(body, executions * trip_count, in_fusion=False)

    def _read_trip_count(self, instruction: Instruction, condition: str) -> int | None:
        if match := _TRIP_COUNT.search(instruction.rest):
            return int(match[1])
        # A loop that counts up compares its counter with the largest scalar constant of its condition.
        parts = list(self._iterate_instructions(self.computations.get(condition, {})))
        if any(part.opcode == "compare" and "direction=LT" in part.rest for part in parts):
            limits = [part for part in parts if part.opcode == "constant" and part.shapes[0].values == 1]
            numbers = [int(part.rest.split(")")[0]) for part in limits if re.match(r"\d+\)", part.rest)]
            return max(numbers) if numbers else None
        return None

    def _iterate_instructions(self, computation: Computation) -> Iterator[Instruction]:
        for instruction in computation.values():
            yield instruction
            for kind, callee in CALLEES.findall(instruction.rest):
                if kind == "calls":
                    yield from self._iterate_instructions(self.computations.get(callee, {}))

    def _count_collective(self, instruction: Instruction, computation: Computation, executions: int) -> bool:
        """Count an instruction if it is a collective that was not counted before; return True if it is."""
        kind = instruction.opcode.removesuffix("-start")
        kind = _KIND_ALIASES.get(kind, kind)
        if kind not in COLLECTIVES:
            return False
        if chain := _CHAIN_ID.search(instruction.rest):
            # One asynchronous collective is printed in the computations of its start, its middle and its end.
            if (kind, chain[1]) in self._chains:
                return False
            self._chains.add((kind, chain[1]))
        sources = [computation[name] for name in instruction.operands if name in computation]
        operand_bytes = sum(shape.bytes for source in sources for shape in source.shapes)
        if kind == "collective-permute":
            pairs = parse_lists(instruction.rest, "source_target_pairs")
            group = next((pair for pair in pairs if pair[0] != pair[1]), [])
            remote_share = 1.0
        else:
            groups = parse_replica_groups(instruction.rest, math.prod(self.mesh.values()))
            group = groups[0] if groups else []
            remote_share = (len(group) - 1) / max(1, len(group))
        if len(group) < 2:
            return False
        if kind == "all-reduce" and not instruction.is_root:
            # A compiler pass makes a reduce-scatter of an all-reduce if only slices of it are used.
            opcodes = {user.opcode for user in find_users(instruction.name, computation)}
            kind = "reduce-scatter" if opcodes == {"dynamic-slice"} else kind
        copies = {"all-gather": len(group), "all-reduce": 2}.get(kind, 1)
        axes = find_mesh_axes(group, self.mesh, permuted=kind == "collective-permute")
        traffic = self.program.collectives.setdefault((kind, axes), CollectiveTraffic(kind, axes))
        traffic.bytes += executions * (copies * operand_bytes * remote_share)
        traffic.count += executions
        return True

    def _count_slice_transfer(self, instruction: Instruction, executions: int) -> None:
        transfer = read_slice_transfer(instruction.rest, instruction.shapes[0].bytes)
        if transfer is None:
            return
        axes = find_mesh_axes(transfer.slices, self.slices, permuted=transfer.kind == "collective-permute")
        empty = CollectiveTraffic(transfer.kind, axes, between_slices=True)
        traffic = self.program.slice_transfers.setdefault((transfer.kind, axes), empty)
        traffic.bytes += executions * transfer.bytes
        traffic.count += executions


def _count_stacked_bytes(computations: dict[str, Computation], body: str, trip_count: int) -> float:
    """Return the bytes of the arrays into which a loop writes one slice per iteration."""
    computation = computations.get(body, {}) if trip_count > 1 else {}
    root = next((instruction for instruction in computation.values() if instruction.is_root), None)
    total = 0.0
    for name in root.operands if root is not None else ():
        instruction = computation.get(name)
        while instruction is not None and instruction.opcode in _COPY_OPCODES and instruction.operands:
            instruction = computation.get(instruction.operands[0])
        if instruction is None or not instruction.shapes or instruction.shapes[0].sizes[:1] != (trip_count,):
            continue
        inner = computations.get(dict(CALLEES.findall(instruction.rest)).get("calls", ""), {"": instruction})
        if any(part.opcode == "dynamic-update-slice" for part in inner.values()):
            total += sum(shape.bytes for shape in instruction.shapes)
    return total


def _name_kernel(target: str, operation: str) -> str:
    """Return the name of a kernel: its target, with that of the function where all kernels have the same target."""
    function = operation.removesuffix("/pallas_call").rpartition("/")[2]
    return f"{target} {function}" if target == "tpu_custom_call" else target


def count_dot_flops(instruction: Any, computation: Any) -> float:
    """Return the FLOPs of a `dot` instruction, 0 if its operands are unknown."""
    left = computation.get(instruction.operands[0])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    if left is None or contracted is None:
        return 0.0
    sizes = left.shapes[0].sizes
    return 2.0 * instruction.shapes[0].values * math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis)


def count_gemm_flops(instruction: Any, computation: Any) -> float:
    """Return the FLOPs of a `custom-call` instruction of cuBLAS, to which GPU programs pass matrix products, else 0.

    Its result is the first of several: the others are workspace, and what the epilogue keeps.
    """
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
    left = computation.get(instruction.operands[0]) if instruction.operands else None
    if "__cublas$" not in instruction.rest or left is None or contracted is None:
        return 0.0
    sizes = left.shapes[0].sizes
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])]
    return 2.0 * instruction.shapes[0].values * math.prod(sizes[axis] for axis in axes)


def count_convolution_flops(instruction: Any, computation: Any) -> float:
    """Return the FLOPs of a `convolution` instruction, 0 if its operands are unknown.

    TPU programs express matrix products as convolutions, batched ones with the batch as a dilated window.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    left, right = (computation.get(name) for name in instruction.operands[:2])
    if labels is None or left is None or right is None:
        return 0.0
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[1] if label.isdigit())

    def option(name: str, axis: int, default: str) -> str:
        return options[name].split("x")[axis] if name in options else default

    taps = 1
    for axis, label in enumerate(spatial):
        low = int(option("pad", axis, "0_0").split("_")[0])
        taps *= _count_taps(
            left.shapes[0].sizes[labels[1].index(label)],
            right.shapes[0].sizes[labels[2].index(label)],
            instruction.shapes[0].sizes[labels[3].index(label)],
            (low, *(int(option(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))),
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    batch = instruction.shapes[0].sizes[labels[3].index("b")]
    values = right.shapes[0].sizes
    outputs, inputs = values[labels[2].index("o")], values[labels[2].index("i")]
    return 2.0 * taps * batch * outputs * inputs / (int(groups[1]) if groups else 1)


_PRODUCTS = {"dot": count_dot_flops, "convolution": count_convolution_flops, "custom-call": count_gemm_flops}
"""Functions that count the FLOPs of instructions, by opcode."""


@functools.lru_cache(maxsize=4096)
def _count_taps(input_size: int, kernel_size: int, output_size: int, window: tuple[int, int, int, int]) -> int:
    """Return the number of products along one spatial axis: pairs of output and weight that read no padding."""
    padding, stride, input_dilation, weight_dilation = window
    last = (input_size - 1) * input_dilation
    total = 0
    for weight in range(kernel_size):
        first = weight * weight_dilation - padding
        if input_dilation == 1:  # The outputs that read an input are contiguous.
            begin, end = max(0, math.ceil(-first / stride)), min(output_size - 1, (last - first) // stride)
            total += max(0, end - begin + 1)
        else:
            indices = range(first, first + output_size * stride, stride)
            total += sum(0 <= index <= last and index % input_dilation == 0 for index in indices)
    return total


_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "opt-barrier", "async-start", "async-update", "async-done"),
}
"""Opcodes that don't access memory themselves."""
_SLICE_OPCODES = frozenset({"slice", "slice-start", "dynamic-slice", "gather"})
"""Opcodes that read no more of their first operand than they return."""


def count_traffic(instruction: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> int:
    """Return the bytes that an instruction outside of fusions reads and writes, assuming that no operand is cached.

    A fusion does not read more of an operand than the slices that it takes of it, nor write more of an array that it
    updates in place than the update. Collectives inside of fusions are not counted, as several
    fusions may continue one: see `count_collective_traffic`.
    """
    if instruction.opcode in _NO_TRAFFIC:
        return 0
    read = sum(
        _count_read_bytes(instruction, number, source.shapes[0], computations)
        for number, source in enumerate(computation.get(name) for name in instruction.operands)
        if source is not None and len(source.shapes) == 1 and not source.shapes[0].is_in_vmem
    )
    shapes = _get_result_shapes(instruction)
    written = _list_written_bytes(instruction, shapes, computation, computations)
    return read + sum(size for size, shape in zip(written, shapes, strict=True) if not shape.is_in_vmem)


def count_collective_traffic(instruction: Instruction, computation: Computation) -> int:
    """Return the bytes that a collective inside of a fusion reads and writes."""
    sources = [computation[name] for name in instruction.operands if name in computation]
    shapes = [*_get_result_shapes(instruction), *(shape for source in sources for shape in source.shapes)]
    return sum(shape.bytes for shape in shapes if not shape.is_in_vmem)


def _count_read_bytes(
    instruction: Instruction, number: int, shape: Shape, computations: Mapping[str, Computation]
) -> int:
    """Return the bytes of an operand that an instruction reads, inside or outside of a fusion."""
    if instruction.opcode in _SLICE_OPCODES:
        return sum(part.bytes for part in _get_result_shapes(instruction)) if number == 0 else 0
    if instruction.opcode == "tuple" or (instruction.opcode == "dynamic-update-slice" and number == 0):
        return 0
    fused = _get_fused_computation(instruction, computations)
    parameter = next((part for part in fused.values() if _is_parameter(part, number)), None)
    if parameter is None:
        return shape.bytes
    uses = _find_uses(parameter.name, fused)
    return min(shape.bytes, sum(_count_read_bytes(user, index, shape, computations) for user, index in uses))


def _find_uses(name: str, fused: Computation) -> Iterator[tuple[Instruction, int]]:
    """Yield the instructions that read an array in a fusion, also after bitcasts, and the number of the operand."""
    for user in fused.values():
        if name in user.operands:
            if user.opcode == "bitcast":
                yield from _find_uses(user.name, fused)
            elif user.opcode not in COLLECTIVES:
                yield user, user.operands.index(name)


def _list_written_bytes(
    instruction: Instruction,
    shapes: tuple[Shape, ...],
    computation: Computation,
    computations: Mapping[str, Computation],
) -> list[int]:
    """Return the bytes that an instruction writes of each result."""
    if instruction.opcode == "dynamic-update-slice":
        update = computation.get(instruction.operands[1])
        return [update.shapes[0].bytes if update is not None and update.shapes else 0]
    fused = _get_fused_computation(instruction, computations)
    root = next((part for part in fused.values() if part.is_root), None)
    if root is None:
        return [shape.bytes for shape in shapes]
    names = root.operands if root.opcode == "tuple" else (root.name,)
    if len(names) != len(shapes):
        return [shape.bytes for shape in shapes]
    return [_count_result_bytes(name, shape, fused, computations) for name, shape in zip(names, shapes, strict=True)]


def _count_result_bytes(name: str, shape: Shape, fused: Computation, computations: Mapping[str, Computation]) -> int:
    """Return the bytes that a fusion writes of one result, which may be an updated array or one that it passes on."""
    source = fused.get(name)
    while source is not None and source.opcode == "bitcast" and source.operands:
        source = fused.get(source.operands[0])
    if source is None:
        return shape.bytes
    if source.opcode == "parameter" or source.opcode in COLLECTIVES:
        return 0
    written = _list_written_bytes(source, source.shapes, fused, computations)
    return written[0] if len(written) == 1 else shape.bytes


def _get_fused_computation(instruction: Instruction, computations: Mapping[str, Computation]) -> Computation:
    """Return the computation of a fusion; an empty one of other instructions."""
    callee = dict(CALLEES.findall(instruction.rest)).get("calls") if instruction.opcode == "fusion" else None
    return computations.get(callee, {}) if callee else {}


def _is_parameter(instruction: Instruction, number: int) -> bool:
    return instruction.opcode == "parameter" and instruction.rest.split(")")[0] == str(number)


def _get_result_shapes(instruction: Instruction) -> tuple[Shape, ...]:
    """Return the shapes of an instruction's results; asynchronous starts list their operands' shapes, too."""
    if instruction.opcode == "copy-start":  # (destination, source, context); the others list their operands first
        return instruction.shapes[:1]
    if instruction.opcode in ("slice-start", "all-gather-start", "collective-permute-start"):
        operands = len(instruction.operands)
        return instruction.shapes[operands : 2 * operands]
    return instruction.shapes
