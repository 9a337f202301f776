"""The published layout, read and written: against bytes and meanings that are made without our code."""

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fathom.checkpoint import load
from fathom.checkpoint.load import load_model
from fathom.checkpoint.random import write_random
from fathom.checkpoint.reader import Reader
from fathom.checkpoint.save import save_model
from fathom.config import ModelConfig
from fathom.kernels import dispatch
from fathom.kernels.words import from_words
from fathom.model.init import init_weights
from fathom.model.layers import Numerics
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer
from tests import oracle
from tests.checkpoint import official

FORMS = [
    ("fp4", "fp8", False),
    ("fp8", "fp8", True),
    ("fp8", "fp8", False),
    ("fp4", "bf16", False),
    ("bf16", "bf16", False),
]


def same(model: Transformer, values: dict[str, Tensor]) -> None:
    """Every value in its place, bit for bit, and nothing besides."""
    state, want = model.state_dict(), oracle.stacked(values)
    assert state.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(state[name].to(value.dtype), value), name


@pytest.mark.parametrize(("experts", "linears", "f32"), FORMS)
def test_every_stored_form_is_read_as_numpy_reads_it(tmp_path: Path, experts: str, linears: str, f32: bool) -> None:
    config = official.published(1, expert_dtype=experts if experts != "bf16" else None)
    stored, values = official.draw(config, 1, experts, linears, f32)
    model = load_model(official.write(tmp_path, config, stored))
    same(model, values)
    assert model.numerics == Numerics(torch.float32, quantize=(experts, linears) != ("bf16", "bf16"))
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize(("experts", "linears", "f32"), FORMS)
def test_loaded_as_stored_and_saved_the_tensors_are_the_same_bytes(
    tmp_path: Path, experts: str, linears: str, f32: bool
) -> None:
    config = official.published(2)
    stored, values = official.draw(config, 2, experts, linears, f32)
    model = load_model(official.write(tmp_path / "in", config, stored), dense=False)
    save_model(model, tmp_path / "out", experts=experts, linears=linears, max_shard=1_600_000)
    found = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        assert file.stat().st_size <= 1_600_000
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    model.densify()
    same(model, values)


