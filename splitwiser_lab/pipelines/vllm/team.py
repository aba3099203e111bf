"""The engines of one placement: settings computed, processes started, and ended together with their shared memory."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from splitwiser_lab.errors import LaneError, ModeError
from splitwiser_lab.hardware import free_memory_bytes
from splitwiser_lab.lanes.mps import MpsDaemon, MpsShare
from splitwiser_lab.lanes.support import index_of
from splitwiser_lab.model import products
from splitwiser_lab.pipelines.memory import settled_free_bytes
from splitwiser_lab.pipelines.team import daemon_for
from splitwiser_lab.pipelines.vllm.arguments import Kind, engine_arguments, kind_of
from splitwiser_lab.pipelines.vllm.memory import Work, folder_for, kv_budget
from splitwiser_lab.pipelines.vllm.placement import EngineRole, VllmPlacement
from splitwiser_lab.pipelines.vllm.process import EngineProcess, check_version, engine_environment
from splitwiser_lab.pipelines.vllm.settings import EngineSettings
from splitwiser_lab.pipelines.vllm.source import VllmModel
from splitwiser_lab.shared_memory import Buffer, DeviceHandle, allocate

_START_SECONDS = 600.0  # a first start on a GPU compiles
_Start = Callable[[], None]


@dataclass(frozen=True)
class EngineFacts:
    """What vLLM says of an engine once it runs: its version, the tokens that its KV cache and a block of it hold."""

    name: str
    version: str
    kv_tokens: int
    block_size: int


class Team:
    """Engines that run and wait for requests."""

    def __init__(
        self,
        python: str,
        placement: VllmPlacement,
        model: VllmModel,
        device: str,
        work: Work,
        settings: EngineSettings,
    ) -> None:
        """Start all engines; `await_ready` waits until each can take requests.

        On a GPU the first of its kind compiles; the others start once it has, by `start_rest`, and find the result.
        Raises HardwareError with the sum when there is no room, ModeError for a vLLM that is missing or unknown,
        LaneError when an engine does not start.
        """
        self.placement, self.work = placement, work
        self.spawn_seconds: list[float] = []
        self.facts: list[EngineFacts] = []
        self._children: dict[str, EngineProcess] = {}
        self._python, self._model, self._device, self._settings = python, model, torch.device(device), settings
        self._buffer, self._folder = None, None
        self._begun, self._waiting = time.perf_counter(), list[str]()  # names of engines that were not waited for
        self._later: list[tuple[Kind, str, _Start]] = []
        host = free_memory_bytes("cpu")
        self.budget = kv_budget(placement, model, device, work, settled_free_bytes(device), host)
        self._daemon: MpsDaemon | None = daemon_for(index_of(self._device)) if placement.mps else None
        try:
            self._prepare_hand_off()
            self._start()
        except BaseException:
            self.close()
            raise

    def start_rest(self) -> None:
        """Start the engines that were left for later, each as soon as the first of its kind has compiled."""
        try:
            while self._later:
                kind, name, start = self._later[0]
                _await_first(kind)
                _first.setdefault(kind, (self, name))  # the one that was the first may have failed
                start()
                del self._later[0]
        except BaseException:
            self.close()
            raise

    def await_ready(self) -> None:
        """Wait until every engine can take requests. Raises as the constructor does; then all have ended."""
        self.start_rest()
        try:
            while self._waiting:
                self._await_start(self._waiting[0])
        except BaseException:
            self.close()
            raise

    _buffer: Buffer | None
    _folder: tempfile.TemporaryDirectory[str] | None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by the names of the engines."""
        return {name: child.pid for name, child in self._children.items()}

    @property
    def alive(self) -> bool:
        """Whether every engine can take requests."""
        awaited = (child for name, child in self._children.items() if name not in self._waiting)
        words = any(child.connection.poll() for child in awaited)  # the others may tell of their start
        some = bool(self._children or self._later)
        return some and not words and not any(child.gone for child in self._children.values())

    def send(self, name: str, requests: list[dict[str, Any]]) -> None:
        """Give requests to an engine."""
        self._children[name].ask({"requests": requests})

    def wait(self, timeout: float | None) -> list[tuple[str, dict[str, Any]]]:
        """Steps of engines, at least one unless `timeout` seconds pass. Raises LaneError when one failed or died."""
        names = {child.connection: name for name, child in self._children.items()}
        ready = wait(list(names), timeout)
        return [(names[c], self._children[names[c]].hear()) for c in ready]  # type: ignore[index]

    def moved(self) -> list[list[Any]]:
        """`[what, bytes, seconds, request]` of all that the run which has ended handed over."""
        told: list[list[Any]] = []
        for child in self._children.values() if self.placement.connector else ():
            child.ask({"moved": True})
            while (said := child.hear())["kind"] != "moved":  # a last step, without a token
                pass
            told += said["moved"]
        return told

    def clear(self) -> None:
        """Remove what a run has handed over through files, so that the next finds none of it."""
        if self._folder is not None:
            for entry in Path(self._folder.name).iterdir():
                shutil.rmtree(entry, ignore_errors=True)

    def close(self) -> None:
        """End every engine; give back shared memory and files."""
        for kind in [kind for kind, first in _first.items() if first and first[0] is self]:
            del _first[kind]  # it has compiled nothing
        self._waiting.clear()
        self._later.clear()
        for child in self._children.values():
            child.let_go()
        for child in self._children.values():
            child.end()
        self._children.clear()
        self._buffer = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    # -- starting

    def _prepare_hand_off(self) -> None:
        if self.placement.connector == "shared":
            self._buffer = allocate(max(1, self.budget.slots * self.budget.slot_bytes), str(self._device))
        elif self.placement.connector == "example":
            self._folder = folder_for(self.work.requests * self.budget.slot_bytes)

    def _start(self) -> None:
        on_cpu = self._device.type == "cpu"
        handle = self._buffer.export() if self._buffer else None
        inherited = [handle] if isinstance(handle, int) else []
        for role, cores, kv_bytes in zip(
            self.placement.roles, self.placement.cores(), self.budget.kv_bytes, strict=True
        ):
            arguments = engine_arguments(
                self._model, self.placement, role, self.work, self._settings, self._device, kv_bytes
            )
            start = partial(self._start_one, role, arguments, cores if on_cpu else None, inherited)
            kind = None if on_cpu or arguments["enforce_eager"] else kind_of(arguments, self.placement)
            if kind is not None and _compiling(kind):
                self._later.append((kind, role.name, start))
                continue
            if kind is not None:
                _first.setdefault(kind, (self, role.name))
            start()

    def _start_one(
        self, role: EngineRole, arguments: dict[str, Any], cores: list[int] | None, inherited: list[int]
    ) -> None:
        share = MpsShare(self._daemon, role.sm_share) if self._daemon and role.sm_share else None
        child = EngineProcess(
            role.name, self._python, engine_environment(self._device), inherited, share, self._model.folder.parent
        )
        self._children[role.name] = child
        settings = {"engine_args": arguments, "kv_transfer": self._transfer(role)}
        child.ask({**settings, "cores": cores, "products": self._products(role)})
        self._waiting.append(role.name)

    def _await_start(self, name: str) -> None:
        child = self._children[name]
        version = self._version(child, name)
        try:
            ready = self._hear(child, name)
        except LaneError as error:
            if missing := self._connector_missing(version, error):
                raise missing from error
            raise
        pages = -(-self.work.prompt // ready["block_size"])
        if self.placement.connector == "shared" and pages * ready["page_bytes"] > self.budget.slot_bytes:
            raise LaneError(
                f"engine {name!r} keeps {ready['page_bytes']} bytes in a block of {ready['block_size']} tokens, more "
                "than its configuration says: use connector='example' for this model."
            )
        self.facts.append(EngineFacts(name, version, ready["kv_blocks"] * ready["block_size"], ready["block_size"]))
        self.spawn_seconds.append(time.perf_counter() - self._begun)
        self._waiting.remove(name)
        for kind in [kind for kind, first in _first.items() if first == (self, name)]:
            _first[kind] = None

    def _version(self, child: EngineProcess, name: str) -> str:
        try:
            version = str(self._hear(child, name)["version"])
        except LaneError as error:
            if "ModuleNotFoundError" not in str(error):
                raise
            raise ModeError(
                f"{self._python} has no vLLM: set one up by `make vllm`, or name another Python."
            ) from error
        check_version(version, self._python)
        return version

    def _connector_missing(self, version: str, error: LaneError) -> ModeError | None:
        """What to say when a connector, not the engine, is what failed to start; None otherwise."""
        told = str(error).splitlines()[0]
        if self.placement.connector is None or not ("ImportError" in told or "onnector" in told):
            return None
        other = "shared" if self.placement.connector == "example" else "example"
        return ModeError(
            f"vLLM {version} cannot use the connector {self.placement.connector!r} ({told}): try connector={other!r}."
        )

    def _hear(self, child: EngineProcess, name: str) -> dict[str, Any]:
        if not child.connection.poll(_START_SECONDS):
            raise LaneError(f"vLLM's {name} did not start within {_START_SECONDS:.0f} s.")
        return child.hear()

    def _products(self, role: EngineRole) -> dict[str, Any] | None:
        """What an engine with some of a GPU's SMs multiplies before it starts; None for the others."""
        if self._device.type == "cpu" or role.sm_share in (None, 100):
            return None
        order = {"shapes": self._model.products, "dtype": self._model.dtype, "share": role.sm_share}
        return {**order, "program": products.__file__, "advice": products.ANOTHER_PART}

    def _transfer(self, role: EngineRole) -> dict[str, Any] | None:
        if self.placement.connector is None:
            return None
        shared = self.placement.connector == "shared"
        return {
            "kv_connector": "SharedConnector" if shared else "FolderConnector",
            "kv_connector_module_path": "splitwiser_shared" if shared else "splitwiser_folder",
            "kv_role": "kv_producer" if role.part == "prefill" else "kv_consumer",
            "kv_connector_extra_config": (
                {"memory": _described(self._buffer)}
                if shared
                else {"shared_storage_path": self._folder.name if self._folder else ""}
            ),
        }


def _described(buffer: Buffer | None) -> dict[str, Any]:
    """How an engine finds this memory: see engine_side/splitwiser_memory.py."""
    assert buffer is not None
    handle = buffer.export()
    if isinstance(handle, DeviceHandle):
        return {"handle": handle.allocation.hex(), "offset": handle.offset, "nbytes": buffer.nbytes}
    return {"fd": handle}


_first: dict[Kind, tuple[Team, str] | None] = {}  # who compiles for a kind, or None: somebody has


def _compiling(kind: Kind) -> bool:
    """Whether an engine of this kind, of whatever team, is starting for the first time."""
    team, name = _first.get(kind) or (None, "")
    return team is not None and name in team._waiting


def _await_first(kind: Kind) -> None:
    """Wait for it. Raises as `await_ready`; then all engines of its team have ended."""
    team, name = _first.get(kind) or (None, "")
    if team is None or name not in team._waiting:
        return
    try:
        team._await_start(name)
    except BaseException:
        team.close()
        raise
