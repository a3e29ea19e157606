"""Read files that another program may have written, nearly all of them JSON, with one size limit for each kind of file.

Every such file is untrusted: its size is checked before it is parsed, and every fault becomes one sentence for the user.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.runtime.errors import AdapterError, EdgetuneError, ModelError, TokenizerError


@dataclass(frozen=True)
class FileKind:
    """A kind of untrusted file: the most bytes that are read, the error that its faults raise, and what the user can do."""

    limit: int
    error: type[EdgetuneError]
    advice: str


# The limits are chosen by hand, several times the largest file of each kind that was seen in use.
_COPY_MODEL, _COPY_TOKENIZER = "copy the model folder again", "copy it again from the model's publisher"
_COPY_ADAPTER, _EXPORT_AGAIN = "copy the adapter again", "export the folder again"

MODEL_CONFIG = FileKind(4 << 20, ModelError, _COPY_MODEL)
"""config.json of a model folder, and the manifest and configuration of an Ollama model."""
WEIGHT_INDEX = FileKind(64 << 20, ModelError, _COPY_MODEL)
"""model.safetensors.index.json: one line for each tensor of a model."""
TOKENIZER_CONFIG = FileKind(4 << 20, TokenizerError, _COPY_TOKENIZER)
"""tokenizer_config.json and the short files beside it, the chat template included."""
TOKENIZER_JSON = FileKind(64 << 20, TokenizerError, _COPY_TOKENIZER)
"""tokenizer.json. The largest in use (262,144 pieces) takes 34 MB."""
SENTENCEPIECE_MODEL = FileKind(32 << 20, TokenizerError, _COPY_TOKENIZER)
"""tokenizer.model, which is a protobuf and not JSON."""
ADAPTER_CONFIG = FileKind(8 << 20, AdapterError, _COPY_ADAPTER)
"""adapter_config.json and edgetune.json, which holds a digest of every note that the adapter was trained on."""
EXPORT_RECORD = FileKind(8 << 20, ModelError, _EXPORT_AGAIN)
"""golden.json, how-to-call.json and the manifest of a Core ML package."""
BUNDLE_MANIFEST = FileKind(1 << 20, AdapterError, _EXPORT_AGAIN)
"""manifest.json of an export to MPS."""


def read_limited(path: Path, kind: FileKind) -> bytes:
    """Return a file's bytes. Raises `kind.error` for a file that cannot be read or exceeds the limit of its kind."""
    try:
        with path.open("rb") as file:
            data = file.read(kind.limit + 1)
    except OSError as error:
        raise kind.error(f"{path} cannot be read ({error.strerror}); check the folder and its permissions.") from error
    if len(data) > kind.limit:
        raise kind.error(f"{path} is larger than {kind.limit >> 20} MiB, the limit for such a file; {kind.advice}.")
    return data


def read_value(path: Path, kind: FileKind) -> Any:
    """Return the JSON value in a file. Raises `kind.error` as `read_limited` does, and for anything that is not JSON."""
    try:
        return json.loads(read_limited(path, kind))
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise kind.error(f"{path} is not valid JSON; {kind.advice}.") from error


def read_object(path: Path, kind: FileKind) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `kind.error` as `read_value` does, and for any other JSON value."""
    value = read_value(path, kind)
    if not isinstance(value, dict):
        raise kind.error(f"{path} does not hold a JSON object; {kind.advice}.")
    return value


def read_object_if_there(path: Path, kind: FileKind) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if there is no such file. Raises `kind.error` as `read_object` does."""
    return read_object(path, kind) if path.is_file() else {}
