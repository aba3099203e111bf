"""A CPU tells its cores, memory and traffic; what cannot be had is N/A with a reason."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from splitwiser_lab.hardware import cores
from splitwiser_lab.measure.sources import Family, Source
from splitwiser_lab.measure.sources_cpu import CpuSource, core_key


def reasons(source: Source) -> dict[str, str]:
    return {metric.key: metric.reason for metric in source.metrics() if metric.reason}


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
