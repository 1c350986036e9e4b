"""Lost and hanging processes: heartbeats, limits of time, and stacks of all threads."""
