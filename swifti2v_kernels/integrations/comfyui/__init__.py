"""ComfyUI custom nodes: a loaded model's attention, and a Wan VAE, on our operators.

This folder goes into ``ComfyUI/custom_nodes``: linked or copied there, or imported there by an ``__init__.py`` with

    from swifti2v_kernels.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Either way ``swifti2v_kernels`` has to be installed in ComfyUI's Python. Nothing of ComfyUI is imported before a node
runs. By ComfyUI's conventions class attributes describe a node, and it calls the method named ``FUNCTION``.
"""

from __future__ import annotations

from typing import Any

# ComfyUI may load this file by its path, under a name of its own, so that no relative import would find the library.
from swifti2v_kernels.integrations.comfyui.attention import accelerate_attention
from swifti2v_kernels.integrations.comfyui.vae import accelerate_vae

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]


class _Node:
    """The common part of the nodes: one input of the kind of their output, and a switch."""

    CATEGORY = "SwiftI2V"
    FUNCTION = "patch"
    RETURN_TYPES: tuple[str, ...]
    TOOLTIP: str

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs as ComfyUI wants them described."""
        (kind,) = cls.RETURN_TYPES
        enabled = {"default": True, "tooltip": "Off: the input is passed on as it is."}
        return {"required": {kind.lower(): (kind, {"tooltip": cls.TOOLTIP}), "enabled": ("BOOLEAN", enabled)}}


class SwiftI2VAttention(_Node):
    """The node that takes a ``MODEL`` and returns one whose attention is on our kernels."""

    DESCRIPTION = (
        "Attention of the model on the SwiftI2V kernels. Calls that they cannot serve (masks, other head sizes) go"
        " where they went before, to an attention node before this one or to ComfyUI's own. After each run the log"
        " counts both, and warns if the model never called the kernels."
    )
    RETURN_TYPES = ("MODEL",)
    TOOLTIP = "A Wan model, or any other that uses ComfyUI's optimized attention."
    OUTPUT_TOOLTIPS = ("The model with its attention on the kernels; the input itself is not changed.",)

    def patch(self, model: Any, enabled: bool) -> tuple[Any]:
        """Returns the model for the node's output: a clone on our kernels, or the input itself where it is off."""
        return (accelerate_attention(model)[0] if enabled else model,)


class SwiftI2VVAE(_Node):
    """The node that takes a ``VAE`` and returns one whose layers are on our kernels, if it is Wan's."""

    DESCRIPTION = (
        "Convolutions, norms and upsampling of a Wan VAE (2.1 or 2.2) on the SwiftI2V kernels. Any other VAE is passed"
        " on as it is, and named in the log. After each run the log counts the calls of these layers, and those of them"
        " that ComfyUI computed, with the reason."
    )
    RETURN_TYPES = ("VAE",)
    TOOLTIP = "A Wan VAE, version 2.1 or 2.2."
    OUTPUT_TOOLTIPS = ("The VAE on the kernels; it shares its weights with the input, which is not changed.",)

    def patch(self, vae: Any, enabled: bool) -> tuple[Any]:
        """Returns the VAE for the node's output: one on our kernels, or the input where it is off or not Wan's."""
        return (accelerate_vae(vae)[0] if enabled else vae,)


NODE_CLASS_MAPPINGS = {"SwiftI2VAttention": SwiftI2VAttention, "SwiftI2VVAE": SwiftI2VVAE}
NODE_DISPLAY_NAME_MAPPINGS = {"SwiftI2VAttention": "SwiftI2V attention", "SwiftI2VVAE": "SwiftI2V VAE"}
