"""The errors edgetune raises on purpose; each message is one sentence: what was found, what was expected, what to type.

EdgetuneError
├── UsageError       a setting that cannot be honoured (rank 0, a learning rate of nan)
├── ModelError       a base model that is unreadable, unsupported or contradicts its own config
│   └── TokenizerError   its tokenizer or chat template
├── AdapterError     an adapter that is unreadable or was made for another base
├── DataError        notes, chats or texts that cannot be used
├── DeviceError      a device that is not there
├── ResourceError    memory or disk that is not there
├── TrainingError    a run that does not converge
├── BusyError        a run that another process is at
└── LinkError        another process of a run that is gone

The command line prints the message alone and exits 1. No text of a note ever stands in one: paths and digests only.
"""


class EdgetuneError(Exception):
    """Base of every expected failure."""


class UsageError(EdgetuneError):
    """A setting that cannot be honoured."""


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
    """Memory or disk that this machine does not have."""


class TrainingError(EdgetuneError):
    """A run that does not converge."""


class BusyError(EdgetuneError):
    """A run, or an output, that another process is at."""


class LinkError(EdgetuneError):
    """Another process of a run that ended, or cannot be reached."""
