"""Reading a compiled program: its instructions, and how often each is executed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|\S+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str  # as written: "f32[8,16]{1,0}", or a tuple of such
    opcode: str
    operands: tuple[str, ...]  # names of instructions of the same computation
    attributes: str  # what follows the operands, as written


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The result; it comes last."""
        return next(reversed(self.instructions.values()))

    def operand_bytes(self, instruction: Instruction) -> int:
        """Bytes of all operands together."""
        return sum(shape_bytes(self.instructions[name].shape) for name in instruction.operands)


class Program:
    """The computations of a compiled program, out of its text (`compiled.as_text()`)."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.split("\n"):
            head = _HEAD.match(line)
            if head:
                current = {}
                self.computations[head[2]] = Computation(head[2], current)
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (instruction := _instruction(line)) is not None:
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("not the text of an HLO module: it has no ENTRY computation")
        self._unknown: set[str] = set()

    def executed(self) -> Iterator[tuple[Computation, Instruction, int, bool]]:
        """Every instruction with its computation, how often it is executed, and whether it is part of a fusion.

        Of a conditional, each branch is counted: the result is then an upper bound.
        """
        waiting = [(self.entry, 1, False)]
        while waiting:
            name, times, fused = waiting.pop()
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times, fused
                if instruction.opcode in ("async-done", "async-update"):  # names what its start has called
                    continue
                for role, names in _CALLED.findall(instruction.attributes):
                    if role == "to_apply" and instruction.opcode != "call":  # what a reduction does to two numbers
                        continue
                    inner = times
                    if role in ("body", "condition"):
                        inner *= self._trips(instruction) + (role == "condition")
                    for called in re.findall(r"[\w.\-]+", names):
                        if called in self.computations:
                            waiting.append((called, inner, fused or instruction.opcode == "fusion"))

    def fused(self, fusion: Instruction) -> Computation:
        """The computation that a fusion is. Raises ValueError where it names none."""
        called = re.search(r"calls=%?([\w.\-]+)", fusion.attributes)
        if called is None:
            raise ValueError(f"{fusion.name}: a fusion that calls nothing")
        return self.computations[called[1]]

    @property
    def unknown_trips(self) -> int:
        """Loops that don't say how often they turn, of those `executed` came by; their bodies are counted once."""
        return len(self._unknown)

    def _trips(self, loop: Instruction) -> int:
        """Trip count of a loop: as the compiler notes it, or the constant that the condition compares with."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        instructions = self.computations[condition[1]].instructions.values() if condition else ()
        limits = [
            int(found[1])
            for i in instructions
            if i.opcode == "constant" and i.shape.startswith("s32[]") and (found := re.match(r"(\d+)$", i.operands[0]))
        ]
        if len(limits) == 1:
            return limits[0]
        self._unknown.add(loop.name)
        return 1


def shape_bytes(shape: str, *, in_main_memory: bool = False) -> int:
    """Bytes of an array or of a tuple's arrays, without the padding of a layout.

    With `in_main_memory`, only of those that lie there: a layout with `S(n)` is one in a memory on the chip itself.
    """
    return sum(
        math.ceil(_elements(sizes) * _bits(kind) / 8)
        for kind, sizes, layout in _SHAPE.findall(shape)
        if not (in_main_memory and "S(" in layout)
    )


def arrays(shape: str) -> list[str]:
    """The arrays of a tuple, or the one array, each with its layout."""
    return [found[0] for found in _SHAPE.finditer(shape)]


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    width = re.match(r"[a-z]+(\d+)", kind)  # f32, s8, u32, f8e4m3fn
    return int(width[1]) if width else 0


def _elements(sizes: str) -> int:
    return math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size)


def dimensions(shape: str) -> list[int]:
    """Sizes of an array's dimensions."""
    found = _SHAPE.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _closing(text: str, start: int) -> int:
    """Index behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if named is None:
        return None
    rest = line[named.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end - 1]
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(named[1], shape, opcode, operands, rest[end:])
