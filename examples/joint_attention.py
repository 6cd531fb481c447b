"""Joint attention of video and text as in HunyuanVideo: two streams, read where they are, padded text, no torch.cat."""

import torch
import torch.nn.functional as F

from swifti2v_kernels import explain, qk_norm_rope, rope_3d, segment_attention

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
heads, head_dim, grid, text_len = 4, 128, (5, 6, 10), 32  # the grid: latent frames, token rows, token columns
width, video_len = heads * head_dim, 5 * 6 * 10

video_qkv = torch.randn(2, video_len, 3 * width, device=device, dtype=dtype)  # one fused projection of each stream
text_qkv = torch.randn(2, text_len, 3 * width, device=device, dtype=dtype)
weight = torch.ones(4, head_dim, device=device)  # of the four RMSNorms: q and k of either stream
lengths = torch.tensor([32, 17], device=device)  # the second prompt is shorter
rope = rope_3d(range(grid[0]), *grid[1:], head_dim, axis_dims=(16, 56, 56), theta=256.0, device=device)

q, k, v = video_qkv.chunk(3, dim=2)
q, k = qk_norm_rope(q, k, weight[0], weight[1], rope, heads, inplace=True)
text_q, text_k, text_v = text_qkv.chunk(3, dim=2)
text_q, text_k = qk_norm_rope(text_q, text_k, weight[2], weight[3], None, heads, inplace=True)
v, text_v = (x.unflatten(2, (heads, head_dim)) for x in (v, text_v))

sources = [(k, v), (text_k, text_v)]
video_out, text_out = segment_attention([q, text_q], sources, valid_lengths=[None, lengths])
print(explain(segment_attention, [q, text_q], sources, valid_lengths=[None, lengths]))

# The same by PyTorch: three concatenations and a mask.
whole_q, whole_k, whole_v = (torch.cat(pair, 1).transpose(1, 2) for pair in ((q, text_q), (k, text_k), (v, text_v)))
mask = torch.arange(video_len + text_len, device=device) < video_len + lengths[:, None]
expected = F.scaled_dot_product_attention(whole_q, whole_k, whole_v, attn_mask=mask[:, None, None]).transpose(1, 2)
error = (torch.cat((video_out, text_out), 1) - expected).float().norm() / expected.float().norm()
print(f"video {tuple(video_out.shape)}, text {tuple(text_out.shape)}, relative difference {error:.1e}")
