"""Move an adapter to another base without the data that it was trained on."""
