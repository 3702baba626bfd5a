"""What recipes/stability.py needs: runs side by side, what they left on disk, and their curves."""
