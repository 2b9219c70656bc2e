"""Jobs for torchx, and what runs once on each node."""
