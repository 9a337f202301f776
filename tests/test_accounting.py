"""Accounting against published figures (reference 3.1, 3.3, 5.3, 5.4, 6) and the tensors of the models themselves."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.accounting import (
    Storage,
    Stored,
    TensorSpec,
    by_dtype,
    flops,
    index_key_bytes,
    inventory,
    kv_bytes,
    kv_bytes_per_token,
    layer_kinds,
    mtp_duplicates,
    parameters,
    row_bytes,
    tensors,
    v32_flops,
    v32_kv_bytes,
)
from fathom.cli.main import run
from fathom.config import FLASH, PRO, ModelConfig
from fathom.errors import ConfigError

MILLION = 1_000_000
BASE = Storage("fp8", "fp8", "F32")


# --- tensors and bytes


@pytest.mark.parametrize(
    ("config", "count", "size"),
    [(FLASH, 69_187, 159_609_485_896), (PRO, 145_116, 864_704_792_696)],
    ids=["flash", "pro"],
)
def test_published_checkpoints(config: ModelConfig, count: int, size: int) -> None:
    stored = Stored.of(inventory(config))
    assert (stored.count, stored.bytes) == (count, size)


def test_flash_elements_and_mtp_tensors() -> None:
    specs = list(inventory(FLASH))
    assert Stored.of(specs).elements == 158_069_433_298
    assert sum(spec.name.startswith("mtp.") for spec in specs) == 1_575
    assert len({spec.name for spec in specs}) == len(specs)


def test_flash_by_dtype() -> None:
    """Counts exactly, bytes to the digits that were published."""
    groups = by_dtype(inventory(FLASH))
    assert {name: g.count for name, g in groups.items()} == {
        "I8": 33_792,
        "F8_E8M0": 34_167,
        "F8_E4M3": 375,
        "BF16": 433,
        "F32": 417,
        "I64": 3,
    }
    assert {name: f"{g.bytes / 1e9:.2f}" for name, g in groups.items()} == {
        "I8": "141.73",
        "F8_E8M0": "8.86",
        "F8_E4M3": "6.02",
        "BF16": "2.83",
        "F32": "0.14",
        "I64": "0.02",
    }


def test_base_checkpoints() -> None:
    """FP8 experts and F32 scales; the main part of Flash-Base has 67,612 tensors, and two copies may come on top."""
    flash, pro = list(inventory(FLASH, BASE)), Stored.of(inventory(PRO, BASE))
    assert f"{Stored.of(flash).bytes / 1e9:.2f}" == "292.56"
    assert f"{(Stored.of(flash).bytes + Stored.of(mtp_duplicates(FLASH)).bytes) / 1e9:.2f}" == "294.67"
    assert sum(not spec.name.startswith("mtp.") for spec in flash) == 67_612
    assert f"{pro.bytes / 1e9:.1f}" == "1602.3"
    assert Storage.of(replace(FLASH, expert_dtype="fp8")) == BASE


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("embed.weight", "BF16", (129280, 7168)),
        ("hc_head_fn", "F32", (4, 28672)),
        ("layers.7.hc_attn_fn", "F32", (24, 28672)),
        ("layers.7.hc_ffn_scale", "F32", (3,)),
        ("layers.0.attn.wq_b.weight", "F8_E4M3", (65536, 1536)),
        ("layers.0.attn.wq_b.scale", "F8_E8M0", (512, 12)),
        ("layers.0.attn.wkv.scale", "F8_E8M0", (4, 56)),
        ("layers.0.attn.wo_a.weight", "F8_E4M3", (16384, 4096)),
        ("layers.0.attn.wo_a.scale", "F8_E8M0", (128, 32)),
        ("layers.0.attn.compressor.ape", "F32", (128, 512)),
        ("layers.2.attn.compressor.ape", "F32", (4, 1024)),
        ("layers.2.attn.compressor.wgate.weight", "BF16", (1024, 7168)),
        ("layers.2.attn.indexer.wq_b.scale", "F8_E8M0", (64, 12)),
        ("layers.2.attn.indexer.compressor.wkv.weight", "BF16", (256, 7168)),
        ("layers.2.attn.indexer.compressor.norm.weight", "BF16", (128,)),
        ("layers.2.ffn.gate.tid2eid", "I64", (129280, 6)),
        ("layers.3.ffn.gate.bias", "F32", (384,)),
        ("layers.60.ffn.experts.383.w1.weight", "I8", (3072, 3584)),
        ("layers.60.ffn.experts.383.w2.scale", "F8_E8M0", (7168, 96)),
        ("layers.60.ffn.shared_experts.w2.scale", "F8_E8M0", (56, 24)),
        ("mtp.0.e_proj.scale", "F8_E8M0", (56, 56)),
        ("mtp.0.hc_head_base", "F32", (4,)),
    ],
)
def test_pro_tensors(pro_specs: dict[str, TensorSpec], name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert pro_specs[name] == TensorSpec(name, shape, dtype)


@pytest.fixture(scope="module")
def pro_specs() -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in inventory(PRO)}


def test_what_a_kind_does_not_have(pro_specs: dict[str, TensorSpec]) -> None:
    assert "layers.1.attn.indexer.wq_b.weight" not in pro_specs  # HCA
    assert "mtp.0.attn.compressor.ape" not in pro_specs  # window only
    assert "layers.2.ffn.gate.bias" not in pro_specs  # by token id
    assert "layers.3.ffn.gate.tid2eid" not in pro_specs


@pytest.mark.parametrize("seed", range(6))
def test_inventory_is_what_a_model_has(seed: int) -> None:
    """Names and shapes of drawn models: those that transformers' weights are mapped from in the oracle tests."""
    from tests.oracle import draw_config, shapes

    raw = draw_config(seed)
    specs = {spec.name: spec.shape for spec in inventory(ModelConfig.from_dict(raw), Storage("bf16", "bf16"))}
    assert specs == shapes(raw)


