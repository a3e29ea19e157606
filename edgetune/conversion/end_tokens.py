"""Find the control tokens of a GGUF vocabulary and those that end generation, as llama.cpp does: by type, key and spelling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

END_SPELLINGS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
"""Tokens that end generation whatever the file's keys say, by spelling (llama.cpp, src/llama-vocab.cpp, special_eog_ids)."""
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""GGUF's keys tokenizer.ggml.…_token_id whose tokens end generation."""
_FILL_IN_ENDS = {
    "fim_pad": ["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    "fim_rep": ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    "fim_sep": ["<|file_sep|>"],
}
"""Tokens of the fill-in-the-middle format that end generation, by spelling, where the file lacks their key."""
_FILL_IN = frozenset(
    [
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ]
)
"""Tokens of the fill-in-the-middle format that are control tokens whatever their type says."""
_CALLS = ({"<|return|>", "<|call|>"}, {"<|call|>", "<|flush|>"}, {"<|return|>", "<|calls|>"}, {"<|calls|>", "<|flush|>"})
"""Pairs of ends beside which <|end|> only ends a message."""


def end_ids(ids: Mapping[str, int], named: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids that end generation, beginning with those that the file names.

    ids: the id of each token by its spelling. named: the ids that the file's keys give, as {"eos": 2}.
    """
    spelled = {spelling for spelling in END_SPELLINGS if spelling in ids}
    for key, spellings in _FILL_IN_ENDS.items():
        if key not in named:
            spelled.update(spelling for spelling in spellings if spelling in ids)
    found = [named[key] for key in END_KEYS if key in named] + sorted(ids[spelling] for spelling in spelled)
    if any(pair <= spelled for pair in _CALLS):
        found = [id for id in found if id != ids.get("<|end|>")]
    return tuple(dict.fromkeys(found))


def control_ids(ids: Mapping[str, int], by_type: Iterable[int], ends: Iterable[int]) -> frozenset[int]:
    """Return the ids of all control tokens: those of that type, those that end generation, those of fill-in-the-middle.

    A file may call some of them ordinary text; no note may become one all the same.
    """
    return frozenset([*by_type, *ends, *(ids[spelling] for spelling in _FILL_IN if spelling in ids)])