def test_experts_stand_in_the_order_of_the_kernels_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a GPU would take the reference, at a small part of its speed."""
    config = official.published(3)
    folder = official.write(tmp_path, config, official.draw(config, 3)[0])
    stored = load_model(folder, dense=False)
    monkeypatch.setattr(dispatch, "on", lambda device: True)
    placed, wide = load_model(folder, dense=False), load_model(folder)
    experts = [(m, stored.get_submodule(n)) for n, m in placed.named_modules() if isinstance(m, Experts)]
    assert experts
    for ours, theirs in experts:
        for name in ("w13", "w2"):
            words, codes = ours.get_parameter(name), theirs.get_parameter(name)
            assert words.dtype == torch.int32 and torch.equal(from_words(words.data), codes.data)
    assert all(m.w13.dtype == torch.float32 for m in wide.modules() if isinstance(m, Experts))


@pytest.mark.parametrize(("experts", "linears"), [("fp4", "fp8"), ("fp8", "fp8")])
def test_float_scales_become_exponents_where_kernels_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: str, linears: str
) -> None:
    """Bases are published with float32 scales; kernels would take their bytes for exponents, or leave them to torch."""
    config = official.published(3)
    folder = tmp_path / "in"
    write_random(folder, ModelConfig.from_dict(config), experts=experts, linears=linears, scales="F32")
    floats = load_model(folder, dense=False)
    monkeypatch.setattr(dispatch, "on", lambda device: True)
    suited = load_model(folder, dense=False)
    scales = {name: t for name, t in suited.state_dict().items() if t.dtype == torch.float8_e8m0fnu}
    assert scales and not [n for n, t in floats.state_dict().items() if t.dtype == torch.float8_e8m0fnu]
    for name, scale in scales.items():
        assert torch.equal(scale.float(), floats.state_dict()[name]), name
    odd = torch.tensor([[0.5, 0.75]])
    assert load._exponents(odd) is odd and load._exponents(None) is None


def test_a_float_model_saved_twice_is_the_same_files(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(official.published(3))
    model = Transformer(config)
    init_weights(model, 3)
    save_model(model, tmp_path / "a", experts="fp4", linears="fp8", max_shard=300_000)
    loaded = load_model(tmp_path / "a", dense=False)
    assert loaded.config == config
    save_model(loaded, tmp_path / "b", experts="fp4", linears="fp8", max_shard=300_000)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) > 4
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False) == (names, [], [])


def test_the_written_index_and_configuration_describe_the_files(tmp_path: Path) -> None:
    config = official.published(4)
    stored, _ = official.draw(config, 4)
    model = load_model(official.write(tmp_path / "in", config, stored), dense=False)
    save_model(model, tmp_path / "out", experts="fp8", linears="bf16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    data = sum(entry.size for entry in Reader(tmp_path / "out").tensors.values())
    assert index["metadata"]["total_size"] == data
    assert json.loads((tmp_path / "out" / "config.json").read_text())["expert_dtype"] == "fp8"
    same(load_model(tmp_path / "out"), official.draw(config, 4)[1])


def test_a_folder_of_one_file_without_index_and_with_silent_config(tmp_path: Path) -> None:
    """What third parties write for llama.cpp: FP4 experts, BF16 else, and a config that does not mention it."""
    config = official.published(5, num_nextn_predict_layers=0, compress_ratios=[0, 4, 128])
    config = {k: v for k, v in config.items() if k not in ("expert_dtype", "quantization_config")}
    stored, values = ({k: v for k, v in d.items() if not k.startswith("mtp.")} for d in draw_main(config))
    official.write(tmp_path, config, stored, shards=1)
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    model = load_model(tmp_path)
    same(model, values)
    assert model.numerics.quantize


def draw_main(config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return official.draw({**config, "compress_ratios": [*config["compress_ratios"], 0]}, 5, "fp4", "bf16")


def test_copies_of_embedding_and_head_are_ignored(tmp_path: Path) -> None:
    config = official.published(6, expert_dtype="fp8")
    stored, values = official.draw(config, 6, "fp8", "fp8", f32=True)
    stored["mtp.0.emb.tok_emb.weight"] = stored["embed.weight"].clone()
    stored["mtp.0.head.weight"] = stored["head.weight"].clone()
    same(load_model(official.write(tmp_path, config, stored)), values)


def test_a_drafter_of_another_kind_leaves_the_backbone(tmp_path: Path) -> None:
    config = official.published(7)
    stored, values = official.draw(config, 7)
    stored = {k: v for k, v in stored.items() if not k.startswith("mtp.")}
    for block in range(3):
        stored[f"mtp.{block}.main_proj.weight"] = torch.ones(4, 4, dtype=torch.bfloat16)
    model = load_model(official.write(tmp_path, config, stored))
    same(model, {k: v for k, v in values.items() if not k.startswith("mtp.")})
    assert len(model.mtp) == 0
    assert model.config.dspark


def test_a_slice_reads_only_its_rows(tmp_path: Path) -> None:
    config = official.published(8)
    stored, _ = official.draw(config, 8)
    reader = Reader(official.write(tmp_path, config, stored))
    assert reader.bytes_read == 0
    name = "layers.0.ffn.experts.1.w1.weight"
    assert torch.equal(reader.read(name, slice(5, 9)), stored[name][5:9])
    assert reader.bytes_read == 4 * stored[name].shape[1]
    assert torch.equal(reader.read(name, slice(3, 4), slice(8, 16)), stored[name][3:4, 8:16])
    assert reader.bytes_read == 5 * stored[name].shape[1]


def test_progress_ends_at_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    config = official.published(9)
    stored, _ = official.draw(config, 9)
    seen = []
    load_model(official.write(tmp_path, config, stored), progress=seen.append)
    assert seen[-1].done == seen[-1].total == sum(t.nbytes for t in stored.values())
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].rate > 0
