"""Two nodes on one machine, and what happens to them: the parts of `tools.node_faults`."""
