"""Untrusted files are opened in one place, which refuses all that is not a plain file of a sane size."""

from __future__ import annotations

import ast
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from edgetune.runtime.errors import ModelError
from edgetune.runtime.untrusted_file import (
    COMPANION,
    MODEL_WEIGHTS,
    copy_untrusted,
    open_untrusted,
    read_untrusted,
    sha256_untrusted,
)

unix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither FIFOs nor /proc, and links need a privilege")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with one file, beside a private file."""
    (tmp_path / "private").write_text("a key")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "LICENSE").write_text("a licence")
    return folder


@unix
def test_a_link_within_the_folder_is_followed(model: Path) -> None:
    (model / "COPYING").symlink_to("LICENSE")
    assert read_untrusted(model / "COPYING", COMPANION) == b"a licence"


@unix
def test_a_link_of_the_hugging_face_cache_is_followed_into_its_own_blobs_alone(tmp_path: Path) -> None:
    for name in ("models--a--a", "models--b--b"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "1234").write_text(name)
        (tmp_path / name / "snapshots" / "5678").mkdir(parents=True)
    snapshot = tmp_path / "models--a--a" / "snapshots" / "5678"
    (snapshot / "LICENSE").symlink_to("../../blobs/1234")
    (snapshot / "NOTICE").symlink_to("../../../models--b--b/blobs/1234")
    assert read_untrusted(snapshot / "LICENSE", COMPANION) == b"models--a--a"
    (snapshot / "a folder").mkdir()
    (snapshot / "a folder" / "LICENSE").symlink_to("../../../blobs/1234")
    assert read_untrusted(snapshot / "a folder" / "LICENSE", COMPANION) == b"models--a--a"
    with pytest.raises(ModelError, match="NOTICE is a link that leaves its folder; replace it by the file itself"):
        read_untrusted(snapshot / "NOTICE", COMPANION)


@unix
@pytest.mark.parametrize("target", ["../private", "/proc/self/environ", "/etc/hostname", "/dev/zero"])
def test_a_link_that_leaves_the_folder_is_refused(model: Path, target: str) -> None:
    (model / "NOTICE").symlink_to(target)
    with pytest.raises(ModelError, match=r"leaves its folder|cannot be read"):
        read_untrusted(model / "NOTICE", COMPANION)


