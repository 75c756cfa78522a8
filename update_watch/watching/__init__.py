"""What a running watch consists of beside its measurements.

`arguments`: what `watch` may be called with. `memory`: what is kept in checkpoints. May import all wings below the root;
"""
