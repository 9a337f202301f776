"""Conversions keep what they must keep; transformers opens the BF16 export and computes the same."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.checkpoint.convert import convert
from fathom.checkpoint.load import check_drafting, load_model
from fathom.checkpoint.random import first_layers, write_random
from fathom.checkpoint.reader import Reader
from fathom.cli.main import run
from fathom.config import WEIGHTS, ModelConfig
from fathom.errors import CheckpointError, ConfigError, FormatError
from tests import oracle
from tests.checkpoint import official


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = Reader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.float() for name, t in load_model(folder).state_dict().items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = official.published(21, index_n_heads=32)
    folder = official.write(tmp_path_factory.mktemp("source"), config, official.draw(config, 21)[0])
    (folder / "tokenizer.json").write_text("{}")
    (folder / "fathom.json").write_text('{"dialect": "april"}')
    (folder / "notes.txt").write_text("not the model's")
    return folder


def test_nothing_asked_is_a_copy(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", max_shard=2_000_000)
    equal(tensors(tmp_path / "out"), tensors(source))
    assert ModelConfig.load(tmp_path / "out") == ModelConfig.load(source)
    beside = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert beside == {"config.json", "model.safetensors.index.json", "tokenizer.json", "fathom.json"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_floats_that_are_wider_than_published_stay_so(tmp_path: Path) -> None:
    config = official.published(22)
    stored, _ = official.draw(config, 22)
    stored["norm.weight"] = torch.full_like(stored["norm.weight"], 1.0, dtype=torch.float32) + 1e-6
    convert(official.write(tmp_path / "in", config, stored), tmp_path / "out", experts="fp8")
    assert torch.equal(tensors(tmp_path / "out")["norm.weight"], stored["norm.weight"])


def test_fp4_repacked_as_fp8_has_the_same_values(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", experts="fp8")
    found = tensors(tmp_path / "out")
    assert found["layers.0.ffn.experts.0.w1.weight"].dtype == torch.float8_e4m3fn
    assert found["mtp.0.ffn.experts.2.w2.scale"].dtype == torch.float8_e8m0fnu
    assert ModelConfig.load(tmp_path / "out").expert_dtype == "fp8"
    want, got = values(source), values(tmp_path / "out")
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_spread_that_fp8_cannot_hold_is_refused_unless_lossy(tmp_path: Path) -> None:
    config = official.published(23)
    stored, _ = official.draw(config, 23)
    name = "layers.1.ffn.experts.2.w3"
    stored[f"{name}.scale"].view(torch.uint8)[7, 1] = 90
    folder = official.write(tmp_path / "in", config, stored)
    with pytest.raises(FormatError, match=rf"{name}.*--lossy"):
        convert(folder, tmp_path / "out", experts="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    convert(folder, tmp_path / "out", experts="fp8", lossy=True)
    want, got = values(folder), values(tmp_path / "out")
    different = [n for n in want if not torch.equal(want[n], got[n])]
    assert different == ["layers.1.ffn.experts.w13"]
    assert torch.allclose(want[different[0]], got[different[0]], atol=2.0**-20)


def test_scales_that_are_no_powers_of_two_do_not_fit_bf16(tmp_path: Path) -> None:
    config = official.published(24, expert_dtype="fp8")
    stored, _ = official.draw(config, 24, "fp8", "fp8", f32=True)
    stored["layers.0.attn.wkv.scale"] *= 1.1
    folder = official.write(tmp_path / "in", config, stored)
    with pytest.raises(FormatError, match=r"layers\.0\.attn\.wkv"):
        convert(folder, tmp_path / "out", experts="bf16", linears="bf16")
    convert(folder, tmp_path / "out", experts="bf16", linears="bf16", lossy=True)


@pytest.mark.parametrize(("experts", "linears"), [("bf16", None), ("bf16", "fp8"), ("int4", None), (None, "fp4")])
def test_forms_that_no_configuration_describes(
    source: Path, tmp_path: Path, experts: str | None, linears: str | None
) -> None:
    with pytest.raises(FormatError):
        convert(source, tmp_path / "out", experts=experts, linears=linears)
    assert list(tmp_path.iterdir()) == []


def test_a_drafter_comes_along_and_is_refused_for_drafting(tmp_path: Path) -> None:
    config = official.published(25)
    stored, _ = official.draw(config, 25)
    stored = {k: v for k, v in stored.items() if not k.startswith("mtp.")}
    weight, scale, _ = official.fp8(official.np.random.default_rng(1), (128, 256), False)
    stored |= {"mtp.2.main_proj.weight": weight, "mtp.2.main_proj.scale": scale, "mtp.0.markov_head.x": torch.ones(3)}
    folder = official.write(tmp_path / "in", config, stored)
    convert(folder, tmp_path / "same")
    equal(tensors(tmp_path / "same"), stored)
    convert(folder, tmp_path / "out", experts="bf16", linears="bf16")
    found = tensors(tmp_path / "out")
    assert found["mtp.2.main_proj.weight"].dtype == torch.bfloat16
    assert "mtp.2.main_proj.scale" not in found
    model = load_model(tmp_path / "out")
    with pytest.raises(CheckpointError, match="DSpark"):
        check_drafting(model.config)


def test_a_model_without_a_prediction_block_cannot_draft() -> None:
    config = official.published(26, num_nextn_predict_layers=0, compress_ratios=[0, 4, 128])
    with pytest.raises(CheckpointError, match="MTP"):
        check_drafting(ModelConfig.from_dict(config))
    check_drafting(ModelConfig.from_dict(official.published(26)))


# --- transformers


@pytest.mark.parametrize("seed", [31, 32])
def test_transformers_opens_the_bf16_export_and_computes_the_same(
    tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import DeepseekV4ForCausalLM

    torch.set_num_threads(1)
    ratios = random.Random(seed).choice([[4, 128, 0, 0], [128, 4, 4, 0]])
    write_random(tmp_path / "in", ModelConfig.from_dict(official.published(seed, compress_ratios=ratios)), seed=seed)
    convert(tmp_path / "in", tmp_path / "out", experts="bf16", linears="bf16", max_shard=3_000_000)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded: tuple[Any, dict[str, Any]] = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    theirs, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_model(tmp_path / "out")
    assert not ours.numerics.quantize
    ids = torch.randint(0, 60, (1, 150), generator=torch.Generator().manual_seed(seed))
    margins = oracle.Margins(theirs, official.published(seed, compress_ratios=ratios))
    with torch.inference_mode():
        want = theirs.eval()(ids, use_cache=False).logits[0]
        got = oracle.packed_logits(ours, [ids[0].tolist()])[0]
    safe = margins.safe(1, 150)[0]
    assert safe >= 100
    assert oracle.relative_error(got[:safe], want[:safe]) <= 1e-4


# --- random checkpoints


def test_a_random_checkpoint_depends_on_its_seed_only(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(official.published(27))
    for name, seed, shard in (("a", 1, None), ("b", 1, 1_000_000), ("c", 2, None)):
        write_random(tmp_path / name, config, seed=seed, max_shard=shard)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    equal(a, b)
    assert a.keys() == c.keys()
    alike = [n for n in a if torch.equal(a[n].view(torch.uint8), c[n].view(torch.uint8))]
    assert all(a[n].numel() < 10 for n in alike)


@pytest.mark.parametrize(("experts", "linears"), [("fp4", "fp8"), ("fp8", "fp8"), ("bf16", "bf16")])
def test_a_random_checkpoint_is_a_model_that_computes(tmp_path: Path, experts: str, linears: str) -> None:
    config = ModelConfig.from_dict(official.published(28))
    write_random(tmp_path / "out", config, experts=experts, linears=linears)
    model = load_model(tmp_path / "out")
    logits = oracle.packed_logits(model, [list(range(50))])[0]
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 30
    tables = [t for name, t in model.state_dict().items() if name.endswith("tid2eid")]
    assert tables and all(len(set(row)) == len(row) for table in tables for row in table.tolist())
    assert {int(i) for table in tables for i in table.flatten()} == set(range(config.n_routed_experts))


def test_the_first_layers_of_a_model(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(official.published(29))
    short = first_layers(config, 2)
    assert (short.num_hidden_layers, short.compress_ratios, short.num_hash_layers) == (2, (0, 4, 0), 1)
    write_random(tmp_path / "out", config, layers=2)
    assert load_model(tmp_path / "out").config == short
    for layers in (0, 4):
        with pytest.raises(ConfigError, match=rf"{layers}.*3"):
            write_random(tmp_path / "none", config, layers=layers)


# --- the command


def test_the_command_converts(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["convert", str(source), str(out), "--experts", "bf16", "--linears", "bf16"]) == 0
    assert load_model(out).numerics.quantize is False
    assert run(["convert", "--random", "--model", str(source), "--layers", "1", str(tmp_path / "random")]) == 0
    assert load_model(tmp_path / "random").config.num_hidden_layers == 1
    assert run(["convert", "small", str(tmp_path / "small")]) == 0
    equal(tensors(tmp_path / "small"), tensors(WEIGHTS / "small"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["IN"], "OUT"),
        (["IN", "IN"], "empty folder"),
        (["IN", "OUT", "--experts", "fp5"], "fp5"),
        (["IN", "OUT", "--experts", "bf16"], "linears"),
        (["none", "OUT"], "none"),
        (["flash", "OUT"], "without weights"),
        (["IN", "OUT", "--layers", "2"], "--random"),
        (["IN", "OUT", "--seed", "2"], "--random"),
        (["OUT", "--random", "--model", "IN", "--lossy"], "--lossy"),
        (["OUT", "--random"], "--model"),
        (["OUT", "--random", "--model", "huge"], "huge"),
        (["OUT", "--random", "--model", "IN", "--layers", "9"], "9"),
    ],
)
def test_the_command_refuses(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    paths = {"IN": str(source), "OUT": str(tmp_path / "out")}
    assert run(["convert", *(paths.get(a, a) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert word in err
    assert list(tmp_path.iterdir()) == []
