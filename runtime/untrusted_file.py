"""Opens files that another program may have written: the one place for it, with one table of limits.

A model folder, an adapter or an export can come from anybody. Without care, a link in it could name a private key, whose text
would then be copied into an export; a FIFO would block for ever; and a small sparse file could fill the memory.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from edgetune.runtime.errors import AdapterError, EdgetuneError, ModelError, TokenizerError, UsageError


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
WEIGHT_INDEX = FileKind(64 << 20, ModelError, _COPY_MODEL)
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
ADAPTER_WEIGHTS = FileKind(16 << 30, AdapterError, _COPY_ADAPTER)
"""adapter_model.safetensors. Rank 512 on every linear of a 70B model takes 13 GB in fp32."""
EXPORT_RECORD = FileKind(8 << 20, ModelError, _EXPORT_AGAIN)
"""golden.json, how-to-call.json and the manifest of a Core ML package."""
BUNDLE_MANIFEST = FileKind(1 << 20, AdapterError, _EXPORT_AGAIN)
"""manifest.json of an export to MPS."""

SETTINGS_FILE = FileKind(1 << 20, UsageError, "correct it or delete it", links_anywhere=True)
"""config.toml in edgetune's own folder. It may be a link, as people keep their settings in one place."""

_NOT_DOCUMENTS = ("/proc/", "/sys/", "/dev/")
"""Folders whose files are not data on a disk, although some look like regular files."""


def open_untrusted(path: Path, kind: FileKind) -> FileIO:
    """Open a file for reading, unbuffered, after checking that it is a regular file of a size that its kind allows.

    A link is followed if it stays in the file's folder or leads to the `blobs` of the same Hugging Face cache.

    Raises `kind.error` for any other link, a FIFO, a device, a folder, a file of /proc, and what is unreadable or too large.
    """
    try:
        real = path.resolve(strict=True)
        if not (kind.links_anywhere or _stays_inside(path.parent.resolve(), real)):
            raise kind.error(f"{path} is a link that leaves its folder; replace it by the file itself.")
        # O_NONBLOCK: opening a FIFO must not wait for a writer. O_NOFOLLOW: the resolved path is a link only if it was
        # exchanged for one since.
        flags = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
        file = os.fdopen(os.open(real, os.O_RDONLY | flags), "rb", buffering=0)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise kind.error(f"{path} cannot be read ({reason}); check the folder and its permissions.") from error
    about = os.fstat(file.fileno())
    fault = None
    if not stat.S_ISREG(about.st_mode) or real.as_posix().startswith(_NOT_DOCUMENTS):
        fault = f"{path} cannot be read (it is not a regular file); {kind.advice}."
    elif about.st_size > kind.limit:
        fault = f"{path} is larger than {kind.limit >> 20} MiB, the limit for such a file; {kind.advice}."
    if fault is not None:
        file.close()
        raise kind.error(fault)
    return file


def read_untrusted(path: Path, kind: FileKind) -> bytes:
    """Return a file's bytes. Raises `kind.error` as `open_untrusted` does, also for a file that grew past its limit since."""
    with open_untrusted(path, kind) as file:
        try:
            data = bytearray()
            while piece := file.read(min(1 << 20, kind.limit + 1 - len(data))):
                data += piece
        except OSError as error:
            raise kind.error(f"{path} cannot be read ({error.strerror}); check the folder and its permissions.") from error
    if len(data) > kind.limit:
        raise kind.error(f"{path} is larger than {kind.limit >> 20} MiB, the limit for such a file; {kind.advice}.")
    return bytes(data)


def _stays_inside(folder: Path, real: Path) -> bool:
    """Return True if the resolved path `real` lies in the resolved `folder`, or in the blobs of the cache that `folder` is in.

    Hugging Face's cache: models--ORG--NAME/snapshots/REVISION/config.json links to models--ORG--NAME/blobs/DIGEST.
    """
    if real.is_relative_to(folder):
        return True
    return folder.parent.name == "snapshots" and real.is_relative_to(folder.parent.parent / "blobs")