def test_storages() -> None:
    plain = by_dtype(inventory(replace(FLASH, quantization_config=None, expert_dtype=None)))
    assert set(plain) == {"BF16", "F32", "I64"}
    mixed = by_dtype(inventory(FLASH, Storage("fp4", "bf16")))
    assert mixed["I8"].count == mixed["F8_E8M0"].count == 33_792
    with pytest.raises(ConfigError, match="'int4'"):
        Storage("int4")


# --- parameters


def by_formula(c: ModelConfig) -> tuple[int, int, int]:
    """Main, MTP and active parameters, by the closed form of reference 6."""
    d, q, h, g, e, i, k = 4096, 1024, 64, 8, 256, 2048, 6
    if c.hidden_size == 7168:
        d, q, h, g, e, i = 7168, 1536, 128, 16, 384, 3072
    attention = d * q + q + 512 * q * h + 512 * d + 512 + 4096 * 1024 * g + 1024 * g * d + h
    csa = 4 * 512 * d + 4 * 1024 + 512 + 8192 * q + 64 * d + 4 * 128 * d + 4 * 256 + 128
    hca = 2 * 512 * d + 128 * 512 + 512
    rest = 2 * d + 2 * (24 * 4 * d + 27) + e * d + 3 * d * i
    kinds = layer_kinds(c)
    layers = c.num_hidden_layers * (attention + rest) + kinds["csa"] * csa + kinds["hca"] * hca + kinds["scored"] * e
    top = 2 * 129280 * d + d + 16 * d + 5
    main, mtp = layers + top + c.num_hidden_layers * e * 3 * d * i, attention + rest + e + e * 3 * d * i
    return main, mtp + 2 * d * d + 3 * d + 16 * d + 5, layers + top + c.num_hidden_layers * k * 3 * d * i


@pytest.mark.parametrize(
    ("config", "main", "mtp", "total", "active", "embedded"),
    [
        (FLASH, 284_332_240_471, 6_610_048_891, 290_942_289_362, "13.270", "13.800"),
        (PRO, 1_572_997_201_763, 25_840_145_979, 1_598_837_347_742, "48.852", "49.779"),
    ],
    ids=["flash", "pro"],
)
def test_parameters(config: ModelConfig, main: int, mtp: int, total: int, active: str, embedded: str) -> None:
    count = parameters(config)
    assert (count.main, count.mtp, count.total) == (main, mtp, total)
    assert (f"{count.active / 1e9:.3f}", f"{count.active_with_embedding / 1e9:.3f}") == (active, embedded)
    assert (count.main, count.mtp, count.active_with_embedding) == by_formula(config)


