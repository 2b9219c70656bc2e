"""The encoder as a program in an export: written by `export --encoder.kind`, opened with torch alone."""
