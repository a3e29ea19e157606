"""Opens files that another program may have written: the one place for it, with one table of limits.

A model folder, an adapter or an export can come from anybody. Without care, a link in it could name a private key, whose text
would then be copied into an export; a FIFO would block for ever; and a small sparse file could fill the memory.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from edgetune.runtime.encrypted_file import EncryptedReader, decrypted
from edgetune.runtime.errors import AdapterError, EdgetuneError, ModelError, TokenizerError, UsageError
from edgetune.runtime.files import private_file


@dataclass(frozen=True)
class FileKind:
    """A kind of untrusted file: its largest size in bytes, the error that its faults raise, and what the user can do."""

    limit: int
    error: type[EdgetuneError]
    advice: str
    links_anywhere: bool = False
    """Follow a link that leaves the folder. For weights, since whatever is not a weight file is refused when it is parsed, and
    for the user's own settings."""


# The limits are chosen by hand, above the largest files in use.
_COPY_MODEL, _COPY_TOKENIZER = "copy the model folder again", "copy it again from the model's publisher"
_COPY_ADAPTER, _EXPORT_AGAIN = "copy the adapter again", "export the folder again"

MODEL_CONFIG = FileKind(4 << 20, ModelError, _COPY_MODEL)
"""config.json of a model folder, and the manifest and configuration of an Ollama model."""
WEIGHT_INDEX = FileKind(16 << 20, ModelError, _COPY_MODEL)
"""model.safetensors.index.json: one line for each tensor of a model."""
MODEL_WEIGHTS = FileKind(1 << 42, ModelError, _COPY_MODEL, links_anywhere=True)
"""A file of weights. It is mapped, not read, so 4 TiB only keeps offsets small."""
COMPANION = FileKind(64 << 20, ModelError, _COPY_MODEL)
"""A file that is copied with a model: its licence, vocab.json, generation_config.json."""
HUB_REFERENCE = FileKind(4096, ModelError, "fetch the model again")
"""refs/main of Hugging Face's cache: the name of a revision."""
TOKENIZER_CONFIG = FileKind(4 << 20, TokenizerError, _COPY_TOKENIZER)
"""tokenizer_config.json and the short files beside it, the chat template included."""
TOKENIZER_JSON = FileKind(64 << 20, TokenizerError, _COPY_TOKENIZER)
"""tokenizer.json. The largest in use (262,144 pieces) takes 34 MB."""
SENTENCEPIECE_MODEL = FileKind(32 << 20, TokenizerError, _COPY_TOKENIZER)
"""tokenizer.model, which is a protobuf and not JSON."""
ADAPTER_CONFIG = FileKind(8 << 20, AdapterError, _COPY_ADAPTER)
"""adapter_config.json and edgetune.json, which holds a digest of every note that the adapter was trained on."""
ADAPTER_WEIGHTS = FileKind(16 << 30, AdapterError, _COPY_ADAPTER, links_anywhere=True)
"""adapter_model.safetensors, or a GGUF file. Rank 512 on every linear of a 70B model takes 13 GB in fp32."""
EXPORT_RECORD = FileKind(8 << 20, ModelError, _EXPORT_AGAIN)
"""golden.json, how-to-call.json and the manifest of a Core ML package."""
CORE_ML_GRAPH = FileKind(1 << 30, ModelError, _EXPORT_AGAIN)
"""model.mlmodel of a Core ML package: its operations, without the large constants."""
CORE_ML_WEIGHTS = FileKind(1 << 42, ModelError, _EXPORT_AGAIN)
"""weight.bin of a Core ML package. It is mapped, not read."""
BUNDLE_MANIFEST = FileKind(1 << 20, AdapterError, _EXPORT_AGAIN)
"""manifest.json of an export to MPS."""
SETTINGS_FILE = FileKind(1 << 20, UsageError, "correct it or delete it", links_anywhere=True)
"""config.toml in edgetune's own folder. It may be a link, as people keep their settings in one place."""
NIGHT_RECORD = FileKind(64 << 20, UsageError, "delete it")
"""nightly.json, the records of nights, and what is known of last night's notes: about 50 bytes for each of them."""
PRIVACY_LEDGER = FileKind(1 << 20, UsageError, "restore it from a backup, or start a new lineage with an empty ledger")
"""A file of privacy-ledger/: what one private run has spent."""

ENCRYPTION_STATE = FileKind(4096, UsageError, "restore it from a backup")
"""encryption.json in the data folder: about 150 bytes."""

