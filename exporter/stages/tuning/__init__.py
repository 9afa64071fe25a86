"""How INT8 of a target is made best: candidates, and which one is taken."""
