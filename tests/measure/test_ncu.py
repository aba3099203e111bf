"""Nsight Compute: the command that is printed, and CSV files as it writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitwiser_lab import RecordingError
from splitwiser_lab.cli import app
from splitwiser_lab.measure.ncu import ncu_command, read_ncu, summed

HEADING = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
SM, DRAM = (f"{unit}__throughput.avg.pct_of_peak_sustained_elapsed" for unit in ("sm", "dram"))
TIME = "gpu__time_duration.sum"


def line(number: int, kernel: str, metric: str, unit: str, value: str) -> str:
    return (
        f'"{number}","77","python","127.0.0.1","{kernel}","1","7","(128, 1, 1)","(96, 8, 1)","0","9.0",'
        f'"Command line profiler metrics","{metric}","{unit}","{value}"'
    )


def kernel(number: int, name: str, time: tuple[str, str], sm: str, dram: str) -> list[str]:
    return [
        line(number, name, DRAM, "%", dram),
        line(number, name, TIME, *time),
        line(number, name, SM, "%", sm),
    ]


PRODUCT = kernel(0, "void gemm<float, int>(T1, T2)", ("us", "1,500.5"), "80.25", "20")
SMALL = kernel(1, "elementwise", ("nsecond", "499500"), "5", "60")


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    path = tmp_path / "decode.csv"
    path.write_text(
        "\n".join(['==PROF== Profiling "gemm": 0%....100% - 3 passes', "loading", HEADING, *PRODUCT, *SMALL])
    )
    return path


def test_kernels_are_read_with_their_units(counted: Path) -> None:
    product, small = read_ncu(counted)
    assert product.name == "void gemm<float, int>(T1, T2)"
    assert (product.seconds, product.sm_percent, product.dram_percent) == (pytest.approx(1.5005e-3), 80.25, 20.0)
    assert small.seconds == pytest.approx(0.4995e-3)


def test_the_sum_weights_by_time(counted: Path) -> None:
    total = summed(read_ncu(counted))
    assert total.seconds == pytest.approx(2e-3)
    assert total.sm_percent == pytest.approx((80.25 * 1.5005 + 5 * 0.4995) / 2)
    assert total.dram_percent == pytest.approx((20 * 1.5005 + 60 * 0.4995) / 2)
    with pytest.raises(RecordingError, match="no kernels"):
        summed([])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["==ERROR== ERR_NVGPUCTRPERM - no permission"], "ERR_NVGPUCTRPERM - no permission.*an administrator"),
        (["nothing of ncu"], "it is no CSV of ncu"),
        ([HEADING, *PRODUCT[:2]], r"kernel 0 \(void gemm.*has no sm__throughput"),
        ([HEADING, *kernel(3, "k", ("us", "1"), "n/a", "2")], r"kernel 3 \(k\) has 'n/a' % for sm__throughput"),
        ([HEADING, *kernel(3, "k", ("cycle", "1"), "1", "2")], r"'1' cycle for gpu__time_duration"),
    ],
)
def test_files_without_figures_say_what_is_wrong(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(RecordingError, match=message):
        read_ncu(path)


def test_the_command_asks_for_what_is_read_and_runs_one_pass() -> None:
    words = ncu_command("prefill", "p.csv", ["--batch", "20"])
    assert words[words.index("--nvtx-include") + 1] == "prefill/"
    assert set(words[words.index("--metrics") + 1].split(",")) == {SM, DRAM, TIME}
    ours = words[words.index("splitwiser-lab") + 1 :]
    assert ours == ["reproduce", "--only-phases", "--phase-seconds", "0", "--batch", "20"]


def test_the_command_line_shows_the_longest_kernels(counted: Path) -> None:
    result = CliRunner().invoke(app, ["ncu", str(counted), "--longest", "1"])
    assert result.exit_code == 0, result.output
    assert "all 2 kernels" in result.stdout and "gemm" in result.stdout and "elementwise" not in result.stdout
