"""Training from scripts and prompts, and what is left when it is stopped."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from training.programs import PACKAGE, start_script, write_script

TRAIN = """
    import numpy as np
    import gristmill as gm

    def gradient(params, batch):
        error = batch["x"] @ params["w"] - batch["y"]
        return 0.5 * np.mean(error**2), {"w": batch["x"].T @ error / len(error)}

    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    data = {"x": x, "y": x @ np.float32([1, 2, 3])}
"""
RUN = """
    print(gm.fit_gradient(gradient, {"w": np.zeros(3)}, data, workers=2, epochs=50).params["w"].round(2))
"""
FOREVER = (
    TRAIN
    + """
    import os, threading, time

    def tell():
        own = os.getpid()
        while True:
            children = open(f"/proc/{own}/task/{own}/children").read().split()
            if len(children) == 2:
                break
            time.sleep(0.01)
        time.sleep(0.5)
        print(*children, flush=True)

    threading.Thread(target=tell, daemon=True).start()
    gm.fit_gradient(gradient, {"w": np.zeros(3)}, data, workers=2, epochs=10**9, checkpoint=CHECKPOINT)
"""
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_until_gone(pids, seconds=20.0):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


def test_a_script_needs_no_guard(tmp_path):
    script = write_script(tmp_path, TRAIN + RUN)
    process = start_script(script)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split() == ["[1.", "2.", "3.]"]


def test_the_prompt_and_standard_input_work():
    program = textwrap.dedent(TRAIN) + '\nprint(len(gm.fit_gradient(gradient, {"w": np.zeros(3)}, data, epochs=2).params))\n'
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    for command in ([sys.executable, "-"], [sys.executable, "-c", program]):
        done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, env=environment)
        assert done.stdout == "1\n", done.stderr


def test_a_module_beside_the_script_is_found_by_workers(tmp_path):
    (tmp_path / "beside.py").write_text("def scale(array):\n    return array * 2\n")
    script = write_script(
        tmp_path,
        """
        import numpy as np
        import beside
        import gristmill as gm

        def gradient(theta, batch):
            return 0.0, beside.scale(theta) - np.float32(2)

        print(gm.fit_gradient(gradient, np.zeros(1), np.zeros((8, 1)), epochs=100).params.round(3))
        """,
    )
    process = start_script(script, cwd="/")
    out, err = process.communicate(timeout=60)
    assert out.strip() == "[1.]", err


@linux
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_behind(tmp_path, how):
    before = set(os.listdir("/dev/shm"))
    path = tmp_path / "checkpoint"
    process = start_script(write_script(tmp_path, FOREVER.replace("CHECKPOINT", repr(str(path)))), process_group=0)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2, process.communicate()[1]
    assert all(map(alive, workers))
    if how == "Ctrl-C":  # a terminal signals the whole group
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if how in ("Ctrl-C", "SIGINT"):
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert err.count("Traceback") == 1
    assert wait_until_gone(workers) == []
    assert set(os.listdir("/dev/shm")) - before == set()
    if how in ("Ctrl-C", "SIGINT"):
        assert {file.name for file in tmp_path.iterdir()} == {"program.py", "checkpoint"}


@linux
def test_a_frozen_coordinator_s_death_ends_its_workers(tmp_path):
    process = start_script(write_script(tmp_path, FOREVER.replace("CHECKPOINT", "None")))
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    assert all(map(alive, workers))
    process.kill()
    process.communicate()
    assert wait_until_gone(workers) == []


@linux
def test_descriptors_and_processes_are_given_back():
    import gristmill as gm
    from training.programs import blobs, small_model

    def held():
        return len(os.listdir("/proc/self/fd")), open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read()

    gm.fit(small_model(), blobs(), epochs=1, workers=2)
    before = held()
    for _ in range(3):
        gm.fit(small_model(), blobs(), epochs=1, workers=2)
    assert held() == before


def test_several_runs_at_once_from_threads():
    from concurrent.futures import ThreadPoolExecutor

    import gristmill as gm
    from training.programs import bits, blobs, small_model

    def run(seed):
        return bits(gm.fit(small_model(), blobs(), epochs=2, workers=2, seed=seed))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [0, 1])) == [run(0), run(1)]


def test_a_gradient_that_starts_threads_and_prints(capfd):
    import threading

    import numpy as np

    import gristmill as gm

    def gradient(theta, batch):
        found = []
        thread = threading.Thread(target=lambda: found.append(theta * 0 + batch.mean()))
        thread.start()
        thread.join()
        print("in a worker")
        return 0.0, found[0]

    gm.fit_gradient(gradient, np.zeros(2), np.ones(4), epochs=1, batch_size=None)
    assert capfd.readouterr().out.count("in a worker") == 4
