"""The prefix cache through scheduler and model: what is reused, and that it changes no bit of what follows."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fathom.engine import prefix
from fathom.engine.fingerprint import fingerprint
from fathom.engine.prefix import Host, block_keys
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from tests.engine.prompts import Machine, Prompt, cold, continued, tiny

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny()


def ids(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(50) for _ in range(length)]


def ask(machine: Machine, prompt: list[int], namespace: str = "", keep: tuple[int, ...] = ()) -> int:
    """Runs the prompt, and checks every row that was computed against a cold run; -> tokens from the cache."""
    one = Prompt(prompt, namespace, keep)
    machine.run(one)
    assert torch.equal(one.streams, cold(machine.model, one)[one.cached :])
    return one.cached


def test_what_is_repeated_is_reused_up_to_the_last_block(model: Transformer) -> None:
    machine = Machine(model)
    assert ask(machine, ids(200)) == 0
    assert ask(machine, ids(200)) == 128
    assert ask(machine, ids(1024, 1)) == 0
    assert ask(machine, ids(1024, 1)) == 896, "the last token must be computed again"
    assert ask(machine, [*ids(1024, 1), 1]) == 1024


def test_a_prompt_that_goes_on_reuses_the_one_before(model: Transformer) -> None:
    machine, conversation = Machine(model, turns=True), ids(350)
    cached = []
    for n in range(4):
        one = Prompt(conversation, answer=70)
        machine.run(one)
        cached.append(one.cached)
        conversation = continued(conversation, 70, model.config.vocab_size) + ids(60, n + 1)
    assert cached == [0, 384, 512, 640], "the ends of turns: the last multiples of 128 below 419, 549 and 679"


def test_rows_that_an_answer_wrote_come_back_as_they_were(model: Transformer, tmp_path: Path) -> None:
    """From disk, bit for bit those of a sequence that never stopped: a prompt of 200, an answer, a prompt again."""
    machine = Machine(model, tmp_path, turns=True)
    machine.run(Prompt(ids(200), answer=80))
    machine.prefix.close()
    after = Machine(model, tmp_path)
    second = Prompt(continued(ids(200), 80, model.config.vocab_size) + ids(90, 1))
    after.run(second)
    assert second.cached == 256
    assert torch.equal(second.streams, cold(model, second, [200, 256])[256:])
    after.prefix.close()


def test_the_third_of_a_family_reuses_what_the_first_two_had_in_common(model: Transformer) -> None:
    """Reference api B.7: after A+B then A+C, A is stored, and A+D hits it."""
    machine, a = Machine(model), ids(400)
    assert ask(machine, a + ids(300, 1)) == 0
    assert ask(machine, a + ids(300, 2)) == 0
    assert ask(machine, a + ids(300, 3)) == 384


def test_positions_to_keep_are_resume_points(model: Transformer) -> None:
    machine, a = Machine(model), ids(700)
    ask(machine, a, keep=(300,))
    assert ask(machine, a[:300] + ids(200, 1)) == 256


def test_namespaces_and_models_share_nothing(model: Transformer, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path)
    ask(machine, ids(300), "alice")
    assert ask(machine, ids(300), "bob") == 0 and ask(machine, ids(300), "alice") == 256
    assert ask(machine, ids(300), "half a pair: \ud83d") == 0
    machine.prefix.close()
    other = Machine(tiny(4), tmp_path)
    assert ask(other, ids(300), "alice") == 0
    assert "not of this model's cache" in other.prefix.notes[0]
    other.prefix.close()


def test_a_fingerprint_changes_with_whatever_rows_depend_on() -> None:
    model = tiny()
    seen = {fingerprint(model), fingerprint(tiny(numerics=Numerics(quantize=True))), fingerprint(tiny(index_topk=9))}
    assert fingerprint(tiny()) == fingerprint(model) and len(seen) == 3
    for name, tensor in model.state_dict().items():
        before = tensor.clone()
        tensor.add_(1)
        assert fingerprint(model) not in seen, name
        tensor.copy_(before)


KILLED = """
import sys
from pathlib import Path
from tests.engine.prompts import Machine, Prompt, tiny
from tests.engine.test_prefix import ids
machine = Machine(tiny(), Path(sys.argv[1]))
machine.run(Prompt(ids(900)))
machine.prefix.flush()
print("saved", flush=True)
machine.run(*(Prompt(ids(900, n)) for n in range(1, 100)))
"""


def test_after_a_kill_another_process_goes_on_from_the_files(model: Transformer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"saved\n"
        process.send_signal(signal.SIGKILL)
    machine = Machine(model, tmp_path)
    assert ask(machine, ids(900)) == 896 and machine.prefix.notes == ()
    machine.prefix.close()


def test_pages_that_leave_the_device_come_back_from_the_host_and_then_from_disk(
    model: Transformer, tmp_path: Path
) -> None:
    machine, blocks = Machine(model, tmp_path, pages=10), 8
    assert ask(machine, ids(1030)) == 0
    assert machine.prefix.tiers["device"] == (blocks * machine.cache.page_bytes, 10 * machine.cache.page_bytes)
    assert machine.pool.ensure(10) and machine.prefix.tiers["device"][0] == 0
    assert machine.prefix.host.used == blocks * machine.cache.block_bytes + machine.cache.state_bytes(1024)
    assert ask(machine, ids(1030)) == 1024 and machine.prefix.tiers["device"][0] > 0
    machine.prefix.flush()
    machine.pool.ensure(10)
    machine.prefix.host = Host(1 << 30)
    assert ask(machine, ids(1030)) == 1024 and machine.prefix.notes == ()
    machine.prefix.close()


def test_pages_in_use_are_never_taken_and_all_or_none_are_given(model: Transformer) -> None:
    machine = Machine(model, pages=12)
    ask(machine, ids(520))
    (page,) = machine.prefix.match("", ids(520)).pages[:1]
    assert page is not None
    machine.pool.share(page)
    assert not machine.prefix.reclaim(4) and machine.prefix.tiers["device"][0] == 4 * machine.cache.page_bytes
    assert machine.prefix.reclaim(3) and machine.pool.owners(page) == 2
    machine.pool.release(page)
    assert ask(machine, ids(520)) == 512


def test_without_room_in_any_tier_everything_is_simply_computed(model: Transformer) -> None:
    machine = Machine(model, pages=6, host=0)
    for _ in range(3):
        assert ask(machine, ids(600)) == 0
    assert machine.prefix.tiers["host"] == (0, 0)


def test_the_host_gives_up_what_was_used_least_recently() -> None:
    host = Host(10)
    assert host.put(b"a", b"1234") == [] and host.put(b"b", b"1234") == []
    host.blocks.move_to_end(b"a")
    assert host.put(b"c", b"123456") == [(b"b", b"1234")] and host.used == 10
    assert host.put(b"d", bytes(11)) == [(b"d", bytes(11))] and list(host.blocks) == [b"a", b"c"]


def test_blocks_give_way_to_states_until_those_take_half() -> None:
    """On a GPU blocks stay on the device for long, and none of them is found without the state after it."""
    host = Host(100)
    for n in range(4):
        host.put(b"state%d" % n, bytes(10), state=True)
    for n in range(500):
        host.put(b"block%d" % n, bytes(5))
    assert len(host.states) == 4 and host.used == 100 and list(host.blocks)[-1] == b"block499"
    for n in range(4, 40):
        host.put(b"state%d" % n, bytes(10), state=True)
    assert host.states.used <= 60 and host.used <= 100 and b"state39" in host and b"state3" not in host
    draw, kept = random.Random(1), Host(1000)
    for n in range(2000):
        size = draw.randrange(120)
        gone = kept.put(bytes([n % 251, n // 251]), bytes(size), state=draw.random() < 0.3)
        assert kept.used == sum(map(len, (*kept.blocks.values(), *kept.states.values()))) <= 1000
        assert all(key not in kept for key, _ in gone)


def test_a_device_is_read_and_filled_by_slices_and_not_in_vain(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of a million tokens has 8,192 blocks: all of them at once would need a second cache beside the first."""
    monkeypatch.setattr(prefix, "_AT_ONCE", 3)
    machine, sizes = Machine(model, tmp_path, pages=12, host=0), []
    blocks, load = machine.cache.blocks, machine.cache.load_blocks
    monkeypatch.setattr(machine.cache, "blocks", lambda pages: sizes.append(len(pages)) or blocks(pages))
    monkeypatch.setattr(machine.cache, "load_blocks", lambda pages, b: sizes.append(-len(pages)) or load(pages, b))
    assert ask(machine, ids(1030)) == 0 and sizes == [3, 3, 2]
    machine.prefix.flush()
    machine.pool.ensure(12)
    assert sizes == [3, 3, 2], "they are on disk, and there is no room in memory"
    assert ask(machine, ids(1030)) == 1024 and sizes[3:] == [-3, -3, -2]
    machine.prefix.close()


