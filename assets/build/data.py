"""Emoji art by name, sprites, and composed scenes with captions and boxes.

``python -m assets.build.data`` fetches the pinned npm packages into the build folder, renders every
sprite once and writes a contact sheet. Everything else is functions: a *scene* (who stands where, in
which style, on which background) is drawn with a seeded generator and rendered from the sprites.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image

from adapters import files
from assets.build.common import build_dir

SPRITE = 128
"""Side of a cached sprite in pixels."""

SIZE = 64
"""Side of a training picture in pixels."""

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/emojione": "1.2.3",
    "emojibase-data": "17.0.0",
}

BASE_STYLES = {"cartoon": "noto", "flat": "twemoji", "bold": "fluent-emoji-flat"}
HELD_STYLES = {"3d": "fluent-emoji", "monochrome": "fluent-emoji-high-contrast"}
STYLES = BASE_STYLES | HELD_STYLES
"""Style word -> icon set. Held-out styles are never seen by the base model."""

BASE_CONCEPTS = {
    # animals
    "dog": "dog-face", "cat": "cat-face", "panda": "panda", "frog": "frog", "pig": "pig-face",
    "lion": "lion", "koala": "koala", "rabbit": "rabbit-face", "cow": "cow-face", "monkey": "monkey-face",
    "elephant": "elephant", "penguin": "penguin", "owl": "owl", "turtle": "turtle", "snake": "snake",
    "snail": "snail", "whale": "spouting-whale", "fish": "tropical-fish", "crab": "crab",
    "butterfly": "butterfly", "bee": "honeybee", "ladybug": "lady-beetle", "duck": "duck",
    "flamingo": "flamingo", "giraffe": "giraffe", "spider": "spider", "chick": "baby-chick", "shark": "shark",
    # food
    "red apple": "red-apple", "banana": "banana", "grapes": "grapes", "strawberry": "strawberry",
    "watermelon": "watermelon", "lemon": "lemon", "cherries": "cherries", "pineapple": "pineapple",
    "avocado": "avocado", "carrot": "carrot", "corn": "ear-of-corn",
    "eggplant": "eggplant", "pepper": "hot-pepper", "mushroom": "mushroom",
    "cheese": "cheese-wedge", "burger": "hamburger", "pizza": "pizza",
    "fries": "french-fries", "donut": "doughnut", "cookie": "cookie", "cake": "birthday-cake",
    "ice cream": "soft-ice-cream", "lollipop": "lollipop", "pretzel": "pretzel",
    # vehicles
    "car": "automobile", "bus": "bus", "tractor": "tractor", "bicycle": "bicycle", "airplane": "airplane",
    "sailboat": "sailboat", "anchor": "anchor", "ufo": "flying-saucer",
    # sky, plants, places
    "sun": "sun", "moon": "crescent-moon", "star": "star", "cloud": "cloud", "rainbow": "rainbow",
    "snowflake": "snowflake", "flame": "fire", "tree": "deciduous-tree", "palm tree": "palm-tree",
    "sunflower": "sunflower", "tulip": "tulip", "rose": "rose", "clover": "four-leaf-clover",
    "maple leaf": "maple-leaf", "house": "house", "tent": "tent", "umbrella": "umbrella",
    # things
    "balloon": "balloon", "gift": "wrapped-gift", "soccer ball": "soccer-ball", "basketball": "basketball",
    "guitar": "guitar", "drum": "drum", "key": "key", "lock": "locked",
    "light bulb": "light-bulb", "camera": "camera", "television": "television", "hammer": "hammer",
    "scissors": "scissors", "pencil": "pencil", "books": "books", "bell": "bell", "crown": "crown",
    "trophy": "trophy", "magnet": "magnet", "clock": "alarm-clock", "hourglass": "hourglass-done",
    "glasses": "glasses", "top hat": "top-hat", "shirt": "t-shirt",
    "bomb": "bomb", "heart": "red-heart", "diamond": "gem-stone",
}  # fmt: skip
"""Name in captions -> icon name, for the subjects of the base model."""

HELD_CONCEPTS = {
    "fox": "fox", "robot": "robot", "octopus": "octopus", "unicorn": "unicorn", "ghost": "ghost",
    "teddy bear": "teddy-bear", "cactus": "cactus", "cupcake": "cupcake", "rocket": "rocket",
    "pumpkin": "jack-o-lantern", "alien": "alien", "dragon": "dragon-face", "snowman": "snowman",
    "hedgehog": "hedgehog",
}  # fmt: skip
"""Subjects never seen by the base model: they become concept adapters."""

CONCEPTS = BASE_CONCEPTS | HELD_CONCEPTS

BACKGROUNDS = {
    "white": (255, 255, 255), "blue": (176, 214, 245), "green": (190, 230, 190), "yellow": (252, 240, 175),
    "pink": (250, 205, 220), "purple": (215, 200, 245), "orange": (253, 214, 170), "gray": (205, 208, 212),
    "black": (32, 34, 40),
}  # fmt: skip
"""Background word -> RGB. White is half of all scenes and need not be named."""

SIZES = ((0.72, 0.84), (0.4, 0.47), (0.28, 0.32))
"""Least and greatest size of a subject in scenes of one, two and three."""

SPREAD = 0.4
"""How much of the free room a subject's place varies over."""

