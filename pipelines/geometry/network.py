"""The pointmap network: from an ordered image pair, a 3D point and a confidence for every pixel of both images.

"DUSt3R: Geometric 3D Vision Made Easy" (arXiv 2312.14132); the encoder and decoder are those of "CroCo v2" (arXiv
2211.10408). A ViT encodes each image; two decoders, one per image, attend to each other's tokens; two heads turn tokens
into points, both in the camera frame of image 1. Parameter names are those of the public checkpoints.

Written from the papers' description; no code of the original (non-commercial) programs is used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters.errors import InputError

Grid = tuple[int, int]
"""Rows and columns of an image's tokens."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes and output conventions; the defaults are those of the public 512-pixel models.

    Raises:
        InputError: sizes that do not fit together, or an unknown head or output convention.
    """

    img_size: tuple[int, int] = (512, 512)
    patch_size: int = 16
    enc_embed_dim: int = 1024
    enc_depth: int = 24
    enc_num_heads: int = 16
    dec_embed_dim: int = 768
    dec_depth: int = 12
    dec_num_heads: int = 12
    mlp_ratio: float = 4.0
    rope_base: float = 100.0
    head_type: Literal["linear", "dpt"] = "linear"
    depth_mode: tuple[str, float, float] = ("exp", -math.inf, math.inf)
    conf_mode: tuple[str, float, float] = ("exp", 1.0, math.inf)

    def __post_init__(self) -> None:
        for width, heads, name in (
            (self.enc_embed_dim, self.enc_num_heads, "encoder"),
            (self.dec_embed_dim, self.dec_num_heads, "decoder"),
        ):
            if heads < 1 or width % heads or (width // heads) % 4:
                raise InputError(
                    f"The {name} has width {width} and {heads} heads; the width of a head must be a multiple of 4."
                )
        if self.head_type == "dpt" and (self.patch_size != 16 or self.dec_depth % 4 or self.dec_depth < 4):
            raise InputError("The DPT head needs patches of 16 pixels and a decoder depth of 4, 8, 12 ...")
        if self.head_type not in ("linear", "dpt"):
            raise InputError(f"Unknown head '{self.head_type}': use linear or dpt.")
        if self.depth_mode[0] not in ("exp", "linear", "square") or self.conf_mode[0] not in ("exp", "sigmoid"):
            raise InputError(f"Unknown output convention {self.depth_mode} or {self.conf_mode}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``config.json``."""
        return {**asdict(self), "img_size": list(self.img_size)}


TINY = NetworkConfig(
    img_size=(64, 64), patch_size=8, enc_embed_dim=192, enc_depth=6, enc_num_heads=6, dec_embed_dim=128, dec_depth=4,
    dec_num_heads=4,
)  # fmt: skip
"""The embedded model: 4.9 million parameters."""


class Encoded(NamedTuple):
    """Tokens ``(B, N, E)`` of images after the encoder, and their grid."""

    tokens: Tensor
    grid: Grid


class Points(NamedTuple):
    """The prediction for one image of a pair: points ``(B, H, W, 3)`` and confidence ``(B, H, W)`` > 1."""

    points: Tensor
    confidence: Tensor


# ------------------------------------------------------------------------------------------------ position


