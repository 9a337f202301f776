"""One side of a benchmark: a process that holds one model and times it when asked, so that its peak memory is its own.

It speaks lines of JSON. Once the model is loaded it tells what a decode step reads: {"always": bytes, "routed": bytes}.
Then it answers each {"prompts": [[id]], "tokens": n, "threads": t, "logits": bool}: the prompts are computed side by
side, n tokens are decoded greedily, and it says {"prefill": s, "steps": [s], "peak": bytes, "logits": [[x]] or null}.
The end of its input ends it; {"error": text} tells why it cannot go on. `serve` is the protocol, for any `Side`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fathom.errors import FathomError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fathom.model.cache import ContiguousCache


class Side(Protocol):
    """One implementation with one model: B sequences side by side."""

    @property
    def model(self) -> nn.Module:
        """Where the weights are."""

    def prefill(self, prompts: Tensor, room: int) -> Tensor:
        """Forget everything and compute prompts [B, n]; logits [B, V] of the last rows. `room` tokens will follow."""

    def step(self, tokens: Tensor) -> Tensor:
        """Go on with one token [B] of each sequence; logits [B, V]."""


def serve(load: Callable[[Path, str], Side]) -> None:
    """Be the side that `load(folder, "fp32" or "bf16")` makes, for the folder and dtype on the command line."""
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        side = load(Path(sys.argv[1]), sys.argv[2])
        say(read_bytes(side.model.named_parameters()))
        for line in sys.stdin:
            say(_answer(side, json.loads(line)))
    except FathomError as error:
        say({"error": str(error)})
    except KeyboardInterrupt:
        pass


def _answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(request["threads"])
    prompts, steps = torch.tensor(request["prompts"]), []
    with torch.inference_mode():
        begin = time.perf_counter()
        logits = side.prefill(prompts, request["tokens"])
        chosen = logits.argmax(-1)
        prefill = time.perf_counter() - begin
        for _ in range(request["tokens"]):
            begin = time.perf_counter()
            chosen = side.step(chosen).argmax(-1)
            steps.append(time.perf_counter() - begin)
    shown = logits.float().tolist() if request["logits"] else None
    return {"prefill": prefill, "steps": steps, "peak": peak_bytes(), "logits": shown}


def read_bytes(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """Bytes of weights by what a decode step reads: `always` all of them, of `routed` only the chosen experts.

    The embedding, of which a step reads one row a token, and the MTP block are left out.
    """
    out = {"always": 0, "routed": 0}
    for name, parameter in parameters:
        if "embed" not in name and not name.startswith("mtp."):
            out["routed" if ".experts." in name else "always"] += parameter.nbytes
    return out


def peak_bytes() -> int:
    """The most memory that this process has had. Linux tells it of the program alone, without who started it."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Ours:
    """The model of this package, its weights widened to the compute dtype, its activations quantised as they were
    trained: a checkpoint with FP8 or FP4 weights has the quantisers on, a BF16 one has them off."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch

        from fathom.checkpoint.folder import Checkpoint
        from fathom.checkpoint.load import load_model
        from fathom.model.layers import Numerics

        computed = torch.float32 if dtype == "fp32" else torch.bfloat16
        self.model = load_model(folder, numerics=Numerics(computed, Checkpoint(folder).quantised))
        self._cache: ContiguousCache | None = None
        self._at = 0

    def prefill(self, prompts: Tensor, room: int) -> Tensor:
        """See `Side`."""
        from fathom.model.cache import ContiguousCache

        slots, length = prompts.shape
        self._at = 0
        self._cache = ContiguousCache(self.model.config, self.model.numerics, slots, length + room)
        return self._run(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Side`."""
        return self._run(tokens.unsqueeze(1))

    def _run(self, tokens: Tensor) -> Tensor:
        from fathom.model.batch import Batch, Span

        slots, count = tokens.shape
        batch = Batch.step([Span(self._at, count, slot) for slot in range(slots)], "last")
        self._at += count
        return self.model.logits(self.model(tokens.flatten(), batch, self._cache))


if __name__ == "__main__":
    serve(Ours)
