"""Rewrite config.json and the tokenizer's files of a model, so that older programs read the copy as edgetune read the original.

transformers 4 knows neither `rope_parameters` (it takes theta for 10,000, and says nothing), nor the tokenizer class
TokenizersBackend, nor chat_template.jinja. A class such as GPT2Tokenizer makes transformers 5 rebuild a tokenizer that splits
some texts differently from the tokenizer.json beside it, which edgetune trains with.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from edgetune.runtime.config_keys import LOADING
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.json_file import read_object, read_object_if_there
from edgetune.runtime.json_tokenizer import JsonTokenizer
from edgetune.runtime.sentencepiece_tokenizer import SentencePieceTokenizer
from edgetune.runtime.special_tokens import SpecialTokens
from edgetune.runtime.tokenizer import Tokenizer, has_tokenizer, read_template
from edgetune.runtime.untrusted_file import TOKENIZER_CONFIG, TOKENIZER_JSON

_REACHES_OUTSIDE = re.compile(r"\w+_file|\w*implementation|custom_\w+|\w*name_or_path")
"""Keys of config.json and tokenizer_config.json, beside LOADING, that name code, a file or a repository, which a reader might
load, or which tell where the model lay on this machine. No model that edgetune reads needs one."""
FAST_CLASS = "PreTrainedTokenizerFast"
"""The tokenizer class with which every version of transformers uses tokenizer.json as it is."""
_ORIGINAL = "original_max_position_embeddings"
_AS_IT_IS = (FAST_CLASS, "TokenizersBackend")
"""FAST_CLASS, and its name in transformers 5."""


def config_for_readers(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with the older spelling of RoPE's settings and of the dtype beside transformers 5's.

    Keys that could lead another program to code, or to files outside the folder, are left out.
    """
    older: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        theta = config.get("rope_theta")
        if isinstance(rope.get("sliding_attention"), dict):  # Gemma 3 has two
            older["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta") or 10000.0
            rope, theta = rope.get("full_attention") or {}, theta or 1000000.0
        scaling = {key: value for key, value in rope.items() if key != "rope_theta" and value is not None}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        older["rope_theta"] = rope.get("rope_theta") or theta or 10000.0
        if kind == "longrope":  # older Phis accept these three alone
            older |= {key: scaling[key] for key in ("partial_rotary_factor", _ORIGINAL) if key in scaling}
            scaling = {"type": kind, "short_factor": scaling.get("short_factor"), "long_factor": scaling.get("long_factor")}
        older["rope_scaling"] = None if kind == "default" else scaling
    if "dtype" in config and "torch_dtype" not in config:
        older["torch_dtype"] = config["dtype"]
    return _within_folder({**config, **older})


def _within_folder(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without the keys that are in LOADING or that _REACHES_OUTSIDE matches."""
    return {key: value for key, value in settings.items() if key not in LOADING and not _REACHES_OUTSIDE.fullmatch(key)}


def tokenizer_files_for_readers(folder: Path) -> dict[str, str | None]:
    """Return the tokenizer's files that a copy of a model must have instead of the original's, by name; None to leave one out.

    They say what edgetune does: which class reads tokenizer.json, and whether texts begin with bos.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return {}
    config = _within_folder(read_object(folder / "tokenizer_config.json", TOKENIZER_CONFIG))
    files: dict[str, str | None] = {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
    if not has_tokenizer(folder):
        return files
    tokenizer = Tokenizer.load(folder)
    if (folder / "tokenizer.json").is_file():
        if not tokenizer.rebuilt_as_llama:
            config["tokenizer_class"] = FAST_CLASS
        if tokenizer.leading != tokenizer.start.chat:
            source = read_object(folder / "tokenizer.json", TOKENIZER_JSON)
            source["post_processor"] = _post_processor(tokenizer)
            files["tokenizer.json"] = json.dumps(source, ensure_ascii=False)
        if (folder / "tokenizer.model").is_file() and not agrees_with_sentencepiece(folder):
            files["tokenizer.model"] = None
    if tokenizer.rebuilt_as_llama:  # without these, transformers 4 puts a space after control tokens, and none before a text
        config.setdefault("legacy", False)
        if config.get("add_prefix_space") is None:
            config.pop("add_prefix_space", None)
    config["add_bos_token"] = tokenizer.start.adds_bos
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects an object under this key
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    template = read_template(folder, config)
    if (folder / "chat_template.jinja").is_file() and template is not None:
        config["chat_template"] = template[0]
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return files


def rebuilding_class(folder: Path) -> str | None:
    """Return the tokenizer class of a model folder with which transformers may split texts otherwise than its tokenizer.json.

    None for a class that takes the file as it is, and for one that edgetune reads as transformers does.
    """
    kind = read_object_if_there(folder / "tokenizer_config.json", TOKENIZER_CONFIG).get("tokenizer_class")
    if not isinstance(kind, str) or kind in _AS_IT_IS or not (folder / "tokenizer.json").is_file():
        return None
    return None if Tokenizer.load(folder).rebuilt_as_llama else kind[:80]


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a post-processor for tokenizer.json that begins texts with bos, or with nothing."""
    sequence = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    if not tokenizer.start.adds_bos:
        return {"type": "TemplateProcessing", "single": sequence[:1], "pair": sequence, "special_tokens": {}}
    bos = tokenizer.start_text
    first, second = ({"SpecialToken": {"id": bos, "type_id": kind}} for kind in (0, 1))
    return {
        "type": "TemplateProcessing",
        "single": [first, sequence[0]],
        "pair": [first, sequence[0], second, sequence[1]],
        "special_tokens": {bos: {"id": bos, "ids": list(tokenizer.start.chat), "tokens": [bos]}},
    }


def agrees_with_sentencepiece(folder: Path) -> bool:
    """Return True if the tokenizer.model of a model folder has the pieces of the tokenizer.json beside it, in the same order.

    One that another model left behind does not, nor does git-lfs's pointer to one; tokenizer.json is then the one to trust, as
    transformers does. Raises TokenizerError for a damaged tokenizer.json.
    """
    json_file = folder / "tokenizer.json"
    vocabulary = JsonTokenizer(json_file, SpecialTokens())
    try:
        pieces = SentencePieceTokenizer(folder / "tokenizer.model", SpecialTokens()).pieces
    except TokenizerError:
        return False
    if [vocabulary.piece_of(id) for id in range(len(pieces))] != [piece for piece, _ in pieces]:
        return False
    model = read_object(json_file, TOKENIZER_JSON).get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges if isinstance(merges, list) else []):
        ranks.setdefault(merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge), rank)
    by_score = sorted((-score, ranks[piece]) for piece, score in pieces if piece in ranks)
    return all(before[1] <= after[1] for before, after in itertools.pairwise(by_score))
