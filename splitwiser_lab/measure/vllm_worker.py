"""vLLM's side of the bench: read a line of JSON, generate, answer a line of JSON.

Run by vLLM's own Python, by path: it imports vLLM and the standard library, and nothing of this package.
"""

import os
import sys

# Python puts the folder of a script first on its path, and files here have names of the standard library's.
_here = os.path.dirname(os.path.realpath(__file__))
sys.path = [entry for entry in sys.path if os.path.realpath(entry or ".") != _here]

import contextlib  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402


def main(settings: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if settings["cpu"]:  # else the engine has a process of its own, beside this front end
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    else:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    import vllm

    more: dict[str, Any] = {}
    if settings["random_weights"]:  # a folder with a config.json and nothing else
        more["load_format"] = "dummy"
    if settings["memory_share"] is not None:
        more["gpu_memory_utilization"] = settings["memory_share"]
    if settings["kv_bytes"] is not None:  # then nothing is measured, which fails while others start on the same GPU
        more["kv_cache_memory_bytes"] = settings["kv_bytes"]
    llm = vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["max_model_len"],
        enforce_eager=settings["eager"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,  # token ids in, token ids out
        **more,
    )
    answer({"version": vllm.__version__})
    for line in sys.stdin:
        order = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=order["new_tokens"], ignore_eos=True, detokenize=False
        )
        with profiler() if order.get("profile") else contextlib.nullcontext() as profile:
            start = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        averages = profile.key_averages() if profile else ()
        ops = [(event.key, event.self_cpu_time_total / 1e6) for event in averages]
        answer({"seconds": seconds, "tokens": tokens, "ops": ops})


def profiler() -> Any:
    """PyTorch's, for the operators that this thread calls."""
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU])


def answer(message: dict[str, Any]) -> None:
    """One line to standard output."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
