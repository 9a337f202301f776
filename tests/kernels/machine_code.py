"""What tensor cores still read, and who overwrites it: a look at Hopper's machine code.

`wgmma` reads its operand from registers, and writes its result to others, until its group has been waited for. CUDA C++
has no way to say so: a variable that is not used again, or whose next value is computed meanwhile, may get the same
register. Nothing warns, and the numbers are wrong now and then.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);")
_WITHOUT_RESULT = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "BSSY",
    "UBLK",
    "WARP",
    "MEMBAR",
    "SYNCS",
    "ISETP",
    "FSETP",
    "PLOP3",
    "R2U",
)
Registers = set[int]


def listing(code: bytes) -> str:
    """The machine code of a cubin's functions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        return subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout


def overwritten(text: str) -> list[str]:
    """The instructions of a listing that write a register which a product in flight reads or will write.

    Jumps are not followed: a loop's body is looked at once, in the order in which it stands.
    """
    found: list[str] = []
    groups: list[Registers] = [set()]  # of the products in flight; the last one is still open
    for name, operands in _instructions(text):
        if "GMMA" in name:
            groups[-1] |= _of_product(name, operands)
            if "gsb0" in operands:
                groups.append(set())
        elif name.startswith("WARPGROUP.DEPBAR"):
            left = int(operands.split()[-1], 16)
            groups = groups[len(groups) - 1 - left :]
        elif _written(name, operands) & set().union(*groups):
            found.append(f"{name} {operands}")
    return found


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Names and operands."""
    for line in text.splitlines():
        if match := _LINE.match(line):
            yield match[1], match[2]


def _of_product(name: str, operands: str) -> Registers:
    """The registers of a product's result, and of its operand if that is not in shared memory."""
    result, operand = operands.split(", ")[:2]
    width = int(name.split("x")[1]) // 2
    return _from(result, width) | _from(operand, 4)


def _from(register: str, count: int) -> Registers:
    match = re.fullmatch(r"R(\d+)", register)
    return set(range(int(match[1]), int(match[1]) + count)) if match else set()


def _written(name: str, operands: str) -> Registers:
    if name.startswith(_WITHOUT_RESULT):
        return set()
    first = re.sub(r"^P\w+, ", "", operands).split(",")[0].split(".")[0].strip()
    return _from(first, 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name or name.startswith("CS2R") else 1)
