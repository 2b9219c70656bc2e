"""What the program doctor looks at. Findings are made from values, so that every broken set-up can be a test."""
