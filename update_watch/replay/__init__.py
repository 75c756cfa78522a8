"""The optimizer's rule once more, and how it is found out in which way that can be done.

To replay: `twin` runs the rule on copies that `optimizer_copy` and `attribute_copy` make, free of `side_effects`; what is not
copied is `absent`; what an optimizer keeps in attributes may be `kept_states`; `scaled_weights` are for rules bound to a low-precision format.
To find out, by trials in a `synthetic_training` or on a `synthetic_parameter`: `rule_kind` (which way of
replay is right; `replay_trial` and `scaled_trial` are one attempt each), `rounding_scheme` (what becomes of the part of an
update that the stored weight cannot hold), `rule_properties` (step size and decay), `state_forms` (the states, how they forget).
May import torch, NumPy and the root's vocabulary; knows nothing of steps, samples or windows.
"""
