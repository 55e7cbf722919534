"""A picture of what pruning kept: the heads of every layer, and the share of its channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.compression.structure import Pruning

if TYPE_CHECKING:
    from PIL import Image

FILE = "preview.png"
"""In a model's folder, where the library finds it."""

LEFT, TOP, ROW, BAR, GAP, HEADING = 64, 52, 16, 160, 24, 204
KEPT, GONE, INK = "#2f6f9f", "#e3e7ea", "#333"


def kept(pruning: Pruning) -> Image.Image:
    """One row per layer: a cell for every key-value head (dark = kept), and a bar of the kept channels."""
    from PIL import Image, ImageDraw, ImageFont

    sizes, counts = pruning.sizes, pruning.counts()
    cell = max(3, min(ROW, 320 // sizes.kv_heads))
    right = LEFT + max(cell * sizes.kv_heads, HEADING) + GAP
    image = Image.new("RGB", (right + BAR + 64, TOP + ROW * sizes.layers + 12), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    draw.text((10, 8), f"Kept by {pruning.method}", fill=INK, font=ImageFont.load_default(15))
    group = f"key-value heads ({sizes.repeats} query heads each)" if sizes.repeats > 1 else "heads"
    draw.text((LEFT, TOP - 6), group, fill=INK, font=font, anchor="ls")
    draw.text((right, TOP - 6), "channels", fill=INK, font=font, anchor="ls")
    for number, (layer, (_, channels)) in enumerate(zip(pruning.layers, counts, strict=True)):
        y = TOP + ROW * number
        draw.text((LEFT - 8, y + ROW // 2), f"layer {number}", fill=INK, font=font, anchor="rm")
        left = set(range(sizes.kv_heads) if layer.heads is None else layer.heads)
        for head in range(sizes.kv_heads):
            box = (LEFT + cell * head, y + 1, LEFT + cell * (head + 1) - 2, y + ROW - 3)
            draw.rectangle(box, fill=KEPT if head in left else GONE)
        draw.rectangle((right, y + 1, right + BAR, y + ROW - 3), fill=GONE)
        share = channels / sizes.channels
        draw.rectangle((right, y + 1, right + round(BAR * share), y + ROW - 3), fill=KEPT)
        draw.text((right + BAR + 6, y + ROW // 2), f"{share:.0%}", fill=INK, font=font, anchor="lm")
    return image
