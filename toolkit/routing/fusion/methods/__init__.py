"""How much each expert counts in a decoding step, one way per file."""