PLURALS = {"grapes", "cherries", "fries", "scissors", "books", "glasses"}
MASS = {"corn"}


# ---------------------------------------------------------------- packages and sprites


def fetch_packages(root: Path, packages: Mapping[str, str] = PACKAGES) -> Path:
    """Install the pinned npm ``packages`` below ``root/npm`` unless they are there; return node_modules.

    Raises ``RuntimeError`` when npm is missing or fails.
    """
    modules = root / "npm" / "node_modules"
    missing = [f"{name}@{version}" for name, version in packages.items() if not _has(modules / name, version)]
    if not missing:
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is needed once to fetch the emoji art (apt install npm), and was not found")
    (root / "npm").mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(root / "npm")]
    done = subprocess.run([*command, *missing], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"npm could not install {missing}: {done.stderr.strip()[-500:]}")
    return modules


def _has(folder: Path, version: str) -> bool:
    """Say whether the npm package in ``folder`` has exactly this version."""
    manifest = folder / "package.json"
    return manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8"))["version"] == version


def load_icons(modules: Path, icon_set: str) -> dict[str, Any]:
    """Return the parsed ``icons.json`` of an icon set."""
    value: dict[str, Any] = json.loads((modules / "@iconify-json" / icon_set / "icons.json").read_text("utf-8"))
    return value


def icon_svg(icons: dict[str, Any], name: str, pixels: int) -> str:
    """Return the SVG of one icon, ``pixels`` wide and high; aliases are followed.

    Raises ``KeyError`` when the set has no such icon.
    """
    seen = name
    while seen not in icons["icons"]:
        alias = icons.get("aliases", {}).get(seen)
        if alias is None:
            raise KeyError(f"icon set {icons.get('prefix')!r} has no icon {name!r}")
        seen = alias["parent"]
    icon = icons["icons"][seen]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{pixels}" height="{pixels}">{icon["body"]}</svg>'
    )


def rasterise(svg: str, pixels: int) -> np.ndarray:
    """Render a square SVG of side ``2 * pixels`` and return a trimmed sprite.

    Returns uint8 ``(pixels, pixels, 4)`` RGBA, straight alpha; the drawing is cut to what is not
    transparent, scaled so that its longer side fills the sprite, and centred.
    Raises ``ValueError`` when the drawing is empty.
    """
    import io

    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    box = Image.fromarray(image[..., 3]).point(lambda a: 255 if a > 12 else 0).getbbox()
    if box is None:
        raise ValueError("the drawing is empty")
    premultiplied = image.astype(np.float32) / 255
    premultiplied[..., :3] *= premultiplied[..., 3:]
    cut = premultiplied[box[1] : box[3], box[0] : box[2]]
    height, width = cut.shape[:2]
    factor = pixels / max(height, width)
    new = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = np.clip(cv2.resize(cut, new, interpolation=cv2.INTER_AREA), 0, 1)
    sprite = np.zeros((pixels, pixels, 4), np.float32)
    top, left = (pixels - new[1]) // 2, (pixels - new[0]) // 2
    sprite[top : top + new[1], left : left + new[0]] = small
    alpha = sprite[..., 3:]
    sprite[..., :3] = np.where(alpha > 0, sprite[..., :3] / np.maximum(alpha, 1e-6), 0)
    return (np.clip(sprite, 0, 1) * 255 + 0.5).astype(np.uint8)


