"""Vectors of all items, exact top-k and rank counts: the only place that scores every item."""
