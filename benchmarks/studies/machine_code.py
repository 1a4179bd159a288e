"""Machine code of CUDA kernels: functions, their basic blocks, and their loops. steady_ways.py counts what loops issue.

Loops are natural ones: a branch to a block through which every path to the branch leads. So a wait that the compiler
moved behind the function's end, and that branches back, is no loop around all that lies between.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_SECTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"`\(([^)]+)\)")
_TARGETS = re.compile(r'BRANCH_TARGETS ([^"]+)"')
_WGMMA = re.compile(r"\.64x(\d+)x")
_DIVISION = re.compile(r"_(?:div|rem)_[su]\d+")  # CUDA's routines of integers; those of floats end in _f32_slowpath


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    name: str  # with modifiers, without its predicate: LDGSTS.E.BYPASS.LTC128B.128
    operands: str
    conditional: bool

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def divides(self) -> bool:
        """Whether an integer division begins here: the reciprocal of an integer rounded up, or a call."""
        rounded_up = self.opcode in ("I2F", "I2FP") and ".RP" in self.name
        return rounded_up or (self.opcode == "CALL" and _DIVISION.search(self.operands) is not None)

    @property
    def products(self) -> int:
        """Products of 16 x 8 sums by one warp: one per mma.sync (HMMA), N / 8 per wgmma of N columns (HGMMA).

        A wgmma of 8 columns is none: ptxas puts it where a group of wgmmas is committed that has none.
        """
        if self.opcode == "HGMMA" and (shape := _WGMMA.search(self.name)):
            return int(shape[1]) // 8 if int(shape[1]) > 8 else 0
        return int(self.opcode == "HMMA")

    def targets(self) -> list[str]:
        """The labels that it can jump to. A CALL of a label never returns: it leaves a loop."""
        if self.opcode in ("BRX", "BRXU") and (listed := _TARGETS.search(self.operands)):
            return listed[1].split(",")
        if self.opcode in ("BRA", "CALL", "JMP") and (target := _TARGET.search(self.operands)):
            return [target[1]] if target[1].startswith(".L") else []
        return []

    def goes_on(self) -> bool:
        """Whether the next instruction can follow."""
        if self.conditional or (self.opcode == "CALL" and not self.targets()):
            return True
        if self.opcode == "BRA":  # BRA.DIV and the like, and those with a predicate among their operands
            return not self.operands.strip().startswith("`(")
        return self.opcode not in ("BRX", "BRXU", "CALL", "JMP", "EXIT", "RET")


@dataclass
class Function:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> number of the instruction behind it


def read_functions(lines: Iterable[str]) -> dict[str, Function]:
    """Mangled name -> function, of the output of `nvdisasm -c`."""
    found: dict[str, Function] = {}
    current = Function()
    for line in lines:
        if match := _INSTRUCTION.match(line):
            address, predicate, name, operands = match.groups()
            current.instructions.append(Instruction(int(address, 16), name, operands, predicate is not None))
        elif match := _LABEL.match(line):
            current.labels[match[1]] = len(current.instructions)
        elif match := _SECTION.match(line):
            current = found.setdefault(match[1], Function())
    return found


def disassemble(path: Path, cuobjdump: str, nvdisasm: str) -> Iterator[tuple[str, str, Function]]:
    """(architecture, mangled name, function) of every function in an object file; the architecture without "sm_".

    nvdisasm, unlike `cuobjdump -sass`, tells the targets of indirect branches.

    Raises:
        RuntimeError: a tool failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        _run([cuobjdump, "-xelf", "all", str(path.resolve())], folder)
        for image in sorted(Path(folder).glob("*.cubin")):
            architecture = re.search(r"\.sm_(\w+)\.", image.name)
            if architecture is None:
                raise RuntimeError(f"machine_code: a name such as NAME.sm_80.cubin is required, got {image.name}")
            for name, function in read_functions(_run([nvdisasm, "-c", str(image)], folder).splitlines()).items():
                yield architecture[1], name, function


def _run(command: list[str], folder: str) -> str:
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, env={**os.environ, "PATH": path})
    if done.returncode != 0:
        raise RuntimeError(f"machine_code: {' '.join(command)} failed with exit code {done.returncode}: {done.stderr}")
    return done.stdout


# ---- The graph of a function


@dataclass
class Graph:
    """Basic blocks, numbered in the order of their addresses: instructions [first, last), and what can follow."""

    function: Function
    spans: list[tuple[int, int]]
    successors: list[list[int]]


def graph_of(function: Function) -> Graph:
    code = function.instructions
    leaders = {0, *function.labels.values()}
    leaders.update(i + 1 for i, one in enumerate(code) if one.targets() or not one.goes_on())
    firsts = sorted(leader for leader in leaders if leader < len(code))
    block_of = {first: number for number, first in enumerate(firsts)}
    spans = list(zip(firsts, [*firsts[1:], len(code)], strict=True))
    successors = []
    for _, end in spans:
        last = code[end - 1]
        following = [function.labels[label] for label in last.targets()]
        if last.goes_on() and end < len(code):
            following.append(end)
        successors.append(sorted({block_of[place] for place in following if place in block_of}))
    return Graph(function, spans, successors)


def _reverse_postorder(graph: Graph) -> list[int]:
    order, seen = [], {0}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(graph.successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((one for one in rest if one not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(graph.successors[following])))
    return order[::-1]


def _dominators(graph: Graph, order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """Block -> the last other block on every path to it.

    Cooper, Harvey, Kennedy: A simple, fast dominance algorithm (2001).
    """
    place = {block: i for i, block in enumerate(order)}
    above = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [one for one in predecessors[block] if one in above]
            meet = known[0]
            for other in known[1:]:
                while meet != other:
                    while place[meet] > place[other]:
                        meet = above[meet]
                    while place[other] > place[meet]:
                        other = above[other]
            if above.get(block) != meet:
                above[block], changed = meet, True
    return above


def natural_loops(graph: Graph) -> dict[int, set[int]]:
    """Head -> blocks of the loop."""
    order = _reverse_postorder(graph)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in graph.successors[block]:
            predecessors[following].append(block)
    above = _dominators(graph, order, predecessors)

    def dominates(head: int, block: int) -> bool:
        while block not in (head, order[0]):
            block = above[block]
        return block == head

    loops: dict[int, set[int]] = {}
    for block in order:
        for head in graph.successors[block]:
            if dominates(head, block):
                body = loops.setdefault(head, {head})
                stack = [block]
                while stack:
                    if (one := stack.pop()) not in body:
                        body.add(one)
                        stack.extend(predecessors[one])
    return loops
