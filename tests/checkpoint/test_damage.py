"""A damaged or foreign checkpoint is refused by the names of tensor and file, and a failed write leaves nothing."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.checkpoint import reader as reader_module
from fathom.checkpoint.convert import convert
from fathom.checkpoint.load import load_model
from fathom.checkpoint.random import write_random
from fathom.checkpoint.save import save_model
from fathom.config import ModelConfig
from fathom.errors import CheckpointError, FathomError
from tests.checkpoint import official

Tensors = dict[str, Tensor]
INDEX = "model.safetensors.index.json"
EXPERT = "layers.1.ffn.experts.1.w2"
LINEAR = "layers.0.attn.wq_b"
TABLE = "layers.0.ffn.gate.tid2eid"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = official.published(11)
    return official.write(tmp_path_factory.mktemp("whole"), config, official.draw(config, 11)[0])


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "in")


def shard_of(folder: Path, name: str) -> Path:
    return folder / str(json.loads((folder / INDEX).read_text())["weight_map"][name])


def edit(folder: Path, name: str, change: Callable[[Tensors], object]) -> Path:
    """Change the tensors of the shard that holds `name`, and list what it has then."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    index = json.loads((folder / INDEX).read_text())
    kept = {k: v for k, v in index["weight_map"].items() if v != file.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, file.name)
    (folder / INDEX).write_text(json.dumps(index))
    return file


def refused(folder: Path, *words: str) -> None:
    """Neither loading nor converting gets anywhere; the message has all `words`."""
    out = folder.with_name("out")
    for attempt in (lambda: load_model(folder), lambda: convert(folder, out, experts="bf16", linears="bf16")):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "name", [f"{EXPERT}.weight", f"{EXPERT}.scale", f"{LINEAR}.scale", TABLE, "norm.weight", "mtp.0.enorm.weight"]
)
def test_a_missing_tensor(folder: Path, name: str) -> None:
    edit(folder, name, lambda t: t.pop(name))
    refused(folder, name, str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.attn_norm.weight",
        "layers.0.attn.compressor.ape",
        "layers.1.ffn.experts.3.w1.weight",
        "layers.1.ffn.gate.bias_vl",
        "layers.0.attn.kv_norm.scale",
    ],
)
def test_an_extra_tensor(folder: Path, name: str) -> None:
    file = edit(folder, "norm.weight", lambda t: t.update({name: torch.zeros(4)}))
    refused(folder, name, file.name)


@pytest.mark.parametrize("name", [f"{EXPERT}.weight", f"{EXPERT}.scale", f"{LINEAR}.weight", f"{LINEAR}.scale", TABLE])
def test_a_tensor_of_another_shape(folder: Path, name: str) -> None:
    file = edit(folder, name, lambda t: t.update({name: t[name][:-1]}))
    refused(folder, name, file.name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{EXPERT}.weight", torch.uint8),
        (f"{LINEAR}.weight", torch.float8_e5m2),
        (f"{LINEAR}.scale", torch.bfloat16),
        (f"{EXPERT}.scale", torch.uint8),
        (TABLE, torch.float32),
        ("norm.weight", torch.float64),
        ("embed.weight", torch.int8),
    ],
)
def test_a_tensor_of_another_dtype(folder: Path, name: str, dtype: torch.dtype) -> None:
    file = edit(folder, name, lambda t: t.update({name: torch.zeros(t[name].shape, dtype=dtype)}))
    refused(folder, name, file.name)


@pytest.mark.parametrize("name", [f"{EXPERT}.scale", f"{LINEAR}.scale", "mtp.0.e_proj.scale"])
@pytest.mark.parametrize("value", ["e8m0", "f32"])
def test_a_scale_that_is_nan(folder: Path, name: str, value: str) -> None:
    def change(tensors: Tensors) -> None:
        if value == "f32":
            tensors[name] = tensors[name].float()
            tensors[name][-1, -1] = torch.nan
        else:
            tensors[name].view(torch.uint8)[-1, -1] = 255

    file = edit(folder, name, change)
    if value == "f32" and "experts" in name:
        for other in [n for n in json.loads((folder / INDEX).read_text())["weight_map"] if ".experts." in n]:
            if other.endswith(".scale") and other != name:
                edit(folder, other, lambda t, other=other: t.update({other: t[other].float()}))
    refused(folder, name, file.name)


def test_a_hash_table_with_unknown_experts(folder: Path) -> None:
    file = edit(folder, TABLE, lambda t: t[TABLE].fill_(3))
    refused(folder, TABLE, file.name)


def test_a_missing_shard(folder: Path) -> None:
    file = shard_of(folder, "norm.weight")
    file.unlink()
    refused(folder, file.name)


@pytest.mark.parametrize("size", [0, 5, 200, -1, -5000])
def test_a_truncated_shard(folder: Path, size: int) -> None:
    file = shard_of(folder, "norm.weight")
    data = file.read_bytes()
    file.write_bytes(data[:size])
    refused(folder, str(file))


def test_a_shard_with_a_damaged_header(folder: Path) -> None:
    file = shard_of(folder, "norm.weight")
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)
    refused(folder, str(file))


def test_an_index_that_points_to_another_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["norm.weight"] = files[files[0] == index["weight_map"]["norm.weight"]]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "norm.weight", INDEX)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {"norm.weight": "../x"}}', '{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_none(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


def test_nothing_large_is_read_before_all_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder, "norm.weight", lambda t: t.pop("norm.weight"))
    monkeypatch.setattr(reader_module.Reader, "read", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        load_model(folder)


# --- writing


def attempts(whole: Path, out: Path) -> list[Callable[[], None]]:
    config = ModelConfig.load(whole)
    model = load_model(whole)
    return [
        lambda: convert(whole, out, experts="bf16", linears="bf16"),
        lambda: save_model(model, out, experts="fp4", linears="fp8"),
        lambda: write_random(out, config),
    ]


class Full:
    """A file on a disk with `room` bytes left; everything but writing is the real file's."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> "Full":
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        self.room[0] -= memoryview(data).nbytes
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))


@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("room", [0, 300_000])
def test_a_disk_that_fills_up_leaves_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: int, room: int
) -> None:
    attempt, real, left = attempts(whole, tmp_path / "out")[way], Path.open, [room]

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(self, mode, *args, **kwargs)
        return Full(file, left) if "w" in mode else file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(CheckpointError, match=r"(?i)space|full"):
        attempt()
    assert left[0] < 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", range(3))
def test_a_disk_without_room_is_refused_at_once(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: int
) -> None:
    attempt = attempts(whole, tmp_path / "out")[way]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(CheckpointError, match="1,000"):
        attempt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", range(3))
def test_nothing_is_overwritten(whole: Path, tmp_path: Path, way: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    attempt = attempts(whole, tmp_path / "out")[way]
    with pytest.raises(CheckpointError, match="out"):
        attempt()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_an_interrupted_write_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(whole, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("experts", "linears"), [("int4", "fp8"), ("fp4", "fp4"), ("fp4", "int8")])
def test_a_form_that_does_not_exist(whole: Path, tmp_path: Path, experts: str, linears: str) -> None:
    with pytest.raises(FathomError):
        convert(whole, tmp_path / "out", experts=experts, linears=linears)
    with pytest.raises(FathomError):
        save_model(load_model(whole), tmp_path / "out", experts=experts, linears=linears)
    assert list(tmp_path.iterdir()) == []
