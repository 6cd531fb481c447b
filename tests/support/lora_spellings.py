"""LoRA files for tests: factors of a DiT's layers under any spelling, and what each adds."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from tests.support.original_names import original_module
from tests.support.tolerances import PARITY, relative_error

I2V = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 48}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ATTENTION),
    "ffn.net.0.proj",
    "ffn.net.2",
]
MODULES = [f"blocks.{i}.{layer}" for i in range(2) for layer in LAYERS]
OUTER = [
    "patch_embedding",
    "proj_out",
    "condition_embedder.time_proj",
    *(f"condition_embedder.{name}_embedder.linear_{i}" for name in ("time", "text") for i in (1, 2)),
]


def inputs(dit):
    """Returns latents, timestep, text and image for one forward."""
    config = dit.config
    image = None if config.image_dim is None else torch.randn(1, 257, config.image_dim)
    latents = torch.randn(1, config.in_channels, 3, 4, 6)
    return latents, torch.tensor([500.0]), torch.randn(1, 512, config.text_dim), image


def agrees(ours, theirs):
    """Returns whether two models predict the same."""
    given = inputs(ours)
    with torch.no_grad():
        return relative_error(ours(*given), theirs(*given).sample) < PARITY


def state_of(dit):
    return {name: tensor.clone() for name, tensor in dit.state_dict().items()}


def same(state, dit):
    return all(torch.equal(tensor, state[name]) for name, tensor in dit.state_dict().items())


def factors(dit, modules, rank=3, seed=0):
    """Returns ``{module: (down, up)}`` for weights of ``dit``, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    shapes = {module: dit.get_parameter(f"{module}.weight").shape for module in modules}
    return {module: (normal(rank, *shape[1:]), normal(shape[0], rank)) for module, shape in shapes.items()}


def product(down, up):
    return (up @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def spelled(pairs, prefix="", down="lora_A", up="lora_B", name=lambda module: module):
    """Returns a LoRA's tensors under some spelling."""
    state = {}
    for module, (a, b) in pairs.items():
        state[f"{prefix}{name(module)}.{down}.weight"] = a.clone()
        state[f"{prefix}{name(module)}.{up}.weight"] = b.clone()
    return state


def kohya(module):
    return original_module(module).replace(".", "_")


def saved(path, state, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path, metadata=metadata)
    return path


#: In the Wan repositories' names.
MODULE = "diffusion_model.blocks.0.self_attn.q"


def pair(rank=4):
    """Returns the two factors of MODULE, for a width of 128."""
    return {f"{MODULE}.lora_down.weight": torch.ones(rank, 128), f"{MODULE}.lora_up.weight": torch.ones(128, rank)}
