"""Sound from files, error rates, transcripts a Whisper with adapters, CTranslate2's files, the command."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import studio
from adapters.errors import FamilyError, InputError
from adapters.progress import Cancelled, Silent
from pipelines.speech import audio, ctranslate2, scores, transcript
from pipelines.speech.adapters import AdaptedSpeech
from pipelines.speech.loading import open_model
from pipelines.speech.transcribe import features_of, pieces, said, transcribe
from pipelines.speech.transcript import FORMATS, Segment, Transcript
from studio import jobs, library
from studio.cli.app import run as cli
from studio.library import scan, whisper_tiny
from tests.speech import tiny

# ---------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("ending", "codec"), [("wav", "pcm_f32le"), ("flac", "flac"), ("mp3", "mp3"), ("m4a", "aac"), ("webm", "libopus")]
)
def test_sound_of_any_format_becomes_one_channel_at_16_khz(ending, codec, tmp_path):
    av = pytest.importorskip("av")
    rate, file = 48_000, tmp_path / f"tone.{ending}"
    both = np.stack([tiny.tone(1.0, 440, rate), tiny.tone(1.0, 440, rate)], 1)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(both.reshape(1, -1), format="flt", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    found = audio.read(file)
    assert found.samples.dtype == np.float32
    assert found.seconds == pytest.approx(1.0, abs=0.1)
    spectrum = np.abs(np.fft.rfft(found.samples))
    assert np.fft.rfftfreq(len(found.samples), 1 / audio.RATE)[spectrum.argmax()] == pytest.approx(440, abs=3)
    assert "resampled from 48,000" in found.remarks[0]
    assert "2 channels" in found.remarks[1]
    assert np.array_equal(audio.read(file.read_bytes()).samples, found.samples)


def test_what_is_no_sound_is_refused(tmp_path):
    text = tmp_path / "notes.wav"
    text.write_text("this is not sound")
    for place, sentence in ((tmp_path / "none.wav", "no sound file"), (text, "cannot be read"),
                            (tiny.write_wav(tmp_path / "e.wav", np.zeros(0)), "is empty")):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            audio.read(place)
    with pytest.raises(InputError, match="not finite"):
        audio.of_array(np.array([0.1, np.nan]), audio.RATE)
    with pytest.raises(InputError, match="is an array"):
        audio.of_array(np.zeros((2, 2, 2)), audio.RATE)


def test_arrays_are_resampled_and_mixed_too():
    found = audio.of_array((np.stack([tiny.tone(1, 440, 8000)] * 2, 1) * 32767).astype(np.int16), 8000)
    assert found.seconds == pytest.approx(1.0, abs=0.01)
    assert float(np.abs(found.samples).max()) == pytest.approx(0.5, abs=0.02)
    assert len(found.remarks) == 2


def test_long_sound_is_cut_where_it_is_quiet():
    sound = tiny.tone(5.0)
    sound[int(1.8 * audio.RATE) : int(2.0 * audio.RATE)] = 0
    cuts = pieces(sound, 2.0)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == len(sound)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(cuts))
    assert all(end - start <= 2 * audio.RATE for start, end in cuts)
    assert 1.8 < cuts[0][1] / audio.RATE < 2.0


# ---------------------------------------------------------------- transcripts and errors


def test_forms_of_a_transcript():
    found = Transcript((Segment(0.0, 1.5, " one & two"), Segment(3661.25, 3662.0004, " <three>")), 3700.0)
    assert found.text == "one & two <three>"
    assert FORMATS["text"](found) == "one & two\n<three>\n"
    assert "1\n00:00:00,000 --> 00:00:01,500\none & two\n\n2\n01:01:01,250 --> 01:01:02,000\n<three>" in (
        FORMATS["srt"](found)
    )
    assert FORMATS["vtt"](found).startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.500\none &amp; two\n")
    assert json.loads(FORMATS["json"](found))["segments"][1] == {"start": 3661.25, "end": 3662.0, "text": "<three>"}


def test_error_rates_are_counted_by_hand():
    pytest.importorskip("jiwer")
    found = scores.score(["The cat, sat.", "Number two"], ["the cat sat down", "number 2"])
    assert found.wer == pytest.approx(1 / 5)  # one word inserted, five in the references
    assert found.cer == pytest.approx(5 / (11 + 8))
    looping = scores.score(["a b"], ["a b " * 40])
    assert looping.cer > 1
    assert looping.capped_cer == 1
    assert looping.loops == 1
    assert not transcript.loops("an ordinary sentence of some length")
    chinese = scores.score(["你 好，世界"], ["你好世间"], "zh")
    assert chinese.cer == chinese.wer == pytest.approx(1 / 4)
    wrong = (([], [], "cannot be compared"), (["a"], ["a", "b"], "cannot be compared"), (["!"], ["a"], "no word"))
    for wanted, heard, sentence in wrong:
        with pytest.raises(InputError, match=sentence):
            scores.score(wanted, heard)


# ---------------------------------------------------------------- a Whisper


def test_a_short_sound_is_written_down_the_same_alone_and_in_a_batch(whisper):
    base = open_model(whisper)
    assert base.window == tiny.WINDOW
    sounds = [tiny.tone(1.0, 300), tiny.tone(2.0, 900)]
    assert said(base, base.model, sounds) == [said(base, base.model, [one])[0] for one in sounds]
    with pytest.raises(InputError, match="do not fit the window"):
        said(base, base.model, [tiny.tone(2.5)])


def test_long_sound_has_times_in_order_and_can_be_stopped(whisper):
    base = open_model(whisper)
    sound = audio.of_array(tiny.tone(5.0), audio.RATE)
    for times in (True, False):
        found = transcribe(base, base.model, sound, times=times)
        starts = [one.start for one in found.segments]
        assert starts == sorted(starts)
        assert all(0 <= one.start <= one.end <= 5.0 for one in found.segments)

    class Stopping(Silent):
        def cancelled(self) -> bool:
            return True

    for times in (True, False):
        with pytest.raises(Cancelled):
            transcribe(base, base.model, sound, times=times, monitor=Stopping())


def test_languages_and_tasks(whisper, multilingual):
    english, many = open_model(whisper), open_model(multilingual)
    ids = many.tokenizer.convert_tokens_to_ids
    assert english.prefix() == ids_of(english, "<|startoftranscript|>", "<|notimestamps|>")
    assert many.prefix("french", "translate") == ids_of(
        many, "<|startoftranscript|>", "<|fr|>", "<|translate|>", "<|notimestamps|>"
    )
    assert ids("<|fr|>") != ids("<|en|>")
    sound = audio.of_array(tiny.tone(1.0), audio.RATE)
    assert transcribe(many, many.model, sound, "fr", times=False).language == "fr"
    for asked, sentence in ((("de",), "knows English only"), (("", "translate"), "knows English only"),
                            (("en", "sing"), "transcribe or translate")):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            transcribe(english, english.model, sound, *asked)
    with pytest.raises(InputError, match="it knows en, fr"):
        transcribe(many, many.model, sound, "klingon")


def ids_of(base, *tokens):
    return base.tokenizer.convert_tokens_to_ids(list(tokens))


def test_a_window_can_be_shorter(whisper):
    base = open_model(whisper, window=1)
    assert features_of(base, [tiny.tone(0.5)])["input_features"].shape[-1] == 100
    assert isinstance(said(base, base.model, [tiny.tone(0.5)])[0], str)
    for window in (0, 3, 1.5):
        with pytest.raises(InputError, match="whole seconds from 1 to 2"):
            open_model(whisper, window=window)


def test_other_models_are_refused(tmp_path, whisper):
    from tests.language import tiny as language

    llama = language.llama(tmp_path / "llama")
    with pytest.raises(FamilyError, match="is a llama model"):
        open_model(llama)
    with pytest.raises(InputError, match="does not write down speech"):
        library.resolve_speech(llama)
    with pytest.raises(InputError, match="does not write down speech"):
        library.resolve_speech("smollm2")
    with pytest.raises(InputError, match="is a speech model"):
        library.resolve_language(whisper)
    with pytest.raises(InputError, match="is a speech model"):
        library.resolve_pipeline(whisper)
    record = scan.record(whisper, "base")
    assert (record.family, record.problem) == ("speech", "")


@pytest.fixture
def adapter(whisper, tmp_path) -> tuple[Path, torch.Tensor]:
    """A random LoRA as PEFT writes it, and the logits that PEFT computes with it."""
    base = open_model(whisper)
    wrapped = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj", "out_proj", "fc2"]))
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "voice")
    return tmp_path / "voice", logits(base, wrapped)


def logits(base, model) -> torch.Tensor:
    given = features_of(base, [tiny.tone(1.0)])["input_features"]
    with torch.no_grad():
        return model.eval()(input_features=given, decoder_input_ids=torch.tensor([base.prefix()])).logits


def test_adapters_of_peft_act_beside_the_model_as_in_peft(whisper, adapter):
    place, expected = adapter
    base = open_model(whisper)
    plain = logits(base, base.model)
    model = AdaptedSpeech(base)
    model.add("voice", place)
    with model.active({"voice": 1.0}) as adapted:
        torch.testing.assert_close(logits(base, adapted), expected, rtol=1e-4, atol=1e-5)
    with model.active({"voice": 0.0}) as adapted:
        assert torch.equal(logits(base, adapted), plain)
    assert scan.record(place, "adapter").family == "speech"
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(FamilyError, match="not for writing down speech"):
        AdaptedSpeech(base).add("voice", place)


# ---------------------------------------------------------------- CTranslate2


def written(folder: Path, whisper: Path, **changes) -> Path:
    """The tiny Whisper as CTranslate2 stores one, by its own names."""
    state = {name: value for name, value in open_model(whisper).model.state_dict().items() if name != "proj_out.weight"}
    found: dict[str, torch.Tensor] = {f"{stack}/num_heads": torch.tensor(2, dtype=torch.int16)
                                      for stack in ("encoder", "decoder")}  # fmt: skip

    def take(name):
        return state[f"model.{name}"]

    for stack in ("encoder", "decoder"):
        names = {"layer_norm": "layer_norm"} | ({"conv1": "conv1", "conv2": "conv2"} if stack == "encoder" else {})
        for name in names:
            for kind, theirs in (("weight", "gamma"), ("bias", "beta")):
                found[f"{stack}/{name}/{theirs if name == 'layer_norm' else kind}"] = take(f"{stack}.{name}.{kind}")
        found[f"{stack}/position_encodings/encodings"] = take(f"{stack}.embed_positions.weight")
        for n in range(2):
            here, there = f"{stack}.layers.{n}", f"{stack}/layer_{n}"
            parts = {"self_attn": "self_attention"} | ({"encoder_attn": "attention"} if stack == "decoder" else {})
            norms = {**{f"{name}_layer_norm": f"{theirs}/layer_norm" for name, theirs in parts.items()},
                     "final_layer_norm": "ffn/layer_norm"}  # fmt: skip
            for name, theirs in norms.items():
                found[f"{there}/{theirs}/gamma"] = take(f"{here}.{name}.weight")
                found[f"{there}/{theirs}/beta"] = take(f"{here}.{name}.bias")
            for number, name in enumerate(("fc1", "fc2")):
                for kind in ("weight", "bias"):
                    found[f"{there}/ffn/linear_{number}/{kind}"] = take(f"{here}.{name}.{kind}")
            for name, theirs in parts.items():
                q, k, v, o = (take(f"{here}.{name}.{one}_proj.weight") for one in ("q", "k", "v", "out"))
                bq, bv, bo = (take(f"{here}.{name}.{one}_proj.bias") for one in ("q", "v", "out"))
                zero = torch.zeros_like(bq)
                joined = ([(q, k, v), (o,)], [(bq, zero, bv), (bo,)]) if theirs == "self_attention" else (
                    [(q,), (k, v), (o,)], [(bq,), (zero, bv), (bo,)]
                )  # fmt: skip
                for number, (weights, biases) in enumerate(zip(*joined, strict=True)):
                    found[f"{there}/{theirs}/linear_{number}/weight"] = torch.cat(weights)
                    found[f"{there}/{theirs}/linear_{number}/bias"] = torch.cat(biases)
    found["decoder/embeddings/weight"] = take("decoder.embed_tokens.weight")
    kinds = {torch.float32: 0, torch.int16: 2, torch.float16: 4}

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    data = struct.pack("<I", changes.get("version", 6)) + text("WhisperSpec") + struct.pack("<II", 3, len(found))
    for name, tensor in found.items():
        content = tensor.numpy().tobytes()
        data += text(name) + struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        data += struct.pack("<BI", kinds[tensor.dtype], len(content)) + content
    folder.mkdir()
    (folder / "model.bin").write_bytes(data + struct.pack("<I", 0))
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [1, 2], "suppress_ids_begin": [3]}))
    (folder / "tokenizer.json").write_text((whisper / "tokenizer.json").read_text())
    return folder


def test_a_model_of_ctranslate2_becomes_the_same_whisper(whisper, tmp_path):
    ctranslate2.convert(written(tmp_path / "ct2", whisper), tmp_path / "converted")
    base, again = open_model(whisper), open_model(tmp_path / "converted")
    assert torch.equal(logits(base, base.model), logits(again, again.model))
    assert again.model.generation_config.suppress_tokens == [1, 2]
    with pytest.raises(InputError, match="only version 6"):
        ctranslate2.read(written(tmp_path / "old", whisper, version=3) / "model.bin")
    (tmp_path / "old" / "model.bin").write_bytes((tmp_path / "ct2" / "model.bin").read_bytes()[:-1000])
    with pytest.raises(InputError, match="or is damaged"):
        ctranslate2.read(tmp_path / "old" / "model.bin")


# ---------------------------------------------------------------- job, command, Python


def test_the_command_writes_every_form_and_compares(whisper, adapter, tmp_path, capsys):
    sound = tiny.write_wav(tmp_path / "talk.wav", tiny.tone(1.0))
    asked = ["transcribe", str(sound), "--base", str(whisper), "--adapter", f"{adapter[0]}:0.5", "--compare",
             "--no-times", "--reference", "one two", "--json", "--quiet"]  # fmt: skip
    assert cli(asked) == 0
    found = json.loads(capsys.readouterr().out)
    base, other = found["transcripts"]
    assert (base["variant"], other["adapters"]) == ("base", [[str(adapter[0]), 0.5]])
    assert base["score"]["wer"] > 0
    assert base["text"] != other["text"]
    assert [Path(file).is_file() for file in base["files"].values()] == [True] * 4
    heard = studio.transcribe(sound, adapter[0].as_posix() + ":0.5", base=whisper, times=False)
    assert heard.text == other["text"]
    assert studio.transcribe((tiny.tone(1.0), audio.RATE), base=whisper, times=False).text == base["text"]
    written_to = ["--no-times", "-q", "-o", str(tmp_path / "t.srt")]
    assert cli(["transcribe", str(sound), "--base", str(whisper), *written_to]) == 0
    assert (tmp_path / "t.srt").read_text().startswith("1\n00:00:00,000 --> ")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [(["--format", "doc"], "--format is text"), (["--out", "x.doc"], "must end in"),
     (["--adapter", "nobody"], "no adapter"), (["--base", "smollm2"], "does not write down speech"),
     (["--task", "sing"], "task"), (["--window", "31"], "window")],
)  # fmt: skip
def test_wrong_words_are_refused_before_a_job_is_made(more, sentence, tmp_path, capsys):
    before = len(jobs.list())
    sound = tiny.write_wav(tmp_path / "talk.wav", tiny.tone(0.1))
    assert cli(["transcribe", str(sound), *more]) == 2
    assert sentence in capsys.readouterr().err
    assert cli(["transcribe", str(tmp_path / "none.wav")]) == 2
    assert "no sound file" in capsys.readouterr().err
    assert len(jobs.list()) == before


@pytest.mark.slow
def test_the_real_model_writes_down_real_speech(tmp_path, monkeypatch):
    """Whisper tiny.en from its package, or a network for pip; a prompt of Debian's asterisk-core-sounds-en-wav."""
    place = Path("/usr/share/asterisk/sounds/en_US_f_Allison/demo-congrats.wav")
    if not place.is_file():
        pytest.skip("asterisk-core-sounds-en-wav is not installed")
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    base = open_model(whisper_tiny.PACKAGED.prepare())
    assert "successfully installed" in transcribe(base, base.model, audio.read(place)).text
