"""Operations, memory traffic and collectives of a compiled program, read from its text (HLO).

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it runs: the trip
count of a loop is its `known_trip_count`, or the constant of its condition. A loop with neither, whose end depends on
data, counts once, and `Program.unknown_loops` is the number of such loops.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dit_video.planning.hlo_text import CALLEES, Computation, Instruction, find_users, parse_computations
from dit_video.planning.matmul_flops import count_convolution_flops, count_dot_flops, count_gemm_flops
from dit_video.planning.memory_traffic import COLLECTIVES, count_collective_traffic, count_traffic
from dit_video.planning.replica_groups import find_mesh_axes, parse_lists, parse_replica_groups
from dit_video.planning.slice_transfers import read_slice_transfer

_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHAIN_ID = re.compile(r'"?chain_id"?[:=]"?(\w+)"?')
_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha)')
_KIND_ALIASES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}


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
    kernel_calls: int = 0
    """Calls of custom kernels, whose FLOPs the text doesn't contain."""
    collectives: dict[tuple[str, tuple[str, ...]], CollectiveTraffic] = field(default_factory=dict)
    """Traffic by kind of collective and mesh axes, without that between slices."""
    slice_transfers: dict[tuple[str, tuple[str, ...]], CollectiveTraffic] = field(default_factory=dict)
    """Traffic between slices by kind of collective and mesh axes."""
    saved_bytes: float = 0.0
    """Bytes that loops over layers stack up for the backward pass."""
    unknown_loops: int = 0
    """Number of loops whose trip count is unknown, each counted once."""


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
      text: the program's HLO.
      mesh: sizes of the mesh's axes by name.
      slices: number of slices along each axis; None for a single slice.
      outer_trip_count: assumed trip count of an outermost loop whose end depends on data, such as a sampler's steps:
        one with an unknown trip count, or with `max_outer_trip_count`, most of whose iterations may do nothing.
      max_outer_trip_count: upper bound of that loop's trip count.
    """
    computations, entry = parse_computations(text)
    slices = dict.fromkeys(mesh, 1) if slices is None else dict(slices)
    reader = _CostReader(computations, mesh, slices, outer_trip_count, max_outer_trip_count)
    if entry is not None:
        reader.walk(entry, 1, in_fusion=False)
    return reader.program


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
        # The program of several slices is that of one slice, with its own devices.
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
        if instruction.opcode == "dot":
            self.program.flops += executions * count_dot_flops(instruction, computation)
        elif instruction.opcode == "convolution":
            self.program.flops += executions * count_convolution_flops(instruction, computation)
        elif instruction.opcode == "custom-call":
            self.program.flops += executions * count_gemm_flops(instruction, computation)
            self.program.kernel_calls += executions * bool(_KERNEL.search(instruction.rest))
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
            # A compiler pass makes a reduce-scatter of an all-reduce of which only slices are used.
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
