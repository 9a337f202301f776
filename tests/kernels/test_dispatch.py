"""Which implementation is asked, and where, on devices that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fathom.kernels import cuda, dispatch, linear_cuda
from fathom.kernels.cuda import KernelError
from fathom.kernels.linear import Part

_current = [torch.device("cuda:0")]


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    _current.append(device)
    yield
    _current.pop()


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """Modules of twins, by name, for a device that has kernels."""
    modules: dict[str, SimpleNamespace] = {}
    monkeypatch.setattr(dispatch, "on", lambda device: True)
    monkeypatch.setattr(dispatch, "import_module", lambda name: modules[name.rpartition(".")[2]])
    monkeypatch.setattr(dispatch, "_broken", set())
    monkeypatch.setattr(cuda, "refused", set())
    monkeypatch.setattr(torch.cuda, "device", _on)
    return modules


@torch.inference_mode()
def test_a_kernel_that_does_not_compile_leaves_its_namesake_alone(rooms: dict[str, SimpleNamespace]) -> None:
    def select(x: Tensor) -> str:
        return "reference"

    def refuse(x: Tensor) -> str:
        raise KernelError("no")

    rooms |= {"steps": SimpleNamespace(select=refuse), "prompts": SimpleNamespace(select=lambda x: "kernel")}
    step, prompt = dispatch.beside("steps")(select), dispatch.beside("prompts")(select)
    with FakeTensorMode():
        x = torch.empty(1, device="cuda:0")
        assert [step(x), prompt(x), step(x)] == ["reference", "kernel", "reference"]


@torch.inference_mode()
def test_where_cuda_s_kernel_is_refused_triton_s_is_asked(rooms: dict[str, SimpleNamespace]) -> None:
    """An op may use several files: each is asked once."""
    asked: list[str] = []

    def twin(x: Tensor) -> str:
        for file in ("one.cu", "two.cu"):
            if file not in cuda.refused:
                asked.append(file)
                with cuda._refusing(file):
                    raise KernelError("no")
        return "Triton"

    def op(x: Tensor) -> str:
        return "reference"

    rooms["room"] = SimpleNamespace(op=twin)
    with FakeTensorMode():
        x = torch.empty(1, device="cuda:0")
        assert [dispatch.beside("room")(op)(x) for _ in range(2)] == ["Triton", "Triton"]
    assert asked == ["one.cu", "two.cu"]


@torch.inference_mode()
def test_a_kernel_is_launched_on_the_device_of_its_tensors(rooms: dict[str, SimpleNamespace]) -> None:
    """Triton launches on the thread's device, and the engine's thread begins on the first."""
    rooms["room"] = SimpleNamespace(where=lambda x: _current[-1])

    def where(x: Tensor) -> torch.device | None:
        return None

    with FakeTensorMode():
        x = torch.empty(1, device="cuda:1")
        assert dispatch.beside("room")(where)(x) == torch.device("cuda:1")
    assert _current == [torch.device("cuda:0")]


@torch.inference_mode()
def test_without_nvrtc_there_are_triton_s_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error would have taken the whole op away, and with it the products of prompts."""

    def missing() -> None:
        raise KernelError("NVRTC was not found")

    monkeypatch.setattr(cuda, "_nvrtc", missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda._has_compiler.cache_clear()
    with FakeTensorMode():
        x, weight = (torch.empty(n, 256, dtype=torch.bfloat16, device="cuda:0") for n in (2, 16))
        assert linear_cuda.linears(x, (Part(weight),)) is NotImplemented
    cuda._has_compiler.cache_clear()


@torch.inference_mode()
def test_where_gluon_does_not_compile_a_prompt_s_attention_is_triton_s(
    rooms: dict[str, SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from fathom.kernels import prefill_triton

    launched: list[str] = []

    class Launcher:
        def __init__(self, name: str, error: Exception | None = None) -> None:
            self.name, self.error = name, error

        def __getitem__(self, grid: object) -> Launcher:
            return self

        def __call__(self, *arguments: object, **options: object) -> None:
            if self.error:
                raise self.error
            launched.append(self.name)

    rooms["prefill_hopper_triton"] = SimpleNamespace(
        attend=Launcher("gluon", KernelError("no")), PAIRS=32, ONCE={}, TWICE={}
    )
    monkeypatch.setattr(prefill_triton, "_hopper", lambda device: rooms["prefill_hopper_triton"])
    monkeypatch.setattr(prefill_triton, "_attend", Launcher("triton"))
    q, near = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((2, 16, 128), (2, 128)))
    sink, turn = (torch.empty(*shape, device="meta") for shape in ((16,), (2, 32, 2)))
    for _ in range(2):
        assert prefill_triton.attend(q, near, None, None, sink, turn, 0, 0, 128).shape == q.shape
    assert launched == ["triton", "triton"]
