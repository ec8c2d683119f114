"""Search for the coefficients of a merge: candidates are merged and measured, the best is written as a plain spec."""
