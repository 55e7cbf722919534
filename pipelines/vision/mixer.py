"""MLP-Mixer: An all-MLP Architecture for Vision, arXiv 2105.01601.

A picture is cut into patches, each projected to d numbers: X (tokens, d). Every block mixes over tokens, then over
channels, with a two-layer perceptron each:

    X <- X + fc2(gelu(fc1(norm1(X)^T)))^T,     X <- X + fc2(gelu(fc1(norm2(X))))

The answer is a linear layer on the mean over tokens. Parameters have timm's names, so that its checkpoints load.
"""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

SIZES = {"s": (512, 8), "b": (768, 12), "l": (1024, 24)}
"""timm's letter of a Mixer -> (channels, blocks); the patch follows in its name (mixer_b16_224)."""


class MixerConfig(PretrainedConfig):
    """Sizes of a Mixer; the perceptrons' hidden sizes are shares of the channels, as in timm.

    Args:
        image_size, patch_size: sides in pixels.
        hidden_size: channels d.
        mlp_ratio: hidden sizes over d, of the perceptrons over tokens and over channels.
    """

    model_type = "mlp_mixer"

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 8,
        hidden_size: int = 64,
        num_hidden_layers: int = 4,
        mlp_ratio: tuple[float, float] = (0.5, 2.0),
        **more: Any,
    ) -> None:
        self.image_size, self.patch_size, self.hidden_size = image_size, patch_size, hidden_size
        self.num_hidden_layers, self.mlp_ratio = num_hidden_layers, mlp_ratio
        super().__init__(**more)


class Perceptron(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return found


class Block(nn.Module):
    """One block on X (batch, tokens, d)."""

    def __init__(self, tokens: int, width: int, ratio: tuple[float, float]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mlp_tokens = Perceptron(tokens, int(ratio[0] * width))
        self.mlp_channels = Perceptron(width, int(ratio[1] * width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        found: Tensor = x + self.mlp_channels(self.norm2(x))
        return found


class Stem(nn.Module):
    """Patches as a sequence: pixels (batch, 3, side, side) -> X (batch, tokens, d)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.proj(pixels).flatten(2).transpose(1, 2)
        return found


class MixerForImageClassification(PreTrainedModel):
    """A Mixer that answers like transformers' classifiers: logits (batch, classes), and the loss with labels."""

    config_class = MixerConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        tokens, width = (config.image_size // config.patch_size) ** 2, config.hidden_size
        self.stem = Stem(width, config.patch_size)
        self.blocks = nn.Sequential(
            *(Block(tokens, width, tuple(config.mlp_ratio)) for _ in range(config.num_hidden_layers))  # type: ignore[arg-type]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, int(config.num_labels or 0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **more: Any) -> ImageClassifierOutput:
        """Classify ``pixel_values`` (batch, 3, side, side)."""
        logits = self.head(self.norm(self.blocks(self.stem(pixel_values))).mean(1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.view(-1))
        return ImageClassifierOutput(loss=loss, logits=logits)


def from_timm(name: str, classes: int) -> MixerConfig | None:
    """The sizes of timm's Mixer ``name`` (mixer_b16_224), or None."""
    found = re.match(r"mixer_([sbl])(\d+)_(\d+)", name)
    if found is None or found[1] not in SIZES:
        return None
    width, blocks = SIZES[found[1]]
    return MixerConfig(int(found[3]), int(found[2]), width, blocks, (0.5, 4.0), num_labels=classes)
