"""Detection of lost and of hanging processes: heartbeats, time limits and stack traces."""
