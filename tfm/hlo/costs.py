"""FLOPs and bytes of a compiled program, the bodies of loops counted as often as they are executed.

XLA's own cost analysis counts the body of a loop once, and makes no difference between a chip's memory and the small
one on the chip itself, into which a TPU program copies ahead what it needs next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from tfm.hlo.program import Computation, Instruction, Program, arrays, dimensions, shape_bytes

# What only names, views or frames other instructions, and moves no data by itself.
_NAMING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "iota"}
_FRAMING = {"while", "conditional", "call", "after-all", "opt-barrier", "async-start", "async-update"}

# One FLOP an element of the result, as XLA counts them; integers, too.
_ELEMENTWISE = {
    *("add", "subtract", "multiply", "divide", "negate", "abs", "maximum", "minimum", "clamp"),
    *("floor", "round", "sign", "compare", "select", "convert"),
    *("and", "or", "xor", "not", "shift-left", "shift-right-logical"),
}
# Copies between a chip's main memory and the one on the chip itself, and how many times their size XLA counts.
_COPIES = {"copy-start": 4.0, "slice-start": 3.0}
# What a kernel, of which XLA sees nothing else, declares of its FLOPs.
_DECLARED = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')


def flops(program: Program) -> tuple[float, float]:
    """FLOPs, each loop body once, and each as often as it is executed: nearly what XLA counts.

    Of matrix products, elementwise operations and sums, and what kernels declare of themselves.
    """
    once = total = 0.0
    for computation, instruction, times, _ in program.executed():
        one = _flops_of(computation, instruction)
        once, total = once + one, total + one * times
    return once, total


def _flops_of(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode in _ELEMENTWISE:
        return float(math.prod(dimensions(instruction.shape)))
    if instruction.opcode in ("reduce", "reduce-window"):
        summed = math.prod(dimensions(computation.instructions[instruction.operands[0]].shape))
        return float(max(0, summed - math.prod(dimensions(instruction.shape))))
    if instruction.opcode == "custom-call":
        declared = _DECLARED.search(instruction.attributes)
        return float(declared[1]) if declared else 0.0
    return _product_flops(computation, instruction)


def bytes_accessed(program: Program, *, in_main_memory: bool = False) -> tuple[float, float]:
    """Bytes that instructions read and write: each loop body once, and each as often as it is executed.

    Of what a fusion only takes a slice of, that slice counts, and of what is updated in place, the update.

    Args:
      program: the program.
      in_main_memory: leaves out arrays in the memory on the chip itself.
    """
    once = total = 0.0
    for computation, instruction, times, fused in program.executed():
        if not fused:
            moved = _moved_bytes(program, computation, instruction, in_main_memory=in_main_memory)
            once, total = once + moved, total + moved * times
    return once, total


def copied_bytes_by_xla(program: Program) -> float:
    """What copies between main memory and the one on the chip make up of XLA's count of bytes, loops counted in full.

    XLA counts a copy at its start and at its end, four times its size in all, and one of a slice three times. The same
    bytes are counted again where they are used.
    """
    total = 0.0
    for _, instruction, times, _ in program.executed():
        if instruction.opcode in _COPIES:
            size = min(map(shape_bytes, arrays(instruction.shape)[:2]))
            total += _COPIES[instruction.opcode] * size * times
    return total


def _moved_bytes(
    program: Program, computation: Computation, instruction: Instruction, *, in_main_memory: bool = False
) -> float:
    """Bytes that one instruction outside a fusion reads and writes."""

    def size(shape: str) -> int:
        return shape_bytes(shape, in_main_memory=in_main_memory)

    opcode = instruction.opcode
    if opcode in _NAMING | _FRAMING or opcode.endswith("-done") or "Bitcast" in instruction.attributes:
        return 0.0
    shapes = {name: computation.instructions[name].shape for name in instruction.operands}
    if opcode in _COPIES:  # a tuple of two arrays and a flag; as much is read as is written
        first, second = arrays(instruction.shape)[:2]
        return float(sum(min(map(shape_bytes, (first, second))) for place in (first, second) if size(place)))
    if opcode.endswith("-start"):  # of a collective, whose shape may begin with those of its operands
        results = arrays(instruction.shape)
        results = results[len(shapes) : 2 * len(shapes)] if len(results) > len(shapes) else results
        return float(sum(map(size, [*shapes.values(), *results])))
    if opcode == "fusion":
        return _fusion_bytes(program, instruction, shapes, size)
    if opcode == "dynamic-update-slice":
        update = shapes[instruction.operands[1]]
        return _part_moved(shape_bytes(update), size(update), size(instruction.shape))
    if opcode in ("dynamic-slice", "slice", "gather"):
        whole = shapes[instruction.operands[0]]
        return _part_moved(shape_bytes(instruction.shape), size(whole), size(instruction.shape))
    return float(size(instruction.shape) + sum(size(shapes[name]) for name in instruction.operands))


def _part_moved(part: int, *places: int) -> float:
    """Bytes of a part that is read in one place and written in another, for each of them that counts."""
    return float(part * sum(place > 0 for place in places))


def _fusion_bytes(program: Program, fusion: Instruction, shapes: dict[str, str], size: Callable[[str], int]) -> float:
    """Of a fusion: what it takes of its operands, and what it writes."""
    inner = program.fused(fusion)
    total = 0.0
    for position, name in enumerate(fusion.operands):
        if size(shapes[name]):
            total += min(shape_bytes(shapes[name]), _read(program, inner, _parameter(inner, position)))
    results = [inner.root]
    if inner.root.opcode == "tuple":
        results = [inner.instructions[name] for name in inner.root.operands]
    for shape, result in zip(arrays(fusion.shape), results, strict=False):
        if size(shape):
            total += _written(program, inner, result, shape)
    return total


def _parameter(inner: Computation, position: int) -> Instruction:
    wanted = (str(position),)
    return next(i for i in inner.instructions.values() if i.opcode == "parameter" and i.operands == wanted)


def _read(program: Program, inner: Computation, source: Instruction) -> float:
    """Bytes that a fusion takes of one parameter: slices of it, where it takes nothing else."""
    total = 0.0
    for user in inner.instructions.values():
        if user.opcode == "parameter" or source.name not in user.operands:
            continue
        if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == source.name:
            total += shape_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue
        elif user.opcode == "bitcast":
            total += _read(program, inner, user)
        elif user.opcode == "fusion":
            nested = program.fused(user)
            positions = [i for i, name in enumerate(user.operands) if name == source.name]
            total += sum(_read(program, nested, _parameter(nested, i)) for i in positions)
        else:
            return float(shape_bytes(source.shape))
    return min(total, float(shape_bytes(source.shape)))


def _written(program: Program, inner: Computation, result: Instruction, shape: str) -> float:
    """Bytes that a fusion writes of one result: the update alone, where it updates in place."""
    while result.opcode in ("bitcast", "fusion"):
        if result.opcode == "bitcast":
            result = inner.instructions[result.operands[0]]
        else:
            inner = program.fused(result)
            result = inner.root
    if result.opcode == "dynamic-update-slice":
        return float(shape_bytes(inner.instructions[result.operands[1]].shape))
    return float(shape_bytes(shape))


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    """Two a multiplication, of a dot or of the convolution that a TPU makes of it; 0 for anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (dimensions(computation.instructions[name].shape) for name in instruction.operands[:2])
    out = math.prod(dimensions(instruction.shape))
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * out * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    if labels is None:
        return 0.0
    # Each output needs the kernel once, but for its output features. With padding or dilation some of the
    # multiplications are by zeros that were never there: those of the window that do count are fewer.
    inner = math.prod(size for size, label in zip(right, labels[1], strict=True) if label != "o")
    return 2.0 * out * inner * _valid_share(instruction, left, labels[1])


