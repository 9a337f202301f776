"""`fathom inspect`: what a model consists of and what a token of it costs, from its configuration alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fathom.accounting import (
    Flops,
    Storage,
    Stored,
    by_dtype,
    flops,
    inventory,
    kv_bytes,
    kv_bytes_per_token,
    layer_kinds,
    parameters,
    v32_flops,
    v32_kv_bytes,
)
from fathom.config import FLASH, PRO, ModelConfig, preset
from fathom.errors import CheckpointError, ConfigError

KINDS = {
    "swa": "SWA, window only",
    "csa": "CSA, ratio 4",
    "hca": "HCA, ratio 128",
    "hash": "routed by token id",
    "scored": "routed by score",
}
_LINEARS = {"F8_E4M3": "fp8", "BF16": "bf16", "F32": "bf16"}
_EXPERTS = {"I8": "fp4", **_LINEARS}
_SCALES = {"F8_E8M0": "F8_E8M0", "F32": "F32"}


def inspect(model: str, context: int, as_json: bool, plot: str | None) -> None:
    """Print the figures of a preset or folder at `context` tokens; with `plot`, draw the family's to that file too.

    Raises ConfigError for an unknown model or a picture that is not SVG, CheckpointError for a damaged weight file.
    """
    if plot and not plot.endswith(".svg"):
        raise ConfigError(f"--plot writes SVG, not {plot!r}: give a name that ends in .svg")
    if plot and not Path(plot).absolute().parent.is_dir():
        raise ConfigError(f"--plot {plot}: that folder does not exist, make it first")
    known = model in ("flash", "pro", "small")
    config = preset(model) if known else ModelConfig.load(model)
    dtypes, files = ({}, None) if known else stored_files(Path(model))
    figures = {"model": model, **report(config, context, stored_as(config, dtypes)), "files": files}
    if plot:
        _write(Path(plot), picture())
    if as_json:
        print(json.dumps(figures))
    else:
        show(figures)


def report(config: ModelConfig, context: int, storage: Storage) -> dict[str, Any]:
    """All figures, ready for JSON. Bytes, parameters, FLOPs; ratios are to V3.2 at the same context."""
    count = parameters(config)
    groups = by_dtype(inventory(config, storage))
    main = {"main": count.main, "mtp": count.mtp, "total": count.total, "active": count.active}
    return {
        "context": context,
        "max_position_embeddings": config.max_position_embeddings,
        "layers": {"main": config.num_hidden_layers, **layer_kinds(config), "mtp": config.num_nextn_predict_layers},
        "drafter": "DSpark, not run" if config.dspark else None,
        "parameters": {**main, "active_with_embedding": count.active_with_embedding, "routed": count.routed},
        "checkpoint": {
            "tensors": sum(g.count for g in groups.values()),
            "bytes": sum(g.bytes for g in groups.values()),
            "storage": {"experts": storage.experts, "linears": storage.linears, "scales": storage.scales},
            "by_dtype": {name: {"tensors": g.count, "bytes": g.bytes} for name, g in groups.items()},
        },
        "kv": _kv(config, context),
        "flops": _flops(config, context),
    }


def _kv(config: ModelConfig, context: int) -> dict[str, float]:
    own, other = kv_bytes(config, context), v32_kv_bytes(context)
    rate = kv_bytes_per_token(config)
    return {"bytes": own, "bytes_per_token": rate, "v32_bytes": other, "ratio": own / other, "times_less": other / own}


def _flops(config: ModelConfig, context: int) -> dict[str, float]:
    def classes(f: Flops) -> dict[str, float]:
        return {"lin8": f.lin8, "lin16": f.lin16 + f.absorb, "core": f.core, "index": f.index}

    own, other = flops(config, context), v32_flops(context)
    equal, theirs = own.fp8_equivalent, other.fp8_equivalent
    ratios = {"v32_fp8_equivalent": theirs, "ratio": equal / theirs, "times_less": theirs / equal}
    return {**classes(own), "fp8_equivalent": equal, **ratios}


def stored_files(folder: Path) -> tuple[dict[str, str], dict[str, int] | None]:
    """What the safetensors files hold, by their headers: each tensor's dtype, and the sums (None: no files)."""
    paths = sorted(folder.glob("*.safetensors"))
    dtypes: dict[str, str] = {}
    sums = [_header_sums(path, dtypes) for path in paths]
    if not paths:
        return dtypes, None
    return dtypes, {"files": len(paths), "tensors": sum(s.count for s in sums), "bytes": sum(s.bytes for s in sums)}


def stored_as(config: ModelConfig, dtypes: Mapping[str, str]) -> Storage:
    """The form of the weights. Tensors decide where there are any: config.json knows neither scales nor mixtures."""
    said, linear, expert = Storage.of(config), "layers.0.attn.wq_a", "layers.0.ffn.experts.0.w1"
    return Storage(
        _EXPERTS.get(dtypes.get(f"{expert}.weight", ""), said.experts),
        _LINEARS.get(dtypes.get(f"{linear}.weight", ""), said.linears),
        _SCALES.get(dtypes.get(f"{expert}.scale", dtypes.get(f"{linear}.scale", "")), said.scales),
    )


