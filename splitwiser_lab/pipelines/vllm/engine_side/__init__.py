"""What vLLM's own Python runs: nothing here imports this package, only vLLM, torch and the standard library."""
