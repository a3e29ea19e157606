"""The errors that edgetune raises on purpose. Each message is a sentence: what was found, what was expected, what to type.

EdgetuneError
├── UsageError       a setting or a place that cannot be used here
│   └── SettingError     a value that no machine could use (rank 0, a learning rate of nan), or two that exclude each other
├── ModelError       a base model that is unreadable, unsupported or contradicts its own config
│   └── TokenizerError   a tokenizer or chat template that is unreadable or hostile
├── AdapterError     an adapter that is unreadable or was made for another base
├── DataError        notes, chats or texts that cannot be used
├── DeviceError      a device that this machine does not have
├── ResourceError    not enough memory or disk space
├── TrainingError    a run that does not converge
├── BusyError        a run or an output that another process is working on
├── LinkError        a process of a distributed run that ended or cannot be reached
├── LockedError      encrypted data whose key cannot be had
└── NetworkForbidden something that asked for the network, which commands give up

The command line prints only the message and exits 1, or 2 for a SettingError, which is wrong usage. No message contains text of
a note: only paths and digests.
"""

from __future__ import annotations

import errno

_FULL_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "bad alloc")
"""Words in the messages of torch and the C++ library, in lower case, that mean a full memory."""


class EdgetuneError(Exception):
    """The base class of every expected failure."""


class UsageError(EdgetuneError):
    """A setting or a place that cannot be used here."""


class SettingError(UsageError):
    """A value that no machine could use, or two settings that exclude each other."""


class ModelError(EdgetuneError):
    """A base model that is unreadable, unsupported or contradicts its own config."""


class TokenizerError(ModelError):
    """A tokenizer or chat template that is unreadable or hostile."""


class AdapterError(EdgetuneError):
    """An adapter that is unreadable or was made for another base."""


class DataError(EdgetuneError):
    """Notes, chats or texts that cannot be used."""


class DeviceError(EdgetuneError):
    """A device that this machine does not have."""


class ResourceError(EdgetuneError):
    """Not enough memory or disk space on this machine."""


class TrainingError(EdgetuneError):
    """A run that does not converge."""


class BusyError(EdgetuneError):
    """A run or an output that another process is working on."""


class LockedError(EdgetuneError):
    """Encrypted data whose key cannot be had. It says nothing about the data: nobody may take it for damaged."""


class LinkError(EdgetuneError):
    """A process of a distributed run that ended or cannot be reached."""


class NetworkForbidden(EdgetuneError, PermissionError):
    """Something that asked for the network, which this process has given up."""


def out_of_memory(error: BaseException) -> str | None:
    """Return the sentence for an error that means too little memory; None for any other.

    torch has an exception class for this only on NVIDIA cards; elsewhere the message is all there is.
    """
    text = str(error).lower()
    if "out of memory" in text:
        return "The device is out of memory. End other programs that use it, or type --device cpu."
    full = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if full or isinstance(error, MemoryError) or any(words in text for words in _FULL_MEMORY):
        return "This machine has too little free memory for that. End other programs, or choose less: a smaller model or batch."
    return None
