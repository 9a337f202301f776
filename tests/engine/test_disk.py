"""The disk tier: kills, damage, a full disk, strangers and other processes. Content is recomputed from the key."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import shake_128
from pathlib import Path

import pytest

from fathom.engine import disk as module
from fathom.engine.disk import HEADER_BYTES, Disk
from fathom.errors import ConfigError

MODEL, OTHER = bytes(range(16)), bytes(range(1, 17))
BIG = 1 << 30
ROOT = Path(__file__).parent.parent.parent

WRITER = """
import random, sys
from pathlib import Path
from tests.engine.test_disk import BIG, MODEL, content, key
from fathom.engine.disk import Disk
draw = random.Random(int(sys.argv[2]))
disk = Disk(Path(sys.argv[1]), MODEL, int(sys.argv[3]))
print("writing", flush=True)
while True:
    n = draw.randrange(1 << 30)
    disk.put(key(n), content(key(n)))
    if draw.random() < 0.05:
        disk.flush()
"""


def key(n: int) -> bytes:
    return shake_128(b"%d" % n).digest(20)


def content(key: bytes) -> bytes:
    """What this key's entry is: 1 to 400,000 bytes."""
    return shake_128(key).digest(1 + int.from_bytes(key[:4], "big") % 400_000)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def filled(folder: Path, count: int = 5) -> list[bytes]:
    """A closed cache with entries; their keys in the order of writing."""
    disk, keys = Disk(folder, MODEL, BIG), [key(n) for n in range(count)]
    for k in keys:
        disk.put(k, content(k))
    disk.close()
    return keys


def test_entries_survive_a_restart_and_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    before = os.umask(0)
    try:
        keys = filled(folder)
    finally:
        os.umask(before)
    disk = Disk(folder, MODEL, BIG)
    assert [disk.get(k) for k in keys] == [content(k) for k in keys]
    assert disk.get(key(99)) is None and not disk.has(key(99)) and disk.notes == ()
    assert (
        disk.used == sum(f.stat().st_size for f in files(folder)) == sum(len(content(k)) + HEADER_BYTES for k in keys)
    )
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_dir()}
    assert modes | {stat.S_IMODE(folder.stat().st_mode)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(folder)} == {0o600}
    disk.close()


def test_an_entry_is_there_from_the_moment_it_was_put(tmp_path: Path) -> None:
    disk = Disk(tmp_path, MODEL, BIG)
    for n in range(50):
        disk.put(key(n), content(key(n)))
        assert disk.has(key(n)) and disk.get(key(n)) == content(key(n))
    disk.flush()
    assert len(files(tmp_path)) == 50 and all(disk.get(key(n)) == content(key(n)) for n in range(50))
    disk.close()


def damaged(path: Path, how: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[draw.randrange(len(data)) :]
    elif how == "longer":
        data += b"x"
    elif how == "zeros":
        data[:] = bytes(len(data))
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "cut", "longer", "zeros", "another's"])
def test_a_damaged_file_is_never_served_is_reported_and_is_written_again(tmp_path: Path, how: str) -> None:
    draw = random.Random(how)
    keys = filled(tmp_path, 40)
    paths = {bytes.fromhex(path.name): path for path in files(tmp_path)}
    for k in keys[::2]:
        if how == "another's":
            paths[k].write_bytes(paths[keys[1]].read_bytes())
        else:
            damaged(paths[k], how, draw)
    disk = Disk(tmp_path, MODEL, BIG)
    for k in keys:
        assert disk.get(k) == (None if k in keys[::2] else content(k))
    assert not disk.has(keys[0]) and disk.get(keys[0]) is None
    assert disk.notes == (f"20 damaged files were removed from the cache in {tmp_path}",)
    disk.put(keys[0], content(keys[0]))
    disk.flush()
    assert disk.get(keys[0]) == content(keys[0]) and len(files(tmp_path)) == 21
    disk.close()


