"""`fathom bench` on a GPU, as far as it goes without one: what it refuses, what it puts there, and what it prints."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest
import torch

from fathom.api import Event, FinishReason, GenerateRequest, Ticket
from fathom.checkpoint.synthetic import synthetic_model
from fathom.cli.bench_decode import closing, through_engine
from fathom.cli.bench_device import DeviceJob, by_kernel, gpu, whole_config
from fathom.cli.bench_fill import filled
from fathom.cli.bench_floor import step_bytes
from fathom.cli.bench_prefill import Prompt, chunk_sizes, random_ids
from fathom.cli.bench_table import lines
from fathom.cli.main import run
from fathom.config import FLASH, ModelConfig, Quantization
from fathom.engine.device_cache import DeviceCache
from fathom.engine.graphs import Steps
from fathom.engine.stream import Blocking, Sink
from fathom.errors import CheckpointError, ConfigError
from fathom.model.batch import Batch
from fathom.model.layers import Numerics
from tests.oracle import draw_config, relative_error

SYNTHETIC = ["decode", "--model", "flash", "--synthetic"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (SYNTHETIC, ["needs a GPU", "--synthetic"]),
        ([*SYNTHETIC, "--rank-of-two", "--index-keys", "fp4", "--batch", "8"], ["needs a GPU"]),
        (["prefill", "--model", "small", "--device", "cuda"], ["needs a GPU"]),
        ([*SYNTHETIC, "--peer", "transformers", "--ratios", "0,4,128"], ["needs a GPU"]),
        ([*SYNTHETIC, "--device", "cpu"], ["--device cpu"]),
        ([*SYNTHETIC, "--threads", "2"], ["--threads", "a GPU"]),
        ([*SYNTHETIC, "--tokens", "2"], ["--tokens", "a GPU"]),
        ([*SYNTHETIC, "--chunk", "2"], ["--chunk", "decode"]),
        ([*SYNTHETIC, "--index-keys", "int4"], ["--index-keys", "int4", "fp8 or fp4"]),
        ([*SYNTHETIC, "--ratios", "0,8"], ["--ratios", "0,8"]),
        ([*SYNTHETIC, "--ratios", "0,4", "--layers", "2"], ["--layers"]),
        ([*SYNTHETIC, "--layers", "44"], ["--layers 44", "43"]),
        ([*SYNTHETIC, "--context", "1048577"], ["1048577", "1048576"]),
        ([*SYNTHETIC, "--max-context", "1048577"], ["1048577", "1048576"]),
        (["prefill", "--model", "flash", "--synthetic", "--max-context", "9"], ["--max-context", "prefill"]),
        (["decode", "--max-context", "9"], ["--max-context", "a CPU"]),
        ([*SYNTHETIC, "--tp", "2"], ["--tp 2", "torchrun", "--rank-of-two"]),
        ([*SYNTHETIC, "--rank-of-two", "--tp", "4"], ["--tp 4"]),
        ([*SYNTHETIC, "--peer", "transformers", "--batch", "2"], ["--batch", "--peer"]),
        (["prefill", "--model", "flash", "--synthetic", "--batch", "2"], ["--batch", "prefill"]),
        (["decode", "--model", "flash", "--device", "cuda"], ["flash", "--synthetic"]),
        (["decode", "--device", "cuda", "--layers", "2"], ["--layers", "--synthetic"]),
        (["decode", "--device", "cuda", "--rank-of-two"], ["needs a GPU"]),
        (["kernels", "--device", "cuda"], ["kernels", "benchmarks/kernels.py"]),
    ],
)
def test_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert run(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert all(word in err for word in words), err


def job(**fields: object) -> DeviceJob:
    return DeviceJob(**{"mode": "decode", "model": "flash", "synthetic": True, "contexts": (4096,), **fields})


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), ("cuda:1", 1)])
def test_times_are_taken_on_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert gpu(name) == torch.device(name) and current == [number]


def test_layers_of_a_kind() -> None:
    assert whole_config(job()).compress_ratios == FLASH.compress_ratios[:43]
    assert whole_config(job(layers=4)).compress_ratios == (0, 0, 4, 128)
    chosen = whole_config(job(ratios=(0, 4)))
    assert (chosen.num_hidden_layers, chosen.num_hash_layers, chosen.num_nextn_predict_layers) == (2, 2, 0)
    with pytest.raises(CheckpointError):
        whole_config(job(synthetic=False))
    with pytest.raises(ConfigError):
        whole_config(job(model="nowhere"))


@pytest.mark.parametrize("packed", [True, False])
def test_a_filled_cache_holds_numbers_of_usual_size(packed: bool) -> None:
    config = ModelConfig.from_dict(
        draw_config(3, blocked=True, num_hidden_layers=3, compress_ratios=[0, 4, 128, 0], head_dim=128)
    )
    cache = filled(DeviceCache(config, 2, 8, 1024, "cpu", packed_keys=packed))
    everything = torch.arange(32)
    for memory in cache.layers:
        for rows in (memory.window, memory.entries):
            if rows is not None:
                values = rows.read(everything[: rows.data.shape[0] * rows.per]).float()
                assert values.isfinite().all() and 0.1 < values.std() < 10
    keys = cache.layers[1].keys
    assert keys is not None
    values = keys.read(everything).float()
    assert values.isfinite().all() and 0.3 < values.std() < 3 and len(values.unique(dim=0)) == 32


def test_chunks_of_a_prompt() -> None:
    assert chunk_sizes(20000, 8192) == [8192, 8192, 3616]


def decode_report(**changed: object) -> dict[str, object]:
    row = {
        "context": 1 << 20, "batch": 8, "seconds": 0.00512, "low": 0.005, "high": 0.0064, "runs": 30,
        "all_reduce_seconds": 0.00054, "tokens_per_second": 1562.0, "tokens_per_second_with_sums": 1413.0,
        "floor_seconds": 0.00256, "own_floor_seconds": 0.0025, "experts": 41.5, "bytes_per_second": 2.1e12,
        "ready_seconds": 12.5, "kv_bytes": 4.03e9, "kv_counted": 3.99e9, "kv_of_v32": 50.4e9,
    }  # fmt: skip
    launch = [{"kernel": f"k{n}", "count": 2, "seconds": 1e-6 * (40 - n)} for n in range(40)]
    kind = {
        "mode": "decode",
        "model": "flash",
        "synthetic": True,
        "ranks": 2,
        "together": False,
        "layers": 43,
        "keys": "fp8",
    }
    where = {"device": "NVIDIA H200", "torch": "2.11", "cuda": "13.0", "triton": "3.6", "commit": "abc"}
    measured = {"weights_bytes": 7.8e10, "weights_seconds": 3.0, "rows": [row], "launches": launch, "peer": None}
    return {**kind, **where, **measured, **changed}


def test_words_of_a_decode_report() -> None:
    text = list(lines(decode_report()))
    assert "one rank of 2" in text[0] and "NVIDIA H200" in text[1] and "commit abc" in text[1]
    assert "a cache for 2097152 tokens" in next(iter(lines(decode_report(max_context=1 << 21))))
    table = [line for line in text if line.startswith("| 1048576")]
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == [
        "1048576", "8", "5.120", "5.000-6.400", "0.54", "1562", "1413", "2.56", "2.00",
    ]  # fmt: skip
    whole = "\n".join(text)
    assert "12.5 times as much" in whole and "41.5 experts a layer" in whole and "16 others" in whole
    assert max(map(len, text)) <= 140


def test_how_often_tokens_close_blocks() -> None:
    """By counting: of 128 tokens one closes a block of 128, and of 4, and 31 more one of 4."""
    for context in (4096, 131072, 4094, 1):
        kinds = [0, 0, 0]
        for position in range(max(0, context - 128), context):
            kinds[2 if (position + 1) % 128 == 0 else 1 if (position + 1) % 4 == 0 else 0] += 1
        assert [often for _, often in closing(context)] == [n for n in kinds if n]
        assert all(max(0, context - 128) <= position < context for position, _ in closing(context))
    kinds = [{"position": p, "often": n, "seconds": s} for p, n, s in ((4094, 96, 0.0038), (4091, 32, 0.004))]
    row = decode_report()["rows"][0] | {"kinds": kinds}
    text = "\n".join(lines(decode_report(rows=[row])))
    assert "96 of 3.800 ms, 32 of 4.000 ms" in text and "last position alone" not in text


def test_what_a_launch_adds() -> None:
    """Two kernels that overlap: the second ends 3 us after the first, whose span holds a third one."""
    rows = by_kernel([(10.0, 20.0, "a"), (12.0, 18.0, "b"), (15.0, 23.0, "c"), (25.0, 26.0, "a")])
    assert {row["kernel"]: (row["count"], round(1e6 * row["added"], 3)) for row in rows} == {
        "a": (2, 13.0), "b": (1, 0.0), "c": (1, 3.0)
    }  # fmt: skip
    assert sum(row["added"] for row in rows) == pytest.approx(16e-6)
    text = "\n".join(lines(decode_report(launches=rows)))
    assert "| c " in text and "3.0" in text


def test_words_of_other_reports() -> None:
    row = {
        "context": 32768, "chunk": 8192, "seconds": 2.0, "low": 1.9, "high": 2.2, "all_reduce_seconds": 0.7,
        "tokens_per_second": 16384.0, "tokens_per_second_with_sums": 12136.0, "floor_seconds": 0.5,
        "index_share": 0.5, "chunks": [0.5, 0.5],
    }  # fmt: skip
    text = "\n".join(lines(decode_report(mode="prefill", rows=[row], launches=None)))
    assert "| 16384 " in text and "2 chunks" in text and "50%" in text
    peer = {
        "context": 1024, "seconds": 0.001, "low": 0.001, "high": 0.0012, "peer_seconds": 0.0273,
        "peer_low": 0.026, "peer_high": 0.03, "ratio": 27.3, "agreement": 0.999,
    }  # fmt: skip
    changed = {"ranks": 1, "launches": None, "peer": "transformers", "peer_version": "5.17", "experts": 256}
    text = "\n".join(lines(decode_report(rows=[peer], **changed)))
    assert "transformers 5.17" in text and "27.3" in text and "27.30" in text


class Metronome(Blocking):
    """Answers that begin one after the other and then come a token every 3 ms."""

    def submit(self, request: GenerateRequest, sink: Sink) -> Ticket:
        def play() -> None:
            for i in range(request.params.max_tokens or 0):
                time.sleep(0.003)
                sink(Event(token=i))
            sink(Event(finish=FinishReason.LENGTH))

        time.sleep(0.05)
        threading.Thread(target=play).start()
        return cast(Ticket, None)


def test_an_engine_is_timed_while_all_answers_come() -> None:
    row = through_engine(Metronome(), 100, 10, 4, tokens=64)
    assert 0.003 <= row["seconds"] < 0.006 and 32 < row["steps"] < 96 and row["batch"] == 4
    with pytest.raises(ConfigError, match="all 8 answers"):
        through_engine(Metronome(), 100, 10, 8, tokens=32)


class Poor(Blocking):
    """Has no memory for the second answer."""

    def submit(self, request: GenerateRequest, sink: Sink) -> Ticket:
        self.asked = getattr(self, "asked", 0) + 1
        sink(Event(token=1))
        sink(Event(finish=FinishReason.ERROR, error="out of memory") if self.asked == 2 else END)
        return cast(Ticket, None)


END = Event(finish=FinishReason.LENGTH)


def test_an_engine_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match="out of memory"):
        through_engine(Poor(), 100, 10, 3)


def test_the_page_of_all_figures() -> None:
    from benchmarks.gpu_page import figures, page

    parts = {"long": decode_report(), "first": decode_report(first_token={"seconds": 31.0, "sizes": [1, 2]})}
    del parts["first"]["rows"]
    parts["engine"] = parts["first"] | {"engine": [{"context": 9, "batch": 2, "seconds": 0.004, "steps": 7}]}
    assert figures(parts)["first token, s, 2 graphs"][0] == 31
    parts["first"]["first_token"] |= {"graphs": 4}
    assert figures(parts)["first token, s, 4 graphs"][0] == 31
    assert figures(parts)["decode 9 x 2 by an engine, ms"][0] == 4 and "by an engine: 4.00 ms" in "\n".join(page(parts))
    assert figures(parts)["decode 1048576 x 8, fp8 keys, ms"] == pytest.approx((5.12, 5.66, 2.56))
    text = "\n".join(page(parts))
    assert "## long" in text and "First token 31.0 s" in text and "| 2 " in text


@pytest.fixture
def clone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("transformers")
    yield


@torch.inference_mode()
def test_transformers_gets_our_weights(clone: None) -> None:
    """Every tensor in its place: the same logits after a prompt and a step, quantisers off, in float32."""
    from benchmarks.peers.transformers_gpu import Theirs

    raw = draw_config(
        7, blocked=True, num_hidden_layers=3, compress_ratios=[0, 4, 128], num_nextn_predict_layers=0,
        num_hash_layers=1, head_dim=128, moe_intermediate_size=128, vocab_size=128,
    )  # fmt: skip
    config = replace(ModelConfig.from_dict(raw), expert_dtype="fp4", quantization_config=Quantization())
    ours = synthetic_model(config, Numerics(torch.float32, quantize=False), "cpu", seed=4)
    theirs = Theirs(ours, torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 128, (141,), generator=torch.Generator().manual_seed(1))
    want = ours.logits(ours(ids, Batch.packed([141])))
    assert relative_error(theirs.prefill(ids[:140]), want[139]) < 1e-3
    assert relative_error(theirs.step(ids[140:]), want[140]) < 1e-3
    rounded = Theirs(ours, torch.device("cpu"))
    assert relative_error(rounded.prefill(ids[:140]).float(), want[139]) < 0.1
    assert rounded.step(ids[140:]).dtype == torch.bfloat16


def test_more_experts_are_more_to_read() -> None:
    few, all_of = step_bytes(FLASH, 4096, 8, experts=10), step_bytes(FLASH, 4096, 8, experts=256)
    assert all_of.experts == pytest.approx(25.6 * few.experts) and all_of.always == few.always


@torch.inference_mode()
def test_a_prompt_in_chunks_gives_what_one_call_gives() -> None:
    """The path that prefill is measured on, with the ops' references, and the step that goes on from it."""
    raw = draw_config(
        7, blocked=True, num_hidden_layers=3, compress_ratios=[0, 4, 128], num_nextn_predict_layers=0,
        num_hash_layers=1, head_dim=128, moe_intermediate_size=128, vocab_size=128,
    )  # fmt: skip
    config = replace(ModelConfig.from_dict(raw), expert_dtype="fp4", quantization_config=Quantization())
    model = synthetic_model(config, Numerics(torch.bfloat16, quantize=True), "cpu", seed=4)
    ids = random_ids(config, 300)
    prompts = [Prompt(model, torch.device("cpu"), ids, chunk, packed=False, room=4) for chunk in (128, 300)]
    # Not the same bits: how a CPU sums products in BF16 may depend on the number of rows.
    assert relative_error(prompts[0].all(), prompts[1].all()) < 0.1
    assert Steps(model, prompts[0].cache).run([5], [300], [0]).isfinite().all()