def test_parameters_by_part() -> None:
    """The table of reference 6, in billions."""
    parts: dict[str, Callable[[str], bool]] = {
        "core": lambda n: ".attn." in n and "compressor" not in n and "indexer" not in n,
        "compressors": lambda n: ".attn.compressor." in n,
        "indexers": lambda n: ".indexer." in n,
        "gates": lambda n: ".gate." in n,
        "shared": lambda n: ".shared_experts." in n,
        "routed": lambda n: ".experts." in n,
        "ends": lambda n: n in ("embed.weight", "head.weight"),
    }
    for config, published in (
        (FLASH, "4.599 0.262 0.226 0.045 1.082 277.025 1.059"),
        (PRO, "18.294 0.670 0.501 0.168 4.030 1547.396 1.853"),
    ):
        main = [p for p in tensors(config) if not p.name.startswith("mtp.")]
        sums = [sum(p.count for p in main if chosen(p.name)) / 1e9 for chosen in parts.values()]
        assert sums == pytest.approx([float(x) for x in published.split()], abs=0.001)


# --- KV bytes and FLOPs


def test_row_bytes() -> None:
    assert (row_bytes(FLASH), index_key_bytes(FLASH)) == (584, 68)
    assert row_bytes(replace(FLASH, head_dim=128)) == 200
    assert v32_kv_bytes(1) == 48_068 == 61 * (656 + 132)


@pytest.mark.parametrize(
    ("config", "rate", "total", "percent", "times", "fixed"),
    [
        (FLASH, "3514.25", "3.517", "7.32", "13.666", "3.21"),
        (PRO, "5031.44", "5.036", "10.48", "9.545", "4.56"),
    ],
    ids=["flash", "pro"],
)
def test_kv(config: ModelConfig, rate: str, total: str, percent: str, times: str, fixed: str) -> None:
    own, other = kv_bytes(config, MILLION), v32_kv_bytes(MILLION)
    assert f"{kv_bytes_per_token(config):.2f}" == rate
    assert (f"{own / 1e9:.3f}", f"{100 * own / other:.2f}", f"{other / own:.3f}") == (total, percent, times)
    assert f"{kv_bytes(config, 0) / 1e6:.2f}" == fixed
    long = kv_bytes(config, 2**20) / v32_kv_bytes(2**20)
    assert abs(long - own / other) < 5e-5, "the ratios at 2^20 are the same"


def test_kv_grows_by_closed_blocks() -> None:
    """A CSA layer closes an entry every 4 tokens, an HCA layer every 128."""
    steps = [kv_bytes(FLASH, n + 1) - kv_bytes(FLASH, n) for n in range(128)]
    assert steps == [0, 0, 0, 21 * 652] * 31 + [0, 0, 0, 21 * 652 + 20 * 584]
    assert sum(steps) / 128 == kv_bytes_per_token(FLASH)


@pytest.mark.parametrize(
    ("config", "parts", "equivalent", "percent", "times", "at_two_to_the_20"),
    [
        (FLASH, "24.70 1.84 22.61 86.02", "116.6", "10.16", "9.85", "10.1"),
        (PRO, "93.76 3.94 73.58 122.88", "310.2", "27.02", "3.70", "26.7"),
    ],
    ids=["flash", "pro"],
)
def test_flops(
    config: ModelConfig, parts: str, equivalent: str, percent: str, times: str, at_two_to_the_20: str
) -> None:
    f, other = flops(config, MILLION), v32_flops(MILLION)
    assert " ".join(f"{x / 1e9:.2f}" for x in (f.lin8, f.lin16, f.core, f.index)) == parts
    assert f"{f.fp8_equivalent / 1e9:.1f}" == equivalent
    ratio = f.fp8_equivalent / other.fp8_equivalent
    assert (f"{100 * ratio:.2f}", f"{1 / ratio:.2f}") == (percent, times)
    assert f"{100 * flops(config, 2**20).fp8_equivalent / v32_flops(2**20).fp8_equivalent:.1f}" == at_two_to_the_20


