"""The base that ships with the toolkit, the skills that it can be taught, and what it was made from."""
