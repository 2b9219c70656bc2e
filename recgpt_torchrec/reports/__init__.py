"""Reports: one HTML file about runs, from what the stages wrote. Values first (`values`), markup second (`page`)."""
