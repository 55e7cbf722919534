"""Several processes train what one process trains (as ``accelerate launch`` and ``torchrun`` start them)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from studio.training.tasks.image import run
from tests.training.conftest import settings

PROGRAM = """
import sys
import torch
from pathlib import Path
from studio.training.schemas.image import TrainImageConfig
from studio.training.tasks.image import run
torch.set_num_threads(1)
run(TrainImageConfig.from_yaml(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_processes_are_one(bases, pictures, tmp_path):
    values = {"optimizer": "sgd", "train_text_encoder": True, "text_encoder_stop": 2, "ema": True}
    alone = run(settings(bases("sd"), pictures, batch_size=4, **values), tmp_path / "alone")
    (tmp_path / "half.yaml").write_text(settings(bases("sd"), pictures, batch_size=2, **values).to_yaml())
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "program.py")]
    subprocess.run(
        [*command, str(tmp_path / "half.yaml"), str(tmp_path / "both")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    both = load_file(tmp_path / "both" / "adapter.safetensors")
    for key, value in load_file(alone["adapter"]).items():
        torch.testing.assert_close(both[key], value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("more", "expected"), [({}, True), ({"WORLD_SIZE": "2"}, False), ({"PMI_SIZE": "2"}, False)])
def test_a_process_that_was_left_alone_knows(more, expected, monkeypatch):
    """The environment is what accelerate's launcher makes of the same flags."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    from studio.training.device import left_alone

    for name in ("WORLD_SIZE", "PMI_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert not left_alone()
    flags = ["--cpu", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    asked = launch_command_parser().parse_args([*flags, "--num_machines", "1", "program.py"])
    asked.use_cpu = asked.cpu
    for name, value in (prepare_simple_launcher_cmd_env(asked)[1] | more).items():
        monkeypatch.setenv(name, value)
    assert left_alone() == expected
