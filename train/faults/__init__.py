"""What a run does when a process dies, hangs or is told to stop."""
