"""The monitor fills its buffer on the clock of the spans, and says what its watching cost."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from splitwiser_lab import HardwareError, SplitwiserError
from splitwiser_lab.measure.monitor import Metric, Monitor, open_sources
from splitwiser_lab.measure.sources_cpu import CpuSource


class Counting:
    """A source that counts its readings."""

    def __init__(self) -> None:
        self.count = 0
        self.closed = 0

    def metrics(self) -> list[Metric]:
        return [Metric("count", "readings", "1"), Metric("never", "never there", "1", reason="as a test")]

    def read(self) -> Mapping[str, float | None]:
        self.count += 1
        return {"count": float(self.count), "never": None}

    def close(self) -> None:
        self.closed += 1


class TestMonitor:
    def test_samples_come_in_order_on_the_clock_of_the_spans(self):
        source, before = Counting(), time.perf_counter()
        with Monitor(interval_s=0.002, sources=[source]) as monitor:
            while source.count < 5:
                time.sleep(0.001)
        times = [sample.time for sample in monitor.samples]
        assert times == sorted(times) and before < times[0] and times[-1] < time.perf_counter()
        assert [sample.values["count"] for sample in monitor.samples] == list(range(1, source.count + 1))
        assert monitor.latest == monitor.samples[-1]

    def test_the_ring_forgets_the_oldest(self):
        source = Counting()
        with Monitor(interval_s=0.001, sources=[source], keep=3) as monitor:
            while source.count < 6:
                time.sleep(0.001)
        assert [sample.values["count"] for sample in monitor.samples] == list(range(source.count - 2, source.count + 1))

    def test_stopping_takes_a_last_sample_and_closes_the_sources_once(self):
        source = Counting()
        monitor = Monitor(interval_s=1000.0, sources=[source])
        monitor.start()
        monitor.stop()
        monitor.stop()
        assert (source.count, source.closed) in ((1, 1), (2, 1))
        assert monitor.samples

    def test_a_second_start_is_refused_with_the_way_out(self):
        with Monitor(sources=[Counting()]) as monitor, pytest.raises(SplitwiserError, match="make a new one"):
            monitor.start()

    @pytest.mark.parametrize("wrong", [{"interval_s": 0.0}, {"interval_s": float("nan")}, {"keep": 0}])
    def test_impossible_settings_are_refused(self, wrong: dict[str, float]):
        with pytest.raises(SplitwiserError, match="positive interval"):
            Monitor(sources=[], **wrong)

    def test_a_device_that_is_not_there_is_refused(self):
        with pytest.raises(HardwareError, match="not there"):
            Monitor("cuda:99")

    def test_tags_choose_the_samples_that_count(self):
        source = Counting()
        with Monitor(interval_s=0.001, sources=[source]) as monitor:
            with monitor.tag("early"):
                while source.count < 4:
                    time.sleep(0.001)
            with monitor.tag("late"):
                while source.count < 20:
                    time.sleep(0.001)
        early, late, whole = (monitor.mean("count", tag) for tag in ("early", "late", None))
        assert early is not None and late is not None and whole is not None
        assert early < whole < late
        assert [tag.name for tag in monitor.tags] == ["early", "late"]
        assert monitor.mean("count", "other") is None and monitor.mean("never") is None

    def test_rows_tell_what_is_missing_and_what_the_watching_cost(self):
        with Monitor(interval_s=0.001, sources=[Counting()]) as monitor:
            time.sleep(0.01)
        count, never, itself = monitor.rows()
        assert count["mean"] > 0 and count["N/A because"] == ""
        assert never["mean"] is None and never["N/A because"] == "as a test"
        assert itself["metric"] == "the monitor itself" and itself["mean"] == pytest.approx(100 * monitor.overhead)

    def test_a_series_leaves_out_what_was_not_there(self):
        with Monitor(interval_s=1000.0, sources=[Counting()]) as monitor:
            pass
        times, values = monitor.series("count")
        assert values[0] == 1.0 and len(times) == len(values)
        assert monitor.series("never") == ([], []) == monitor.series("no such metric")
        assert monitor.series("count", since=time.perf_counter()) == ([], [])

    def test_a_slow_source_is_asked_less_often(self):
        class Slow(Counting):
            def read(self) -> Mapping[str, float | None]:
                end = time.thread_time() + 0.005
                while time.thread_time() < end:
                    pass
                return super().read()

        source = Slow()
        with Monitor(interval_s=0.001, sources=[source]) as monitor:
            time.sleep(0.3)
        assert source.count <= 2, "5 ms of work each must rest 500 ms to stay within 1 %"
        assert monitor.overhead > 0


def test_a_cpu_has_its_cores():
    (source,) = open_sources("cpu")
    assert isinstance(source, CpuSource)
