"""What is told of requests: records, log lines, metrics."""
