"""Rendered rooms with exact geometry: the pictures the embedded pointmap model learns from and is judged on.

A scene is a closed room with boxes, balls and cylinders on its floor, painted by a random solid texture (a volume of
colours that every surface point looks up) and lit by one lamp, so that a point has the same colour from everywhere.
Rays are cast in torch, many scenes and views at once, on CPU or GPU; depth and pose are exact.

Conventions: metres, world z up; cameras as in OpenCV (x right, y down, z forward), poses camera-to-world; pixels are
integer columns and rows, the principal point is (W/2, H/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FAR = 1e9


@dataclass(frozen=True)
class Family:
    """What scenes and cameras may look like; ranges are uniform.

    Attributes:
        spread: degrees of azimuth that the views of one scene cover.
        shapes: kinds of objects.
        checker: surfaces are chequered instead of softly mottled.
        gain, gamma, cast, noise: what the camera does to colours (shift B): gain +-, gamma exponent +-, colour
            cast +-, noise sigma.
    """

    spread: float = 40.0
    objects: tuple[int, int] = (3, 6)
    shapes: tuple[str, ...] = ("box", "ball")
    room: tuple[float, float] = (3.0, 4.2)
    height: tuple[float, float] = (2.4, 3.2)
    distance: tuple[float, float] = (1.9, 2.7)
    camera_height: tuple[float, float] = (0.7, 1.7)
    field_of_view: tuple[float, float] = (52.0, 68.0)
    look: float = 0.15
    checker: bool = False
    gain: float = 0.0
    gamma: float = 0.0
    cast: float = 0.0
    noise: float = 0.0


PRETRAINING = Family()
SHIFTS: dict[str, Family] = {
    "overlap": replace(PRETRAINING, spread=180.0),
    "appearance": replace(PRETRAINING, gain=0.3, gamma=0.3, cast=0.1, noise=0.03),
    "texture": replace(PRETRAINING, checker=True, shapes=("cylinder",), field_of_view=(36.0, 46.0)),
}
"""Shifts away from the pre-training family: A wider baselines, B other cameras, C other shapes, paint and lenses."""


@dataclass
class Scenes:
    """``S`` scenes with ``K`` object places each (absent ones have size zero).

    Shapes: room ``(S, 3)`` half sizes in x and y, height; centre, size ``(S, K, 3)``; yaw ``(S, K)``; kind ``(S, K)``
    (0 box, 1 ball, 2 cylinder); paint ``(S, K + 6, 3)`` (the last six are the room's sides); volume
    ``(S, 3, G, G, G)``; shift ``(S, K + 6, 3)`` of each surface's place in the volume; lamp ``(S, 3)``.
    """

    room: Tensor
    centre: Tensor
    size: Tensor
    yaw: Tensor
    kind: Tensor
    paint: Tensor
    volume: Tensor
    shift: Tensor
    lamp: Tensor
    checker: bool

    def __len__(self) -> int:
        return len(self.room)

    def pick(self, index: Tensor | list[int] | slice) -> Scenes:
        """Some of the scenes."""
        values = {name: getattr(self, name)[index] for name in self.__annotations__ if name != "checker"}
        return Scenes(**values, checker=self.checker)


@dataclass
class Views:
    """``V`` pictures of each of ``S`` scenes.

    Shapes: image ``(S, V, 3, H, W)`` in [0, 1]; depth ``(S, V, H, W)``; pose ``(S, V, 4, 4)``; focal ``(S, V)``
    in pixels; azimuth ``(S, V)`` in degrees.
    """

    image: Tensor
    depth: Tensor
    pose: Tensor
    focal: Tensor
    azimuth: Tensor

    def points(self) -> Tensor:
        """World points ``(S, V, H, W, 3)`` of every pixel."""
        height, width = self.depth.shape[-2:]
        rays = camera_rays(self.focal, height, width)
        own = rays * self.depth.flatten(2)[..., None]
        world = own @ self.pose[..., :3, :3].mT + self.pose[..., None, :3, 3]
        return world.unflatten(2, (height, width))


# ------------------------------------------------------------------------------------------------ drawing lots


def _uniform(generator: torch.Generator, count: int, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(count, *shape, generator=generator) * (high - low) + low


def sample_scenes(count: int, family: Family, generator: torch.Generator, device: Any = "cpu") -> Scenes:
    """Random scenes of a family; the same generator state gives the same scenes."""
    lot = partial(_uniform, generator, count)
    places = family.objects[1]
    number = torch.randint(family.objects[0], family.objects[1] + 1, (count, 1), generator=generator)
    present = torch.arange(places) < number
    names = ("box", "ball", "cylinder")
    kinds = torch.tensor([names.index(shape) for shape in family.shapes])
    kind = kinds[torch.randint(len(kinds), (count, places), generator=generator)]
    size = torch.stack([lot(0.15, 0.45, places), lot(0.15, 0.45, places), lot(0.15, 0.6, places)], -1)
    round_ = size[..., :1].expand(-1, -1, 3)
    size = torch.where((kind == 1)[..., None], round_, size)
    size = torch.where((kind == 2)[..., None], torch.cat([round_[..., :2], size[..., 2:]], -1), size)
    angle = lot(0, 2 * math.pi, 1) + torch.arange(places) * 2.399963  # golden angle: objects stand apart
    radius = lot(0.75, 1.0, places) * (torch.arange(places) / places).sqrt() * 1.25
    centre = torch.stack([radius * angle.cos(), radius * angle.sin(), size[..., 2]], -1)
    room = torch.stack([lot(*family.room), lot(*family.room), lot(*family.height)], -1)
    coarse = torch.rand(count, 3, 5, 5, 5, generator=generator)
    fine = torch.rand(count, 3, 20, 20, 20, generator=generator)
    volume = 0.6 * F.interpolate(coarse, (20, 20, 20), mode="trilinear", align_corners=True) + 0.4 * fine
    volume = (1.6 * (volume - 0.5) + 0.6).clamp(0.1, 1.1)
    scenes = Scenes(
        room=room, centre=centre, size=size * present[..., None], yaw=lot(0, 2 * math.pi, places), kind=kind,
        paint=lot(0.3, 1.0, places + 6, 3), volume=volume, shift=lot(-0.5, 0.5, places + 6, 3),
        lamp=torch.stack([lot(-1.5, 1.5), lot(-1.5, 1.5), room[:, 2] - 0.2], -1), checker=family.checker,
    )  # fmt: skip
    return Scenes(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(scenes).items()})


def sample_cameras(
    count: int, views: int, family: Family, generator: torch.Generator, size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Poses ``(S, V, 4, 4)``, focals ``(S, V)`` in pixels and azimuths ``(S, V)`` in degrees; one lens per scene."""
    lot = partial(_uniform, generator, count)
    azimuth = lot(0, 360, 1) + lot(-family.spread / 2, family.spread / 2, views)
    distance, height = lot(*family.distance, views), lot(*family.camera_height, views)
    turn = torch.deg2rad(azimuth)
    eye = torch.stack([distance * turn.cos(), distance * turn.sin(), height], -1)
    target = torch.cat([lot(-family.look, family.look, views, 2), lot(0.2, 0.5, views, 1)], -1)
    focal = size / 2 / torch.tan(torch.deg2rad(lot(*family.field_of_view, 1)) / 2).expand(count, views)
    return look_at(eye, target), focal.contiguous(), azimuth


def look_at(eye: Tensor, target: Tensor) -> Tensor:
    """Camera-to-world matrices ``(..., 4, 4)`` of upright cameras at ``eye`` that look at ``target``."""
    forward = F.normalize(target - eye, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0], device=eye.device, dtype=eye.dtype).expand_as(eye)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    pose = torch.zeros(*eye.shape[:-1], 4, 4, device=eye.device, dtype=eye.dtype)
    pose[..., :3, :] = torch.stack([right, down, forward, eye], -1)
    pose[..., 3, 3] = 1
    return pose


