"""What a compiled TPU program costs by its compiler's own figures, every loop counted as often as it runs.

`compiled.cost_analysis()` counts the body of a loop once, and so a decoder whose layers are scanned at a fraction of its
cost. Here the optimised HLO is read instead: every instruction of a TPU program carries the cycles that the compiler
estimates for it (by which it chose its tiles), a loop multiplies its body by its trip count, a conditional counts as its
dearest branch. Of a gather the compiler estimates nothing, and its bytes count. Kernels of our own count by their declared
`cost_estimate`, as the larger of FLOPs over peak and bytes over bandwidth. Bytes are those between instructions, to and
from HBM: operands and results, a slice of a larger array as the slice alone, what lives in VMEM not at all. Transfers
between chips are listed apart, and not in the seconds.

XLA's compiler for GPUs writes no estimate of time into its programs: there bytes and the number of kernels are what can be read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

from hybridvlm.hardware import Chip

_ITEM = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
    )
)
_SLICING = ("dynamic-slice", "slice", "gather")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Cost:
    """seconds: estimated cycles over the clock, and kernels; bytes: to and from HBM; exchanged: bytes between chips;
    unread_loops: loops whose trip count could not be read, counted once; launches: instructions that run, one after the
    other, each of which is a kernel on a GPU."""

    seconds: float = 0.0
    bytes: float = 0.0
    exchanged: float = 0.0
    unread_loops: int = 0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        mine, its = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, its, strict=True)))

    def times(self, count: int) -> Cost:
        seconds, moved, exchanged = (count * value for value in (self.seconds, self.bytes, self.exchanged))
        return Cost(seconds, moved, exchanged, self.unread_loops, count * self.launches)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: shape as written, operands' names, and everything after them."""

    name: str
    root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def called(self, key: str) -> tuple[str, ...]:
        """Names of the computations under `key`, one or a list."""
        found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        if found is None:
            return ()
        return tuple(name.strip().lstrip("%") for name in (found[1] or found[2]).split(","))


def program_cost(text: str, chip: Chip) -> Cost:
    """The cost of one run of an optimised program, `compiled.as_text()`, on one chip of `chip`'s kind."""
    return _Program(text, chip).total


