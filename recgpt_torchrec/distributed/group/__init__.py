"""What the ranks of a job know of each other: who has joined, where each is, and each one's heartbeats."""
