"""Encrypted files: what is written is read back, nothing of it is on the disk, and every change to it is noticed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch

from edgetune.runtime import cipher
from edgetune.runtime.cipher import Cipher, final_name
from edgetune.runtime.encrypted_file import CHUNK, HEADER_BYTES, TAG_BYTES, EncryptedReader, is_encrypted
from edgetune.runtime.encrypted_scratch import SECTOR, EncryptedScratch
from edgetune.runtime.errors import AdapterError, DataError, LockedError
from edgetune.runtime.files import (
    atomic_folder,
    atomic_write,
    map_own,
    mend,
    move_file,
    new_file,
    open_log,
    private_file,
    read_at,
    read_own,
    replace_folder,
    scratch_file,
    scratch_in_memory,
    sha256_file,
    write_at,
)
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Offload
from edgetune.runtime.safetensors_file import SafetensorsFile, write_tensors
from edgetune.runtime.untrusted_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_untrusted, read_untrusted

SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7]


class Everything:
    """A keeper that encrypts all that lies in a folder."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder, self.cipher = folder, Cipher(folder, key)

    def to_write(self, path: Path) -> Cipher | None:
        return self.cipher if path.is_relative_to(self.folder) else None

    def to_read(self, path: Path) -> Cipher:
        return self.cipher

    def hides_scratch(self, folder: Path) -> bool:
        return True


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which every file is encrypted."""
    (tmp_path / "data").mkdir()
    before = cipher.install(Everything(tmp_path / "data", bytes(range(32))))
    yield tmp_path / "data"
    cipher.install(before)


def some_bytes(count: int) -> bytes:
    return random.Random(count).randbytes(count)


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_any_size_is_read_as_it_was_written_and_is_not_on_the_disk(folder: Path, size: int) -> None:
    data = some_bytes(size)
    atomic_write(folder / "a", data)
    stored = (folder / "a").read_bytes()
    assert read_own(folder / "a") == read_untrusted(folder / "a", ADAPTER_CONFIG) == data
    assert len(stored) == HEADER_BYTES + size + TAG_BYTES * max(1, -(-size // CHUNK))
    assert is_encrypted(folder / "a")
    assert size < 16 or not any(data[at : at + 16] in stored for at in range(0, size - 15, 16))
    mapping = map_own(folder / "a")
    assert (b"" if mapping is None else mapping[:]) == data


def test_it_is_the_same_file_however_it_was_cut_up_while_it_was_written_or_read(folder: Path) -> None:
    data, cuts = some_bytes(3 * CHUNK + 7), random.Random(1)
    with private_file(folder / "a") as file:
        position = 0
        while position < len(data):
            count = cuts.choice([1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
            file.write(data[position : position + count])
            position += count
    with open_untrusted(folder / "a", ADAPTER_CONFIG) as found:
        assert isinstance(found, EncryptedReader)
        for _ in range(200):
            start, count = cuts.randrange(len(data)), cuts.choice([1, 100, CHUNK])
            found.seek(start)
            assert found.read(count) == data[start : start + count]
            assert found.tell() == min(start + count, len(data))
        assert found.seek(-3, os.SEEK_END) == len(data) - 3
        assert found.read() == data[-3:]
        assert found.read() == b""


def test_two_files_with_the_same_bytes_have_nothing_in_common(folder: Path) -> None:
    for name in ("a", "b"):
        atomic_write(folder / name, bytes(CHUNK))
    first, second = ((folder / name).read_bytes()[16:] for name in ("a", "b"))
    assert not any(first[at : at + 16] in second for at in range(0, len(first) - 15, 16))


def test_a_flushed_file_takes_nothing_more(folder: Path) -> None:
    file, name = new_file(folder / "a")
    with file:
        file.write(b"a note")
        file.flush()
        with pytest.raises(ValueError, match="takes nothing more"):
            file.write(b"more")
    assert name.exists()


CHANGES = {
    "a bit of the salt": lambda data: flipped(data, HEADER_BYTES - 1),
    "a bit of the first chunk": lambda data: flipped(data, HEADER_BYTES + 5),
    "a bit of the last tag": lambda data: flipped(data, len(data) - 1),
    "the last byte gone": lambda data: data[:-1],
    "the last chunk gone": lambda data: data[: HEADER_BYTES + 2 * (CHUNK + TAG_BYTES)],
    "all chunks gone": lambda data: data[:HEADER_BYTES],
    "half of the salt gone": lambda data: data[: HEADER_BYTES - 16],
    "a chunk twice": lambda data: data[: HEADER_BYTES + CHUNK + TAG_BYTES] + data[HEADER_BYTES:],
    "two chunks exchanged": lambda data: exchanged(data),
    "a byte more": lambda data: data + b"\0",
}


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def exchanged(data: bytes) -> bytes:
    size = CHUNK + TAG_BYTES
    first, second = (data[HEADER_BYTES + number * size : HEADER_BYTES + (number + 1) * size] for number in (0, 1))
    return data[:HEADER_BYTES] + second + first + data[HEADER_BYTES + 2 * size :]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_to_a_file_is_noticed_and_said_in_one_sentence(folder: Path, change: str) -> None:
    atomic_write(folder / "a", some_bytes(2 * CHUNK + 100))
    (folder / "a").write_bytes(CHANGES[change]((folder / "a").read_bytes()))
    sentence = r"data/a is encrypted, and not as edgetune wrote it here: it was damaged, changed, or moved .* or delete it\.$"
    with pytest.raises(DataError, match=sentence):
        read_own(folder / "a")
    with pytest.raises(AdapterError, match=sentence):
        read_untrusted(folder / "a", ADAPTER_CONFIG)
    with pytest.raises(DataError, match=sentence):
        map_own(folder / "a")


def test_a_file_that_took_anothers_place_is_noticed(folder: Path) -> None:
    for name in ("a", "b"):
        atomic_write(folder / name, name)
    os.replace(folder / "a", folder / "b")
    with pytest.raises(DataError, match="moved from another place"):
        read_own(folder / "b")


def test_a_file_of_another_key_is_not_read(folder: Path) -> None:
    atomic_write(folder / "a", b"a note")
    cipher.install(Everything(folder, bytes(32)))
    with pytest.raises(DataError, match="not as edgetune wrote it"):
        read_own(folder / "a")


def test_without_a_keeper_an_encrypted_file_is_locked_and_not_damaged(folder: Path) -> None:
    atomic_write(folder / "a", b"a note")
    cipher.install(cipher.NoKeeper())
    with pytest.raises(LockedError, match="its key is not here"):
        read_untrusted(folder / "a", ADAPTER_CONFIG)


def test_a_file_keeps_its_place_through_every_rename_of_edgetunes_own(folder: Path) -> None:
    for text in ("first", "second"):
        with atomic_folder(folder / "adapter") as temporary:
            atomic_write(temporary / "config.json", text)
            with private_file(temporary / "ids.bin") as file:
                file.write(b"tokens")
        assert read_own(folder / "adapter" / "config.json") == text.encode()
        assert read_own(folder / "adapter" / "ids.bin") == b"tokens"
    aside = folder / ".adapter.old.abcd1234.tmp"
    aside.mkdir()
    os.rename(folder / "adapter", aside / "adapter")
    mend(folder / "adapter")
    assert read_own(folder / "adapter" / "config.json") == b"second"
    assert final_name(Path(".adapter.old.abcd1234.tmp/adapter/a")) == "adapter/a"
    assert final_name(Path("runs/.report.html.abcd1234.tmp")) == "runs/report.html"
    move_file(folder / "adapter" / "config.json", folder / "moved")
    assert read_own(folder / "moved") == b"second"
    assert not (folder / "adapter" / "config.json").exists()
    replace_folder(folder / "adapter", folder / "renamed")
    with pytest.raises(DataError, match="moved from another place"):
        read_own(folder / "renamed" / "ids.bin")


def test_tensors_are_read_into_memory_and_stay_there_when_their_pages_are_released(folder: Path) -> None:
    values = torch.arange(100_000, dtype=torch.float32)
    write_tensors(folder / "a.safetensors", {"x": values, "y": values + 1})
    assert values[:16].numpy().tobytes() not in (folder / "a.safetensors").read_bytes()
    file = SafetensorsFile.open(folder / "a.safetensors", ADAPTER_WEIGHTS)
    file.release("x")
    assert torch.equal(file.tensor("x"), values)
    assert torch.equal(file.tensor("y"), values + 1)
    (folder / "a.safetensors").write_bytes(flipped((folder / "a.safetensors").read_bytes(), HEADER_BYTES + 5 * CHUNK))
    with pytest.raises(AdapterError, match="not as edgetune wrote it"):
        SafetensorsFile.open(folder / "a.safetensors", ADAPTER_WEIGHTS)


def test_a_digest_is_that_of_the_plain_bytes(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "a", tmp_path / "a"):
        atomic_write(path, some_bytes(CHUNK + 1))
    assert not is_encrypted(tmp_path / "a")
    assert sha256_file(folder / "a") == sha256_file(tmp_path / "a")


# --- logs -------------------------------------------------------------------------------------------------------------


def test_a_log_goes_on_where_a_killed_process_left_it(folder: Path) -> None:
    log = open_log(folder / "log")
    for line in (b"first\n", b"second\n"):
        log.write(line)
        log.flush()
    assert log.tell() == 13
    assert read_own(folder / "log") == b"first\nsecond\n"  # while it is open
    stored = (folder / "log").read_bytes()
    assert b"first" not in stored
    (folder / "log").write_bytes(stored[:-1])  # the second record was half written
    assert read_own(folder / "log") == b"first\n"
    with open_log(folder / "log") as log:
        log.write(b"third\n")
    assert read_own(folder / "log") == b"first\nthird\n"
    with open_log(folder / "log", 6) as log:
        log.write(b"fourth\n")
    assert read_own(folder / "log") == b"first\nfourth\n"
    with open_log(folder / "log", 8) as log:
        assert log.tell() == 6


def test_a_changed_record_of_a_log_is_noticed(folder: Path) -> None:
    with open_log(folder / "log") as log:
        log.write(b"first\n")
    stored = (folder / "log").read_bytes()
    for place in (HEADER_BYTES - 1, HEADER_BYTES + 4, len(stored) - 1):
        (folder / "log").write_bytes(flipped(stored, place))
        with pytest.raises(DataError, match="not as edgetune wrote it"):
            read_own(folder / "log")


# --- scratch files ----------------------------------------------------------------------------------------------------


def stored_in(file: EncryptedScratch) -> bytes:
    """Return what the disk holds of a scratch file."""
    with open(os.dup(file._file.fileno()), "rb") as copy:
        copy.seek(0)
        return copy.read()


def test_a_scratch_file_is_like_memory_and_the_disk_has_nothing_of_it(folder: Path) -> None:
    file, size, chance = scratch_file(folder, 5 * SECTOR + 100), 5 * SECTOR + 100, random.Random(3)
    assert isinstance(file, EncryptedScratch)
    memory = BytesIO(bytes(size))
    for _ in range(100):
        start = chance.randrange(size)
        piece = chance.randbytes(min(chance.choice([1, 50, SECTOR, 2 * SECTOR + 1]), size - start))
        memory.seek(start)
        memory.write(piece)
        write_at(file, memoryview(piece), start)
        start = chance.randrange(size)
        found = bytearray(min(chance.choice([1, 50, SECTOR]), size - start))
        read_at(file, memoryview(found), start)
        assert bytes(found) == memory.getvalue()[start : start + len(found)]
    assert scratch_in_memory(file, size)[:] == memory.getvalue()
    stored = stored_in(file)
    assert not any(memory.getvalue()[at : at + 16] in stored for at in range(0, 5 * SECTOR, 16))


def test_a_sector_that_is_written_again_shows_nothing_by_comparing_it_with_before(folder: Path) -> None:
    file, page = scratch_file(folder, SECTOR), bytes(SECTOR)
    assert isinstance(file, EncryptedScratch)
    write_at(file, memoryview(page), 0)
    before = stored_in(file)
    write_at(file, memoryview(page), 0)
    assert not any(stored_in(file)[at : at + 16] == before[at : at + 16] for at in range(0, SECTOR, 16))


def test_inputs_of_blocks_kept_in_an_encrypted_file_are_the_same_bits(folder: Path) -> None:
    offload, inputs = Offload(folder), [torch.randn(700, 64) for _ in range(3)]
    kept = [offload.put(number, h) for number, h in enumerate(inputs)]
    assert all(torch.equal(offload.get(each), h) for each, h in zip(kept, inputs, strict=True))
    assert isinstance(offload._file, EncryptedScratch)
    assert inputs[1].numpy().tobytes()[:64] not in stored_in(offload._file)


def test_an_optimizer_paged_to_an_encrypted_file_computes_the_same_bits(folder: Path) -> None:
    results = []
    for pages in (None, folder):
        torch.manual_seed(0)
        parameters = [torch.randn(300, 40).requires_grad_(), torch.randn(70).requires_grad_()]
        optimizer = PagedAdamW(parameters, pages=pages)
        for step in range(3):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() + step)
            optimizer.step(0.01)
        results.append([*(p.detach() for p in parameters), *(value.clone() for value in optimizer.state().values())])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    assert optimizer.state()["0.exp_avg"].numpy().tobytes()[:64] not in stored_in(optimizer._pages._file)  # type: ignore
