"""splitwiser_lab: split an LLM's prefill and decode onto one device, and see what it does.

Names are loaded when first used, so that `import splitwiser_lab` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitwiser_lab.engine.engine import Engine
    from splitwiser_lab.engine.modes import supported_modes
    from splitwiser_lab.errors import (
        GenerationError,
        HardwareError,
        LaneError,
        ModeError,
        ModelError,
        RecordingError,
        RequestError,
        SplitwiserError,
        WorkloadError,
    )
    from splitwiser_lab.measure.compare import compare
    from splitwiser_lab.measure.doctor import doctor
    from splitwiser_lab.measure.recording import Recording
    from splitwiser_lab.measure.workload import Workload
    from splitwiser_lab.metrics import Metrics
    from splitwiser_lab.pipelines.huggingface import HuggingFacePipeline
    from splitwiser_lab.pipelines.vllm.pipeline import VllmPipeline
    from splitwiser_lab.timeline import Timeline

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine.engine",
    "HuggingFacePipeline": "pipelines.huggingface",
    "VllmPipeline": "pipelines.vllm.pipeline",
    "supported_modes": "engine.modes",
    "compare": "measure.compare",
    "doctor": "measure.doctor",
    "Recording": "measure.recording",
    "Workload": "measure.workload",
    "Metrics": "metrics",
    "Timeline": "timeline",
    "GenerationError": "errors",
    "HardwareError": "errors",
    "LaneError": "errors",
    "ModeError": "errors",
    "ModelError": "errors",
    "RecordingError": "errors",
    "RequestError": "errors",
    "SplitwiserError": "errors",
    "WorkloadError": "errors",
}

__all__ = [
    "Engine",
    "GenerationError",
    "HardwareError",
    "HuggingFacePipeline",
    "LaneError",
    "Metrics",
    "ModeError",
    "ModelError",
    "Recording",
    "RecordingError",
    "RequestError",
    "SplitwiserError",
    "Timeline",
    "VllmPipeline",
    "Workload",
    "WorkloadError",
    "compare",
    "doctor",
    "supported_modes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
