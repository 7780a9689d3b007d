"""Which variables of a frame are live: read again before they are written. What is dead no step hands to the next.

And which of them hold what an iterator gave. Found in the byte code, as compilers do it: a loss that each step computes
anew is dead between two steps, a moving average is live. Exceptions are left out of account.
"""

import dis
import re
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType

_ACCESS = re.compile(r"(LOAD|STORE|DELETE)_(?:FAST|NAME|GLOBAL|DEREF|CLOSURE)(?!_AND_CLEAR)")
"""How an instruction touches variables; from 3.13 on one may touch two."""
_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")
_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)


def live(frame: FrameType) -> frozenset[str]:
    """Return the variables that a frame, or a function that is defined in it, may still read as they are now.

    A frame that waits for the next item of its loop is taken to get one.
    """
    return _live(frame.f_code, frame.f_lasti)


def line_of(code: CodeType, name: str, *, attribute: bool = False) -> int | None:
    """Return the last line in which a code writes a variable, or one inside it if it does not; None if neither does.

    Args:
        code: Of a function, or of a module.
        name: What is written.
        attribute: Whether that is an attribute, of whatever object.
    """
    word = f".{name}" if attribute else name
    lines = _lines(code)
    return lines[0].get(word) or lines[1].get(word)


@lru_cache(maxsize=256)
def taken(code: CodeType) -> frozenset[str]:
    """Return the variables that a code sets to what an iterator gives: the targets of `for`, and of `x = next(...)`."""
    names: set[str] = set()
    taking = storing = False
    for instruction in dis.get_instructions(code):
        touched = _touched(instruction)
        stored = [name for how, name in touched if how == "STORE"]
        if instruction.opname == "FOR_ITER" or ("LOAD", "next") in touched:
            taking, storing = True, instruction.opname == "FOR_ITER"
        elif taking and stored:
            names.update(stored)
            storing = True
        elif instruction.opname == "POP_TOP" or (storing and not instruction.opname.startswith("UNPACK")):
            taking = storing = False
    return frozenset(names)


@lru_cache(maxsize=1024)
def _lines(code: CodeType) -> tuple[dict[str, int], dict[str, int]]:
    """Return the last line that writes each name, in a code itself and inside it; of attributes, after a point."""
    here: dict[str, int] = {}
    inside: dict[str, int] = {}
    for instruction in dis.get_instructions(code):
        line = instruction.positions.lineno if instruction.positions is not None else None
        stored = [name for how, name in _touched(instruction) if how == "STORE"]
        stored += [f".{instruction.argval}"] if instruction.opname == "STORE_ATTR" else []
        here |= {name: max(line, here.get(name, 0)) for name in stored if line is not None}
    for each in _nested(code):
        for lines in _lines(each):
            inside |= {name: max(line, inside.get(name, 0)) for name, line in lines.items()}
    return here, inside


@lru_cache(maxsize=256)
def _live(code: CodeType, at: int) -> frozenset[str]:
    instructions = list(dis.get_instructions(code))
    index = {instruction.offset: number for number, instruction in enumerate(instructions)}
    start = max(number for number, instruction in enumerate(instructions) if instruction.offset <= max(at, 0)) + 1
    touched = [_touched(instruction) for instruction in instructions]
    names = {name for each in touched for _, name in each}
    inner = {*_read_inside(code)}

    def read_first(name: str) -> bool:
        seen, left = set(), [start]
        while left:
            number = left.pop()
            if number in seen or number >= len(instructions):
                continue
            seen.add(number)
            first = next((how for how, touches in touched[number] if touches == name), None)
            if first == "LOAD":
                return True
            if first is None:
                left += _following(instructions, index, number)
        return False

    return frozenset(name for name in names | inner if name in inner or read_first(name))


def _following(instructions: list[dis.Instruction], index: dict[int, int], number: int) -> Iterator[int]:
    instruction = instructions[number]
    if instruction.opname in _ENDS:
        return
    if instruction.opcode in _JUMPS:
        yield index[instruction.argval]
    if not instruction.opname.startswith("JUMP") or "_IF_" in instruction.opname:
        yield number + 1


def _touched(instruction: dis.Instruction) -> list[tuple[str, str]]:
    """Return how an instruction touches which variables, in order."""
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return [(how, name) for how, name in zip(_ACCESS.findall(instruction.opname), names, strict=False)]


def _nested(code: CodeType) -> Iterator[CodeType]:
    return (each for each in code.co_consts if isinstance(each, CodeType))


def _read_inside(code: CodeType) -> Iterator[str]:
    """Yield what the codes in a code read that is not their own: globals, and the variables of those around them."""
    for each in _nested(code):
        touched = (touch for instruction in dis.get_instructions(each) for touch in _touched(instruction))
        own = {*each.co_varnames, *each.co_cellvars}
        yield from (name for how, name in touched if how == "LOAD" and name not in own)
        yield from _read_inside(each)
