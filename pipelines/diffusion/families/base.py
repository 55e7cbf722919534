"""The interface of a base family, implemented by one file per family.

A description can be read without torch and diffusers (as recognition and pages require); its methods import them when
called with a loaded diffusers pipeline, always named ``pipe``. An encoded prompt is a dictionary of named tensors with
the batch first. All other code for composition, training and distillation is shared by all families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from adapters.errors import InputError
from pipelines.diffusion.families.reading import Reader, Tokenized

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adapters.formats.lora import LoraFile
    from pipelines.videos import Sound

Tensors = dict[str, "Tensor"]

ATTENTION = r"(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD = r"(ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp|proj_out|proj_in)"
OUTSIDE_BLOCKS = r"(conv_in|conv_out|pos_embed.*|x_embedder|context_embedder|proj_out|norm_out.*)"
"""First and last layers, which 'linear' and 'all' leave out, as other trainers do."""


def layer_choices(attention: str, feed_forward: str, outside: str) -> Mapping[str, str]:
    """Choice of layers -> regular expression that matches full module names, from those of a denoiser's attention
    layers, its feed-forward layers, and its first and last layers."""
    inner = rf"(?!{outside}$).*"
    return {"attention": attention, "attention-mlp": rf"{attention}|{feed_forward}", "linear": inner, "all": inner}


TARGETS = layer_choices(rf"(.*\.)?{ATTENTION}", rf".*\.{FEED_FORWARD}", OUTSIDE_BLOCKS)
"""Choice of layers -> regular expression that matches full module names of most denoisers in diffusers."""


TEXT_LAYERS = r"(^|\.)(add_[qkv]_proj|to_add_out|context_embedder|context_refiner|ff_context|norm1_context)(\.|$)"
"""Modules on the text's side of most joint transformers in diffusers."""


