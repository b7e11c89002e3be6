"""Tuner: timing, choices, failing candidates, records."""

import gc
import logging
import threading
import time
import weakref

import pytest
import torch

from ddpm_fast.engine.autotune.cache import PlanCache, TunerChoice
from ddpm_fast.engine.autotune.tuner import CpuTimer, CudaTimer, Tuner

CPU = torch.device("cpu")
HERE = {"device": "a processor", "torch": "1"}


def cache(folder, **changes):
    return PlanCache(HERE | changes, folder)


def tuner(folder=None, **options):
    return Tuner(CPU, cache(folder), **options)


class CountedTimer:
    """Timer that returns seconds from a table and records the measurements."""

    def __init__(self, table):
        self.table = {name: list(values) for name, values in table.items()}
        self.measured = []

    def prepare(self, call):
        return call

    def seconds(self, prepared):
        name = prepared()
        self.measured.append(name)
        values = self.table[name]
        return values.pop(0) if len(values) > 1 else values[0]


def named(*names):
    return {name: (lambda name=name: name) for name in names}


def failing():
    raise RuntimeError("no such kernel\nand a long story")


def never():
    raise AssertionError("was run")


def test_chooses_the_fastest_and_logs_the_choice():
    slept = tuner()
    calls = {"slow": lambda: time.sleep(4e-3), "fast": lambda: None}
    assert slept.fastest("op", calls) == "fast"
    seconds = slept.seconds("op")
    assert seconds["slow"] >= 4e-3 > seconds["fast"] > 0
    assert slept.choices == {"op": TunerChoice("fast", seconds)}
    assert slept.seconds("other") == {}


def test_a_choice_without_memory_for_all_candidates_is_not_recorded(tmp_path):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Timer(CountedTimer):
        def prepare(self, call):
            if call is full:
                call()
            return call

    times = {"slow": [2.0], "fast": [1.0]}
    calls = named("slow", "fast")
    first = tuner(tmp_path, timer=Timer(times))
    assert first.fastest("op", calls | {"fast": full}) == "slow"
    assert tuner(tmp_path, timer=Timer(times)).fastest("op", calls) == "fast"


def test_compares_medians_of_interleaved_rounds():
    # a is slower at first and in the mean
    timer = CountedTimer({"a": [1.3, 9, 1, 1, 1], "b": [1.2]})
    assert tuner(rounds=5, timer=timer).fastest("op", named("a", "b")) == "a"
    assert timer.measured == ["a", "b"] * 5


def test_measures_slow_candidates_once():
    timer = CountedTimer({"a": [1.0], "b": [1.4], "c": [1.6]})
    assert tuner(rounds=3, timer=timer).fastest("op", named("c", "b", "a")) == "a"
    assert timer.measured == ["c", "b", "a", "b", "a", "b", "a"]


def test_a_failed_candidate_is_freed_at_once():
    class Memory:
        pass

    held = Memory()
    freed = weakref.ref(held)
    calls = {"good": lambda held=held: None, "bad": lambda held=held: failing()}
    gc.disable()
    try:
        assert tuner(rounds=1).fastest("op", calls) == "good"
        del held, calls
        assert freed() is None
    finally:
        gc.enable()


def test_a_failed_capture_restores_the_current_stream(monkeypatch):
    """torch's own context manager stays on its stream when ending a capture fails."""

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            pass

        synchronize = __enter__ = lambda self: self

        def __exit__(self, *_):
            pass

    outside = Stream()
    now = [outside]

    class Capture:
        def __init__(self, graph, pool=None, stream=None, capture_error_mode=None):
            assert pool is None  # one in which a capture failed takes no other

        def __enter__(self):
            now[0] = Stream()

        def __exit__(self, *_):
            raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Stream())
    monkeypatch.setattr(torch.cuda, "device", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Stream)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    timer = CudaTimer(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="invalidated"):
        timer.prepare(lambda: None)
    assert now == [outside]


def test_a_failing_candidate_is_left_out(caplog):
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        assert tuner(rounds=1).fastest("op", {"bad": failing, "good": lambda: None}) == "good"
    assert "without bad, which failed: RuntimeError: no such kernel" in caplog.text
    assert "long story" not in caplog.text


def test_raises_if_all_candidates_fail():
    with pytest.raises(RuntimeError, match="no candidate for 'op' runs: RuntimeError: no such"):
        tuner().fastest("op", {"bad": failing, "worse": failing})


def test_a_recorded_choice_runs_nothing(tmp_path):
    timer = CountedTimer({"a": [2.0], "b": [1.0]})
    first = tuner(tmp_path, timer=timer)
    assert first.fastest("op", named("a", "b")) == "b"
    later = tuner(tmp_path)
    assert later.fastest("op", {"a": never, "b": never, "new": never}) == "b"
    assert later.choices == first.choices


def test_a_recorded_choice_that_is_no_candidate_is_replaced(tmp_path):
    tuner(tmp_path, rounds=1).fastest("op", {"old": lambda: None})
    later = tuner(tmp_path, rounds=1)
    assert later.fastest("op", {"new": lambda: None}) == "new"
    assert cache(tmp_path).get("op").name == "new"
    # and so within one tuner
    assert later.fastest("op", {"newer": lambda: None}) == "newer"


def test_mode_off_takes_the_first_and_records_nothing(tmp_path):
    off = tuner(tmp_path, mode="off")
    assert off.fastest("op", {"first": never, "second": never}) == "first"
    assert off.choices == {"op": TunerChoice("first")}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "maybe"}, "mode must be one of on, off; got 'maybe'"),
        ({"rounds": 0}, "rounds must be an integer >= 1; got 0"),
        ({"prune_ratio": 0.5}, r"prune_ratio must be a number in \[1, inf\]; got 0.5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        tuner(**options)


def test_no_candidates_raise():
    with pytest.raises(ValueError, match="candidates must not be empty for 'op'"):
        tuner().fastest("op", {})


def test_timing_during_a_capture_raises(monkeypatch, tmp_path):
    tuner(tmp_path, rounds=1).fastest("known", {"a": lambda: None})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = Tuner(torch.device("cuda"), cache(tmp_path), timer=CpuTimer())
    with pytest.raises(RuntimeError, match=r"'op' is not chosen yet.*while a CUDA graph"):
        on_gpu.fastest("op", {"a": never})
    assert on_gpu.fastest("known", {"a": never}) == "a"


def test_threads_do_not_time_concurrently():
    class SlowTimer(CountedTimer):
        def seconds(self, prepared):
            time.sleep(5e-3)
            return super().seconds(prepared)

    timer = SlowTimer({"a": [1.0]})
    shared = tuner(rounds=3, timer=timer)
    threads = [threading.Thread(target=shared.fastest, args=("op", named("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.measured == ["a"] * 3


@pytest.mark.cuda
def test_times_on_a_gpu():
    device = torch.device("cuda", 0)
    small, large = (torch.zeros(1 << n, device=device) for n in (10, 26))
    on_gpu = Tuner(device, PlanCache({}, None))
    calls = {"large": lambda: large.add_(1), "small": lambda: small.add_(1), "bad": failing}
    assert on_gpu.fastest("op", calls) == "small"
    # 2 x 256 MB take longer than 20 us on any GPU, and less than 0.1 s.
    assert 2e-5 < on_gpu.seconds("op")["large"] < 0.1
