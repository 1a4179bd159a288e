"""The loops of a CUDA kernel's machine code, and what an iteration of each issues.

A loop holds alternatives of which one iteration runs one (sizes of a chunk, the last chunk of a row), so a count of all
of its instructions says too much. Counted here is a loop's *steady way*: a path from its head back to it.

- A nested loop counts as one pass of its own steady way.
- Of all paths, those with most products; of these, those with most copies, then with most output vectors. In a loop
  that writes no output, then those with most multiply-adds of the ordinary cores: CP's depthwise stage, which a warp
  without pixels skips (beside an output they are costly activations). Paths that pass the same copies differ in
  bookkeeping only, and the shortest counts. Of several such sets (a chunk of one factor or of the next), the costliest
  counts.
- Where nested loops have products, the steady way passes them, and no products beside: these are the remainder that a
  nested loop leaves.
- Predicated instructions count: they are issued. NOPs do not: ptxas puts them between products for sm_120, where other
  instructions could stand.

What that cannot know: branches depend on each other, so the shortest path can leave out bookkeeping that follows from
what it does (the end of a row behind a row's only chunk). `longest` is the longest path with the same copies; the truth
lies between the two. A nested loop may run more than once per iteration, which makes the quotients of the outer loop
smaller than told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.studies.machine_code import Function, Instruction, graph_of, natural_loops

COPIES = frozenset(("LDGSTS", "UTMALDG"))  # by cp.async and by TMA
TMA_STORE = "UTMASTG"


@dataclass(frozen=True)
class Count:
    """What a path issues."""

    products: int = 0  # of 16 x 8 sums by a warp (Instruction.products)
    issued: int = 0  # instructions for them
    nested: int = 0  # products of nested loops among them
    copies: int = 0
    vectors: int = 0  # of 16 bytes, to the output
    multiply_adds: int = 0  # of the ordinary cores
    chosen: frozenset[int] = frozenset()  # blocks with copies that it passes: which of the alternatives it takes

    def __add__(self, other: Count) -> Count:
        return Count(
            self.products + other.products,
            self.issued + other.issued,
            self.nested + other.nested,
            self.copies + other.copies,
            self.vectors + other.vectors,
            self.multiply_adds + other.multiply_adds,
            self.chosen | other.chosen,
        )


@dataclass(frozen=True)
class Way:
    """Alternatives of a loop that differ in nothing but bookkeeping."""

    count: Count
    instructions: int  # of the shortest
    longest: int
    # Instructions of the shortest way that issues the same but copies, vectors or multiply-adds; None: there is none.
    without_copies: int | None
    without_vectors: int | None
    without_multiply_adds: int | None
    longest_without_vectors: int | None  # of the longest way that issues the same but vectors

    @property
    def per_product(self) -> float | None:
        """Without instructions that serve multiply-adds."""
        rest = self.without_multiply_adds or self.instructions
        return rest / self.count.products if self.count.products else None

    @property
    def per_multiply_add(self) -> float | None:
        if not self.count.multiply_adds:
            return None
        return (self.instructions - (self.without_multiply_adds or 0)) / self.count.multiply_adds

    @property
    def per_copy(self) -> float | None:
        """Instructions that serve copies only: those beyond the way that copies nothing."""
        return (self.instructions - (self.without_copies or 0)) / self.count.copies if self.count.copies else None

    @property
    def per_vector(self) -> float | None:
        """Instructions that serve output vectors only, on the cheapest way (without an activation)."""
        return (self.instructions - (self.without_vectors or 0)) / self.count.vectors if self.count.vectors else None

    @property
    def most_per_vector(self) -> float | None:
        """The same on the costliest way."""
        return (self.longest - (self.longest_without_vectors or 0)) / self.count.vectors if self.count.vectors else None


@dataclass(frozen=True)
class Loop:
    first: int  # addresses of its first and its last instruction
    last: int
    depth: int  # 1: in no other loop
    own: Count  # of all instructions outside of nested loops, on any way
    divisions: int  # of integers, nested loops included
    ways: tuple[Way, ...]  # those with the steady way's products, the steady way first, then by falling copies

    @property
    def steady(self) -> Way:
        return self.ways[0]

    @property
    def kind(self) -> str:
        """What it does outside of nested loops. chunk: multiplies a chunk and copies a later one; steps: multiplies."""
        if self.own.vectors:
            return "output"
        if self.own.copies:
            return "chunk" if self.steady.count.products else "copies"
        return "steps" if self.own.products else ""


Lengths = dict[Count, tuple[int, int]]  # what paths issue -> instructions of the shortest, of the longest


class _Analysis:
    def __init__(self, function: Function) -> None:
        self.graph = graph_of(function)
        self.code = function.instructions
        self.bodies = natural_loops(self.graph)
        self.inner_first = sorted(self.bodies, key=lambda head: len(self.bodies[head]))
        self.loops: dict[int, Loop] = {}
        for head in self.inner_first:
            self.loops[head] = self.analyse(head)

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        return [one for block in sorted(blocks) for one in self.code[slice(*self.graph.spans[block])]]

    def count(self, blocks: Iterable[int], staged: bool) -> Count:
        """`staged`: TMA stores the output; a lane stages 16 bytes of it by a stmatrix of four matrices."""
        code = self.instructions(blocks)
        stores = ("STSM",) if staged else ("ST", "STG")
        copies = sum(one.opcode in COPIES for one in code)
        vectors = sum(one.opcode in stores and one.name.endswith((".128", ".4")) for one in code)
        return Count(
            products=sum(one.products for one in code),
            issued=sum(one.products > 0 for one in code),
            copies=copies,
            vectors=vectors,
            multiply_adds=sum(one.opcode == "FFMA" for one in code),
            chosen=frozenset(blocks) if copies else frozenset(),
        )

    def analyse(self, head: int) -> Loop:
        body = self.bodies[head]
        collapsed: dict[int, int] = {}  # block -> head of the largest loop nested in this one that holds it
        for other in self.inner_first:
            if other != head and self.bodies[other] < body:
                collapsed.update(dict.fromkeys(self.bodies[other], other))
        own = [block for block in body if block not in collapsed]
        staged = any(one.opcode == TMA_STORE for one in self.instructions(own))
        code, count = self.instructions(body), self.count(own, staged)
        return Loop(
            first=code[0].address,
            last=code[-1].address,
            depth=sum(body <= other for other in self.bodies.values()),
            own=count,
            divisions=sum(one.divides for one in code),
            ways=_steady_ways(self.lengths(head, collapsed, staged), count.vectors > 0),
        )

    def lengths(self, head: int, collapsed: dict[int, int], staged: bool) -> Lengths:
        """All paths from the head back to it."""
        order = self.topological(head, collapsed)
        arriving: dict[int, Lengths] = {node: {} for node in order}
        arriving[head] = {Count(): (0, 0)}
        ended: Lengths = {}
        for node in order:
            issued, length = self.issued(node, collapsed.get(node) == node, staged)
            leaving = {count + issued: (low + length, high + length) for count, (low, high) in arriving[node].items()}
            for following in self.following(node, head, collapsed):
                into = ended if following == head else arriving[following]
                for count, (low, high) in leaving.items():
                    before = into.get(count, (low, high))
                    into[count] = (min(low, before[0]), max(high, before[1]))
        return ended

    def issued(self, node: int, is_loop: bool, staged: bool) -> tuple[Count, int]:
        if not is_loop:
            length = sum(one.opcode != "NOP" for one in self.instructions([node]))
            return self.count([node], staged), length
        steady = self.loops[node].steady
        return replace(steady.count, nested=steady.count.products, chosen=frozenset()), steady.instructions

    def following(self, node: int, head: int, collapsed: dict[int, int]) -> set[int]:
        """The nodes of the loop's body behind a node; the head: the end of an iteration."""
        blocks = self.bodies[node] if collapsed.get(node) == node else {node}
        targets = {to for block in blocks for to in self.graph.successors[block] if to == head or to not in blocks}
        return {collapsed.get(to, to) for to in targets if to in self.bodies[head]}

    def topological(self, head: int, collapsed: dict[int, int]) -> list[int]:
        order: list[int] = []
        seen = {head}
        stack = [(head, iter(self.following(head, head, collapsed) - {head}))]
        while stack:
            node, rest = stack[-1]
            following = next((one for one in rest if one not in seen), None)
            if following is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.following(following, head, collapsed) - {head})))
        order.reverse()
        place = {node: i for i, node in enumerate(order)}
        for node in order:
            if any(place[one] <= place[node] for one in self.following(node, head, collapsed) - {head}):
                address = self.code[self.graph.spans[head][0]].address
                raise RuntimeError(
                    f"steady_ways: a loop with one entry is required, got a second one inside the loop at {address:#x}"
                )
        return order


