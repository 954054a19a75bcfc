"""The scripts that start clusters, with stand-ins for Slurm and ssh that run everything on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import held
import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SHELL = [SCRIPTS / "slurm.sbatch", SCRIPTS / "ssh_cluster"]

# Runs the command as often as there are tasks, and ends them when it is ended.
SRUN = """#!/usr/bin/env bash
tasks=1
while [[ $1 == --* ]]; do
    [[ $1 != --ntasks=* ]] || tasks=${1#*=}
    shift
done
for ((i = 0; i < tasks; i++)); do "$@" & pids+=($!); done
trap 'kill "${pids[@]}"' TERM INT
wait || wait
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >> "$SLURM_SUBMIT_DIR/requeued"; fi
"""
# Gives a host's login shell the words of the command in one line, as ssh does.
SSH = """#!/bin/sh
shift
exec sh -c "$*"
"""


@pytest.fixture
def many(shards: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(8):
        shutil.copy(shards / f"{k % 4:05d}.tar", folder / f"{k:05d}.tar")
    return folder


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("myssh", SSH)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, **more}


def slurm(tmp_path: Path) -> dict[str, str]:
    return environment(
        tmp_path,
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_CPUS_ON_NODE="1",
    )


def start(script: str, *arguments: str | Path, env: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPTS / script, *map(str, arguments)] if script != "slurm.sbatch" else
        ["bash", SCRIPTS / script, *map(str, arguments)],
        env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def curate(inputs: Path, out: Path) -> list[str | Path]:
    return ["curate", inputs / "*.tar", "-o", out, "--encoder", "tiny-image", "-q"]


def wait_for_parts(out: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not list(out.glob("catalog/part-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def left_over(text: str) -> list[str]:
    """Return the command lines of the processes that mention a text, once those that are ending have ended."""
    end = time.monotonic() + 40
    while True:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(line)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.2)


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shell_scripts_are_clean(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", path], check=True)


def test_the_kubernetes_file_fits_together() -> None:
    claim, cluster, job = yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())
    assert [claim["kind"], cluster["kind"], job["kind"]] == ["PersistentVolumeClaim", "DaskCluster", "Job"]
    pods = [cluster["spec"]["worker"]["spec"], cluster["spec"]["scheduler"]["spec"], job["spec"]["template"]["spec"]]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    for pod in (pods[0], pods[2]):
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {"name": "shared", "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]
    script = pods[2]["containers"][0]["args"][0]
    assert f"wait_for_workers({cluster['spec']['worker']['replicas']}," in script
    assert f"--scheduler tcp://{cluster['metadata']['name']}-scheduler:8786" in script
    subprocess.run(["bash", "-nc", script], check=True)


def test_a_slurm_job(shards: Path, tmp_path: Path) -> None:
    env = slurm(tmp_path)
    process = start("slurm.sbatch", *curate(shards, tmp_path / "OUT"), env=env, cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "72 samples in = 60 kept + 12 duplicate" in out
    assert left_over(str(tmp_path)) == []
    assert not list(tmp_path.glob(".imgcurate*"))
    wrong = start("slurm.sbatch", *curate(tmp_path / "nothing", tmp_path / "OUT2"), env=env, cwd=tmp_path)
    _, err = wrong.communicate(timeout=200)
    assert wrong.returncode == 2, err
    assert "nothing matches" in err


def test_a_slurm_job_near_its_time_limit_is_queued_again(many: Path, tmp_path: Path) -> None:
    out, hold = tmp_path / "OUT", tmp_path / "hold"
    env = held.environment(hold, out, slurm(tmp_path))
    command = ["run", held.write_run(tmp_path, many), "-o", out, "-q"]
    process = start("slurm.sbatch", *command, env=env, cwd=tmp_path)
    wait_for_parts(out, process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "run the same command again to go on" in err
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert left_over(str(tmp_path)) == []
    hold.unlink()
    again = start("slurm.sbatch", *command, env=env, cwd=tmp_path)
    text, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert "144 samples in" in text


def ssh(tmp_path: Path) -> dict[str, str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return environment(
        tmp_path, SSH=str(tmp_path / "tools" / "myssh"), IMGCURATE_SCHEDULER="127.0.0.1", IMGCURATE_PORT=port,
        IMGCURATE_WORKERS_PER_NODE="1",
    )  # fmt: skip


def test_ssh_cluster(shards: Path, tmp_path: Path) -> None:
    env = ssh(tmp_path)
    arguments = ["node-a", "me@node-b", "--", *curate(shards, tmp_path / "OUT")]
    process = start("ssh_cluster", *arguments, env=env, cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "72 samples in = 60 kept + 12 duplicate" in out
    assert left_over(f":{env['IMGCURATE_PORT']} ") == []
    usage = start("ssh_cluster", "node-a", env=env, cwd=tmp_path)
    assert "usage:" in usage.communicate(timeout=20)[1]
    assert usage.returncode == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_ssh_cluster_that_is_ended_leaves_nothing(number: int, code: int, many: Path, tmp_path: Path) -> None:
    env = held.environment(tmp_path / "hold", tmp_path / "OUT", ssh(tmp_path))
    command = ["run", held.write_run(tmp_path, many), "-o", tmp_path / "OUT", "-q"]
    process = start("ssh_cluster", "node-a", "node-b", "--", *command, env=env, cwd=tmp_path)
    wait_for_parts(tmp_path / "OUT", process)
    process.send_signal(number)
    process.wait(60)
    (tmp_path / "hold").unlink()
    assert process.returncode == code
    # Of a script that is killed the client remains, until it notices that the scheduler is gone.
    assert [c for c in left_over(f":{env['IMGCURATE_PORT']} ") if "imgcurate" not in c] == []
    if number == signal.SIGINT:
        assert "run the same command again to go on" in process.stderr.read()
