"""Measures how much of the notes an adapter gives away: passages word for word, membership, and the exposure of canaries."""
