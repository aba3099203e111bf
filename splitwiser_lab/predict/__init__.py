"""What arithmetic says before anything runs: the roofline of both phases, and the time of any batch."""
