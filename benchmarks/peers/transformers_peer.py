"""transformers' DeepseekV4ForCausalLM as a side of `fathom bench --peer transformers`: a BF16 export, eager attention.

The decode loop is the bare forward with its cache, not `generate`: no time goes into anything but the model.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from fathom.cli.bench_side import serve


class Theirs:
    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import DeepseekV4ForCausalLM

        wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
        self.model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=wanted, attn_implementation="eager").eval()
        self._cache = None

    def prefill(self, prompts: Tensor, room: int) -> Tensor:
        self._cache = None
        return self._run(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        return self._run(tokens.unsqueeze(1))

    def _run(self, tokens: Tensor) -> Tensor:
        out = self.model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1]


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    serve(Theirs)
