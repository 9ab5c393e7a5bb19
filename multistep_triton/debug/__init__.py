"""Debugging tools that show what a call computed and check it; importing the core imports none of them."""
