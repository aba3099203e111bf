"""NVML and GPM survive whatever the hardware refuses; what cannot be had is N/A with a reason."""

from __future__ import annotations

import os
import time

import pynvml
import pytest
from fake_nvml import FakeNvml

from splitwiser_lab.measure.monitor import Metric, Monitor
from splitwiser_lab.measure.sources import Source
from splitwiser_lab.measure.sources_cpu import CpuSource
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