def test_v32_flops() -> None:
    f = v32_flops(MILLION)
    parts = (f.lin8, f.lin16, f.absorb, f.core, f.index)
    assert " ".join(f"{x / 1e9:.2f}" for x in parts) == "70.78 2.12 2.05 34.80 999.42"
    assert f"{f.fp8_equivalent / 1e9:.1f}" == "1148.1"
    raw = [f"{100 * flops(config, MILLION).raw / f.raw:.1f}" for config in (PRO, FLASH)]
    assert raw == ["26.5", "12.2"]


def test_flops_are_the_active_weights() -> None:
    """Each weight that a token meets is one multiply-add, but for norms, biases and hc_head."""
    for config in (FLASH, PRO):
        linear = (flops(config, 0).lin8 + flops(config, 0).lin16) / 2
        assert 0.999 < linear / parameters(config).active <= 1


# --- the command


def test_inspect_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--model", "flash", "--context", "1000000", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["layers"] == {"main": 43, "swa": 2, "csa": 21, "hca": 20, "hash": 3, "scored": 40, "mtp": 1}
    assert out["parameters"]["main"] == 284_332_240_471
    assert (out["checkpoint"]["tensors"], out["checkpoint"]["bytes"]) == (69_187, 159_609_485_896)
    assert (f"{out['kv']['times_less']:.1f}", f"{out['flops']['ratio']:.2f}") == ("13.7", "0.10")


def test_inspect_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--model", "pro"]) == 0
    out = capsys.readouterr().out
    for text in ("1,572,997,201,763", "145,116", "864,704,792,696", "5,031.44", "10.48%", "27.02%"):
        assert text in out


def test_inspect_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder, what the files hold is told beside what the configuration asks for."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(FLASH.to_dict()))
    save_file(
        {"norm.weight": torch.zeros(4096, dtype=torch.bfloat16)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert run(["inspect", "--model", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == {"files": 1, "tensors": 1, "bytes": 8192}
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damage in (b"", b"\xff" * 8, whole[:-1], whole[:20], whole + b"x", b"\2" + b"\0" * 7 + b"[]"):
        (tmp_path / "model.safetensors").write_bytes(damage)
        assert run(["inspect", "--model", str(tmp_path)]) == 2
        assert "model.safetensors has" in capsys.readouterr().err


def test_inspect_a_folder_in_other_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FP8 experts with E8M0 scales, or BF16 linears beside FP4 experts: config.json says neither, the files do."""
    for flags in (["--experts", "fp8"], ["--linears", "bf16"], ["--experts", "bf16", "--linears", "bf16"]):
        out = str(tmp_path / "".join(flags))
        assert run(["convert", "--random", "--model", "small", "--layers", "3", *flags, out]) == 0
        capsys.readouterr()
        assert run(["inspect", "--model", out, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        expected, files = told["checkpoint"], told["files"]
        assert (expected["tensors"], expected["bytes"]) == (files["tensors"], files["bytes"])


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kv.svg"
    assert run(["inspect", "--model", "flash", "--plot", str(path)]) == 0
    root = ElementTree.parse(path).getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in ("5.04 GB, 9.5× less", "3.52 GB, 13.7× less", "310 GFLOP, 3.7× less", "117 GFLOP, 9.8× less"):
        assert text in texts
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 < x < width and 0 < y < height
    assert [p.name for p in tmp_path.iterdir()] == ["kv.svg"]


def test_the_picture_in_the_docs_is_current() -> None:
    from fathom.cli.inspect import picture

    assert (Path(__file__).parent.parent / "docs" / "kv_flops.svg").read_text(encoding="utf-8") == picture()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "nowhere"], "no model folder nowhere"),
        (["--model", "flash", "--plot", "picture.png"], "ends in .svg"),
        (["--model", "flash", "--plot", "/nowhere/picture.svg"], "that folder does not exist"),
        (["--model", "flash", "--context", "0"], "context"),
    ],
)
def test_bad_input(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and named in err and err.count("\n") == 1
