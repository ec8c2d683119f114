"""One file per kind of token router; see `token.router`."""
