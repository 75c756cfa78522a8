"""What accumulates beside the weight: averages, weight decay, gradients over micro-batches, optimizer states, replicas.

Each is measured beside the steps of `measure`, with the same sampling and the same transfer.
"""
