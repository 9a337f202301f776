"""What only a compiler finds: kernels as Hopper's machine code, made on a machine without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.kernels.machine_code import overwritten

pytestmark = pytest.mark.external
IN_FLIGHT = """
        /*0010*/  LDG.E R32, desc[UR6][R8.64] ;
        /*0020*/  QGMMA.64x8x32.F32.E4M3.E4M3 R24, R32, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0030*/  QGMMA.64x16x32.F32.E4M3.E4M3 R40, gdesc[UR8], RZ, !UPT ;
        /*0040*/  QGMMA.64x8x32.F32.E4M3.E4M3 R28, R36, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0050*/  @P0 FADD R{a}, R60, R61 ;
        /*0060*/  WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/  LDS.128 R{b}, [R60] ;
        /*0080*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/  LOP3.LUT P0, R{c}, R24, 0x1, RZ, 0xc0, !PT ;
        /*00a0*/  STG.E desc[UR6][R24.64], R28 ;
"""


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_hopper"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(run.stdout.splitlines()[-1].split()[0]) >= 300


@pytest.mark.parametrize(
    ("a", "b", "c", "which"),
    [
        (20, 20, 24, []),
        (35, 32, 39, ["FADD"]),
        (36, 34, 40, ["FADD", "LDS.128"]),
        (44, 24, 28, ["FADD"]),
        (48, 48, 36, []),
        (60, 36, 28, ["LDS.128"]),
        (27, 40, 31, ["FADD", "LDS.128"]),
    ],
)
def test_registers_of_a_product_in_flight_are_looked_after(a: int, b: int, c: int, which: list[str]) -> None:
    """Two groups: R32 to R35 into R24 to R27; shared memory into R40 to R47, R36 to R39 into R28 to R31."""
    found = overwritten(IN_FLIGHT.format(a=a, b=b, c=c))
    assert [line.split()[0] for line in found] == which
