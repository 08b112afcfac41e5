"""The OpenAI-compatible server that `python -m infer.serve` starts: HTTP in front, one engine behind."""