# ------------------------------------------------------------------------------------------------ casting rays


def camera_rays(focal: Tensor, height: int, width: int) -> Tensor:
    """Directions ``(..., H * W, 3)`` with z = 1, so that a ray's length is the depth."""
    v, u = torch.meshgrid(
        torch.arange(height, device=focal.device) - height / 2, torch.arange(width, device=focal.device) - width / 2,
        indexing="ij",
    )  # fmt: skip
    plane = torch.stack([u.flatten(), v.flatten()], -1) / focal[..., None, None]
    return F.pad(plane, (0, 1), value=1.0)


@torch.no_grad()
def render(
    scenes: Scenes, pose: Tensor, focal: Tensor, azimuth: Tensor | None = None, size: int | tuple[int, int] = 64
) -> Views:
    """Pictures of every scene from its own poses ``(S, V, 4, 4)``.

    Args:
        size: pixels of the side, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    device = scenes.room.device
    pose, focal = pose.to(device), focal.to(device)
    count, views = focal.shape
    rays = camera_rays(focal, height, width) @ pose[..., :3, :3].mT
    ray = rays.flatten(1, 2).movedim(-1, 0).contiguous()
    eye = pose[..., :3, 3].repeat_interleave(height * width, 1).movedim(-1, 0).contiguous()
    depth, normal, surface = _room(scenes, eye, ray)
    for place in range(scenes.kind.shape[1]):
        _object(scenes, place, eye, ray, depth, normal, surface)
    image = _shade(scenes, eye + depth * ray, normal, surface)
    shape = (count, views, height, width)
    return Views(
        image.movedim(0, 1).reshape(count, 3, *shape[1:]).movedim(1, 2).contiguous(), depth.reshape(shape), pose, focal,
        azimuth if azimuth is not None else torch.zeros(count, views),
    )  # fmt: skip


def _room(scenes: Scenes, eye: Tensor, ray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depth, normal and surface number of the wall, floor or ceiling that each ray ends on."""
    half = scenes.room.T[:, :, None]
    low = torch.cat([-half[:2], torch.zeros_like(half[:1])])
    wall = torch.where(ray > 0, half, low)
    distance = (wall - eye) / torch.where(ray.abs() < 1e-9, 1e-9, ray)
    depth, axis = distance.min(0)
    normal = torch.zeros_like(ray).scatter_(0, axis[None], -ray.gather(0, axis[None]).sign())
    side = 2 * axis + (normal.sum(0) > 0).long()
    return depth, normal, scenes.kind.shape[1] + side


