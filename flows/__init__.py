"""The Docker sidecar flow, its tasks and its settings."""
