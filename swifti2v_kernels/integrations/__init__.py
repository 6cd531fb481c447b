"""The operators inside other people's models: diffusers, the original Wan code, ComfyUI, any ``sdpa`` call.

diffusers      ``accelerate`` and ``restore`` for pipelines and models of diffusers; ``DiffusersWanWindow`` for CSG
wan            ``accelerate`` and ``restore`` for the original Wan code
comfyui        custom nodes
sdpa           ``replace_sdpa`` for calls of torch's attention in any model
wan_vae        the VAE's layers, which the first three share; so are ``patching`` and ``recipe``

Nothing here is imported with the library, and each host is imported when its integration is used.
"""
