"""Options of the program that writes jobs for clusters."""
