"""The configuration against the published files, written out here, and against transformers' reading of them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fathom.config import FLASH, PRO, ModelConfig, RopeScaling, preset
from fathom.errors import ConfigError

Json = dict[str, Any]

SHARED: Json = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}
FLASH_JSON: Json = {
    **SHARED,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
    "hidden_size": 4096,
    "index_topk": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_hidden_layers": 43,
    "o_groups": 8,
    "q_lora_rank": 1024,
    "routed_scaling_factor": 1.5,
}
PRO_JSON: Json = {
    **SHARED,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4] + [0],
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}


def without(raw: Json, *names: str) -> Json:
    return {name: value for name, value in raw.items() if name not in names}


def refusal(raw: Json) -> str:
    """The one line that a configuration is refused with."""
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(raw)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "raw"), [("flash", FLASH_JSON), ("pro", PRO_JSON)])
def test_published_files(name: str, raw: Json) -> None:
    config = ModelConfig.from_dict(raw)
    assert config == preset(name)
    for key in raw.keys() - {"compress_ratios", "rope_scaling", "quantization_config"}:
        assert getattr(config, key, raw[key]) == raw[key]
    dropped = {"attention_dropout", "initializer_range", "transformers_version", "use_cache"}
    assert json.loads(json.dumps(config.to_dict())) == without(raw, *dropped)


def test_layer_schedule() -> None:
    assert [i for i in range(44) if FLASH.ratio(i) == 0] == [0, 1, 43]
    assert [i for i in range(44) if FLASH.ratio(i) == 4] == list(range(2, 43, 2))
    assert [i for i in range(62) if PRO.ratio(i) == 128] == [0, *range(1, 60, 2)]
    assert PRO.ratio(61) == 0
    assert [i for i in range(44) if FLASH.is_hash(i)] == [0, 1, 2]


def test_expert_storage() -> None:
    """The first Flash did not say, and was FP4; Base says fp8; a BF16 export has no quantization_config."""
    silent = ModelConfig.from_dict(without(FLASH_JSON, "expert_dtype"))
    assert (silent.expert_dtype, silent.experts_stored) == (None, "fp4")
    assert ModelConfig.from_dict({**FLASH_JSON, "expert_dtype": "fp8"}).experts_stored == "fp8"
    assert "expert_dtype 'int4'" in refusal({**FLASH_JSON, "expert_dtype": "int4"})
    plain = replace(FLASH, quantization_config=None, expert_dtype=None)
    assert plain.experts_stored == "bf16"
    assert ModelConfig.from_dict(plain.to_dict()) == plain


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"architectures": ["DeepseekV41ForCausalLM"]}, "DeepseekV41ForCausalLM"),
        ({"first_k_dense_replace": 3}, "unknown key 'first_k_dense_replace'"),
        ({"engram_layers": [1]}, "unknown key 'engram_layers'"),
        ({"rope_scaling": {**SHARED["rope_scaling"], "type": "linear"}}, "'linear'"),
        ({"rope_scaling": {**SHARED["rope_scaling"], "mscale": 1.0}}, "rope_scaling has the unknown key 'mscale'"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "original_max_position_embeddings"),
        (
            {"quantization_config": {**SHARED["quantization_config"], "weight_block_size": [32, 32]}},
            "weight_block_size",
        ),
        ({"quantization_config": {**SHARED["quantization_config"], "quant_method": "awq"}}, "quant_method is 'awq'"),
        ({"quantization_config": {"modules_to_not_convert": []}}, "modules_to_not_convert"),
        ({"compress_ratios": [0] * 43}, None),
        ({"compress_ratios": [0] * 45}, "45 entries for 44 layers"),
        ({"compress_ratios": [0] * 43 + [8]}, "not of 0, 4 and 128"),
        ({"o_groups": 3}, "o_groups 3 does not divide"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok"),
        ({"num_hash_layers": 44}, "num_hash_layers"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63"),
        ({"qk_rope_head_dim": 512}, "qk_rope_head_dim 512"),
        ({"index_head_dim": 96}, "index_head_dim 96"),
        ({"index_head_dim": 32}, "index_head_dim 32"),
        ({"eos_token_id": 129280}, "eos_token_id"),
        ({"sliding_window": 257}, "sliding_window 257 exceeds 256"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"swiglu_limit": None}, "swiglu_limit is None"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(change: Json, named: str | None) -> None:
    raw = {**FLASH_JSON, **change}
    if named is None:
        assert ModelConfig.from_dict(raw).ratio(43) == 0
    else:
        assert named in refusal(raw)


def test_a_missing_number_is_not_invented() -> None:
    for name in ("sliding_window", "index_topk", "compress_ratios", "rope_scaling", "hc_eps", "vocab_size"):
        assert f"lacks '{name}'" in refusal(without(FLASH_JSON, name))


def _paths(raw: Json, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in raw.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from _paths(value, (*above, name))


def test_no_value_of_a_wrong_kind_gets_through_as_a_crash() -> None:
    theirs = {"layer_types": ["sliding_attention"] * 43, "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40}
    rope = {"main": {"rope_theta": 10000}, "compress": {**SHARED["rope_scaling"], "rope_type": "yarn"}}
    raw = {**FLASH_JSON, **theirs, "compress_ratios": [0] * 44, "rope_parameters": rope, "partial_rotary_factor": 0.125}
    ModelConfig.from_dict(raw)
    junk = (None, 0, -1, 1.5, "x", "", [], [1], ["x"], {}, {"a": 1}, True, [[]], [{}], math.nan, math.inf)
    for *above, last in _paths(raw):
        for value in junk:
            changed = inner = copy.deepcopy(raw)
            for name in above:
                inner = inner[name]
            inner[last] = value
            try:
                ModelConfig.from_dict(changed)
            except ConfigError as error:
                assert str(error)


def test_mtp_entry() -> None:
    """Without an MTP block the published list may still have its entry, or not."""
    for ratios in (FLASH_JSON["compress_ratios"], FLASH_JSON["compress_ratios"][:-1]):
        config = ModelConfig.from_dict({**FLASH_JSON, "num_nextn_predict_layers": 0, "compress_ratios": ratios})
        assert config.compress_ratios == FLASH.compress_ratios[:-1]


def test_dspark_is_recognised() -> None:
    """Its three-block drafter is not the MTP block: the backbone loads alone, and the file is written back whole."""
    raw = {**FLASH_JSON, "num_nextn_predict_layers": 3, "compress_ratios": FLASH_JSON["compress_ratios"] + [0, 0]}
    raw |= {"dspark_block_size": 5, "dspark_markov_rank": 256}
    config = ModelConfig.from_dict(raw)
    assert config.num_nextn_predict_layers == 0
    assert config.compress_ratios == FLASH.compress_ratios[:-1]
    assert config.dspark is not None and config.dspark["dspark_block_size"] == 5
    written = config.to_dict()
    assert {name: written[name] for name in raw if name in written} == {k: v for k, v in raw.items() if k in written}
    assert ModelConfig.from_dict(written) == config


@pytest.fixture(scope="module")
def their_flash() -> Json:
    """What transformers writes after it has read the published Flash file."""
    transformers = pytest.importorskip("transformers")
    return json.loads(transformers.DeepseekV4Config.from_dict(copy.deepcopy(FLASH_JSON)).to_json_string())


def test_transformers_form(their_flash: Json) -> None:
    assert "compress_ratios" not in their_flash and "rope_scaling" not in their_flash
    assert ModelConfig.from_dict(their_flash) == FLASH
    assert ModelConfig.from_dict({**their_flash, **FLASH_JSON}) == FLASH


def test_transformers_reads_ours(their_flash: Json) -> None:
    import transformers

    ours = json.loads(transformers.DeepseekV4Config.from_dict(FLASH.to_dict()).to_json_string())
    assert {k: v for k, v in ours.items() if v != their_flash.get(k)} == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"compress_ratios": [4] * 44}, "compress_ratios twice"),
        ({"num_hash_layers": 2}, "num_hash_layers twice"),
        ({"rope_theta": 1e6}, "rope_theta twice"),
        ({"rope_scaling": {**SHARED["rope_scaling"], "factor": 4}}, "rope_scaling twice"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim twice"),
        ({"compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 128}}, "compress_rates"),
        ({"mlp_layer_types": ["moe", "hash_moe"] + ["moe"] * 41}, "mlp_layer_types"),
        ({"layer_types": ["full_attention"] * 43}, "'full_attention'"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_transformers_form_must_agree(their_flash: Json, change: Json, named: str) -> None:
    assert named in refusal({**their_flash, **change})


def test_attention_factor_is_refused(their_flash: Json) -> None:
    """transformers may derive 1.277 from the YaRN factor; the model has none."""
    raw = copy.deepcopy(their_flash)
    raw["rope_parameters"]["compress"]["attention_factor"] = 1.277
    assert "attention_factor" in refusal(raw)


def test_no_scaling() -> None:
    config = ModelConfig.from_dict({**FLASH_JSON, "rope_scaling": None})
    assert config.rope_scaling is None
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="factor"):
        RopeScaling(factor=-1, original_max_position_embeddings=65536)


def test_load(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(ConfigError) as error:
            ModelConfig.load(folder)
        return str(error.value)

    assert "there is no model folder" in message(tmp_path / "none")
    assert "has no config.json" in message(tmp_path)
    path = tmp_path / "config.json"
    for text, named in (("{", "not valid JSON"), ("[1]", "does not hold a JSON object")):
        path.write_text(text)
        assert named in message(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    assert "not valid JSON" in message(tmp_path)
    path.write_text(json.dumps(PRO_JSON))
    assert ModelConfig.load(tmp_path) == PRO


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="flash, pro or small"):
        preset("large")
