"""Convert a model folder's tokenizer, chat template and sampling settings to GGUF's keys (tokenizer.*, general.sampling.*).

llama.cpp has two tokenizers for the models that edgetune runs. "llama" merges the pair of pieces with the best score, as
sentencepiece does. "gpt2" is byte-level BPE by ranks; before it merges, it splits the text in a way that is named after a
model family. A tokenizer with a split that has no name in llama.cpp is refused: with a wrong one the model would read other
words than it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.export.gguf.pre_tokenizers import split_of
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.generation_config import SamplingSettings, read_sampling
from edgetune.runtime.json_file import read_object, read_object_if_there
from edgetune.runtime.json_tokenizer import JsonTokenizer
from edgetune.runtime.reader_files import agrees_with_sentencepiece
from edgetune.runtime.sentencepiece_tokenizer import SentencePieceTokenizer
from edgetune.runtime.special_tokens import SpecialTokens
from edgetune.runtime.tokenizer import TURN_ENDS, Tokenizer, read_template
from edgetune.runtime.tokenizer_libraries import TokenizerLibrary
from edgetune.runtime.untrusted_file import SENTENCEPIECE_MODEL, TOKENIZER_CONFIG, TOKENIZER_JSON, read_untrusted

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of tokens: llama.h's llama_token_type."""
_PADDING_SCORE = -1000.0
"""Score of a token for a row of the embedding that has no piece, as llama.cpp's convert_hf_to_gguf.py writes it."""
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2", _TEKKEN: "tekken"}
"""llama.cpp's name of each split of a text, by the regular expression that the model's publisher wrote in tokenizer.json."""


