"""What happens around an iteration: forks, signals, exits, abandoned iterators, several ranks."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.images import add_split
from torchvision import datasets
from torchvision.transforms import v2

from imagenet_seq.errors import ForkError
from imagenet_seq.loader import Loader

EVAL = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])
# A shell that starts this suite in the background has its children ignore Ctrl-C.
HEAR_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
DEADLINE_S = 120  # far above what anything here takes; a hang fails instead of stopping the suite


@pytest.fixture(scope="module")
def root(make_folder: Callable[..., Path]) -> Path:
    folder = make_folder(83, num_classes=3)
    add_split(folder, 29, 3, "val", seed=1)
    return folder


def native_threads() -> int:
    """Threads of this process, the core's included."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0


def run_script(source: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run a Python script in a fresh process, with this suite's package."""
    return subprocess.run(
        [sys.executable, "-c", HEAR_SIGINT + textwrap.dedent(source), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        **options,
    )


def test_importing_the_package_does_not_import_torch() -> None:
    result = run_script("import sys, imagenet_seq; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


# ---- iterators -----------------------------------------------------------------------------------


def test_abandoned_iterators_leave_no_thread_and_no_open_file(root: Path) -> None:
    loader = Loader(root, "train", EVAL, batch_size=4, num_workers=4)
    gc.collect()
    threads, files = native_threads(), len(os.listdir("/proc/self/fd"))
    python_threads = threading.active_count()
    for _ in range(20):
        for _ in loader:
            break

    def fail() -> None:
        for _ in loader:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for _ in loader:  # an iteration to the end keeps its threads for the next one
        pass
    loader.close()
    gc.collect()
    deadline = time.monotonic() + 10
    while native_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert native_threads() <= threads
    assert threading.active_count() <= python_threads
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_loader_that_goes_while_it_is_iterated(root: Path) -> None:
    num_samples = sum(len(t) for _, t in Loader(root, "train", EVAL, batch_size=4, num_workers=2))
    assert num_samples == 83


def test_memory_does_not_grow_over_epochs(root: Path) -> None:
    result = run_script(
        """
        import resource, sys
        from imagenet_seq import Loader
        loader = Loader(sys.argv[1], "train", batch_size=8, num_workers=2)
        for epoch in range(24):
            for batch in loader:
                if epoch % 2:
                    break
            if epoch == 7:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """,
        root,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 30_000  # KiB; an epoch's batches alone are 50 MB


def test_memory_stays_within_the_stated_bound(root: Path) -> None:
    result = run_script(
        """
        import resource, sys
        from imagenet_seq import Loader
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        warm = Loader(sys.argv[1], "val", batch_size=1, num_workers=2)
        list(warm)
        loader = Loader(sys.argv[1], "train", batch_size=32, num_workers=2)
        before = peak()
        for _ in range(4):
            for batch in loader:
                pass
        print(peak() - before, loader.memory_bytes)
        """,
        root,
    )
    assert result.returncode == 0, result.stderr
    growth, stated = map(int, result.stdout.split())
    assert growth < stated + (20 << 20)  # scratch of two threads comes on top


def test_exit_in_the_middle_of_an_epoch(root: Path) -> None:
    for ending in ("", "sys.exit(3)", "raise RuntimeError('x')", "os._exit(0)"):
        result = run_script(
            f"""
            import os, sys
            from imagenet_seq import Loader
            loader = Loader(sys.argv[1], "train", batch_size=4, num_workers=4)
            iterator = iter(loader)
            next(iterator)
            {ending}
            """,
            root,
        )
        expected = {"": 0, "sys.exit(3)": 3, "os._exit(0)": 0}.get(ending, 1)
        assert result.returncode == expected, (ending, result.stderr)
        assert "Fatal" not in result.stderr


def test_ctrl_c_while_waiting_for_a_batch(root: Path) -> None:
    script = """
        import sys, time
        from imagenet_seq import Loader
        def slow(image):
            time.sleep(60)
        loader = Loader(sys.argv[1], "train", slow, batch_size=4, num_workers=2)
        try:
            print("waiting", flush=True)
            next(iter(loader))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            import os
            os._exit(0)  # a user's transform that sleeps can't be ended from outside
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HEAR_SIGINT + textwrap.dedent(script), str(root)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert output == "interrupted\n"
    assert process.returncode == 0


def test_ctrl_c_in_the_loop_then_state_and_exit(root: Path) -> None:
    result = run_script(
        """
        import json, os, signal, sys
        from imagenet_seq import Loader
        loader = Loader(sys.argv[1], "train", batch_size=4, num_workers=4)
        try:
            for number, batch in enumerate(loader):
                if number == 2:
                    os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            print(json.dumps(loader.state_dict()))
        """,
        root,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["samples_done"] in (12, 16)


def test_interrupts_anywhere_leave_nothing_behind(root: Path) -> None:
    result = run_script(
        """
        import gc, os, random, signal, sys, time
        from imagenet_seq import Loader
        signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C
        loader = Loader(sys.argv[1], "train", batch_size=4, num_workers=2)
        before = len(os.listdir("/proc/self/task"))
        random.seed(0)
        interrupted = 0
        for _ in range(60):
            try:
                # Again after a while: an interrupt in a finaliser is swallowed. Epoch after epoch,
                # so that a fast machine does not get away.
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.02), 1.0)
                while True:
                    for batch in loader:
                        pass
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        loader.close()
        deadline = time.monotonic() + 20
        while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.05)
        print(interrupted, len(os.listdir("/proc/self/task")) - before)
        """,
        root,
    )
    assert result.returncode == 0, result.stderr
    interrupted, left = map(int, result.stdout.split())
    assert interrupted == 60
    assert left == 0


# ---- fork ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_torch_workers_forked_beside_a_live_loader(root: Path) -> None:
    loader = Loader(root, "train", EVAL, batch_size=4, num_workers=4)
    dataset = datasets.ImageFolder(str(root / "val"), EVAL)
    expected = [(x.clone(), t.clone()) for x, t in Loader(root, "train", EVAL, batch_size=4)]
    got = []
    for number, (images, target) in enumerate(loader):
        got.append((images.clone(), target.clone()))
        if number == 3:
            workers = torch.utils.data.DataLoader(
                dataset, batch_size=7, num_workers=2, multiprocessing_context="fork"
            )
            assert sum(len(t) for _, t in workers) == 29
    assert len(got) == len(expected)
    assert all(
        torch.equal(a, c) and torch.equal(b, d)
        for (a, b), (c, d) in zip(got, expected, strict=True)
    )


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_in_the_middle_of_an_epoch(root: Path) -> None:
    loader = Loader(root, "train", EVAL, batch_size=4, num_workers=4)
    iterator = iter(loader)
    next(iterator)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            next(iterator)
        except ForkError as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            del iterator
            loader.close()
            os._exit(code)
    deadline = time.monotonic() + 30
    status: tuple[int, int] = (0, 0)
    while status[0] == 0 and time.monotonic() < deadline:
        status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    assert status[0] == child, "the forked child hangs"
    assert os.waitstatus_to_exitcode(status[1]) == 0
    assert sum(len(t) for _, t in iterator) == 83 - 4


def test_a_child_exits_normally_and_makes_a_loader_of_its_own(root: Path) -> None:
    result = run_script(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        from imagenet_seq import Loader
        loader = Loader(sys.argv[1], "train", batch_size=4, num_workers=2)
        iterator = iter(loader)
        next(iterator)
        child = os.fork()
        if child == 0:
            own = Loader(sys.argv[1], "train", batch_size=4, num_workers=2)
            total = sum(len(t) for _, t in own)
            sys.exit(0 if total == 83 else 1)  # the normal way out
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(sum(len(t) for _, t in iterator))
        """,
        root,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "79"


def test_fork_while_a_transform_holds_the_global_random_state(root: Path) -> None:
    result = run_script(
        """
        import os, random, sys, time, warnings
        warnings.simplefilter("ignore")
        import torch
        from imagenet_seq import Loader
        def slow(image):
            time.sleep(0.02)
            return torch.tensor(random.random())
        loader = Loader(sys.argv[1], "train", slow, batch_size=4, num_workers=2)
        iterator = iter(loader)
        next(iterator)
        child = os.fork()
        if child == 0:
            own = Loader(sys.argv[1], "val", slow, batch_size=29, num_workers=2)
            os._exit(0 if len(list(own)) == 1 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        root,
    )
    assert result.stdout.strip() == "0", result.stderr


# ---- ranks ---------------------------------------------------------------------------------------

RANK_SCRIPT = """
import json, sys, zlib
import torch, torch.distributed as dist
from imagenet_seq import Loader
root, out, state_path, stop = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
dist.init_process_group("gloo")
loader = Loader(root, "train", batch_size=6, num_workers=2, dtype=torch.uint8)
val = Loader(root, "val", batch_size=4, num_workers=2, dtype=torch.uint8)
if state_path != "none":
    loader.load_state_dict(json.load(open(state_path)))

def run(loader, stop):
    seen, sizes = [], []
    for number, (images, target) in enumerate(loader):
        count = torch.tensor([len(target)])
        dist.all_reduce(count)  # hangs unless every rank has the same number of batches
        sizes.append([len(target), int(count)])
        seen += [[zlib.crc32(x.numpy().tobytes()), int(t)] for x, t in zip(images, target)]
        if number + 1 == stop:
            break
    return seen, sizes

train, sizes = run(loader, stop)
state = loader.state_dict()
validation, _ = run(val, -1)
rank = dist.get_rank()
json.dump({"train": train, "sizes": sizes, "val": validation, "state": state},
          open(f"{out}/{rank}.json", "w"))
dist.destroy_process_group()
"""


def torchrun(num_ranks: int, folder: Path, root: Path, state: Path | str, stop: int) -> list[dict]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(RANK_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(root), str(folder), str(state), str(stop)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def samples(ranks: list[dict], part: str) -> list[tuple]:
    return sorted(tuple(s) for rank in ranks for s in rank[part])


def test_two_ranks_stop_and_one_and_three_go_on(root: Path, tmp_path: Path) -> None:
    whole = torchrun(2, tmp_path / "whole", root, "none", -1)
    three = torchrun(3, tmp_path / "three", root, "none", -1)
    assert len(samples(three, "train")) == 81  # on three streams, two are left over
    for ranks, expected in ((whole, 82), (three, 81)):
        for rank in ranks:
            # What all_reduce counted in each batch: every rank took part, nothing came twice.
            assert sum(total for _, total in rank["sizes"]) == expected
        batches = zip(*(rank["sizes"] for rank in ranks), strict=True)
        assert all(len({total for _, total in batch}) == 1 for batch in batches)
    begun = torchrun(2, tmp_path / "begun", root, "none", 3)
    assert begun[0]["state"] == begun[1]["state"]
    assert begun[0]["state"]["samples_done"] == 36
    state = tmp_path / "state.json"
    state.write_text(json.dumps(begun[0]["state"]))
    # 83 samples on two streams: 82, and one left over.
    assert len(samples(whole, "train")) == 82
    for rank in range(2):
        assert whole[rank]["train"][: 3 * 6] == begun[rank]["train"]
    rest = sorted(set(samples(whole, "train")) - set(samples(begun, "train")))
    for num_ranks in (1, 2, 3):
        continued = torchrun(num_ranks, tmp_path / f"on{num_ranks}", root, state, -1)
        assert samples(continued, "train") == rest  # pixels included: the crops are the same
        assert len(samples(continued, "val")) == 29
        assert samples(continued, "val") == samples(whole, "val")
    resumed = [
        json.loads((tmp_path / "on2" / f"{rank}.json").read_text())["train"] for rank in range(2)
    ]
    assert [r["train"][3 * 6 :] for r in whole] == resumed  # the same ranks: the same order, too