def load_sprites(styles: dict[str, str] | None = None, concepts: dict[str, str] | None = None) -> np.ndarray:
    """Return sprites, rendering each icon set once into the build folder.

    Returns uint8 ``(styles, concepts, SPRITE, SPRITE, 4)`` in the order of the two mappings
    (style word -> icon set; name -> icon), which default to all five styles and all concepts.
    """
    styles, concepts = styles or STYLES, concepts or CONCEPTS
    root = build_dir()
    stack = []
    for icon_set in styles.values():
        key = _digest([icon_set, SPRITE, *concepts.values()])
        cache = root / "sprites" / f"{icon_set}-{key}.npy"
        if not cache.is_file():
            icons = load_icons(fetch_packages(root), icon_set)
            made = np.stack([rasterise(icon_svg(icons, icon, 2 * SPRITE), SPRITE) for icon in concepts.values()])
            files.write(cache, lambda part, made=made: np.save(part, made))  # type: ignore[misc]
        stack.append(np.load(cache))
    return np.stack(stack)


def _digest(words: Sequence[object]) -> str:
    """Return a short stable hash of the words."""
    import hashlib

    return hashlib.sha256("|".join(map(str, words)).encode()).hexdigest()[:12]


def common_icons(modules: Path, icon_sets: Sequence[str]) -> list[str]:
    """Return the icon names present in every set, sorted, without held-out subjects and flags."""
    sets = [load_icons(modules, name) for name in icon_sets]
    names = set.intersection(*({*s["icons"], *s.get("aliases", {})} for s in sets))
    banned = {*HELD_CONCEPTS.values(), *(name.split()[0] for name in HELD_CONCEPTS)} - {"teddy"}
    keep = (n for n in names if n not in banned and not banned & set(n.split("-")) and "flag" not in n)
    return sorted(n for n in keep if "skin-tone" not in n and n not in {"teddy-bear"})


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Placed:
    """A subject in a scene: ``concept`` name, centre ``x``, ``y`` in 0..1, longer side ``size`` in picture heights."""

    concept: str
    x: float
    y: float
    size: float

    def box(self, aspect: int = 1) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) in 0..1 of a picture that is ``aspect`` times as wide as high."""
        half = self.size / 2
        return (self.x - half / aspect, self.y - half, self.x + half / aspect, self.y + half)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: style word, subjects from left to right, background word, caption; width over height."""

    style: str
    subjects: tuple[Placed, ...]
    background: str
    caption: str
    aspect: int = 1


def article(name: str) -> str:
    """Return ``name`` with the article it takes: "an owl", "a dog", "grapes"."""
    if name in PLURALS or name in MASS:
        return name
    return f"{'an' if name[0] in 'aeio' or name == 'umbrella' else 'a'} {name}"


