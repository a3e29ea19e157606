"""Session: text in, text out. What an app embeds, and what `generate`, `ask` and `chat` are made of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgetune.library import adapter_registry as registry
from edgetune.library.loading import SMALLER, Loaded, load_base, open_base
from edgetune.runtime import adapter as adapters
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.device import explain_card_memory
from edgetune.runtime.errors import UsageError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.runner import Runner

MAX_TOKENS = 256
CONTEXT_TOKENS = 4096
"""Positions the KV cache has room for, where the model has as many."""


@dataclass(frozen=True)
class Generation:
    """An answer and what it took; `tokens_per_second` counts the new tokens, prompt left out."""

    text: str
    prompt_tokens: int
    tokens: int
    tokens_per_second: float


class Session:
    """A model and its adapter, kept open. Not for several threads at once."""

    def __init__(self, loaded: Loaded, adapter: Adapter | None = None, adapter_name: str = registry.NONE) -> None:
        self.model_name, self.adapter_name = loaded.choice.name, adapter_name
        self.tokenizer, self.model, self.digest = loaded.tokenizer, loaded.model, loaded.checkpoint.digest
        self._adapter = adapter
        self._generator: Generator | None = None
        self.use_adapter(adapter is not None)

    @classmethod
    def load(cls, model: str | None = None, adapter: str | None = None, device: str = "auto", head: str = "auto") -> Session:
        """Open a model and an adapter by the names that the command line takes.

        model: a path, a Hugging Face id in the local cache, "demo", or None for the best one here.
        adapter: a folder, a name, "none", or None for the one in a bundle of `edgetune export mps`, else the current one.
        device: "cpu", "cuda", "mps", or "auto" for the best one here.
        head: of HEADS; "auto" leaves one that is stored in 4 bits as it is, and a form that this head cannot have is refused.
        Raises EdgetuneError's children, each a sentence that can be shown.
        """
        loaded = load_base(open_base(model), device, head=head)
        name, found = registry.adapter_for(adapter, loaded.checkpoint)
        return cls(loaded, found, name)

    def use_adapter(self, on: bool) -> None:
        """Switch between the adapted model and the bare base."""
        if on and self._adapter is not None:
            adapters.attach(self.model, self._adapter)
        else:
            adapters.detach(self.model)
        self._generator = None

    def generate(
        self, prompt: str, max_tokens: int = MAX_TOKENS, temperature: float = 0.7, seed: int | None = None
    ) -> Generation:
        """Continue a text. The same seed gives the same words on the same machine."""
        return self._complete(self.prompt_ids(prompt), max_tokens, Sampling(temperature, seed=seed))

    def stream(
        self, prompt: str, max_tokens: int = MAX_TOKENS, temperature: float = 0.7, seed: int | None = None
    ) -> Iterator[str]:
        """The same, in pieces of whole characters as they come."""
        yield from self._stream(self.prompt_ids(prompt), max_tokens, Sampling(temperature, seed=seed))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.7,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Answer a conversation of {"role", "content"} messages, in pieces as they come.

        Raises TokenizerError for a model without a chat template.
        """
        yield from self._stream(self.chat_ids(messages), max_tokens, Sampling(temperature, seed=seed))

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation as it was trained on: the template's tokens, behind the start token where it has none."""
        ids, bos = self.tokenizer.encode_chat(messages, add_generation_prompt=True), self.tokenizer.bos_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def prompt_ids(self, prompt: str) -> list[int]:
        """A text to continue, as a document begins."""
        return [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt)]

    def _complete(self, ids: list[int], max_tokens: int, sampling: Sampling) -> Generation:
        clock = _Clock()
        text = "".join(self._stream(ids, max_tokens, sampling, clock))
        return Generation(text, len(ids), clock.tokens, clock.tokens_per_second)

    def _stream(self, ids: list[int], max_tokens: int, sampling: Sampling, clock: _Clock | None = None) -> Iterator[str]:
        decoder = self.tokenizer.stream_decoder(continuing=True)
        with explain_card_memory(SMALLER):
            generator = self._room_for(len(ids), max_tokens)
            for token in generator.generate(ids, max_tokens, sampling, self.tokenizer.eos_ids):
                if clock is not None:
                    clock.tick()
                if piece := decoder.push(token):
                    yield piece
        if rest := decoder.flush():
            yield rest

    def _room_for(self, prompt_tokens: int, max_tokens: int) -> Generator:
        """The generator, with a cache that is large enough; kept from call to call, so that a chat is prefilled once."""
        limit = self.model.config.max_positions
        if prompt_tokens < 1 or max_tokens < 1:
            raise UsageError(f"A prompt of {prompt_tokens} tokens and {max_tokens} to write; expected at least 1 of each.")
        if prompt_tokens >= limit:
            raise UsageError(f"The prompt is {prompt_tokens} tokens and this model reads {limit}; shorten it.")
        length = min(limit, max(prompt_tokens + max_tokens, min(CONTEXT_TOKENS, limit)))
        if self._generator is None or self._generator.cache.max_length < length:
            self._generator = Generator(Runner(self.model), length)
        return self._generator


class _Clock:
    """Counts new tokens and the seconds since the first."""

    def __init__(self) -> None:
        self.tokens, self._first, self._last = 0, 0.0, 0.0

    def tick(self) -> None:
        self._last = time.perf_counter()
        if self.tokens == 0:
            self._first = self._last
        self.tokens += 1

    @property
    def tokens_per_second(self) -> float:
        elapsed = self._last - self._first
        return (self.tokens - 1) / elapsed if elapsed > 0 else 0.0
