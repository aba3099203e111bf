"""The paper's vLLM pipeline on today's vLLM, which runs in Pythons of its own and is used by its public API alone."""
