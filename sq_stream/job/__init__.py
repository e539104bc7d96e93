"""One quantize job from start to end: plan, budget, journal, run, verify."""
