"""Segment ids: what an entry of a history is."""

INTERACTED = 0
"""The user did it; only these are targets."""
GENERATED = 1
"""The model answered it there (Algorithm 1 of the paper)."""
EXPOSED = 2
"""It was shown to the user, who did not click."""
SEGMENTS = 3
"""Segment ids are 0 to 2."""
