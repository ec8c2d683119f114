"""Adapters: train deltas of a base, and put them together.

Importing this package makes PEFT know the methods in `toolkit.adapters.methods`: at the end of PEFT's own import,
or at once where PEFT is there already. PEFT itself is not imported, so that commands stay fast.
"""

from toolkit.adapters.registration import register_with_peft

register_with_peft()