@unix
@pytest.mark.parametrize("target", ["/proc/self/environ", "/dev/zero", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_weights_are_never_read_from_a_device_or_proc(model: Path, target: str) -> None:
    (model / "model.safetensors").symlink_to(target)
    with pytest.raises(ModelError, match=r"not a regular file|No such file"):
        open_untrusted(model / "model.safetensors", MODEL_WEIGHTS)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm to write to")
def test_a_model_may_lie_in_shared_memory() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (Path(folder) / "LICENSE").write_bytes(b"a licence")
        assert read_untrusted(Path(folder) / "LICENSE", COMPANION) == b"a licence"


@unix
def test_weights_may_lie_on_another_disk(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"weights")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert read_untrusted(model / "model.safetensors", MODEL_WEIGHTS) == b"weights"


@unix
def test_a_fifo_is_refused_without_waiting_for_a_writer(model: Path) -> None:
    os.mkfifo(model / "NOTICE")
    with pytest.raises(ModelError, match="not a regular file"):
        open_untrusted(model / "NOTICE", COMPANION)


@unix
def test_a_loop_of_links_is_refused(model: Path) -> None:
    (model / "NOTICE").symlink_to("NOTICE")
    with pytest.raises(ModelError, match="cannot be read"):
        open_untrusted(model / "NOTICE", COMPANION)


def test_a_sparse_file_over_the_limit_is_refused_before_it_is_read(model: Path) -> None:
    with (model / "NOTICE").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="NOTICE is larger than 64 MiB"):
        read_untrusted(model / "NOTICE", COMPANION)


def test_a_file_at_its_limit_is_read(model: Path) -> None:
    kind = replace(COMPANION, limit=9)
    assert read_untrusted(model / "LICENSE", kind) == b"a licence"
    (model / "LICENSE").write_text("a licence!")
    with pytest.raises(ModelError, match="is larger than"):
        read_untrusted(model / "LICENSE", kind)


def test_a_name_that_no_file_can_have_is_refused(model: Path) -> None:
    for name in ("nul\0byte", "half\ud800", "x" * 5000):
        with pytest.raises(ModelError, match=r"cannot be read \((no file can have this name|File name too long)\)"):
            open_untrusted(model / name, COMPANION)


@unix
def test_a_sparse_file_of_weights_is_refused(model: Path) -> None:
    with (model / "model.safetensors").open("wb") as file:
        file.write(b"\1" * 4096)
        file.truncate(1 << 30)
    with pytest.raises(ModelError, match=r"model\.safetensors is a sparse file: of its 1,024 MiB hardly any are on the disk"):
        open_untrusted(model / "model.safetensors", MODEL_WEIGHTS)


def test_a_copy_is_private_and_whole_and_replaces_nothing(model: Path, tmp_path: Path) -> None:
    copy_untrusted(model / "LICENSE", COMPANION, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"a licence"
    assert os.name == "nt" or stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        copy_untrusted(model / "LICENSE", COMPANION, tmp_path / "copy")
    with pytest.raises(ModelError, match="is larger than"):
        copy_untrusted(model / "LICENSE", replace(COMPANION, limit=8), tmp_path / "too large")


def test_the_digest_is_sha_256(model: Path) -> None:
    assert sha256_untrusted(model / "LICENSE", COMPANION) == hashlib.sha256(b"a licence").hexdigest()


# --- every other place that opens a file ------------------------------------------------------------------------------

OUR_OWN = "a file that edgetune wrote, in the user's private folder or in an export that is not published yet"
SYSTEM = "the system's own file"
INSTALLED = "a file that was installed with edgetune"
ALLOWED = {
    "edgetune/texts/__init__.py::_documents": INSTALLED,
    "runtime/untrusted_file.py::open_untrusted": "the one place",
    "runtime/untrusted_file.py::copy_untrusted": "creates the copy",
    "export/gguf/adapter.py::read_adapter": "maps what open_untrusted opened",
    "edgetune/conversion/gguf_file.py::_open_part": "maps what open_untrusted opened",
    "export/coreml/package.py::Package.constant": "maps what open_untrusted opened",
    "runtime/backends/cpu/build.py::build_in_place": INSTALLED,
    "runtime/backends/metal/library.py::library": INSTALLED,
    "export/mps.py::kernel_source": INSTALLED,
    "runtime/device.py::cpu_name": SYSTEM,
    "runtime/memory.py::anonymous_memory": SYSTEM,
    "runtime/memory.py::resident_pages": SYSTEM,
    "runtime/memory.py::_cgroup_limit": SYSTEM,
    "edgetune/cli/main.py::plain_failures": SYSTEM,
    "edgetune/cli/report.py::report_command": OUR_OWN,
    "edgetune/encrypting.py::_convert_file": OUR_OWN,
    "runtime/files.py::sync_folder": "a folder",
    "runtime/files.py::plain_temporary": "creates the file",
    "runtime/files.py::private_file": "creates the file",
    "runtime/files.py::open_own": "its callers are listed here",
    "runtime/files.py::read_own": "its callers are listed here",
    "runtime/files.py::map_own": "its callers are listed here",
    "runtime/files.py::move_file": "its callers are listed here",
    "runtime/files.py::open_log": "its callers are listed here",
    "runtime/files.py::map_file": "maps what open_untrusted opened",
    "runtime/files.py::scratch_in_memory": OUR_OWN,
    "runtime/encrypted_file.py::EncryptedLog.move": OUR_OWN,
    "runtime/encrypted_file.py::is_encrypted": OUR_OWN,
    "runtime/files.py::atomic_folder": OUR_OWN,
    "runtime/files.py::sha256_file": "its callers are listed here",
    "export/coreml/package.py::Package.fill": OUR_OWN,
    "export/gguf/llamacpp.py::logits": "written by edgetune's child process",
    "export/gguf/llamacpp.py::_ask": "written by edgetune's child process",
    "export/gguf/llamacpp_child.py::_open": "llama.cpp, in a process of its own, on the export",
    "export/gguf/llamacpp_child.py::main": "standard input",
    "export/mlx/reader.py::open_mlx": "mlx-lm, on the export",
    "export/peft.py::open_transformers": "transformers, on the export or a base that edgetune laid out",
    "export/peft.py::read": "peft, on the export",
    "export/probes.py::check_transformers": "transformers, on the export",
    "runtime/tokenizer_limits.py::quiet_stderr": "standard error",
    "export/peft.py::plain_base": "links to weights that were checked",
    "export/mps.py::seal": OUR_OWN,
    "export/mps.py::_manifest": OUR_OWN,
    "edgetune/dataset/anchor_set.py::AnchorSet.open": OUR_OWN,
    "edgetune/dataset/token_store.py::TokenStore.open": OUR_OWN,
    "edgetune/dataset/anchor_set.py::write_predictions": "creates the files",
    "edgetune/dataset/token_store.py::mapped": OUR_OWN,
    "edgetune/dataset/token_store.py::_write_tokens": "creates the files",
    "edgetune/dataset/token_store.py::tokenize": "creates the files",
    "edgetune/documents/note_file.py::open_listed": "notes, which must be the files that were listed",
    "edgetune/documents/note_file.py::open_folder": "a folder",
    "edgetune/documents/messengers/archive.py::Archive._opened": "a member of an archive that open_listed opened",
    "edgetune/documents/parser_child.py::main": "standard streams",
    "edgetune/documents/parser_child.py::_address_space": SYSTEM,
    "edgetune/home.py::_secret": OUR_OWN,
    "edgetune/home.py::_make_secret": "creates the file",
    "edgetune/privacy/landlock.py::_allow_reading": "opens no content: O_PATH names a place to the kernel",
    "edgetune/privacy/rules.py::rules": "the package's own data",
    "edgetune/privacy/rules.py::seed_words": "the package's own data",
    "edgetune/reports/streams.py::_guard": SYSTEM,
    "edgetune/reports/streams.py::_fill_closed_descriptors": SYSTEM,
    "edgetune/events.py::EventLog.__init__": OUR_OWN,
    "edgetune/events.py::read_events": OUR_OWN,
    "edgetune/library/adapter_registry.py::_read_record": OUR_OWN,
    "edgetune/library/exports_made.py::_record": OUR_OWN,
    "edgetune/library/ledger.py::keep": OUR_OWN,
    "edgetune/lock.py::Lock.__enter__": "creates the file",
    "edgetune/nights/vault.py::learnt_and_tried": OUR_OWN,
    "edgetune/nights/this_system.py::_stalls_of_linux": SYSTEM,
    "edgetune/texts/__init__.py::anchor_questions": "the package's own data",
    "edgetune/training/anchor.py::open_anchor": OUR_OWN,
    "edgetune/training/anchor.py::packed_files": OUR_OWN,
    "edgetune/training/anchor.py::unpack_files": "creates the files",
    "edgetune/training/recorded.py::begin_entry": "creates the file",
    "edgetune/training/recorded.py::finish_entry": OUR_OWN,
    "edgetune/training/setup.py::_token_files": OUR_OWN,
    "edgetune/training/unfinished_run.py::_read_sealed_json": OUR_OWN,
}
"""The functions that open a file without open_untrusted, and why each may."""
OPENERS = {
    "open", "fdopen", "FileIO", "read_bytes", "read_text", "safe_open", "load_file", "from_file", "from_pretrained", "memmap",
    "fromfile", "genfromtxt", "loadtxt", "mmap", "load_model", "load_adapters", "sha256_file", "GGUFReader", "LoadFromFile",
    "read_own", "open_own", "map_own", "mapped", "open_log", "move_file", "private_file",
    "copyfile", "copy2", "copytree", "copyfileobj", "symlink_to", "hardlink_to", "torch.load", "np.load", "json.load",
    "pickle.load", "tomllib.load", "shutil.copy", "llama_cpp.Llama", "os.link", "os.symlink",
}  # fmt: skip
"""Functions that open a file, by their last name, or by their whole name where other functions share the last."""
CHECKED = {"SafetensorsFile.open", "TokenStore.open", "GgufFile.open"}
"""Functions called `open` that are listed by what they call themselves."""


def opens_files(path: Path) -> Iterator[str]:
    """Yield the name of each function of a module that opens a file, once for every call."""

    def visit(node: ast.AST, inside: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                called = ast.unparse(child.func)
                if called not in CHECKED and {called, called.rpartition(".")[2]} & OPENERS:
                    yield inside or "the module"
            is_scope = isinstance(child, ast.FunctionDef | ast.ClassDef)
            yield from visit(child, f"{inside}.{child.name}".lstrip(".") if is_scope else inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


def test_every_file_is_opened_here_or_by_a_function_that_may() -> None:
    sources = [path for floor in ("runtime", "export", "edgetune") for path in (ROOT / floor).rglob("*.py")]
    found = {f"{path.relative_to(ROOT).as_posix()}::{function}" for path in sources for function in opens_files(path)}
    assert found == set(ALLOWED)


def test_the_search_finds_each_way_to_open_a_file(tmp_path: Path) -> None:
    ways = [f"{way if '.' in way else 'x.' + way}(a)" for way in sorted(OPENERS)]
    (tmp_path / "x.py").write_text("def f():\n" + "".join(f"    {way}\n" for way in ways) + "    SafetensorsFile.open(a)\n")
    assert list(opens_files(tmp_path / "x.py")) == ["f"] * len(ways)
