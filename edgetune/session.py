"""Session: text in, text out. Apps embed it, and `generate`, `ask` and `chat` are built on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgetune.config import GenerateConfig
from edgetune.library import adapter_registry as registry
from edgetune.library.adapter_notices import adapter_notices
from edgetune.library.loading import SMALLER, Loaded, load_base, open_base
from edgetune.progress import Show
from edgetune.runtime import adapter as adapters
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.device import explain_card_memory
from edgetune.runtime.errors import UsageError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.runner import Runner
from edgetune.weight_forms import form_for_writing


@dataclass(frozen=True)
class Generation:
    """An answer and its cost. `tokens_per_second` counts new tokens only, not the prompt."""

    text: str
    prompt_tokens: int
    tokens: int
    tokens_per_second: float


class Session:
    """A model and its adapter, kept open. Use it from one thread at a time.

    notices: sentences for the user about what was ignored in the files of the model or the adapter.
    Where no temperature is given, sampling follows the model's generation_config.json, else GenerateConfig.
    """

    def __init__(self, loaded: Loaded, adapter: Adapter | None = None, adapter_name: str = registry.NONE) -> None:
        self.model_name, self.adapter_name = loaded.choice.name, adapter_name
        self.tokenizer, self.model, self.digest = loaded.tokenizer, loaded.model, loaded.checkpoint.digest
        self.notices = loaded.recommended.notices
        self._loaded, self._adapter = loaded, adapter
        self._generator: Generator | None = None
        self.use_adapter(adapter is not None)

    @classmethod
    def load(
        cls,
        model: str | None = None,
        adapter: str | None = None,
        device: str = GenerateConfig.device,
        head: str = GenerateConfig.head,
        weights: str = GenerateConfig.weights,
        show: Show = lambda event: None,
    ) -> Session:
        """Open a model and an adapter by the names that the command line takes.

        model: a path, a Hugging Face id in the local cache, "demo", or None for the best one here.
        adapter: a folder, a name, "none" for the bare base model, or None for the adapter in the model's own folder (an
            `edgetune export mps` bundle) if there is one, else the current adapter.
        device: "cpu", "cuda", "mps", or "auto" for the best one here.
        head: one of HEADS. "auto" leaves a head that is stored in 4 bits as it is; a form that it cannot take is refused.
        weights: one of WEIGHTS, the form of the base's linears. "auto" is the one that the adapter was trained over.
        show: receives the progress of converting a GGUF model that is opened for the first time, as events.
        Raises subclasses of EdgetuneError, each a sentence that can be shown to the user.
        """
        base = open_base(model, show)
        name, found = registry.adapter_for(adapter, base[1])
        form = form_for_writing(weights, base[1], None if found is None else found.about)
        loaded = load_base(base, device, head=head, form=form)
        session = cls(loaded, found, name)
        session.notices += adapter_notices(adapter, found, loaded.checkpoint, loaded.tokenizer)
        return session

    def use_adapter(self, on: bool) -> None:
        """Switch between the adapted model and the bare base."""
        if on and self._adapter is not None:
            adapters.attach(self.model, self._adapter)
        else:
            adapters.detach(self.model)
        self._generator = None

    def generate(
        self,
        prompt: str,
        max_tokens: int = GenerateConfig.max_tokens,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Generation:
        """Continue a text. On the same machine, the same seed gives the same words."""
        return self._complete(self.tokenizer.prompt_ids(prompt), max_tokens, self._sampling(max_tokens, temperature, seed))

    def stream(
        self,
        prompt: str,
        max_tokens: int = GenerateConfig.max_tokens,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Continue a text and yield it in pieces of whole characters, as they are written."""
        ids = self.tokenizer.prompt_ids(prompt)
        yield from self._stream(ids, max_tokens, self._sampling(max_tokens, temperature, seed))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int = GenerateConfig.max_tokens,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Answer a conversation of {"role", "content"} messages and yield the answer in pieces, as they are written.

        Raises TokenizerError for a model without a chat template.
        """
        ids = self.tokenizer.chat_ids(messages)
        yield from self._stream(ids, max_tokens, self._sampling(max_tokens, temperature, seed))

    def _sampling(self, max_tokens: int, temperature: float | None, seed: int | None) -> Sampling:
        """Return the settings to sample with (see Loaded.sampling). Raises SettingError for any of the three that is wrong."""
        GenerateConfig(max_tokens=max_tokens)
        return self._loaded.sampling(temperature, seed)

    def _complete(self, ids: list[int], max_tokens: int, sampling: Sampling) -> Generation:
        clock = _Clock()
        text = "".join(self._stream(ids, max_tokens, sampling, clock))
        return Generation(text, len(ids), clock.tokens, clock.tokens_per_second)

    def _stream(self, ids: list[int], max_tokens: int, sampling: Sampling, clock: _Clock | None = None) -> Iterator[str]:
        decoder = self.tokenizer.stream_decoder(continuing=True)
        with explain_card_memory(SMALLER):
            generator = self._generator_for(len(ids), max_tokens)
            for token in generator.generate(ids, max_tokens, sampling, self.tokenizer.eos_ids):
                if clock is not None:
                    clock.tick()
                if piece := decoder.push(token):
                    yield piece
        if rest := decoder.flush():
            yield rest

    def _generator_for(self, prompt_tokens: int, max_tokens: int) -> Generator:
        """Return a generator whose cache has room for this prompt and answer.

        It is kept from call to call, so that each turn of a chat prefills only what is new.
        """
        limit = self.model.config.max_positions
        if prompt_tokens < 1 or max_tokens < 1:
            raise UsageError(
                f"The prompt has {prompt_tokens} tokens and {max_tokens} are to be written; expected at least 1 of each."
            )
        if prompt_tokens >= limit:
            raise UsageError(
                f"The prompt has {prompt_tokens} tokens and this model can read at most {limit}. Shorten the prompt."
            )
        length = min(limit, max(prompt_tokens + max_tokens, min(GenerateConfig.context_tokens, limit)))
        if self._generator is None or self._generator.cache.max_length < length:
            self._generator = Generator(Runner(self.model), length)
        return self._generator


class _Clock:
    """Counts new tokens, and the seconds between the first and the last."""

    def __init__(self) -> None:
        self.tokens, self._first, self._last = 0, 0.0, 0.0

    def tick(self) -> None:
        self._last = time.perf_counter()
        if self.tokens == 0:
            self._first = self._last
        self.tokens += 1

    @property
    def tokens_per_second(self) -> float:
        # The first token comes after the prefill, so only those after it are timed.
        elapsed = self._last - self._first
        return (self.tokens - 1) / elapsed if elapsed > 0 else 0.0
