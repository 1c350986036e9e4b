"""Bytes that a program's instructions read from memory (HBM) and write to it, from its text."""

from collections.abc import Iterator, Mapping

from dit_video.planning.hlo_text import CALLEES, Computation, Instruction, Shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Kinds of collectives; a ragged all-to-all counts as an all-to-all, a broadcast as a permutation."""

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
    updates in place than the update. Collectives inside of fusions, of which several continue one, are not counted:
    see `count_collective_traffic`.
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
    """Return the shapes of an instruction's results; asynchronous starts list those of their operands, too."""
    if instruction.opcode == "copy-start":  # (destination, source, context); the others list their operands first
        return instruction.shapes[:1]
    if instruction.opcode in ("slice-start", "all-gather-start", "collective-permute-start"):
        operands = len(instruction.operands)
        return instruction.shapes[operands : 2 * operands]
    return instruction.shapes
