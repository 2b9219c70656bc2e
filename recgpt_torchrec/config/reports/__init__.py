"""Options of the programs that look at what others made or will meet, and write nothing that a stage reads."""
