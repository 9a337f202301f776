"""Triton's kernels run on a GPU where there is one, else under Triton's interpreter (`external` tests)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