@dataclass
class Vocabulary:
    """The values of GGUF's tokenizer keys.

    model: "llama" or "gpt2". tokens, scores, types: one per id. merges, and pre (the name of the split): for gpt2 only.
    """

    model: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    ids: dict[str, int] = field(default_factory=dict)
    """The ids of bos, eos, eot, unknown and padding, as far as the model has them."""
    adds_bos: bool = False
    adds_space: bool = False
    template: str | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def add_to(self, writer: Any) -> None:
        """Add the keys to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, id in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.adds_space)
        if self.template is not None:
            writer.add_chat_template(self.template)
        for name, value in (
            ("temp", self.sampling.temperature),
            ("top_p", self.sampling.top_p),
            ("penalty_repeat", self.sampling.repetition_penalty),
        ):
            if value is not None:
                writer.add_float32(f"general.sampling.{name}", value)
        if self.sampling.top_k is not None:
            writer.add_int32("general.sampling.top_k", self.sampling.top_k)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read the tokenizer of a model folder for an embedding of `rows` rows. Ids without a piece get a name that no text spells.

    Raises TokenizerError for a tokenizer that llama.cpp cannot reproduce.
    """
    config = read_object_if_there(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    template = read_template(folder, config)
    names = SpecialTokens.read(folder, config, template[0] if template else "")
    tokenizer = Tokenizer.load(folder)
    pieces: TokenizerLibrary
    if (folder / "tokenizer.json").is_file():
        source = _json(folder / "tokenizer.json")
        pieces = JsonTokenizer(folder / "tokenizer.json", names)
        found = _from_json(source, folder)
    else:
        source = {}
        pieces = SentencePieceTokenizer(folder / "tokenizer.model", names)
        found = _sentencepiece(folder / "tokenizer.model")
    if len(found.tokens) > rows:
        raise TokenizerError(
            f"{folder} has {len(found.tokens)} tokens, but only {rows} rows of embedding; copy the model again."
        )
    for id in range(len(found.tokens), rows):
        found.tokens.append(f"[PAD{id}]")
        found.scores.append(_PADDING_SCORE)
        found.types.append(UNUSED)
    unknown = pieces.id_of(names.spelled.get("unk_token") or "") if found.model == "llama" else None
    for token in pieces.added:
        if token.id < rows:
            found.tokens[token.id] = token.spelling
            found.types[token.id] = UNKNOWN if token.id == unknown else CONTROL if token.special else USER_DEFINED
    turn_ends = {pieces.id_of(end) for end in TURN_ENDS}
    special = {
        "bos": tokenizer.bos_id,
        "eos": next(iter(tokenizer.eos_ids), None),
        "eot": next((id for id in tokenizer.eos_ids if id in turn_ends), None),
        "unknown": unknown,
        "padding": tokenizer.pad_id,
    }
    found.ids = {name: id for name, id in special.items() if id is not None and id < rows}
    found.adds_bos = tokenizer.start.adds_bos
    letter = pieces.encode("a", True)  # begins with a space if the tokenizer puts one in front of a text
    found.adds_space = found.model == "llama" and bool(letter) and pieces.bytes_of(letter[0]).startswith(b" ")
    found.template = template[0] if template else None
    found.sampling = read_sampling(folder)
    return found


def _json(path: Path) -> dict[str, Any]:
    """Read tokenizer.json. Raises TokenizerError where it is not one."""
    value = read_object(path, TOKENIZER_JSON)
    if not isinstance(value.get("model"), dict):
        raise TokenizerError(f"{path} is not a tokenizer; copy it again from the model's publisher.")
    return value


def _from_json(source: dict[str, Any], folder: Path) -> Vocabulary:
    """Convert tokenizer.json, or the sentencepiece model beside it, which has the scores that tokenizer.json lacks.

    A sentencepiece model with other pieces belongs to another model and is not used.
    """
    if (source.get("decoder") or {}).get("type") == "ByteLevel":
        return _byte_level(source, folder)
    if (folder / "tokenizer.model").is_file() and agrees_with_sentencepiece(folder):
        return _sentencepiece(folder / "tokenizer.model")
    return _merged_pieces(source, folder)


def _bpe(source: dict[str, Any], folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the pieces by id, and the pairs that merge, of the BPE in tokenizer.json."""
    model = source["model"]
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        raise TokenizerError(
            f"{folder} has a tokenizer of type {model.get('type')}, which llama.cpp does not have; expected BPE."
        )
    ids = {id: piece for piece, id in vocab.items() if type(id) is int}
    pieces = [ids.get(id, f"[PAD{id}]") for id in range(max(ids, default=-1) + 1)]
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return pieces, [(pair[0], pair[1]) for pair in pairs]


def _byte_level(source: dict[str, Any], folder: Path) -> Vocabulary:
    """Convert a byte-level BPE."""
    pieces, pairs = _bpe(source, folder)
    normalizer = (source.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp normalises nothing; NFC leaves text that is already composed unchanged
        raise TokenizerError(
            f"The tokenizer in {folder} alters texts ({normalizer}), but llama.cpp does not; type `edgetune export hf`."
        )
    types = [NORMAL] * len(pieces)
    return Vocabulary("gpt2", pieces, [0.0] * len(pieces), types, [" ".join(pair) for pair in pairs], _split(source, folder))


def _split(source: dict[str, Any], folder: Path) -> str:
    """Return llama.cpp's name for the way tokenizer.json splits a text before merging. Raises TokenizerError if it has none."""
    part = source.get("pre_tokenizer") or {}
    name = split_of(part)
    if name is not None:
        return name
    steps = part.get("pretokenizers", []) if part.get("type") == "Sequence" else [part]
    kinds = [step.get("type") for step in steps]
    byte_level = steps[-1] if kinds and kinds[-1] == "ByteLevel" else {}
    prefix = byte_level.get("add_prefix_space")
    if kinds == ["Split", "ByteLevel"] and not prefix and byte_level.get("use_regex") is False:
        regex = (steps[0].get("pattern") or {}).get("Regex")
        if regex in PUBLISHED_SPLITS and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return PUBLISHED_SPLITS[regex]
    if not prefix and byte_level.get("use_regex", True) is True:
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
    raise TokenizerError(
        f"The tokenizer in {folder} splits texts into words ({', '.join(map(str, kinds)) or 'not at all'}) in a way that "
        "edgetune cannot express for llama.cpp; type `edgetune export hf`."
    )


def _merged_pieces(source: dict[str, Any], folder: Path) -> Vocabulary:
    """Convert sentencepiece's BPE from tokenizer.json: the earlier a piece is merged, the better its score."""
    pieces, pairs = _bpe(source, folder)
    if not source["model"].get("byte_fallback"):
        raise TokenizerError(f"The tokenizer in {folder} has no byte pieces, which llama.cpp needs; type `edgetune export hf`.")
    rank: dict[str, int] = {}
    for n, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, n)
    scores = [-float(rank.get(piece, len(pairs))) for piece in pieces]
    types = [BYTE if _is_byte(piece) else NORMAL for piece in pieces]
    return Vocabulary("llama", pieces, scores, types)


def _sentencepiece(path: Path) -> Vocabulary:
    """Convert a sentencepiece model."""
    import sentencepiece

    data = read_untrusted(path, SENTENCEPIECE_MODEL)
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise TokenizerError(
            f"{path} is not a sentencepiece model; copy it again, or remove it: the tokenizer.json beside it is enough."
        ) from None
    ids = range(sp.get_piece_size())
    types = [CONTROL if sp.is_control(id) else UNUSED if sp.is_unused(id) else BYTE if sp.is_byte(id) else NORMAL for id in ids]
    return Vocabulary("llama", [sp.id_to_piece(id) for id in ids], [float(sp.get_score(id)) for id in ids], types)


def _is_byte(piece: str) -> bool:
    """Return True for a byte piece, such as <0x0A>."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
