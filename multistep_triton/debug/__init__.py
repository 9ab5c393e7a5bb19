"""Tools that say what was computed and whether it is right; the core imports none of them."""
