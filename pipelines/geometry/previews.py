"""Pictures of a scene: depth and confidence in colours."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pipelines.geometry.scene import Array


def depth_picture(depth: Tensor | Array) -> Array:
    """Depth or confidence as an uint8 ``(H, W, 3)`` picture: the 2nd to the 98th percentile from dark to light."""
    import cv2

    values = np.asarray(depth, np.float64)
    low, high = np.percentile(values, [2, 98])
    grey = ((values - low) / max(high - low, 1e-9)).clip(0, 1)
    return cv2.cvtColor(cv2.applyColorMap((grey * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
