"""What a process may use: devices, threads, and folders for what is compiled, on other people's machines."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit
from quantkit import machine
from quantkit.container import Container
from quantkit.errors import QuantkitError


def told(program: str, **environment: str) -> list:
    """What a Python of its own prints, as JSON."""
    around = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | environment
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, env=around)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_quota_bounds_the_threads_of_all_libraries(tmp_path, monkeypatch):
    for name, text in {
        "sys/fs/cgroup/cpu.max": "90000 100000",
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(machine, "Container", lambda: Container(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machine.bound_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # a person's own choice stands
    machine.bound_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_threads_are_those_of_all_libraries(made):
    """--threads, else the environment's: of torch, of ggml's graphs and of what encodes."""
    file = str(next(made.glob("tiny-r1-*.gguf")))
    program = (
        "import json, sys\nfrom quantkit import machine\nfrom quantkit.__main__ import main\n"
        "from quantkit.runtime import generate\nfrom quantkit.runtime.engines import graph\n"
        "seen = []\nmade = graph.Graph.__init__\n"
        "graph.Graph.__init__ = lambda self, n, *rest: (seen.append(n), made(self, n, *rest))[1]\n"
        f"main(['run', {file!r}, '-p', 'The', '-n', '2', '--device', 'cpu', *sys.argv[1:]], standalone_mode=False)\n"
        "import torch\nprint('\\n' + json.dumps([torch.get_num_threads(), machine.threads(), *sorted({*seen})]))"
    )
    around = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    for more, options in (
        ({}, ["--threads", "1"]),
        ({"OMP_NUM_THREADS": "1"}, []),
        ({"OMP_NUM_THREADS": "3"}, ["-t1"]),
    ):
        call = [sys.executable, "-c", program, *options]
        done = subprocess.run(call, capture_output=True, text=True, env=around | more)
        assert json.loads(done.stdout.splitlines()[-1]) == [1, 1, 1], done.stderr
    most = machine.cores()
    program = (
        "import json\nfrom quantkit import machine\nmachine.use_threads(10**6)\nprint(json.dumps(machine.threads()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=around)
    assert json.loads(done.stdout) == most and f"--threads 1000000: {most} are all that" in done.stderr


def test_devices():
    assert [machine.known_device(name) for name in ("cpu", "cuda", "cuda:7", "gpu", "gpu:1")] == [
        "cpu",
        "cuda",
        "cuda:7",
        "cuda",
        "cuda:1",
    ]
    for name in ("mps", "xpu", "cuda:x", "cuda:-1", "CPU", ""):
        with pytest.raises(QuantkitError, match=r"--device .*: unknown; choose cpu, cuda or cuda:N"):
            machine.known_device(name)


def test_a_gpu_that_is_not_there_is_refused_in_one_line(tmp_path, monkeypatch):
    """Before anything is read or written; on a machine with GPUs they are hidden."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("cuda:7", "gpu:0"):
        with pytest.raises(QuantkitError, match=f"--device {name}: no such GPU: CUDA_VISIBLE_DEVICES shows 0"):
            machine.chosen_device(name)
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "make", "--device", "gpu", "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("quantkit: --device gpu: ") and not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_one_of_several_gpus():
    program = (
        "import json\nfrom quantkit import machine\n"
        "name = machine.chosen_device('cuda:0')\nimport torch\n"
        "print(json.dumps([torch.cuda.device_count(), int(name == 'cuda'), int(torch.ones(1, device=name)[0])]))"
    )
    assert told(program) == [1, 1, 1]
    asked = "import os\n{}\nfrom quantkit import machine\nmachine.chosen_device('cuda:99')"
    for before, why in (
        ("os.environ.pop('CUDA_VISIBLE_DEVICES', None)", "torch sees no such GPU here"),
        ("os.environ['CUDA_VISIBLE_DEVICES'] = '0'", "no such GPU: CUDA_VISIBLE_DEVICES shows 1"),
    ):
        with pytest.raises(AssertionError, match=f"--device cuda:99: {why}"):
            told(asked.format(before))