def _object(
    scenes: Scenes, place: int, eye: Tensor, ray: Tensor, depth: Tensor, normal: Tensor, surface: Tensor
) -> None:
    """Put one object of every scene before what the rays have met so far, in place."""
    kind = scenes.kind[:, place]
    for number, hit in enumerate((_box, _ball, _cylinder)):
        mine = ((kind == number) & (scenes.size[:, place, 0] > 0)).nonzero()[:, 0]
        if len(mine) == 0:
            continue
        cosine, sine = scenes.yaw[mine, place].cos()[:, None], scenes.yaw[mine, place].sin()[:, None]
        start = eye[:, mine] - scenes.centre[mine, place].T[:, :, None]
        way = ray[:, mine]
        start = torch.stack([cosine * start[0] + sine * start[1], cosine * start[1] - sine * start[0], start[2]])
        way = torch.stack([cosine * way[0] + sine * way[1], cosine * way[1] - sine * way[0], way[2]])
        distance, face = hit(start, way, scenes.size[mine, place].T[:, :, None])
        nearer = distance < depth[mine]
        face = torch.stack([cosine * face[0] - sine * face[1], sine * face[0] + cosine * face[1], face[2]])
        depth[mine] = torch.where(nearer, distance, depth[mine])
        normal[:, mine] = torch.where(nearer, face, normal[:, mine])
        surface[mine] = torch.where(nearer, place, surface[mine])


