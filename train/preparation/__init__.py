"""From text to token shards: sources, filters and the writer that `python -m train.prepare` drives."""
