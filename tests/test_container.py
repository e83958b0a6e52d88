"""How much of a machine is ours: /proc and /sys as hosts and containers have them, laid out below a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import machine
from quantkit.container import Container

GIB = 1 << 30
HOST = {
    "proc/meminfo": f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {40 * GIB // 1024} kB\n",
    "proc/self/status": "Name:\tpython\nVmSize:\t  1048576 kB\nVmData:\t  524288 kB\nCpus_allowed_list:\t0-15\n",
    "proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units\n"
    "Max data size             unlimited            unlimited            bytes\n"
    "Max address space         unlimited            unlimited            bytes\n",
}
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
    "33 31 0:29 {root} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    "34 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct ro shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
)
OWN_V1 = "9:cpu,cpuacct:{own}\n4:memory:{own}\n1:name=systemd:{own}\n0::/\n"


def machine_at(root: Path, files: dict[str, str]) -> Container:
    for name, text in (HOST | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Container(root)


def all_of(container: Container) -> tuple[int, int, int]:
    return container.ram(), container.free_ram(), container.cores()


CASES = {
    "a host without control groups": ({}, (64 * GIB, 40 * GIB, 16)),
    "v2 without limits": (
        {
            "proc/self/cgroup": "0::/user.slice/a.scope\n",
            "proc/self/mountinfo": V2.format(root="/"),
            "sys/fs/cgroup/user.slice/a.scope/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/a.scope/cpu.max": "max 100000\n",
        },
        (64 * GIB, 40 * GIB, 16),
    ),
    "v2 in a container's own namespace": (
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2.format(root="/"),
            "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{6 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {5 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}\n",
            "sys/fs/cgroup/cpu.max": "250000 100000\n",
        },
        (8 * GIB, 6 * GIB, 3),
    ),
    "v2 nested: the tightest of all levels": (
        {
            "proc/self/cgroup": "0::/kubepods/pod1/c1\n",
            "proc/self/mountinfo": V2.format(root="/"),
            "sys/fs/cgroup/kubepods/memory.max": f"{32 * GIB}\n",
            "sys/fs/cgroup/kubepods/pod1/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/kubepods/pod1/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/kubepods/pod1/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/kubepods/pod1/c1/memory.max": "max\n",
            "sys/fs/cgroup/kubepods/pod1/c1/memory.high": f"{5 * GIB}\n",
            "sys/fs/cgroup/kubepods/pod1/c1/cpu.max": "max 100000\n",
        },
        (4 * GIB, 3 * GIB, 4),
    ),
    "v2 whose mount shows a part of the hierarchy": (
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "proc/self/mountinfo": V2.format(root="/docker/abc"),
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
        (GIB, GIB, 1),
    ),
    "v2 whose path is outside of the mount": (
        {
            "proc/self/cgroup": "0::/../../other\n",
            "proc/self/mountinfo": V2.format(root="/"),
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
        },
        (2 * GIB, 2 * GIB, 16),
    ),
    "v1 of Docker": (
        {
            "proc/self/cgroup": OWN_V1.format(own="/docker/abc"),
            "proc/self/mountinfo": V1.format(root="/docker/abc"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{1260 * 10**6}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{900 * 10**6}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {300 * 10**6}\n"
            "total_active_file 0\nhierarchical_memory_limit 9223372036854771712\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        (1260 * 10**6, 660 * 10**6, 2),
    ),
    "v1 without limits, but an ancestor's that is not shown": (
        {
            "proc/self/cgroup": OWN_V1.format(own="/"),
            "proc/self/mountinfo": V1.format(root="/"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {16 * GIB}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        (16 * GIB, 16 * GIB, 16),
    ),
    "affinity": (
        {"proc/self/status": "Cpus_allowed:\tff\nCpus_allowed_list:\t0-2,7,12-13\n"},
        (64 * GIB, 40 * GIB, 6),
    ),
    "ulimit -v": (
        {"proc/self/limits": f"Max address space         {3 * GIB}           unlimited            bytes\n"},
        (3 * GIB, 2 * GIB, 16),
    ),
    "an old kernel": (
        {"proc/meminfo": f"MemTotal: {8 * GIB // 1024} kB\nMemFree: {GIB // 1024} kB\nCached: {GIB // 1024} kB\n"},
        (8 * GIB, 2 * GIB, 16),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_ours(tmp_path, case):
    files, expected = CASES[case]
    assert all_of(machine_at(tmp_path, files)) == expected


def test_this_machine_says_what_the_kernel_says():
    assert 1 <= machine.cores() <= len(os.sched_getaffinity(0))
    assert 1 << 27 < machine.free_ram() <= machine.ram() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def told(program: str, **environment: str) -> list[int]:
    """What a Python of its own prints, as JSON."""
    around = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | environment
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=around)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hyperthreads_of_a_core_count_once(tmp_path):
    """Eight of 16 hardware threads are ours, two a core; a quota of three cores cuts them further."""
    files = {
        f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 8},{i % 8 + 8}\n" for i in range(16)
    }
    files["proc/self/status"] = "Cpus_allowed_list:\t0-3,8-11\n"
    assert (machine_at(tmp_path, files).cores(), machine_at(tmp_path, files).physical_cores()) == (8, 4)
    files |= {"sys/fs/cgroup/cpu.max": "250000 100000", "proc/self/cgroup": "0::/"}
    files["proc/self/mountinfo"] = V2.format(root="/")
    assert machine_at(tmp_path, files).physical_cores() == 3
    assert machine_at(tmp_path / "other", {}).physical_cores() == 16  # nothing says which belong together


def test_limits_of_the_process_are_seen():
    program = (
        "import json, os, resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from quantkit import machine\n"
        "print(json.dumps([machine.ram(), machine.free_ram(), machine.cores()]))"
    )
    ram, free, cores = told(program)
    assert ram == 3 << 30 and (2 << 30) < free < ram and cores == 1