def _valid_share(instruction: Instruction, left: list[int], kernel_labels: str) -> float:
    """Share of a convolution's window positions that meet an element of its input, not padding or dilation."""
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    labels = re.search(r"dim_labels=(\w+)_\w+->(\w+)", instruction.attributes)
    if window is None or labels is None:
        return 1.0
    fields = dict(part.split("=") for part in window[1].split())
    spatial = sum(label.isdigit() for label in kernel_labels)
    out = dimensions(instruction.shape)

    def values(name: str, default: int) -> list[int]:
        return [int(v) for v in fields[name].split("x")] if name in fields else [default] * spatial

    pads = [p.split("_") for p in fields["pad"].split("x")] if "pad" in fields else [["0", "0"]] * spatial
    sizes, strides = values("size", 1), values("stride", 1)
    base, dilation = values("lhs_dilate", 1), values("rhs_dilate", 1)
    share = 1.0
    for d in range(spatial):
        in_size, out_size = left[labels[1].index(str(d))], out[labels[2].index(str(d))]
        valid = sum(
            0 <= (at := o * strides[d] + k * dilation[d] - int(pads[d][0])) <= (in_size - 1) * base[d]
            and at % base[d] == 0
            for o in range(out_size)
            for k in range(sizes[d])
        )
        share *= valid / (out_size * sizes[d])
    return share
