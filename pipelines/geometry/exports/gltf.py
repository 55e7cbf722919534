"""A small writer of binary glTF 2.0 (GLB): points, triangles and pictures, all unlit.

Vertex colours (COLOR_0) are linear in glTF, pictures are sRGB; axes are x right, y up, z towards the viewer.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapters import files
from pipelines.geometry.scene import Array

_POINTS, _TRIANGLES = 0, 4
_VERTICES, _INDICES = 34962, 34963
_CLAMP = 33071
_TYPES = {np.dtype("<f4"): 5126, np.dtype("<u2"): 5123, np.dtype("<u4"): 5125}


def linear(colours: Array) -> Array:
    """sRGB bytes ``(N, 3)`` as linear 16-bit values with alpha ``(N, 4)``."""
    value = np.arange(256) / 255
    table = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    out = np.full((len(colours), 4), 65535, "<u2")
    out[:, :3] = np.rint(table * 65535).astype("<u2")[colours]
    return out


class Document:
    """A glTF document of meshes, written as one file."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._json: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "adapter-studio"}, "scene": 0, "scenes": [{"nodes": []}],
            "extensionsUsed": ["KHR_materials_unlit"], "nodes": [], "meshes": [], "materials": [], "accessors": [],
            "bufferViews": [],
        }  # fmt: skip

    def add_points(self, name: str, points: Array, colours: Array) -> None:
        """Add points ``(N, 3)`` with colours ``(N, 3)`` in sRGB bytes."""
        self._add(name, {"POSITION": self._positions(points), "COLOR_0": self._accessor(linear(colours), _VERTICES)},
                  _POINTS, self._material())  # fmt: skip

    def add_surface(self, name: str, vertices: Array, colours: Array, faces: Array, two_sided: bool = True) -> None:
        """Add triangles ``faces (F, 3)`` of ``vertices (N, 3)``, counter-clockwise seen from the front."""
        used, numbers = np.unique(faces, return_inverse=True)
        attributes = {"POSITION": self._positions(vertices[used]),
                      "COLOR_0": self._accessor(linear(colours[used]), _VERTICES)}  # fmt: skip
        indices = self._accessor(numbers.astype("<u4").ravel(), _INDICES)
        self._add(name, attributes, _TRIANGLES, self._material(two_sided=two_sided), indices)

    def add_picture(self, name: str, corners: Array, picture: Array) -> None:
        """Add a picture uint8 ``(H, W, 3)`` between ``corners (4, 3)``, clockwise from the upper left."""
        places = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], "<f4")
        attributes = {"POSITION": self._positions(corners), "TEXCOORD_0": self._accessor(places, _VERTICES)}
        indices = self._accessor(np.array([0, 3, 1, 1, 3, 2], "<u4"), _INDICES)
        self._add(name, attributes, _TRIANGLES, self._material(self._texture(picture)), indices)

    def write(self, file: Path) -> None:
        """Write the GLB: header, JSON, binary."""
        tree = {**self._json, "buffers": [{"byteLength": len(self._blob)}]}
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
        chunks += struct.pack("<II", len(self._blob), 0x004E4942) + bytes(self._blob)
        head = struct.pack("<III", 0x46546C67, 2, 12 + len(chunks))
        files.write(file, lambda part: part.write_bytes(head + chunks))

    def _add(self, name: str, attributes: dict[str, int], mode: int, material: int, indices: int | None = None) -> None:
        primitive: dict[str, Any] = {"attributes": attributes, "mode": mode, "material": material}
        if indices is not None:
            primitive["indices"] = indices
        self._json["meshes"].append({"name": name, "primitives": [primitive]})
        self._json["nodes"].append({"name": name, "mesh": len(self._json["meshes"]) - 1})
        self._json["scenes"][0]["nodes"].append(len(self._json["nodes"]) - 1)

    def _positions(self, points: Array) -> int:
        values = np.ascontiguousarray(points, "<f4")
        return self._accessor(values, _VERTICES, min=values.min(0).tolist(), max=values.max(0).tolist())

    def _accessor(self, values: Array, target: int, **more: Any) -> int:
        kind = {1: "SCALAR"}.get(values.ndim) or {2: "VEC2", 3: "VEC3", 4: "VEC4"}[values.shape[1]]
        entry = {"bufferView": self._view(values.tobytes(), target=target), "componentType": _TYPES[values.dtype],
                 "count": len(values), "type": kind, **more}  # fmt: skip
        if values.dtype == np.dtype("<u2"):
            entry["normalized"] = True
        self._json["accessors"].append(entry)
        return len(self._json["accessors"]) - 1

    def _view(self, data: bytes, **more: Any) -> int:
        self._blob += b"\0" * (-len(self._blob) % 4)
        self._json["bufferViews"].append({"buffer": 0, "byteOffset": len(self._blob), "byteLength": len(data), **more})
        self._blob += data + b"\0" * (-len(data) % 4)
        return len(self._json["bufferViews"]) - 1

    def _material(self, texture: int | None = None, two_sided: bool = True) -> int:
        look: dict[str, Any] = {"metallicFactor": 0, "roughnessFactor": 1}
        if texture is not None:
            look["baseColorTexture"] = {"index": texture}
        entry = {"pbrMetallicRoughness": look, "doubleSided": two_sided, "extensions": {"KHR_materials_unlit": {}}}
        if entry not in self._json["materials"]:
            self._json["materials"].append(entry)
        return int(self._json["materials"].index(entry))

    def _texture(self, picture: Array) -> int:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG", quality=90)
        view = self._view(stream.getvalue())
        self._json.setdefault("samplers", [{"wrapS": _CLAMP, "wrapT": _CLAMP}])
        self._json.setdefault("images", []).append({"bufferView": view, "mimeType": "image/jpeg"})
        self._json.setdefault("textures", []).append({"sampler": 0, "source": len(self._json["images"]) - 1})
        return len(self._json["textures"]) - 1