@dataclass(frozen=True)
class Denoiser:
    """A denoising network: its attribute in the pipeline, and its range of noise levels (0 clean, 1 noise).

    Attributes:
        word: where a family has several, the word in the names of adapter files for this one alone ("high").
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    word: str = ""

    @property
    def title(self) -> str:
        """What it is called."""
        return f"{self.word} noise" if self.word else self.name


@dataclass(frozen=True)
class Video:
    """What a family of videos makes by itself: ``frames`` pictures, of which ``rate`` are shown per second.

    Attributes:
        step: the number of frames is a multiple of this, plus one.
        size: height and width in pixels.
        argument: the pipeline's argument for the rate, if the model is told it.
        regions: predictions of regions can be blended.
    """

    frames: int
    rate: float
    step: int
    size: tuple[int, int]
    argument: str = ""
    regions: bool = True

    def check(self, frames: int) -> int:
        """``frames``, if the family can make so many.

        Raises:
            InputError: it cannot; names the nearest numbers that it can.
        """
        if frames >= 1 and (frames - 1) % self.step == 0:
            return frames
        below = max(1, (frames - 1) // self.step * self.step + 1)
        near = f"{below} or {below + self.step}" if frames > 1 else "1"
        raise InputError(
            f"The number of frames must be a multiple of {self.step} plus 1 for this model, got {frames}: take {near}."
        )


@dataclass(frozen=True)
class Layout:
    """The order of tokens inside the denoiser.

    Attributes:
        sequence: parts of the token sequence, in order: "text", "image", "reference". A network with cross-attention
            has only "image".
        patch: latent cells along each side of one image token.
        packed: the pipeline passes tokens (batch, tokens, channels) instead of latents (batch, channels, h, w).
        multiple: text and image tokens are padded to a multiple of this number.
        leading: number of tokens that the denoiser puts before a text.
        text_layers: regular expression to find in the names of modules on the text's side.
        across: regular expression to find in the names of modules with attention from the image to the text.
        twice: regular expression to find in the names of modules that a block calls for the image, then for the text.
        in_front: regular expression to find in the names of layers whose input has the tokens in front and the batch
            second.
        linear: image tokens attend to each other through sums over all of them.
    """

    sequence: tuple[str, ...] = ("image",)
    patch: int = 1
    packed: bool = False
    multiple: int = 1
    leading: int = 0
    text_layers: str = TEXT_LAYERS
    across: str = ""
    twice: str = ""
    in_front: str = ""
    linear: bool = False

    @property
    def text_first(self) -> bool:
        """Whether text comes before the image in one sequence."""
        return "text" in self.sequence and self.sequence.index("text") < self.sequence.index("image")


@dataclass(frozen=True)
class Signature:
    """How a family's files are recognised by the names in their header.

    Attributes:
        adapter: regular expression to find in the module names of adapter files.
        checkpoint: regular expression to find in the tensor names of single-file models.
        width: inputs of a cross-attention key projection that only this family has.
        widths: of the transformer blocks; an adapter with other ones is for another family.
        hints: regular expression to find in the metadata that trainers write about the base.
        precedence: families with a higher one are tried first (others may share some of their names).
    """

    adapter: str
    checkpoint: str
    width: int | None = None
    widths: tuple[int, ...] = ()
    hints: str = ""
    precedence: int = 1

    def fits_adapter(self, names: str, width: int | None = None, inner: int | None = None) -> bool:
        """Whether an adapter with these tensor names (one per line) is for this family; ``width`` and ``inner`` as in
        :func:`pipelines.diffusion.families.of_adapter`."""
        if self.widths and inner not in self.widths:
            return False
        return bool(re.search(self.adapter, names, re.MULTILINE)) or (width is not None and width == self.width)

    def fits_checkpoint(self, names: str) -> bool:
        """Whether a single-file model with these tensor names (one per line) is of this family."""
        return bool(re.search(self.checkpoint, names, re.MULTILINE))


@dataclass(frozen=True)
class Encoding:
    """An encoded prompt: the positive and the negative embeddings (None without guidance).

    ``positive`` and ``negative`` map the family's names ("embeds" (batch, tokens, width), "pooled" (batch, width), a
    mask ...) to tensors with the batch in front, or to lists with one tensor per sample (if the denoiser takes lists);
    ``names`` maps them to the arguments of the diffusers pipeline, where the batch of some is on one of ``axes``.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None
    names: Mapping[str, str] = field(default_factory=lambda: CALL_NAMES)
    axes: Mapping[str, int] = field(default_factory=dict)

    def call_arguments(self) -> dict[str, Any]:
        """The embeddings as arguments of a diffusers pipeline."""

        def placed(key: str, value: Any) -> Any:
            return value.movedim(0, self.axes[key]) if key in self.axes else value

        arguments = {self.names[key]: placed(key, value) for key, value in self.positive.items()}
        if self.negative is not None:
            arguments |= {f"negative_{self.names[key]}": placed(key, value) for key, value in self.negative.items()}
        return arguments


@dataclass(frozen=True)
class Joined:
    """The texts of several encodings one after another (all else is the first one's).

    Attributes:
        encoding: with the joined texts.
        texts: number of tokens of each text, the larger one of its positive and negative half.
        own: tokens of each text without padding: of the positive and of the negative half. Empty if the denoiser itself
            masks what is padded.
    """

    encoding: Encoding
    texts: tuple[int, ...]
    own: tuple[tuple[int, ...], ...] = ()


CALL_NAMES: Mapping[str, str] = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds"}