class _Program:
    def __init__(self, text: str, chip: Chip) -> None:
        self.chip = chip
        self.computations: dict[str, list[Instruction]] = {}
        entry, body = "", None
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head is not None:
                body = self.computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
            elif line.startswith("}"):
                body = None
            elif body is not None and _NAME.match(line):
                body.append(_instruction(line))
        if not entry:
            raise ValueError("program_cost: no ENTRY computation in the text; give the HLO of a compiled program")
        self.total = self.computation(entry)

    @functools.cache  # noqa: B019 - lives as long as the program that it is of
    def computation(self, name: str) -> Cost:
        shapes = self.shapes(name)
        return sum((self.instruction(i, shapes) for i in self.computations[name]), Cost())

    @functools.cache  # noqa: B019
    def shapes(self, name: str) -> dict[str, str]:
        return {i.name: i.shape for i in self.computations[name]}

    def instruction(self, i: Instruction, shapes: dict[str, str]) -> Cost:
        if i.opcode in _FREE:
            return Cost()
        if i.opcode == "while":
            (body,), (condition,) = i.called("body"), i.called("condition")
            once = self.computation(body) + self.computation(condition)
            count = self.trips(condition, i)
            return once.times(count) if count is not None else once + Cost(unread_loops=1)
        if i.opcode == "conditional":
            branches = i.called("branch_computations") or i.called("true_computation") + i.called("false_computation")
            return max((self.computation(b) for b in branches), key=lambda cost: (cost.seconds, cost.bytes))
        if i.opcode == "call":
            return sum((self.computation(name) for name in i.called("to_apply")), Cost())
        if i.opcode.endswith("-done") or i.opcode.endswith("-update"):
            return Cost()
        if i.opcode == "async-start":
            return sum((self.computation(name) for name in i.called("calls")), Cost())
        moved = self.moved(i, shapes)
        if i.opcode.removesuffix("-start") in _COLLECTIVES:
            sent = sum(_bytes(shapes.get(name, ""), anywhere=True) for name in i.operands)
            return Cost(bytes=moved, exchanged=sent, launches=1)
        return Cost(self.seconds(i, moved), moved, launches=1)

    def seconds(self, i: Instruction, moved: float) -> float:
        declared = re.search(r'"cost_estimate":(\{[^{}]*\})', i.attributes)
        if declared is not None:
            estimate = json.loads(declared[1])
            flops, read = float(estimate.get("flops", 0)), float(estimate.get("bytes_accessed", 0))
            return max(flops / self.chip.flops, read / self.chip.bandwidth)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        if cycles is None:
            # of a gather it says nothing: what it moves takes its time
            gathers = i.opcode == "gather" or (i.opcode == "fusion" and "kind=kCustom" in i.attributes)
            return moved / self.chip.bandwidth if gathers else 0.0
        # of a scatter that it hands on the compiler knows no time, and says the largest number there is
        return int(cycles[1]) / self.chip.clock if int(cycles[1]) < 1 << 62 else moved / self.chip.bandwidth

    def trips(self, condition: str, loop: Instruction) -> int | None:
        """How often a loop runs: the constant that its counter, from 0 by 1, is compared with."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known is not None:
            return int(known[1])
        body = {i.name: i for i in self.computations[condition]}
        root = next(i for i in self.computations[condition] if i.root)
        if root.opcode == "fusion":  # compare(get-tuple-element, constant), moved into a fusion
            inner = {i.name: i for i in self.computations[root.called("calls")[0]]}
            compare = next(i for i in inner.values() if i.root)
            outer = [body[name] for name in root.operands]
            values = [
                outer[int(inner[name].inside)] if inner[name].opcode == "parameter" else inner[name]
                for name in compare.operands
            ]
        else:
            compare, values = root, [body[name] for name in root.operands]
        constants = [v.inside for v in values if v.opcode == "constant"]
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes or len(constants) != 1:
            return None
        return int(constants[0])

    def moved(self, i: Instruction, shapes: dict[str, str]) -> float:
        operands = [shapes.get(name, "") for name in i.operands]
        if i.opcode in _SLICING:
            return 2 * _bytes(i.shape)
        if i.opcode == "dynamic-update-slice":
            return 2 * _bytes(operands[1])
        if i.opcode != "fusion":
            return _bytes(i.shape) + sum(map(_bytes, operands))
        (called,) = i.called("calls")
        read, written = self.fused(called)
        sizes = [min(_bytes(shape), part) for shape, part in zip(operands, read, strict=False)]
        return sum(sizes) + min(_bytes(i.shape), written)

    @functools.cache  # noqa: B019
    def fused(self, name: str) -> tuple[tuple[float, ...], float]:
        """What a fused computation reads of each of its operands, and what it writes, in bytes; inf: all of it."""
        body = self.computations[name]
        by_name = {i.name: i for i in body}
        parameters = sorted((i for i in body if i.opcode == "parameter"), key=lambda i: int(i.inside))
        read = tuple(self.reads(i.name, body) for i in parameters)
        root = next(i for i in body if i.root)
        while root.opcode == "bitcast":
            root = by_name[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return read, _bytes(by_name[root.operands[1]].shape)
        return read, math.inf

    def reads(self, name: str, body: list[Instruction]) -> float:
        total = 0.0
        for user in body:
            for operand_index in (n for n, operand in enumerate(user.operands) if operand == name):
                if user.opcode in _SLICING and operand_index == 0:
                    total += _bytes(user.shape)
                elif user.opcode == "dynamic-update-slice" and operand_index == 0:
                    total += 0.0
                elif user.opcode == "bitcast":
                    total += self.reads(user.name, body)
                elif user.opcode == "fusion":
                    total += self.fused(user.called("calls")[0])[0][operand_index]
                else:
                    return math.inf
        return total


def _instruction(line: str) -> Instruction:
    head = _NAME.match(line)
    if head is None:
        raise ValueError(f"not an instruction of HLO: {line[:80]!r}")
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end + 1 :]
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head[2], head[1] is not None, shape, opcode, operands, inside, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"program_cost: unbalanced parentheses in {text[:80]!r}")


@functools.lru_cache(maxsize=1 << 14)
def _bytes(shape: str, anywhere: bool = False) -> float:
    """Bytes of a shape as HLO writes it; of a tuple, of its parts. Outside HBM only those that are asked for `anywhere` count."""
    total = 0.0
    for kind, dimensions, layout in _ARRAY.findall(shape):
        if kind in _ITEM and (anywhere or not re.search(r"S\([1-9]", layout)):
            total += _ITEM[kind] * math.prod(int(d) for d in dimensions.split(",") if d)
    return total
