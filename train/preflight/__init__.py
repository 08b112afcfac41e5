"""`--check`: whether the machines can run what is configured, before a long run."""
