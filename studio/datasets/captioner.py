"""Writes captions with the user's own model: a folder with any image-to-text model of Transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.pictures import open_picture
from studio.datasets.captions import one_line

if TYPE_CHECKING:
    from PIL import Image

SILENT = Silent()
INSTRUCTION = "Describe this picture in one sentence."
"""The default prompt for chat models."""


class Captioner:
    """Writes captions with the model in ``folder`` (BLIP, GIT, vision-encoder-decoder, Qwen-VL and the like).

    Nothing is downloaded and no code of the folder is run.

    Args:
        prompt: what a chat model is asked, or how the captions of other models begin; "" = the default.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        longest: maximum length of a caption in tokens.

    Raises:
        InputError: the folder does not exist, or holds no image-to-text model.
    """

    def __init__(self, folder: str | Path, prompt: str = "", device: str = "auto", longest: int = 60) -> None:
        from transformers import AutoModelForImageTextToText

        from studio import devices

        place = Path(folder).expanduser()
        if not (place / "config.json").is_file():
            raise InputError(
                f"'{place}' holds no image-to-text model: name a folder with config.json, weights and the processor's "
                "files, as written by Transformers' save_pretrained."
            )
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
            self._processor = _processor(place)
        except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
            raise InputError(
                f"The model in '{place}' does not turn pictures into text: {one_line(str(error))}"
            ) from None
        self._model = model.eval().to(devices.resolve(device))
        self.prompt, self.longest = prompt, longest

    def captions(self, pictures: Sequence[Path], monitor: Monitor = SILENT) -> Iterator[str]:
        """One caption per picture file, one after the other.

        Raises:
            InputError: a picture cannot be read, or the model writes nothing.
            adapters.errors.Cancelled: stopped by the monitor.
        """
        for number, picture in enumerate(pictures, 1):
            check(monitor)
            yield self._caption(open_picture(picture))
            monitor.report(Progress("captioning", number, len(pictures)))

    def _caption(self, picture: Image.Image) -> str:
        import torch

        inputs, start = self._inputs(picture)
        with torch.inference_mode():
            made = self._model.generate(**inputs, max_new_tokens=self.longest, do_sample=False)
        text = one_line(self._processor.batch_decode(made[:, start:], skip_special_tokens=True)[0])
        if not text:
            raise InputError("The model wrote an empty caption: give another prompt, or another model.")
        return text

    def _inputs(self, picture: Image.Image) -> tuple[Any, int]:
        """The model's inputs, and the position in its output at which the answer begins."""
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image", "image": picture}, {"type": "text", "text": self.prompt or INSTRUCTION}]
            made = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            return made.to(self._model.device, self._model.dtype), made["input_ids"].shape[1]
        text = {"text": self.prompt} if self.prompt else {}
        return self._processor(images=picture, return_tensors="pt", **text).to(self._model.device, self._model.dtype), 0


def _processor(folder: Path) -> Any:
    import transformers

    def load(name: str) -> Any:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    found = load("AutoProcessor")
    return found if hasattr(found, "image_processor") else _Pair(load("AutoImageProcessor"), load("AutoTokenizer"))


class _Pair:
    """Image processor and tokenizer that were saved separately (vision-encoder-decoder models)."""

    chat_template = None

    def __init__(self, images: Any, words: Any) -> None:
        self._images, self.batch_decode = images, words.batch_decode

    def __call__(self, images: Any, return_tensors: str, text: str = "") -> Any:
        if text:
            raise InputError("This model takes no prompt: leave it empty.")
        return self._images(images, return_tensors=return_tensors)
