"""Small experts that steer a large model at every decoding step, by arithmetic on logits."""
