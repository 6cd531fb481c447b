"""A DiT layer in plain PyTorch, written with the operators."""

import torch
from torch import Tensor, nn

import swifti2v_kernels as sk


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.table = heads, nn.Parameter(torch.randn(6, width) / width**0.5)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, time: Tensor, rope: sk.Rope3D) -> Tensor:  # x [B, L, C]; time [B, 6, C]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.table + time).unsqueeze(2).unbind(1)
        q, k, v = self.qkv(sk.norm_modulate(x, shift, scale)).chunk(3, dim=2)
        q, k = sk.qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, rope, self.heads, inplace=True)
        y = self.out(sk.segment_attention(q, [(k, v.unflatten(2, (self.heads, -1)))]).flatten(2))
        x, y = sk.gated_residual_norm_modulate(x, y, gate, mlp_shift, mlp_scale)
        return sk.gated_residual(x, self.mlp(y), mlp_gate, inplace=True)


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
layer = Layer(width=256, heads=2).to(device, dtype).eval()
x = torch.randn(2, 3 * 4 * 6, 256, device=device, dtype=dtype)  # three latent frames of 4 x 6 tokens
rope = sk.rope_3d([0, 7, 8], 4, 6, head_dim=128, device=device)  # frames 0, 7 and 8 of a clip
with torch.no_grad():
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, torch.randn(2, 6, 256, device=device), rope)
print(f"tokens {tuple(x.shape)} -> {tuple(y.shape)}, finite: {bool(y.isfinite().all())}")