def _angles(grid: Grid, width: int, base: float, device: torch.device) -> Tensor:
    """Angles ``(N, width)`` per token and channel: the first half of the channels rotates with y, the rest with x."""
    rows, columns = grid
    half = width // 2
    frequency = base ** (-torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
    y = torch.arange(rows, device=device).repeat_interleave(columns)[:, None] * frequency
    x = torch.arange(columns, device=device).repeat(rows)[:, None] * frequency
    return torch.cat([y, y, x, x], dim=1)


@lru_cache(maxsize=64)
def rotation(grid: Grid, width: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``(N, width)`` of the two-dimensional rotary embedding for heads of ``width``."""
    with torch.inference_mode(False):  # cached for later calls, which may need gradients
        angles = _angles(grid, width, base, device)
        quarter = width // 4
        sign = torch.ones(width, device=device)
        sign[:quarter] = sign[2 * quarter : 3 * quarter] = -1
        return angles.cos().to(dtype), (angles.sin() * sign).to(dtype)


def rotate(x: Tensor, grid: Grid, base: float) -> Tensor:
    """Rotate the channel pairs (c, c + quarter) of heads ``x (B, heads, N, width)`` by their tokens' positions."""
    cosine, sine = rotation(grid, x.shape[-1], base, x.device, x.dtype)
    swapped = x.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
    return x * cosine + swapped * sine


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of ``(B, heads, N, width)``, with xformers' kernel where installed and applicable."""
    kernel = _xformers() if q.is_cuda else None
    if kernel is not None and q.dtype in (torch.float16, torch.bfloat16):
        return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    if q.device.type == "cpu" and q.requires_grad and q.shape[-2] <= 256:
        # Two plain products: the fused kernel's backward takes three times as long on CPU.
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


@lru_cache(maxsize=1)
def _xformers() -> Any:
    try:
        from xformers.ops import memory_efficient_attention
    except (ImportError, OSError):
        return None
    return memory_efficient_attention


# ------------------------------------------------------------------------------------------------ blocks


class Attention(nn.Module):
    """Self-attention; the fused projection holds (q, k, v), each (heads, width)."""

    def __init__(self, width: int, heads: int, base: float) -> None:
        super().__init__()
        self.heads, self.base = heads, base
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(rotate(q, grid, self.base), rotate(k, grid, self.base), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from one image's tokens to the other's."""

    def __init__(self, width: int, heads: int, base: float) -> None:
        super().__init__()
        self.heads, self.base = heads, base
        self.projq = nn.Linear(width, width)
        self.projk = nn.Linear(width, width)
        self.projv = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, grid: Grid, other: Grid) -> Tensor:
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.projq, x), (self.projk, y), (self.projv, y))
        )
        out = attend(rotate(q, grid, self.base), rotate(k, other, self.base), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with the exact GELU between."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


class EncoderBlock(nn.Module):
    """Attention and MLP, each on normalised input and added to it (pre-norm residual)."""

    def __init__(self, width: int, heads: int, ratio: float, base: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = Attention(width, heads, base)
        self.mlp = Mlp(width, ratio)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """As the encoder's, with cross-attention to the other image's tokens in between."""

    def __init__(self, width: int, heads: int, ratio: float, base: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (_norm(width) for _ in range(4))
        self.attn = Attention(width, heads, base)
        self.cross_attn = CrossAttention(width, heads, base)
        self.mlp = Mlp(width, ratio)

    def forward(self, x: Tensor, y: Tensor, grid: Grid, other: Grid) -> Tensor:
        x = x + self.attn(self.norm1(x), grid)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), grid, other)
        return x + self.mlp(self.norm3(x))


# ------------------------------------------------------------------------------------------------ heads


class LinearHead(nn.Module):
    """Each token gives the four channels of its own patch."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.proj = nn.Linear(config.dec_embed_dim, 4 * config.patch_size**2)

    def forward(self, layers: list[Tensor], grid: Grid) -> Tensor:
        out = self.proj(layers[-1]).transpose(1, 2).unflatten(-1, grid)
        return F.pixel_shuffle(out, self.patch)


class DPTHead(nn.Module):
    """Four layers, fused from coarse to fine ("Vision Transformers for Dense Prediction", arXiv 2103.13413)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.dpt = _DPT(config)

    def forward(self, layers: list[Tensor], grid: Grid) -> Tensor:
        return self.dpt(layers, grid)


class _DPT(nn.Module):
    WIDTHS = (96, 192, 384, 768)
    FEATURE, LAST = 256, 128

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        depth, width = config.dec_depth, config.dec_embed_dim
        self.hooks = (0, depth // 2, 3 * depth // 4, depth)
        a, b, c, d = self.WIDTHS
        self.act_postprocess = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(config.enc_embed_dim, a, 1), nn.ConvTranspose2d(a, a, 4, stride=4)),
                nn.Sequential(nn.Conv2d(width, b, 1), nn.ConvTranspose2d(b, b, 2, stride=2)),
                nn.Sequential(nn.Conv2d(width, c, 1)),
                nn.Sequential(nn.Conv2d(width, d, 1), nn.Conv2d(d, d, 3, stride=2, padding=1)),
            ]
        )
        self.scratch = _Scratch(self.WIDTHS, self.FEATURE)
        self.head = nn.Sequential(
            nn.Conv2d(self.FEATURE, self.FEATURE // 2, 3, padding=1), _Double(),
            nn.Conv2d(self.FEATURE // 2, self.LAST, 3, padding=1), nn.ReLU(), nn.Conv2d(self.LAST, 4, 1),
        )  # fmt: skip

    def forward(self, layers: list[Tensor], grid: Grid) -> Tensor:
        maps = [layers[hook].transpose(1, 2).unflatten(-1, grid) for hook in self.hooks]
        maps = [step(x) for step, x in zip(self.act_postprocess, maps, strict=True)]
        fine, second, third, coarse = (step(x) for step, x in zip(self.scratch.layer_rn, maps, strict=True))
        path = self.scratch.refinenet4(coarse)[..., : third.shape[-2], : third.shape[-1]]
        path = self.scratch.refinenet3(path, third)
        path = self.scratch.refinenet2(path, second)
        return self.head(self.scratch.refinenet1(path, fine))


class _Scratch(nn.Module):
    def __init__(self, widths: tuple[int, ...], feature: int) -> None:
        super().__init__()
        for number, width in enumerate(widths, 1):
            setattr(self, f"layer{number}_rn", nn.Conv2d(width, feature, 3, padding=1, bias=False))
        # The same four layers under a second name, as in the public files.
        self.layer_rn = nn.ModuleList([getattr(self, f"layer{number}_rn") for number in range(1, 5)])
        self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4 = (_Fusion(feature) for _ in range(4))


class _Fusion(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resConfUnit1, self.resConfUnit2 = _Residual(width), _Residual(width)
        self.out_conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return self.out_conv(_double(self.resConfUnit2(x)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _double(x)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


HEADS: dict[str, type[LinearHead] | type[DPTHead]] = {"linear": LinearHead, "dpt": DPTHead}


# ------------------------------------------------------------------------------------------------ the network


class PointmapNetwork(nn.Module):
    """Two images in [-1, 1] in, :class:`Points` of both in the frame of the first out.

    ``encode`` once per image and ``decode`` once per ordered pair gives the same as ``forward``.

    Attributes:
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.
    """

    gradient_checkpointing = False

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or NetworkConfig()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.dec_embed_dim))  # of CroCo's pre-training; unused here
        self.patch_embed = _PatchEmbed(c.patch_size, c.enc_embed_dim)
        encoder = (c.enc_embed_dim, c.enc_num_heads, c.mlp_ratio, c.rope_base)
        decoder = (c.dec_embed_dim, c.dec_num_heads, c.mlp_ratio, c.rope_base)
        self.enc_blocks = nn.ModuleList([EncoderBlock(*encoder) for _ in range(c.enc_depth)])
        self.enc_norm = _norm(c.enc_embed_dim)
        self.decoder_embed = nn.Linear(c.enc_embed_dim, c.dec_embed_dim)
        self.dec_blocks = nn.ModuleList([DecoderBlock(*decoder) for _ in range(c.dec_depth)])
        self.dec_blocks2 = nn.ModuleList([DecoderBlock(*decoder) for _ in range(c.dec_depth)])
        self.dec_norm = _norm(c.dec_embed_dim)
        self.downstream_head1 = HEADS[c.head_type](c)
        self.downstream_head2 = HEADS[c.head_type](c)

    def forward(self, image1: Tensor, image2: Tensor) -> tuple[Points, Points]:
        """Points of both images ``(B, 3, H, W)``; their sizes may differ, sides are multiples of the patch size."""
        return self.decode(self.encode(image1), self.encode(image2))

    def encode(self, image: Tensor) -> Encoded:
        """Tokens of images ``(B, 3, H, W)``; raises :class:`InputError` for sides that the patch does not divide."""
        patch = self.config.patch_size
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % patch or image.shape[3] % patch:
            raise InputError(f"Images must be (B, 3, H, W) with sides divisible by {patch}, got {tuple(image.shape)}.")
        grid = (image.shape[2] // patch, image.shape[3] // patch)
        x = self.patch_embed(image)
        for block in self.enc_blocks:
            x = self._through(block, x, grid)
        return Encoded(self.enc_norm(x), grid)

    def decode(self, first: Encoded, second: Encoded) -> tuple[Points, Points]:
        """Points of both images of ordered pairs, in the frame of the first.

        Raises:
            InputError: the numbers of first and second images differ.
        """
        if len(first.tokens) != len(second.tokens):
            raise InputError(f"Pairs need as many first images as second ones, got {len(first.tokens)} and "
                             f"{len(second.tokens)}.")  # fmt: skip
        layers1, layers2 = self.decoder_layers(first, second)
        return (
            self._regress(self.downstream_head1, layers1, first.grid),
            self._regress(self.downstream_head2, layers2, second.grid),
        )

    def decoder_layers(self, first: Encoded, second: Encoded) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of the heads, per image: the encoder's tokens and every decoder layer; only the last is normalised."""
        x, y = self.decoder_embed(first.tokens), self.decoder_embed(second.tokens)
        layers1, layers2 = [first.tokens], [second.tokens]
        for block1, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            # Each reads the other's tokens of the previous layer.
            x, y = (
                self._through(block1, x, y, first.grid, second.grid),
                self._through(block2, y, x, second.grid, first.grid),
            )
            layers1.append(x)
            layers2.append(y)
        layers1[-1], layers2[-1] = self.dec_norm(layers1[-1]), self.dec_norm(layers2[-1])
        return layers1, layers2

    def _through(self, block: nn.Module, *given: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False)
        return block(*given)

    def _regress(self, head: nn.Module, layers: list[Tensor], grid: Grid) -> Points:
        # Points lose three digits in half precision.
        with torch.autocast(layers[0].device.type, enabled=False):
            width = next(head.parameters()).dtype
            out = head([layer.to(width) for layer in layers], grid).float()
        return points_of(out, self.config)


class _PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


def points_of(channels: Tensor, config: NetworkConfig) -> Points:
    """Points and confidence of a head's output ``(B, 4, H, W)``."""
    xyz, raw = channels[:, :3].movedim(1, -1), channels[:, 3]
    kind, *_ = config.depth_mode
    if kind != "linear":
        distance = xyz.norm(dim=-1, keepdim=True)
        xyz = xyz / distance.clamp_min(1e-8) * (torch.expm1(distance) if kind == "exp" else distance.square())
    kind, low, high = config.conf_mode
    if kind == "exp":
        confidence = (low + raw.exp()).clamp_max(high)
    else:
        confidence = low + (high - low) * raw.sigmoid()
    return Points(xyz, confidence)
