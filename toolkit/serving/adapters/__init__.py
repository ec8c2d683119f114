"""The adapters of an engine: what folders hold, and where it is, on disk, on the host or on the device."""
