"""The multi-agent data engine: from videos to object-level instruction data (docs/engine.md)."""