def test_a_folder_that_can_only_be_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files are served though their time cannot be noted; a damaged one is no more than a miss."""
    keys = filled(tmp_path)
    spoiled = next(path for path in files(tmp_path) if path.name == keys[0].hex())
    damaged(spoiled, "bit", random.Random(0))
    disk = Disk(tmp_path, MODEL, BIG)

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(module.os, "utime", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(2):
        assert [disk.get(k) for k in keys] == [None, *map(content, keys[1:])]
    disk.close()


def test_files_of_other_models_and_strangers_are_left_alone_and_reported(tmp_path: Path) -> None:
    keys = filled(tmp_path)
    (tmp_path / "holiday.jpg").write_bytes(b"x" * 100)
    next(path for path in files(tmp_path) if path.parent != tmp_path).with_name("notes.txt").write_text("mine")
    disk = Disk(tmp_path, OTHER, BIG)
    assert not any(disk.has(k) for k in keys) and disk.used == 0
    assert disk.notes == (f"2 files and folders in {tmp_path} are not of this model's cache: left alone",)
    disk.close()
    again = Disk(tmp_path, MODEL, BIG)
    assert all(again.get(k) == content(k) for k in keys) and len(files(tmp_path)) == 7
    assert again.notes == (f"3 files and folders in {tmp_path} are not of this model's cache: left alone",)
    again.close()


def test_a_file_of_another_model_under_our_name_is_not_trusted(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (mine,) = tmp_path.iterdir()
    mine.rename(tmp_path / mine.name.replace(MODEL.hex(), OTHER.hex()))
    disk = Disk(tmp_path, OTHER, BIG)
    assert disk.get(key(0)) is None and "1 damaged" in disk.notes[0]
    disk.close()


def test_what_was_used_least_recently_leaves_first_also_after_a_restart(tmp_path: Path) -> None:
    size = 1000 + HEADER_BYTES
    disk = Disk(tmp_path, MODEL, 5 * size)
    for n in range(5):
        disk.put(key(n), bytes(1000))
    disk.flush()
    disk.touch([key(0)])
    disk.put(key(5), bytes(1000))
    disk.flush()
    assert [n for n in range(6) if disk.has(key(n))] == [0, 2, 3, 4, 5] and disk.used == 5 * size
    for n in (0, 5, 4, 3, 2):
        assert disk.get(key(n)) == bytes(1000)
        time.sleep(0.01)  # the order survives in the files' times
    disk.put(key(6), bytes(5 * size))
    disk.close()
    assert not disk.has(key(6)) and len(files(tmp_path)) == 5
    smaller = Disk(tmp_path, MODEL, 2 * size)
    assert [n for n in range(6) if smaller.has(key(n))] == [2, 3] and len(files(tmp_path)) == 2
    smaller.close()


def test_on_a_full_disk_nothing_more_is_written_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = filled(tmp_path)
    disk, full, opened = Disk(tmp_path, MODEL, BIG), [True], os.open

    def refused(path: Path, flags: int, mode: int = 0o777) -> int:
        if full[0] and flags & os.O_CREAT:
            raise OSError(28, "No space left on device")
        return opened(path, flags, mode)

    monkeypatch.setattr(module.os, "open", refused)
    for n in range(10, 20):
        disk.put(key(n), content(key(n)))
    disk.flush()
    assert not any(disk.has(key(n)) for n in range(10, 20))
    said = f"nothing more is written to the cache in {tmp_path} for now: No space left on device"
    assert disk.notes == (said,)
    assert all(disk.get(k) == content(k) for k in keys), "what is there still serves"
    full[0] = False
    disk.put(key(10), b"too early")
    assert not disk.has(key(10))
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    disk._paused_until = 0.0
    disk.put(key(10), content(key(10)))
    disk.flush()
    assert disk.get(key(10)) == content(key(10)) and disk.notes == ()
    disk.close()


LIMITED = """
import resource, sys
from pathlib import Path
from tests.engine.test_disk import BIG, MODEL, key
from fathom.engine.disk import Disk
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
disk = Disk(Path(sys.argv[1]), MODEL, BIG)
disk.put(key(0), bytes(1000))
disk.flush()
disk.put(key(1), bytes(100_000))
disk.flush()
assert disk.get(key(0)) == bytes(1000) and disk.get(key(1)) is None
print(*disk.notes)
"""


def test_a_write_that_the_system_refuses_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "nothing more is written" in done.stdout and "File too large" in done.stdout
    assert len(files(tmp_path)) == 1


def test_a_folder_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the cache folder .*file cannot be used: .*name another, or go without"):
        Disk(tmp_path / "file", MODEL, BIG)


def test_parts_of_files_are_removed_once_they_are_old(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (path,) = files(tmp_path)
    old, new = path.with_name(f"{path.name}.1.1.part"), path.with_name(f"{path.name}.2.2.part")
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * 3600))
    Disk(tmp_path, MODEL, BIG).close()
    assert files(tmp_path) == sorted([path, new])


def test_what_another_process_removed_is_a_miss(tmp_path: Path) -> None:
    keys = filled(tmp_path)
    disk = Disk(tmp_path, MODEL, BIG)
    for path in files(tmp_path):
        path.unlink()
    assert disk.get(keys[0]) is None and not disk.has(keys[0]) and disk.notes == ()
    disk.close()


def kills(folder: Path, times: int, limit: int) -> tuple[int, int]:
    """Two processes at a time write into one folder and are killed; after each kill everything readable is read.

    Returns how many entries were read, and how many files were begun and not finished.
    """
    draw, read = random.Random(times), 0
    for n in range(times):
        commands = [[sys.executable, "-c", WRITER, str(folder), str(seed), str(limit)] for seed in (2 * n, 2 * n + 1)]
        writers = [subprocess.Popen(c, cwd=ROOT, stdout=subprocess.PIPE) for c in commands]
        for writer in writers:
            assert writer.stdout and writer.stdout.readline() == b"writing\n"
        time.sleep(draw.uniform(0, 0.15))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        read += check(folder)
    return read, sum(path.suffix == ".part" for path in files(folder))


def check(folder: Path) -> int:
    """A new process would start, and serve the right bytes for everything that is there."""
    disk = Disk(folder, MODEL, BIG)
    there = [path for path in files(folder) if path.suffix != ".part"]
    for path in there:
        k = bytes.fromhex(path.name)
        assert disk.has(k) and disk.get(k) == content(k), path
    assert disk.notes == ()
    disk.close()
    return len(there)


def test_no_kill_spoils_anything(tmp_path: Path) -> None:
    read, _ = kills(tmp_path, 5, 16 << 20)
    assert read > 5


@pytest.mark.external
def test_no_kill_of_fifty_spoils_anything(tmp_path: Path, say: Callable[[str], None]) -> None:
    """Half of them in a folder that is full, so that files are removed all the time."""
    read, begun = kills(tmp_path / "roomy", 25, 32 << 20)
    more, begun_too = kills(tmp_path / "tight", 25, 2 << 20)
    say(f"disk: 50 kills of two writers each, {read + more} entries read, {begun + begun_too} unfinished files")
    assert read > 500 and more > 100 and begun + begun_too > 10
