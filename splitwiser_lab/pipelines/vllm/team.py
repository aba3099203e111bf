"""The engines of one placement: settings computed, processes started, and ended together with their shared memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from splitwiser_lab.errors import HardwareError, LaneError, ModeError
from splitwiser_lab.hardware import free_memory_bytes
from splitwiser_lab.lanes.mps import MpsDaemon, MpsShare
from splitwiser_lab.lanes.support import index_of
from splitwiser_lab.pipelines.memory import settled_free_bytes
from splitwiser_lab.pipelines.team import daemon_for
from splitwiser_lab.pipelines.vllm.memory import BLOCK_SIZE, Work, kv_budget
from splitwiser_lab.pipelines.vllm.placement import EngineRole, VllmPlacement
from splitwiser_lab.pipelines.vllm.process import EngineProcess, check_version
from splitwiser_lab.pipelines.vllm.source import VllmModel

_START_SECONDS = 600.0  # a first start on a GPU compiles
_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}  # of a step, where prompts stay whole
_RAM_FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class EngineFacts:
    """What vLLM says of an engine once it runs: its version, the tokens that its KV cache and a block of it hold."""

    name: str
    version: str
    kv_tokens: int
    block_size: int


class Team:
    """Engines that run and wait for requests."""

    def __init__(self, python: str, placement: VllmPlacement, model: VllmModel, device: str, work: Work) -> None:
        """Start all engines, on a GPU one after the other, and wait until each is ready.

        Raises HardwareError with the sum when there is no room, ModeError for a vLLM that is missing or unknown,
        LaneError when an engine does not start.
        """
        self.placement, self.work = placement, work
        self.spawn_seconds: list[float] = []
        self.facts: list[EngineFacts] = []
        self._children: dict[str, EngineProcess] = {}
        self._python, self._model, self._device = python, model, torch.device(device)
        self._fd, self._folder = -1, None
        host = free_memory_bytes("cpu")
        self.budget = kv_budget(placement, model, device, work, settled_free_bytes(device), host)
        self._daemon: MpsDaemon | None = daemon_for(index_of(self._device)) if placement.mps else None
        try:
            self._prepare_hand_off()
            self._start(time.perf_counter())
        except BaseException:
            self.close()
            raise

    _folder: tempfile.TemporaryDirectory[str] | None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by the names of the engines."""
        return {name: child.pid for name, child in self._children.items()}

    @property
    def alive(self) -> bool:
        """Whether every engine can take requests."""
        return bool(self._children) and not any(c.gone or c.connection.poll() for c in self._children.values())

    def send(self, name: str, requests: list[dict[str, Any]]) -> None:
        """Give requests to an engine."""
        self._children[name].ask({"requests": requests})

    def wait(self, timeout: float | None) -> list[tuple[str, dict[str, Any]]]:
        """Steps of engines, at least one unless `timeout` seconds pass. Raises LaneError when one failed or died."""
        names = {child.connection: name for name, child in self._children.items()}
        ready = wait(list(names), timeout)
        return [(names[c], self._children[names[c]].hear()) for c in ready]  # type: ignore[index]

    def clear(self) -> None:
        """Remove what a run has handed over through files, so that the next finds none of it."""
        if self._folder is not None:
            for entry in Path(self._folder.name).iterdir():
                shutil.rmtree(entry, ignore_errors=True)

    def close(self) -> None:
        """End every engine; give back shared memory and files."""
        for child in self._children.values():
            child.let_go()
        for child in self._children.values():
            child.end()
        self._children.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    # -- starting

    def _prepare_hand_off(self) -> None:
        if self.placement.connector == "shared":
            if not hasattr(os, "memfd_create"):
                raise HardwareError("the connector 'shared' needs Linux's anonymous files: use connector='example'.")
            self._fd = os.memfd_create("splitwiser_lab")
            os.ftruncate(self._fd, max(1, self.budget.slots * self.budget.slot_bytes))
        elif self.placement.connector == "example":
            self._folder = _folder_for(self.work.requests * self.budget.slot_bytes)

    def _start(self, begun: float) -> None:
        together = self._device.type == "cpu"  # on a GPU vLLM measures memory, and neighbours would disturb it
        for role, cores, kv_bytes in zip(
            self.placement.roles, self.placement.cores(), self.budget.kv_bytes, strict=True
        ):
            inherited = [self._fd] if self._fd >= 0 else []
            share = MpsShare(self._daemon, role.sm_share) if self._daemon and role.sm_share else None
            child = EngineProcess(role.name, self._python, self._environment(), inherited, share)
            self._children[role.name] = child
            settings = {"engine_args": self._arguments(role, kv_bytes), "kv_transfer": self._transfer(role)}
            child.ask({**settings, "cores": cores if together else None})
            if not together:
                self._await_start(role.name, begun)
        for name in self._children if together else ():
            self._await_start(name, begun)

    def _await_start(self, name: str, begun: float) -> None:
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
        self.spawn_seconds.append(time.perf_counter() - begun)

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

    def _environment(self) -> dict[str, str]:
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        if self._device.type == "cpu":
            return own
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = index_of(self._device)
        only = seen[index] if index < len(seen) and seen[index] else str(index)
        return {"VLLM_USE_FLASHINFER_SAMPLER": "0", **own, "CUDA_VISIBLE_DEVICES": only}

    def _arguments(self, role: EngineRole, kv_bytes: int) -> dict[str, Any]:
        """What vLLM's EngineArgs get; equal in every mode but for what the mode is."""
        kind, most = self._device.type, self.work.total
        chunk = self.placement.chunk_tokens
        sequences = max(2, min(self.work.at_once, chunk or self.work.at_once))  # a step has a token for each
        whole = max(most, _BATCHED_TOKENS[kind]) if role.part == "both" else max(most, sequences)
        given: dict[str, Any] = {
            "model": str(self._model.folder),
            "dtype": self._model.dtype,
            "max_model_len": most,
            "max_num_seqs": sequences,
            # The prefill engine takes one longest prompt in a step, so that decoding begins while it goes on.
            "max_num_batched_tokens": chunk or whole,
            "enable_chunked_prefill": chunk is not None,
            "enable_prefix_caching": False,
            "enforce_eager": kind == "cpu",
            "kv_cache_memory_bytes": kv_bytes,
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "generation_config": "vllm",
            "disable_log_stats": False,  # else there are no request metrics
        }
        if self._model.random_weights:
            given["load_format"] = "dummy"
        if self.placement.mode == "split":
            given["disable_hybrid_kv_cache_manager"] = True
        if kind == "cpu":
            given["block_size"] = BLOCK_SIZE[kind]
        else:
            total = torch.cuda.get_device_properties(self._device).total_memory
            given["gpu_memory_utilization"] = round(min(0.9, (kv_bytes + self._model.weight_bytes) / total + 0.02), 3)
        return given

    def _transfer(self, role: EngineRole) -> dict[str, Any] | None:
        if self.placement.connector is None:
            return None
        shared = self.placement.connector == "shared"
        return {
            "kv_connector": "SharedConnector" if shared else "FolderConnector",
            "kv_connector_module_path": "splitwiser_shared" if shared else "splitwiser_folder",
            "kv_role": "kv_producer" if role.part == "prefill" else "kv_consumer",
            "kv_connector_extra_config": (
                {"fd": self._fd} if shared else {"shared_storage_path": self._folder.name if self._folder else ""}
            ),
        }


def _folder_for(nbytes: int) -> tempfile.TemporaryDirectory[str]:
    """A folder in memory with room for this much, else one among the temporary files. Raises HardwareError."""
    for place in (_RAM_FOLDER, Path(tempfile.gettempdir())):
        if place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > nbytes:
            return tempfile.TemporaryDirectory(prefix="splitwiser-kv-", dir=place, ignore_cleanup_errors=True)
    raise HardwareError(
        f"the connector 'example' needs {nbytes / 2**20:.0f} MiB of files for keys and values, and neither "
        f"{_RAM_FOLDER} nor {tempfile.gettempdir()} has that much room: use connector='shared'."
    )
