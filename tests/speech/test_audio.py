"""Sound files."""

import wave

import pytest

from adapters.errors import InputError
from pipelines.speech import audio


def test_a_playlist_opens_no_other_file(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(b"\x00\x10" * 16_000)
    assert len(audio.read(tmp_path / "a.wav").samples) == 16_000
    for name in ("list.ffconcat", "list.wav"):
        (tmp_path / name).write_text("ffconcat version 1.0\nfile a.wav\n")
        with pytest.raises(InputError, match="cannot be read"):
            audio.read(tmp_path / name)
