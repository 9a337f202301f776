"""A checkpoint in other number formats, tensor by tensor: memory holds one weight, however large the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from fathom.checkpoint.folder import Checkpoint
from fathom.checkpoint.names import Entry, Spec, specs, stored_config
from fathom.checkpoint.reader import Progress
from fathom.checkpoint.recode import chosen_form, recode
from fathom.checkpoint.save import Item, companion_files, write_checkpoint


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    experts: str | None = None,
    linears: str | None = None,
    lossy: bool = False,
    files: Mapping[str, bytes] | None = None,
    max_shard: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write the checkpoint in `source` to `folder` with its experts and linears in other forms (None keeps them).

    Everything else, the tensors of a drafter and the tokenizer among it, comes along as it is; `files` (name to
    content) are added.
    Raises CheckpointError as `save.save_model`, and FormatError where a form cannot hold the values and not `lossy`.
    """
    checkpoint = Checkpoint(source)
    items = [_item(checkpoint, entry, experts, linears, lossy) for entry in checkpoint.entries + checkpoint.foreign]
    config = checkpoint.config
    if experts or linears:
        forms = {e.kind: chosen_form(e, checkpoint.form(e), experts, linears) for e in checkpoint.entries}
        config = stored_config(config, forms["expert"], forms["linear"])
    beside = {**companion_files(source), **(files or {})}
    write_checkpoint(folder, items, config, beside, max_shard=max_shard, progress=progress)


def _item(checkpoint: Checkpoint, entry: Entry, experts: str | None, linears: str | None, lossy: bool) -> Item:
    if not checkpoint.is_known(entry):
        return _as_it_is(checkpoint, entry)
    form = checkpoint.form(entry)
    if form == "bf16" and not {"expert": experts, "linear": linears}.get(entry.kind):
        stored = checkpoint.reader.tensors[entry.name]
        return Item((Spec(stored.name, stored.dtype, stored.shape),), lambda: (checkpoint.read(entry)[0],))
    wanted = chosen_form(entry, form, experts, linears)
    scales = checkpoint.scales(entry) if form == wanted != "bf16" else "F8_E8M0"

    def make() -> tuple[Tensor, ...]:
        return recode(entry, *checkpoint.read(entry), form, wanted, lossy)

    return Item(specs(entry, wanted, scales), make)


def _as_it_is(checkpoint: Checkpoint, entry: Entry) -> Item:
    """A tensor of which nothing is known but its bytes."""
    stored = checkpoint.reader.tensors[entry.name]
    return Item((Spec(stored.name, stored.dtype, stored.shape),), lambda: (checkpoint.reader.read(entry.name),))
