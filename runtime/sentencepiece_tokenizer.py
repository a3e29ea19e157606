"""Open tokenizer.model with the `sentencepiece` library, and give the ids that transformers 5 gives."""

from __future__ import annotations

from pathlib import Path

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.special_tokens import AddedToken, SpecialTokens
from edgetune.runtime.token_bytes import SPACE, piece_bytes
from edgetune.runtime.tokenizer_libraries import TokenFinder, one_sentence
from edgetune.runtime.tokenizer_limits import fault_of_sentencepiece, fault_of_tokens
from edgetune.runtime.untrusted_file import MAX_IDS_BEYOND, SENTENCEPIECE_MODEL, read_untrusted


class SentencePieceTokenizer:
    """A vocabulary in tokenizer.model, opened by the `sentencepiece` library.

    sentencepiece puts a space before every text; transformers 5 does so unless the text begins with one, and never
    after a control token. To get the same ids, the model is opened with that step off and this class puts the space.
    """

    # Appended to the file's bytes, protobuf merges it as normalizer_spec { add_dummy_prefix: false }.
    _NO_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(self, path: Path, special: SpecialTokens) -> None:
        import sentencepiece

        data = read_untrusted(path, SENTENCEPIECE_MODEL)
        unreadable = f"{path} is not a sentencepiece model; copy it again, or put tokenizer.json beside it."
        with one_sentence(unreadable):
            fault = fault_of_sentencepiece(data)
            whole = sentencepiece.SentencePieceProcessor(model_proto=data)
            bare = sentencepiece.SentencePieceProcessor(model_proto=data + self._NO_PREFIX)
            puts_space = whole.normalize("a") == f"{SPACE}a"
            # Switching the step off must change nothing else; a model that normalises in its own way is used as it is.
            self._adds_space = puts_space and bare.normalize(" a") == f"{SPACE}a" and bare.normalize("a") == "a"
            self._processor = bare if self._adds_space else whole
            self._num_pieces = self._processor.get_piece_size()
            self.added = self._added_tokens(special)
            pieces = (self._processor.id_to_piece(id) for id in range(self._num_pieces))  # a piece may not be UTF-8
            fault = fault or fault_of_tokens(self.added, pieces)
        self._space_prefix = special.space_prefix
        self.strips_space = puts_space
        if fault is not None:
            raise TokenizerError(f"{path} {fault}; copy it again from its publisher.")
        self.leading: tuple[int, ...] = ()
        self.starts_as_llama = True
        self.size = max([self._num_pieces, *(token.id + 1 for token in self.added)])
        self._spelling_beyond = {token.id: token.spelling for token in self.added if token.id >= self._num_pieces}
        # sentencepiece knows no tokens from the JSON files: they are searched for here, the longest first.
        plain = sorted((token for token in self.added if not token.special), key=lambda token: -len(token.spelling))
        self._plain = TokenFinder(plain)

    def _added_tokens(self, special: SpecialTokens) -> list[AddedToken]:
        """Return the model file's control and unknown tokens, and those that the configuration files declare.

        Also completes `special.spelled` with the names that only the model file gives.
        """
        sp = self._processor
        added = {
            sp.id_to_piece(id): AddedToken(sp.id_to_piece(id), id, True)
            for id in range(self._num_pieces)
            if sp.is_control(id) or sp.is_unknown(id)
        }
        for token in special.declared:
            id = token.id if token.id >= 0 else self._piece_id(token.spelling)
            if id is None or not 0 <= id < self._num_pieces + MAX_IDS_BEYOND:
                continue
            is_special = token.special or token.spelling in added or special.is_control(token.spelling)
            added[token.spelling] = AddedToken(token.spelling, id, is_special, token.lstrip, token.rstrip, token.single_word)
        for name, id in ("bos_token", sp.bos_id()), ("eos_token", sp.eos_id()), ("unk_token", sp.unk_id()):
            if id >= 0:
                special.spelled.setdefault(name, sp.id_to_piece(id))
        return list(added.values())

    @property
    def pieces(self) -> list[tuple[str, float]]:
        """Return every piece of the model file with its score, by id."""
        sp = self._processor
        return [(sp.id_to_piece(id), float(sp.get_score(id))) for id in range(self._num_pieces)]

    def _piece_id(self, piece: str) -> int | None:
        """Return the id of a piece of the model file, or None; sentencepiece itself gives the unknown token's id."""
        id = int(self._processor.piece_to_id(piece))
        return id if self._processor.id_to_piece(id) == piece else None

    def encode(self, text: str, first: bool, inside: bool = False) -> list[int]:
        ids: list[int] = []
        for part in self._plain.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_plain(part, first and not ids, inside and not ids)
        return ids

    def _encode_plain(self, text: str, first: bool, inside: bool) -> list[int]:
        """Return the ids of a text in which no added token is looked for."""
        wants_space = (self._space_prefix == "always" and not inside) or (first and self._space_prefix == "first")
        if self._adds_space and wants_space and text[:1] not in ("", " ", SPACE):
            text = " " + text
        return list(self._processor.encode(text))

    def is_used(self, id: int) -> bool:
        return id < self._num_pieces

    def id_of(self, token: str) -> int | None:
        return next((added.id for added in self.added if added.spelling == token), self._piece_id(token))

    def bytes_of(self, id: int) -> bytes:
        if id >= self._num_pieces:
            return self._spelling_beyond.get(id, "").encode()
        return piece_bytes(self._processor.id_to_piece(id))
