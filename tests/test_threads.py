"""OpenMP's settings: control groups, and the environment that train.py and the commands start with."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from funnel.threads import configure_threads, cpu_quota


def write_groups(folder, membership, **files):
    """Writes a process's cgroup file and the files of its groups, named by their path with "__" for "/"."""
    for name, content in files.items():
        path = folder / "groups" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "cgroup").write_text(membership)
    return folder / "groups", folder / "cgroup"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu_max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu_max": "max 100000\n"}, None),
        ("0::/a/b\n", {"cpu_max": "max 100000\n", "a__cpu_max": "200000 100000\n", "a__b__cpu_max": "400000 100000\n"}, 2.0),
        ("0::/a\n", {}, None),
        (
            "3:memory:/\n2:cpu,cpuacct:/\n",
            {"cpu,cpuacct__cfs_quota_us": "50000\n", "cpu,cpuacct__cfs_period_us": "100000\n"},
            0.5,
        ),
        ("2:cpu:/\n", {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}, None),
        ("damaged\n0::/\n", {"cpu_max": "50000 100000\n"}, 0.5),
        ("2:cpu:/\n", {"cpu__cfs_quota_us": "?\n", "cpu__cfs_period_us": "0\n"}, None),
    ],
)
def test_the_quota_of_a_control_group_is_the_smallest_of_its_parents(tmp_path, membership, files, quota):
    assert cpu_quota(*write_groups(tmp_path, membership, **files)) == quota


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "missing") is None


def test_a_quota_limits_the_threads_and_user_variables_are_kept(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("funnel.threads.cpu_quota", lambda: 1.5)
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    configure_threads()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    configure_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["GOMP_SPINCOUNT"]) == ("5", "7")


@pytest.mark.parametrize("module", ["train", "funnel.cli.main"])
def test_commands_set_the_variables_before_torch_is_loaded(module):
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT')); raise SystemExit\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"import {module}, torch\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == "1000\n", result.stderr


def test_a_waiting_policy_of_the_user_is_kept(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    configure_threads()
    assert "GOMP_SPINCOUNT" not in os.environ
