"""`update-watch run COMMAND`: a script is watched that nobody edits.

`command` starts it, with `startup` on its PYTHONPATH; there a start-up module waits for the first optimizer step, and hands
over to `session`. `settings` is what the one tells the other. May import the entrance and all below it.
"""