FORKS = """
import json, os, sys, tempfile, traceback
import torch
for line in sys.stdin:
    program, around, path = json.loads(line)
    if not os.fork():
        os.environ.clear()
        os.environ.update(around)
        sys.path[:0] = path
        sys.dont_write_bytecode, tempfile.tempdir = bool(around.get("PYTHONDONTWRITEBYTECODE")), None
        try:
            exec(program, {})
        except BaseException:
            traceback.print_exc()
            print("null")
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def forked():
    """As `told`, in forks of one process that has loaded torch, which takes longest, and nothing of quantkit."""
    command = [sys.executable, "-P", "-c", FORKS]
    around = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=around) as parent:

        def answer(program: str, **more: str) -> list:
            path = [more.pop("PYTHONPATH")]
            print(json.dumps((program, around | more, path)), file=parent.stdin, flush=True)
            return json.loads(parent.stdout.readline())

        yield answer
        parent.stdin.close()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package where nobody can write beside its sources, root included."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(Path(quantkit.__file__).parent, folder / "quantkit", ignore=shutil.ignore_patterns("__pycache__"))
    for inner in [path for path in (folder / "quantkit").rglob("*") if path.is_dir()]:
        (inner / "__pycache__").write_text("in the way")
    return folder


KERNELS = """
import json, os
from quantkit.codecs import numba_decode
from quantkit.encoding.backends import numba_codebooks, numba_levels
caches = [getattr(k._cache, "_cache_path", None) for m in (numba_decode, numba_codebooks, numba_levels)
          for k in vars(m).values() if hasattr(k, "_cache")]
assert len(caches) > 15
print(json.dumps(sorted({None if c is None else os.path.dirname(c) for c in caches}, key=str)))
"""
NOWHERE = {"HOME": "/proc/nobody", "XDG_CACHE_HOME": "", "NUMBA_CACHE_DIR": "", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("case", ["home", "xdg", "given", "given in vain", "temporary", "somebody else's", "nothing"])
def test_kernels_are_kept_where_this_process_can_write(installed, forked, tmp_path, case):
    """With a home that is not there, as users without a name have in containers."""
    temporary, xdg, given = tmp_path / "tmp", tmp_path / "xdg", tmp_path / "given"
    temporary.mkdir()
    own = temporary / f"quantkit-{os.geteuid()}"
    around = NOWHERE | {"TMPDIR": str(temporary), "PYTHONPATH": str(installed)}
    around |= {
        "home": {"HOME": str(tmp_path)},
        "xdg": {"XDG_CACHE_HOME": str(xdg)},
        "given": {"NUMBA_CACHE_DIR": str(given)},
        "given in vain": {"NUMBA_CACHE_DIR": "/proc/none"},
    }.get(case, {})
    expected = {
        "home": str(tmp_path / ".cache/numba"),
        "xdg": str(xdg / "numba"),
        "given": str(given),
        "somebody else's": None,
        "nothing": None,
    }.get(case, str(own / "quantkit-numba"))
    if case == "somebody else's":
        (tmp_path / "theirs").mkdir()
        own.symlink_to(tmp_path / "theirs")
    if case == "nothing":
        own.write_text("in the way")
    assert forked(KERNELS, **around) == [expected]
    if case == "temporary":
        assert own.stat().st_mode & 0o777 == 0o700
        own.chmod(0o777)  # others could have put code there
        assert forked(KERNELS, **around) == [None]


def test_no_compiler_is_loaded_where_nothing_is_encoded(made, tmp_path):
    """numba takes half a second, and needs a cache."""
    file = str(next(made.glob("tiny-r1-*.gguf")))
    folder = shutil.copytree(made, tmp_path / "folder")
    calls = [["inspect", file], ["run", file, "-p", "The", "-n", "2", "--device", "cpu"], ["report", str(folder)]]
    program = (
        "import json, sys\nfrom quantkit.__main__ import main\n"
        f"for call in {calls!r}:\n"
        "    main(call, standalone_mode=False)\n"
        "    print('\\n' + json.dumps([m for m in sys.modules if m.split('.')[0] in ('numba', 'triton')"
        " or m.startswith('quantkit.encoding')]), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[]"] * len(calls)
