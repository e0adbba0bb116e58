"""The training recipe of the miniature: its networks, its data, its stages and what they write."""
