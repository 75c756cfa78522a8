"""Where torch calls us: around the steps of one optimizer (`tap`), before the first step of any optimizer of the process
(`process_steps`), when a backward pass has made a gradient (`backward_passes`). May import `measure.device`,
`measure.plain_torch` and the root's vocabulary.
"""
