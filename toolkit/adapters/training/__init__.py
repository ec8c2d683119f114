"""Ways to train: one method per file, chosen by name in `training.methods` of a spec."""