def _box(start: Tensor, way: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    way = torch.where(way.abs() < 1e-9, 1e-9, way)
    middle, reach = -start / way, half / way.abs()
    enter, axis = (middle - reach).max(0)
    leave = (middle + reach).min(0).values
    met = (enter < leave) & (enter > 0)
    normal = torch.zeros_like(way).scatter_(0, axis[None], -way.gather(0, axis[None]).sign())
    return torch.where(met, enter, FAR), normal


def _ball(start: Tensor, way: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c = (way * way).sum(0), (start * way).sum(0), (start * start).sum(0) - radius[0] ** 2
    root = b * b - a * c
    distance = (-b - root.clamp_min(0).sqrt()) / a
    met = (root > 0) & (distance > 0)
    return torch.where(met, distance, FAR), (start + distance * way) / radius[0]


def _cylinder(start: Tensor, way: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    radius, half = size[0], size[2]
    a = (way[:2] * way[:2]).sum(0).clamp_min(1e-12)
    b, c = (start[:2] * way[:2]).sum(0), (start[:2] * start[:2]).sum(0) - radius**2
    root = b * b - a * c
    side = (-b - root.clamp_min(0).sqrt()) / a
    at = start + side * way
    on_side = (root > 0) & (side > 0) & (at[2].abs() <= half)
    cap = (half * -way[2].sign() - start[2]) / torch.where(way[2].abs() < 1e-9, 1e-9, way[2])
    top = start + cap * way
    on_cap = (cap > 0) & ((top[:2] * top[:2]).sum(0) <= radius**2)
    side, cap = torch.where(on_side, side, FAR), torch.where(on_cap, cap, FAR)
    flat = torch.zeros_like(at)
    flat[2] = -way[2].sign()
    around = torch.cat([at[:2] / radius, torch.zeros_like(at[:1])])
    return torch.minimum(side, cap), torch.where(cap < side, flat, around)


def _shade(scenes: Scenes, point: Tensor, normal: Tensor, surface: Tensor) -> Tensor:
    """Colours ``(3, S, rays)``: paint times texture times light, the same from every side."""
    index = surface[None].expand(3, -1, -1)
    paint = scenes.paint.movedim(-1, 0).gather(2, index)
    shift = scenes.shift.movedim(-1, 0).gather(2, index)
    if scenes.checker:
        cells = ((point + shift + 1e-4) * 3).floor().sum(0, keepdim=True)
        texture = 0.35 + 0.65 * (cells % 2)
    else:
        inside = (surface < scenes.kind.shape[1])[None]
        where = torch.where(inside, point / 1.5, point / 4.3 - 0.1) + shift
        where = 1 - ((where + 1) % 4 - 2).abs()  # mirrored beyond the volume, so that nothing jumps
        places = where.movedim(0, -1)[:, :, None, None]
        looked = F.grid_sample(scenes.volume, places, mode="bilinear", align_corners=True)
        texture = looked[..., 0, 0].movedim(1, 0)
    to_lamp = scenes.lamp.T[:, :, None] - point
    light = (normal * to_lamp).sum(0).clamp_min(0) / to_lamp.norm(dim=0).clamp_min(1e-6)
    return (paint * texture * (0.6 + 0.8 * light)).clamp(0, 1)


def expose(image: Tensor, family: Family, generator: torch.Generator) -> Tensor:
    """What the family's cameras make of the true colours ``(S, V, 3, H, W)`` (nothing, without shift B)."""
    if not (family.gain or family.gamma or family.cast or family.noise):
        return image
    shape = (*image.shape[:2], 1, 1, 1)

    def lot(width: float, *size: int) -> Tensor:
        return ((torch.rand(*size, generator=generator) * 2 - 1) * width).to(image.device)

    gain = 1 + lot(family.gain, *shape) + lot(family.cast, *shape[:2], 3, 1, 1)
    noise = torch.randn(image.shape, generator=generator).to(image.device) * family.noise
    return (image.clamp_min(1e-4) ** (1 + lot(family.gamma, *shape)) * gain + noise).clamp(0, 1)


def sample_views(
    count: int, views: int, family: Family, generator: torch.Generator, device: Any = "cpu", size: int = 64
) -> tuple[Scenes, Views]:
    """Random scenes with random views of each."""
    scenes = sample_scenes(count, family, generator, device)
    pose, focal, azimuth = sample_cameras(count, views, family, generator, size)
    made = render(scenes, pose, focal, azimuth, size)
    return scenes, replace(made, image=expose(made.image, family, generator))
