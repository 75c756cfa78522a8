"""What accumulates beside the weight: averages, weight decay, gradients over micro-batches, optimizer states, replicas.

Each is measured beside the steps of `measure`, with the same sampling and the same transfer, and is read by `windows`.
May import the files of `measure` (never `cohort`, `windows` or `watched_optimizer`, which import it), `replay`, and the
root's vocabulary.
"""
