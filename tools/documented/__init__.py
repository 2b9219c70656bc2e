"""Runs the commands and the Python code that README.md and the pages in docs/ show."""
