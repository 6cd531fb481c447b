"""What the nodes need of ComfyUI, and the message where it is missing."""

from __future__ import annotations

from typing import Any

from ..patching import HostChanged


def need(owner: Any, owner_name: str, *attributes: str) -> None:
    """Each of the attributes is there.

    Raises:
        HostChanged: one is not; the message names it.
    """
    for attribute in attributes:
        if not hasattr(owner, attribute):
            raise HostChanged(
                f"this version of ComfyUI is not what the node was written for: {owner_name} has no attribute"
                f" {attribute!r}; nothing was changed"
            )
