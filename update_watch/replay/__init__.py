"""The optimizer's rule once more, and how it is found out in which way that can be done.

To replay: `twin` runs the rule on copies that `optimizer_copy` and `attribute_copy` make, free of `side_effects`.
To find out, by trials in a `synthetic_training` or on a `synthetic_parameter`: `rule_kind` (which way of replay is right;
`replay_trial` is one attempt), `rounding_scheme` (what becomes of the part of an update that the stored weight cannot
hold), `rule_properties` (step size and decay), `state_forms` (which states there will be, and how they forget).
May import torch, NumPy and the root's `formats`; knows nothing of steps, samples or windows.
"""