def test_keys_depend_on_everything_before_them() -> None:
    a = list(block_keys(b"seed", ids(400)))
    assert len(a) == 3 == len(set(a)) and a == list(block_keys(b"seed", ids(400)[:384]))
    changed = ids(400)
    changed[200] += 1
    b = list(block_keys(b"seed", changed))
    assert a[0] == b[0] and not set(a[1:]) & set(b[1:]) and not set(a) & set(block_keys(b"eels", ids(400)))


class Forest:
    """Conversations that grow, branch and are edited, against a machine whose tiers are tight, emptied and damaged."""

    def __init__(self, model: Transformer, folder: Path, seed: int) -> None:
        self.model, self.folder, self.draw = model, folder, random.Random(seed)
        self.trees = [(self.draw.choice(["", "eve"]), self.some(self.draw.randint(1, 600))) for _ in range(2)]
        self.seen: Counter[str] = Counter()
        self.machine = self.start()

    def some(self, count: int) -> list[int]:
        return [self.draw.randrange(self.model.config.vocab_size) for _ in range(count)]

    def start(self) -> Machine:
        host, disk = self.draw.choice([0, 400_000, 1 << 30]), self.draw.choice([1_500_000, 1 << 30])
        return Machine(self.model, self.folder, pages=self.draw.choice([11, 16, 40]), host=host, disk=disk)

    def grown(self) -> tuple[str, list[int]]:
        namespace, base = self.draw.choice(self.trees)
        cut = self.draw.choice([len(base), len(base), len(base), self.draw.randint(0, len(base))])
        changed = list(base[:cut])
        if changed and self.draw.random() < 0.2:
            changed[self.draw.randrange(len(changed))] = self.draw.randrange(50)
        tail = self.some(self.draw.choice([0, 1, 30, 128, 200]))
        return namespace, (changed + tail)[:640] or [1]

    def round(self) -> None:
        prompts = [Prompt(tree[1], tree[0]) for tree in (self.grown() for _ in range(self.draw.choice([1, 1, 2])))]
        for prompt in prompts:
            hit = self.machine.prefix.match(prompt.namespace, prompt.ids)
            on_host = [key in self.machine.prefix.host for key in hit.keys]
            where = [
                "device" if p is not None else "host" if h else "disk" for p, h in zip(hit.pages, on_host, strict=True)
            ]
            self.seen.update(set(where))
        self.machine.run(*prompts)
        for prompt in prompts:
            self.compare(prompt)
            self.trees.append((prompt.namespace, prompt.ids))
        self.trees = self.trees[-6:]
        for used, most in self.machine.prefix.tiers.values():
            assert used <= most

    def compare(self, prompt: Prompt) -> None:
        assert prompt.sequence
        if prompt.sequence.lives == 1:
            assert torch.equal(prompt.streams, cold(self.model, prompt)[prompt.cached :])
            self.seen["compared"] += 1
            self.seen["reused"] += prompt.cached

    def trouble(self) -> None:
        what = self.draw.random()
        if what < 0.4:
            self.machine.pool.ensure(self.draw.choice([self.machine.pool.count, self.draw.randint(1, 11)]))
        elif what < 0.6:
            self.machine.prefix.close()
            self.damage(self.draw.choice([0.0, 0.0, 0.3]))
            self.machine = self.start()
            self.seen["restarts"] += 1

    def damage(self, share: float) -> None:
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and self.draw.random() < share:
                data = bytearray(path.read_bytes())
                data[self.draw.randrange(len(data))] ^= 1
                path.write_bytes(data)
                self.seen["damaged"] += 1


