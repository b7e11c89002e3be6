"""Keys of a state dict: names of old releases of diffusers, and prefixes of wrappers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# torch.compile, DataParallel and DistributedDataParallel, FSDP, activation checkpointing: of the
# whole network or of a part.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def current_key(key: str) -> str:
    """Return the key of a weight in current diffusers, without the names of wrappers."""
    key = _WRAPPERS.sub("", key)
    return _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_ATTENTION[m[2]]}.", key)


def find_prefix(keys: Collection[str], names: Collection[str], markers: Iterable[str]) -> str:
    """Return the prefix of a network's keys, such as "unet."; empty for none.

    Of two networks, the prefix is that of exponentially averaged weights ("ema_model.").

    Args:
        keys: All keys, as `current_key`.
        names: Names of the weights of the network.
        markers: Keys that every network of a class has.

    Raises:
        ValueError: There are several networks, and not one of them is averaged.
    """
    endings = tuple(f".{marker}" for marker in markers)
    marked = [key for key in keys if key.endswith(endings)]
    found = {key.removesuffix(end[1:]) for key in marked for end in endings if key.endswith(end)}
    if not found or any(end[1:] in keys for end in endings):
        return ""
    complete = sorted(prefix for prefix in found if all(prefix + name in keys for name in names))
    averaged = [prefix for prefix in complete if "ema" in re.split(r"[._]", prefix)]
    chosen = averaged or complete or sorted(found)
    if len(chosen) > 1:
        some = ", ".join(repr(prefix[:40]) for prefix in chosen[:3])
        raise ValueError(f"holds several networks, {some}")
    return chosen[0]


def removed_text(keys: Iterable[str], prefix: str) -> str:
    """Return what `current_key` and a prefix remove from keys, for a message; empty for nothing."""
    wrappers = sorted({match[0] for key in keys for match in _WRAPPERS.finditer(key)})
    return ", ".join(map(repr, [*wrappers, *([prefix] if prefix else [])]))
