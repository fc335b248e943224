"""What the compiled text of a TPU program says: collectives, bytes to and from memory, cycles; and the roofline of a chip."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet of a chip: dense bf16 FLOP/s, bytes/s and bytes of its memory, bytes/s of one link in one direction, cycles/s."""

    flops: float
    hbm: float
    memory: float
    link: float
    clock: float


# Google Cloud's pages on the chips; links: Austin et al., "How to Scale Your Model" (2025), part 2.
# Clock: FLOP/s over what the matrix units do in a cycle.
CHIPS = {
    "v5e": Chip(197e12, 0.81e12, 16e9, 45e9, 1.5e9),
    "v5p": Chip(459e12, 2.8e12, 96e9, 90e9, 1.75e9),
    "v6e": Chip(920e12, 1.6e12, 32e9, 90e9, 1.75e9),
}

KINDS = ("collective-permute", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
HEAD = re.compile(r"(ROOT )?%?[\w.\-]+")
NAME = re.compile(r"%([\w.\-]+)")
KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
SOURCE = re.compile(r'op_name="([^"]*)"')
# Three ways to write them: 2 groups of 4, as a list, and by names of axes with their sizes.
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\][^{}]*\{([^}]*)\})")
AXIS = re.compile(r"('\w+')(?:=|:\(\d+\))(\d+)")
VMEM = "S(1)"  # a layout with it is on the chip's scratch memory, not in HBM
# Move nothing by themselves: what they name is counted where it is read and written.
STILL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "opt-barrier"}
STILL |= {"partition-id", "replica-id"}
BUFFERS = ('custom_call_target="ConcatBitcast"', 'custom_call_target="AllocateBuffer"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result: bytes, and whether it lies in HBM."""

    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: `name = result opcode(inside), rest`."""

    name: str
    opcode: str
    result: str
    inside: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of what it takes."""
        return NAME.findall(self.inside)

    @property
    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of those that it runs."""
        return [(role, part.strip().lstrip("%")) for role, names in CALLED.findall(self.rest) for part in names.strip("{}").split(",")]

    @property
    def collective(self) -> tuple[str, bool] | None:
        """(kind, asynchronous) of a collective that begins here."""
        kind = self.opcode.removesuffix("-start")
        return (kind, kind != self.opcode) if kind in KINDS else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program on one chip: how often it runs, bytes that each run brings, chips in its group."""

    name: str
    runs: int
    bytes: int
    group: int
    waits: bool  # no start and done apart in the compiled schedule: nothing is computed meanwhile
    source: str  # the operation that it comes from


def arrays_of(shapes: str) -> Iterator[Array]:
    """The shapes in a piece of compiled text -> each as an Array; without u32 scalars, the contexts of asynchronous forms."""
    for kind, dims, layout in SHAPE.findall(shapes):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        if dims or kind != "u32":
            yield Array(math.prod(int(n) for n in dims.split(",") if n) * bits // 8, VMEM not in layout)


def _closing(text: str, start: int) -> int:
    """Place behind the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    raise ValueError(f"a bracket without its closing one: {text[start : start + 80]!r}")


def _instruction(line: str) -> Instruction | None:
    head, equals, tail = line.strip().partition(" = ")
    if not equals or not HEAD.fullmatch(head):
        return None
    end = _closing(tail, 0) if tail.startswith("(") else tail.find(" ")
    result, call = tail[:end], tail[end:].lstrip()
    opening = call.find("(")
    closing = _closing(call, opening)
    name, root = head.removeprefix("ROOT ").lstrip("%"), head.startswith("ROOT ")
    return Instruction(name, call[:opening], result, call[opening + 1 : closing - 1], call[closing:], root)


class Program:
    """A compiled text.

    Attributes:
      computations: name -> instructions.
      runs: name -> how often it runs, of those that are steps of the schedule (the inside of a fusion is none).
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        entry, current = "", ""
        for line in text.splitlines():
            if head := COMPUTATION.match(line):
                current = head[1]
                self.computations[current] = {}
                entry = current if line.startswith("ENTRY") else entry
            elif current and (one := _instruction(line)):
                self.computations[current][one.name] = one
        if not entry:
            raise ValueError(f"no ENTRY in the compiled text, which begins {text[:80]!r}")
        self.runs: collections.Counter[str] = collections.Counter()
        stack = [(entry, 1)]
        while stack:
            name, times = stack.pop()
            self.runs[name] += times
            for one in self.computations[name].values():
                if one.opcode in ("while", "conditional", "call"):
                    inside = times * self._trips(one) if one.opcode == "while" else times
                    stack += [(called, inside) for role, called in one.called if role != "condition"]

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as it says, or the one constant that its condition compares the counter with."""
        if known := KNOWN.search(loop.rest):
            return int(known[1])
        condition = self.computations[dict(loop.called)["condition"]].values()
        found = {int(one.inside) for one in condition if one.opcode == "constant" and one.result.startswith("s32[]")}
        if len(found) != 1:
            raise ValueError(f"loop {loop.name}: its condition has the constants {sorted(found)}, expected one")
        return found.pop()

    def steps(self) -> Iterator[tuple[int, str, Instruction]]:
        """(runs, computation, instruction) of the schedule."""
        for name, times in self.runs.items():
            for one in self.computations[name].values():
                yield times, name, one

    def collectives(self) -> list[Collective]:
        """All of them, those in loops as often as the loops run; fusions that are collectives too."""
        found: collections.Counter[tuple[str, int, int, bool, str]] = collections.Counter()
        for times, _, one in self.steps():
            for inner, kind, waits in self._moving(one):
                sizes = [a.bytes for a in arrays_of(inner.result)]
                total = sum(sizes)
                if not waits and inner.opcode.endswith("-start") and kind in ("collective-permute", "all-to-all"):
                    total //= 2  # an asynchronous start yields its operands beside its results
                elif inner.opcode == "all-gather-start":
                    total = max(sizes)
                group = _group(inner.rest)
                if kind == "reduce-scatter" and inner.opcode.startswith("all-reduce"):
                    total //= group  # of the sum each chip keeps a part
                source = SOURCE.search(inner.rest) or SOURCE.search(one.rest)
                found[kind, total, group, waits, source[1] if source else ""] += times
        return [Collective(kind, runs, size, group, waits, source) for (kind, size, group, waits, source), runs in sorted(found.items())]

    def _moving(self, one: Instruction) -> Iterator[tuple[Instruction, str, bool]]:
        """(collective, kind, whether it is waited for) of an instruction that is one, or that is a fusion or an async start around some."""
        if one.collective:
            kind, asynchronous = one.collective
            yield one, kind, not asynchronous
        elif one.opcode in ("fusion", "async-start") and not one.name.startswith("async-collective-done"):
            asynchronous = one.opcode == "async-start" or one.name.startswith("async-collective-start")
            for _, name in one.called:
                if name.startswith("async_collective_fusion"):
                    continue  # computes while one that started before goes on
                for inner in self.computations[name].values():
                    for found, kind, waits in self._moving(inner):
                        # XLA for TPUs writes a reduce-scatter as a sum whose fusion keeps a part.
                        scattered = kind == "all-reduce" and "reduce-scatter" in name
                        yield found, "reduce-scatter" if scattered else kind, waits and not asynchronous

    def cycles(self) -> int:
        """Cycles of all instructions by the compiler's own model, which knows no collectives and no overlap."""
        return sum(times * int(found[1]) for times, _, one in self.steps() if (found := CYCLES.search(one.rest)))

    def traffic(self) -> int:
        """Bytes that instructions read from and write to HBM; of a slice or an update in place, the part that moves."""
        return sum(times * self._moved(self.computations[name], one) for times, name, one in self.steps())

    def _moved(self, computation: dict[str, Instruction], one: Instruction) -> int:
        if one.opcode in STILL or one.opcode.endswith("-done") or any(target in one.rest for target in BUFFERS):
            return 0
        sizes = [sum(a.bytes for a in arrays_of(computation[name].result) if a.in_hbm) for name in one.operands if name in computation]
        written = [a.bytes * a.in_hbm for a in arrays_of(one.result)]
        if one.opcode.endswith("-start"):  # its result names operands too; what moves is the smaller of both
            arrays = [a for a in arrays_of(one.result) if a.bytes > 8]
            return min(a.bytes for a in arrays) if any(a.in_hbm for a in arrays) else 0
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * sum(written)
        if one.opcode == "dynamic-update-slice":
            return 2 * sum(sizes[1:2])
        if one.opcode == "fusion":
            inside = self.computations[one.called[0][1]]
            read = {int(x.inside): x for x in inside.values() if x.opcode == "parameter"}
            sizes = [min(size, self._touched(inside, read[number])) if number in read else size for number, size in enumerate(sizes)]
            written = [min(size, part) for size, part in zip(written, self._kept(inside), strict=False)] or written
        return sum(sizes) + sum(written)

    def _touched(self, inside: dict[str, Instruction], parameter: Instruction) -> int:
        """Bytes that a fusion reads of a parameter: all, or what its slices take."""
        total = 0
        for user in inside.values():
            if parameter.name not in user.operands:
                continue
            if user.operands[0] != parameter.name or user.opcode not in ("dynamic-slice", "gather", "dynamic-update-slice"):
                return sum(a.bytes for a in arrays_of(parameter.result))
            total += 0 if user.opcode == "dynamic-update-slice" else sum(a.bytes for a in arrays_of(user.result))
        return total

    def _kept(self, inside: dict[str, Instruction]) -> list[int]:
        """Bytes that a fusion writes of each result: all, or what its update in place puts."""
        root = next(x for x in inside.values() if x.root)
        results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        out = []
        for one in results:
            while one.opcode == "bitcast":
                one = inside[one.operands[0]]
            what = inside[one.operands[1]] if one.opcode == "dynamic-update-slice" else one
            out.append(sum(a.bytes for a in arrays_of(what.result)))
        return out


def _group(rest: str) -> int:
    """Chips among which a collective goes; a permute's ring counts as 2."""
    found = GROUPS.search(rest)
    if not found:
        return 2
    size, listed, axes, named = found.groups()
    if axes is None:
        return int(size) if size else len(listed.split(","))
    sizes = {name: int(n) for name, n in [*AXIS.findall(axes), *AXIS.findall(named)]}  # a part of an axis says its own size
    return math.prod(sizes[name] for name in re.findall(r"'\w+'", named))


def link_seconds(found: Iterable[Collective], chip: Chip, torus: tuple[int, ...]) -> float:
    """Seconds that a chip's links need for its collectives, one after the other.

    A permute goes over one link in one direction. Gathers and sums go both ways round a ring: a gathered array without the chip's own part,
    a sum twice round (scattered, then gathered). What all chips exchange crosses a quarter of each axis of the torus in the mean, over
    all links.
    """
    total = 0.0
    for c in found:
        others = (c.group - 1) / c.group
        if c.name == "collective-permute":
            sent = float(c.bytes)
        elif c.name in ("all-to-all", "ragged-all-to-all"):
            sent = c.bytes * others * sum(n / 4 for n in torus) / (2 * len(torus))
        else:
            sent = c.bytes * {"all-gather": others, "all-reduce": 2 * others, "reduce-scatter": c.group - 1.0}[c.name] / 2
        total += c.runs * sent / chip.link
    return total


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, by part.

    Attributes:
      matmul, memory, links: what a chip must do, over what its data sheet says.
      waited: that part of `links` during which the schedule computes nothing.
      useful: of the FLOP without those that are computed again.
    """

    matmul: float
    memory: float
    links: float
    waited: float
    useful: float

    @property
    def bound(self) -> str:
        """The longest part."""
        return max(("matmul", "memory", "links"), key=lambda part: getattr(self, part))

    @property
    def step(self) -> float:
        """Seconds at least: everything overlaps but what is waited for."""
        return max(self.links, max(self.matmul, self.memory) + self.waited)

    @property
    def mfu(self) -> float:
        """The share of peak FLOP/s, useful ones alone, that this allows."""
        return self.useful / self.step


def roofline(chip: Chip, torus: tuple[int, ...], *, flops: float, useful: float, hbm: float, found: list[Collective]) -> Roofline:
    """FLOP, useful FLOP and HBM bytes of one chip, and its collectives -> Roofline."""
    links, waited = (link_seconds(kept, chip, torus) for kept in (found, [c for c in found if c.waits]))
    return Roofline(flops / chip.flops, hbm / chip.hbm, links, waited, useful / chip.flops)
