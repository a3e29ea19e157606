"""Remember which GGUF file a model folder was converted from, so that an adapter can be exported back to that very file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from edgetune.runtime.errors import ModelError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object_if_there
from edgetune.runtime.untrusted_file import MODEL_CONFIG

FILE = "origin.json"
"""Name of the record in a converted folder."""
CONVERTER = 2
"""Number of the converter's version. It grows with each change of what a GGUF file is converted to, so that models which an
earlier version converted are converted again."""


@dataclass(frozen=True)
class Origin:
    """The GGUF file that a folder was converted from, as it was then."""

    path: str
    """The file, or the first part of a split one, as an absolute path. It stays on this machine: no export holds it."""
    name: str
    """The name that the user typed or that `edgetune models` shows: a path, an Ollama or LM Studio name, `smollm2`."""
    quantisation: str
    """The GGUF type of most weights, such as Q4_1."""
    bytes: int
    """The size of the file, all parts together."""
    modified: int
    """The time of the file's last change, in nanoseconds since 1970; the latest of its parts where it is split."""
    digest: str
    """SHA-256 over the header: metadata, names, shapes, types and offsets of the tensors."""
    converter: int = CONVERTER
    """The version of the converter that made the folder; 1 for records that do not say."""

    @property
    def public_name(self) -> str:
        """Return the name for exports, which may leave this machine."""
        return public_name(self.name)

    @property
    def in_ollama(self) -> bool:
        """Return True if the file lies in Ollama's folder and was named as Ollama does, so that Ollama knows it by `name`."""
        path = Path(self.path)
        return path.parent.name == "blobs" and path.name.startswith("sha256-") and not Path(self.name).is_absolute()

    def why_gone(self) -> str | None:
        """Return why the file cannot be used as the one that was converted, as a sentence; None if it can."""
        from edgetune.conversion.gguf_file import GgufFile

        try:
            found = GgufFile.open(Path(self.path))
        except ModelError as error:
            return str(error)
        if (found.bytes, found.digest) == (self.bytes, self.digest):
            return None
        return f"{self.path} has changed since it was converted."

    def write(self, folder: Path) -> None:
        """Write the record into a converted folder."""
        atomic_write(folder / FILE, self.text())

    def text(self) -> str:
        """Return the record as the contents of FILE."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """Return the record of a model folder, or None for a folder that was not converted. Raises ModelError."""
        content = read_object_if_there(folder / FILE, MODEL_CONFIG)
        kinds = {field.name: int if field.type == "int" else str for field in dataclasses.fields(cls)}
        if not content:
            return None
        content.setdefault("converter", 1)
        if content.keys() != kinds.keys() or any(type(content[name]) is not kind for name, kind in kinds.items()):
            raise ModelError(f"{folder / FILE} is damaged; delete {folder}, and the model is converted again when it is used.")
        return cls(**content)


def public_name(name: str) -> str:
    """Return a model's name without the folders above it, which may tell whose machine this is."""
    return Path(name).name if Path(name).is_absolute() else name
