"""The operators inside other people's models: diffusers, the original Wan code, ComfyUI, any ``sdpa`` call.

Nothing here is imported with the library, and each host is imported when its integration is used.
"""
