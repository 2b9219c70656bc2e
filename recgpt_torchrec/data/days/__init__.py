"""A folder to which days are appended: what is recorded of it, and opening it as a dataset."""
