"""The record of all jobs in one SQLite file: what was asked for and what became of it.

The queue holds only the ids of waiting jobs; what it loses is put back from here. Every change is one statement, so
that the web app, commands and workers may all write at once.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from studio import database
from studio.jobs.model import Job, ProgressRow, Status

_TABLES = """
create table if not exists jobs (
    id text primary key, kind text not null, status text not null, config text not null, created real not null,
    folder text not null, device text not null, queue text not null, started real, finished real, progress text,
    error text not null default '', result text, host text not null default '', pid integer, pid_started real,
    heartbeat real, resuming integer not null default 0, cwd text not null
);
create index if not exists jobs_created on jobs (created);
create index if not exists jobs_status on jobs (status);
create table if not exists history (
    number integer primary key, job text not null, time real not null, stage text not null, step integer not null,
    total integer not null, loss real, metrics text, preview text, message text not null default ''
);
create index if not exists history_job on history (job, number);
create table if not exists earlier (job text primary key, seconds real not null);
create table if not exists packs (job text primary key, pack text not null);
create table if not exists workers (
    host text not null, pid integer not null, pid_started real not null, queue text not null, started real not null,
    heartbeat real not null, primary key (host, pid)
);
"""


def connection() -> sqlite3.Connection:
    return database.connection("studio.db", _TABLES)


def insert(job: Job) -> None:
    connection().execute(
        "insert into jobs (id, kind, status, config, created, folder, device, queue, cwd) "
        "values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (job.id, job.kind, job.status, json.dumps(job.config), job.created, str(job.folder), job.device, job.queue,
         str(job.cwd)),
    )  # fmt: skip


_JOBS = "select jobs.*, coalesce(earlier.seconds, 0) as earlier from jobs left join earlier on earlier.job = jobs.id"


def read(job_id: str) -> Job | None:
    row = connection().execute(f"{_JOBS} where id = ?", (job_id,)).fetchone()
    return _job(row) if row else None


def matching(text: str, limit: int = 3) -> list[str]:
    """Ids that begin or end with ``text``."""
    rows = connection().execute(
        "select id from jobs where substr(id, 1, ?) = ? or substr(id, -?) = ? order by created desc limit ?",
        (len(text), text, len(text), text, limit),
    )
    return [row["id"] for row in rows]


def newest(limit: int, statuses: Iterable[str] = (), kind: str | None = None) -> list[Job]:
    """The newest jobs first."""
    states = tuple(statuses)
    where = [f"status in ({','.join('?' * len(states))})"] if states else []
    where += ["kind = ?"] if kind else []
    clause = f"where {' and '.join(where)}" if where else ""
    values = (*states, *([kind] if kind else []), limit)
    rows = connection().execute(f"{_JOBS} {clause} order by created desc, jobs.rowid desc limit ?", values)
    return [_job(row) for row in rows]


def change(job_id: str, expected: Iterable[Status], **values: Any) -> bool:
    """Set columns of a job if its status is one of ``expected``; returns whether it was."""
    states = tuple(expected)
    columns = ", ".join(f"{name} = ?" for name in values)
    cursor = connection().execute(
        f"update jobs set {columns} where id = ? and status in ({','.join('?' * len(states))})",
        (*values.values(), job_id, *states),
    )
    return cursor.rowcount == 1


def add_earlier(job_id: str, seconds: float) -> None:
    """Record how long a job has run, before it is resumed."""
    connection().execute("insert or replace into earlier (job, seconds) values (?, ?)", (job_id, seconds))


def put_together(job_ids: Iterable[str], pack: str) -> None:
    """Let jobs run as one."""
    connection().executemany("insert or replace into packs (job, pack) values (?, ?)", [(i, pack) for i in job_ids])


def take_out(job_id: str) -> None:
    """Let a job run alone again."""
    connection().execute("delete from packs where job = ?", (job_id,))


def together(job_id: str) -> list[Job]:
    """The jobs that run as one with this one, itself among them, oldest first; empty when it runs alone."""
    rows = connection().execute(
        f"{_JOBS} where id in (select job from packs where pack = (select pack from packs where job = ?)) "
        "order by created, jobs.rowid",
        (job_id,),
    )
    return [_job(row) for row in rows]


def beat(job_id: str) -> None:
    connection().execute("update jobs set heartbeat = ? where id = ?", (time.time(), job_id))


def add_progress(job_id: str, row: ProgressRow, keep: bool) -> None:
    """Record a report as the job's last one, and in its history when ``keep``."""
    values = {
        "stage": row.stage, "step": row.step, "total": row.total, "loss": row.loss, "metrics": row.metrics,
        "preview": row.preview, "message": row.message, "time": row.time,
    }  # fmt: skip
    link = connection()
    link.execute("update jobs set progress = ?, heartbeat = ? where id = ?", (json.dumps(values), row.time, job_id))
    if keep:
        link.execute(
            "insert into history (job, time, stage, step, total, loss, metrics, preview, message) "
            "values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (job_id, row.time, row.stage, row.step, row.total, row.loss, json.dumps(row.metrics) if row.metrics else
             None, row.preview, row.message),
        )  # fmt: skip


def history(job_id: str, since: int = 0) -> list[ProgressRow]:
    """The kept reports in order, from the ``since``-th on."""
    rows = connection().execute(
        "select * from history where job = ? order by number limit -1 offset ?", (job_id, since)
    )
    return [
        ProgressRow(row["stage"], row["step"], row["total"], row["loss"], json.loads(row["metrics"] or "{}"),
                    row["preview"], row["message"], row["time"])
        for row in rows
    ]  # fmt: skip


def forget(job_id: str) -> None:
    link = connection()
    for table in ("history", "earlier", "packs"):
        link.execute(f"delete from {table} where job = ?", (job_id,))
    link.execute("delete from jobs where id = ?", (job_id,))


def owner(job_id: str) -> Mapping[str, Any] | None:
    """Who works on a job: host, pid, pid_started, heartbeat."""
    row = connection().execute("select host, pid, pid_started, heartbeat from jobs where id = ?", (job_id,)).fetchone()
    return dict(row) if row and row["pid"] else None


def add_worker(host: str, pid: int, pid_started: float, queue: str) -> None:
    now = time.time()
    connection().execute(
        "insert or replace into workers (host, pid, pid_started, queue, started, heartbeat) values (?, ?, ?, ?, ?, ?)",
        (host, pid, pid_started, queue, now, now),
    )


def beat_worker(host: str, pid: int) -> None:
    connection().execute("update workers set heartbeat = ? where host = ? and pid = ?", (time.time(), host, pid))


def remove_worker(host: str, pid: int) -> None:
    connection().execute("delete from workers where host = ? and pid = ?", (host, pid))


def workers() -> list[dict[str, Any]]:
    return [dict(row) for row in connection().execute("select * from workers order by started")]


def _job(row: sqlite3.Row) -> Job:
    progress = json.loads(row["progress"]) if row["progress"] else None
    return Job(
        id=row["id"], kind=row["kind"], status=row["status"], config=json.loads(row["config"]),
        created=row["created"], folder=Path(row["folder"]), device=row["device"], started=row["started"],
        finished=row["finished"], progress=ProgressRow(**progress) if progress else None, error=row["error"],
        result=json.loads(row["result"]) if row["result"] else None, queue=row["queue"], host=row["host"],
        pid=row["pid"], resuming=bool(row["resuming"]), earlier=row["earlier"], cwd=Path(row["cwd"]),
    )  # fmt: skip
