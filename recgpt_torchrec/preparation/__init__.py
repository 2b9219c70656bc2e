"""From a raw interaction log to a dataset."""