MAX_DIGITS = 400
"""Most digits of a number in JSON: a double has 309 before its point. Longer ones take quadratic time to parse."""
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY = 1024, 1 << 20, 1 << 24
"""Most layers, width of a tensor and tokens that config.json may name. The largest in use are 126, 53,248 and 262,144."""
MAX_IDS, MAX_IDS_BEYOND = 1 << 22, 1 << 16
"""Most token ids of a tokenizer, and most ids that added tokens may have beyond the pieces of a tokenizer.model."""
LONGEST_TOKEN = 256
"""Most characters of an added token. The longest in use have about 40."""
LONGEST_PIECE = 4096
"""Most characters of a piece of a vocabulary. The longest in use (runs of spaces and dashes) have 128 to 512."""
MOST_SPLIT_WORK = 1 << 30
"""Most characters that are looked at to find the merges of a GGUF file's pieces: the sum of their squared lengths. The largest
vocabulary in use takes 2**25."""
MOST_ADDED_TOKENS = 1 << 14
"""Most added tokens of a tokenizer. The tokenizer in use with the most has about 6,400."""
MOST_GROWTH = 64
"""Largest factor by which a tokenizer's normalizer may lengthen a text. Unicode's compatibility forms reach 18."""
MAX_SAFETENSORS_HEADER = 4 << 20
"""Longest header of a safetensors file, in bytes: about 30,000 tensors. Parsed, JSON takes up to 80 times as much memory."""
MAX_DIMENSIONS = 8
"""Most dimensions of a tensor, so that a product of huge sizes costs nothing. A weight has 2."""
MAX_STATE_BYTES = 1 << 16
"""Longest quant_state (JSON) of a 4-bit weight, in bytes. bitsandbytes writes about 200."""
MAX_SHARDS = 512
"""Most files that a model's weights are spread over. Each stays open; the largest models in use have 191."""
MAX_TEXT_FILES = 16
"""Most licences and notices that are copied with a model."""
MAX_PATTERNS, LONGEST_PATTERN, MAX_ALTERNATIVES = 32, 300, 64
"""Most keys of an alpha_pattern that are more than names, the longest such key in characters, and most ways to choose among its
alternatives. The keys of a hostile file then take seconds."""
MAX_CHECKED = 1 << 24
"""Most numbers of a matrix that is looked at in an adapter that is refused anyway."""
MAX_GGUF_HEADER, MAX_GGUF_TEXT = 64 << 20, 1 << 20
"""Longest header of a GGUF file, and longest text in it, in bytes. A model's header holds its tokenizer: 151,643 pieces and
their merges take 6 MB."""
MAX_GGUF_KEYS, MAX_GGUF_TENSORS, MAX_GGUF_ITEMS, MAX_GGUF_ALIGNMENT = 1024, 1 << 16, 1 << 21, 1 << 16
"""Most keys, tensors, and items of all arrays of a GGUF file, and the largest alignment of its tensors in bytes. A vocabulary
of 262,144 pieces with scores, types and 514,906 merges has 1.3 million items. A text takes about 60 bytes more in memory than
in the file."""

_SPARSE_FROM, _SPARSE_SHARE = 1 << 20, 16
"""A file of at least this many bytes must lie on the disk for at least 1/16 of them. A sparse file costs its sender nothing and
fills the memory of whoever reads it. Compressing file systems shrink weights to no less than a third. Chosen by hand."""

_SYSTEM_FOLDERS = ("/proc/", "/sys/")
"""Folders whose files look regular and are no data. Those of /dev do not look regular, but for /dev/shm, where data can lie."""


