"""Open tokenizer.json with the `tokenizers` library, and give the ids that transformers 5 gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.special_tokens import AddedToken, SpecialTokens
from edgetune.runtime.token_bytes import SPACE, byte_level_bytes, piece_bytes
from edgetune.runtime.tokenizer_libraries import one_sentence
from edgetune.runtime.tokenizer_limits import PROBE, fault_of_normalizer, fault_of_tokens, quiet_stderr
from edgetune.runtime.untrusted_file import MAX_IDS, TOKENIZER_JSON, read_untrusted

_LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""The spellings of LLaMA's special tokens, for names that the configuration files leave out or empty."""


class JsonTokenizer:
    """A vocabulary in tokenizer.json, opened by the `tokenizers` library."""

    def __init__(self, path: Path, special: SpecialTokens) -> None:
        import tokenizers

        self._where = str(path)
        unreadable = f"{path} is not a tokenizer that the tokenizers library can read; copy it again from its publisher."
        data = read_untrusted(path, TOKENIZER_JSON)
        with quiet_stderr(), one_sentence(unreadable):
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
            self._refuse(fault_of_tokens(self._added_tokens(), ()) or fault_of_normalizer(self._tokenizer))
            # A file may carry truncation or padding from training; a text must come back whole.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if getattr(self._tokenizer.model, "dropout", None) is not None:  # it would give the same text other ids each time
                self._tokenizer.model.dropout = None
            self._add(special)
            # True means that the spelling of a special token in a text is encoded as plain text, not as the token.
            self._tokenizer.encode_special_tokens = True
            self.added = self._added_tokens()
            self._added_ids = frozenset(token.id for token in self.added)
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            self._ids = frozenset(vocabulary.values())
            self.size = 1 + max(self._ids, default=-1)
            if not 0 < self.size <= MAX_IDS:
                self._refuse(f"has {self.size} token ids, expected 1 to {MAX_IDS}")
            self._refuse(fault_of_tokens(self.added, vocabulary))
            if special.rebuilt_as_llama:
                self._rebuild_as_llama(special.space_prefix)
            self._byte_level, self.strips_space = self._decoder()
            self.leading = self._leading_ids()
        self.starts_as_llama = special.rebuilt_as_llama and not self._byte_level
        for name, spelling in _LLAMA_NAMES.items() if self.starts_as_llama else ():
            if self.id_of(spelling) is not None:
                special.spelled.setdefault(name, spelling)
        self._without_prefix: tokenizers.Tokenizer | None = None

    def _refuse(self, fault: str | None) -> None:
        """Raise TokenizerError if there is a fault."""
        if fault is not None:
            raise TokenizerError(f"{self._where} {fault}; copy it again from its publisher.")

    def _added_tokens(self) -> list[AddedToken]:
        """Return the added tokens of the library's tokenizer."""
        return [
            AddedToken(token.content, id, token.special, token.lstrip, token.rstrip, token.single_word)
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
        ]

    def _leading_ids(self) -> tuple[int, ...]:
        """Return the ids that the post-processor puts before a text. Encode PROBE first, for hostile files to fail at once."""
        self._tokenizer.encode(PROBE, add_special_tokens=False)
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        starts = (at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])

    def is_used(self, id: int) -> bool:
        return id in self._ids

    def _add(self, special: SpecialTokens) -> None:
        """Add the tokens that the configuration files declare; one that exists keeps its id and becomes special.

        Raises TokenizerError if tokenizer.json and tokenizer_config.json disagree on an id.
        """
        import tokenizers

        existing = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        control = [token for token in existing.values() if not token.special and special.is_control(token.content)]
        self._tokenizer.add_special_tokens(control)
        for token in special.declared:
            old = existing.get(token.spelling)
            if old is not None and (old.special or not token.special):
                continue
            # Adding a spelling without an id would invent an id. Tokenizer._id_of_name decides whether its absence matters.
            if old is None and token.id < 0 and self.id_of(token.spelling) is None:
                continue
            new = tokenizers.AddedToken(
                token.spelling,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
            )
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([new])
            id = self.id_of(token.spelling)
            if token.id >= 0 and id != token.id:
                raise TokenizerError(
                    f"{self._where} has id {id} for a token that tokenizer_config.json declares as {token.id}; "
                    "take both files from the same model."
                )

    def _rebuild_as_llama(self, space_prefix: str) -> None:
        """Put the space before a text as transformers 5 does for LLaMA models, whose older files do it by a normalizer.

        transformers 5 replaces that normalizer by the pre-tokenizer Metaspace, which gives other ids for some texts.
        """
        from tokenizers import normalizers, pre_tokenizers

        normalizer, pre_tokenizer = map(self._state, (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer))
        if (self._prepends and not pre_tokenizer) or (not normalizer and pre_tokenizer.get("type") == "Metaspace"):
            self._tokenizer.normalizer = normalizers.Sequence([])
            self._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, space_prefix, split=False)

    @property
    def _prepends(self) -> bool:
        """Return True if the normalizer puts a space before every text and writes spaces as ▁, as LLaMA's older files say."""
        normalizer = self._state(self._tokenizer.normalizer)
        steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
        return [step.get("type") for step in steps] == ["Prepend", "Replace"] and steps[0].get("prepend") == SPACE

    @staticmethod
    def _state(part: Any) -> dict[str, Any]:
        """Return the settings of a part of the tokenizer as tokenizer.json writes them; {} for a part that is missing."""
        state = json.loads(part.__getstate__()) if part is not None else {}
        return state if isinstance(state, dict) else {}

    def _decoder(self) -> tuple[bool, bool]:
        """Return (is byte-level, strips the first space). Raises TokenizerError for the decoder of an unsupported model."""
        state = self._state(self._tokenizer.decoder)
        steps = state.get("decoders", []) if state.get("type") == "Sequence" else [state]
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return True, False
        if kinds == ["Metaspace"] and steps[0].get("replacement") == SPACE:
            return False, steps[0].get("prepend_scheme", "always") != "never"
        # The other spelling of the same decoder, in steps: ▁ to a space, <0x0A> to a byte, the first space off.
        spaces = {"pattern": {"String": SPACE}, "content": " "}
        only_spaces = all(step.items() >= spaces.items() for step in steps if step.get("type") == "Replace")
        strips = [(step.get("content"), step.get("start"), step.get("stop")) for step in steps if step.get("type") == "Strip"]
        if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Replace" in kinds and only_spaces:
            if not strips or strips == [(" ", 1, 0)]:
                return False, bool(strips)
            if strips == [(" ", 0, 0)]:
                return False, False
        named = ", ".join(str(kind) for kind in kinds if kind is not None)
        raise TokenizerError(
            f"{self._where} decodes with {named or 'nothing'}, which edgetune does not support; it reads "
            "byte-level and sentencepiece-like tokenizers: choose a LLaMA, Mistral, SmolLM2 or Qwen model."
        )

    def encode(self, text: str, first: bool, inside: bool = False) -> list[int]:
        if inside and text.startswith(" ") and len(text) > 1 and self._prepends:
            text, inside = text[1:], False  # the normalizer puts that space back
        tokenizer = self._tokenizer if first else self._continuation_tokenizer(inside)
        sentence = (
            f"{self._where} has no ids for part of a text, because its vocabulary lacks an unknown token or its regular "
            "expressions fail; copy it again from its publisher."
        )
        with one_sentence(sentence):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def _continuation_tokenizer(self, inside: bool) -> Any:
        """Return the tokenizer for text after a control token or, if `inside`, in the middle of a text: it may put no space."""
        pre_tokenizer = self._state(self._tokenizer.pre_tokenizer)
        metaspace = pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme")
        if not (metaspace == "first" or (inside and (metaspace == "always" or self._prepends))):
            return self._tokenizer
        if self._without_prefix is None:
            import tokenizers

            self._without_prefix = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            self._without_prefix.encode_special_tokens = True
            if metaspace:
                self._without_prefix.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                    pre_tokenizer["replacement"], "never", split=bool(pre_tokenizer["split"])
                )
            else:
                self._without_prefix.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
        return self._without_prefix

    def id_of(self, token: str) -> int | None:
        id: int | None = self._tokenizer.token_to_id(token)
        return id

    def piece_of(self, id: int) -> str | None:
        """Return the spelling of an id as the vocabulary has it, or None."""
        piece: str | None = self._tokenizer.id_to_token(id)
        return piece

    def bytes_of(self, id: int) -> bytes:
        token = self.piece_of(id)
        if token is None or not self._byte_level:
            return piece_bytes(token or "")
        # An added token is plain text: its "ü" is not GPT-2's spelling of a byte.
        return token.encode() if id in self._added_ids else byte_level_bytes(token)
