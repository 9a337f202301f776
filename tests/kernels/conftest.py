"""Triton's kernels run on a GPU where there is one, else under Triton's interpreter (`external` tests)."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        interpreter = import_module("triton.runtime.interpreter")
        patched = interpreter._patch_lang_tensor

        def _with_index(tensor: Any, scope: Any) -> None:
            """NumPy 2.4 makes no int of an array of one element any more, which the interpreter's loops do."""
            patched(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = _with_index
