"""What is learned from a row: one objective per file, chosen by name in `objective:` of a spec."""