def grow(model: Transformer, folder: Path, seed: int, rounds: int) -> Counter[str]:
    forest = Forest(model, folder, seed)
    for _ in range(rounds):
        forest.round()
        forest.trouble()
    forest.machine.prefix.close()
    return forest.seen


@pytest.mark.parametrize("quantize", [False, True])
def test_random_trees_of_conversations_through_evictions_restarts_and_damage(tmp_path: Path, quantize: bool) -> None:
    seen: Counter[str] = Counter()
    for seed in range(2):
        numerics = Numerics(quantize=quantize)
        seen += grow(tiny(5, numerics, head_dim=128, qk_rope_head_dim=64), tmp_path / str(seed), seed, 16)
    assert all(seen[name] for name in ("device", "host", "disk", "restarts")) and seen["compared"] >= 30
    assert seen["reused"] > 3000, seen


@pytest.mark.external
def test_many_random_trees(tmp_path: Path, say: Callable[[str], None]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        model = tiny(seed, Numerics(quantize=seed % 2 == 1), head_dim=128, qk_rope_head_dim=64)
        seen += grow(model, tmp_path / str(seed), seed, 25)
    say(f"cache: {seen['compared']} prompts of 40 random trees equal cold runs bit for bit, {seen['reused']} tokens of")
    say(f"  them reused, through {seen['restarts']} restarts and {seen['damaged']} damaged files")
    assert seen["compared"] >= 900 and all(seen[name] for name in ("device", "host", "disk", "damaged"))