class Family:
    """A base family.

    Attributes:
        name: its name in configurations.
        title, short: its name for people, long and short.
        order: position in lists (smaller first).
        licence: of the public checkpoints.
        pipeline: diffusers' text-to-image class.
        other_pipelines: other task with the same networks -> diffusers' class.
        bases: those of these classes that bases of their own are published for (such a base is opened as its class).
        editing: those of them that read their prompts together with a picture to edit.
        single_file: diffusers opens a base from a single file too.
        checked: what the family was checked on.
        controlnet: diffusers' class of the family's ControlNets.
        components: attributes of the pipeline that hold models.
        denoisers: the denoising networks; most families have one, and a base may lack all but the first.
        video: what is made if the family makes videos; each is a list of frames.
        outputs: number of predictions that the denoiser returns (of picture and sound: 2).
        untrainable: why LoRAs of it cannot be trained here, as a sentence.
        text_encoders: attributes of the text encoders that adapters may change.
        learning_encoders: those of them that can be trained here.
        batch_arguments: keyword arguments of the denoiser whose first dimension is the batch.
        list_arguments: those that are lists with one entry per sample.
        positional: names of the denoiser's arguments that the pipeline passes by position, in order; needed if one of
            them is a list or an encoding.
        no_guidance: guidance_scale up to which the pipeline makes no second pass.
        flat_layers: regular expression of whole names of layers whose input does not have the batch in front (but, for
            example, the tokens of all samples in one dimension), so that samples cannot have strengths of their own.
        text_arguments: path of keys in the denoiser's arguments -> name in the encoding.
        call_names: name in the encoding -> argument of the pipeline.
        batch_axes: name in the encoding -> axis of the batch in pipeline and denoiser, where it is not the first.
        targets: choice of layers -> regular expression that matches full module names of the denoiser.
        layout: the order of tokens inside the denoiser.
        predictions: what the denoiser may predict: "epsilon", "v_prediction", "sample" or "flow".
        vae_fields: latent statistics in the VAE's configuration that the pipeline uses, and fields that only its kind
            of VAE has.
        denoiser_inputs: field of the denoiser's configuration that requires an input -> supported values.
        guidance_input: the denoiser takes the guidance as an input; true guidance is a second pass.
        guidance_argument: the pipeline's argument for guidance by a second pass.
        usual_steps, usual_guidance: steps and guidance of a call that asks for none.
        zeros_field: field of the pipeline's configuration that replaces an empty negative prompt by zeros.
        size_input: the denoiser takes the picture's size and crop as an input.
        text_tensors: names in the encoding of tensors (batch, tokens, ...) with an entry per token of the text.
        positive_first: of the two halves of guidance, in one batch or in two passes, the positive one comes first.
        inner_regions: regions can act inside the denoiser (if not, their predictions are blended).
        no_inner_regions: why not, as the end of a sentence.
        prompt_tokens: most tokens of a prompt, for families without readers; None = what the tokenizer says.
        training_shift: shift of the noise levels in training; None = that of the base's scheduler.
        always: arguments of every call of the pipeline, unless the caller gives others.
        usual_size: pixels per side, if the model itself is not loaded.
        signature: how files are recognised.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    short: ClassVar[str]
    order: ClassVar[int] = 100
    licence: ClassVar[str] = ""
    pipeline: ClassVar[str]
    other_pipelines: ClassVar[Mapping[str, str]] = MappingProxyType({})
    bases: ClassVar[tuple[str, ...]] = ()
    editing: ClassVar[tuple[str, ...]] = ()
    single_file: ClassVar[bool] = True
    checked: ClassVar[str] = "tiny random models"
    controlnet: ClassVar[str] = ""
    components: ClassVar[tuple[str, ...]]
    denoisers: ClassVar[tuple[Denoiser, ...]]
    video: ClassVar[Video | None] = None
    outputs: ClassVar[int] = 1
    untrainable: ClassVar[str] = ""
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    learning_encoders: ClassVar[tuple[str, ...]] = ()
    batch_arguments: ClassVar[tuple[str, ...]]
    list_arguments: ClassVar[tuple[str, ...]] = ()
    positional: ClassVar[tuple[str, ...]] = ()
    no_guidance: ClassVar[float] = 1.0
    flat_layers: ClassVar[str] = ""
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]]
    call_names: ClassVar[Mapping[str, str]] = CALL_NAMES
    batch_axes: ClassVar[Mapping[str, int]] = MappingProxyType({})
    targets: ClassVar[Mapping[str, str]] = TARGETS
    layout: ClassVar[Layout] = Layout()
    predictions: ClassVar[tuple[str, ...]]
    vae_fields: ClassVar[tuple[str, ...]] = ()
    denoiser_inputs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})
    guidance_input: ClassVar[bool] = False
    guidance_argument: ClassVar[str] = "guidance_scale"
    usual_steps: ClassVar[int] = 25
    usual_guidance: ClassVar[float] = 5.0
    zeros_field: ClassVar[str] = ""
    size_input: ClassVar[bool] = False
    text_tensors: ClassVar[tuple[str, ...]] = ("embeds",)
    positive_first: ClassVar[bool] = False
    inner_regions: ClassVar[bool] = True
    no_inner_regions: ClassVar[str] = ""
    prompt_tokens: ClassVar[int | None] = None
    training_shift: ClassVar[float | None] = None
    always: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    usual_size: ClassVar[int] = 1024
    signature: ClassVar[Signature]

    @property
    def denoiser(self) -> str:
        """Attribute of the first denoising network."""
        return self.denoisers[0].name

    def present(self, pipe: Any) -> tuple[Denoiser, ...]:
        """The denoisers that this base has."""
        return tuple(one for one in self.denoisers if getattr(pipe, one.name, None) is not None)

    @property
    def flow(self) -> bool:
        """Whether it is trained by flow matching, which has its own samplers."""
        return self.predictions == ("flow",)

    @property
    def unet(self) -> bool:
        """Whether the denoiser is a UNet."""
        return self.denoiser == "unet"

    # ------------------------------------------------------------------ pipelines
    def tasks(self, pipe: Any) -> Mapping[str, str]:
        """Task -> diffusers' class, with the networks of ``pipe``."""
        return self.other_pipelines

    def edits(self, pipe: Any) -> bool:
        """Whether the base edits pictures: its prompts are read together with the argument ``image``."""
        return type(pipe).__name__ in self.editing

    def training_refusal(self, kind: str, parts: Collection[str]) -> str:
        """Why LoRAs of a base cannot be trained here, as a sentence; empty if they can.

        Args:
            kind: diffusers' class of the base.
            parts: names of the parts it has.
        """
        several = [one for one in self.denoisers if one.name in parts]
        if self.untrainable:
            return self.untrainable
        if kind in self.editing:
            return (
                f"This base of {self.title} edits pictures, which training from pictures and captions does not teach: "
                f"use the family's text-to-image base ({self.pipeline})."
            )
        if len(several) > 1:
            return (
                f"This base has {len(several)} denoisers, of which training knows only one at a time: train on a base "
                "with one (Wan 2.1, or Wan 2.2 5B)."
            )
        return ""

    def usual(self, pipe: Any) -> tuple[int, float]:
        """Steps and guidance of a call that asks for none."""
        return self.usual_of(str(getattr(pipe, "name_or_path", "") or ""), pipe.config)

    def usual_of(self, name: str, config: Mapping[str, Any]) -> tuple[int, float]:
        """Steps and guidance for a base by its name and the pipeline's configuration: few steps without guidance for
        derivatives whose names say so (see :func:`few_steps`)."""
        if (few := few_steps(name)) is not None:
            return few, self.usual_guidance if self.guidance_input else self.no_guidance
        return self.usual_steps, self.usual_guidance

    def opened(self, pipe: Any, names: Collection[str], source: str) -> list[str]:
        """Apply to ``pipe`` what a single file says besides its weights; returns what was done, as short phrases.

        Args:
            names: of the file's tensors.
            source: the file.
        """
        return []

    def takes_guidance(self, pipe: Any) -> bool:
        """Whether the base can be guided (some that are distilled cannot)."""
        return True

    def guidance_arguments(self, scale: float, negative: str = "") -> dict[str, Any]:
        """Arguments of a call of the pipeline alone, for guidance by a second pass."""
        return {self.guidance_argument: scale, **({"negative_prompt": negative} if negative else {})}

    # ------------------------------------------------------------------ sizes
    def pixel_step(self, pipe: Any) -> int:
        """Pixels that width and height must be multiples of."""
        return self.token_step(pipe)

    def token_step(self, pipe: Any) -> int:
        """Pixels along each side of one image token."""
        factor: int = pipe.vae_scale_factor
        return factor * self.layout.patch

    def grid(self, pipe: Any, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a prediction (in tokens if packed, else latents) for a picture of this size in pixels."""
        factor = pipe.vae_scale_factor * (self.layout.patch if self.layout.packed else 1)
        return height // factor, width // factor

    def size(self, pipe: Any) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the base makes by itself."""
        own = self.own_cells(pipe)
        side = self.resolution(pipe) if own is None else own * pipe.vae_scale_factor
        return side, side

    def own_cells(self, pipe: Any) -> int | None:
        """Latent cells per side of those pictures, if the configuration says so."""
        own = getattr(pipe, "default_sample_size", None) or getattr(pipe, self.denoiser).config.get("sample_size")
        return own if own is None or isinstance(own, int) else int(own[0])

    def input_channels(self, pipe: Any) -> int:
        """Channels of the denoiser's input."""
        config = pipe.vae.config
        channels: int = config.get("latent_channels") or config["z_dim"]
        return channels * self.layout.patch**2 if self.layout.packed else channels

    def resolution(self, pipe: Any) -> int:
        """Pixels per side that the base was trained for."""
        size = getattr(pipe, self.denoiser).config.sample_size
        return int(size if isinstance(size, int) else size[0]) * latent_factor(pipe)

    def size_from(self, pipe: Any, image: Any) -> tuple[int, int]:
        """Height and width in pixels of a picture made from ``image`` (one or a list) if no size is asked for."""
        first = image[0] if isinstance(image, list | tuple) else image
        return (first.height, first.width) if hasattr(first, "width") else tuple(first.shape[-2:])

    def size_arguments(self, pipe: Any, height: int | None, width: int | None) -> dict[str, Any]:
        """Arguments of the pipeline for pictures of this size in pixels (None = its own)."""
        return {"width": width, "height": height}

    def multiple(self, pipe: Any) -> int:
        """Pixels that the sides of training pictures should be multiples of."""
        return self.latent_factor(pipe) * self.layout.patch

    def latent_factor(self, pipe: Any) -> int:
        """Pixels per side of a latent cell."""
        return latent_factor(pipe)

    # ------------------------------------------------------------------ latents
    def moments(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Mean and deviation of the autoencoder's output (batch, 2, channels, h, w) for pictures (batch, 3, H, W) in
        [-1, 1]."""
        from pipelines.diffusion import latents

        return latents.moments(pipe.vae, pixels)

    def scaled(self, pipe: Any, encoded: Tensor) -> Tensor:
        """The denoiser's latents (batch, channels, h, w) from the autoencoder's output."""
        from pipelines.diffusion import latents

        return latents.scaled(encoded, pipe.vae.config)

    def unscaled(self, pipe: Any, latents: Tensor) -> Tensor:
        """The autoencoder's input for decoding: the inverse of :meth:`scaled`."""
        from pipelines.diffusion import latents as plain

        return plain.unscaled(latents, pipe.vae.config)

    def drawn_size(self, pipe: Any, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of the picture that the pipeline draws if asked for this size."""
        return height, width

    def unpacked(self, pipe: Any, tokens: Tensor, height: int, width: int) -> Tensor:
        """Latents (batch, channels, h, w) of a picture of this size in pixels, from the pipeline's tokens (batch,
        tokens, channels)."""
        unpacked: Tensor = pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)
        return unpacked

    def decoded(self, pipe: Any, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, H, W) in [-1, 1] of the denoiser's latents (batch, channels, h, w)."""
        from pipelines.diffusion import latents as plain

        return plain.decoded(pipe.vae, self.unscaled(pipe, latents))

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments with which the pipeline calls its scheduler's ``set_timesteps``.

        Args:
            size: height and width of the picture in pixels.
        """
        usual: dict[str, Any] = {"num_inference_steps": steps}
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            step = self.pixel_step(pipe)
            usual["mu"] = shift(pipe.scheduler, (size[0] // step) * (size[1] // step))
        return usual

    def picture_arguments(self) -> dict[str, Any]:
        """Arguments with which a call of the pipeline alone makes pictures (of videos: one frame)."""
        return {"num_frames": 1, "output_type": "pil"} if self.video else {}

    def sound(self, pipe: Any, result: Any) -> tuple[Sound, ...]:
        """The sound of each video in the pipeline's result; empty if the model makes none."""
        return ()

    # ------------------------------------------------------------------ files
    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        """``file`` with diffusers' module names, if it has other programs' names for this family's modules.

        Raises:
            InputError: a name that the family does not have.
        """
        return file

    # ------------------------------------------------------------------ prompts
    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        """The prompt encoded by the pipeline, ``images`` times; with the negative prompt if ``guided``."""
        raise NotImplementedError

    def encode_seen(
        self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool, image: Any
    ) -> Encoding:
        """The same for a base that :meth:`edits`: the prompt read together with ``image``."""
        raise NotImplementedError

    def encoding(self, positive: Mapping[str, Any], negative: Mapping[str, Any], guided: bool) -> Encoding:
        """An :class:`Encoding` with the family's names; the negative half only if ``guided``."""
        return Encoding(positive, negative if guided else None, self.call_names, self.batch_axes)

    def tokens(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        """Text encoder -> token ids (batch, tokens), for the text encoders that can be trained.

        Raises:
            InputError: this family's text encoders cannot be trained here.
        """
        if not self.learning_encoders:
            raise InputError(f"Text encoders of {self.name} cannot be trained: set train_text_encoder to false.")
        return {name: token_ids(tokenizer_of(pipe, name), texts) for name in self.learning_encoders}

    def encode_tokens(self, pipe: Any, tokens: Mapping[str, Tensor], encoders: Mapping[str, Any]) -> Tensors:
        """Embeddings from ``tokens``; gradients flow into ``encoders``."""
        raise NotImplementedError

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        """Embeddings of prompts by the pipeline's own encoders, without gradients."""
        import torch

        encoders = {name: getattr(pipe, name) for name in self.learning_encoders}
        device = next(iter(encoders.values())).device
        with torch.no_grad():
            return self.encode_tokens(pipe, {k: v.to(device) for k, v in self.tokens(pipe, texts).items()}, encoders)

    def null_condition(self, pipe: Any, text: str = "") -> Tensors:
        """Embeddings (batch 1) that the pipeline uses as the null prompt in guidance."""
        return self.condition(pipe, [text])

    def too_long(self, pipe: Any, text: str) -> bool:
        """Whether the first text encoder cannot read all of ``text``."""
        tokenizer = pipe.tokenizer
        most = self.prompt_tokens or tokenizer.model_max_length
        found: bool = len(tokenizer(text, verbose=False).input_ids) > most
        return found

    def readers(self, pipe: Any) -> list[Reader]:
        """The text encoders, in the order of their parts in the denoiser's text sequence (those that share a part or
        only pool follow each other). Empty: prompts are encoded only by the pipeline."""
        return []

    def encode_tokenized(self, pipe: Any, tokens: Mapping[str, Tokenized]) -> Tensors:
        """Embeddings (batch 1) of a prompt tokenised for every reader (``tokens``: text encoder -> tokens)."""
        raise NotImplementedError

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        """The characters (from, to) of ``text`` that each token of the denoiser's text stands for; (0, 0) for tokens
        that belong to a template. Needed where a family has no readers.

        Raises:
            InputError: not known for this family.
        """
        raise InputError(f"Where a word of the prompt stands is not known for {self.title}: give every region a place.")

    def joined(self, encodings: Sequence[Encoding]) -> Joined:
        """The texts of several encodings one after another.

        Raises:
            InputError: regions cannot act inside the denoiser.
        """
        import torch

        if not self.inner_regions:
            raise InputError(
                f"Regions inside {self.title} are not possible{self.no_inner_regions}: use method 'output', with boxes "
                "or masks."
            )

        halves = [encoding.positive for encoding in encodings], [encoding.negative for encoding in encodings]
        given = [[half for half in side if half is not None] for side in halves]
        lengths = [[int(half[self.text_tensors[0]].shape[1]) for half in side] for side in given]
        common = [max(lengths_of) for lengths_of in zip(*(side for side in lengths if side), strict=True)]

        def cat(side: Sequence[Mapping[str, Tensor]]) -> Tensors:
            texts = {
                name: torch.cat([filled(half[name], length, 1) for half, length in zip(side, common, strict=True)], 1)
                for name in self.text_tensors
            }
            return {**side[0], **texts}

        positive, negative = given
        return Joined(self.encoding(cat(positive), cat(negative) if negative else {}, bool(negative)), tuple(common))

    @contextmanager
    def alone(self, pipe: Any, joined: Joined, images: int, run: Any) -> Iterator[None]:
        """Inside, each text of ``joined`` has the positions that it would have alone.

        Args:
            images: number of pictures.
            run: the :class:`~pipelines.diffusion.regions.joint.RegionalTransformer`.
        """
        yield

    # ------------------------------------------------------------------ denoiser
    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """The denoiser's prediction, shaped like ``noisy`` (batch, channels, height, width).

        Args:
            times: noise levels (batch,), in the units of the family's process.
            given: embeddings, and the size ("time_ids") or guidance ("guidance") if the denoiser takes them.
            guidance: for a denoiser that takes the guidance as a number.
        """
        raise NotImplementedError

    def passed(self, texts: Mapping[str, Any]) -> Mapping[str, Any]:
        """The denoiser's text arguments by their names in ``text_arguments``, from the encoded texts of a batch."""
        return texts

    def argument(self, kind: str, value: Any, given: Any) -> Any:
        """A text argument made by :meth:`passed` as the pipeline passes it, where it passed ``given``."""
        return value

    def repeat(self, name: str, value: Any, count: int, batch: int) -> Any:
        """The argument ``name`` of the denoiser, repeated ``count`` times if its first dimension is the batch."""
        if name in self.list_arguments:
            return list(value) * count
        return repeat(value, count, batch) if name in self.batch_arguments else value

    def most_together(self, pipe: Any) -> int | None:
        """Most predictions in one call of the denoiser; None = any number (the batch stays in front everywhere)."""
        return None

    # ------------------------------------------------------------------ tests
    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        """A miniature random pipeline of this family, created from configurations; ``changes`` are the denoiser's."""
        raise NotImplementedError


def joined_texts(
    encodings: Sequence[Encoding], texts: Callable[[Mapping[str, Any]], Sequence[Tensor]], multiple: int = 1
) -> tuple[list[Tensor], list[Tensor], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The texts of several encodings one after another: positive and negative half (one tensor per sample), and
    ``texts`` and ``own`` of :class:`Joined`.

    Args:
        texts: the texts of half an encoding, (tokens, width) per sample and without padding.
        multiple: texts are filled with zeros to a multiple of so many tokens.
    """
    import torch

    positive = [list(texts(one.positive)) for one in encodings]
    negative = [list(texts(one.negative)) for one in encodings if one.negative is not None]
    own = tuple(tuple(len(samples[0]) for samples in half) for half in (positive, negative) if half)
    common = tuple(-(-max(lengths) // multiple) * multiple for lengths in zip(*own, strict=True))

    def cat(half: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        full = [[filled(sample, length, 0) for sample in samples] for samples, length in zip(half, common, strict=True)]
        return [torch.cat(parts) for parts in zip(*full, strict=True)]

    return cat(positive), cat(negative) if negative else [], common, own


def places_before(joined: Joined, half: int, seen: Sequence[bool] = ()) -> tuple[Tensor, int]:
    """Positions of all tokens of ``joined`` so that every text ends one before the image, as it does alone, and the
    image's position: the length of the longest text. Tokens that only the other half has stand at the image's.

    Args:
        half: 0 for the positive half, 1 for the negative.
        seen: the texts that count for the image's position (default: all).
    """
    import torch

    lengths = joined.own[min(half, len(joined.own) - 1)]
    image = max(length for number, length in enumerate(lengths) if not seen or seen[number])
    places = [
        (torch.arange(common) + image - own).clamp(0, image) for own, common in zip(lengths, joined.texts, strict=True)
    ]
    return torch.cat(places), image


def spans_in(
    tokenizer: Any, written: str, text: str, length: int, dropped: int = 0, special: bool = True
) -> list[tuple[int, int]]:
    """The characters of ``text`` that each token of ``written`` stands for, which holds it once; see
    :meth:`Family.text_spans`.

    Args:
        length: tokens that the encoder reads.
        dropped: of them, those at the beginning that the denoiser does not get.
        special: the tokenizer adds its special tokens.
    """
    begin = written.rindex(text)
    found = tokenizer(
        written, truncation=True, max_length=length, return_offsets_mapping=True, add_special_tokens=special
    ).offset_mapping
    inside = [(max(first - begin, 0), min(last - begin, len(text))) for first, last in found[dropped:]]
    return [(first, last) if first < last else (0, 0) for first, last in inside]


def repeat(value: Any, count: int, batch: int) -> Any:
    """``value`` with every tensor whose first dimension is ``batch`` repeated ``count`` times."""
    import torch

    if count == 1:
        return value
    if isinstance(value, torch.Tensor):
        return value.repeat(count, *[1] * (value.ndim - 1)) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {key: repeat(item, count, batch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(repeat(item, count, batch) for item in value)
    return value


def shift(scheduler: Any, tokens: int) -> float:
    """The shift mu of a flow-matching scheduler, linear in the number of picture tokens.

    Its purpose is in Esser et al. 2024, section 5.3.2; the line is that of diffusers' pipelines.
    """
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return float(tokens * slope + low - slope * few)


def even_sigmas(steps: int) -> list[float]:
    """Noise levels from 1 to 1 / steps in equal steps, which many pipelines give to their scheduler to be shifted."""
    return [1 - k / steps for k in range(steps)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` (batch, tokens, ...) as one batch; shorter ones are filled with zeros, which masks leave out."""
    import torch

    longest = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
    return torch.cat([filled(part, longest, 1) for part in parts])


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` (tokens, ...) without batch as one batch, filled as by :func:`joined`."""
    import torch

    longest = max(part.shape[0] for part in parts) if parts[0].ndim else 0
    return torch.stack([filled(part, longest, 0) for part in parts])


def filled(tensor: Tensor, length: int, axis: int) -> Tensor:
    """``tensor`` with zeros (False) at the end of ``axis`` up to ``length``."""
    import torch

    if tensor.ndim <= axis or tensor.shape[axis] >= length:
        return tensor
    shape = [*tensor.shape]
    shape[axis] = length - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


FEW_STEPS = re.compile(r"(?<![a-z])(turbo|lightning|hyper|lcm|dmd2?|schnell)(?![a-z])")
"""Words in the names of bases that are distilled to few steps without guidance."""


def few_steps(name: str) -> int | None:
    """Steps of a base that is distilled to few: the number in its name ("8step"), else 4; None for others."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    if not FEW_STEPS.search(last):
        return None
    count = re.search(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])", last)
    return int(count[1]) if count else 4


def within(size: tuple[int, int], area: int, step: int) -> tuple[int, int]:
    """Height and width shrunk to at most ``area`` pixels and cut to multiples of ``step``."""
    height, width = size
    scale = min(1.0, (area / (height * width)) ** 0.5)
    return max(step, int(height * scale) // step * step), max(step, int(width * scale) // step * step)


def latent_factor(pipe: Any) -> int:
    """Pixels per side of a latent cell."""
    sizes = pipe.vae.config.get("block_out_channels")
    if not sizes:  # a video autoencoder
        factor: int = pipe.vae_scale_factor
        return factor
    return 1 << (len(sizes) - 1)


def tokenizer_of(pipe: Any, encoder: str) -> Any:
    """The tokenizer of a text encoder."""
    return getattr(pipe, encoder.replace("text_encoder", "tokenizer"))


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (batch, tokens) of ``texts``, padded or truncated to the encoder's length."""
    ids: torch.Tensor = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def t5_length(tokenizer: Any, usual: int) -> int:
    """Number of T5 tokens: ``usual``, or the tokenizer's maximum if smaller; ``tokenizer`` may be None."""
    return min(usual, tokenizer.model_max_length) if tokenizer is not None else usual
