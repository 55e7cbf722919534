"""The commands as a person types them: results, exit codes and sentences."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from adapters.formats.header import read_header
from studio import jobs, library
from studio.cli.app import run
from tests.studio.files import diffusers_lora, peft_lora
from tests.studio.waiting import ended, reached, until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ask(capsys):
    """Run a command; returns (exit code, stdout, stderr)."""

    def ask(*arguments: object) -> tuple[int, str, str]:
        code = run([str(word) for word in arguments])
        return code, *capsys.readouterr()

    return ask


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compse"], "No such command 'compse'"),
        (["jobs", "lst"], "Did you mean 'list'?"),
        (["compose", "--stps", "3"], "No such option: --stps"),
        (
            ["compose", "--steps", "many"],
            "steps: Input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        (["compose", "--steps", "0"], "steps: Input should be greater than or equal to 1, got 0"),
        (["compose", "--scheduler", "ddmi"], "scheduler: Input should be 'default', 'ddim'"),
        (["compose", "--lora", "a@1-0"], "must rise and be between 0 and 1"),
        (["compose", "--lora", "x=a", "--lora", "x=b"], "adapter names must differ, given twice: x"),
        (["compose", "nothing.yaml"], "Configuration file 'nothing.yaml' does not exist."),
        (["compose", "--from", "nothing.png"], "'nothing.png' does not exist."),
        (["compose", "--set", "steps"], "--set needs key=value, got 'steps'."),
        (["compose", "--set", "adapters.3.weight=1"], "--set adapters.3.weight: there is no such place"),
        (["compose", "--set", "stesp=3"], "unknown key 'stesp' (did you mean 'steps'?)"),
        (["compose", "--detach", "--out", "x.png"], "--out and --detach exclude each other"),
        (["compose", "--prompt", "x", "--out", "x.gif"], "pictures are written as .png"),
        (["train", "image"], "train image: data: Field required"),
        (["train", "image", "--data", "x", "--resume"], "--resume needs --folder"),
        (["train", "image", "--preset", "concpt"], "did you mean 'concept'?"),
        (["methods", "--stage", "compos"], "There is no stage 'compos' (did you mean 'compose'?)"),
        (["compose"], "There is nothing to draw: add --prompt"),
        (["compose", "--lora", "fox", "--detach"], "There is nothing to draw: add --prompt"),
        *(
            (["compose", "--prompt", "x", "--lora", f"fox:{bad}"], f"--lora 'fox:{bad}': the weight after ':' must be")
            for bad in ("nan", "inf", "-inf", "NaN")
        ),
        (["compose", "a fox"], "give the words of a picture with --prompt"),
        (["compose", "--prompt", "x", "--base", "smollm2"], "'smollm2' is a language model"),
        (["compose", "--prompt", "x", "--method", "swich"], "did you mean 'switch'?"),
        (
            ["compose", "--prompt", "x", "--plan", "--base", "tinymoji", "--family", "sdxl"],
            "of the family sd, not sdxl",
        ),
        (["ui", "--host", "0.0.0.0"], "give a password too (--password)"),
        (["library", "show", "nobody"], "There is no adapter 'nobody' in the library"),
        (["library", "import", "nobody.safetensors"], "neither a file, a folder nor a hub id"),
        (["library", "restore", "nobody"], "There is no 'nobody' in the trash"),
        (["jobs", "show", "nothing"], "There is no job 'nothing'"),
        (["jobs", "cancel", "last"], "There are no jobs yet."),
        (["jobs", "list", "--status", "runing"], "There is no status 'runing' (did you mean 'running'?)"),
        (["settings", "--set", "queue=x"], "unknown key 'queue' (did you mean 'queue_url'?)"),
        (["lora", "convert", "nobody", "--out", "x.safetensors"], "There is no adapter 'nobody'"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(ask, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = ask(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("studio: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_errors_for_machines(ask):
    code, out, _ = ask("jobs", "show", "nothing", "--json")
    assert code == 2
    assert "There is no job" in json.loads(out)["error"]


def test_version(ask):
    code, out, _ = ask("--version")
    assert (code, out.split()[0]) == (0, "adapter-studio")


def test_methods_are_the_catalogue(ask):
    from adapters import catalogue

    code, out, _ = ask("methods", "--json")
    assert code == 0
    assert [entry["name"] for entry in json.loads(out)] == [method.name for method in catalogue.methods()]
    assert "composite" in ask("methods", "--stage", "compose")[1]


def test_library_from_import_to_restore(ask, tmp_path):
    diffusers_lora(tmp_path / "cat.safetensors")
    assert "Imported 'kitten' (sd)" in ask("library", "import", tmp_path / "cat.safetensors", "--name", "kitten")[1]
    assert "kitten" in ask("library", "list")[1]
    (entry,) = [entry for entry in json.loads(ask("library", "list", "--json")[1]) if entry["source"] == "library"]
    assert (entry["name"], entry["rank"]) == ("kitten", 4)
    assert library.show("kitten").sha256 in ask("library", "show", "kitten")[1]
    assert ask("library", "rename", "kitten", "lion")[0] == 0
    assert "brings it back" in ask("library", "delete", "lion")[1]
    assert "lion" in ask("library", "trash")[1]
    assert ask("library", "restore", "lion")[0] == 0
    (tmp_path / "home" / "library" / "adapters" / "odd.safetensors").write_text("odd")
    report = json.loads(ask("library", "scan", "--json")[1])
    assert [Path(entry["path"]).name for entry in report["unreadable"]] == ["odd.safetensors"]


def test_settings_are_shown_and_changed(ask, home):
    assert str(home) in json.loads(ask("settings", "--json")[1])["home"]
    code, _, err = ask("settings", "--set", "worker_idle_minutes=5")
    assert code == 0
    assert "Written to" in err
    assert json.loads(ask("settings", "--json")[1])["worker_idle_minutes"] == 5


def test_jobs_from_list_to_delete(ask):
    first = jobs.submit("count", {"to": 2})
    assert first in ask("jobs", "list")[1]
    jobs.ensure_worker()
    code, out, err = ask("jobs", "watch", first)
    assert code == 0
    assert f"Job {first} is done." in out
    assert "counting 2/2" in err
    assert "to: 2" in ask("jobs", "show", first)[1]
    assert "done" in ask("jobs", "log", first)[1]
    (again,) = json.loads(ask("jobs", "rerun", first, "--json")[1])
    assert ended(again["job"])[0].status == "done"
    assert ask("jobs", "delete", first, again["job"])[1] == "Deleted 2 job(s).\n"
    code, out, err = ask("jobs", "list")
    assert (code, out) == (0, "")
    assert "No jobs yet" in err


def test_cancel_and_resume(ask):
    job = jobs.submit("count", {"to": 200, "pause": 0.02})
    jobs.ensure_worker()
    reached(job, 2)
    assert "cancelling" in ask("jobs", "cancel", job)[1]
    ended(job)
    code, out, _ = ask("jobs", "resume", job, "--here", "--quiet")
    assert (code, out) == (0, f"Job {job} is done.\n")
    assert jobs.get(job).result["from"] >= 2


def test_watching_a_failed_job_fails(ask):
    job = jobs.submit("count", {"fail_at": 0})
    jobs.ensure_worker()
    code, out, _ = ask("jobs", "watch", job)
    assert code == 1
    assert "not liked" in out


@pytest.mark.parametrize(
    ("asks", "status"), [("SIGINT", "cancelled"), ("SIGTERM", "interrupted"), ("SIGUSR1", "interrupted")]
)
def test_signals_stop_where_it_can_and_say_how_to_go_on(home, asks, status):
    """Ctrl-C, and what schedulers and shutdowns send."""
    program = "from studio.cli import main; main()"
    slow = jobs.submit("count", {"to": 500, "pause": 0.02})
    jobs.cancel(slow)
    asked = subprocess.Popen(
        [sys.executable, "-c", program, "jobs", "resume", slow, "--here"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    reached(slow, 2)
    asked.send_signal(getattr(signal, asks))
    _, err = asked.communicate(timeout=120)
    assert asked.returncode == 130
    assert f"studio jobs resume {slow}" in err
    assert jobs.get(slow).status == status


def test_a_worker_in_the_terminal(home):
    job = jobs.submit("count", {"to": 2})
    worker = subprocess.Popen(
        [sys.executable, "-c", "from studio.cli import main; main()", "worker", "--queue", "cpu"], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert ended(job)[0].status == "done"
    finally:
        worker.send_signal(signal.SIGINT)
        assert worker.wait(120) == 0


def test_detached_jobs_are_queued(ask, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    asked = ["compose", "--prompt", "x", "--device", "cpu", "--detach", "--json", "--base"]
    code, out, err = ask(*asked, tmp_path / "base")
    answer = json.loads(out)
    assert (code, answer["status"]) == (0, "queued")
    assert "studio jobs watch" in err
    (job,) = ended(answer["job"])
    assert job.status == "failed"
    assert "could not be opened" in job.error
    assert ask(*asked, "nothing")[0] == 2
    assert ask(*asked, tmp_path / "base", "--lora", "nobody")[0] == 2
    assert len(jobs.list()) == 1


@pytest.mark.skipif(os.name != "posix", reason="/dev/full is Linux's")
def test_a_full_disk_is_one_sentence():
    from studio import error_sentences

    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "w") as full:
        full.write("x" * 10_000_000)
    assert error_sentences.sentence(caught.value).startswith("The disk is full")


def test_a_taken_port_is_one_sentence(ask):
    pytest.importorskip("ui.app")
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = ask("ui", "--port", taken.getsockname()[1])
    assert code == 2
    assert "port" in err.lower()


class TestWithAModel:
    """Composition, conversion and merging on a tiny random model."""

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory) -> Path:
        from tests import tiny

        folder = tmp_path_factory.mktemp("model")
        tiny.saved("sd", folder)
        for seed, name in ((1, "cat"), (2, "dog")):
            tiny.lora_file(tiny.sd(), folder, seed=seed).rename(folder / f"{name}.safetensors")
        return folder

    @pytest.fixture
    def common(self, model) -> list[object]:
        return [
            "compose",
            "--base",
            model / "tiny-sd-0",
            "--steps",
            2,
            "--device",
            "cpu",
            "--prompt",
            "a cat",
            "--lora",
            f"{model / 'cat.safetensors'}:0.8",
            "--lora",
            f"second={model / 'dog.safetensors'}@0-0.5",
        ]

    def test_compose_repeat_and_change(self, ask, common, model, tmp_path):
        code, out, _ = ask(*common, "--method", "composite", "--images", 2, "--out", tmp_path / "p.png")
        assert (code, out.split()) == (0, [str(tmp_path / "p-0.png"), str(tmp_path / "p-1.png")])
        code, out, _ = ask("compose", "--from", tmp_path / "p-1.png", "--out", tmp_path / "again.png", "--json")
        assert code == 0
        assert json.loads(out)["method"] == "composite"
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "p-1.png").read_bytes()
        changed = ["--set", "adapters.0.weight=0", "--seed", 7, "--out", tmp_path / "other"]
        assert ask("compose", "--from", tmp_path / "p-1.png", *changed)[0] == 0
        with Image.open(tmp_path / "other" / "picture-7.png") as picture:
            assert json.loads(picture.text["adapter-studio"])["config"]["adapters"][0]["weight"] == 0

    def test_from_refuses_another_adapter(self, ask, common, model, tmp_path):
        copy = tmp_path / "cat.safetensors"
        copy.write_bytes((model / "cat.safetensors").read_bytes())
        given = [*common[:-4], "--lora", copy, "--out", tmp_path / "p.png"]
        assert ask(*given)[0] == 0
        copy.write_bytes((model / "dog.safetensors").read_bytes())
        code, _, err = ask("compose", "--from", tmp_path / "p.png")
        assert code == 2
        assert "is a different file" in err
        assert ask("compose", "--from", tmp_path / "p.png", "--set", "adapters.0.weight=2")[0] == 2
        assert ask("compose", "--from", tmp_path / "p.png", "--lora", copy, "--out", tmp_path / "q.png")[0] == 0

    def test_plan(self, ask, common):
        code, out, _ = ask(*common, "--plan", "--json")
        plan = json.loads(out)
        assert (code, plan["adapters"], plan["steps"]) == (0, ["cat", "second"], 2)
        assert "second" in ask(*common, "--dry-run")[1]
        assert jobs.list() == []

    def test_yaml_and_flags_are_the_same(self, ask, common, model, tmp_path):
        ask(*common, "--seed", 3, "--out", tmp_path / "flags.png")
        config = jobs.get("last").folder / "config.yaml"
        ask("compose", config, "--out", tmp_path / "yaml.png")
        assert (tmp_path / "yaml.png").read_bytes() == (tmp_path / "flags.png").read_bytes()

    def test_lora_files(self, ask, model, tmp_path):
        cat, dog = model / "cat.safetensors", model / "dog.safetensors"
        report = json.loads(ask("lora", "inspect", cat, "--json")[1])
        assert (report["ranks"], report["format"]) == ([2], "diffusers")
        assert ask("lora", "convert", cat, "--to", "kohya", "--out", tmp_path / "k.safetensors")[0] == 0
        # diffusers refuses a kohya file that has the PEFT configuration of a diffusers file as well
        old, new = (read_header(place).metadata for place in (cat, tmp_path / "k.safetensors"))
        assert "lora_adapter_metadata" in old
        assert "lora_adapter_metadata" not in new
        assert old.keys() - {"lora_adapter_metadata"} <= new.keys()
        code, _, err = ask("lora", "convert", tmp_path / "k.safetensors", "--out", tmp_path / "d.safetensors")
        assert code == 2
        assert "--base" in err
        base = ["--base", model / "tiny-sd-0"]
        assert ask("lora", "convert", tmp_path / "k.safetensors", *base, "--out", tmp_path / "d.safetensors")[0] == 0
        assert ask("lora", "convert", tmp_path / "d.safetensors", "--to", "peft", "--out", tmp_path / "peft")[0] == 0
        code, out, _ = ask("lora", "merge", f"{cat}:0.5", dog, "--out", tmp_path / "m.safetensors", "--json")
        assert (code, json.loads(out)["ranks"]) == (0, [4])
        code, out, _ = ask(
            "lora", "merge", f"{cat}:0.5", dog, "--rank", 2, "--out", tmp_path / "c.safetensors", "--json"
        )
        assert 0 < json.loads(out)["largest_error"] < 1
        assert ask("lora", "merge", f"{cat}@0-0.5", dog, "--out", tmp_path / "n.safetensors")[0] == 2

    def test_an_adapter_of_another_family_is_one_sentence(self, ask, common, tmp_path):
        path = diffusers_lora(tmp_path / "xl.safetensors", width=2048)
        code, _, err = ask(*common[:-4], "--lora", path, "--quiet")
        assert code == 2
        assert err.count("\n") == 1
        peft = peft_lora(tmp_path / "peft")
        assert ask(*common[:-4], "--lora", peft, "--quiet")[0] == 2


def test_a_second_ctrl_c_is_not_needed_for_idle_workers():
    jobs.ensure_worker()
    from studio.jobs import worker

    until(lambda: worker.running())
    (row,) = worker.running()
    begun = time.monotonic()
    os.kill(row["pid"], signal.SIGINT)
    until(lambda: not worker.running())
    assert time.monotonic() - begun < 60
