"""Modules whose state dict has other names than their submodules: those of the code that they take the place of."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, ClassVar

from torch import nn


class RenamedState(nn.Module):
    """A module that saves and loads under the names in `STATE_NAMES`, alone or inside another module."""

    # Where a buffer stands in the module, and its name in the state dict.
    STATE_NAMES: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_use_the_names_of_the_state)

    def __getattr__(self, name: str) -> Any:
        """Attributes go by the names of the state dict, too: torch.distributed.checkpoint looks for each of them."""
        for inside, outside in type(self).STATE_NAMES.items():
            if outside == name:
                path, _, leaf = inside.rpartition(".")
                holder = attrgetter(path)(self)
                if hasattr(holder, leaf):  # a loss has the names of both kinds of centre, and one of them
                    return getattr(holder, leaf)
        return super().__getattr__(name)

    def reset_parameters(self) -> None:
        """Centres of 0 and nothing accumulated, as the constructor leaves them; also after `to_empty`."""
        for part in self.children():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state, with the names of `STATE_NAMES`."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        _rename_keys(state, prefix, self.STATE_NAMES)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename_keys(state_dict, prefix, {outside: inside for inside, outside in self.STATE_NAMES.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _use_the_names_of_the_state(module: RenamedState, incompatible_keys: Any) -> None:
    """What load_state_dict reports as missing or unexpected has the names of the state dict."""
    for keys in incompatible_keys:
        for inside, outside in module.STATE_NAMES.items():
            keys[:] = [key.removesuffix(inside) + outside if _ends_in(key, inside) else key for key in keys]


def _ends_in(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _rename_keys(state: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Rename the keys `prefix + old` of a state dict to `prefix + new`, in place, where they exist."""
    for old, new in names.items():
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)
