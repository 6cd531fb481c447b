"""ComfyUI custom nodes: a loaded model's attention, and a Wan VAE, on our operators.

This folder goes into ``ComfyUI/custom_nodes``: linked or copied there, or imported there by an ``__init__.py`` with

    from swifti2v_kernels.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Either way ``swifti2v_kernels`` has to be installed in ComfyUI's Python. Nothing of ComfyUI is imported before a node
runs.
"""

# ComfyUI may load this file by its path, under a name of its own, so that no relative import would find the library.
from swifti2v_kernels.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
