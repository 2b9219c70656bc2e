"""Jobs for torchx, and the launcher that runs once on each node."""