def open_untrusted(path: Path, kind: FileKind) -> FileIO:
    """Open a file for reading, unbuffered, after checking that it is a regular file of a size that its kind allows.

    A link is followed if it stays in the file's folder or leads to the `blobs` of the same Hugging Face cache. Of a file of the
    data folder that is encrypted, the plain bytes are read (runtime/encrypted_file.py).

    Raises `kind.error` for any other link, a FIFO, a device, a folder, a file of /proc, a large sparse file, an encrypted file
    that was changed, and what is unreadable or too large. Raises LockedError for an encrypted file without its key.
    """
    try:
        real = path.resolve(strict=True)
        if not (kind.links_anywhere or _stays_inside(path.parent.resolve(), real)):
            raise kind.error(f"{path} is a link that leaves its folder; replace it by the file itself.")
        # O_NONBLOCK: opening a FIFO must not wait for a writer. O_NOFOLLOW: the resolved path is a link only if it was
        # exchanged for one since.
        more = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_NOCTTY"))
        file = FileIO(str(path), "rb", opener=lambda _, flags: os.open(real, flags | more))
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: a loop of links, before Python 3.13. ValueError: a NUL byte, or half of a surrogate pair, in the name.
        impossible = "no file can have this name" if isinstance(error, ValueError) else "a loop of links"
        reason = getattr(error, "strerror", None) or impossible
        raise kind.error(f"{path} cannot be read ({reason}); check the folder and its permissions.") from error
    about = os.fstat(file.fileno())
    fault = None
    if not stat.S_ISREG(about.st_mode) or real.as_posix().startswith(_SYSTEM_FOLDERS):
        fault = f"{path} cannot be read (it is not a regular file); {kind.advice}."
    elif about.st_size > kind.limit:
        fault = f"{path} is larger than {kind.limit >> 20} MiB, the limit for such a file; {kind.advice}."
    elif about.st_size >= _SPARSE_FROM and _is_sparse(file, about):
        fault = f"{path} is a sparse file: of its {about.st_size >> 20:,} MiB hardly any are on the disk; {kind.advice}."
    if fault is not None:
        file.close()
        raise kind.error(fault)
    plain = decrypted(file, path, kind.error)
    # Untrusted files are no logs, whose plain bytes would come as BytesIO.
    return plain if isinstance(plain, EncryptedReader) else file


def read_untrusted(path: Path, kind: FileKind) -> bytes:
    """Return a file's bytes. Raises `kind.error` as `open_untrusted` does, also for a file that grew past its limit since."""
    data = bytearray()
    with open_untrusted(path, kind) as file:
        while piece := _next_piece(path, kind, file, kind.limit - len(data)):
            data += piece
    return bytes(data)


def copy_untrusted(source: Path, kind: FileKind, destination: Path) -> None:
    """Copy a file, a mebibyte at a time, to a new private file (0600) in a folder that is not published yet.

    Raises `kind.error` as `read_untrusted` does, and OSError where the copy cannot be written.
    """
    with open_untrusted(source, kind) as file, private_file(destination) as copy:
        left = kind.limit
        while piece := _next_piece(source, kind, file, left):
            copy.write(piece)
            left -= len(piece)
        copy.flush()
        os.fsync(copy.fileno())


def sha256_untrusted(path: Path, kind: FileKind) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal. Raises `kind.error` as `read_untrusted` does."""
    digest, left = hashlib.sha256(), kind.limit
    with open_untrusted(path, kind) as file:
        while piece := _next_piece(path, kind, file, left):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _next_piece(path: Path, kind: FileKind, file: FileIO, left: int) -> bytes:
    """Read up to a mebibyte of a file that may still have `left` bytes. Raises `kind.error`."""
    try:
        piece = file.read(min(1 << 20, left + 1)) or b""
    except OSError as error:
        raise kind.error(f"{path} cannot be read ({error.strerror}); check the folder and its permissions.") from error
    if len(piece) > left:
        raise kind.error(f"{path} is larger than {kind.limit >> 20} MiB, the limit for such a file; {kind.advice}.")
    return piece


def _is_sparse(file: FileIO, about: os.stat_result) -> bool:
    """Return True if a file has holes and takes much less of the disk than its size.

    Either alone says little: some systems report few blocks for a file that was just written, or 0 for one that lies elsewhere.
    """
    blocks = getattr(about, "st_blocks", 0)  # of 512 bytes, whatever the file system's own blocks are
    if not hasattr(os, "SEEK_HOLE") or not 0 < blocks * 512 < about.st_size // _SPARSE_SHARE:
        return False
    try:
        first_hole = file.seek(0, os.SEEK_HOLE)
    except OSError:  # a file system that does not know its holes
        return False
    file.seek(0)
    return first_hole < about.st_size


def _stays_inside(folder: Path, real: Path) -> bool:
    """Return True if the resolved path `real` lies in the resolved `folder`, or in the blobs of the cache that `folder` is in.

    Hugging Face's cache: models--ORG--NAME/snapshots/REVISION/config.json links to models--ORG--NAME/blobs/DIGEST.
    """
    if real.is_relative_to(folder):
        return True
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    return snapshots is not None and real.is_relative_to(snapshots.parent / "blobs")
