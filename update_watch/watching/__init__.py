"""What a running watch consists of beside its measurements.

`arguments`: what `watch` may be called with. May import all wings below the root; nothing imports it but `watch`.
"""
