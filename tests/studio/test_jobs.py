"""The life of a job in a real worker process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from adapters.errors import Cancelled, InputError
from adapters.progress import Progress, Silent
from studio import jobs
from studio.cli.app import run
from studio.jobs import code, queue, store, worker
from tests.studio.fake_jobs import CountConfig
from tests.studio.waiting import ended, reached, until
from ui.components import job_panel

ROOT = Path(__file__).resolve().parents[2]


def test_a_job_runs_in_the_worker_and_leaves_everything_behind():
    job_id = jobs.submit("count", {"to": 3})
    assert jobs.get(job_id).status == "queued"
    jobs.ensure_worker()
    (job,) = ended(job_id)
    assert job.status == "done"
    assert job.result["counted"] == 3
    assert job.result["pid"] != os.getpid()
    assert job.progress.step == job.progress.total == 3
    assert job.started <= job.finished
    assert [row.loss for row in jobs.history(job_id)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert jobs.history(job_id, since=2)[0].step == 3
    assert json.loads((job.folder / "result.json").read_text()) == job.result
    assert CountConfig.from_yaml(job.folder / "config.yaml") == CountConfig(to=3)
    assert "starts" in jobs.log(job_id)
    assert len(jobs.log(job_id, tail=1).splitlines()) == 1


def test_previews_are_small_pictures_in_the_job_folder():
    job = jobs.run_here("count", {"to": 3}, Silent())
    (path,) = [row.preview for row in jobs.history(job.id) if row.preview]
    assert Path(path).parent == job.folder / "previews"
    with Image.open(path) as picture:
        assert picture.size == (512, 341)


def test_jobs_of_a_device_run_one_after_another_in_order():
    ids = [jobs.submit("count", {"to": 2, "pause": 0.05}) for _ in range(4)]
    jobs.ensure_worker()
    jobs.ensure_worker()
    found = ended(*ids)
    assert [job.status for job in found] == ["done"] * 4
    for earlier, later in itertools.pairwise(found):
        assert earlier.finished <= later.started
    assert len({job.result["pid"] for job in found}) == 1


def test_a_job_here_waits_for_the_device_of_a_job_in_the_worker():
    there = jobs.submit("count", {"to": 4, "pause": 0.2})
    jobs.ensure_worker()
    until(lambda: jobs.get(there).status == "running")
    mine = jobs.run_here("count", {"to": 1}, Silent())
    assert jobs.get(there).finished <= mine.started


@pytest.mark.parametrize(
    ("change", "sentence", "traceback"),
    [
        ({"fail_at": 1}, "This number is not liked: choose another.", False),
        ({"bug_at": 1}, "Unexpected ZeroDivisionError: one over (details in the job's log)", True),
    ],
)
def test_a_failed_job_says_why(change, sentence, traceback):
    job_id = jobs.submit("count", change)
    jobs.ensure_worker()
    (job,) = ended(job_id)
    assert (job.status, job.error) == ("failed", sentence)
    assert ("Traceback" in jobs.log(job_id)) is traceback


def test_a_dead_worker_leaves_the_job_interrupted_and_the_next_ones_are_done():
    dying = jobs.submit("count", {"to": 4, "die_at": 2})
    behind = jobs.submit("count", {"to": 1})
    jobs.ensure_worker()
    first, second = ended(dying, behind)
    assert first.status == "interrupted"
    assert "resume" in first.error
    assert second.status == "done"
    assert jobs.resume(dying) == dying
    jobs.ensure_worker()
    (job,) = ended(dying)
    assert job.status == "done"
    assert job.result["from"] == 2
    assert (job.folder / "starts.txt").read_text().split() == ["0", "2"]


def test_a_stopped_worker_lets_the_job_reach_a_safe_place():
    job_id = jobs.submit("count", {"to": 1000, "pause": 0.02})
    jobs.ensure_worker()
    reached(job_id, 3)
    (row,) = worker.running()
    os.kill(row["pid"], signal.SIGTERM)
    (job,) = ended(job_id)
    assert job.status == "interrupted"
    assert int((job.folder / "checkpoint.txt").read_text()) >= 3
    until(lambda: not worker.running())


def test_cancel_before_and_during():
    running, waiting = jobs.submit("count", {"to": 1000, "pause": 0.02}), jobs.submit("count", {})
    jobs.ensure_worker()
    reached(running, 2)
    assert jobs.cancel(waiting).status == "cancelled"
    assert jobs.cancel(running).status == "cancelling"
    assert [job.status for job in ended(running, waiting)] == ["cancelled"] * 2
    assert jobs.get(waiting).started is None
    with pytest.raises(InputError, match="cancelled already"):
        jobs.cancel(running)
    assert worker.running(), "a clean stop keeps the worker"


def test_the_second_cancel_kills_and_the_next_job_is_still_done():
    deaf, behind = jobs.submit("count", {"to": 1000, "pause": 0.05, "deaf": True}), jobs.submit("count", {})
    jobs.ensure_worker()
    reached(deaf, 1)
    jobs.cancel(deaf)
    assert jobs.get(deaf).status == "cancelling"
    assert jobs.cancel(deaf).status == "cancelled"
    assert ended(behind)[0].status == "done"


def test_jobs_survive_the_program_that_asked_for_them():
    program = "from studio import jobs; print(jobs.submit('count', {'to': 2}), flush=True)"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    job_id = asked.stdout.strip()
    assert jobs.get(job_id).status == "queued"
    jobs.ensure_worker()
    assert ended(job_id)[0].status == "done"


def test_a_worker_outlives_the_program_that_started_it():
    program = (
        "from studio import jobs; i = jobs.submit('count', {'to': 30, 'pause': 0.05}); jobs.ensure_worker(); print(i)"
    )
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended(asked.stdout.strip())[0].status == "done"


def test_a_message_that_the_queue_lost_is_put_back():
    job_id = jobs.submit("count", {})
    assert queue.waiting("cpu") == [job_id]
    queue.connect("cpu").dequeue()
    assert queue.waiting("cpu") == []
    jobs.ensure_worker()
    assert ended(job_id)[0].status == "done"


def test_only_one_worker_serves_a_queue():
    jobs.submit("count", {})
    for _ in range(3):
        worker.ensure("cpu")
    until(lambda: worker.running("cpu"))
    assert len(worker.running("cpu")) == 1
    with pytest.raises(InputError, match="is already running"):
        worker.serve("cpu")


def test_an_idle_worker_ends(monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_WORKER_IDLE_MINUTES", "0.001")
    jobs.ensure_worker()
    until(lambda: worker.running())
    until(lambda: not worker.running())


def test_a_worker_that_cannot_start_is_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "huey.py").write_text("raise ImportError('huey is damaged')")
    with monkeypatch.context() as broken:
        broken.setenv("PYTHONPATH", str(tmp_path / "broken"))
        broken.setattr(worker, "ROOT", tmp_path / "broken")
        job_id = jobs.submit("count", {})
        jobs.ensure_worker()
        until(jobs.trouble)
    (sentence,) = jobs.trouble()
    assert "The worker of the queue 'cpu'" in sentence
    assert "ImportError: huey is damaged" in sentence
    assert "huey is damaged" in job_panel.job_panel(jobs.get(job_id))
    assert run(["jobs", "list"]) == 0
    assert "huey is damaged" in capsys.readouterr().err
    assert run(["jobs", "watch", job_id]) == 2  # instead of waiting for ever
    jobs.ensure_worker()
    assert ended(job_id)[0].status == "done"
    assert jobs.trouble() == []


def test_an_updated_package_is_used_from_the_next_job_on(tmp_path):
    job_id = jobs.submit("count", {})
    program = (
        "import pathlib; from studio.jobs import code, worker\n"
        f"begun = pathlib.Path({str(tmp_path / 'begun')!r})\n"
        "if not begun.exists():\n"
        "    begun.touch(); stamps = iter(['old']); code.fingerprint = lambda: next(stamps, 'new')\n"
        "if worker.serve('cpu', idle_minutes=0.02):\n"
        "    print('updated', flush=True); worker.renew()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["updated"]
    assert jobs.get(job_id).status == "done"


def test_the_fingerprint_of_the_code_follows_its_files(tmp_path):
    module = tmp_path / "studio" / "one.py"
    module.parent.mkdir()
    prints = [code.fingerprint(tmp_path)]
    for text in ("a = 1", "a = 12"):
        module.write_text(text)
        prints.append(code.fingerprint(tmp_path))
    module.unlink()
    assert len(set(prints)) == 3
    assert code.fingerprint(tmp_path) == prints[0]


def test_messages_in_the_queue_are_plain_json():
    job_id = jobs.submit("count", {})
    (data,) = queue.connect("cpu").storage.enqueued_items()
    assert json.loads(bytes(data))["args"] == [job_id]


def test_wrong_configurations_never_reach_the_queue():
    with pytest.raises(InputError, match=r"unknown key 'too' \(did you mean 'to'\?\)"):
        jobs.submit("count", {"too": 3})
    with pytest.raises(InputError, match=r"Unknown kind of job 'cuont' \(did you mean 'count'\?\)"):
        jobs.submit("cuont", {})
    assert jobs.list() == []


def test_a_job_here_is_recorded_too():
    job = jobs.run_here("count", {"to": 2}, Silent())
    assert (job.status, job.pid) == ("done", os.getpid())
    with pytest.raises(InputError, match="not liked"):
        jobs.run_here("count", {"fail_at": 0}, Silent())
    assert [found.status for found in jobs.list()] == ["failed", "done"]


class _StopAt:
    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def report(self, progress: Progress) -> None:
        self.seen = progress.step

    def cancelled(self) -> bool:
        return self.seen >= self.step


def test_stopping_a_job_here_and_going_on():
    with pytest.raises(Cancelled):
        jobs.run_here("count", {"to": 5}, _StopAt(2))
    (job,) = jobs.list()
    assert job.status == "cancelled"
    done = jobs.resume_here(job.id, Silent())
    assert (done.id, done.status, done.result["from"]) == (job.id, "done", 2)
    with pytest.raises(InputError, match="only an interrupted, cancelled or failed job"):
        jobs.resume(job.id)


def test_rerun_and_delete():
    first = jobs.run_here("count", {"to": 1}, Silent())
    again = jobs.rerun(first.id)
    assert jobs.get(again).config == first.config
    jobs.delete(again)
    jobs.delete(first.id)
    assert jobs.list() == []
    assert not first.folder.exists()
    with pytest.raises(InputError, match="There is no job"):
        jobs.get(first.id)


def test_a_job_at_work_is_not_deleted():
    job_id = jobs.submit("count", {"to": 1000, "pause": 0.02})
    jobs.ensure_worker()
    reached(job_id, 1)
    with pytest.raises(InputError, match="is running"):
        jobs.delete(job_id)


def test_ids_may_be_shortened():
    job_id = jobs.submit("count", {})
    assert jobs.get(job_id[-4:]).id == jobs.get("last").id == job_id
    with pytest.raises(InputError, match="There is no job 'nothing'"):
        jobs.get("nothing")
    jobs.submit("count", {})
    with pytest.raises(InputError, match="Several jobs match"):
        jobs.get(job_id[:5])


def test_jobs_can_be_asked_for_by_status_and_kind():
    jobs.run_here("count", {}, Silent())
    waiting = jobs.submit("count", {})
    assert [job.id for job in jobs.list(status=["queued"])] == [waiting]
    assert jobs.list(kind="compose") == []
    assert len(jobs.list(limit=1)) == 1


def test_a_process_with_a_reused_number_is_not_taken_for_the_worker():
    job_id = jobs.submit("count", {})
    store.change(
        job_id, ["queued"], status="running", host=jobs.control.process.host(), pid=os.getpid(),
        pid_started=psutil.Process().create_time() - 100,
    )  # fmt: skip
    assert jobs.get(job_id).status == "interrupted"


def test_relative_paths_start_where_the_job_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job_id = jobs.submit("where", {"file": "note.txt"})
    (tmp_path / "note.txt").write_text("here")
    jobs.ensure_worker()
    assert ended(job_id)[0].result == {"text": "here"}


def test_a_wrong_queue_address_is_one_sentence(monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_QUEUE_URL", "http://somewhere")
    with pytest.raises(InputError, match="queue address 'http://somewhere' is not understood"):
        jobs.submit("count", {})