def _header_sums(path: Path, dtypes: dict[str, str]) -> Stored:
    """Tensors and bytes by the header: its length in 8 bytes, then JSON with dtype and ends of each tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: Any = json.loads(file.read(length)) if length <= size else None
            found = {name: t for name, t in header.items() if name != "__metadata__"}
            spans = [t["data_offsets"] for t in found.values()]
            dtypes |= {name: str(t["dtype"]) for name, t in found.items()}
            count, end = len(spans), max((end for _, end in spans), default=0)
            held = sum(end - begin for begin, end in spans)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{path} has no readable safetensors header: fetch the file again") from None
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path} has {size:,} bytes and not the {8 + length + end:,} of its header: fetch it again"
        )
    return Stored(count, held, 0)


# --- for people


def show(figures: dict[str, Any]) -> None:
    """The figures as a table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{figures['model']} at {figures['context']:,} tokens of context")
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", style="bold")
    table.add_column("", justify="right")
    table.add_column("")
    for section in (_layer_rows, _parameter_rows, _checkpoint_rows, _cost_rows):
        for row in section(figures):
            table.add_row(*row)
        table.add_section()
    Console().print(table)


Rows = list[tuple[str, str, str]]


def _layer_rows(figures: dict[str, Any]) -> Rows:
    layers = figures["layers"]
    rows = [("layers", f"{layers['main']}", f"and {layers['mtp']} MTP")]
    rows += [(f"  {name}", f"{layers[kind]}", "") for kind, name in KINDS.items()]
    return rows + ([("drafter", "", figures["drafter"])] if figures["drafter"] else [])


def _parameter_rows(figures: dict[str, Any]) -> Rows:
    p = figures["parameters"]
    return [
        ("parameters", f"{p['main']:,}", _short(p["main"]) + ", MTP left out"),
        ("  with MTP", f"{p['total']:,}", _short(p["total"])),
        ("  active a token", f"{p['active']:,}", _short(p["active"]) + " without the embedding"),
    ]


def _checkpoint_rows(figures: dict[str, Any]) -> Rows:
    stored, files = figures["checkpoint"], figures["files"]
    rows = [
        ("tensors", f"{stored['tensors']:,}", ""),
        ("bytes", f"{stored['bytes']:,}", _short(stored["bytes"]) + "B"),
        *((f"  {name}", f"{g['bytes']:,}", f"{g['tensors']:,} tensors") for name, g in stored["by_dtype"].items()),
    ]
    if files:
        rows.append(("in the files", f"{files['bytes']:,}", f"{files['tensors']:,} tensors in {files['files']} files"))
    return rows


def _cost_rows(figures: dict[str, Any]) -> Rows:
    kv, work = figures["kv"], figures["flops"]
    beyond = figures["context"] > figures["max_position_embeddings"]
    names = {"lin8": "FP8 linears", "lin16": "BF16 linears", "core": "attention", "index": "indexer"}
    rows = [
        ("KV cache", f"{_short(kv['bytes'])}B", f"{kv['bytes_per_token']:,.2f} bytes for one more token"),
        ("  of V3.2", f"{kv['ratio']:.2%}", f"{kv['times_less']:.1f} times less than {_short(kv['v32_bytes'])}B"),
        ("FLOPs a token", _short(work["fp8_equivalent"]), "in FP8 (BF16 x 2, FP4 x 0.5)"),
        *((f"  {name}", _short(work[key]), "") for key, name in names.items()),
        (
            "  of V3.2",
            f"{work['ratio']:.2%}",
            f"{work['times_less']:.2f} times less than {_short(work['v32_fp8_equivalent'])}",
        ),
    ]
    return rows + (
        [("beyond the model", f"{figures['max_position_embeddings']:,}", "is its longest context")] if beyond else []
    )


def _short(value: float, digits: int = 4) -> str:
    """A few digits and a decimal prefix: 159.6 G."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.{digits}g} {prefix}"
        value /= 1000
    return f"{value:.{digits}g} T"


# --- the picture

FAMILY: dict[str, tuple[ModelConfig | None, str]] = {
    "V3.2": (None, "#57606a"),
    "V4-Pro": (PRO, "#1f5fbf"),
    "V4-Flash": (FLASH, "#c2570c"),
}
LONGEST = 10**6


def picture() -> str:
    """KV bytes and FLOPs a token of V3.2, Pro and Flash from 1K to 1M tokens of context, as SVG."""
    from fathom.cli.plot import Axis, Panel, render

    context = Axis(1e3, LONGEST, [(1e3, "1K"), (1e4, "10K"), (1e5, "100K"), (1e6, "1M")])
    sizes = Axis(3e6, 1e11, [(10.0**i, f"{_short(10.0**i)}B") for i in range(7, 12)])
    work = Axis(2e10, 1.5e12, [(v, f"{_short(v)}FLOP") for v in (2e10, 5e10, 1e11, 2e11, 5e11, 1e12)])
    panels = [
        Panel("KV cache", "of one sequence, as deployed", context, sizes, "tokens of context", _curves(_cache, "B")),
        Panel(
            "Work", "for one decoded token, FP8-equivalent", context, work, "tokens of context", _curves(_work, "FLOP")
        ),
    ]
    return render(panels, "KV cache and FLOPs a token of DeepSeek-V3.2, V4-Pro and V4-Flash against context")


def _cache(config: ModelConfig | None, context: int) -> float:
    return kv_bytes(config, context) if config else v32_kv_bytes(context)


def _work(config: ModelConfig | None, context: int) -> float:
    return (flops(config, context) if config else v32_flops(context)).fp8_equivalent


def _curves(measure: Callable[[ModelConfig | None, int], float], unit: str) -> list[Any]:
    from fathom.cli.plot import Curve

    contexts, most = [round(10 ** (3 + i / 24)) for i in range(73)], measure(None, LONGEST)
    out = []
    for name, (config, colour) in FAMILY.items():
        last = measure(config, LONGEST)
        times = f", {most / last:.1f}× less" if config else " at 1M"
        points = [(float(n), measure(config, n)) for n in contexts]
        out.append(Curve(points, colour, name, f"{_short(last, 3)}{unit}{times}"))
    return out


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