def _steady_ways(lengths: Lengths, writes: bool) -> tuple[Way, ...]:
    """`writes`: the loop writes output."""
    nested = max(count.nested for count in lengths)
    candidates = [count.products for count in lengths if count.nested == nested]
    products = min(candidates) if nested else max(candidates)  # beside nested products: the remainder
    kept: Lengths = {}
    for count, (low, high) in lengths.items():
        if (count.nested, count.products) == (nested, products):
            count = replace(count, multiply_adds=0) if writes else count
            before = kept.get(count, (low, high))
            kept[count] = min(low, before[0]), max(high, before[1])
    ways = []
    for count, (shortest, longest) in kept.items():

        def fitting(**wanted: object) -> list[tuple[int, int]]:
            return [both for one, both in kept.items() if all(getattr(one, k) == v for k, v in wanted.items())]

        def least(**wanted: object) -> int | None:
            return min((low for low, _ in fitting(**wanted)), default=None)

        vectors, chosen, adds = count.vectors, count.chosen, count.multiply_adds
        ways.append(
            Way(
                count,
                shortest,
                longest,
                without_copies=least(copies=0, vectors=vectors, multiply_adds=adds),
                without_vectors=least(vectors=0, chosen=chosen, multiply_adds=adds),
                without_multiply_adds=least(multiply_adds=0, vectors=vectors, chosen=chosen),
                longest_without_vectors=max(
                    (high for _, high in fitting(vectors=0, chosen=chosen, multiply_adds=adds)), default=None
                ),
            )
        )

    def importance(way: Way) -> tuple[int, ...]:
        return way.count.copies, way.count.vectors, way.count.multiply_adds, way.instructions

    return tuple(sorted(ways, key=importance, reverse=True))


def loops_of(function: Function) -> list[Loop]:
    """The loops of a function, in the order of their addresses."""
    return sorted(_Analysis(function).loops.values(), key=lambda one: (one.first, one.depth))
