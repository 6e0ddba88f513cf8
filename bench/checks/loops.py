"""Count the instructions of a GPU kernel's streaming loop and of one pass through it, from its machine code (SASS)."""

import re
from typing import NamedTuple

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.M)
ENDS = ("EXIT", "RET", "BRX", "KILL")
SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "FRND")
WIDTHS = {".128": 16, ".64": 8, ".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2}


class Pass(NamedTuple):
    """A way through code: instructions, bytes that a thread loads from global memory, and special instructions."""

    instructions: float
    loaded: float
    special: float  # exp2, log2, reciprocals, conversions: of a pipe of their own

    def plus(self, other: "Pass", share: float = 1.0) -> "Pass":
        return Pass(*(x + share * y for x, y in zip(self, other, strict=True)))


VECTOR = 16  # bytes that a thread loads in a pass of a streaming loop at least; other loops are for edges
NONE = Pass(0, 0, 0)


class Code(NamedTuple):
    """A kernel's machine code: one pass through all of it, and through its streaming loop, if it has one."""

    whole: Pass
    loop: Pass | None
    mean: Pass  # through the loop, if each way of a branch is as likely


class _Block(NamedTuple):
    own: Pass
    successors: list[int]


def loaded_bytes(opcode: str) -> int:
    """Return the bytes that a thread gets from global memory by an instruction."""
    if not opcode.startswith("LDG"):
        return 0
    return next((size for width, size in WIDTHS.items() if width in opcode), 4)


def basic_blocks(code: str) -> list[_Block]:
    """Return the blocks of straight code, the entry first. A block's successors are indices."""
    lines = [(int(found[1], 16), found[2], found[3], found[4]) for found in LINE.finditer(code)]
    places = {address: i for i, (address, *_) in enumerate(lines)}

    def target_of(opcode: str, operands: str) -> int | None:
        found = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        return places.get(int(found[1], 16)) if found else None

    targets = [target_of(opcode, operands) for _, _, opcode, operands in lines]
    jumps = [opcode.startswith(("BRA", *ENDS)) for _, _, opcode, _ in lines]
    starts = sorted({0, *(t for t in targets if t is not None), *(i + 1 for i, jump in enumerate(jumps) if jump)})
    starts = [i for i in starts if i < len(lines)]
    index, blocks = {start: i for i, start in enumerate(starts)}, []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        _, predicate, opcode, operands = lines[end - 1]
        target, following = targets[end - 1], end if end < len(lines) else None
        is_conditional = bool(predicate) or opcode.startswith("BRA.DIV") or re.search(r"\bU?P\d", operands)
        if jumps[end - 1] and not is_conditional:
            following = None
        opcodes = [opcode for _, _, opcode, _ in lines[start:end] if opcode != "NOP"]
        own = Pass(len(opcodes), sum(map(loaded_bytes, opcodes)), sum(o.startswith(SPECIAL) for o in opcodes))
        blocks.append(_Block(own, [index[i] for i in (following, target) if i is not None]))
    return blocks


def _dominators(blocks: list[_Block], order: list[int], sources: dict[int, list[int]]) -> dict[int, set[int]]:
    dominators = {i: set(order) for i in order}
    dominators[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            found = {i} | set.intersection(*(dominators[source] for source in sources[i]))
            changed |= found != dominators[i]
            dominators[i] = found
    return dominators


def _reverse_postorder(blocks: list[_Block]) -> list[int]:
    order, seen, stack = [], {0}, [(0, iter(blocks[0].successors))]
    while stack:
        i, rest = stack[-1]
        following = next((j for j in rest if j not in seen), None)
        if following is None:
            order.append(i)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    return order[::-1]


def analyze(code: str) -> Code:
    """Return the passes of a kernel. A pass goes where the most bytes are loaded, and there by the fewest instructions:
    so it leaves out the code of rare cases. The streaming loop is the longest of the innermost ones that load."""
    blocks = basic_blocks(code)
    order = _reverse_postorder(blocks)
    place = {i: n for n, i in enumerate(order)}
    sources: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for j in blocks[i].successors:
            sources[j].append(i)
    dominators = _dominators(blocks, order, sources)
    loops: dict[int, tuple[set[int], list[int]]] = {}
    for i in order:
        for head in blocks[i].successors:
            if head in dominators[i]:
                body, latches = loops.setdefault(head, ({head}, []))
                latches.append(i)
                pending = [i]
                while pending:
                    if (j := pending.pop()) not in body:
                        body.add(j)
                        pending.extend(sources[j])

    def best(start: int, body: set[int], ends: list[int]) -> Pass:
        found = {start: blocks[start].own}
        for i in sorted(body & place.keys(), key=place.__getitem__):
            for j in blocks[i].successors if i in found else ():
                if j in body and place[j] > place[i]:
                    way = found[i].plus(blocks[j].own)
                    if j not in found or _better(way, found[j]):
                        found[j] = way
        ways = [found[i] for i in ends if i in found]
        return max(ways, key=lambda way: (way.loaded, -way.instructions)) if ways else found[start]

    exits = [i for i in order if not blocks[i].successors]
    whole = best(0, set(order), exits)
    passes = {head: best(head, body, latches) for head, (body, latches) in loops.items()}
    loading = {head for head, way in passes.items() if way.loaded >= VECTOR}
    inner = [h for h in loading if not any(other != h and other in loops[h][0] for other in loading)]
    if not inner:
        return Code(whole, None, NONE)
    head = max(inner, key=passes.__getitem__)
    body, _ = loops[head]
    shares, mean = {head: 1.0}, NONE
    for i in sorted(body & place.keys(), key=place.__getitem__):
        mean = mean.plus(blocks[i].own, shares.get(i, 0.0))
        ahead = [j for j in blocks[i].successors if j in body and place[j] > place[i]]
        for j in ahead:
            shares[j] = shares.get(j, 0.0) + shares.get(i, 0.0) / len(ahead)
    return Code(whole, passes[head], mean)


def _better(way: Pass, than: Pass) -> bool:
    return (way.loaded, -way.instructions) > (than.loaded, -than.instructions)
