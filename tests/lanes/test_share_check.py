"""Every share is tried by a client of its own under one daemon; what a client cannot say is said for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_mps import control, daemon  # noqa: F401  fixtures

from splitwiser_lab.lanes import share_check
from splitwiser_lab.lanes.mps import MpsDaemon
from splitwiser_lab.lanes.share_check import ShareCheck, check_shares
from splitwiser_lab.model.products import ROWS

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="MPS is Linux's"),
    pytest.mark.usefixtures("no_process_left"),
]


def test_clients_answer_in_order_and_leave_the_daemon_alone(daemon: MpsDaemon) -> None:  # noqa: F811
    found = list(check_shares(daemon, [50, 25], device="cpu"))
    assert found == [ShareCheck(percent, 0, len(ROWS), {"float32": 0}) for percent in (50, 25)]
    assert all(share.right and str(share) == f"right ({len(ROWS)} products)" for share in found)
    assert daemon.ended(), "nobody holds it any more"


def test_a_client_that_fails_costs_its_share_only(
    daemon: MpsDaemon,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is started with its share in the environment, and what it complains of last is the reason."""
    client = tmp_path / "client"
    client.write_text(
        f"#!{sys.executable}\nimport os\nshare = os.environ['CUDA_MPS_ACTIVE_THREAD_PERCENTAGE']\n"
        "if share == '75': raise SystemExit('out of memory')\n"
        'print(\'{"sms": 33, "tried": 9, "wrong": {"bfloat16": 7, "float32": 0}}\')\n'
    )
    client.chmod(0o755)
    daemon.hold()  # it is started by Python, too
    monkeypatch.setattr(share_check.sys, "executable", str(client))
    first, second = check_shares(daemon, [75, 25])
    assert first.percent == 75 and not first.right and str(first) == "not known: out of memory"
    assert (second.sms, second.right, str(second)) == (33, False, "WRONG: 7 of 9 in bfloat16")


def test_whoever_stops_listening_leaves_no_client(daemon: MpsDaemon) -> None:  # noqa: F811
    for _ in check_shares(daemon, [50, 25, 75], device="cpu"):
        break
    assert daemon.ended()
