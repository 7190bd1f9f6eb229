"""Who is let in, with what, and how much of it: keys, places, limits, bodies, and the door that asks them all."""
