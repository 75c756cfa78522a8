"""Training scripts as people write them, which know nothing of update-watch: `bench/run_unchanged.py` runs them under it.

    python SCRIPT OUT [bf16] [given]

trains 64 steps and stores the weights and a drawn number in OUT. `given`: the script is edited to watch itself.
May import nothing of update-watch but for `given`.
"""