def with_article(words: str) -> str:
    """Put "a" or "an" before a phrase by its first letter."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def content_phrase(names: Sequence[str], form: int) -> str:
    """Describe one, two or three subjects given from left to right.

    ``form`` picks the wording and is taken modulo the number of wordings; positions come before the
    nouns in some, after them in others. Raises ``ValueError`` for another number of subjects.
    """
    a = [article(name) for name in names]
    if len(a) == 1:
        return a[0]
    if len(a) == 2:
        forms = [
            f"{a[0]} left of {a[1]}",
            f"{a[1]} right of {a[0]}",
            f"{a[0]} on the left and {a[1]} on the right",
            f"{a[1]} on the right and {a[0]} on the left",
            f"on the left {a[0]}, on the right {a[1]}",
            f"left {a[0]}, right {a[1]}",
            f"{a[0]} and {a[1]}",
        ]
        return forms[form % len(forms)]
    if len(a) == 3:
        forms = [
            f"{a[0]}, {a[1]} and {a[2]}",
            f"on the left {a[0]}, in the middle {a[1]}, on the right {a[2]}",
            f"{a[0]} on the left, {a[1]} in the middle and {a[2]} on the right",
        ]
        return forms[form % len(forms)]
    raise ValueError(f"one to three subjects, got {len(a)}")


def make_caption(style: str | None, names: Sequence[str], background: str | None, form: int = 0) -> str:
    """Write a caption. ``style`` None leaves the style open, ``background`` None does not name it."""
    kind = f"{style} icon" if style else "icon"
    text = f"{with_article(kind)} of {content_phrase(names, form)}"
    return f"{text}, {background} background" if background else text


def sample_scene(
    rng: Generator,
    counts: Sequence[float],
    styles: Sequence[str] = tuple(BASE_STYLES),
    concepts: Sequence[str] = tuple(BASE_CONCEPTS),
    aspect: int = 1,
) -> Scene:
    """Draw a scene; ``counts`` are the relative frequencies of one, two and three subjects."""
    weights = np.asarray(counts, float)
    number = 1 + int(rng.choice(3, p=weights / weights.sum()))
    names = [concepts[i] for i in rng.choice(len(concepts), number, replace=False)]
    style = styles[int(rng.integers(len(styles)))]
    background = "white"
    if rng.random() < 0.5:
        background = list(BACKGROUNDS)[1 + int(rng.integers(len(BACKGROUNDS) - 1))]
    named = background if background != "white" or rng.random() < 0.3 else None
    told = style if rng.random() < 0.88 else None
    placed = place(rng, names, aspect)
    return Scene(style, placed, background, make_caption(told, names, named, int(rng.integers(42))), aspect)


def place(rng: Generator, names: Sequence[str], aspect: int = 1) -> tuple[Placed, ...]:
    """Give one to three subjects sizes and places, from left to right, without overlap."""
    number = len(names)
    low, high = SIZES[-(-number // aspect) - 1]
    placed = []
    for index, name in enumerate(names):
        size = float(rng.uniform(low, high))
        slack_x = (1 / number - size / aspect) / 2
        x = (index + 0.5) / number + float(rng.uniform(-slack_x, slack_x)) * (SPREAD if aspect == 1 else 1)
        slack_y = min((1 - size) / 2, 0.16)
        placed.append(Placed(name, x, 0.5 + float(rng.uniform(-slack_y, slack_y)) * SPREAD, size))
    return tuple(placed)


def paste(canvas: np.ndarray, sprite: np.ndarray, x: float, y: float, size: float) -> None:
    """Blend a uint8 RGBA ``sprite`` onto a float ``(H, W, 3)`` canvas (0..255), in place.

    ``x``, ``y`` (centre) are fractions of the canvas' width and height, ``size`` of its height; parts outside are cut
    off.
    """
    height, across = canvas.shape[:2]
    width = max(2, round(size * height))
    pixels = sprite.astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    small = cv2.resize(pixels, (width, width), interpolation=cv2.INTER_AREA)
    left, top = round(x * across - width / 2), round(y * height - width / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, across), min(top + width, height)
    if x0 >= x1 or y0 >= y1:
        return
    part = small[y0 - top : y1 - top, x0 - left : x1 - left]
    region = canvas[y0:y1, x0:x1]
    region *= 1 - part[..., 3:] / 255
    region += part[..., :3]


def render(scene: Scene, sprites: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Draw a scene from :func:`load_sprites` output (all styles, all concepts): uint8 ``(size, aspect * size, 3)``."""
    canvas = np.empty((size, scene.aspect * size, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    style = list(STYLES).index(scene.style)
    names = list(CONCEPTS)
    for subject in scene.subjects:
        paste(canvas, sprites[style, names.index(subject.concept)], subject.x, subject.y, subject.size)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def contact_sheet(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Lay out equally large uint8 ``(H, W, 3)`` pictures in a grid on grey."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 128, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + (index // columns) * (height + gap), gap + (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(target: Path, image: np.ndarray) -> Path:
    """Write a uint8 RGB picture as PNG, atomically."""
    return files.write(target, lambda part: Image.fromarray(image).save(part, format="PNG"))


def save_sheet(target: Path, image: np.ndarray) -> Path:
    """Write a sheet of samples as PNG with at most 256 colours: a third of the bytes, nothing to be seen."""
    few = Image.fromarray(image).quantize(256)
    return files.write(target, lambda part: few.save(part, format="PNG", optimize=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch, render and show: writes ``sprites.png`` and ``scenes.png`` into the build folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    root = build_dir()
    sprites = load_sprites()
    rows = [s for c in range(sprites.shape[1]) for s in sprites[:, c]]
    white = [np.where(s[..., 3:] > 0, s[..., :3] * (s[..., 3:] / 255) + (255 - s[..., 3:]), 255) for s in rows]
    small = [cv2.resize(w.astype(np.uint8), (48, 48), interpolation=cv2.INTER_AREA) for w in white]
    save_png(root / "sprites.png", contact_sheet(small, 5 * 6))
    rng = np.random.default_rng(options.seed)
    scenes = [sample_scene(rng, (55, 40, 5)) for _ in range(96)]
    save_png(root / "scenes.png", contact_sheet([render(s, sprites) for s in scenes], 16))
    print(f"{len(BASE_CONCEPTS)} base concepts, {len(HELD_CONCEPTS)} held out, {sprites.shape[0]} styles")
    print(f"wrote {root / 'sprites.png'} and {root / 'scenes.png'}")
    for scene in scenes[:12]:
        print(" ", scene.caption)


if __name__ == "__main__":
    main()
