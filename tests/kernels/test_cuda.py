"""CUDA sources: machine code is made once, kept for its owner, and made again where what is kept is not whole."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.kernels import cuda, dispatch


class Compiler:
    """An NVRTC that counts."""

    def __init__(self) -> None:
        self.version, self.calls = 13, 0

    def nvrtcVersion(self, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = self.version, 0


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    fake = Compiler()

    def compiled(nvrtc: Compiler, source: str, options: list[str]) -> bytes:
        nvrtc.calls += 1
        return f"{source} {options} {nvrtc.version}".encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "_nvrtc", lambda: fake)
    monkeypatch.setattr(cuda, "_compiled", compiled)
    return fake


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (2, torch.OutOfMemoryError),
        (214, RuntimeError),
        (700, RuntimeError),
        (719, RuntimeError),
        (209, cuda.KernelError),
        (1, cuda.KernelError),
    ],
)
def test_another_kernel_is_tried_only_where_the_kernel_is_at_fault(status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"error {status}: launch") as raised:
        cuda._checked(status, "launch")
    assert raised.type is kind and dispatch._is_compilation(raised.value) == (kind is cuda.KernelError)
    cuda._checked(0, "launch")


def test_a_source_is_compiled_once_for_each_set_of_options(compiler: Compiler, tmp_path: Path) -> None:
    first = cuda.compiled("code", ["-DK=1"])
    assert [cuda.compiled("code", ["-DK=1"]) for _ in range(3)] == [first] * 3
    assert compiler.calls == 1
    assert len({first, cuda.compiled("code", ["-DK=2"]), cuda.compiled("other", ["-DK=1"])}) == 3
    compiler.version = 14
    assert cuda.compiled("code", ["-DK=1"]) != first
    assert compiler.calls == 4
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 4 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept)


@pytest.mark.parametrize("damage", [b"", b"short", bytes(200)])
def test_what_is_not_whole_is_made_again(compiler: Compiler, tmp_path: Path, damage: bytes) -> None:
    code = cuda.compiled("code", [])
    (path,) = (path for path in tmp_path.rglob("*.cubin"))
    path.write_bytes(path.read_bytes()[:-1] if damage == b"short" else damage)
    assert cuda.compiled("code", []) == code
    assert compiler.calls == 2
    assert cuda.compiled("code", []) == code
    assert compiler.calls == 2


def test_a_cache_that_cannot_be_written_costs_time_only(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "fathom").write_text("a file where a folder should be")
    assert cuda.compiled("code", []) == cuda.compiled("code", [])
    assert compiler.calls == 2
