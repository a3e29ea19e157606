"""Lists the models that Ollama keeps: manifests that name blobs by digest, one of which is the GGUF file.

Of an Ollama model only the weights are used, and the tokenizer and chat template that are in the GGUF file itself. Its other
layers (Ollama's own template, system prompt, parameters) are for Ollama alone, and what is not taken over is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.library.inspect_model import MAX_ENTRIES, Candidate, list_folder, read_config

SOURCE = "Ollama"
_KIND = "application/vnd.ollama.image."
"""Beginning of a layer's mediaType; the kind of the layer follows."""
_IGNORED = {
    "system": "system prompt",
    "messages": "first messages",
    "params": "sampling parameters",
    "projector": "part for images",
}
"""Words for the layers that are ignored and whose loss can be noticed, by their kind. A template is in the GGUF file too."""


def ollama_models(root: Path) -> Iterator[Candidate]:
    """Yield the models of Ollama's folder, which keeps manifests/HOST/NAMESPACE/MODEL/TAG, each a JSON object."""
    manifests = root / "manifests"
    found = [manifests]
    for _ in range(4):
        found = [path for folder in found for path in list_folder(folder)][:MAX_ENTRIES]
    for path in found:
        if os.path.isfile(path):
            host, namespace, model, tag = path.relative_to(manifests).parts
            # `ollama` itself leaves its default host and namespace out of a name.
            parts = [host] * (host != "registry.ollama.ai") + [namespace] * (namespace != "library") + [f"{model}:{tag}"]
            yield _model(root, path, "/".join(parts))


def _model(root: Path, manifest: Path, name: str) -> Candidate:
    listed = read_config(manifest).get("layers")
    layers = [layer for layer in listed if isinstance(layer, dict)] if isinstance(listed, list) else []
    kinds = [str(layer.get("mediaType")).removeprefix(_KIND) for layer in layers]
    blobs = [_blob(root, layer) for layer, kind in zip(layers, kinds, strict=True) if kind == "model"]
    blob = blobs[0] if len(blobs) == 1 else None
    if blob is None or not os.path.isfile(blob):
        found = {0: "no model", 1: "a model whose file is not there"}.get(len(blobs), f"{len(blobs)} files, expected one")
        refusal = f"{manifest} names {found}; type `ollama pull {name}` to fetch it again."
        return Candidate(name, manifest, SOURCE, True, refusal)
    if "adapter" in kinds:
        refusal = (
            f"{name} has an adapter of its own in Ollama, and edgetune trains on bare base models; name the model that it was "
            f"made from: `ollama show --modelfile {name}` says which."
        )
        return Candidate(name, blob, SOURCE, True, refusal)
    ignored = [words for kind, words in _IGNORED.items() if kind in kinds]
    said = f"Of {name}, edgetune ignores what Ollama alone uses: {', '.join(ignored)}."
    return Candidate(name, blob, SOURCE, True, ignored=(said,) if ignored else ())


def _blob(root: Path, layer: Any) -> Path | None:
    """Return the file of a manifest's layer. Only a well-formed digest becomes a path, so none can point elsewhere."""
    digest = layer.get("digest") if isinstance(layer, dict) else None
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", digest) if isinstance(digest, str) else None
    return root / "blobs" / f"sha256-{match[1]}" if match else None
