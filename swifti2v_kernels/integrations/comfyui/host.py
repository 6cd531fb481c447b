"""The check that ComfyUI has what the nodes need, and the message where it has not."""

from __future__ import annotations

from typing import Any

from ..patching import HostChanged


def need(owner: Any, owner_name: str, *attributes: str) -> None:
    """Checks that an object of ComfyUI has the attributes that a node reads.

    Raises:
        HostChanged: one is not; the message names it.
    """
    for attribute in attributes:
        if not hasattr(owner, attribute):
            raise HostChanged(
                f"this version of ComfyUI is not what the node was written for: {owner_name} has no attribute"
                f" {attribute!r}; nothing was changed"
            )
