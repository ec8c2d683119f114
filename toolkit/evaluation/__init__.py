"""What merges, adapters and routes are measured with."""
