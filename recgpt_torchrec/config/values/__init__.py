"""Values of options that have a syntax of their own."""
