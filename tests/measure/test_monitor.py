"""The monitor fills its buffer and survives whatever the hardware refuses; what cannot be had is N/A with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pynvml
import pytest
from fake_nvml import FakeNvml

from splitwiser_lab import HardwareError, SplitwiserError
from splitwiser_lab.hardware import cores
from splitwiser_lab.measure.monitor import Metric, Monitor, open_sources
from splitwiser_lab.measure.sources import Family, Source
from splitwiser_lab.measure.sources_cpu import CpuSource, core_key
from splitwiser_lab.measure.sources_gpm import GpmSource
from splitwiser_lab.measure.sources_nvml import NvmlDevice, NvmlSource

LOST = pynvml.NVMLError_GpuIsLost()
REFUSED = pynvml.NVMLError_NoPermission()
ABSENT = pynvml.NVMLError_NotSupported()
NVML_VALUES = {
    "gpu": 10.0,  # the last of the driver's buffered samples
    "memory_controller": 35.0,
    "memory": 5.0,
    "process_memory": 1.5,
    "power": 412.5,
    "sm_clock": 1755.0,
    "memory_clock": 3201.0,
    "temperature": 54.0,
}
GPM_VALUES = {"sm": 61.0, "occupancy": 23.5, "tensor": 40.25, "dram": 88.0}
QUESTIONS = {  # what to break -> the metrics that go with it, when the driver has no samples of its own
    "nvmlDeviceGetUtilizationRates": {"gpu", "memory_controller"},
    "nvmlDeviceGetMemoryInfo": {"memory"},
    "nvmlDeviceGetComputeRunningProcesses": {"process_memory"},
    "nvmlDeviceGetPowerUsage": {"power"},
    "nvmlDeviceGetClockInfo": {"sm_clock", "memory_clock"},
    "nvmlDeviceGetTemperature": {"temperature"},
}


def reasons(source: Source) -> dict[str, str]:
    return {metric.key: metric.reason for metric in source.metrics() if metric.reason}


def metric(source: Source, key: str) -> Metric:
    return next(metric for metric in source.metrics() if metric.key == key)


@pytest.fixture
def nvml() -> FakeNvml:
    return FakeNvml(pids=(os.getpid(),))


@pytest.fixture
def gpu(nvml: FakeNvml) -> NvmlSource:
    return NvmlSource(NvmlDevice(nvml, "GPU-1"))


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
        assert count["mean"] > 0 and count["N/A because"] is None
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


class TestCpu:
    def test_tells_every_core_and_the_memory_within_their_ceilings(self):
        source = CpuSource()
        time.sleep(0.1)
        values = source.read()
        for each in source.metrics():
            value = values[each.key]
            assert (value is None) == bool(each.reason)
            assert value is None or each.ceiling is None or 0 <= value <= each.ceiling
        assert {"cpu", "process", "memory", *map(core_key, cores())} <= set(values)

    def test_work_in_this_process_shows(self):
        source = CpuSource(only_load=True)
        end = time.thread_time() + 0.15
        while time.thread_time() < end:
            pass
        values = source.read()
        assert set(values) == {"cpu", "process"}
        assert values["process"] is not None and values["process"] > 0

    def test_memory_traffic_is_read_where_it_is_counted(self, tmp_path: Path):
        counters = [tmp_path / "mon_data" / f"mon_L3_0{socket}" / "mbm_total_bytes" for socket in range(2)]
        for counter in counters:
            counter.parent.mkdir(parents=True)
            counter.write_text("1000\n")
        source = CpuSource(resctrl=tmp_path)
        time.sleep(0.06)
        counters[1].write_text("3000001000\n")
        traffic = source.read()["memory_bandwidth"]
        assert traffic is not None and 0 < traffic < 3.0 / 0.06
        assert "memory_bandwidth" not in reasons(source)

    def test_memory_traffic_is_not_invented_where_it_is_not(self, tmp_path: Path):
        source = CpuSource(resctrl=tmp_path)
        assert source.read()["memory_bandwidth"] is None
        assert "no counter of memory traffic" in reasons(source)["memory_bandwidth"]

    def test_a_counter_without_the_right_to_read_it_is_not_available(self, tmp_path: Path):
        (tmp_path / "mon_data" / "mon_L3_00" / "mbm_total_bytes").mkdir(parents=True)  # reading it raises OSError
        source = CpuSource(resctrl=tmp_path)
        assert source.read()["memory_bandwidth"] is None and reasons(source)["memory_bandwidth"]

    def test_a_dead_process_does_not_hide_the_living(self, monkeypatch: pytest.MonkeyPatch):
        child = subprocess.Popen([sys.executable, "-c", "pass"])
        dead = psutil.Process(child.pid)
        child.wait()
        monkeypatch.setattr(Family, "processes", lambda self: [psutil.Process(), dead])
        source = CpuSource(only_load=True)
        time.sleep(0.06)
        assert source.read()["process"] is not None

    def test_two_readings_at_once_do_not_make_noise(self):
        source = CpuSource()
        time.sleep(0.06)
        assert source.read() == source.read()


class TestNvml:
    def test_every_value_comes_in_its_unit(self, gpu: NvmlSource):
        assert gpu.read() == NVML_VALUES
        assert not reasons(gpu)
        ceilings = {metric.key: metric.ceiling for metric in gpu.metrics()}
        assert ceilings["memory"] == 141.0 and ceilings["power"] == 700.0 and ceilings["temperature"] == 87.0
        assert ceilings["sm_clock"] == 1980.0

    def test_the_gpu_is_found_by_its_own_name(self, nvml: FakeNvml):
        assert NvmlDevice(nvml, "GPU-7").handle == "handle of GPU-7"
        assert NvmlDevice(nvml, None, 3).handle == "handle of 3"

    @pytest.mark.parametrize("error", [ABSENT, LOST, REFUSED, pynvml.NVMLError_Unknown()], ids=str)
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_each_metric_can_be_missing_alone(self, nvml: FakeNvml, question: str, error: Exception):
        nvml.broken = {question: error, "nvmlDeviceGetSamples": ABSENT}
        source = NvmlSource(NvmlDevice(nvml, "GPU-1"))
        values = source.read()
        assert {key for key, value in values.items() if value is None} == QUESTIONS[question]
        assert reasons(source) == dict.fromkeys(QUESTIONS[question], str(error))

    def test_a_lost_gpu_is_not_available_and_may_come_back(self, nvml: FakeNvml, gpu: NvmlSource):
        gpu.read()
        nvml.broken = {"all": LOST}
        assert set(gpu.read().values()) == {None}
        assert set(reasons(gpu).values()) == {str(LOST)}
        nvml.broken = {}
        assert gpu.read()["power"] == 412.5 and not reasons(gpu)

    def test_what_is_refused_for_good_is_not_asked_again(self, nvml: FakeNvml, gpu: NvmlSource):
        nvml.broken = {"nvmlDeviceGetPowerUsage": REFUSED}
        for _ in range(3):
            assert gpu.read()["power"] is None
        assert nvml.calls.count("nvmlDeviceGetPowerUsage") == 1

    def test_the_drivers_own_samples_are_averaged(self, nvml: FakeNvml, gpu: NvmlSource):
        assert gpu.read()["gpu"] == 10.0, "of the past, only the newest"
        nvml.buffer += [(3_000, 20), (4_000, 60)]
        assert gpu.read()["gpu"] == 40.0
        assert "mean of the driver's own samples" in metric(gpu, "gpu").source
        assert gpu.read()["gpu"] == 97.0, "with no new one, the value of the moment"
        assert "value of the moment" in metric(gpu, "gpu").source

    def test_memory_of_other_processes_is_not_taken_for_ours(self):
        source = NvmlSource(NvmlDevice(FakeNvml(pids=()), "GPU-1"))
        assert source.read()["process_memory"] is None
        assert "process numbers differ" in reasons(source)["process_memory"]

    @pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
    def test_without_a_driver_everything_is_not_available(self, nvml: FakeNvml, broken: str):
        nvml.broken = {broken: pynvml.NVMLError_DriverNotLoaded()}
        device = NvmlDevice(nvml, "GPU-1")
        gpm, source = GpmSource(device), NvmlSource(device)
        assert set(source.read().values()) == set(gpm.read().values()) == {None}
        assert all("Driver Not Loaded" in reason for reason in {**reasons(source), **reasons(gpm)}.values())
        assert set(reasons(source)) == set(NVML_VALUES) and set(reasons(gpm)) == set(GPM_VALUES)
        source.close()
        assert nvml.users == 0


class TestGpm:
    def test_values_are_means_between_samples_far_enough_apart(self, nvml: FakeNvml):
        source = GpmSource(NvmlDevice(nvml, "GPU-1"))
        assert set(source.read().values()) == {None}, "one sample is no stretch of time"
        assert set(source.read().values()) == {None}
        for _ in range(2):
            time.sleep(0.11)
            assert source.read() == GPM_VALUES
            assert source.read() == GPM_VALUES, "between two samples the last value stands"
        assert len(nvml.gpm_times) == 2
        assert all(newer - older >= 0.1 for older, newer in nvml.gpm_times)
        assert nvml.gpm_times[0][1] == nvml.gpm_times[1][0], "no time is left out"

    def test_an_older_gpu_has_none(self):
        source = GpmSource(NvmlDevice(FakeNvml(gpm=False), "GPU-1"))
        assert set(source.read().values()) == {None}
        assert all("Hopper" in reason for reason in reasons(source).values())

    def test_an_older_driver_has_none(self, nvml: FakeNvml):
        nvml.broken = {"nvmlGpmQueryDeviceSupport": pynvml.NVMLError_FunctionNotFound()}
        source = GpmSource(NvmlDevice(nvml, "GPU-1"))
        assert set(source.read().values()) == {None} and set(reasons(source)) == set(GPM_VALUES)

    def test_one_counter_can_be_missing_alone(self, nvml: FakeNvml):
        nvml.missing_gpm = {pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL}
        source = GpmSource(NvmlDevice(nvml, "GPU-1"))
        source.read()
        time.sleep(0.11)
        assert source.read() == {**GPM_VALUES, "tensor": None}
        assert set(reasons(source)) == {"tensor"}

    @pytest.mark.parametrize(("error", "comes_back"), [(LOST, True), (REFUSED, False)], ids=["lost", "no rights"])
    def test_a_failure_in_mid_run_is_not_available(self, nvml: FakeNvml, error: Exception, comes_back: bool):
        source = GpmSource(NvmlDevice(nvml, "GPU-1"))
        source.read()
        nvml.broken = {"nvmlGpmSampleGet": error}
        time.sleep(0.11)
        assert set(source.read().values()) == {None}
        assert set(reasons(source).values()) == {str(error)}
        nvml.broken = {}
        source.read()
        time.sleep(0.11)
        assert source.read() == (GPM_VALUES if comes_back else dict.fromkeys(GPM_VALUES))

    def test_closing_frees_the_samples_and_the_library(self, nvml: FakeNvml):
        device = NvmlDevice(nvml, "GPU-1")
        source = GpmSource(device)
        source.read()
        source.close()
        device.close()
        device.close()
        assert nvml.calls.count("nvmlGpmSampleFree") == 2 and nvml.users == 0


def test_a_whole_gpu_is_watched_without_one_name_used_twice(nvml: FakeNvml):
    device = NvmlDevice(nvml, "GPU-1")
    sources: list[Source] = [GpmSource(device), NvmlSource(device), CpuSource(only_load=True)]
    with Monitor(interval_s=0.12, sources=sources) as monitor:
        time.sleep(0.3)
    keys = [metric.key for metric in monitor.metrics]
    assert len(keys) == len(set(keys)) == len(GPM_VALUES) + len(NVML_VALUES) + 2
    values = monitor.samples[-1].values
    assert {key: values[key] for key in GPM_VALUES} == GPM_VALUES
    assert values["power"] == 412.5 and nvml.users == 0


def test_a_cpu_has_its_cores():
    (source,) = open_sources("cpu")
    assert isinstance(source, CpuSource)
