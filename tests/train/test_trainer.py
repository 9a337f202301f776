"""The loop: learns, resumes bit for bit, skips what is not finite, exports what it trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fathom.checkpoint.load import load_model
from fathom.checkpoint.names import entries
from fathom.config import WEIGHTS
from fathom.errors import TrainError
from fathom.model.batch import Batch
from fathom.model.layers import Numerics
from fathom.train.data import draw, lay, pack
from fathom.train.export import export
from fathom.train.quantised import as_stored, set_numerics, stored_weights
from fathom.train.recipes import RECIPES, adapted, recipe
from fathom.train.trainer import CHECKPOINT, Report, Trainer
from tests.train.support import CharRenderer, tiny_config


def trainer(folder: Path, said: list[str] | None = None, **schedule: float) -> Trainer:
    lines: list[str] = [] if said is None else said
    return Trainer(tiny_config(**schedule), folder, CharRenderer, say=lines.append)


def test_overfits_a_handful_of_documents(tmp_path: Path) -> None:
    t = trainer(tmp_path, steps=30, decay=0.3)
    batch = pack(lay(draw(0, replace(t.config.data, tokens_per_batch=60), CharRenderer())))
    reports: list[float] = []
    for _ in range(30):
        report = Report()
        t._one(batch, report)
        reports.append(float(report.by_effort[0].sum() / report.by_effort[1].sum()))
    assert reports[0] > 4.0
    assert reports[-1] < 0.1


def test_resume_equals_never_having_stopped(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", steps=4, qat=0.5)
    whole.train()
    first = trainer(tmp_path / "cut", steps=4, qat=0.5)
    first.folder.mkdir()
    for number in (0, 1):
        first._one(pack(lay(draw(number, first.config.data, CharRenderer()), first.config.data.waste)), Report())
    first.save()
    second = trainer(tmp_path / "cut", steps=4, qat=0.5)
    second.resume()
    assert second.step == 2
    second.train()
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, a in whole.optimizer.state()["momentum"].items():
        assert torch.equal(a, second.optimizer.state()["momentum"][name]), name


def test_a_step_without_finite_gradient_changes_nothing_and_many_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fathom.train.trainer.BAD_STEPS", 3)
    said: list[str] = []
    t = trainer(tmp_path, said)
    batch = pack(lay(draw(0, t.config.data, CharRenderer())))
    poisoned = replace(batch, weights=torch.full_like(batch.weights, torch.nan))
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t._one(poisoned, Report())
    assert all(torch.equal(p, before[n]) for n, p in t.model.named_parameters())
    assert "skipped" in said[0]
    with pytest.raises(TrainError, match="no finite gradient"):
        for _ in range(2):
            t._one(poisoned, Report())


def test_a_crash_while_saving_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path)
    t.save()
    whole = (tmp_path / CHECKPOINT).read_bytes()

    def full_disk(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        t.save()
    assert (tmp_path / CHECKPOINT).read_bytes() == whole


def test_resume_refuses_nothing_and_foreign_things(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="without --resume"):
        trainer(tmp_path).resume()
    trainer(tmp_path).save()
    other = replace(tiny_config(), model=replace(tiny_config().model, n_routed_experts=8))
    with pytest.raises(TrainError, match="another model configuration"):
        Trainer(other, tmp_path, CharRenderer).resume()


def test_stored_weights_are_put_back_and_their_gradient_passes_straight_through(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    model = t.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with stored_weights(model):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        x = model(torch.arange(9), Batch.packed([9]))
        model.logits(x).square().sum().backward()
    assert any(n.endswith("w13") for n in changed)
    assert any(n.endswith("wq_a.weight") for n in changed)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]), n
    grads = {n: p.grad for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad, p.data = None, as_stored(next(n for n, q in model.named_parameters() if q is p), p.data)
    model.logits(model(torch.arange(9), Batch.packed([9]))).square().sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is None) == (grads[n] is None)
        assert p.grad is None or torch.equal(p.grad, grads[n]), n


def test_the_exported_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    """Every value, and the logits with quantisers on, come back from the files."""
    (tmp_path / "t").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "t" / name).write_text("{}")
    t = trainer(tmp_path / "run")
    t.train()
    for _ in range(2):
        export(t.model, tmp_path / "t", tmp_path / "model")
    set_numerics(t.model, Numerics(quantize=True))
    loaded = load_model(tmp_path / "model", numerics=Numerics(quantize=True)).float()  # not packed: as in training
    ids = torch.arange(40) % 128
    with torch.inference_mode(), stored_weights(t.model.eval()):
        for name, p in loaded.named_parameters():
            assert torch.equal(p.float(), t.model.get_parameter(name)), name
        want, got = (m.logits(m(ids, Batch.packed([40]))) for m in (t.model, loaded))
    assert torch.equal(want, got)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert "april" in (tmp_path / "model" / "fathom.json").read_text()


def test_export_does_not_overwrite_something_else(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(TrainError, match="not an exported model"):
        export(trainer(tmp_path).model, tmp_path, tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_belong_to_the_family(name: str) -> None:
    c = recipe(name).model
    widths = (c.hidden_size, c.q_lora_rank, c.o_lora_rank, c.moe_intermediate_size)
    assert all(w % 128 == 0 for w in (*widths, c.num_attention_heads * c.head_dim // c.o_groups))
    assert set(c.compress_ratios[:-1]) == {0, 4, 128}
    assert c.compress_ratios[-1] == 0
    assert c.max_position_embeddings == 1_048_576
    assert (c.sliding_window, c.qk_rope_head_dim, c.hc_mult, c.hc_sinkhorn_iters) == (128, 64, 4, 20)
    assert entries(c)


def test_unknown_recipe_and_unfit_tokenizer_are_named() -> None:
    with pytest.raises(TrainError, match="first_light"):
        recipe("second_light")
    with pytest.raises(TrainError, match="tokenizer has 5000 tokens"):
        adapted(recipe("tiny"), None, None, 5000)
    assert adapted(recipe("tiny"), 3.0, 2, 100).schedule.minutes == 3.0


def test_wall_time_ends_a_run(tmp_path: Path) -> None:
    t = trainer(tmp_path, steps=None, minutes=0.02)
    t.train()
    assert t.progress == 1.0
    assert t.step >= 1


def test_the_embedded_tokenizer_fits_the_first_recipe() -> None:
    from fathom.encoding.tokenizer import Tokenizer

    if (WEIGHTS / "small" / "tokenizer.json").exists():
        assert Tokenizer.load(WEIGHTS / "small").size <= recipe("first_light").model.vocab_size
