"""Name the ways in which llama.cpp splits a text before byte-level BPE merges bytes (GGUF's key tokenizer.ggml.pre).

Each split is a list of regular expressions, applied one after the other: every match becomes a word of its own, and so does the
text between two matches. The expressions say what llama.cpp does (src/llama-vocab.cpp, llm_tokenizer_bpe), written for the
library `tokenizers`; for some families that is simpler than what the model's publisher wrote: "tekken" and "gpt-4o" take every
letter outside a to z and A to Z as upper and lower case at once. A text then has the ids that readers of the GGUF file give it.

llama.cpp's character table knows slightly newer characters than the library does, so rare signs may be split differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SHORT_FORM = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_AFTER_WORDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?:{_SHORT_FORM})|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_AFTER_WORDS}"
_QWEN2 = rf"(?:{_SHORT_FORM})|{_WORD}|\p{{N}}|{_SIGNS}|{_AFTER_WORDS}"
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_ANY_CASE = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_ASCII_SIGN_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK_LETTERS = "".join(
    rf"\x{{{first}}}-\x{{{last or first}}}"
    for first, _, last in (
        part.partition("-")
        for part in [
            "41-5A",
            "61-7A",
            "00B5",
            "00C0-00D6",
            "00D8-00F6",
            "00F8-01BA",
            "01BC-01BF",
            "01C4-0293",
            "0295-02AF",
            "0370-0373",
            "0376",
            "0377",
            "037B-037D",
            "037F",
            "0386",
            "0388-038A",
            "038C",
            "038E-03A1",
            "03A3-03F5",
            "03F7-0481",
            "048A-052F",
            "0531-0556",
            "10A0-10C5",
            "13A0-13F5",
            "13F8-13FD",
            "1C90-1CBA",
            "1CBD-1CBF",
            "1D00-1D2B",
            "1D6B-1D77",
            "1D79-1D9A",
            "1E00-1F15",
            "1F18-1F1D",
            "1F20-1F45",
            "1F48-1F4D",
            "1F50-1F57",
            "1F59",
            "1F5B",
            "1F5D",
            "1F5F-1F7D",
            "1F80-1FB4",
            "1FB6-1FBC",
            "1FBE",
            "1FC2-1FC4",
            "1FC6-1FCC",
            "1FD0-1FD3",
            "1FD6-1FDB",
            "1FE0-1FEC",
            "1FF2-1FF4",
            "1FF6-1FFC",
            "2102",
            "2107",
            "210A-2113",
            "2115",
            "2119-211D",
            "2124",
            "2126",
            "2128",
            "212A-212D",
            "212F-2134",
            "2139",
            "213C-213F",
            "2145-2149",
            "214E",
            "2183",
            "2184",
            "2C00-2C7B",
            "2C7E-2CE4",
            "2CEB-2CEE",
            "2CF2",
            "2CF3",
            "A640-A66D",
            "A680-A69B",
            "A722-A76F",
            "A771-A787",
            "A78B-A78E",
            "AB70-ABBF",
            "FB00-FB06",
            "FB13-FB17",
            "FF21-FF3A",
            "FF41-FF5A",
            "10400-1044F",
            "104B0-104D3",
            "104D8-104FB",
            "10C80-10CB2",
            "10CC0-10CF2",
            "118A0-118DF",
            "1E900-1E943",
        ]
    )
)
"""The letters with case that DeepSeek's first tokenizer lists, as ranges of code points in hexadecimal."""
_CJK = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
_DEEPSEEK_CJK = r"(?:(?!\s)[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}])+"
_DEEPSEEK3 = rf"{_ASCII_SIGN_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_AFTER_WORDS}"

SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "qwen35": (
        rf"(?:{_SHORT_FORM})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_AFTER_WORDS}",
    ),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "tekken": (rf"{'|'.join(_ANY_CASE)}|\p{{N}}|{_SIGNS_AND_SLASHES}|{_AFTER_WORDS}",),
    "gpt-4o": (
        rf"{'|'.join(f'{word}(?:{_SHORT_FORM})?' for word in _ANY_CASE)}|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASHES}|{_AFTER_WORDS}",
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}-\x{3002}]+",
        r"\s+\z",
        _DEEPSEEK_CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", _CJK, _DEEPSEEK3),
    "seed-coder": (rf"(?:{_SHORT_FORM})|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|{_AFTER_WORDS}",),
    "bailingmoe": (rf"(?:{_SHORT_FORM})|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",),
    "minicpm5": (r"\p{N}{1,3}", _QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")),
    "ufakzeka": (rf"{_WORD}|\p{{N}}|{_SIGNS}|{_AFTER_WORDS}",),
}
"""The regular expressions of each split, by the name that llama.cpp's own converter writes for its best-known model."""
_SAME_SPLIT = {
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe chatglm-bpe glm4 glm5",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "bailingmoe": "bailingmoe2 llada-moe",
}
"""Other names in GGUF files for the same split, separated by spaces."""
SPLIT_OF = {name: name for name in SPLITS} | {name: split for split, names in _SAME_SPLIT.items() for name in names.split()}
"""The split that each value of tokenizer.ggml.pre stands for."""
_LLAMA3_NAMES = frozenset(
    ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"]
)


@dataclass(frozen=True)
class PreTokenizer:
    """The way to split texts that a value of tokenizer.ggml.pre stands for, and two habits of its tokenizer.

    ignore_merges: a word that the vocabulary has becomes its token at once, whatever the merges would make of it.
    adds_bos: texts begin with the beginning-of-text token unless the file says otherwise.
    """

    split: str
    ignore_merges: bool = False
    adds_bos: bool = False

    @classmethod
    def named(cls, name: str) -> PreTokenizer | None:
        """Return the pre-tokenizer of this name, or None for one that this module does not know."""
        if name not in SPLIT_OF:
            return None
        as_llama3 = name in _LLAMA3_NAMES or name == "tekken"
        return cls(SPLIT_OF[name], as_llama3 or name in ("glm4", "glm5", "minicpm5"), as_llama3)

    def as_json(self) -> dict[str, Any]:
        """Return the part "pre_tokenizer" of a tokenizer.json that splits texts in this way."""
        if self.split == "gpt-2":
            return _byte_level(use_regex=True)
        if self.split == "smollm":
            return _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))
        splits = [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in SPLITS[self.split]
        ]
        return _sequence(*splits, _byte_level(use_regex=False))


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_of(part: dict[str, Any]) -> str | None:
    """Return the name of the split whose tokenizer.json has this "pre_tokenizer", or None for any other."""
    return next((name for name in SPLITS if PreTokenizer(name).as_json() == part), None)
