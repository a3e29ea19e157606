"""Makes an adapter the current one of its base model, or the one that was current before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgetune.library import adapter_registry as registry
from edgetune.library import training_log
from edgetune.library.adapter_registry import Current
from edgetune.library.base_models import DEMO, best_here
from edgetune.runtime.errors import AdapterError


def promote(adapter: Path, model: str, base: str) -> None:
    """Make the adapter folder `adapter` the current one, for the model of this name and base digest."""
    adapter, current = adapter.resolve(), registry.get_current(base)
    earlier = () if current is None else current.earlier
    if current is not None and current.adapter != adapter:
        earlier = (*earlier, current.adapter)
    registry.set_current(Current(adapter, model, base, model == DEMO and best_here() is None, earlier))
    training_log.append("promoted", adapter=_named(adapter, base), base=base[:12])


def rollback(base: str) -> tuple[Current, Current | None]:
    """Make the adapter current again that was current before; return the one until now, and the one from now on.

    base: digest of the base model. The latter is None, for the bare base, where no earlier adapter is there any more: that is
    how a first adapter is undone. Raises AdapterError where the base has no current adapter.
    """
    current = registry.get_current(base)
    if current is None:
        raise AdapterError(
            "No adapter is in use, so there is nothing to go back from. `edgetune adapters list` shows all adapters; "
            "`edgetune adapters promote NAME` makes one current."
        )
    kept = [path for path in current.earlier if registry.is_adapter(path) and path != current.adapter]
    if not kept:
        registry.forget_current(base)
        training_log.append("rolled back", adapter=None, base=base[:12])
        return current, None
    registry.set_current(replace(current, adapter=kept[-1], earlier=tuple(kept[:-1])))
    training_log.append("rolled back", adapter=_named(kept[-1], base), base=base[:12])
    return current, registry.get_current(base)


def _named(adapter: Path, base: str) -> str:
    """Return an adapter's name; "(outside)" for one that lies elsewhere, whose name might tell whose it is."""
    return adapter.name if adapter.parent == registry.adapters_folder(base).resolve() else "(outside)"
