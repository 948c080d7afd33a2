"""What the operator sees: metrics, log lines, traces. Never inputs, vectors, keys or documents."""
